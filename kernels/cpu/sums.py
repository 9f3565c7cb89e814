"""Sums of rows of bytes in C, which tell numbers that are not finite at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..reference import ROW
from . import library

WORTH = 2**24  # bytes: for fewer nothing is compiled
# of each kind of numbers the bits of the exponent, and the lowest of them
EXPONENTS = {
    torch.bfloat16: (0x7F80, 0x0080),
    torch.float16: (0x7C00, 0x0400),
    torch.float32: (0x7F80_0000, 0x0080_0000),
    torch.float64: (0x7FF0_0000_0000_0000, 0x0010_0000_0000_0000),
}


def sum_rows_where_taken(parts: Sequence[Tensor]) -> list[tuple[Tensor, bool]] | None:
    """See `ops.sum_rows`; None where C does not compute it."""
    parts = library.aliases(parts)
    known = all(t.is_cpu and (t.dtype in EXPONENTS or not t.is_floating_point()) for t in parts)
    if not known or sum(t.nbytes for t in parts) < WORTH or library.forced is not None or library.is_watched():
        return None
    if not library.is_at_hand():
        return None
    if (threads := torch.get_num_threads()) == 1:
        return list(map(sum_rows, parts))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(sum_rows, parts))


def sum_rows(values: Tensor) -> tuple[Tensor, bool]:
    """What `ops.sum_rows` gives of one tensor; raises ValueError where it has no full rows side by side on the CPU."""
    if not values.is_cpu or values.ndim != 1 or not values.is_contiguous() or values.nbytes % ROW:
        found = f"shape {tuple(values.shape)}, {values.dtype}, strides {values.stride()}"
        raise ValueError(f"values have {found}; they must fill rows of {ROW} bytes, side by side on the CPU")
    exponent = EXPONENTS.get(values.dtype, (0, 0))
    masks = (sum(mask << shift for shift in range(0, 64, 8 * values.itemsize)) for mask in exponent)
    sums = torch.empty(values.nbytes // ROW, dtype=torch.int64, device="cpu")
    return sums, not library.library().sum_rows(values.data_ptr(), len(sums), *masks, sums.data_ptr())
