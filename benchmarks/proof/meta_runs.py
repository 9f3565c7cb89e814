"""Runs of the measured priors as `kernels.gpu.run` prepares them, of tensors that have shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprior.kernels.cpu.blocks import Block
from fastprior.kernels.gpu.run import Run, prepare_run
from fastprior.kernels.gpu.skinny_linear import Weight
from fastprior.kernels.gpu.step import RunTables

DEPTHS = {"D2-small": 12, "D2-large": 24, "PT-1B": 20}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class _Weights:
    """Matrices and vectors of a model, stored in 16 bits or, the matrices alone, in 8 with scales."""

    def __init__(self, dtype: torch.dtype, stored: torch.dtype | None):
        self.dtype, self.stored = dtype, stored

    def vectors(self, **sizes: int) -> dict[str, Tensor]:
        return {name: meta(size, dtype=self.dtype) for name, size in sizes.items()}

    def matrices(self, biased: bool, **shapes: tuple[int, int]) -> dict[str, Tensor]:
        made = {name: meta(*shape, dtype=self.stored or self.dtype) for name, shape in shapes.items()}
        if self.stored:
            made |= {f"{name}_scale": meta(shape[0]) for name, shape in shapes.items()}
        return made | (self.vectors(**{f"{name}_bias": shape[0] for name, shape in shapes.items()}) if biased else {})


def meta_run(
    model: str, dtype: torch.dtype, *, depth: int | None = None, stored: torch.dtype | None = None, prompts: int = 1
) -> Run:
    """A run with one sample of each prompt, of PT-1B with guidance.

    Args:
        depth: of fewer layers than the model has.
        stored: dtype of weights of 8 bits.
    """
    weights, depth = _Weights(dtype, stored), depth or DEPTHS[model]
    made = (_pt_run if model == "PT-1B" else _d2_run)(model, weights, depth, prompts)
    if made is None:
        raise ValueError(f"model={model!r}, prompts={prompts}; kernels of few tokens take no run of it")
    return made


def _d2_run(model: str, weights: _Weights, depth: int, prompts: int) -> Run | None:
    width, inner, dim_head = 768, 3072, 64
    heads, prefix = (12, 79) if model == "D2-small" else (32, 258)
    own = heads * dim_head
    shapes = dict(q=(own, width), k=(2 * dim_head, width), out=(width, own))
    shapes |= dict(expand=(2 * inner, width), contract=(width, inner))
    norms = weights.vectors(norm_gain=width, ff_gain=width, out_gain=width, inner_gain=inner)
    block = _block(weights.matrices(False, **shapes) | norms)
    head = _block(weights.matrices(False, q=(width, width)) | weights.vectors(norm_gain=width))
    dtype = weights.dtype
    tables = RunTables(meta(64, 6), None, meta(64, width), meta(64, 1, width, dtype=dtype), meta(width, dtype=dtype))
    return prepare_run(
        [block] * depth, head, *meta(2, depth, prompts, prefix, 1, dim_head, dtype=dtype).unbind(), dtype=dtype,
        rows=prompts, samples=1, heads=heads, scale=16.0, cosine=True, activation="swiglu", eps=1e-5, stable=True,
        tables=tables, rotary=tuple(meta(2, 3, 32).unbind()), bias=meta(3, heads, prefix + 3),
    )  # fmt: skip


def _pt_run(model: str, weights: _Weights, depth: int, prompts: int) -> Run | None:
    width, columns, heads, prefix = 2048, 768, 32, 78
    square = (width, width)
    shapes = dict(q=square, k=square, v=square, out=square, expand=(4 * width, width), contract=(width, 4 * width))
    norms = weights.vectors(norm_gain=width, norm_bias=width, ff_gain=width, ff_bias=width)
    block = _block(weights.matrices(True, **shapes) | norms)
    normed = weights.vectors(norm_gain=width, norm_bias=width)
    head = _block(weights.matrices(True, q=(columns, width)) | normed)
    entry = weights.matrices(True, q=(width, columns))
    dtype = weights.dtype
    tables = RunTables(
        meta(25, 6), None, None, meta(25, 1, width, dtype=dtype), meta(width, dtype=dtype), meta(1, width), meta(width)
    )
    return prepare_run(
        [block] * depth, head, *meta(2, depth, 2 * prompts, prefix, heads, width // heads, dtype=dtype).unbind(),
        dtype=dtype, rows=2 * prompts, samples=1, guided=prompts, heads=heads, scale=0.125, cosine=False,
        activation="gelu", eps=1e-5, tables=tables, mask=meta(2 * prompts, prefix),
        entry=Weight(entry["q"], entry["q_bias"], entry.get("q_scale")), entry_position=meta(width),
    )  # fmt: skip


def _block(named: dict[str, Tensor]) -> Block:
    return Block(**dict.fromkeys(Block._fields) | named)
