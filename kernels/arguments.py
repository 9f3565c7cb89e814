"""Arguments that many functions hand on, typed once: custom operations of PyTorch have the fields of such a tuple."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", bool: "bool", str | None: "str?",
    torch.dtype | None: "ScalarType?",
}  # fmt: skip


class LinearArgs(NamedTuple):
    """The arguments of a linear, under the names, and with the meaning, that they have in `ops.linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    beside: Tensor | None = None
    scale: Tensor | None = None
    stream: Tensor | None = None
    stream_gain: Tensor | None = None
    norm_gain: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 1e-5
    activation: str | None = None
    residual: Tensor | None = None
    dtype: torch.dtype | None = None

    @property
    def outputs(self) -> int:
        """How many rows the weights have together."""
        return self.weight.shape[0] + (0 if self.beside is None else self.beside.shape[0])

    @property
    def columns(self) -> int:
        """How many the result has."""
        return self.outputs // 2 if self.activation == "swiglu" else self.outputs

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the product, which what was normalised is rounded to."""
        if self.stream is None and self.norm_gain is None:
            return self.x.dtype
        return self.dtype or (self.weight if self.scale is None else self.x).dtype

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of the result: that of the product, promoted with that of the residual."""
        dtype = self.product_dtype
        return dtype if self.residual is None else torch.promote_types(dtype, self.residual.dtype)

    @property
    def result(self) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape and the dtype of the result."""
        return (*self.x.shape[:-1], self.columns), self.result_dtype


def flat(function: Callable) -> tuple[Callable, str]:
    """A function that begins with a tuple such as `LinearArgs`, as one that has its fields as arguments instead.

    Args:
        function: its other arguments follow by position; it returns a tuple of tensors.
    Returns:
        that function, and its schema for `torch.library`, without a name.
    """
    hints = typing.get_type_hints(function)
    results = ", ".join(["Tensor"] * len(typing.get_args(hints.pop("return"))))
    (_, arguments), *others = hints.items()
    fields = typing.get_type_hints(arguments).items()
    schema = ", ".join(f"{SCHEMA_TYPES[kind]} {name}" for name, kind in (*fields, *others))
    count = len(fields)

    def flattened(*given):
        return function(arguments(*given)) if not others else function(arguments(*given[:count]), *given[count:])

    return flattened, f"({schema}) -> ({results})"
