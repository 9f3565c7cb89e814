"""Linears of up to 16 rows, where reading the weights is all that takes time.

A program owns a few results and all of their sum, so nothing is handed over between programs: no workspace, counters or
fences. It asks for its weights, gains, biases and scales first and then, in a chain of dependent launches (compute
capability 9.0), waits for the launch before it, whose results it takes. With all of a row at hand, norms are in place.

Products run on tensor cores, for which the sum is cut in parts of equal length, a batch of small products: warps share
it, and the parts are added at the end.

In a chain no launch may write what one after it reads before its wait: weights and tables. All else is read and written
behind the wait, when every launch before has ended; so no buffer has to be kept for one that still reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import ceil_div, power_of_2, row_strides

MAX_ROWS = 16
MULTIPROCESSORS = 132  # of an H200: results are shared out so that all of them read
TILE_BYTES = (
    112 * 1024
)  # of weights in shared memory: two programs, such as one and the next launch's, fit side by side
CHUNK_BYTES = 32 * 1024  # that are under way at a time, behind those that were asked for before the wait
HELD = 48 * 32  # numbers of rows with a norm that a warp's registers hold, with room for a tile of weights
OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _load_rows(ptr, row, in_rows, stride, k, dim, EVEN: tl.constexpr):
    """Numbers of rows by parts of the sum, (parts, rows, columns)."""
    mask = in_rows[None, :, None]
    if not EVEN:
        mask = mask & (k < dim)
    at = row.to(tl.int64)[None, :, None] * stride + k
    return tl.load(ptr + at, mask=mask, other=0.0, cache_modifier=".cg")  # others wrote it


@triton.jit
def _load_first(ptr, row, in_rows, stride):
    """The first number of each row, (1, rows, 1)."""
    first = tl.load(ptr + row.to(tl.int64) * stride, mask=in_rows, other=0.0, cache_modifier=".cg")
    return first.to(tl.float32)[None, :, None]


@triton.jit
def _normed(chunks, first, gains, biases, k, dim, eps, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr):
    """LayerNorm of rows in chunks, all fp32, and the factors of it: mean and reciprocal deviation.

    Warps meet once: sums and squares are those of differences from a number of the row, its first. That is at most
    sqrt(dim) deviations from the mean, so the variance is right to dim units in the last place at worst.
    """
    total, squares = tl.zeros(chunks[0].shape[:2], tl.float32), tl.zeros(chunks[0].shape[:2], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        c = chunks[chunk] - first
        if not EVEN:
            c = tl.where(k + chunk * CHUNK < dim, c, 0.0)
        total += tl.sum(c, axis=2)
        squares += tl.sum(c * c, axis=2)
    total, squares = tl.split(tl.sum(tl.join(total, squares), axis=0))
    mean = (total / dim)[None, :, None]
    rstd = tl.rsqrt(tl.maximum((squares / dim)[None, :, None] - mean * mean, 0.0) + eps)
    mean += first
    out = ()
    for chunk in tl.static_range(CHUNKS):
        y = (chunks[chunk] - mean) * rstd
        if gains is not None:
            y *= gains[chunk].to(tl.float32)
        if biases is not None:
            y += biases[chunk].to(tl.float32)
        if not EVEN:
            y = tl.where(k + chunk * CHUNK < dim, y, 0.0)
        out += (y,)
    return out, mean, rstd


@triton.jit
def _load_vector(ptr, k, dim, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr):
    """A vector in chunks, for rows in chunks."""
    out = ()
    for chunk in tl.static_range(CHUNKS):
        at = k + chunk * CHUNK
        if EVEN:
            out += (tl.load(ptr + at),)
        else:
            out += (tl.load(ptr + at, mask=at < dim, other=0.0),)
    return out


@triton.jit
def _store_total(total_ptr, x, row, in_rows, at, dim):
    """Write a chunk of a stream's sum."""
    cell = total_ptr + row[None, :, None] * dim + at
    tl.store(cell, x.to(total_ptr.dtype.element_ty), mask=in_rows[None, :, None] & (at < dim))


@triton.jit
def _load_tile(ptr, row, in_tile, stride, k, dim, EVEN: tl.constexpr):
    """Weights of results by parts of the sum, (parts, results, columns); nobody reads them again soon."""
    at = row.to(tl.int64)[None, :, None] * stride + k
    mask = in_tile[None, :, None]
    if not EVEN:
        mask = mask & (k < dim)
    return tl.load(ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _multiply(weight, x, y, OPERAND: tl.constexpr):
    """Add the products of parts of the sum, (parts, results, rows): rows are the narrow side of the tensor cores."""
    return tl.dot(weight.to(OPERAND), tl.permute(x.to(OPERAND), (0, 2, 1)), y, input_precision="tf32x3")


@triton.jit
def _halves(y, HALF: tl.constexpr, BLOCK_M: tl.constexpr):
    """The two halves of the rows of (2 * HALF, BLOCK_M)."""
    return tl.split(tl.permute(tl.reshape(y, (2, HALF, BLOCK_M)), (1, 2, 0)))


@triton.jit(do_not_specialize=["rows"])
def _skinny_linear_fwd_kernel(
    x_ptr, weight_ptr, second_ptr, third_ptr, bias_ptr, second_bias_ptr, third_bias_ptr,
    scale_ptr, second_scale_ptr, third_scale_ptr, stream_ptr, stream_gain_ptr, norm_gain_ptr, norm_bias_ptr,
    residual_ptr, out_ptr,
    total_ptr,  # stream + norm(x); another buffer than the stream, which other programs may still read
    rows, first_outputs, second_outputs, third_outputs,  # of each weight; with "swiglu" half of it
    dim, span,
    group,  # rows whose results lie side by side
    stride_x_row, stride_weight_row, stride_second_row, stride_third_row, stride_stream_row, stride_residual_row,
    stride_out_group, stride_out_row, eps,
    ACTIVATION: tl.constexpr, STABLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr,
    OPERAND: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    CHUNK: tl.constexpr = PARTS * BLOCK_K  # columns, that fill dim where EVEN
    NORMED: tl.constexpr = STABLE or norm_gain_ptr is not None
    HOLDS: tl.constexpr = NORMED or stream_ptr is not None
    tile, column = tl.program_id(0), 0  # where the results of this weight begin
    outputs = first_outputs
    if second_ptr is not None:
        tiles = tl.cdiv(first_outputs, span)
        later = tile >= tiles
        tile -= tl.where(later, tiles, 0)
        column = tl.where(later, first_outputs, 0)
        outputs = tl.where(later, second_outputs, first_outputs)
        weight_ptr = tl.where(later, second_ptr, weight_ptr)
        stride_weight_row = tl.where(later, stride_second_row, stride_weight_row)
        if bias_ptr is not None:
            bias_ptr = tl.where(later, second_bias_ptr, bias_ptr)
        if scale_ptr is not None:
            scale_ptr = tl.where(later, second_scale_ptr, scale_ptr)
        if third_ptr is not None:
            tiles = tl.cdiv(second_outputs, span)
            later = later & (tile >= tiles)
            tile -= tl.where(later, tiles, 0)
            column += tl.where(later, second_outputs, 0)
            outputs = tl.where(later, third_outputs, outputs)
            weight_ptr = tl.where(later, third_ptr, weight_ptr)
            stride_weight_row = tl.where(later, stride_third_row, stride_weight_row)
            if bias_ptr is not None:
                bias_ptr = tl.where(later, third_bias_ptr, bias_ptr)
            if scale_ptr is not None:
                scale_ptr = tl.where(later, third_scale_ptr, scale_ptr)

    # before the wait: what no launch writes
    k = tl.arange(0, PARTS)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    result = tl.arange(0, BLOCK_N)
    if ACTIVATION == "swiglu":  # values, then their gates
        result = result % (BLOCK_N // 2)
        in_tile = (result < span) & (tile * span + result < outputs)
        weight_row = tile * span + result + tl.arange(0, BLOCK_N) // (BLOCK_N // 2) * outputs
    else:
        in_tile = (result < span) & (tile * span + result < outputs)
        weight_row = tile * span + result
    tiles_ahead = ()
    for chunk in tl.static_range(AHEAD):
        tiles_ahead += (_load_tile(weight_ptr, weight_row, in_tile, stride_weight_row, k + chunk * CHUNK, dim, EVEN),)
    stream_gains, gains, biases = None, None, None
    if stream_ptr is not None:
        stream_gains = _load_vector(stream_gain_ptr, k, dim, CHUNKS, CHUNK, EVEN)
        first_gain = tl.load(stream_gain_ptr).to(tl.float32)
    if norm_gain_ptr is not None:
        gains = _load_vector(norm_gain_ptr, k, dim, CHUNKS, CHUNK, EVEN)
        if norm_bias_ptr is not None:
            biases = _load_vector(norm_bias_ptr, k, dim, CHUNKS, CHUNK, EVEN)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + weight_row, mask=in_tile, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + weight_row, mask=in_tile, other=0.0)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()

    row = tl.arange(0, BLOCK_M)
    in_rows = row < rows
    if ACTIVATION == "swiglu":
        out_result = tl.arange(0, BLOCK_N // 2)
    else:
        out_result = tl.arange(0, BLOCK_N)
    out_column = tile * span + out_result
    inside = ((out_result < span) & (out_column < outputs))[:, None] & in_rows[None, :]
    out_column += column
    if residual_ptr is not None:
        residual_at = row.to(tl.int64)[None, :] * stride_residual_row + out_column[:, None]
        residual = tl.load(residual_ptr + residual_at, mask=inside, other=0.0).to(tl.float32)
    xs = ()
    if HOLDS:
        streams = ()
        for chunk in tl.static_range(CHUNKS):  # all are asked for before any is waited for
            at = k + chunk * CHUNK
            if stream_ptr is not None:
                streams += (_load_rows(stream_ptr, row, in_rows, stride_stream_row, at, dim, EVEN).to(tl.float32),)
            xs += (_load_rows(x_ptr, row, in_rows, stride_x_row, at, dim, EVEN).to(tl.float32),)
        first = _load_first(x_ptr, row, in_rows, stride_x_row)
        if stream_ptr is not None:
            stream_first = _load_first(stream_ptr, row, in_rows, stride_stream_row)
        tl.debug_barrier()  # or some are asked for when others are there
        if stream_ptr is not None:
            normed, mean, rstd = _normed(xs, first, stream_gains, None, k, dim, eps, CHUNKS, CHUNK, EVEN)
            first = stream_first + (first - mean) * rstd * first_gain
            xs = ()
            for chunk in tl.static_range(CHUNKS):
                xs += (streams[chunk] + normed[chunk],)
            if tl.program_id(0) == 0:
                for chunk in tl.static_range(CHUNKS):
                    _store_total(total_ptr, xs[chunk], row, in_rows, k + chunk * CHUNK, dim)
        if STABLE:
            top = tl.full((PARTS, BLOCK_M), -float("inf"), tl.float32)
            for chunk in tl.static_range(CHUNKS):
                top = tl.maximum(top, tl.max(tl.where(k + chunk * CHUNK < dim, xs[chunk], -float("inf")), axis=2))
            most = tl.max(top, axis=0)[None, :, None]
            divided = ()
            for chunk in tl.static_range(CHUNKS):
                divided += (xs[chunk] / most,)
            xs = divided
            first /= most
        if NORMED:
            xs, _, _ = _normed(xs, first, gains, biases, k, dim, eps, CHUNKS, CHUNK, EVEN)

    y = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        if chunk + AHEAD < CHUNKS:
            at = k + (chunk + AHEAD) * CHUNK
            tiles_ahead += (_load_tile(weight_ptr, weight_row, in_tile, stride_weight_row, at, dim, EVEN),)
        at = k + chunk * CHUNK
        if HOLDS:
            x = xs[chunk]
        else:
            x = _load_rows(x_ptr, row, in_rows, stride_x_row, at, dim, EVEN)
        y = _multiply(tiles_ahead[chunk], x, y, OPERAND)
    y = tl.reshape(tl.sum(tl.reshape(y, (PARTS, BLOCK_N * BLOCK_M)), axis=0), (BLOCK_N, BLOCK_M))

    if scale_ptr is not None:
        y *= scale[:, None]
    if bias_ptr is not None:
        y += bias[:, None]
    if ACTIVATION == "swiglu":
        y, gate = _halves(y, BLOCK_N // 2, BLOCK_M)
        y *= gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        y *= 0.5 + 0.5 * tl.erf(y * 0.7071067811865476)
    if residual_ptr is not None:
        y += residual
    out_row = (row // group).to(tl.int64) * stride_out_group + row % group * stride_out_row
    out_at = out_row[None, :] + out_column[:, None]
    tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class SkinnyConfig:
    """How a skinny linear is launched.

    Attributes:
        block_m: rows.
        span: results of a program, of `block_n` that it computes; with "swiglu" pairs of half of them.
        parts, block_k, chunks: the sum is `chunks` times `parts` side by side of `block_k`.
        ahead: chunks of weights that are asked for before the wait.
    """

    block_m: int
    block_n: int
    span: int
    parts: int
    block_k: int
    chunks: int
    ahead: int
    num_warps: int


def block_rows(rows: int) -> int:
    """Rows that registers and products have."""
    return max(4, power_of_2(rows))


def skinny_config(
    rows: int, outputs: int, dim: int, itemsize: int, pairs: bool = False, held: int = 0, quantised: bool = False
) -> SkinnyConfig:
    """The launch configuration of a linear.

    Args:
        outputs: of all weights; with `pairs` as many pairs.
        itemsize: bytes of a weight in shared memory.
        held: numbers of rows with a norm.
        quantised: whether weights have 8 bits.
    """
    span = ceil_div(outputs, MULTIPROCESSORS)
    each = 2 if pairs else 1
    # of what registers hold besides; weights of 8 bits stand there, too, before they are converted
    most = 64 if held <= 8 * HELD else 16 if quantised else 32
    block_n = min(most, max(8, power_of_2(span) * each))
    span = min(span, block_n // each)
    most = max(128, CHUNK_BYTES // (block_n * itemsize))
    chunk = next((c for c in (1024, 512, 256) if c <= most and -dim % c * 8 <= dim), 128)
    num_warps = 16 if dim > 1024 and held > 6 * HELD else 8
    parts = min(num_warps, chunk // 32)
    chunks = ceil_div(dim, chunk)
    ahead = max(1, min(chunks, TILE_BYTES // (block_n * chunk * itemsize)))
    return SkinnyConfig(block_rows(rows), block_n, span, parts, chunk // parts, chunks, ahead, num_warps)


class Weight(NamedTuple):
    """A linear's weight (out, in), its bias (out,), and the scale (out,) of one of 8 bits."""

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


def takes(rows: int, operand: torch.dtype) -> bool:
    """Whether a skinny linear takes so many rows, of products in 16 bits: those of fp32 would not fit registers."""
    return rows <= MAX_ROWS and operand in OPERANDS and operand.itemsize == 2


def holds(rows: int, dim: int) -> bool:
    """Whether it also takes their norm; longer rows need a launch for that."""
    return block_rows(rows) * dim <= 11 * HELD


def launch_skinny_linear(
    x: Tensor,
    weights: Sequence[Weight],
    out: Tensor,
    *,
    operand: torch.dtype,
    stream: Tensor | None = None,
    stream_gain: Tensor | None = None,
    total: Tensor | None = None,
    norm_gain: Tensor | None = None,
    norm_bias: Tensor | None = None,
    stable: bool = False,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> None:
    """Launch a linear of what `takes` allows: see `ops.linear` for what it computes.

    Args:
        x: (rows, in), any row stride.
        weights: one to three, whose results stand side by side; with "swiglu" one. All or none have a bias; or a scale.
        out: (rows, columns) or (groups, rows of each, columns), written; any row strides.
        operand: dtype of the product.
        total: (rows, in), contiguous, where a stream's sum is written; not the stream itself.
        stable: the norm first divides by the signed maximum of a row, see `ops.layer_norm`.
    """
    (rows, dim), pairs = x.shape, activation == "swiglu"
    counts = [len(w.weight) // (2 if pairs else 1) for w in weights]
    held = 0 if norm_gain is None and stream is None and not stable else block_rows(rows) * dim
    config = skinny_config(rows, sum(counts), dim, operand.itemsize, pairs, held, weights[0].scale is not None)
    out = out if out.ndim == 3 else out[:, None]
    given = [*weights, *[Weight(None)] * (3 - len(weights))]
    launch.launch(
        _skinny_linear_fwd_kernel, (sum(ceil_div(count, config.span) for count in counts),),
        x, *(w.weight for w in given), *(w.bias for w in given), *(w.scale for w in given),
        stream, stream_gain, norm_gain, norm_bias, residual, out, total,
        rows, *counts, *[0] * (3 - len(counts)), dim, config.span,
        out.shape[1], *row_strides(x, *(w.weight for w in given), stream, residual), *out.stride()[:2], eps,
        ACTIVATION=activation, STABLE=stable,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, PARTS=config.parts, BLOCK_K=config.block_k,
        CHUNKS=config.chunks, AHEAD=config.ahead, EVEN=dim % (config.parts * config.block_k) == 0,
        OPERAND=OPERANDS[operand], DEPENDENT=launch.in_chain(), chained=True,
        num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip
