"""The fuzzer sees what it is there to see: each fault is planted once."""

import os
import time

import numpy as np
import pytest

from helpers import fuzzing
from helpers.fuzz_reader import Reader, Wrong
from helpers.mutations import mutate


def _make(root):
    (root / "one").mkdir()
    np.save(root / "one" / "rows.npy", np.zeros((4, 4)))
    return [root / "one"]


VALID = b"\x93NUMPY\1\0v\0{'descr': '<f8', 'fortran_order': False, 'shape': (4, 4), }"


def _planted(fault):
    """A reader that is right about the valid file alone."""

    def read(folder):
        path = folder / "rows.npy"
        data = path.read_bytes() if path.is_file() else b""
        if not data.startswith(VALID) or data[128:] != bytes(128):
            fault(path)

    return Reader(_make, read)


def _clear(path):
    raise ValueError(f"{path} is damaged")


def _nameless(path):
    raise ValueError("it is damaged")


def _raw(path):
    raise KeyError(str(path))


def _wrong(path):
    raise Wrong("half loaded")


def _growth(path):
    np.ones(6 * 10**6)


def _hang(path):
    time.sleep(100)


def _signal(path):
    os.abort()


FAULTS = dict(error=_clear, nameless=_nameless, raw=_raw, wrong=_wrong, growth=_growth, hang=_hang, signal=_signal)
READERS = {name: _planted(fault) for name, fault in FAULTS.items()}


@pytest.mark.slow
def test_it_sees_each_kind_of_fault():
    found = fuzzing.run("--cases", "2", "--limit", "3", "--registry", "fuzz.test_fuzzing:READERS")
    seen = {name: {case["verdict"] for case in found if case["reader"] == name} - {"read"} for name in READERS}
    assert seen == {name: {"raw" if name == "nameless" else name} for name in READERS}
    assert all(f"{name}:0:" in fuzzing.faults(found, 0) for name in READERS if name != "error")


@pytest.mark.parametrize("name", ["a.npy", "a.json", "a.tar", "a.parquet", "a.safetensors", "a.bin"])
def test_a_seed_decides_what_a_mutation_is(name):
    from random import Random

    data = bytes(range(256)) * 4
    made = [[mutate(Random(seed), name, data, [b"other"]) for seed in range(60)] for _ in range(2)]
    assert made[0] == made[1] and len(set(made[0])) > 30


def test_what_a_clear_error_is(tmp_path):
    (tmp_path / "a.npy").touch()
    named, nameless = f"{tmp_path}/a.npy: truncated", "truncated"
    unicode = UnicodeDecodeError("utf-8", b"", 0, 0, named)
    for error in (
        ValueError(named),
        FileNotFoundError(2, "none", named),
        OSError(28, "full", named),
        ValueError("a.npy"),
    ):
        assert not fuzzing.clear(error, tmp_path, ()), error
    for error in (
        ValueError(nameless),
        KeyError(named),
        unicode,
        OSError(named),
        RuntimeError(named),
        MemoryError(named),
    ):
        assert fuzzing.clear(error, tmp_path, ()), error
    assert not fuzzing.clear(ValueError("state has no epoch"), tmp_path, ("state",))
