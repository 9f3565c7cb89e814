"""Checksums see what disks and memory do to numbers, and finite numbers are told from others."""

import zlib

import numpy as np
import pytest
import torch

from fastprior.kernels import ops
from fastprior.kernels.reference import is_finite
from fastprior.weight_files.checks import checksum, checksums, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]


def by_definition(tensor):
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    full = len(data) // 512 * 512
    rows = np.frombuffer(data[:full], "<u8").reshape(-1, 64)
    sums = np.array([sum(map(int, row)) % 2**64 for row in rows], "<u8")
    return f"{zlib.crc32(sums.tobytes() + data[full:]):08x}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 63, 64, 1000, 4097])
def test_definition(dtype, count):
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    name, digest = checksum(tensor).split()
    assert digest == by_definition(tensor) and f"torch.{name}" == str(dtype)


def test_layout_and_place_do_not_count():
    wide = torch.randn(64, 96)
    assert (
        checksum(wide[:, ::2]) == checksum(wide[:, ::2].contiguous()) == checksum(wide[:, ::2].clone().T.contiguous().T)
    )
    unaligned = torch.cat((torch.ones(1), wide.flatten()))[1:]
    assert unaligned.data_ptr() % 8 == 4 and checksum(unaligned) == checksum(wide)
    assert checksum(torch.tensor(1.5)) == checksum(torch.tensor([1.5]))


@pytest.mark.parametrize("change", ["bit", "sector", "swapped", "moved", "zeros", "type"])
def test_what_damage_looks_like(change):
    good = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    bad, rows = good.clone(), good.clone().view(-1, 128)
    for at in (0, 777, 4095):
        if change == "bit":
            bad = good.clone()
            bad.view(torch.int32)[at] ^= 1 << (at % 32)
        elif change == "sector":
            bad = rows.index_copy(0, torch.tensor([3]), rows[4:5]).flatten()
        elif change == "swapped":
            bad = rows[[1, 0, *range(2, 32)]].flatten()
        elif change == "moved":
            bad = good.roll(128)
        elif change == "zeros":
            bad = good.clone()
            bad[128:256] = 0
        if change == "type":
            assert compare({"w": good.half()}, checksums({"w": good}), ()) == ([], ["w"], [])
        else:
            assert compare({"w": bad, "v": good}, checksums({"w": good, "v": good}), ()) == (["w"], [], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_finite_numbers_are_told_from_others(dtype):
    for count in (1, 7, 33, 4099):
        good = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
        assert is_finite(good) and is_finite(good[:0])
        for value in (float("nan"), float("inf"), -float("inf")):
            for at in {0, count // 2, count - 1}:
                bad = good.clone()
                bad[at] = value
                assert not is_finite(bad)


def test_what_is_not_finite_is_told_with_and_without_a_checksum():
    for count, at in ((1000, 3), (1000, 999), (5, 0)):  # in full rows, and behind them
        good = torch.randn(count)
        bad = good.clone()
        bad[at] = torch.inf
        written = checksums({"w": bad})
        assert compare({"w": bad}, written, {"w"}) == ([], [], ["w"])
        assert compare({"w": bad}, {}, {"w"}) == ([], [], ["w"])
        assert compare({"w": bad}, written, ()) == ([], [], [])
        assert compare({"w": bad}, checksums({"w": good}), {"w"}) == (["w"], [], ["w"])


def test_large_files_are_looked_at_the_same():
    """In C, where there is a compiler: what is little goes through PyTorch."""
    tensors = dict(a=torch.randn(2**22 + 3), b=torch.arange(200), c=torch.randn(300, 7).bfloat16())
    large, floats = checksums(tensors), {"a", "c"}
    with ops.using("reference"):
        assert checksums(tensors) == large and compare(tensors, large, floats) == ([], [], [])
    assert compare(tensors, large, floats) == ([], [], [])
    tensors["a"][2**21] = torch.nan
    tensors["b"][7] += 1
    assert compare(tensors, large, floats) == (["a", "b"], [], ["a"])
