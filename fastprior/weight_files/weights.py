"""What tensors of files must be before a model takes them as weights: dense, of real numbers, and finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastprior.kernels.reference import is_finite
from fastprior.utils import first_few
from fastprior.weight_files.tensors import SMALL_VIEW, Unreadable

FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


def check_dense(tensors: Mapping[str, Tensor | Unreadable], where: str) -> None:
    """Raise ValueError unless these are dense tensors that hold about as many bytes as all of them seem to have.

    What several share, as the rotary frequencies of all layers, may seem twice as much.
    """
    held: dict[int, int] = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, Unreadable) or tensor.layout != torch.strided or tensor.device.type == "meta":
            kind = tensor.kind if isinstance(tensor, Unreadable) else f"a tensor of layout {tensor.layout}"
            raise ValueError(f"{where}: {first_few([key])} is {kind}; it must be a dense tensor")
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    claimed, real = sum(tensor.nbytes for tensor in tensors.values()), sum(held.values())
    if claimed > 2 * real + SMALL_VIEW:
        raise ValueError(f"{where}: its tensors claim {claimed:,} bytes and are views of {real:,}")


def check_weights(tensors: Mapping[str, Any], where: str, *, integers: bool = False) -> None:
    """Raise ValueError, which begins with `where`, unless all are dense tensors of finite floats of 16 bits or more.

    integers: whether tensors of integers, such as positions and counts, are taken too.
    """
    for key, tensor in tensors.items():
        if not isinstance(key, str):
            raise ValueError(f"{where} holds {first_few([key])}; it must hold tensors by name")
        if not isinstance(tensor, (Tensor, Unreadable)):
            raise ValueError(f"{where}: {first_few([key])} is a {type(tensor).__name__}; it must be a tensor")
    check_dense(tensors, where)
    for key, dtype in ((key, tensor.dtype) for key, tensor in tensors.items()):
        if dtype not in FLOATS and (not integers or dtype.is_floating_point or dtype.is_complex):
            rule = "it must be floating point of 16 bits or more"
            raise ValueError(f"{where}: {first_few([key])} has dtype {dtype}; {rule}")
    if bad := [key for key, tensor in tensors.items() if not is_finite(tensor)]:
        raise ValueError(f"{where} holds NaN or infinity in {first_few(bad)}")
