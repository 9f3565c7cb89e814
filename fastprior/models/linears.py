"""Linears as they stand in a network: kernels for what is known exactly, and calls for all else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprior.kernels import ops, reference
from fastprior.models.patches import are_called_as_they_are
from fastprior.models.quantised_linear import QuantisedLinear

PLAIN = nn.Parameter, Tensor  # subclasses may be sharded, or of 8 or 4 bits
DTYPES = torch.float64, torch.float32, torch.float16, torch.bfloat16


def are_known(*linears: nn.Module) -> bool:
    """Whether kernels may read weights instead of calls of linears: no wrapper, subclass, adapter, hook or patch."""
    for linear in linears:
        if type(linear) is nn.Linear:
            if type(linear._parameters.get("weight")) not in PLAIN:
                return False
        elif type(linear) is not QuantisedLinear:
            return False
    return are_called_as_they_are(*linears)


def scales_of(*linears: nn.Module) -> list[Tensor | None]:
    """The scale of each row of weights of 8 bits; None of other weights."""
    return [linear.scale if type(linear) is QuantisedLinear else None for linear in linears]


def dtype_of(linear: nn.Module, owner: nn.Module) -> torch.dtype:
    """The dtype that a linear takes: that of its weight, or for what is no `nn.Linear` of the module that it stands in.

    A wrapper need not have a weight, and one of 8 or 4 bits does not say what it takes.
    """
    if type(linear) is QuantisedLinear:
        return linear.product_dtype
    weight = linear.weight if isinstance(linear, nn.Linear) else None
    if isinstance(weight, Tensor) and weight.dtype in DTYPES:
        return weight.dtype
    return next((weight.dtype for weight in owner.parameters() if weight.dtype in DTYPES), torch.float32)


def operand_dtype(linear: nn.Module, owner: nn.Module, x: Tensor) -> torch.dtype:
    """`dtype_of` a linear, or where autocast would cast its operand x, that which it casts to: then nothing is cast."""
    dtype = dtype_of(linear, owner)
    return reference.autocast_dtype(x) or dtype if type(linear) is nn.Linear and dtype != torch.float64 else dtype


def projected(
    linear: nn.Module, x: Tensor, activation: str | None = None, residual: Tensor | None = None, known: bool = False
) -> Tensor:
    """`residual + activation(linear(x))`; whatever stands in the place of a linear (LoRA, 4 bits) is called.

    `known` says that `are_known` was asked before.
    """
    if known or are_known(linear):
        options = dict(scale=scales_of(linear)[0], activation=activation, residual=residual)
        return ops.linear(x, linear.weight, linear.bias, **options)
    y = linear(x)
    y = y if activation is None else F.gelu(y)
    return y if residual is None else y + residual


class Projections(nn.Sequential):
    """A sequence whose linears are fast for few rows too, see `kernels.ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = projected(module, x)
        return x
