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
from .tiles import (
    add,
    columns,
    in_order,
    join,
    load_first,
    load_rows,
    load_tile,
    load_vector,
    moments,
    multiply,
    normed,
    pairs,
    store_total,
)

MAX_ROWS = 16
MULTIPROCESSORS = 132  # of an H200: results are shared out so that all of them read
MOST = 64  # results of a program
AHEAD = 64  # registers of a thread for weights that are asked for before the wait, of which short rows leave more
HELD = 12  # numbers of rows with a norm that a thread holds; more are read again
LONG = 2048  # columns
MAX_HELD = 16896  # numbers of rows with a norm: longer ones have a launch of their own
WARPS = 8
OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
    ACTIVATION: tl.constexpr, STABLE: tl.constexpr, BLOCK_M: tl.constexpr,
    PIECES: tl.constexpr, PIECE: tl.constexpr,  # results, that are computed together
    PARTS: tl.constexpr, VECTOR: tl.constexpr, CHUNKS: tl.constexpr, AHEAD: tl.constexpr,
    HOLDS: tl.constexpr, ROWS_AHEAD: tl.constexpr, EVEN: tl.constexpr,
    OPERAND: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    BLOCK_K: tl.constexpr = 4 * VECTOR
    BLOCK_N: tl.constexpr = (4 if PIECES == 3 else PIECES) * PIECE  # a power of two
    CHUNK: tl.constexpr = PARTS * BLOCK_K  # columns, that fill dim where EVEN
    NORMED: tl.constexpr = STABLE or norm_gain_ptr is not None
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
    ROWS: tl.constexpr = min(BLOCK_M, 8)
    read = columns(PARTS, 32 // ROWS, BLOCK_K)
    some_row = tl.arange(0, ROWS)[None, :, None, None, None, None]
    some_group = tl.arange(0, BLOCK_M // ROWS)[None, None, None, :, None, None]
    k = tl.arange(0, PARTS)[None, None, :, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, None, :]
    weight_rows, in_pieces = (), ()
    for piece in tl.static_range(PIECES):
        result, of_pair = piece * PIECE + tl.arange(0, PIECE), 0
        if ACTIVATION == "swiglu":  # eight values, then their gates
            of_pair = tl.arange(0, PIECE) // 8 * outputs
            result = piece * 8 + tl.arange(0, PIECE) % 8
        in_pieces += ((result < span) & (tile * span + result < outputs),)
        weight_rows += (tile * span + result + of_pair,)
    tiles_ahead = ()
    for chunk in tl.static_range(AHEAD):
        for piece in tl.static_range(PIECES):
            weight_row, in_piece = weight_rows[piece], in_pieces[piece]
            tiles_ahead += (
                load_tile(weight_ptr, weight_row, in_piece, stride_weight_row, chunk * CHUNK, dim, PARTS, VECTOR, EVEN),
            )
    stream_gains, gains, biases = (), (), ()
    for chunk in tl.static_range(ROWS_AHEAD):
        at = read + chunk * CHUNK
        if stream_ptr is not None:
            stream_gains += (load_vector(stream_gain_ptr, some_row, at, dim, EVEN),)
        if norm_gain_ptr is not None:
            gains += (load_vector(norm_gain_ptr, some_row, at, dim, EVEN),)
        if norm_bias_ptr is not None:
            biases += (load_vector(norm_bias_ptr, some_row, at, dim, EVEN),)
    share = 1.0 / dim
    if stream_ptr is not None:
        first_gain = tl.load(stream_gain_ptr).to(tl.float32)
    result = tl.arange(0, BLOCK_N)
    weight_row = tile * span + result
    if ACTIVATION == "swiglu":
        result = result // 16 * 8 + result % 8
        weight_row = tile * span + result + tl.arange(0, BLOCK_N) // 8 % 2 * outputs
    in_tile = (result < span) & (tile * span + result < outputs)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + weight_row, mask=in_tile, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + weight_row, mask=in_tile, other=0.0)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()

    xs, mean, rstd = (), None, None
    read_row = some_group * ROWS + some_row
    in_read = read_row < rows
    if HOLDS or NORMED:
        whole_row = tl.arange(0, BLOCK_M // ROWS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        first = load_first(x_ptr, whole_row, whole_row < rows, stride_x_row)
        total = tl.zeros((BLOCK_M // ROWS, ROWS, PARTS, BLOCK_K), tl.float32)
        squares = total
    if HOLDS:
        streams = ()
        for chunk in tl.static_range(CHUNKS):  # all are asked for before any is waited for
            at = read + chunk * CHUNK
            if stream_ptr is not None:
                streams += (load_rows(stream_ptr, read_row, in_read, stride_stream_row, at, dim, EVEN).to(tl.float32),)
            xs += (load_rows(x_ptr, read_row, in_read, stride_x_row, at, dim, EVEN),)
        if stream_ptr is not None:
            stream_first = load_first(stream_ptr, whole_row, whole_row < rows, stride_stream_row)
        tl.debug_barrier()  # or some are asked for when others are there
        if stream_ptr is not None:
            for chunk in tl.static_range(CHUNKS):
                total, squares = add(xs[chunk], first, total, squares, k + chunk * CHUNK, dim, EVEN)
            mean, rstd = moments(total, squares, first, share, eps)
            first = stream_first + (first - mean) * rstd * first_gain
            joined = ()
            for chunk in tl.static_range(CHUNKS):
                x = normed(xs[chunk], mean, rstd, stream_gains[chunk], None, k + chunk * CHUNK, dim, EVEN)
                joined += (streams[chunk] + x,)
            xs = joined
            if tl.program_id(0) == 0:
                for chunk in tl.static_range(CHUNKS):
                    store_total(total_ptr, xs[chunk], read_row, in_read, read + chunk * CHUNK, dim)
            total = tl.zeros_like(total)
            squares = total
        if STABLE:
            top = tl.full((BLOCK_M // ROWS, ROWS, PARTS), -float("inf"), tl.float32)
            for chunk in tl.static_range(CHUNKS):
                x = xs[chunk].to(tl.float32)
                top = tl.maximum(top, tl.max(tl.where(k + chunk * CHUNK < dim, x, -float("inf")), axis=3))
            most = tl.max(top, axis=2)[:, :, None, None]
            divided = ()
            for chunk in tl.static_range(CHUNKS):
                divided += (xs[chunk].to(tl.float32) / most,)
            xs = divided
            first /= most
        if NORMED:
            for chunk in tl.static_range(CHUNKS):
                total, squares = add(xs[chunk], first, total, squares, k + chunk * CHUNK, dim, EVEN)
    elif NORMED:
        for chunk in tl.static_range(CHUNKS):
            if ROWS_AHEAD < CHUNKS and chunk % 2 == 0 and chunk > 0:
                tl.debug_barrier()  # or all are asked for at once, which takes registers
            x = load_rows(x_ptr, read_row, in_read, stride_x_row, read + chunk * CHUNK, dim, EVEN)
            total, squares = add(x, first, total, squares, k + chunk * CHUNK, dim, EVEN)
    if not HOLDS:
        if NORMED:
            tl.debug_barrier()  # or they take registers before the others are summed up
        for chunk in tl.static_range(ROWS_AHEAD):
            xs += (load_rows(x_ptr, read_row, in_read, stride_x_row, read + chunk * CHUNK, dim, EVEN),)
    if NORMED:
        mean, rstd = moments(total, squares, first, share, eps)

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
    sums = ()
    for _piece in tl.static_range(PIECES):
        sums += (tl.zeros((PARTS, PIECE, BLOCK_M), tl.float32),)
    for chunk in tl.static_range(CHUNKS):
        at = k + chunk * CHUNK
        if chunk + ROWS_AHEAD < CHUNKS:
            later = read + (chunk + ROWS_AHEAD) * CHUNK
            xs += (load_rows(x_ptr, read_row, in_read, stride_x_row, later, dim, EVEN),)
            if norm_gain_ptr is not None:
                gains += (load_vector(norm_gain_ptr, some_row, later, dim, EVEN),)
            if norm_bias_ptr is not None:
                biases += (load_vector(norm_bias_ptr, some_row, later, dim, EVEN),)
        x = xs[chunk]
        if NORMED:
            gain, bias_of_norm = None, None
            if norm_gain_ptr is not None:
                gain = gains[chunk]
            if norm_bias_ptr is not None:
                bias_of_norm = biases[chunk]
            x = normed(x, mean, rstd, gain, bias_of_norm, at, dim, EVEN)
        x = tl.reshape(x.to(OPERAND), (BLOCK_M, PARTS, BLOCK_K))
        x = tl.permute(in_order(x, BLOCK_M, PARTS, VECTOR), (1, 2, 0))
        added = ()
        for piece in tl.static_range(PIECES):
            added += (multiply(tiles_ahead[chunk * PIECES + piece], x, sums[piece], OPERAND),)
        sums = added
        if chunk + AHEAD < CHUNKS:
            for piece in tl.static_range(PIECES):
                weight_row, in_piece = weight_rows[piece], in_pieces[piece]
                tiles_ahead += (
                    load_tile(
                        weight_ptr, weight_row, in_piece, stride_weight_row, (chunk + AHEAD) * CHUNK, dim,
                        PARTS, VECTOR, EVEN,
                    ),
                )  # fmt: skip
    y = join(sums, PIECES, PIECE, BLOCK_M)

    if scale_ptr is not None:
        y *= scale[:, None]
    if bias_ptr is not None:
        y += bias[:, None]
    if ACTIVATION == "swiglu":
        y, gate = pairs(y, BLOCK_N // 2, BLOCK_M)
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
        span: results of a program, of `pieces` times `piece` that it computes; with "swiglu" pairs of half of them.
        vector, chunks: the sum is `chunks` times a part for each warp, four threads with `vector` numbers each.
        ahead: chunks of weights that are asked for before the wait.
        holds: whether rows with a norm stay in registers; others are read again, a chunk at a time.
        rows_ahead: chunks of rows that are read before they are multiplied.
        registers: of a thread, at most.
    """

    block_m: int
    pieces: int
    piece: int
    span: int
    vector: int
    chunks: int
    ahead: int
    holds: bool
    rows_ahead: int
    registers: int | None


def block_rows(rows: int) -> int:
    """Rows that registers and products have."""
    return max(4, power_of_2(rows))


def skinny_config(
    rows: int, outputs: int, dim: int, itemsize: int, pairs: bool = False, normed: bool = False, joined: bool = False
) -> SkinnyConfig:
    """The launch configuration of a linear.

    Args:
        outputs: of all weights; with `pairs` as many pairs.
        itemsize: bytes of a weight.
        normed: whether rows have a norm.
        joined: whether more than that is done to them before they are multiplied.
    """
    each, vector = 2 if pairs else 1, 16 // itemsize
    span = min(ceil_div(outputs, MULTIPROCESSORS), MOST // each)
    piece = 8 if span <= 8 and not pairs else 16
    pieces = ceil_div(span * each, piece)
    chunks = ceil_div(dim, WARPS * 4 * vector)
    of_thread = block_rows(rows) * dim // (32 * WARPS)
    short, long = of_thread <= HELD, dim > LONG
    holds = joined or (normed and short)
    # registers, so that two programs fit side by side: of this launch and of the next
    ahead, registers = AHEAD, 104
    if holds:
        ahead, registers = (AHEAD * 3 // 2, 128) if short else (AHEAD * 3 // 8, None)
    elif normed:
        ahead, registers = AHEAD * 3 // 4, 128 if long else None
    ahead = max(1, min(chunks, ahead * 128 // (pieces * piece * 4 * vector * itemsize)))
    rows_ahead = chunks if holds or (normed and long) else 1
    return SkinnyConfig(block_rows(rows), pieces, piece, span, vector, chunks, ahead, holds, rows_ahead, registers)


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
    return block_rows(rows) * dim <= MAX_HELD


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
    joined = stream is not None or stable
    config = skinny_config(
        rows, sum(counts), dim, weights[0].weight.element_size(), pairs, joined or norm_gain is not None, joined
    )
    out = out if out.ndim == 3 else out[:, None]
    given = [*weights, *[Weight(None)] * (3 - len(weights))]
    launch.launch(
        _skinny_linear_fwd_kernel, (sum(ceil_div(count, config.span) for count in counts),),
        x, *(w.weight for w in given), *(w.bias for w in given), *(w.scale for w in given),
        stream, stream_gain, norm_gain, norm_bias, residual, out, total,
        rows, *counts, *[0] * (3 - len(counts)), dim, config.span,
        out.shape[1], *row_strides(x, *(w.weight for w in given), stream, residual), *out.stride()[:2], eps,
        ACTIVATION=activation, STABLE=stable,
        BLOCK_M=config.block_m, PIECES=config.pieces, PIECE=config.piece, PARTS=WARPS,
        VECTOR=config.vector, CHUNKS=config.chunks, AHEAD=config.ahead, HOLDS=config.holds,
        ROWS_AHEAD=config.rows_ahead, EVEN=dim % (WARPS * 4 * config.vector) == 0,
        OPERAND=OPERANDS[operand], DEPENDENT=launch.in_chain(), chained=True,
        num_warps=WARPS, num_stages=1, registers=config.registers if launch.in_chain() else None,
    )  # fmt: skip
