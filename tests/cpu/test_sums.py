"""Sums of rows of bytes and what is not finite in them, in C against PyTorch."""

import pytest
import torch

from fastprior.kernels import ops, reference
from fastprior.kernels.cpu import library, sums
from helpers.cpu_cases import NEEDS_KERNELS

pytestmark = NEEDS_KERNELS
FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64
OTHERS = torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64


def numbers(dtype: torch.dtype, rows: int = 5) -> torch.Tensor:
    draw = torch.Generator().manual_seed(rows)
    count = rows * reference.ROW // torch.empty((), dtype=dtype).itemsize
    return (torch.randn(count, generator=draw) * 100).to(dtype)


def expected(values: torch.Tensor) -> list[int]:
    rows = values.view(torch.uint8).view(-1, 64, 8).tolist()
    return [sum(int.from_bytes(word, "little") for word in row) % 2**64 for row in rows]


@pytest.mark.parametrize("dtype", [*FLOATS, *OTHERS], ids=str)
def test_sums_are_those_of_the_definition(dtype):
    values = numbers(dtype)
    got, finite = sums.sum_rows(values)
    assert got.dtype == torch.int64 and finite
    assert [number % 2**64 for number in got.tolist()] == expected(values)
    ((plain, plain_finite),) = reference.sum_rows([values])
    assert torch.equal(got, plain) and plain_finite


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_is_seen_wherever_it_stands(dtype):
    values, bits = numbers(dtype), {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    limits, quiet = torch.finfo(dtype), torch.tensor(torch.nan, dtype=dtype)
    fine = [limits.max, limits.min, limits.tiny, -limits.tiny, limits.smallest_normal / 4, 0.0, -0.0]
    for place in (0, 1, 2, 3, len(values) // 2, len(values) - 1):
        for value in fine:
            edited = values.clone()
            edited[place] = value
            assert sums.sum_rows(edited)[1], value
        for value in (torch.inf, -torch.inf, quiet, -quiet):
            edited = values.clone()
            edited[place] = value
            assert not sums.sum_rows(edited)[1] and not reference.sum_rows([edited])[0][1]
        edited = values.clone()
        edited[place] = torch.inf
        edited.view(bits)[place] += 1  # a NaN with the smallest payload
        assert edited[place].isnan() and not sums.sum_rows(edited)[1]


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_all_other_numbers_are_finite(dtype):
    values = torch.full((2 * reference.ROW,), 255, dtype=torch.uint8).view(
        torch.uint8 if dtype == torch.bool else dtype
    )
    assert sums.sum_rows(values)[1] and reference.sum_rows([values])[0][1]


def test_of_no_rows_and_of_numbers_that_begin_anywhere():
    got, finite = sums.sum_rows(torch.empty(0))
    assert got.shape == (0,) and finite
    data = torch.cat((torch.zeros(1), numbers(torch.float32)))[1:]
    assert data.data_ptr() % 8 == 4
    assert torch.equal(sums.sum_rows(data)[0], sums.sum_rows(data.clone())[0])


@pytest.mark.parametrize("values", [
    torch.zeros(127), torch.zeros(2, 128), torch.zeros(256)[::2], torch.zeros(128, device="meta"),
])  # fmt: skip
def test_what_does_not_fill_rows_is_refused(values):
    with pytest.raises(ValueError, match="they must fill rows of 512 bytes, side by side on the CPU"):
        sums.sum_rows(values)


def test_the_door_takes_what_is_worth_it(monkeypatch):
    parts = [numbers(torch.float32, 40), numbers(torch.bfloat16, 3), numbers(torch.int64, 7)]
    plain = reference.sum_rows(parts)
    parts[1][5] = torch.nan
    called = []
    monkeypatch.setattr(sums, "sum_rows", lambda values, run=sums.sum_rows: called.append(len(values)) or run(values))

    def taken() -> int:
        called.clear()
        got = ops.sum_rows(parts)
        assert [finite for _, finite in got] == [True, False, True]
        assert all(torch.equal(one, other) for (one, _), (other, _) in zip(got[::2], plain[::2]))
        return len(called)

    assert taken() == 0  # little: nothing is compiled for it
    monkeypatch.setattr(sums, "WORTH", sum(t.nbytes for t in parts))
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert taken() == 3
    torch.set_num_threads(before)
    with ops.using("reference"):
        assert taken() == 0
    monkeypatch.setattr(library, "is_at_hand", lambda: False)
    assert taken() == 0


def test_nothing_is_compiled_for_a_program_on_a_gpu(monkeypatch):
    assert library.is_at_hand()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert library.is_at_hand(), "it is there"
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "_load", lambda: pytest.fail("it was compiled"))
    assert not library.is_at_hand()
