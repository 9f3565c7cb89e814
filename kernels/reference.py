"""Pure-PyTorch references of the hot operations: what the CPU runs and what every kernel is checked against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, gain: Tensor, eps: float, stable: bool = False) -> Tensor:
    """LayerNorm with a gain and no bias: `(x - mean) / sqrt(var + eps) * gain` over the last dimension.

    Args:
        x: (..., dim), any float dtype; statistics are accumulated in fp32.
        gain: (dim,), cast to the dtype of `x`.
        eps: added to the variance.
        stable: first divide by the *signed* maximum of the row, taken as a constant in backward. A row whose maximum
            is negative changes sign: trained weights depend on it.
    Returns:
        (..., dim) in the dtype of `x`.
    """
    if stable:
        x = x / x.amax(dim=-1, keepdim=True).detach()
    return F.layer_norm(x, x.shape[-1:], gain.to(x.dtype), None, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, with a fast way for few rows on the CPU.

    There `weight @ x.T` reads the weights faster than the usual order does: in 16 bits up to about 256 rows and up to
    twice as fast (as fast as packed weights are), in fp32 for 5 to 64 rows.

    Args:
        x: (..., in).
        weight: (out, in), in the dtype of `x`.
        bias: (out,).
    Returns:
        (..., out).
    """
    rows = x.numel() // x.shape[-1]
    few = rows <= 256 if x.element_size() == 2 else 5 <= rows <= 64
    if not few or x.device.type != "cpu" or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    # contiguous: random numbers "like" a result, and dropout masks, are drawn in the order of its memory
    out = (weight @ x.reshape(rows, -1).t()).t().contiguous()
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


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


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention of many query heads over one head of keys and values; softmax in fp32.

    Args:
        q: (batch, seq, heads, dim_head), scaled already.
        k, v: (batch, keys, dim_head).
        bias: (seq * heads, keys), added to the logits; -inf where a key must not be seen.
        mask: (batch, keys) bool, False where a key must not be seen.
        dropout: probability of dropping an attention weight.
    Returns:
        (batch, seq, heads * dim_head).
    """
    batch, seq, heads, dim_head = q.shape
    q = q.reshape(batch, seq * heads, dim_head)
    if bias is None:
        logits = q @ k.transpose(1, 2)
    else:
        logits = torch.baddbmm(bias.to(q.dtype), q, k.transpose(1, 2))
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, :], -torch.finfo(logits.dtype).max)
    weights = F.dropout(logits.softmax(dim=-1, dtype=torch.float32).to(v.dtype), dropout)
    return (weights @ v).view(batch, seq, heads * dim_head)


def decode_attention(q: Tensor, prefix_k: Tensor, prefix_v: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention of the few suffix tokens over a cached prefix and over themselves.

    Args:
        q: (rows, seq, heads, dim_head), scaled already.
        prefix_k, prefix_v: (prompts, prefix, dim_head); row i belongs to prompt i // (rows / prompts).
        k, v: (rows, keys, dim_head), the suffix's own.
        bias: (seq * heads, prefix + keys), added to the logits; -inf where a key must not be seen.
    Returns:
        (rows, seq, heads * dim_head).
    """
    rows, seq, heads, dim_head = q.shape
    prompts, prefix, _ = prefix_k.shape
    by_prompt, by_row = q.reshape(prompts, -1, dim_head), q.reshape(rows, seq * heads, dim_head)
    on_prefix = (by_prompt @ prefix_k.transpose(1, 2)).view(rows, seq * heads, prefix)
    logits = torch.cat((on_prefix, by_row @ k.transpose(1, 2)), dim=-1) + bias
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    from_prefix = weights[..., :prefix].reshape(prompts, -1, prefix) @ prefix_v
    from_suffix = weights[..., prefix:] @ v
    return (from_prefix.view(rows, seq * heads, dim_head) + from_suffix).view(rows, seq, heads * dim_head)


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
    null_pred: Tensor,
    cond_scale: Tensor,
    x0_prev: Tensor,
    noise: Tensor,
    row: Tensor,
    clamp: str | None,
    radius: float,
) -> tuple[Tensor, Tensor]:
    """Guidance, prediction to x0, clamp and solver update, in one pass over the embedding.

    `pred = null + (pred - null) * cond_scale`; `x0 = clamp(p * x + q * pred)`;
    `x = a * x + b * x0 + c * x0_prev + s * noise`, with `row = (p, q, a, b, c, s)`.

    Args:
        x, pred, x0_prev, noise: (rows, dim), fp32.
        null_pred: broadcastable to (rows, dim).
        cond_scale: 0-d or (rows, 1).
        row: (6,) or (rows, 6), see `fastprior.solvers`.
        clamp, radius: see `clamp_x0`.
    Returns:
        the next x, and x0.
    """
    p, q, a, b, c, s = row.unsqueeze(-1).unbind(-2)
    pred = null_pred + (pred - null_pred) * cond_scale
    x0 = clamp_x0(p * x + q * pred, clamp, radius)
    return a * x + b * x0 + c * x0_prev + s * noise, x0
