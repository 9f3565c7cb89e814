"""Attention of a few suffix tokens over a cached prefix, and the output projection, in one launch.

Where all heads share one key and value head and there is one row, the whole cache is some 20 KB: each program of the
projection computes the attention of all heads for itself, which costs less than a launch of its own on a few programs.
It asks for its weights, the cache and the bias before it waits for the projections, see `skinny_linear`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Rotary
from . import launch
from .decode import MAX_SUFFIX, load_heads, load_prefix, load_rotary, prepare_heads
from .launch import ceil_div, power_of_2, row_strides
from .skinny_linear import MULTIPROCESSORS, OPERANDS, Weight
from .tiles import in_order, sum_parts

TILE_BYTES = 112 * 1024  # of weights
MAX_QUERIES = 64  # tokens times heads, both rounded up to powers of two: more take longer than a launch
MAX_PREFIX = 128  # columns of the cache, that a program attends to at once


@triton.jit
def _attend_project_fwd_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, cos_ptr, sin_ptr, bias_ptr, mask_ptr,
    weight_ptr, out_bias_ptr, out_scale_ptr, out_ptr,
    scale, seq, suffix, heads, prefix, dim_head, width, outputs, span,
    stride_q_seq, stride_k_seq, stride_v_seq, stride_prefix_k_seq, stride_prefix_v_seq, stride_cos, stride_sin,
    stride_bias_seq, stride_bias_head, stride_bias_column, stride_weight_row, stride_out_row,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, REST: tl.constexpr,
    BLOCK_N: tl.constexpr, VECTOR: tl.constexpr, WARPS: tl.constexpr, BLOCK_SUFFIX: tl.constexpr,
    COSINE: tl.constexpr, OPERAND: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    LOG2E: tl.constexpr = 1.4426950408889634  # powers of 2 take less time
    QUERIES: tl.constexpr = TOKENS * HEADS
    query = tl.arange(0, QUERIES)
    token, head = query // HEADS, query % HEADS
    rows = (token < seq) & (head < heads)
    position = suffix - seq + token
    offs_d = tl.arange(0, BLOCK_D)[None, :]

    # before the wait: weights, the cache and what is added to logits
    result = tl.arange(0, BLOCK_N)
    column = tl.program_id(0) * span + result
    in_tile = (result < span) & (column < outputs)
    # as in a skinny linear: a head is a part of the sum, and weights stay in the registers where they arrive
    head_of, feature = tl.arange(0, HEADS)[None, :, None, None], tl.arange(0, BLOCK_D)[None, None, None, :]
    weight_row = tl.permute(tl.reshape(column.to(tl.int64), (BLOCK_N // 8, 8)), (1, 0))[:, None, :, None]
    in_weight = tl.permute(tl.reshape(in_tile, (BLOCK_N // 8, 8)), (1, 0))[:, None, :, None]
    in_weight = in_weight & (head_of < heads) & (feature < dim_head)
    weight_at = weight_row * stride_weight_row + head_of * dim_head + feature
    weight = tl.load(weight_ptr + weight_at, mask=in_weight, other=0.0, eviction_policy="evict_first")
    weight = tl.reshape(tl.permute(weight, (1, 2, 0, 3)), (HEADS, BLOCK_N, BLOCK_D))
    weight = in_order(weight, HEADS, BLOCK_N, VECTOR)
    if out_bias_ptr is not None:
        out_bias = tl.load(out_bias_ptr + column, mask=in_tile, other=0.0).to(tl.float32)
    if out_scale_ptr is not None:
        out_scale = tl.load(out_scale_ptr + column, mask=in_tile, other=0.0)
    bias_rows = position * stride_bias_seq + head * stride_bias_head
    tile_k, tile_v, extra = load_prefix(
        prefix_k_ptr, prefix_v_ptr, bias_ptr, mask_ptr, bias_rows, rows, 0, prefix, offs_d, dim_head,
        stride_prefix_k_seq, stride_prefix_v_seq, stride_bias_column, BLOCK_C,
    )  # fmt: skip
    if REST > 0:
        rest_k, rest_v, rest_extra = load_prefix(
            prefix_k_ptr, prefix_v_ptr, bias_ptr, mask_ptr, bias_rows, rows, BLOCK_C, prefix, offs_d, dim_head,
            stride_prefix_k_seq, stride_prefix_v_seq, stride_bias_column, REST,
        )  # fmt: skip
    own = tl.arange(0, BLOCK_SUFFIX)
    kept = own < suffix
    if bias_ptr is not None:
        bias_at = bias_rows[:, None] + (prefix + own) * stride_bias_column
        own_extra = tl.load(bias_ptr + bias_at, mask=rows[:, None] & kept, other=-float("inf")).to(tl.float32)
    else:
        own_extra = tl.where(kept & (own <= position[:, None]), 0.0, -float("inf"))
    cos_q, sin_q, cos_k, sin_k = None, None, None, None
    if cos_ptr is not None:
        cos_q = load_rotary(cos_ptr, rows, position, offs_d, stride_cos, width, 1.0)
        sin_q = load_rotary(sin_ptr, rows, position, offs_d, stride_sin, width, 0.0)
        cos_k = load_rotary(cos_ptr, kept, own, offs_d, stride_cos, width, 1.0)
        sin_k = load_rotary(sin_ptr, kept, own, offs_d, stride_sin, width, 0.0)
    extra, own_extra, scale = extra * LOG2E, own_extra * LOG2E, scale * LOG2E
    if REST > 0:
        rest_extra *= LOG2E
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()

    kept_v = kept[:, None] & (offs_d < dim_head)
    v = tl.load(v_ptr + (own * stride_v_seq)[:, None] + offs_d, mask=kept_v, other=0.0, cache_modifier=".cg")
    q = load_heads(q_ptr, token * stride_q_seq + head * dim_head, rows, offs_d, dim_head)
    k = load_heads(k_ptr, own * stride_k_seq, kept, offs_d, dim_head)
    tl.debug_barrier()  # or some are asked for when others are there
    k = prepare_heads(k, cos_k, sin_k, COSINE, BLOCK_SUFFIX, BLOCK_D).to(OPERAND)
    q = prepare_heads(q, cos_q, sin_q, COSINE, QUERIES, BLOCK_D).to(OPERAND)

    # one softmax over what is there already
    logits = tl.dot(q, tl.trans(tile_k.to(OPERAND)), input_precision="tf32x3") * scale + extra
    own_logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale + own_extra
    top = tl.maximum(tl.max(logits, axis=1), tl.max(own_logits, axis=1))
    if REST > 0:
        rest_logits = tl.dot(q, tl.trans(rest_k.to(OPERAND)), input_precision="tf32x3") * scale + rest_extra
        top = tl.maximum(top, tl.max(rest_logits, axis=1))
    base = tl.where(top == -float("inf"), 0.0, top)[:, None]  # of rows that are none
    weights, own_weights = tl.exp2(logits - base), tl.exp2(own_logits - base)
    total = tl.sum(weights, axis=1) + tl.sum(own_weights, axis=1)
    acc = tl.dot(own_weights.to(OPERAND), v.to(OPERAND), input_precision="tf32x3")
    acc = tl.dot(weights.to(OPERAND), tile_v.to(OPERAND), acc, input_precision="tf32x3")
    if REST > 0:
        rest_weights = tl.exp2(rest_logits - base)
        total += tl.sum(rest_weights, axis=1)
        acc = tl.dot(rest_weights.to(OPERAND), rest_v.to(OPERAND), acc, input_precision="tf32x3")
    # results are rounded as where attention has a launch of its own; tokens and heads that are none are NaN so far
    x = tl.where(rows[:, None], acc * (1.0 / total)[:, None], 0.0).to(OPERAND)
    x = in_order(tl.reshape(x, (TOKENS, HEADS, BLOCK_D)), TOKENS, HEADS, VECTOR)
    y = tl.dot(weight.to(OPERAND), tl.permute(x, (1, 2, 0)), input_precision="tf32x3")
    if HEADS < WARPS:
        y = tl.sum(y, axis=0)  # (results, tokens)
    else:
        y = tl.sum(tl.reshape(y, (HEADS // WARPS, WARPS, BLOCK_N, TOKENS)), axis=0)
        y = sum_parts(tl.permute(y, (1, 2, 0)), BLOCK_N, TOKENS, WARPS)
    if out_scale_ptr is not None:
        y *= out_scale[:, None]
    if out_bias_ptr is not None:
        y += out_bias[:, None]
    row = tl.arange(0, TOKENS)
    cell = row.to(tl.int64)[None, :] * stride_out_row + column[:, None]
    tl.store(out_ptr + cell, y.to(out_ptr.dtype.element_ty), mask=in_tile[:, None] & (row < seq)[None, :])


@dataclass(frozen=True)
class AttendProjectConfig:
    """How it is launched: `span` results of a program, of `block_n`, and `block_c` columns of the cache at a time.

    What is left of the columns is a tile of `rest`.
    """

    tokens: int
    heads: int
    block_d: int
    block_c: int
    rest: int
    block_n: int
    span: int
    num_warps: int


def attend_project_config(seq: int, heads: int, dim_head: int, prefix: int, outputs: int) -> AttendProjectConfig:
    """The launch configuration for `seq` queries of so many heads, and `outputs` of the projection."""
    tokens, span = max(power_of_2(seq), 1), ceil_div(outputs, MULTIPROCESSORS)
    block_heads = max(power_of_2(heads), ceil_div(16, tokens))
    block_c = 16
    while 2 * block_c <= prefix:
        block_c *= 2
    rest = prefix - block_c if prefix > block_c else 0
    rest = max(16, power_of_2(rest)) if rest else 0
    block_n = max(8, power_of_2(span))
    num_warps = 4 if tokens * block_heads <= 64 else 8  # more would compute the same twice
    return AttendProjectConfig(
        tokens, block_heads, max(32, power_of_2(dim_head)), block_c, rest, block_n, span, num_warps
    )


def takes(rows: int, seq: int, heads: int, kv_heads: int, dim_head: int, prefix: int, operand: torch.dtype) -> bool:
    """Whether attention and projection are one launch: one row, whose heads share keys, and small enough."""
    if rows != 1 or kv_heads != 1 or not 16 <= dim_head <= 128 or prefix > MAX_PREFIX or operand.itemsize != 2:
        return False
    config = attend_project_config(seq, heads, dim_head, prefix, 1)
    tile = config.heads * config.block_d * config.block_n * operand.itemsize
    return config.tokens * config.heads <= MAX_QUERIES and tile <= TILE_BYTES


def launch_attend_project(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    weight: Weight,
    out: Tensor,
    *,
    scale: float,
    cosine: bool,
    rotary: Rotary | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """Launch `ops.decode_attention` of what `takes` allows, and a linear of its result.

    Args:
        q: (seq, heads, dim_head), of the last `seq` suffix tokens; heads lie side by side.
        k, v: (suffix, dim_head).
        prefix_k, prefix_v: (prefix, dim_head), in the dtype of the product; mask (prefix,).
        weight: (out, heads * dim_head).
        out: (seq, out), written, in any float dtype.
    """
    (seq, heads, dim_head), suffix, prefix, outputs = q.shape, len(k), len(prefix_k), len(weight.weight)
    config = attend_project_config(seq, heads, dim_head, prefix, outputs)
    cos, sin = rotary or (None, None)
    launch.launch(
        _attend_project_fwd_kernel, (ceil_div(outputs, config.span),),
        q, k, v, prefix_k, prefix_v, cos, sin, bias, mask, *weight, out,
        scale, seq, suffix, heads, prefix, dim_head, 0 if cos is None else cos.shape[1], outputs, config.span,
        *row_strides(q, k, v, prefix_k, prefix_v, cos, sin), *((0, 0, 0) if bias is None else bias.stride()),
        *row_strides(weight.weight, out),
        TOKENS=config.tokens, HEADS=config.heads, BLOCK_D=config.block_d, BLOCK_C=config.block_c,
        REST=config.rest, BLOCK_N=config.block_n, VECTOR=min(16 // weight.weight.itemsize, config.block_d // 4),
        WARPS=config.num_warps, BLOCK_SUFFIX=MAX_SUFFIX, COSINE=cosine, OPERAND=OPERANDS[q.dtype],
        DEPENDENT=launch.in_chain(), chained=True, num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip
