"""Where the compiled kernels are kept: what others may have put there is not executed; what root made serves all."""

import ctypes
import fcntl
import grp
import hashlib
import multiprocessing
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastprior.kernels.cpu import cache
from fastprior.kernels.cpu import library as cpu_library
from helpers.cpu_cases import NEEDS_KERNELS, QUICK, built

pytestmark = NEEDS_KERNELS
OTHER = 4711  # a user, and a group
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root takes the place of other users")


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A compiler that writes nothing into the library, and a place for temporary files."""
    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exec cc --version\nexit 0\n')
    script.chmod(0o755)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("CC", str(script))
    return script


@pytest.fixture
def umask():
    """Sets it; it comes back at the end."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def build(folder: Path) -> Path:
    with built(FASTPRIOR_CACHE=folder):
        handle, path = cpu_library.build()
    os.close(handle)
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def filled(folder: Path) -> Path:
    """A folder with a library that somebody else could have written, whole by its hash."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = build(folder)
    path.write_bytes(b"planted" + hashlib.sha256(b"planted").digest())
    return path


def of_another(path: Path, monkeypatch) -> None:
    """Make it another user's; who is not root only makes it look so."""
    if os.geteuid() == 0:
        os.chown(path, OTHER, OTHER)
        return
    inode, fstat, plain_stat = path.stat().st_ino, os.fstat, Path.stat

    def changed(found):
        return SimpleNamespace(st_uid=OTHER, st_gid=OTHER, st_mode=found.st_mode) if found.st_ino == inode else found

    monkeypatch.setattr(os, "fstat", lambda handle: changed(fstat(handle)))
    monkeypatch.setattr(Path, "stat", lambda path, **options: changed(plain_stat(path, **options)))


CASES = {
    "a folder that all may write": ("folder", 0o777, None, "others may write to .*cache.*777.*go-w"),
    "a folder where all may make files": ("folder", 0o1777, None, "others may write to .*cache"),
    "a folder of another": ("folder", 0o755, "of_another", f"cache belongs to user {OTHER}"),
    "a folder above that all may write": ("above", 0o777, None, "others may write to .*above"),
    "a folder above of another": ("above", 0o755, "of_another", f"above belongs to user {OTHER}"),
    "a library that all may write": ("library", 0o666, None, r"others may write to .*\.so"),
    "a library of another": ("library", 0o644, "of_another", rf"\.so belongs to user {OTHER}"),
    "a folder that a group may write": ("folder", 0o775, "of_a_group", "others may write to .*cache"),
    "a library that a group may write": ("library", 0o664, "of_a_group", r"others may write to .*\.so"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_others_may_have_written_is_not_used(tmp_path, monkeypatch, empty, umask, case):
    which, bits, change, words = CASES[case]
    library = filled(tmp_path / "above" / "cache")
    path = dict(above=tmp_path / "above", folder=library.parent, library=library)[which]
    path.chmod(bits)
    if change == "of_another":
        of_another(path, monkeypatch)
    elif change == "of_a_group":
        monkeypatch.setattr(cache, "_is_private", lambda group: False)
    with pytest.warns(RuntimeWarning, match=f"kept in {tmp_path / 'temporary'}/fastprior-.*{words}.*FASTPRIOR_CACHE"):
        other = build(tmp_path / "above" / "cache")
    assert other.parent == tmp_path / "temporary" / f"fastprior-{os.geteuid()}"
    assert other.name == library.name and not other.read_bytes().startswith(b"planted")
    assert mode(other.parent) == 0o700


def test_what_only_this_user_may_have_written_is_used(tmp_path, empty, umask):
    library = filled(tmp_path / "above" / "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build(library.parent) == library and library.read_bytes().startswith(b"planted")
        (tmp_path / "above").chmod(0o1777)  # as /tmp is: others may make files there, and not rename this
        (tmp_path / "link").symlink_to(library.parent)
        assert build(tmp_path / "link") == library


def test_a_link_in_place_of_the_library_is_not_followed(tmp_path, empty, umask):
    library = filled(tmp_path / "cache")
    library.rename(tmp_path / "elsewhere")
    library.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(RuntimeWarning, match="kept in"):
        assert build(tmp_path / "cache") != library


@pytest.mark.parametrize(
    "name, members, private",
    [
        ("user", [], True),
        ("user", ["user"], True),
        ("user", ["root", "user"], True),
        ("user", ["user", "mallory"], False),
        ("staff", [], False),
        (None, [], False),
    ],
)
def test_a_group_of_the_user_alone(monkeypatch, name, members, private):
    """An umask of 002 goes with groups that have the name of their one member."""

    def group(number):
        if name is None:
            raise KeyError(number)
        return name, "x", number, members

    monkeypatch.setattr(pwd, "getpwuid", lambda user: SimpleNamespace(pw_name="user"))
    monkeypatch.setattr(grp, "getgrgid", group)
    assert cache._is_private(OTHER) is private
    assert cache._is_private(0)


def test_a_group_of_a_user_without_a_name(monkeypatch):
    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(grp, "getgrgid", unknown)
    assert cache._is_private(os.geteuid()) and not cache._is_private(OTHER)


@pytest.mark.parametrize(
    "bits, of_folder, of_library", [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0, 0o755, 0o644)]
)
def test_modes_follow_the_umask(tmp_path, empty, umask, bits, of_folder, of_library):
    """And nobody else may write, whatever it is: what is made is found again."""
    umask(bits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = build(tmp_path / "asked")
        assert build(tmp_path / "asked") == path
    assert (mode(path.parent), mode(path)) == (of_folder, of_library)
    assert [found.name for found in path.parent.iterdir()] == [path.name], "nothing else is left"


def test_by_default_the_folder_is_of_this_user_alone(tmp_path, monkeypatch, empty, umask):
    monkeypatch.delenv("FASTPRIOR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / ".cache"))
    with built():
        handle, path = cpu_library.build()
    os.close(handle)
    assert path.parent == tmp_path / "home" / ".cache" / "fastprior" and mode(path.parent) == 0o700


def test_above_a_home_nothing_is_asked(tmp_path, monkeypatch, empty, umask):
    """Who keeps homes may give them to anybody; a home itself must be its user's."""
    monkeypatch.setenv("HOME", str(tmp_path / "homes" / "user"))
    monkeypatch.delenv("FASTPRIOR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "homes" / "user").mkdir(parents=True)
    (tmp_path / "homes").chmod(0o777)
    with built():
        handle, path = cpu_library.build()
        os.close(handle)
        assert path.is_relative_to(tmp_path / "homes")
        (tmp_path / "homes" / "user").chmod(0o777)
        with pytest.warns(RuntimeWarning, match="others may write to .*user"):
            os.close(cpu_library.build()[0])


def test_who_locks_the_folder_is_not_waited_for_for_ever(tmp_path, monkeypatch, empty, umask):
    monkeypatch.setattr(cache, "WAIT_S", 0.1)
    (tmp_path / "cache").mkdir()
    handle = os.open(tmp_path / "cache", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert build(tmp_path / "cache").exists()
    finally:
        os.close(handle)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system has no names of descriptors")
def test_what_was_looked_at_is_what_is_loaded(tmp_path, monkeypatch, umask):
    """Others that may rename files meanwhile have another loaded by its path."""
    source = "int answer(void) {{ return {}; }}\n"
    for name, number in (("good", 1), ("bad", 2)):
        (tmp_path / f"{name}.c").write_text(source.format(number))
        subprocess.run(["cc", "-shared", "-fPIC", "-o", f"{name}.so", f"{name}.c"], cwd=tmp_path, check=True)
    good = tmp_path / "good.so"
    good.write_bytes(good.read_bytes() + hashlib.sha256(good.read_bytes()).digest())
    folder = os.open(tmp_path, os.O_RDONLY)
    good.chmod(0o644)
    handle = cache.open_library(folder, "good.so", good)
    os.close(folder)
    os.replace(tmp_path / "bad.so", good)
    assert ctypes.CDLL(cache.name_of(handle, good)).answer() == 1
    assert ctypes.CDLL(str(good)).answer() == 2


@AS_ROOT
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_what_root_made_serves_a_user_who_may_not_write(monkeypatch, umask):
    """As an image is built: it is neither compiled again, nor is anything written."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        place.chmod(0o755)
        # a checkout may lie where the user has no way
        monkeypatch.setattr(cpu_library, "SOURCES", shutil.copytree(cpu_library.SOURCES, place / "c"))
        for path in (place / "c").iterdir():
            path.chmod(0o644)
        with built(QUICK, FASTPRIOR_CACHE=place / "cache"):
            assert cpu_library.unavailable() is None
        (place / "compiler").write_text('#!/bin/sh\n[ "$1" = --version ] && exec cc --version\nexit 1\n')
        (place / "compiler").chmod(0o755)

        def work():
            os.setgroups([])
            os.setgid(OTHER)
            os.setuid(OTHER)
            warnings.simplefilter("error")
            with built(QUICK, FASTPRIOR_CACHE=place / "cache", CC=place / "compiler"):
                sys.exit(cpu_library.unavailable() is not None)

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join(60)
        assert process.exitcode == 0
        assert len(list((place / "cache").iterdir())) == 1


def test_what_killed_compilers_left_is_removed(tmp_path):
    """Not what one may be writing now: the lock of the folder is given up where it lasts too long."""
    tmp_path.chmod(0o700)
    old, new = (tmp_path / f".cpu-0123.so.{digits}.tmp" for digits in ("0a1b2c3d", "4e5f6071"))
    other = tmp_path / "cpu-0123.so"
    for file in (old, new, other):
        file.touch()
    long_ago = time.time() - cache.KILLED_S - 60
    for file in (old, other):
        os.utime(file, (long_ago, long_ago))
    library = build(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {new.name, other.name, library.name}
