"""Attention behind a cached prefix on the CPU: calls of `c/attention.c`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import calls, structs
from .library import KINDS, library, most_rows, thread_count

MAX_DIM_HEAD, MAX_KEYS, MAX_SUFFIX_NUMBERS = 256, 4096, 2**16


def fits_stacks(dim_head: int, prefix: int, suffix: int) -> bool:
    """Whether threads of attention can keep keys, those of the suffix in full, on their stacks."""
    return dim_head <= MAX_DIM_HEAD and prefix + suffix <= MAX_KEYS and suffix * dim_head <= MAX_SUFFIX_NUMBERS


def takes_decode(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, rotary=None, bias=None, mask=None,
    dropout: float = 0.0, **_,
) -> bool:  # fmt: skip
    """Whether `decode_attention` computes this: on the CPU, in fp32 or bf16 over a prefix in fp32, without gradient."""
    if not q.is_cpu or dropout or q.dtype not in calls.FLOATS or not most_rows(torch.float32):
        return False
    if not q.dtype == k.dtype == v.dtype or not prefix_k.dtype == prefix_v.dtype == torch.float32:
        return False
    if not q.numel() or not fits_stacks(q.shape[-1], prefix_k.shape[1], k.shape[1]):
        return False
    return calls.are_plain(q, k, v, prefix_k, prefix_v, bias, mask, *(rotary or ())) and not calls.is_watched()


def _fake_decode(q, k, v, prefix_k, prefix_v, scale, cos, sin, cosine, bias, mask) -> Tensor:
    return torch.empty((*q.shape[:2], q.shape[2] * q.shape[3]), dtype=q.dtype, device=q.device)


def _heads(t: Tensor) -> Tensor:
    """Heads (…, tokens, heads, dim_head) that lie side by side in each token."""
    return t if t.stride(-1) == 1 and t.stride(-2) == t.shape[-1] else t.contiguous()


def caches_of(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a prefix, or copies, with the same strides, of which the last is 1."""
    strides = k.stride()
    return (k, v) if strides[-1] == 1 and strides == v.stride() else (k.contiguous(), v.contiguous())


def attention_of(
    rows, heads, seq, suffix, dim_head, prefix_k, prefix_v, scale, cos, sin, cosine, bias, mask, kept,
    **own,
) -> structs.Decode:  # fmt: skip
    """Own tokens as the caller has them, behind what `caches_of` gives, of several layers that of the first.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    *_, prompts, prefix, kv_heads, prefix_dim = prefix_k.shape
    if not prompts or rows % prompts or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{rows} rows of {heads} heads; they must be multiples of {prompts} prompts, {kv_heads} kv_heads"
        )
    if not 0 < seq <= suffix:
        raise ValueError(f"{seq} tokens of queries; they must be 1 to {suffix}, as many as those of keys")
    if prefix_dim != dim_head:
        calls.check_shape("prefix_k", prefix_k, *prefix_k.shape[:-1], dim_head)
    calls.check_shape("mask", mask, prompts, prefix)
    if bias is not None:
        calls.check_shape("bias", bias, suffix, 1 if bias.shape[1] == 1 else heads, prefix + suffix)
        bias = bias if bias.shape[1] == heads else bias.expand(-1, heads, -1)
    if cos is not None:
        calls.check_shape("cos", cos, suffix, min(dim_head, cos.shape[-1]) // 2 * 2)
        calls.check_shape("sin", sin, *cos.shape)
    *_, prefix_prompt, prefix_token, prefix_head, _ = prefix_k.stride()
    return structs.Decode(
        prefix_k=prefix_k.data_ptr(), prefix_v=prefix_v.data_ptr(),
        prefix_prompt=prefix_prompt, prefix_token=prefix_token, prefix_head=prefix_head,
        bias=calls.address_of(bias, kept), mask=calls.address_of(mask, kept),
        cos=calls.address_of(cos, kept), sin=calls.address_of(sin, kept),
        rows=rows, seq=seq, suffix=suffix, heads=heads, kv_heads=kv_heads, dim_head=dim_head, prompts=prompts,
        prefix=prefix, rotated=0 if cos is None else cos.shape[-1], cosine=cosine, scale=scale, **own,
    )  # fmt: skip


def _run_decode(q, k, v, prefix_k, prefix_v, scale, cos, sin, cosine, bias, mask) -> Tensor:
    out = _fake_decode(q, k, v, prefix_k, prefix_v, scale, cos, sin, cosine, bias, mask)
    rows, seq, heads, dim_head = q.shape
    kept = []
    q, k, v = map(_heads, (q, k, v))
    if k.stride()[:2] != v.stride()[:2]:
        k, v = k.contiguous(), v.contiguous()
    suffix = k.shape[1]
    calls.check_shape("k", k, rows, suffix, prefix_k.shape[2], dim_head)
    calls.check_shape("v", v, *k.shape)
    calls.check_shape("prefix_v", prefix_v, *prefix_k.shape)
    prefix_k, prefix_v = caches_of(prefix_k, prefix_v)
    (q_row, q_token, *_), (kv_row, kv_token, *_) = q.stride(), k.stride()
    call = attention_of(
        rows, heads, seq, suffix, dim_head, prefix_k, prefix_v, scale, cos, sin, cosine, bias, mask, kept,
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), kind=KINDS[q.dtype],
        q_row=q_row, q_token=q_token, kv_row=kv_row, kv_token=kv_token,
    )  # fmt: skip
    library().decode_attention(call, thread_count())
    return out


calls.define_operation(
    "cpu_decode(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, float scale, Tensor? cos, Tensor? sin, "
    "bool cosine, Tensor? bias, Tensor? mask) -> Tensor",
    _run_decode,
    _fake_decode,
)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    scale: float,
    rotary: tuple[Tensor, Tensor] | None = None,
    cosine: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`reference.decode_attention` of what `takes_decode` says."""
    run = torch.ops.fastprior.cpu_decode.default if torch.compiler.is_compiling() else _run_decode
    return run(q, k, v, prefix_k, prefix_v, scale, *(rotary or (None, None)), cosine, bias, mask)
