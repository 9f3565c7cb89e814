"""Attention behind a cached prefix on the CPU: calls of `c/attention.c`."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from .calls import FLOATS, address_of, are_plain, check_shape, define_operation, is_watched
from .library import KINDS, library, most_rows
from .threads import thread_count

DECODE = struct.Struct("=36qd")  # of the source
MAX_DIM_HEAD, MAX_KEYS, MAX_OWN = 256, 4096, 2**16  # its threads keep keys, own ones in full, on stacks


def takes_decode(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, rotary=None, bias=None, mask=None,
    dropout: float = 0.0, **_,
) -> bool:  # fmt: skip
    """Whether `decode_attention` computes this: on the CPU, in fp32 or bf16 over a prefix in fp32, without gradient."""
    if not q.is_cpu or dropout or q.dtype not in FLOATS or not most_rows(torch.float32):
        return False
    if not q.dtype == k.dtype == v.dtype or not prefix_k.dtype == prefix_v.dtype == torch.float32:
        return False
    if q.shape[-1] > MAX_DIM_HEAD or prefix_k.shape[1] + k.shape[1] > MAX_KEYS or not q.numel():
        return False
    if k.shape[1] * q.shape[-1] > MAX_OWN:
        return False
    return are_plain(q, k, v, prefix_k, prefix_v, bias, mask, *(rotary or ())) and not is_watched()


def check_attention(rows, heads, seq, suffix, dim_head, prefix_k, cos, sin, bias, mask) -> None:
    prompts, prefix, kv_heads, _ = prefix_k.shape
    if not prompts or rows % prompts or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{rows} rows of {heads} heads; they must be multiples of {prompts} prompts, {kv_heads} kv_heads"
        )
    if not 0 < seq <= suffix:
        raise ValueError(f"{seq} tokens of queries; they must be 1 to {suffix}, as many as those of keys")
    check_shape("prefix_k", prefix_k, prompts, prefix, kv_heads, dim_head)
    check_shape("mask", mask, prompts, prefix)
    check_shape("bias", bias, suffix, heads if bias is None or bias.shape[1] != 1 else 1, prefix + suffix)
    if cos is not None:
        check_shape("cos", cos, suffix, min(dim_head, cos.shape[-1]) // 2 * 2)
        check_shape("sin", sin, *cos.shape)


def _fake_decode(q, k, v, prefix_k, prefix_v, scale, cos, sin, cosine, bias, mask) -> Tensor:
    return torch.empty((*q.shape[:2], q.shape[2] * q.shape[3]), dtype=q.dtype, device=q.device)


def _heads(t: Tensor) -> Tensor:
    """Heads (…, tokens, heads, dim_head) that lie side by side in each token."""
    return t if t.stride(-1) == 1 and t.stride(-2) == t.shape[-1] else t.contiguous()


def cache_of(t: Tensor, kept: list) -> tuple[int, ...]:
    """Where keys or values (…, dim_head) lie, and their strides but the last, which is 1."""
    if t.stride(-1) != 1:
        t = t.contiguous()
        kept.append(t)
    return t.data_ptr(), *t.stride()[:-1]


def _run_decode(q, k, v, prefix_k, prefix_v, scale, cos, sin, cosine, bias, mask) -> Tensor:
    out = _fake_decode(q, k, v, prefix_k, prefix_v, scale, cos, sin, cosine, bias, mask)
    rows, seq, heads, dim_head = q.shape
    prompts, prefix, kv_heads, _ = prefix_k.shape
    kept, kind = [], KINDS[q.dtype]
    q, k, v = map(_heads, (q, k, v))
    if k.stride()[:2] != v.stride()[:2]:
        k, v = k.contiguous(), v.contiguous()
    check_shape("k", k, rows, k.shape[1], kv_heads, dim_head)
    check_shape("v", v, *k.shape)
    check_shape("prefix_v", prefix_v, *prefix_k.shape)
    check_attention(rows, heads, seq, k.shape[1], dim_head, prefix_k, cos, sin, bias, mask)
    bias = None if bias is None else bias.expand(-1, heads, -1)
    library().decode_attention(
        DECODE.pack(
            q.data_ptr(), kind, q.stride(1), k.data_ptr(), kind, k.stride(1), v.data_ptr(), kind, v.stride(1),
            out.data_ptr(), kind, out.shape[-1], *cache_of(prefix_k, kept), *cache_of(prefix_v, kept),
            address_of(bias, kept), address_of(mask, kept), address_of(cos, kept), address_of(sin, kept),
            q.stride(0), k.stride(0), rows, seq, k.shape[1], heads, kv_heads, dim_head, prompts, prefix,
            0 if cos is None else cos.shape[-1], cosine, scale,
        ),
        thread_count(),
    )  # fmt: skip
    return out


define_operation(
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
