"""Linear layers of few rows, which read the weights once, at the speed of memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, norm, reference
from .launch import as_rows, ceil_div, check_dtype, check_last_contiguous, check_shape, promoted

MAX_ROWS = 64
MAX_NORM_ROWS = 16  # each program normalises all rows for itself
MAX_SPLITS = 32
ACTIVATIONS = None, "gelu", "swiglu"
QUANTISED = torch.int8, torch.float8_e4m3fn


@triton.jit
def _affine(y, column, inside, scale_ptr, bias_ptr):
    """`y * scale + bias`, of the given columns."""
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + column, mask=inside, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["rows", "span", "splits"])
def _linear_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    norm_gain_ptr,
    norm_bias_ptr,
    residual_ptr,
    out_ptr,
    workspace_ptr,  # None unless the sum is split
    counters_ptr,
    rows,
    inner,
    dim,
    span,
    splits,
    stride_x_row,
    stride_weight_row,
    stride_residual_row,
    eps,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_NORM: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, BLOCK_M)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_columns = (row < rows)[:, None], column < inner
    x_row = x_ptr + row.to(tl.int64)[:, None] * stride_x_row
    weight_row = weight_ptr + column.to(tl.int64)[:, None] * stride_weight_row
    gate_row = weight_ptr + (inner + column).to(tl.int64)[:, None] * stride_weight_row

    if norm_gain_ptr is not None:
        total = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, dim, BLOCK_NORM):
            k = start + tl.arange(0, BLOCK_NORM)
            x = tl.load(x_row + k[None, :], mask=in_rows & (k < dim)[None, :], other=0.0, eviction_policy="evict_last")
            total += tl.sum(x.to(tl.float32), axis=1)
        mean = (total / dim)[:, None]
        total = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, dim, BLOCK_NORM):
            k = start + tl.arange(0, BLOCK_NORM)
            x = tl.load(x_row + k[None, :], mask=in_rows & (k < dim)[None, :], other=0.0, eviction_policy="evict_last")
            centred = tl.where((k < dim)[None, :], x.to(tl.float32) - mean, 0.0)
            total += tl.sum(centred * centred, axis=1)
        rstd = (1.0 / tl.sqrt_rn((total / dim + eps).to(tl.float32)))[:, None]

    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * span
    for start in range(first, tl.minimum(first + span, dim), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < dim
        in_weight = in_columns[:, None] & in_k[None, :]
        x = tl.load(x_row + k[None, :], mask=in_rows & in_k[None, :], other=0.0, eviction_policy="evict_last")
        if norm_gain_ptr is not None:
            normed = (x.to(tl.float32) - mean) * rstd
            normed *= tl.load(norm_gain_ptr + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
            if norm_bias_ptr is not None:
                normed += tl.load(norm_bias_ptr + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
            x = normed.to(x.dtype)
        weight = tl.load(weight_row + k[None, :], mask=in_weight, other=0.0, eviction_policy="evict_first")
        y = tl.dot(x, tl.trans(weight.to(x.dtype)), y, input_precision="tf32x3")
        if ACTIVATION == "swiglu":
            weight = tl.load(gate_row + k[None, :], mask=in_weight, other=0.0, eviction_policy="evict_first")
            gate = tl.dot(x, tl.trans(weight.to(x.dtype)), gate, input_precision="tf32x3")

    inside = in_rows & in_columns[None, :]
    if workspace_ptr is not None:
        outputs = inner * 2 if ACTIVATION == "swiglu" else inner
        cell = row[:, None] * outputs + column[None, :]
        tl.store(workspace_ptr + split * rows * outputs + cell, y, mask=inside)
        if ACTIVATION == "swiglu":
            tl.store(workspace_ptr + split * rows * outputs + inner + cell, gate, mask=inside)
        tl.debug_barrier()  # the arrival tells of the stores of all threads
        if tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") != splits - 1:
            return
        # the last to arrive sums in the order of the splits, whichever it is itself; what others wrote is not in its L1
        tl.store(counters_ptr + tile, 0)
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for part in range(splits):
            part_ptr = workspace_ptr + part * rows * outputs + cell
            y += tl.load(part_ptr, mask=inside, other=0.0, cache_modifier=".cg")
            if ACTIVATION == "swiglu":
                gate += tl.load(part_ptr + inner, mask=inside, other=0.0, cache_modifier=".cg")

    y = _affine(y, column, in_columns, scale_ptr, bias_ptr)
    if ACTIVATION == "swiglu":
        gate = _affine(gate, inner + column, in_columns, scale_ptr, bias_ptr)
        y *= gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        y *= 0.5 + 0.5 * tl.erf(y * 0.7071067811865476)
    if residual_ptr is not None:
        residual_row = residual_ptr + row.to(tl.int64)[:, None] * stride_residual_row
        y += tl.load(residual_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row[:, None] * inner + column[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Config:
    """How a linear is launched; `splits` programs share the sum of one tile of the result."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_stages: int
    num_warps: int = 4


def linear_config(rows: int, inner: int, dim: int, itemsize: int) -> Config:
    """The launch configuration for `rows` of `dim` values of `itemsize` bytes, and `inner` results of each."""
    block_m = next(block for block in (16, 32, 64) if rows <= block)
    block_k = 32 if itemsize == 4 and block_m > 16 else 256 // itemsize  # a product of fp32 takes many registers
    num_stages = 4 if block_m == 64 else 6
    steps = ceil_div(dim, block_k)
    # wide tiles read x half as often; 96 programs of them keep memory busy, and splitting has a price
    if steps == 1 or ceil_div(inner, 32) >= 96:
        return Config(block_m, 32, block_k, 1, num_stages)
    splits = max(2, ceil_div(132, ceil_div(inner, 16)))  # of narrow tiles, one program for each multiprocessor
    splits = min(splits, steps, MAX_SPLITS)
    return Config(block_m, 16, block_k, ceil_div(steps, ceil_div(steps, splits)), num_stages)  # none is empty


def linear_workspace(x: Tensor, weight: Tensor, activation: str | None = None) -> tuple[Tensor | None, Tensor | None]:
    """Workspace and counters of `linear_fwd` for these shapes; None where the sum is not split.

    The counters are zero before and after each call, so a captured graph can own both. Calls that may run at the same
    time, on different streams, must not share them.
    """
    (rows, dim), inner = x.shape, _inner(weight, activation)
    config = linear_config(rows, inner, dim, x.element_size())
    if config.splits == 1:
        return None, None
    counters = torch.zeros(ceil_div(inner, config.block_n), dtype=torch.int32, device=x.device)
    return launch.empty((config.splits, rows, len(weight)), x, torch.float32), counters


def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    norm_gain: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    *,
    workspace: Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """Launch `linear` of 1 to 64 rows, with a LayerNorm of 1 to 16; see `reference.linear`.

    Args:
        x: (rows, in), of any row stride, as are `weight` and `residual`.
        residual: (rows, out), or (rows, out / 2) with "swiglu".
        workspace, counters: from `linear_workspace`; allocated where the caller has none.
    """
    (rows, dim), inner = x.shape, _inner(weight, activation)
    config = linear_config(rows, inner, dim, x.element_size())
    if workspace is None:
        workspace, counters = linear_workspace(x, weight, activation)
    out = launch.empty((rows, inner), x, promoted(x, residual))
    launch.launch(
        _linear_fwd_kernel,
        (ceil_div(inner, config.block_n), config.splits),
        *(x, weight, bias, scale, norm_gain, norm_bias, residual, out, workspace, counters),
        *(rows, inner, dim, ceil_div(dim, config.block_k * config.splits) * config.block_k, config.splits),
        *(x.stride(0), weight.stride(0), inner if residual is None else residual.stride(0), eps),
        ACTIVATION=activation,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_NORM=512,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _inner(weight: Tensor, activation: str | None) -> int:
    """Columns of the result."""
    return weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0]


@torch.library.custom_op("fastprior::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    norm_gain: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    return linear_fwd(x, weight, bias, scale, norm_gain, norm_bias, eps, activation, residual)


@_linear.register_fake
def _(x, weight, bias, scale, norm_gain, norm_bias, eps, activation, residual):
    return x.new_empty((x.shape[0], _inner(weight, activation)), dtype=promoted(x, residual))


def _reference(x, weight, bias, scale, norm_gain, norm_bias, eps, activation, residual):
    return reference.linear(
        x,
        weight,
        bias if bias is None or scale is not None else bias.to(x.dtype),
        scale=scale,
        norm_gain=norm_gain,
        norm_bias=norm_bias,
        eps=eps,
        activation=activation,
        residual=residual,
    )


launch.by_reference(_linear, _reference)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    norm_gain: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`reference.linear` by one kernel, for up to 64 rows; PyTorch computes more, and every gradient.

    Sums are accumulated and finished in fp32. float8 weights need compute capability 8.9.

    Raises:
        ValueError: for an unknown activation, and where shapes, devices or strides do not fit. `weight` may be a slice
            of a larger one, with a stride between its rows.
        TypeError: where the weights have neither the dtype of `x` nor, with `scale`, are int8 or float8_e4m3fn.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}; it must be None, 'gelu' or 'swiglu'")
    check_dtype("x", x)
    check_shape("x", x, x.shape, x)
    if x.ndim == 0 or weight.ndim != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; they must be (..., in), (out, in)"
        )
    outputs, dim = weight.shape
    if activation == "swiglu" and outputs % 2:
        raise ValueError(f"weight has {outputs} rows; 'swiglu' needs an even number")
    check_shape("weight", weight, (outputs, x.shape[-1]), x)
    check_last_contiguous("weight", weight)
    if scale is None and weight.dtype != x.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}; without a scale it must have that of x, {x.dtype}")
    if scale is not None:
        check_dtype("weight (with a scale)", weight, QUANTISED)
        check_dtype("scale", scale, (torch.float32,))
    if norm_gain is None:
        norm_bias = None
    vectors = (
        ("bias", bias, outputs),
        ("scale", scale, outputs),
        ("norm_gain", norm_gain, dim),
        ("norm_bias", norm_bias, dim),
    )
    for name, vector, length in vectors:
        if vector is not None:
            check_dtype(name, vector)
            check_shape(name, vector, (length,), x)
            check_last_contiguous(name, vector)
    shape = (*x.shape[:-1], _inner(weight, activation))
    if residual is not None:
        check_dtype("residual", residual)
        check_shape("residual", residual, shape, x)

    rows = x.numel() // dim
    if rows > MAX_ROWS:
        return _reference(x, weight, bias, scale, norm_gain, norm_bias, eps, activation, residual)
    if norm_gain is not None and rows > MAX_NORM_ROWS:
        x, norm_gain, norm_bias = norm.layer_norm(x, norm_gain, norm_bias, eps), None, None
    x = as_rows(x)
    residual = None if residual is None else as_rows(residual)
    return _linear(x, weight, bias, scale, norm_gain, norm_bias, eps, activation, residual).view(shape)
