"""The folder in which libraries are kept: what others may have written is not executed.

As OpenSSH does with keys: the folder, all above it and the library must belong to this user or to root, and nobody else
may write there. A library is opened once, and what was looked at is what is loaded, whoever renames files meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

WAIT_S = 120  # for another process that compiles; whoever may read a folder may lock it for ever
KILLED_S = 3600  # after which a compiler that has not ended was killed


def cache_dir() -> Path:
    given = os.environ.get("FASTPRIOR_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastprior"


@contextlib.contextmanager
def cache_folder() -> Iterator[tuple[Path, int]]:
    """`cache_dir`, made if need be, and a descriptor of it.

    Made by default it is for this user alone; one that was asked for, as for the users of an image, is for all whom the
    umask lets read.

    Raises:
        PermissionError: others may write there.
        OSError, RuntimeError: it cannot be made, or there is no home.
    """
    folder = cache_dir()
    folder.mkdir(mode=0o755 if os.environ.get("FASTPRIOR_CACHE") else 0o700, parents=True, exist_ok=True)
    folder = Path(os.path.realpath(folder))
    home = os.path.realpath(os.path.expanduser("~"))  # "~" where there is none
    for above in folder.parents:
        # as root's folders look to a user in a container of its own
        _check_writers(above.stat(), above, {0, os.geteuid(), os.stat("/").st_uid}, may_be_sticky=True)
        if str(above) == home:
            break
    with _opened(folder) as handle:
        _check_writers(os.fstat(handle), folder, {0, os.geteuid()})
        yield folder, handle


@contextlib.contextmanager
def fallback_folder() -> Iterator[tuple[Path, int]]:
    """A folder of this user alone among temporary files, and a descriptor of it. Raises OSError where there is none."""
    folder = Path(tempfile.gettempdir()) / f"fastprior-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            handle = stack.enter_context(_opened(folder))
            found = os.fstat(handle)
        except OSError as error:  # a link, or a file
            raise PermissionError(f"{folder} is not a folder of this user alone") from error
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(f"{folder} is not a folder of this user alone")
        yield folder, handle


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield handle
    finally:
        os.close(handle)


def _check_writers(found: os.stat_result, path: Path, owners: set[int], may_be_sticky: bool = False) -> None:
    """Raise PermissionError unless a file is of one of these owners, and nobody else may write it.

    Args:
        may_be_sticky: a folder, where everybody may make files, and rename none of others.
    """
    if found.st_uid not in owners:
        raise PermissionError(f"{path} belongs to user {found.st_uid}; it must be of user {os.geteuid()} or root")
    if may_be_sticky and found.st_mode & stat.S_ISVTX:
        return
    if found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _is_private(found.st_gid)):
        mode = f"{stat.S_IMODE(found.st_mode):o}"
        raise PermissionError(f"others may write to {path}, whose mode is {mode}; `chmod go-w {path}` forbids it")


def _is_private(group: int) -> bool:
    """Whether a group is root's, or this user's own: that of its name, without others, as an umask of 002 wants it."""
    import grp
    import pwd

    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a user of a container that has no name
        user = str(os.geteuid())
    try:
        name, _, _, members = grp.getgrgid(group)
    except KeyError:
        name, members = str(group), []
    return group == 0 or (name == user and set(members) <= {user, "root"})


def open_library(folder: int, name: str, path: Path) -> int | None:
    """A descriptor of a library that is whole; None where there is none. Raises PermissionError for that of others."""
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError:
        return None
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, handle)
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise PermissionError(f"{path} is no file")
        _check_writers(found, path, {0, os.geteuid()})
        with open(handle, "rb", closefd=False) as file:
            content = file.read()
        if hashlib.sha256(content[:-32]).digest() != content[-32:]:
            return None
        stack.pop_all()
    return handle


def name_of(handle: int, path: Path) -> str:
    """What to load, to have the file that was opened and no other: its descriptor, where the system names them."""
    name = f"/proc/self/fd/{handle}"
    return name if os.path.exists(name) else str(path)


@contextlib.contextmanager
def alone_in(folder: int) -> Iterator[None]:
    """Others that want to write there wait, where the system and its file system have locks."""
    end = time.monotonic() + WAIT_S
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        while time.monotonic() < end:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
    yield  # who closes the folder gives it free


def compile_into(path: Path, command: list[str]) -> None:
    """Compile a library, and its hash behind it, whole or not at all, whoever else does the same.

    What compilers left there that were killed long ago is removed.
    """
    with contextlib.suppress(OSError):
        for left in path.parent.glob(".*.so.*.tmp"):
            if time.time() - left.stat().st_mtime > KILLED_S:
                left.unlink()
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    mode = stat.S_IMODE(os.fstat(handle).st_mode)  # what the umask gives: linkers have modes of their own
    os.close(handle)
    try:
        subprocess.run([*command, "-o", str(part), "-lm"], check=True, capture_output=True)
        digest = hashlib.sha256(part.read_bytes()).digest()
        with part.open("ab") as file:
            file.write(digest)
        part.chmod(mode)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
