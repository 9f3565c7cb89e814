"""What tensors of files must be before a model takes them as weights: dense, of real numbers, and finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastprior.reading import quoted

FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite: by the least and the largest, in a tenth of the time of isfinite."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    return all(bound.isfinite() for bound in tensor.aminmax())  # NaN is both where there is one


def check_weights(tensors: Mapping[str, Any], where: str, *, integers: bool = False) -> None:
    """Raise ValueError, which begins with `where`, unless all are dense tensors of finite floats of 16 bits or more.

    integers: whether tensors of integers, such as positions and counts, are taken too.
    """
    for name, tensor in tensors.items():
        name = quoted(name)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{where}: {name} is a {type(tensor).__name__}; it must be a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type == "meta":
            kind = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else tensor.layout
            kind = "without its data" if tensor.device.type == "meta" else str(kind).removeprefix("torch.")
            raise ValueError(f"{where}: {name} is {kind}; it must be a dense tensor")
        if tensor.dtype not in FLOATS and (not integers or tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"{where}: {name} has dtype {tensor.dtype}; it must be floating point of 16 bits or more")
        if not is_finite(tensor):
            raise ValueError(f"{where}: {name} holds NaN or infinity; weights must be finite")
