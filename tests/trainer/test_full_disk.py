"""A disk that is full at some byte: one line, whole files, and a run that goes on when there is room."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from helpers.kills import Training, leftovers, run_job, same

KEPT = "the checkpoint of step [0-9]+ is kept, and the same command goes on from there|no checkpoint was saved before"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training, and what it leaves on a disk with room."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "given").mkdir()
    training, out = Training(folder / "given"), folder / "out"
    out.mkdir()
    ended = run_job(training.job(out), out)
    assert ended.code == 0, ended.said
    return training, training.result(out)


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a folder a disk of so many bytes; and another size, or None for room, of the same disk."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def resize(**options):
        remount = ["remount"] if os.path.ismount(disk) else []
        options = ",".join([*remount, *(f"{name}={value}" for name, value in options.items())])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        return disk

    if sys.platform != "linux" or os.geteuid():
        pytest.skip("no small disk can be mounted here: that needs root on Linux")
    yield resize
    if os.path.ismount(disk):
        subprocess.run(["umount", disk], check=True)


def explained(said: str, error: str) -> None:
    """A run ended in one line, which says why, and what is kept."""
    last = said.splitlines()[-1]
    kept = "" if "config.json" in last else f"; ({KEPT})"  # what is written before the run begins ends it at once
    assert re.fullmatch(rf"fastprior: error: \S+ could not be written: {error}{kept}", last), said
    assert said.count("fastprior: error") == 1 and "Traceback" not in said, said


def fill(whole, disk, roomy) -> int:
    """Train on a disk that is too small, then on it with room: the status of the first."""
    (training, wanted), out = whole, disk / "out"
    out.mkdir(exist_ok=True)
    first = run_job(training.job(out), out)
    training.read(out)
    assert leftovers(out) == []
    if first.code:
        assert first.code == 2
        explained(first.said, "No space left on device")
    roomy()
    second = run_job(training.job(out), out)
    assert second.code == 0, second.said
    assert same(training.result(out), wanted) and leftovers(out) == []
    return first.code


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(size=130_000), dict(size="1m", nr_inodes=9)], ids=str)
def test_a_full_disk(whole, small_disk, options):
    disk = small_disk(**options)
    assert fill(whole, disk, lambda: small_disk(size="8m", nr_inodes=10_000)) == 2


@pytest.mark.fuzz
def test_a_disk_that_is_full_at_any_byte(whole, small_disk, tmp_path):
    codes = []
    for size in range(2, 162, 4):  # pages
        disk = small_disk(size=size * 4096, nr_inodes=10_000)
        codes.append(fill(whole, disk, lambda: small_disk(size="8m")))
        subprocess.run(["umount", disk], check=True)
    print("exit codes by size", codes)
    assert codes[0] == 2 and codes[-1] == 0


@pytest.mark.slow
def test_files_that_cannot_grow(whole, tmp_path):
    """As with a quota: every file ends at some byte, on any system."""
    (training, wanted), out = whole, tmp_path / "out"
    out.mkdir()
    for size in (30, 1500, int(np.random.default_rng(0).integers(5_000, 40_000))):
        ended = run_job(training.job(out), out, "limit", size)
        training.read(out)
        assert ended.code == 2 and leftovers(out) == []
        explained(ended.said, "File too large")
    assert run_job(training.job(out), out).code == 0
    assert same(training.result(out), wanted)
