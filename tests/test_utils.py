"""Files that appear whole or not at all, whoever dies or writes besides."""

import errno
import os
import resource
import stat
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastprior
from fastprior.cli import command_line
from fastprior.utils import atomic, remove_leftovers, save_array, temporary_folder
from helpers.command_line import error_of
from helpers.priors import make_prior


@contextmanager
def files_of(size):
    """In the block no file can grow beyond so many bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write(path):
    path.write_bytes(bytes(99_999))


WRITERS = {
    "python": write,
    "torch": lambda path: torch.save({"a": torch.zeros(30_000)}, path),
    "safetensors": lambda path: save_file({"a": torch.zeros(30_000)}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("size", [0, 1, 4096, 60_001])
def test_a_write_that_fails_says_what_the_system_said(tmp_path, writer, size):
    path = tmp_path / "x.npy"
    path.write_bytes(b"before")
    with files_of(size), pytest.raises(OSError) as caught, atomic(path) as temporary:
        WRITERS[writer](temporary)
    assert str(caught.value) == f"{path} could not be written: {os.strerror(errno.EFBIG)}"
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("x.npy", b"before")]


def numpys(path):
    save_array(path, np.zeros(3_000))


def torchs(path):
    with atomic(path) as temporary:
        torch.save({"a": torch.zeros(3_000)}, temporary)


def safetensors(path):
    with atomic(path) as temporary:
        save_file({"a": torch.zeros(3_000)}, temporary)


@pytest.mark.parametrize("writer", [numpys, torchs, safetensors])
@pytest.mark.parametrize("missing", [1, 2, 5, 21, 100, 3000])
def test_the_last_bytes_are_not_lost_in_silence(tmp_path, writer, missing):
    """As numpy loses them, and torch."""
    path = tmp_path / "x.npy"
    writer(path)
    before = path.read_bytes()
    with files_of(len(before) - missing), pytest.raises(OSError, match=r"x\.npy could not be written: File too large"):
        writer(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_an_error_of_a_write_within_a_write_is_said_once(tmp_path):
    path = tmp_path / "x.pth"
    with files_of(9), pytest.raises(OSError) as caught, atomic(path) as outer, atomic(outer) as inner:
        write(inner)
    assert str(caught.value) == f"{path} could not be written: {os.strerror(errno.EFBIG)}"
    assert not any(tmp_path.iterdir())


def test_the_modes_of_files_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        for name, writer in WRITERS.items():
            with atomic(tmp_path / name) as temporary:
                writer(temporary)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir() if path.suffix != ".npy"} == {0o640}


def test_the_folder_is_synchronised_after_the_name_is_there(tmp_path, monkeypatch):
    """Or a power failure would take the name back."""
    path, synced, plain = tmp_path / "x", [], os.fsync

    def fsync(handle):
        synced.append((stat.S_ISDIR(os.fstat(handle).st_mode), path.exists()))
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic(path) as temporary:
        write(temporary)
    assert synced == [(False, False), (True, True)]


def dies(path):
    """A process that dies while it writes, as another program's temporary file lies beside."""
    child = os.fork()
    if child == 0:
        with atomic(path) as temporary:
            (temporary.parent / ".tmpOfSomeWriter").write_bytes(b"half")
            os._exit(0)
    os.waitpid(child, 0)


def test_the_next_writer_removes_what_a_dead_one_left_and_nothing_else(tmp_path):
    path, other = tmp_path / "a.pth", tmp_path / "b.pth"
    dies(path), dies(other)
    (tmp_path / ".a.pth.0123abcd.tmp").write_text("of an earlier release")
    (tmp_path / ".a.pth.mine.tmp").write_text("no file of ours")
    assert len(list(tmp_path.iterdir())) == 4
    with temporary_folder(path) as living:
        with atomic(path) as temporary:
            assert living.exists()
            write(temporary)
        names = sorted(found.name for found in tmp_path.iterdir() if found != living)
    assert [name.partition(".pth.")[0] for name in names] == [".a", ".b", "a.pth"] and names[0] == ".a.pth.mine.tmp"


@pytest.mark.parametrize("name, path", [
    ("run_step7.pth", "run.pth"), ("5-7.pth", "{epoch}-{step}.pth"), ("x+y.pth", "x+y.pth"),
])  # fmt: skip
def test_what_savers_with_placeholders_left(tmp_path, name, path):
    dies(tmp_path / name)
    dies(tmp_path / "another.pth")
    remove_leftovers(tmp_path / path)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".another.pth.")


# commands


@pytest.fixture
def given(tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    prior = make_prior(condition_on_text_encodings=False)
    fastprior.save(prior, given / "prior.safetensors")
    np.save(given / "text.npy", np.eye(3, prior.image_embed_dim, dtype=np.float32))
    for name in ("images", "texts"):
        (given / name).mkdir()
        np.save(given / name / f"{name}_0.npy", np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32))
    return given


COMMANDS = {
    "convert": lambda given, out: ("convert", given / "prior.safetensors", out / "x.safetensors"),
    "convert for the peer": lambda given, out: ("convert", given / "prior.safetensors", out / "x.pth"),
    "sample": lambda given, out: (
        "sample", "--checkpoint", given / "prior.safetensors", "--text-embed", given / "text.npy", "--steps", 2,
        "--seed", 0, "--out", out / "x.npy",
    ),
    "init": lambda given, out: ("init", out, "--images", given / "images", "--texts", given / "texts"),
    "quickstart": lambda given, out: ("quickstart", "--out", out, "--steps", 1, "--no-progress"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_a_full_disk(given, tmp_path, capsys, command):
    out = tmp_path / "out"
    out.mkdir()
    argv = COMMANDS[command](given, out)
    with files_of(200):
        error = error_of(capsys, *argv)
    assert str(out) in error and f"could not be written: {os.strerror(errno.EFBIG)}" in error
    assert not [path for path in out.rglob("*") if path.is_file() or path.name.startswith(".")]
    if command != "quickstart":  # that takes seconds
        assert command_line.main([str(word) for word in argv]) == 0 and len(list(out.iterdir())) == 1


def test_output_on_a_full_disk(given, tmp_path, capfd):
    """The command's own file is whole, and its status says that something was lost."""
    child = os.fork()
    if child == 0:
        sys.stdout = open("/dev/full", "w")
        os._exit(command_line.main([str(word) for word in COMMANDS["convert"](given, tmp_path)]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    fastprior.load(tmp_path / "x.safetensors")


@pytest.mark.slow
def test_a_folder_whose_lock_is_about_to_be_made_is_left(tmp_path, monkeypatch):
    path, real, others = tmp_path / "file.txt", os.open, []

    def while_another_writes(name, *args, **kwargs):
        if str(name).endswith("in-use") and not others:
            others.append(name)
            remove_leftovers(path)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", while_another_writes)
    with atomic(path) as temporary:
        temporary.write_text("whole")
    assert others and path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]
