"""What is checked of tensors' numbers while a file is loaded: that they are finite, and those that were written."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Container, Mapping

import torch
from torch import Tensor

PART = 2**21  # bytes that are looked at in a row: what lies in a cache then
ROW = 512  # bytes that are summed: a sector, so that one that is lost, or lies elsewhere, is seen


def is_finite(tensor: Tensor) -> bool:
    """Whether a dense tensor of floating point numbers has neither NaN nor infinity; no memory is taken."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def checksum(tensor: Tensor) -> str:
    """The type of a tensor's numbers and a checksum of its bytes, such as "float32 5f2b0e6c".

    The bytes, little-endian and in the order of a contiguous tensor, are cut into rows of 512; each full row is summed
    as 64 integers of 64 bits modulo 2**64. The checksum is the CRC-32 of those sums, 8 bytes each, followed by the
    bytes that fill no row. It runs as fast as memory is read.
    """
    return _look(tensor, lambda part: True)[1]


def _look(tensor: Tensor, is_good: Callable[[Tensor], bool]) -> tuple[bool, str]:
    """Whether all parts of a tensor are good, and its checksum: each part is looked at while it lies in a cache."""
    values = tensor.detach().cpu().contiguous().flatten()
    if values.data_ptr() % 8:
        values = values.clone()
    good, check = True, 0
    for part in values.split(PART // values.itemsize):
        data = part.view(torch.uint8)
        full = len(data) // ROW * ROW
        sums = data[:full].view(torch.int64).view(-1, ROW // 8).sum(dim=1)
        check = zlib.crc32(memoryview(data[full:].numpy()), zlib.crc32(memoryview(sums.numpy()), check))
        good = good and is_good(part)
    return good, f"{str(tensor.dtype).removeprefix('torch.')} {check:08x}"


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: checksum(value) for key, value in tensors.items()}


def compare(
    tensors: Mapping[str, Tensor], written: Mapping[str, str], floats: Container[str]
) -> tuple[list[str], list[str], list[str]]:
    """Names of tensors that are not what was written, those of another type by now, and floats that are not finite.

    written: `checksums` of that time; tensors that it lacks are not compared.
    floats: the names of those whose numbers must be finite.
    """
    differing, converted, infinite = [], [], []
    for key, tensor in tensors.items():
        if key in written:
            finite, found = _look(tensor, is_finite if key in floats else lambda part: True)
            if found.partition(" ")[0] != written[key].partition(" ")[0]:
                converted.append(key)
            elif found != written[key]:
                differing.append(key)
        else:
            finite = key not in floats or is_finite(tensor)
        if not finite:
            infinite.append(key)
    return differing, converted, infinite
