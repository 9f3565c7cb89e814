"""What is checked of tensors' numbers while a file is loaded: that they are finite, and those that were written."""

from __future__ import annotations

import zlib
from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor

from fastprior.kernels import ops
from fastprior.kernels.reference import ROW, is_finite


def checksum(tensor: Tensor) -> str:
    """The type of a tensor's numbers and a checksum of its bytes, such as "float32 5f2b0e6c".

    The bytes, little-endian and in the order of a contiguous tensor, are cut into rows of 512; each full row is summed
    as 64 integers of 64 bits modulo 2**64. The checksum is the CRC-32 of those sums, 8 bytes each, followed by the
    bytes that fill no row. It runs as fast as memory is read.
    """
    ((check, _),) = _looks([tensor])
    return check


def _looks(tensors: Sequence[Tensor]) -> list[tuple[str, bool]]:
    """The checksum of each, and whether all its numbers are finite."""
    values = [tensor.detach().cpu().contiguous().flatten() for tensor in tensors]
    values = [t.clone() if t.data_ptr() % 8 else t for t in values]
    rows = [t[: t.nbytes // ROW * ROW // t.itemsize] for t in values]
    found = []
    for t, row, (sums, finite) in zip(values, rows, ops.sum_rows(rows)):
        rest = t[len(row) :]
        check = zlib.crc32(memoryview(rest.view(torch.uint8).numpy()), zlib.crc32(memoryview(sums.numpy())))
        found.append((f"{str(t.dtype).removeprefix('torch.')} {check:08x}", finite and is_finite(rest)))
    return found


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: check for key, (check, _) in zip(tensors, _looks(list(tensors.values())))}


def compare(
    tensors: Mapping[str, Tensor], written: Mapping[str, str], floats: Container[str]
) -> tuple[list[str], list[str], list[str]]:
    """Names of tensors that are not what was written, those of another type by now, and floats that are not finite.

    written: `checksums` of that time; tensors that it lacks are not compared.
    floats: the names of those whose numbers must be finite.
    """
    known = [key for key in tensors if key in written]
    looks = dict(zip(known, _looks([tensors[key] for key in known])))
    changed = [key for key, (check, _) in looks.items() if check != written[key]]
    converted = [key for key in changed if looks[key][0].partition(" ")[0] != written[key].partition(" ")[0]]
    finite = {key: looks[key][1] if key in looks else is_finite(tensors[key]) for key in tensors if key in floats}
    return [k for k in changed if k not in converted], converted, [k for k, is_good in finite.items() if not is_good]
