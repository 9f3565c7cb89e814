"""Pure-PyTorch references of the hot operations: what the CPU runs and what every kernel is checked against.

`ops` documents their arguments. Tensors of 16 bits are computed in fp32 where that changes results.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import LinearArgs

Rotary = tuple[Tensor, Tensor]
ROW = 512  # bytes of `ops.sum_rows`: a sector, so that one that is lost, or lies elsewhere, is seen


class NormArgs(NamedTuple):
    """The arguments of `ops.layer_norm`."""

    x: Tensor
    gain: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    after: Tensor | None = None
    eps: float = 1e-5
    stable: bool = False
    rms: bool = False
    l2: bool = False
    dtype: torch.dtype | None = None


def layer_norm(args: NormArgs) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.layer_norm` in plain PyTorch."""
    x, gain, bias, residual, after, eps, stable, rms, l2, dtype = args
    total = x if residual is None else x + residual
    x = total
    if stable:
        x = x / x.amax(dim=-1, keepdim=True).detach()
    gain, bias = [t if t is None or t.dtype == x.dtype else t.to(x.dtype) for t in (gain, bias)]
    if rms:
        y = F.rms_norm(x, x.shape[-1:], gain, eps)
        y = y if bias is None else y + bias
    else:
        y = F.layer_norm(x, (int(x.shape[-1]),), gain, bias, eps)
    if l2:
        y = F.normalize(y, dim=-1)
    if after is not None:
        y = y + after
    if dtype is not None:
        y = y.to(dtype)
    return y if residual is None else (y, total)


def swiglu(x: Tensor) -> Tensor:
    """`a * silu(b)` of the two halves of the last dimension (GLU Variants, Shazeer 2020)."""
    a, gate = x.chunk(2, dim=-1)
    return a * F.silu(gate)


def swiglu_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """`ops.swiglu_norm` in plain PyTorch."""
    y = swiglu(x)
    return y if gain is None else layer_norm(NormArgs(y, gain, eps=eps))


def linear(args: LinearArgs) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.linear` in plain PyTorch."""
    x, weight, bias, beside, scale, stream, stream_gain, norm_gain, norm_bias, eps, activation, residual, dtype = args
    total = None
    if stream is not None:
        x = total = layer_norm(NormArgs(x, stream_gain, eps=eps, after=stream))
    if norm_gain is not None:
        x = layer_norm(NormArgs(x, norm_gain, norm_bias, eps=eps))
    if stream is not None or norm_gain is not None:
        x = x.to(dtype or (x.dtype if scale is not None else weight.dtype))
    if beside is not None:
        weight = torch.cat((weight, beside))
    if scale is not None:
        weight = weight.to(x.dtype)
    y = _product(x, weight, bias if scale is None else None)
    if scale is not None:
        y = (y.float() * scale + (0.0 if bias is None else bias.float())).to(x.dtype)
    if activation == "swiglu":
        y = swiglu(y)
    elif activation == "gelu":
        y = F.gelu(y)
    y = y if residual is None else y + residual
    return y if total is None else (y, total)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`; on the CPU few rows as `weight @ x.T`, which reads the weights faster.

    In 16 bits that is up to twice as fast, as packed weights are, and in fp32 pays for 5 to 64 rows.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # a program for any number of rows
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    few = rows <= 256 if x.element_size() == 2 else 5 <= rows <= 64
    if not few or x.device.type != "cpu" or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    # contiguous: random numbers "like" a result, and dropout masks, are drawn in the order of its memory
    out = (weight @ x.reshape(rows, -1).t()).t().contiguous()
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


def matvec_chain(x: Tensor, weights: Tensor, *, chained: bool = True) -> Tensor:
    """Products that each need the one before, `y[i] = weights[i] @ y[i - 1]`; with `chained=False` `weights[i] @ x`.

    Args:
        x: (dim,).
        weights: (phases, dim, dim), cast to the dtype of `x`.
    Returns:
        (phases, dim), all products.
    """
    products = []
    for weight in weights:
        y = weight.to(x.dtype) @ x
        products.append(y)
        x = y if chained else x
    return torch.stack(products)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs (RoFormer, Su et al. 2021): `x * cos + swapped pairs of x * sin`.

    Args:
        x: (..., dim_head).
        cos, sin: broadcastable to (..., width), fp32, width even and at most dim_head; both values of a pair stand side
            by side, sin with the sign of its term. Where features are not rotated cos is 1 and sin 0.
    Returns:
        the shape of `x`, in the wider dtype of `x` and `cos`.
    """
    width = cos.shape[-1]
    turned = x if width == x.shape[-1] else x[..., :width]
    turned = turned * cos + turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast, where it is on for the device of x, casts operands of products to."""
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Keep autocast, where it is on for the device of x, from casting."""
    off = autocast_dtype(x) is not None
    return torch.autocast(x.device.type, enabled=False) if off else contextlib.nullcontext()


def at_least_fp32(t: Tensor) -> Tensor:
    """16-bit tensors as fp32: logits of scale 16 in bf16 are wrong by several percent."""
    return t.float() if t.element_size() < 4 else t


def prepare_heads(t: Tensor, rotary: Rotary | None, cosine: bool) -> Tensor:
    """Rotate heads (..., seq, heads, dim_head) by tables (seq, width), and scale them to length 1 where `cosine`."""
    if rotary is not None:
        t = rotate(t, *(table[:, None] for table in rotary))
    return F.normalize(t, dim=-1) if cosine else t


def expand_bias(table: Tensor, buckets: Tensor, queries: int, columns: int) -> Tensor:
    """Relative position bias of the last `queries` positions to all columns: (queries, heads, columns).

    Args:
        table: (num_buckets, heads).
        buckets: (distances,) int64: the bucket of every distance from 0.
        queries, columns: the last query stands at position `len(buckets) - 1`; column c at position c.
    """
    rows = torch.arange(buckets.shape[0] - queries, buckets.shape[0], device=table.device)
    distance = (rows[:, None] - torch.arange(columns, device=table.device)).clamp(min=0)
    return torch.embedding(table, buckets[distance]).transpose(1, 2)  # F.embedding may be patched


class AttentionArgs(NamedTuple):
    """The arguments of `ops.attention`, with the rotary tables apart."""

    q: Tensor
    k: Tensor
    v: Tensor
    null_kv: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    bias: Tensor | None = None
    buckets: Tensor | None = None
    mask: Tensor | None = None
    seed: Tensor | None = None
    scale: float = 1.0
    cosine: bool = False
    causal: bool = False
    causal_fill: float = -math.inf
    dropout: float = 0.0


def attention(args: AttentionArgs) -> Tensor:
    """`ops.attention` in plain PyTorch; 16-bit inputs are computed in fp32, under autocast too.

    Here `dropout` may be a module too, which is called with the attention weights (batch, heads, seq, columns).
    """
    with without_autocast(args.q):  # which would cast all weights, there and back
        return _attention(args)


def _attention(args: AttentionArgs) -> Tensor:
    q, k, v, null_kv, cos, sin, bias, buckets, mask, seed, scale, cosine, causal, causal_fill, dropout = args
    rotary = None if cos is None else (cos, sin)
    batch, seq, heads, dim_head = q.shape
    keys, kv_heads = k.shape[1:3]
    group, given = heads // kv_heads, q.dtype
    q, k, v = (t.to(torch.promote_types(given, torch.float32)) for t in (q, k, v))
    q = prepare_heads(q, rotary and tuple(t[keys - seq :] for t in rotary), cosine) * scale
    k = prepare_heads(k, rotary, cosine)
    if null_kv is not None:
        null_k, null_v = null_kv.to(k.dtype).unbind()
        null_k = F.normalize(null_k, dim=-1) if cosine else null_k
        k, v = (torch.cat((null.expand(batch, 1, -1, -1), t), dim=1) for null, t in ((null_k, k), (null_v, v)))
    columns, null = k.shape[1], k.shape[1] - keys
    if buckets is not None:
        bias = expand_bias(bias, buckets, seq, columns)
    if causal:
        hidden = (
            torch.arange(columns, device=q.device) > torch.arange(keys - seq, keys, device=q.device)[:, None] + null
        )
        fill = torch.zeros(seq, columns, device=q.device).masked_fill(hidden, causal_fill)[:, None]
        bias = fill.expand(-1, heads, -1) if bias is None else bias + fill
    # (batch * kv_heads, seq * group, dim_head): the heads of a group are rows over the same keys
    q = q.unflatten(2, (kv_heads, group)).transpose(1, 2).reshape(batch * kv_heads, seq * group, dim_head)
    k, v = (t.transpose(1, 2).reshape(batch * kv_heads, columns, dim_head) for t in (k, v))
    if bias is None:
        logits = q @ k.transpose(1, 2)
    else:
        bias = bias.unflatten(1, (kv_heads, group)).transpose(0, 1).reshape(kv_heads, seq * group, columns)
        bias = bias if kv_heads == 1 else bias.repeat(batch, 1, 1)
        logits = torch.baddbmm(bias.to(q.dtype), q, k.transpose(1, 2))
    if mask is not None:
        mask = F.pad(mask, (null, 0), value=mask.dtype == torch.bool).repeat_interleave(kv_heads, 0)[:, None]
        if mask.dtype == torch.bool:
            # what a query may not see at all stays at -inf, also where it sees nothing else
            logits = torch.where(mask, logits, logits.clamp(max=torch.finfo(logits.dtype).min))
        else:
            logits = logits + mask.to(logits.dtype)
    weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(v.dtype)
    if callable(dropout):  # a module, which may look at the weights
        weights = weights.view(batch, kv_heads, seq, group, columns).transpose(2, 3).flatten(1, 2)
        weights = dropout(weights).unflatten(1, (kv_heads, group)).transpose(2, 3)
        weights = weights.reshape(batch * kv_heads, seq * group, columns).to(v.dtype)
    elif dropout and seed is not None:
        kept = dropout_mask(seed, dropout, batch, heads, seq, columns)
        kept = kept.unflatten(1, (kv_heads, group)).transpose(2, 3).reshape(weights.shape)
        weights = weights * kept / (1 - dropout)
    else:
        weights = F.dropout(weights, dropout)
    out = (weights @ v).view(batch, kv_heads, seq, group, dim_head).transpose(1, 2)
    return out.reshape(batch, seq, heads * dim_head).to(given)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    scale: float,
    rotary: Rotary | None = None,
    cosine: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`ops.decode_attention` in plain PyTorch."""
    rows, seq, heads, dim_head = q.shape
    prompts, prefix, kv_heads, _ = prefix_k.shape
    suffix, group, given = k.shape[1], heads // kv_heads, q.dtype
    q, k, v = (at_least_fp32(t) for t in (q, k, v))
    q = prepare_heads(q, rotary and tuple(t[suffix - seq :] for t in rotary), cosine) * scale
    k = prepare_heads(k, rotary, cosine)
    if bias is None:
        position = torch.arange(suffix, device=q.device)
        hidden = F.pad(position > position[suffix - seq :, None], (prefix, 0))[:, None]
        extra = torch.zeros(hidden.shape, device=q.device).masked_fill(hidden, -math.inf)
    else:
        extra = bias[suffix - seq :]
    extra = extra.expand(-1, heads, -1).unflatten(1, (kv_heads, group)).transpose(0, 1).flatten(1, 2)

    q = q.unflatten(2, (kv_heads, group)).transpose(1, 2).reshape(rows * kv_heads, seq * group, dim_head)
    k, v = (t.transpose(1, 2).reshape(rows * kv_heads, suffix, dim_head) for t in (k, v))
    prefix_k, prefix_v = (t.to(q.dtype).transpose(1, 2).flatten(0, 1) for t in (prefix_k, prefix_v))
    mask = None if mask is None else mask.repeat_interleave(rows // prompts * kv_heads, 0)[:, None]
    if kv_heads > 1:
        extra = extra.repeat(rows, 1, 1)

    def by_prompt(t: Tensor) -> Tensor:
        """(rows * kv_heads, m, n) to (prompts * kv_heads, samples * m, n): the rows of one prompt over one prefix."""
        if kv_heads > 1:
            t = t.view(prompts, -1, kv_heads, *t.shape[1:]).transpose(1, 2)
        return t.reshape(prompts * kv_heads, -1, t.shape[-1])

    def by_row(t: Tensor) -> Tensor:
        if kv_heads > 1:
            t = t.view(prompts, kv_heads, rows // prompts, seq * group, t.shape[-1]).transpose(1, 2)
        return t.reshape(rows * kv_heads, seq * group, t.shape[-1])

    on_prefix = by_row(by_prompt(q) @ prefix_k.transpose(1, 2))
    if mask is not None:
        on_prefix = on_prefix + mask
    weights = (torch.cat((on_prefix, q @ k.transpose(1, 2)), dim=-1) + extra).softmax(dim=-1, dtype=q.dtype)
    weights = F.dropout(weights, dropout) if dropout else weights
    out = by_row(by_prompt(weights[..., :prefix]) @ prefix_v) + weights[..., prefix:] @ v
    out = out.view(rows, kv_heads, seq, group, dim_head).transpose(1, 2)
    return out.reshape(rows, seq, heads * dim_head).to(given)


def clamp_x0(x0: Tensor, clamp: str | None, radius: float) -> Tensor:
    """Clamp a predicted clean embedding: None leaves it, "range" limits to ±radius, "l2" scales to norm `radius`."""
    if clamp == "l2":
        return F.normalize(x0, dim=-1) * radius
    if clamp == "range":
        return x0.clamp(-radius, radius)
    return x0


class StepArgs(NamedTuple):
    """The arguments of `ops.diffusion_step`."""

    x: Tensor
    pred: Tensor
    null_pred: Tensor | None
    cond_scale: Tensor
    x0_prev: Tensor
    noise: Tensor | None
    table: Tensor
    index: Tensor
    clamp: str | None = None
    radius: float = 1.0
    null_table: Tensor | None = None
    seed: Tensor | None = None


def diffusion_step(args: StepArgs) -> tuple[Tensor, Tensor]:
    """`ops.diffusion_step` in plain PyTorch."""
    x, pred, null_pred, cond_scale, x0_prev, noise, table, index, clamp, radius, null_table, seed = args
    index = index.reshape(-1)
    p, q, a, b, c, s = table.index_select(0, index).unsqueeze(-1).unbind(-2)
    if null_table is not None:
        null_pred = null_table.index_select(0, index)
    pred = pred.to(x.dtype)
    if null_pred is not None:
        pred = null_pred + (pred - null_pred) * cond_scale.unsqueeze(-1)
    x0 = clamp_x0(p * x + q * pred, clamp, radius)
    if noise is None:
        noise = philox_normal(seed, index.expand(len(x)), x.shape[-1])
    return a * x + b * x0 + c * x0_prev + s * noise, x0


def philox(seed: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
    """The first word of Philox-4x32-10 (Salmon et al. 2011) of counters (c0, c1, 0, 0), as the kernels draw it.

    Args:
        seed: 0-d int64.
        c0, c1: int64, broadcastable, below 2**32.
    Returns:
        int64 in [0, 2**32).
    """
    low = 0xFFFFFFFF

    def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:  # high and low word of a 32 x 32 bit product
        high_part = a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)
        return high_part >> 16, (a * b) & low

    c0, c1 = torch.broadcast_tensors(c0, c1)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        (high_b, low_b), (high_a, low_a) = multiply(0xCD9E8D57, c2), multiply(0xD2511F53, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0


def philox_uniform(seed: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
    """Uniform in [0, 1), fp32, of `philox` with these counters."""
    word = philox(seed, c0, c1)
    word = torch.where(word >= 2**31, 2**32 - 1 - word, word)  # of a signed word x: x, or -x - 1 where it is negative
    return word.float() * 4.6566127342e-10


def philox_normal(seed: Tensor, c1: Tensor, dim: int) -> Tensor:
    """Standard normal noise (len(c1), dim), fp32: Box-Muller on the counters (row * dim + column) * 2 and one more."""
    c0 = torch.arange(len(c1) * dim, device=c1.device).view(len(c1), dim) * 2
    u, angle = (philox_uniform(seed, c0 + part, c1[:, None]) for part in (0, 1))
    return torch.sqrt(-2 * torch.log(u.clamp(min=1e-7))) * torch.cos(angle * (2 * math.pi))


def dropout_mask(seed: Tensor, dropout: float, batch: int, heads: int, seq: int, columns: int) -> Tensor:
    """Which attention weights stay: (batch, heads, seq, columns) bool, of counters (query * columns + column, head)."""
    device = seed.device
    c0 = torch.arange(seq * columns, device=device).view(1, 1, seq, columns)
    c1 = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    return philox_uniform(seed, c0, c1) >= dropout


def is_finite(values: Tensor) -> bool:
    """Whether dense numbers have neither NaN nor infinity; no memory is taken, but for floats of 8 bits."""
    if not values.is_floating_point() or not values.numel():
        return True
    return all(bool(end.isfinite()) for end in torch.aminmax(values.float() if values.itemsize == 1 else values))


def sum_rows(parts: Sequence[Tensor]) -> list[tuple[Tensor, bool]]:
    """`ops.sum_rows` in plain PyTorch."""
    return [(t.view(torch.int64).view(-1, ROW // 8).sum(dim=1), is_finite(t)) for t in parts]
