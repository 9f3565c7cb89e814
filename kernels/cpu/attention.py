"""Attention behind a cached prefix on the CPU: calls of `c/attention.c`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import calls, library, structs
from .library import KINDS

# what each thread of attention keeps: where all keys lie and their weights, and those of the suffix in full
MAX_DIM_HEAD, MAX_KEYS, MAX_SUFFIX_NUMBERS = 256, 4096, 2**16


def takes_decode(q, k, v, prefix_k, prefix_v, scale, cos, sin, cosine, bias, mask) -> bool:
    """Whether `decode_attention` computes what `library.take` gives: fp32 or bf16 over a prefix in fp32."""
    if q.dtype not in calls.FLOATS or not q.dtype == k.dtype == v.dtype:
        return False
    if not prefix_k.dtype == prefix_v.dtype == torch.float32 or not q.numel():
        return False
    suffix, dim_head = k.shape[1], q.shape[-1]
    return (
        dim_head <= MAX_DIM_HEAD and prefix_k.shape[1] + suffix <= MAX_KEYS and suffix * dim_head <= MAX_SUFFIX_NUMBERS
    )


def _fake_decode(q, *_) -> Tensor:
    rows, seq, heads, dim_head = q.shape
    return q.new_empty((rows, seq, heads * dim_head))


def _heads(t: Tensor) -> Tensor:
    """Heads (…, tokens, heads, dim_head) that lie side by side in each token."""
    return t if t.stride(-1) == 1 and t.stride(-2) == t.shape[-1] else t.contiguous()


def attention_of(
    kept, prefix_k, prefix_v, rows, heads, kv_heads, seq, suffix, dim_head, scale, cos, sin, cosine, bias, mask,
    depth=(), **others,
) -> tuple[structs.Decode, int]:  # fmt: skip
    """Attention behind a prefix as C reads it, of several layers that of the first, and how far these are apart.

    Args:
        kept: is given what has to be copied.
        prefix_k, prefix_v: (*depth, prompts, prefix, kv_heads, dim_head), depth being () for one layer.
        others: the fields of queries, keys and values, and of `starts`, where the caller has them.
    Raises:
        ValueError: shapes that do not fit each other.
    """
    *_, prompts, prefix, _, _ = prefix_k.shape
    shape, keys = (*depth, prompts, prefix, kv_heads, dim_head), prefix + suffix
    if not prompts or rows % prompts or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{rows} rows of {heads} heads; they must be multiples of {prompts} prompts, {kv_heads} kv_heads"
        )
    if not 0 < seq <= suffix:
        raise ValueError(f"{seq} tokens of queries; they must be 1 to {suffix}, as many as those of keys")
    if bias is not None and bias.shape[1] == 1 < heads:
        calls.check_shapes([("bias", bias, (suffix, 1, keys))])
        bias = bias.expand(-1, heads, -1)
    rotated = 0 if cos is None else cos.shape[-1]
    arrays = (
        ("mask", mask, (prompts, prefix)), ("bias", bias, (suffix, heads, keys)),
        ("cos", cos, (suffix, min(dim_head, rotated) // 2 * 2)), ("sin", sin, (suffix, rotated)),
    )  # fmt: skip
    caches = ("prefix_k", prefix_k, shape), ("prefix_v", prefix_v, shape)
    mask, bias, cos, sin = calls.addresses_of(arrays, kept, caches)
    if (strides := prefix_k.stride()) != prefix_v.stride() or strides[-1] != 1:
        prefix_k, prefix_v = prefix_k.contiguous(), prefix_v.contiguous()
        kept += prefix_k, prefix_v
        strides = prefix_k.stride()
    *_, prefix_prompt, prefix_token, prefix_head, _ = strides
    call = structs.Decode(
        prefix_k=prefix_k.data_ptr(), prefix_v=prefix_v.data_ptr(),
        prefix_prompt=prefix_prompt, prefix_token=prefix_token, prefix_head=prefix_head,
        bias=bias, mask=mask, cos=cos, sin=sin,
        rows=rows, seq=seq, suffix=suffix, heads=heads, kv_heads=kv_heads, dim_head=dim_head, prompts=prompts,
        prefix=prefix, rotated=rotated, cosine=cosine, scale=scale, **others,
    )  # fmt: skip
    return call, strides[0]


def _run_decode(q, k, v, prefix_k, prefix_v, scale, cos, sin, cosine, bias, mask) -> Tensor:
    out = _fake_decode(q)
    (rows, seq, heads, dim_head), (_, suffix, kv_heads, _), kept = q.shape, k.shape, []
    q, k, v = map(_heads, (q, k, v))
    if k.stride()[:2] != v.stride()[:2]:
        k, v = k.contiguous(), v.contiguous()
    shape = rows, suffix, kv_heads, dim_head
    calls.check_shapes((("k", k, shape), ("v", v, shape), ("prefix_v", prefix_v, prefix_k.shape)))
    (q_row, q_token, *_), (kv_row, kv_token, *_) = q.stride(), k.stride()
    call, _ = attention_of(
        kept, prefix_k, prefix_v, rows, heads, kv_heads, seq, suffix, dim_head, scale, cos, sin, cosine, bias, mask,
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), kind=KINDS[q.dtype],
        q_row=q_row, q_token=q_token, kv_row=kv_row, kv_token=kv_token,
    )  # fmt: skip
    library.run("decode_attention", call, x=q)
    return out


calls.define_operation(
    "cpu_decode(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, float scale, Tensor? cos, Tensor? sin, "
    "bool cosine, Tensor? bias, Tensor? mask) -> Tensor",
    _run_decode,
    takes_decode,
    _fake_decode,
)


def decode_attention(
    q, k, v, prefix_k, prefix_v, *, scale, rotary=None, cosine=False, bias=None, mask=None
) -> Tensor:  # fmt: skip
    """See `ops.decode_attention`; for what `takes_decode` says."""
    run = torch.ops.fastprior.cpu_decode.default if torch.compiler.is_compiling() else _run_decode
    return run(q, k, v, prefix_k, prefix_v, scale, *(rotary or (None, None)), cosine, bias, mask)


def decode_where_taken(
    q, k, v, prefix_k, prefix_v, *, scale, rotary=None, cosine=False, bias=None, mask=None
) -> Tensor | None:  # fmt: skip
    """`decode_attention` of what `library.take` gives and `takes_decode` says, and None of everything else."""
    found = library.take((q, k, v, prefix_k, prefix_v, bias, mask, *(rotary or (None, None)))) if q.is_cpu else None
    if found is None:
        return None
    *tokens, bias, mask, cos, sin = found
    if not takes_decode(*tokens, scale, cos, sin, cosine, bias, mask):
        return None
    rotary = None if rotary is None else (cos, sin)
    return decode_attention(*tokens, scale=scale, rotary=rotary, cosine=cosine, bias=bias, mask=mask)
