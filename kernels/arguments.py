"""Arguments that many functions hand on, typed once: custom operations of PyTorch have the fields of such a tuple."""

from __future__ import annotations

import typing
from collections import namedtuple
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", bool: "bool", str | None: "str?",
    torch.dtype | None: "ScalarType?",
}  # fmt: skip


# the fields of a `Block`
MATRICES = "q", "k", "v", "out", "expand", "contract"
SCALES, BIASES = (tuple(f"{name}_{kind}" for name in MATRICES) for kind in ("scale", "bias"))
NORMS = "norm_gain", "norm_bias", "out_gain", "ff_gain", "ff_bias", "inner_gain"


class Block(namedtuple("Block", (*MATRICES, *SCALES, *BIASES, *NORMS), defaults=(None,) * 23)):
    """The weights of a transformer block: attention and feed-forward, each behind a norm, on a residual stream.

    A head, the norm and the linear of what the last block gives, is one of `q` and what belongs to it.

    Attributes:
        q, k, v, out, expand, contract: the matrices. Without `v`, `k` has the values' rows behind those of the keys.
        q_scale, …, q_bias, …: of each matrix; scales are those of int8 weights.
        norm_gain, norm_bias, ff_gain, ff_bias: of the norms before attention and before the feed-forward.
        out_gain, inner_gain: of norms of attention's result, and before `contract`.
    """


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
