"""Pure-PyTorch references of the hot operations: what the CPU runs and what every kernel is checked against.

Options that a call does not use cost nothing. Tensors of 16 bits are computed in fp32 where that changes results.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


def layer_norm(
    x: Tensor,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    stable: bool = False,
    rms: bool = False,
    residual: Tensor | None = None,
    after: Tensor | None = None,
    l2: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm `(x - mean) / sqrt(var + eps) * gain + bias` over the last dimension, and what is fused around it.

    In order: add `residual`, divide by the row maximum (`stable`), normalise, scale to length 1 (`l2`), add `after`.

    Args:
        x: (..., dim), any float dtype; statistics are accumulated in fp32.
        gain, bias: (dim,), cast to the dtype of `x`.
        eps: added to the variance.
        stable: first divide by the *signed* maximum of the row, taken as a constant in backward. A row whose maximum
            is negative changes sign: trained weights depend on it.
        rms: RMSNorm (Zhang & Sennrich 2019): the mean is not subtracted, and is not part of the variance.
        residual: the shape of `x`, added to it before; the sum is returned as well.
        after: the shape of `x`, added to the result.
        l2: scale each row of the result to Euclidean length 1 (before `after`).
        dtype: of the result; by default that of `x` (with `residual`, of the sum), promoted with that of `after`.
    Returns:
        (..., dim); with `residual` also the sum, in the wider dtype of the two.
    """
    total = x if residual is None else x + residual
    x = total
    if stable:
        x = x / x.amax(dim=-1, keepdim=True).detach()
    gain, bias = (None if t is None else t.to(x.dtype) for t in (gain, bias))
    if rms:
        y = F.rms_norm(x, x.shape[-1:], gain, eps)
        y = y if bias is None else y + bias
    else:
        y = F.layer_norm(x, x.shape[-1:], gain, bias, eps)
    if l2:
        y = F.normalize(y, dim=-1)
    if after is not None:
        y = y + after
    if dtype is not None:
        y = y.to(dtype)
    return y if residual is None else (y, total)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    beside: Tensor | None = None,
    scale: Tensor | None = None,
    stream: Tensor | None = None,
    stream_gain: Tensor | None = None,
    norm_gain: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`residual + activation(norm(x) @ weight.T * scale + bias)`, with a fast way for few rows on the CPU.

    With a stream, x is first normalised and added to it: `x = stream + norm(x) * stream_gain`.

    There `weight @ x.T` reads the weights faster than the usual order does: in 16 bits up to about 256 rows and up to
    twice as fast (as fast as packed weights are), in fp32 for 5 to 64 rows.

    Args:
        x: (..., in).
        weight: (out, in), in the dtype of the product; or int8 or float8_e4m3fn with `scale`.
        beside: (more, in), a second weight: its results stand beside those of the first, and so do bias and scale.
        bias: (out,).
        scale: (out,) fp32, of quantised weights.
        stream, stream_gain: (..., in) and (in,), of the residual stream that x's norm is added to.
        norm_gain, norm_bias: (in,), of a LayerNorm of x over its last dimension; without a gain there is none.
        eps: of both norms.
        activation: None, "gelu" (exact), or "swiglu": `a * silu(b)` of the two halves of the result.
        residual: (..., out), or (..., out / 2) with "swiglu"; added last.
        dtype: of the product, which what was normalised is rounded to; by default that of the weights, or with a scale
            that of `x`.
    Returns:
        (..., out), or (..., out / 2) with "swiglu", in the product's dtype, promoted with that of `residual`; with a
        stream also the sum, in the wider dtype of `x` and `stream`.
    """
    total = None
    if stream is not None:
        x = total = layer_norm(x, stream_gain, eps=eps, after=stream)
    if norm_gain is not None:
        x = layer_norm(x, norm_gain, norm_bias, eps)
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
        a, gate = y.chunk(2, dim=-1)
        y = a * F.silu(gate)
    elif activation == "gelu":
        y = F.gelu(y)
    y = y if residual is None else y + residual
    return y if total is None else (y, total)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
    rows = torch.arange(len(buckets) - queries, len(buckets), device=table.device)
    distance = (rows[:, None] - torch.arange(columns, device=table.device)).clamp(min=0)
    return F.embedding(buckets[distance], table).transpose(1, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    rotary: Rotary | None = None,
    cosine: bool = False,
    null_kv: Tensor | None = None,
    bias: Tensor | None = None,
    buckets: Tensor | None = None,
    causal: bool = False,
    causal_fill: float = -math.inf,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Attention of heads that share keys and values in groups, prepared here: rotary, l2-norm, null key, bias, masks.

    `softmax(scale * q' k'^T + bias + mask) v'`, where q' and k' are rotated, then of length 1 with `cosine`, and a
    null key and value stand in front of the others.

    Args:
        q: (batch, seq, heads, dim_head), for the last `seq` of the keys' positions.
        k, v: (batch, keys, kv_heads, dim_head); kv_heads divides heads, and query head i uses i // (heads / kv_heads).
        scale: of the logits.
        rotary: cos and sin (keys, width) for `rotate`, by position.
        cosine: l2-normalise queries and keys, after the rotation.
        null_kv: (2, kv_heads, dim_head), a key and value that every query sees; not rotated. Column 0.
        bias: (seq, heads, columns) added to the logits; or, with `buckets`, a table (num_buckets, heads).
        buckets: (keys,) int64, the bucket of every distance from 0: query at position p and column c have distance
            max(p - c, 0). With a null key, key j is column j + 1 (and so one nearer than it is: trained weights rely
            on it).
        causal: the query at position p sees keys up to p.
        causal_fill: what is added to the logits of keys that it may not see.
        mask: (batch, keys), added to the logits; or bool, False where the key's logit becomes the lowest finite number.
        dropout: probability of dropping an attention weight (those of the null key too).
        seed: 0-d int64, of the dropout mask (`dropout_mask`); without it torch's generator draws.
        compute_dtype: of everything but the softmax, fp32 for 16-bit inputs by default.
    Returns:
        (batch, seq, heads * dim_head) in the dtype of q.
    """
    batch, seq, heads, dim_head = q.shape
    keys, kv_heads = k.shape[1:3]
    group, given = heads // kv_heads, q.dtype
    compute_dtype = compute_dtype or torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.to(compute_dtype) for t in (q, k, v))
    q = prepare_heads(q, rotary and tuple(t[keys - seq :] for t in rotary), cosine) * scale
    k = prepare_heads(k, rotary, cosine)
    if null_kv is not None:
        null_k, null_v = null_kv.to(k.dtype)
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
    if dropout and seed is not None:
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
    """Attention of the few suffix tokens over a cached prefix and over themselves.

    Args:
        q: (rows, seq, heads, dim_head), of the last `seq` suffix tokens.
        k, v: (rows, suffix, kv_heads, dim_head), the suffix's own.
        prefix_k, prefix_v: (prompts, prefix, kv_heads, dim_head), keys rotated and normalised already, a null key
            among them; row i belongs to prompt i // (rows / prompts).
        scale, cosine: see `attention`.
        rotary: cos and sin (suffix, width), of the suffix's positions.
        bias: (suffix, heads, prefix + suffix), added to the logits; -inf where a key must not be seen. Without it a
            suffix token sees the prefix, itself and the suffix tokens before it.
        mask: (prompts, prefix), added to the logits of the prefix.
        dropout: probability of dropping an attention weight; torch's generator draws.
    Returns:
        (rows, seq, heads * dim_head) in the dtype of q.
    """
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


def diffusion_step(
    x: Tensor,
    pred: Tensor,
    null_pred: Tensor | None,
    cond_scale: Tensor,
    x0_prev: Tensor,
    noise: Tensor | None,
    table: Tensor,
    index: Tensor,
    clamp: str | None = None,
    radius: float = 1.0,
    *,
    null_table: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Guidance, prediction to x0, clamp and solver update, in one pass over the embedding.

    `pred = null + (pred - null) * cond_scale`; `x0 = clamp(p * x + q * pred)`;
    `x = a * x + b * x0 + c * x0_prev + s * noise`, with `(p, q, a, b, c, s) = table[index]`.

    Args:
        x, x0_prev, noise: (rows, dim), fp32.
        pred: (rows, dim), any float dtype.
        null_pred: (rows, dim), the unconditional prediction; without it and `null_table` there is no guidance.
        cond_scale: 0-d or (rows,), fp32.
        noise: None draws it from `seed` (`philox_normal`).
        table: (steps, 6), fp32, see `fastprior.diffusion.solvers`.
        index: 0-d or (rows,) int64: the step, or that of each row.
        clamp, radius: see `clamp_x0`.
        null_table: (steps, dim), unconditional predictions by step, in place of `null_pred`.
        seed: 0-d int64.
    Returns:
        the next x, and x0, (rows, dim) fp32.
    """
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
