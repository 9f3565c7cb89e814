"""Linear layers of few rows, which read the weights once, at the speed of memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..arguments import LinearArgs, flat
from ..reference import NormArgs
from . import launch, norm, skinny_linear, workspace
from .launch import as_rows, ceil_div, check, check_dtype, promoted, row_strides

MAX_ROWS = 64
MAX_NORM_ROWS = 16  # each program normalises all rows for itself
MAX_SPLITS = 32
ACTIVATIONS = None, "gelu", "swiglu"
QUANTISED = torch.int8, torch.float8_e4m3fn
OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _affine(y, column, inside, scale_ptr, bias_ptr):
    """`y * scale + bias`, of the given columns."""
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + column, mask=inside, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _load_x(x_row, stream_row, gain_ptr, k, kept, in_k, mean, rstd):
    """Values of x; with a stream, `stream + norm(x)` in fp32, of the norm's mean and rstd."""
    x = tl.load(x_row + k[None, :], mask=kept, other=0.0, eviction_policy="evict_last")
    if stream_row is not None:
        gain = tl.load(gain_ptr + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
        stream = tl.load(stream_row + k[None, :], mask=kept, other=0.0, eviction_policy="evict_last").to(tl.float32)
        x = stream + (x.to(tl.float32) - mean) * rstd * gain
    return x


@triton.jit
def _moments(x_row, stream_row, gain_ptr, in_rows, dim, mean, rstd, eps, BLOCK: tl.constexpr):
    """Mean and reciprocal deviation of the rows that `_load_x` gives."""
    total = tl.zeros(in_rows.shape, tl.float32)
    for start in range(0, dim, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = _load_x(x_row, stream_row, gain_ptr, k, in_rows & (k < dim)[None, :], k < dim, mean, rstd)
        total += tl.sum(x.to(tl.float32), axis=1)[:, None]
    own_mean = total / dim
    total = tl.zeros(in_rows.shape, tl.float32)
    for start in range(0, dim, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = _load_x(x_row, stream_row, gain_ptr, k, in_rows & (k < dim)[None, :], k < dim, mean, rstd)
        centred = tl.where((k < dim)[None, :], x.to(tl.float32) - own_mean, 0.0)
        total += tl.sum(centred * centred, axis=1)[:, None]
    return own_mean, 1.0 / tl.sqrt_rn((total / dim + eps).to(tl.float32))


@triton.jit(do_not_specialize=["rows", "splits"])
def _linear_fwd_kernel(
    x_ptr, weight_ptr, beside_ptr, bias_ptr, scale_ptr, stream_ptr, stream_gain_ptr, norm_gain_ptr, norm_bias_ptr,
    residual_ptr, out_ptr,
    total_ptr,  # stream + norm(x)
    workspace_ptr, counters_ptr,  # None unless the sum is split
    rows,
    inner, columns,  # of the first weight, and with those of the weight beside
    dim, span, splits,
    stride_x_row, stride_weight_row, stride_beside_row, stride_stream_row, stride_residual_row, eps,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_NORM: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, BLOCK_M)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # of this weight
    in_rows, in_columns, out_column = (row < rows)[:, None], column < inner, column
    if beside_ptr is not None:
        first = tl.cdiv(inner, BLOCK_N)
        column -= tl.where(tile >= first, first * BLOCK_N, 0)
        in_columns = column < tl.where(tile >= first, columns - inner, inner)
        out_column = column + tl.where(tile >= first, inner, 0)
        weight_ptr = tl.where(tile >= first, beside_ptr, weight_ptr)
        stride_weight_row = tl.where(tile >= first, stride_beside_row, stride_weight_row)
    x_row = x_ptr + row.to(tl.int64)[:, None] * stride_x_row
    weight_row = weight_ptr + column.to(tl.int64)[:, None] * stride_weight_row
    gate_row = weight_ptr + (inner + column).to(tl.int64)[:, None] * stride_weight_row

    stream_row, x_mean, x_rstd = None, 0.0, 0.0
    if stream_ptr is not None:
        x_mean, x_rstd = _moments(x_row, None, None, in_rows, dim, 0.0, 0.0, eps, BLOCK_NORM)
        stream_row = stream_ptr + row.to(tl.int64)[:, None] * stride_stream_row
    if norm_gain_ptr is not None:
        mean, rstd = _moments(x_row, stream_row, stream_gain_ptr, in_rows, dim, x_mean, x_rstd, eps, BLOCK_NORM)

    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin = split * span
    for start in range(begin, tl.minimum(begin + span, dim), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < dim
        in_weight = in_columns[:, None] & in_k[None, :]
        x = _load_x(x_row, stream_row, stream_gain_ptr, k, in_rows & in_k[None, :], in_k, x_mean, x_rstd)
        if stream_ptr is not None:
            if tile == 0:
                cell = total_ptr + row[:, None] * dim + k[None, :]
                tl.store(cell, x.to(total_ptr.dtype.element_ty), mask=in_rows & in_k[None, :])
        if norm_gain_ptr is not None:
            x = (x.to(tl.float32) - mean) * rstd
            x *= tl.load(norm_gain_ptr + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
            if norm_bias_ptr is not None:
                x += tl.load(norm_bias_ptr + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
        x = x.to(OPERAND)
        weight = tl.load(weight_row + k[None, :], mask=in_weight, other=0.0, eviction_policy="evict_first")
        y = tl.dot(x, tl.trans(weight.to(OPERAND)), y, input_precision="tf32x3")
        if ACTIVATION == "swiglu":
            weight = tl.load(gate_row + k[None, :], mask=in_weight, other=0.0, eviction_policy="evict_first")
            gate = tl.dot(x, tl.trans(weight.to(OPERAND)), gate, input_precision="tf32x3")

    inside = in_rows & in_columns[None, :]
    if workspace_ptr is not None:
        outputs = inner * 2 if ACTIVATION == "swiglu" else columns
        cell = row[:, None] * outputs + out_column[None, :]
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

    y = _affine(y, out_column, in_columns, scale_ptr, bias_ptr)
    if ACTIVATION == "swiglu":
        gate = _affine(gate, inner + column, in_columns, scale_ptr, bias_ptr)
        y *= gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        y *= 0.5 + 0.5 * tl.erf(y * 0.7071067811865476)
    if residual_ptr is not None:
        residual_row = residual_ptr + row.to(tl.int64)[:, None] * stride_residual_row
        y += tl.load(residual_row + out_column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row[:, None] * columns + out_column[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class LinearConfig:
    """How a linear is launched; `splits` programs share the sum of one tile of the result."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_stages: int
    num_warps: int = 4


def linear_config(rows: int, inner: int, dim: int, itemsize: int) -> LinearConfig:
    """The launch configuration for `rows` of `dim` operands of `itemsize` bytes, and `inner` results of each."""
    block_m = next(block for block in (16, 32, 64) if rows <= block)
    block_k = 32 if itemsize == 4 else 128  # a product of fp32 takes many registers
    num_stages = 4 if block_m == 64 else 6
    steps = ceil_div(dim, block_k)
    # wide tiles read x half as often; 96 programs of them keep memory busy, and splitting has a price
    if steps == 1 or ceil_div(inner, 32) >= 96:
        return LinearConfig(block_m, 32, block_k, 1, num_stages)
    splits = max(2, ceil_div(132, ceil_div(inner, 16)))  # of narrow tiles, one program for each multiprocessor
    splits = min(splits, steps, MAX_SPLITS)
    return LinearConfig(block_m, 16, block_k, ceil_div(steps, ceil_div(steps, splits)), num_stages)  # none is empty


def linear_fwd(args: LinearArgs) -> tuple[Tensor, Tensor]:
    """Launch `linear` of 1 to 64 rows (rows, in), with norms of 1 to 16.

    x, weights, stream and residual have any row stride. Products of 16 bits of up to 16 rows are `skinny_linear`'s. A
    sum that is split takes the `workspace` that is current; without one it makes and clears its own.

    Returns:
        the result, and the sum of a stream, which is empty without one.
    """
    x, weight, bias, beside, scale, stream, stream_gain, norm_gain, norm_bias, eps, activation, residual, _ = args
    (rows, dim), columns, dtype = x.shape, args.columns, args.product_dtype
    if skinny_linear.takes(rows, dtype):
        return _skinny_fwd(args)
    inner = columns - (0 if beside is None else len(beside))
    config = linear_config(rows, columns, dim, dtype.itemsize)
    tiles = ceil_div(inner, config.block_n) + ceil_div(columns - inner, config.block_n)
    sums = counters = None
    if config.splits > 1:
        shared = workspace.current()
        sums, counters = shared.sums((config.splits, rows, args.outputs), x), shared.counters(tiles, x)
    out, total = _results(args)
    launch.launch(
        _linear_fwd_kernel, (tiles, config.splits),
        x, weight, beside, bias, scale, stream, stream_gain, norm_gain, norm_bias, residual,
        out, None if stream is None else total, sums, counters, rows, inner, columns, dim,
        ceil_div(dim, config.block_k * config.splits) * config.block_k, config.splits,
        *row_strides(x, weight, beside, stream, residual), eps,
        ACTIVATION=activation, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_NORM=512 // dtype.itemsize, OPERAND=OPERANDS[dtype],
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, total


def _skinny_fwd(args: LinearArgs) -> tuple[Tensor, Tensor]:
    (out, total), first = _results(args), len(args.weight)
    weights = [skinny_linear.Weight(args.weight, args.bias, args.scale)]
    if args.beside is not None:
        vectors = [(None, None) if t is None else (t[:first], t[first:]) for t in (args.bias, args.scale)]
        weights = [
            skinny_linear.Weight(weight, *(parts[number] for parts in vectors))
            for number, weight in enumerate((args.weight, args.beside))
        ]
    skinny_linear.launch_skinny_linear(
        args.x, weights, out, operand=args.product_dtype, stream=args.stream, stream_gain=args.stream_gain,
        total=None if args.stream is None else total, norm_gain=args.norm_gain, norm_bias=args.norm_bias, eps=args.eps,
        activation=args.activation, residual=args.residual,
    )  # fmt: skip
    return out, total


def _results(args: LinearArgs) -> tuple[Tensor, Tensor]:
    x, stream = args.x, args.stream
    out = launch.empty((len(x), args.columns), x, args.result_dtype)
    return out, x.new_empty(0) if stream is None else launch.empty(x.shape, x, promoted(x, stream))


def _reference(args: LinearArgs) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.linear`, which takes a bias in the dtype of the product alone."""
    if args.bias is not None and args.scale is None:
        args = args._replace(bias=args.bias.to(args.dtype))
    return reference.linear(args)


_linear = launch.custom_op("linear", linear_fwd, _results)
launch.by_reference(_linear, flat(_reference)[0])


def linear(args: LinearArgs) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.linear` by one kernel, for up to 64 rows; PyTorch computes more, and every gradient.

    Norms of more than 16 rows, and of long ones, are kernels of their own. Sums are accumulated and finished in fp32. A
    weight may be a slice of a larger one, with a stride between its rows; float8 weights need compute capability 8.9.
    """
    _check(args)
    leading, dtype, gain = args.x.shape[:-1], args.product_dtype, args.norm_gain
    x, residual, stream = (None if t is None else as_rows(t) for t in (args.x, args.residual, args.stream))
    rows, shift = x.shape[0], None if gain is None else args.norm_bias
    args = args._replace(x=x, residual=residual, stream=stream, norm_bias=shift, dtype=dtype)
    total = None
    held = not skinny_linear.takes(rows, dtype) or skinny_linear.holds(rows, x.shape[1])
    if (rows > MAX_NORM_ROWS or not held) and (stream is not None or gain is not None):
        if stream is not None:
            x = total = norm.layer_norm(NormArgs(x, args.stream_gain, eps=args.eps, after=stream))
        if gain is not None:
            x = norm.layer_norm(NormArgs(x, gain, shift, eps=args.eps, dtype=dtype))
        args = args._replace(x=x.to(dtype), stream=None, stream_gain=None, norm_gain=None, norm_bias=None)
    if rows > MAX_ROWS:
        out = _reference(args)
    else:
        out, summed = _linear(*args)
        total = total if args.stream is None else summed
    out = out.view(*leading, args.columns)
    return out if total is None else (out, total.view(*leading, -1))


def _check(args: LinearArgs) -> None:
    x, weight, beside, scale, dtype = args.x, args.weight, args.beside, args.scale, args.product_dtype
    if args.activation not in ACTIVATIONS:
        raise ValueError(f"activation={args.activation!r}; it must be None, 'gelu' or 'swiglu'")
    check(x, x=(x, x.shape))
    if x.ndim == 0 or weight.ndim != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; they must be (..., in), (out, in)"
        )
    if args.activation == "swiglu" and (len(weight) % 2 or beside is not None):
        wrong = f"weight has {len(weight)} rows" if beside is None else "a weight stands beside"
        raise ValueError(f"{wrong}; 'swiglu' needs one weight, with an even number of rows")
    if args.dtype not in (None, dtype):
        raise TypeError(f"dtype={args.dtype}; without a norm it must be that of x, {x.dtype}")
    if (args.stream is None) != (args.stream_gain is None):
        raise ValueError("stream and stream_gain must be given together")
    dim, outputs = x.shape[-1], args.outputs
    for name, given in ("weight", weight), ("beside", beside):
        if given is None:
            continue
        check(x, None, contiguous=True, **{name: (given, (given.shape[0], dim))})
        if scale is not None:
            check_dtype(f"{name} (with a scale)", given, QUANTISED)
        elif given.dtype != dtype:
            raise TypeError(f"{name} has dtype {given.dtype}; without a scale it must be that of the product, {dtype}")
    if scale is not None:
        check(x, (torch.float32,), contiguous=True, scale=(scale, (outputs,)))
    if args.norm_gain is not None:
        check(x, contiguous=True, norm_gain=(args.norm_gain, (dim,)), norm_bias=(args.norm_bias, (dim,)))
    check(x, contiguous=True, bias=(args.bias, (outputs,)), stream_gain=(args.stream_gain, (dim,)))
    check(x, stream=(args.stream, x.shape), residual=(args.residual, (*x.shape[:-1], args.columns)))
