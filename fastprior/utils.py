"""Small helpers: atomic files, and what training scripts import."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from fastprior.reading import quoted

if TYPE_CHECKING:
    import numpy as np

_LOCK = "in-use"  # a file of a temporary folder, locked while its maker lives


@contextmanager
def temporary_folder(path: str | os.PathLike) -> Iterator[Path]:
    """An empty folder beside a path, removed after the block; those that killed makers left are removed before it."""
    path, handle = Path(path), None
    remove_leftovers(path)
    folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _alone_in(path.parent):  # a folder whose lock is not there yet looks like an abandoned one
            folder.mkdir(0o700)
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
            _lock(handle)
        yield folder
    finally:
        if handle is not None:
            os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and is removed when it does not.

    So at any moment there is the old file or the new one, whole, and after the block the new one, even if power fails.
    What killed writers of the same path left is removed first. Raises FileNotFoundError where no file can be, and
    OSError, naming the file and what stands against it, where writing fails.
    """
    path, temporary = Path(os.path.realpath(path)), None
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written; it must be a file in a folder that exists")
    with ExitStack() as stack:
        try:
            # a folder, as writers have temporary files of their own beside what they write
            temporary = stack.enter_context(temporary_folder(path)) / path.name
            temporary.touch()
            mode = temporary.stat().st_mode  # what the umask gives; safetensors would leave 0600
            yield temporary
            _check_end(temporary)
            temporary.chmod(mode)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_names(path.parent)
        except (OSError, RuntimeError, SafetensorError) as error:  # of torch's writer and safetensors'
            why = _reason(error, temporary)
            failure = OSError(f"{path} could not be written: {why}")
            failure.why = why
            raise failure from error


def _check_end(written: Path) -> None:
    """Raise OSError for an archive that does not end as one: torch's writer loses the error of its last bytes."""
    with written.open("rb") as file:
        if file.read(4) == b"PK\3\4":
            file.seek(-min(22, file.seek(0, os.SEEK_END)), os.SEEK_END)
            if file.read(4) != b"PK\5\6":
                raise OSError("its last bytes were lost")


def save_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write a .npy file, atomically."""
    import numpy as np

    with atomic(path) as temporary, temporary.open("wb") as file:
        # not the file itself, to which numpy writes by C's functions, and loses the error of the last bytes
        np.save(SimpleNamespace(write=file.write), array, allow_pickle=False)


def _reason(error: Exception, written: Path) -> str:
    """Why a file could not be written, without its name."""
    if known := getattr(error, "why", None) or getattr(error, "strerror", None):
        return known
    try:  # writers of torch, safetensors and numpy do not say what stood against them: whoever writes more is told
        with written.open("ab") as file:
            file.write(bytes(2**20))
    except OSError as cause:
        return cause.strerror or str(cause)
    return str(error)


def sync_names(folder: Path) -> None:
    """Keep the names in a folder, even if power fails, on file systems that do so when asked."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _lock(handle: int) -> bool:
    """Lock a file until its handle is closed, at death at the latest; False where it was, or where nobody can tell."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


@contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Whether nobody else is in such a block for the same folder: waited for a second, where folders have locks."""
    with ExitStack() as stack:
        alone = False
        with suppress(ImportError, OSError):
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            for _ in range(100):
                with suppress(BlockingIOError):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    alone = True
                    break
                time.sleep(0.01)
        yield alone


def _is_abandoned(leftover: Path) -> bool:
    """Whether the writer of a temporary folder, or file of earlier releases, lives no more."""
    try:
        handle = os.open(leftover / _LOCK if leftover.is_dir() else leftover, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        return _lock(handle)
    finally:
        os.close(handle)


def remove_leftovers(path: str | os.PathLike) -> None:
    """Delete what `atomic` writes of a path left when they were killed, and nothing that is being written.

    The path may have placeholders in braces; those of a saver that keeps every checkpoint are found, too.
    """
    path = Path(path)
    stem = ".*".join(map(re.escape, re.split(r"\{.*?\}", path.stem)))
    name = re.compile(rf"\.\.?{stem}(_step\d+)?{re.escape(path.suffix)}\.[0-9a-f]{{8}}\.tmp(\..*)?")
    with suppress(OSError), os.scandir(path.parent) as entries:
        leftovers = [Path(entry) for entry in entries if name.fullmatch(entry.name)]
        if not leftovers:
            return
        with _alone_in(path.parent) as alone:
            for leftover in leftovers if alone else ():
                with suppress(OSError):
                    if _is_abandoned(leftover):
                        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _trains(module) -> bool:
    """Whether a module, or one within it, is in training mode."""
    left = [module]
    while left:
        module = left.pop()
        if module.training:
            return True
        left += [inner for inner in module._modules.values() if inner is not None]
    return False


def in_eval_mode(method):
    """Make a method run in eval mode; the mode comes back afterwards, also after an error."""

    @wraps(method)
    def inner(self, *args, **kwargs):
        if not _trains(self):  # to tell each module takes longer than to ask
            return method(self, *args, **kwargs)
        training = self.training
        self.eval()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.train(training)

    return inner


def nearest(name: str, known: Iterable[str]) -> str:
    """Name what is most like an unknown name, or else all that there are, for a message."""
    name, known = name[:100], list(known)  # of files, too, whose names may be of any length
    close = difflib.get_close_matches(name, known, n=1)
    return f"the nearest is {close[0]!r}" if close else f"it must be one of {', '.join(map(repr, known))}"


def first_few(items: Iterable) -> str:
    """The first five items, as text: of what files hold, too, so long ones are cut and odd characters escaped."""
    items = list(items)
    texts = (item if type(item) is str and len(item) < 100 and item.isprintable() else quoted(item) for item in items)
    return ", ".join(islice(texts, 5)) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


class Timer:
    """Seconds since it was made, or last reset."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.last_time = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.last_time


def print_ribbon(s: str, symbol: str = "=", repeat: int = 40) -> str:
    """`s` between two rows of `repeat` symbols; returned, not printed."""
    return f"{symbol * repeat} {s} {symbol * repeat}"


def import_or_print_error(pkg_name: str, err_str: str | None = None) -> ModuleType:
    """Import a package. Raises ImportError, with `err_str` as its message where given."""
    try:
        return importlib.import_module(pkg_name)
    except ImportError as error:
        if err_str is None:
            raise
        raise ImportError(err_str) from error
