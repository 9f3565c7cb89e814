"""Attention of a few suffix tokens over a cached prefix and themselves: one launch, two where the prefix is split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from . import launch
from .launch import ceil_div, check, power_of_2, row_strides

MAX_SPLITS = 8
BLOCK_M = 16  # queries of a program: the least that a matrix product takes, since few programs are what is slow
MAX_SUFFIX = 16  # the suffix is one tile, and a matrix product takes no less


@triton.jit
def load_heads(ptr, offsets, rows, offs_d, dim_head):
    """Rows of raw projections, which others wrote."""
    kept = rows[:, None] & (offs_d < dim_head)
    return tl.load(ptr + offsets[:, None] + offs_d, mask=kept, other=0.0, cache_modifier=".cg")


@triton.jit
def load_rotary(ptr, rows, positions, offs_d, stride, width, other):
    """The rows of a rotary table at some positions, fp32; `other` where features are not rotated."""
    turned = rows[:, None] & (offs_d < width)
    return tl.load(ptr + positions[:, None] * stride + offs_d, mask=turned, other=other).to(tl.float32)


@triton.jit
def prepare_heads(x, cos, sin, COSINE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows rotated, where there are tables, and scaled to length 1 where COSINE, fp32."""
    x = x.to(tl.float32)
    if cos is not None:
        even, odd = tl.split(tl.reshape(x, (ROWS, BLOCK_D // 2, 2)))
        x = x * cos + tl.reshape(tl.join(odd, even), (ROWS, BLOCK_D)) * sin
    if COSINE:
        x *= tl.rsqrt(tl.maximum(tl.sum(x * x, axis=1), 1e-24))[:, None]
    return x


@triton.jit
def load_prefix(
    k_ptr, v_ptr, bias_ptr, mask_ptr, bias_rows, rows, start, end, offs_d, dim_head,
    stride_k_seq, stride_v_seq, stride_bias_column, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of keys and values, and what is added to its logits: -inf where there is no column."""
    offs_n = tl.arange(0, BLOCK_N)
    seen = start + offs_n < end
    kept = seen[:, None] & (offs_d < dim_head)
    first = tl.cast(start, tl.int64)
    k = tl.load(k_ptr + first * stride_k_seq + offs_n[:, None] * stride_k_seq + offs_d, mask=kept, other=0.0)
    v = tl.load(v_ptr + first * stride_v_seq + offs_n[:, None] * stride_v_seq + offs_d, mask=kept, other=0.0)
    extra = tl.where(seen, 0.0, -float("inf"))
    if mask_ptr is not None:
        extra += tl.load(mask_ptr + start + offs_n, mask=seen, other=0.0).to(tl.float32)
    extra = tl.zeros_like(bias_rows).to(tl.float32)[:, None] + extra
    if bias_ptr is not None:
        bias_at = bias_rows[:, None] + (start + offs_n) * stride_bias_column
        extra += tl.load(bias_ptr + bias_at, mask=rows[:, None] & seen, other=0.0).to(tl.float32)
    return k, v, extra


@triton.jit
def _attend(q, k, v, extra, scale, top, total, acc):
    """One tile of online softmax (Milakov & Gimelshein 2018): the running maximum, sum and weighted values."""
    logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale + extra
    raised = tl.maximum(top, tl.max(logits, axis=1))
    base = tl.where(raised == -float("inf"), 0.0, raised)  # -inf - -inf where nothing was seen yet
    weights = tl.exp(logits - base[:, None])
    shrink = tl.exp(top - base)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
    return raised, total * shrink + tl.sum(weights, axis=1), acc


@triton.jit(do_not_specialize=["seq", "suffix", "kv_heads", "group", "samples", "prefix"])
def _decode_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, cos_ptr, sin_ptr, bias_ptr, mask_ptr, out_ptr, lse_ptr,
    scale, seq, suffix, kv_heads, group, samples, prefix, span, dim_head, width,
    stride_q_row, stride_q_seq, stride_q_head, stride_k_row, stride_k_seq, stride_k_head,
    stride_v_row, stride_v_seq, stride_v_head, stride_prefix_k_prompt, stride_prefix_k_seq, stride_prefix_k_head,
    stride_prefix_v_prompt, stride_prefix_v_seq, stride_prefix_v_head, stride_cos, stride_sin,
    stride_bias_seq, stride_bias_head, stride_bias_column, stride_mask_prompt,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SUFFIX: tl.constexpr,
    COSINE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A tile of the queries of one row and key head, over `span` columns of the prefix; the first adds the suffix."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    OPERAND: tl.constexpr = (
        q_ptr.dtype.element_ty if q_ptr.dtype.element_ty == prefix_k_ptr.dtype.element_ty else tl.float32
    )
    tiles = tl.cdiv(seq * group, BLOCK_M)
    pair, split = tl.program_id(0) // tiles, tl.program_id(1)
    row, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    prompt = row // samples
    query = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = query < seq * group
    token, head = query // group, kv_head * group + query % group
    position = suffix - seq + token
    offs_d = tl.arange(0, BLOCK_D)[None, :]

    # every load that the first products need is under way before any of them is waited for
    prefix_k_ptr += prompt * stride_prefix_k_prompt + kv_head * stride_prefix_k_head
    prefix_v_ptr += prompt * stride_prefix_v_prompt + kv_head * stride_prefix_v_head
    if mask_ptr is not None:
        mask_ptr += prompt * stride_mask_prompt
    begin, end = split * span, tl.minimum(prefix, (split + 1) * span)
    bias_rows = position * stride_bias_seq + head * stride_bias_head
    tile_k, tile_v, extra = load_prefix(
        prefix_k_ptr, prefix_v_ptr, bias_ptr, mask_ptr, bias_rows, rows, begin, end, offs_d, dim_head,
        stride_prefix_k_seq, stride_prefix_v_seq, stride_bias_column, BLOCK_N,
    )  # fmt: skip
    own = tl.arange(0, BLOCK_SUFFIX)
    kept = own < tl.where(split == 0, suffix, 0)
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
    if DEPENDENT:  # what others wrote comes behind, past L1
        tl.extra.cuda.gdc_wait()
    v_at = (row * stride_v_row + kv_head * stride_v_head + own * stride_v_seq)[:, None] + offs_d
    kept_v = kept[:, None] & (offs_d < dim_head)
    v = tl.load(v_ptr + v_at, mask=kept_v, other=0.0, cache_modifier=".cg").to(OPERAND)
    q_at = row * stride_q_row + token * stride_q_seq + head * stride_q_head
    q = load_heads(q_ptr, q_at, rows, offs_d, dim_head)
    k_at = row * stride_k_row + kv_head * stride_k_head + own * stride_k_seq
    k = load_heads(k_ptr, k_at, kept, offs_d, dim_head)
    tl.debug_barrier()  # or some are asked for when others are there
    q = prepare_heads(q, cos_q, sin_q, COSINE, BLOCK_M, BLOCK_D).to(OPERAND)
    k = prepare_heads(k, cos_k, sin_k, COSINE, BLOCK_SUFFIX, BLOCK_D).to(OPERAND)

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top, total, acc = _attend(q, k, v, own_extra, scale, top, total, acc)
    for start in range(begin, end, BLOCK_N):
        next_k, next_v, next_extra = load_prefix(
            prefix_k_ptr, prefix_v_ptr, bias_ptr, mask_ptr, bias_rows, rows, start + BLOCK_N, end, offs_d, dim_head,
            stride_prefix_k_seq, stride_prefix_v_seq, stride_bias_column, BLOCK_N,
        )  # fmt: skip
        top, total, acc = _attend(q, tile_k.to(OPERAND), tile_v.to(OPERAND), extra, scale, top, total, acc)
        tile_k, tile_v, extra = next_k, next_v, next_extra

    out_rows = (row * seq + token) * kv_heads * group + head
    if lse_ptr is not None:
        out_rows += split.to(tl.int64) * (tl.num_programs(0) // tiles) * seq * group
        total = tl.where(total == 0, 1.0, total)  # of a split that sees nothing; its top is -inf
        tl.store(lse_ptr + out_rows, top + tl.log(total), mask=rows)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_rows[:, None] * dim_head + offs_d, out, mask=rows[:, None] & (offs_d < dim_head))


@triton.jit(do_not_specialize=["splits"])
def _combine_splits_kernel(
    partial_ptr, lse_ptr, out_ptr, splits, dim_head, MAX_SPLITS: tl.constexpr, BLOCK_D: tl.constexpr
):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    split, offs_d = tl.arange(0, MAX_SPLITS), tl.arange(0, BLOCK_D)
    at = split * rows + row
    kept = split < splits
    lse = tl.load(lse_ptr + at, mask=kept, other=-float("inf"))
    inside = offs_d < dim_head
    partial = tl.load(partial_ptr + at[:, None] * dim_head + offs_d, mask=kept[:, None] & inside, other=0.0)
    share = tl.exp(lse - tl.max(lse, axis=0))
    out = tl.sum(partial * share[:, None], axis=0) / tl.sum(share, axis=0)
    tl.store(out_ptr + row * dim_head + offs_d, out.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class DecodeConfig:
    block_n: int
    block_d: int
    splits: int
    span: int  # columns of the prefix that a split takes
    num_warps: int


def decode_attention_config(programs: int, prefix: int, dim_head: int, wide: bool) -> DecodeConfig:
    """How one call is laid out.

    Args:
        programs: tiles of queries, over all rows and key heads.
        prefix: columns.
        wide: whether products are of fp32.
    """
    block_d = max(32, power_of_2(dim_head))
    # where heads are not aligned every element takes a pointer; and fp32 queries stand in registers twice, as the high
    # and low part of tf32x3, which at 128 wide leaves little room
    aligned = dim_head % 16 == 0
    if block_d == 128:
        block_n = 64 if aligned and not wide else 16
    else:
        block_n = 32 if wide and not aligned else 128 if prefix > 64 and not wide and aligned else 64
    num_warps = 4 if block_d == 32 else 8
    splits = min(MAX_SPLITS, prefix // 256) if prefix >= 512 and programs <= 64 else 1
    span = ceil_div(ceil_div(prefix, splits), block_n) * block_n
    return DecodeConfig(block_n, block_d, ceil_div(prefix, span), span, num_warps)


def decode_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, cos: Tensor | None, sin: Tensor | None,
    bias: Tensor | None, mask: Tensor | None, scale: float, cosine: bool,
) -> Tensor:  # fmt: skip
    out = launch.empty((*q.shape[:2], q.shape[2] * q.shape[3]), q)
    launch_decode_attention(q, k, v, prefix_k, prefix_v, cos, sin, bias, mask, scale, cosine, out)
    return out


def launch_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, cos: Tensor | None, sin: Tensor | None,
    bias: Tensor | None, mask: Tensor | None, scale: float, cosine: bool, out: Tensor,
) -> None:  # fmt: skip
    """Launch `decode_attention` of tensors that fit it; out (rows, seq, heads * dim_head), contiguous, is written."""
    rows, seq, heads, dim_head = q.shape
    suffix, kv_heads = k.shape[1:3]
    prompts, prefix = prefix_k.shape[:2]
    group = heads // kv_heads
    wide = q.dtype != prefix_k.dtype or q.dtype == torch.float32
    programs = rows * kv_heads * ceil_div(seq * group, BLOCK_M)
    config = decode_attention_config(programs, prefix, dim_head, wide)
    split = config.splits > 1
    partial = launch.empty((config.splits, *out.shape), q, torch.float32) if split else out
    lse = launch.empty((config.splits, rows, seq, heads), q, torch.float32) if split else None
    launch.launch(
        _decode_attention_fwd_kernel, (programs, config.splits),
        q, k, v, prefix_k, prefix_v, cos, sin, bias, mask, partial, lse,
        scale, seq, suffix, kv_heads, group, rows // prompts, prefix, config.span, dim_head,
        0 if cos is None else cos.shape[1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *prefix_k.stride()[:3], *prefix_v.stride()[:3],
        *row_strides(cos, sin), *((0, 0, 0) if bias is None else bias.stride()), *row_strides(mask),
        BLOCK_M=BLOCK_M, BLOCK_N=config.block_n, BLOCK_D=config.block_d, BLOCK_SUFFIX=MAX_SUFFIX, COSINE=cosine,
        DEPENDENT=launch.in_chain(), chained=True,
        num_warps=config.num_warps, num_stages=1,  # tiles are fetched ahead by hand, before the queries are ready
    )  # fmt: skip
    if split:
        launch.launch(
            _combine_splits_kernel, (rows * seq * heads,), partial, lse, out, config.splits, dim_head,
            MAX_SPLITS=MAX_SPLITS, BLOCK_D=config.block_d, num_warps=1, num_stages=1,
        )  # fmt: skip


def _by_reference(q, k, v, prefix_k, prefix_v, cos, sin, bias, mask, scale, cosine) -> Tensor:
    options = dict(scale=scale, rotary=None if cos is None else (cos, sin), cosine=cosine, bias=bias, mask=mask)
    return reference.decode_attention(q, k, v, prefix_k, prefix_v, **options)


_decode_attention = launch.custom_op(
    "decode_attention", decode_attention_fwd, lambda q, *_: launch.empty(q.flatten(2).shape, q), flatten=False
)
launch.by_reference(_decode_attention, _by_reference)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    scale: float,
    rotary: reference.Rotary | None = None,
    cosine: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`ops.decode_attention` as one kernel, or two; its gradients are those of the reference, run again.

    There are at most 16 suffix tokens, dim_head is from 16 to 128, and every last dimension but that of `bias` is
    contiguous. Products are of 16 bits where q, k and v, which have one dtype, and the prefix are both of one such
    dtype, and otherwise of fp32.
    """
    for name, tensor in (("q", q), ("k", k), ("prefix_k", prefix_k)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have 4 dimensions")
    rows, seq, heads, dim_head = q.shape
    suffix, kv_heads = k.shape[1:3]
    prompts, prefix = prefix_k.shape[:2]
    cos, sin = rotary or (None, None)
    own, cached = (rows, suffix, kv_heads, dim_head), (prompts, prefix, kv_heads, dim_head)
    check(q, contiguous=True, q=(q, q.shape), k=(k, own), v=(v, own))
    check(q, contiguous=True, prefix_k=(prefix_k, cached), prefix_v=(prefix_v, cached), mask=(mask, (prompts, prefix)))
    check(q, bias=(bias, (suffix, heads, prefix + suffix)))
    if rotary:
        check(q, contiguous=True, cos=(cos, (suffix, cos.shape[-1])), sin=(sin, (suffix, cos.shape[-1])))
    for name, tensor, other, like in (("k", k, "q", q), ("v", v, "q", q), ("prefix_v", prefix_v, "prefix_k", prefix_k)):
        if tensor.dtype != like.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be {like.dtype}, as {other} is")
    if not 16 <= dim_head <= 128:
        raise ValueError(f"dim_head is {dim_head}; it must be from 16 to 128")
    if not seq <= suffix <= MAX_SUFFIX:
        raise ValueError(f"the suffix has {suffix} tokens; it must have from {seq} (those of q) to {MAX_SUFFIX}")
    if heads % kv_heads:
        raise ValueError(f"kv_heads is {kv_heads}; it must divide the {heads} heads of q")
    if rows % prompts:
        raise ValueError(f"q has {rows} rows; they must be a multiple of the {prompts} prompts")
    if rotary and (cos.shape[1] % 2 or cos.shape[1] > dim_head):
        raise ValueError(f"cos has width {cos.shape[1]}; it must be even and at most dim_head, {dim_head}")
    return _decode_attention(q, k, v, prefix_k, prefix_v, cos, sin, bias, mask, float(scale), cosine)
