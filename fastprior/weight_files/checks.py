"""What is checked of tensors' numbers while a file is loaded: that they are finite, and those that were written."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

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
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    if data.data_ptr() % 8:
        data = data.clone()
    full = len(data) // ROW * ROW
    sums = data[:full].view(torch.int64).view(-1, ROW // 8).sum(dim=1)
    check = zlib.crc32(memoryview(data[full:].numpy()), zlib.crc32(memoryview(sums.numpy())))
    return f"{str(tensor.dtype).removeprefix('torch.')} {check:08x}"


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: checksum(value) for key, value in tensors.items()}


def changed(tensors: Mapping[str, Tensor], written: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Names of tensors whose numbers are not those that were written, and of those that are of another type by now.

    written: their `checksums` at that time.
    """
    differing, converted = [], []
    for key in tensors.keys() & written.keys():
        found = checksum(tensors[key])
        if found.partition(" ")[0] != written[key].partition(" ")[0]:
            converted.append(key)
        elif found != written[key]:
            differing.append(key)
    return sorted(differing), sorted(converted)
