"""Transformer blocks of `PriorTransformer` under diffusers' parameter names, and how a prefix and a suffix run through
blocks of either make, ours or diffusers'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprior.kernels import ops
from fastprior.models.quantised_linear import QuantisedLinear, scale_of
from fastprior.models.shared_rows import RowLayout

HIDDEN = -10000.0  # added to the logit of a key that must not be seen: what the weights were trained with
PLAIN = nn.Linear, QuantisedLinear
ACTIVATIONS = {"silu": nn.SiLU, "swish": nn.SiLU, "mish": nn.Mish, "gelu": nn.GELU, "relu": nn.ReLU}


class TimeFeatures(nn.Module):
    """Times (n,) as (n, dim) cosines and sines of falling frequency, fp32; a last odd feature is zero."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, times: Tensor) -> Tensor:
        half = self.dim // 2
        rate = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=times.device) / half)
        angles = times[:, None].float() * rate
        return F.pad(torch.cat((angles.cos(), angles.sin()), dim=-1), (0, self.dim % 2))


class TimeEmbedding(nn.Module):
    """Linear, activation, linear: (n, dim) to (n, dim)."""

    def __init__(self, dim: int, hidden: int, act_fn: str):
        super().__init__()
        if act_fn not in ACTIVATIONS:
            raise ValueError(f"time_embed_act_fn={act_fn!r}; it must be one of {', '.join(map(repr, ACTIVATIONS))}")
        self.linear_1 = nn.Linear(dim, hidden)
        self.act = ACTIVATIONS[act_fn]()
        self.linear_2 = nn.Linear(hidden, dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class Attention(nn.Module):
    """Self-attention of `heads` heads with biases; `attention_mask` (batch or batch * heads, seq, seq) is added."""

    def __init__(self, heads: int, dim_head: int, dropout: float):
        super().__init__()
        dim = heads * dim_head
        self.heads, self.scale = heads, dim_head**-0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(dropout)])

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.to_q, self.to_k, self.to_v)
        )
        if attention_mask is not None:
            attention_mask = attention_mask.unflatten(0, (len(x), -1))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        out = out.transpose(1, 2).flatten(2)
        for module in self.to_out:
            out = module(out)
        return out


class GELU(nn.Module):
    """A linear and its exact GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    """Linear, GELU, dropout, linear; four times as wide inside."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.net = nn.ModuleList([GELU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class Block(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and a residual connection: (batch, seq, dim) to the same."""

    def __init__(self, heads: int, dim_head: int, dropout: float):
        super().__init__()
        dim = heads * dim_head
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(heads, dim_head, dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, dropout)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states), attention_mask=attention_mask)
        return hidden_states + self.ff(self.norm3(hidden_states))


class Prefix(NamedTuple):
    """Keys and values of the prefix tokens.

    Attributes:
        k, v: (depth, prompts, heads, prefix, dim_head).
        mask: (prompts, prefix) fp32, added to the logits; None where nothing is hidden.
        texts: (prompts,) int64, which of the texts that ran each is; None where they are the prompts.
        blocks: what `prepared` gives of the blocks that run behind it; without it each step asks.
        layout: of rows that hold several samples of a prompt; None where they hold one.
        bias: (tokens, heads, prefix + tokens) fp32, added to the logits of such rows.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None
    texts: Tensor | None = None
    blocks: ops.Blocks | None = None
    layout: RowLayout | None = None
    bias: Tensor | None = None


def normed(norm: nn.LayerNorm, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, dtype=dtype)


def projected(linear: nn.Module, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
    """`residual + activation(linear(x))`; whatever stands in the place of a linear (LoRA) is called."""
    if type(linear) in PLAIN:
        around = dict(scale=scale_of(linear), activation=activation, residual=residual)
        return ops.linear(x, linear.weight, linear.bias, **around)
    y = linear(x)
    y = y if activation is None else F.gelu(y)
    return y if residual is None else y + residual


def _after_attention(block: nn.Module, out: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    expand, _, contract = block.ff.net
    x = projected(block.attn1.to_out[0], out.to(dtype), residual=x)
    h = projected(expand.proj, normed(block.norm3, x, dtype), activation="gelu")
    return projected(contract, h, residual=x)


def distinct(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Which rows to run where rows of all the tensors (rows, …) are the same, and which of them each prompt is.

    Returns:
        chosen: (n,) int64, one row of each kind.
        prompts: int64 indices into `chosen`, one for each group of equal rows that lie together, all groups of one
            length (rows / prompts); None where that is each of `chosen` once.
    """
    flat = torch.cat([t.flatten(1).to(torch.promote_types(t.dtype, torch.float32)) for t in tensors], dim=1)
    kinds, inverse, counts = torch.unique(flat, dim=0, return_inverse=True, return_counts=True)
    chosen = inverse.argsort(stable=True)[counts.cumsum(0) - counts]
    _, runs = torch.unique_consecutive(inverse, return_counts=True)
    prompts = inverse[:: math.gcd(*runs.tolist())]
    if len(prompts) == len(kinds):  # in order, then
        return chosen[prompts], None
    return chosen, prompts


def prefill(
    blocks: Sequence[nn.Module],
    x: Tensor,
    mask: Tensor,
    prompts: Tensor | None = None,
    dtype: torch.dtype | None = None,
    pack: bool = True,
) -> Prefix:
    """Run prefix tokens through the blocks once. Hidden tokens are packed away: nothing that can be seen sees them.

    Args:
        x: (batch, prefix, dim), fp32 or wider.
        mask: (batch, prefix), added to the logits; tokens with `HIDDEN` or less are left out.
        prompts: int64 rows of the batch, in the order of the result's prompts; by default each once.
        dtype: of the weights, by default that of `x`.
        pack: off, hidden tokens run too, and shapes alone say what is computed.
    """
    dtype = dtype or x.dtype
    if pack:
        keep = mask > HIDDEN
        rank = keep.cumsum(dim=1)
        longest = max(1, int(rank[:, -1].max()))
        slots = (torch.arange(len(x), device=x.device)[:, None] * longest + rank - 1)[keep]
        logits = mask.new_full((len(x) * longest,), HIDDEN)
        logits[slots] = mask[keep]
        logits = logits.view(len(x), longest) if (logits != 0).any() else None
        x = x[keep]
    else:
        longest, slots, logits, x = mask.shape[1], slice(None), mask, x.flatten(0, 1)

    def spread(t: Tensor) -> Tensor:
        """(tokens, dim) to (batch, longest, heads, dim_head), zeros where a row has fewer tokens."""
        if pack:
            rows = t.new_zeros(len(mask) * longest, t.shape[-1])
            rows[slots] = t
            t = rows
        return t.view(len(mask), longest, blocks[0].attn1.heads, -1)

    cache = []
    for index, block in enumerate(blocks):
        attn, h = block.attn1, normed(block.norm1, x, dtype)
        k, v = spread(projected(attn.to_k, h)), spread(projected(attn.to_v, h))
        if not cache:
            # the reference computes in fp32 what kernels read as it is
            stored = k.dtype if ops.on_triton(k) else torch.promote_types(k.dtype, torch.float32)
            count = len(mask) if prompts is None else len(prompts)
            cache = [k.new_empty(len(blocks), count, *k.transpose(1, 2).shape[1:], dtype=stored) for _ in range(2)]
        for kept, t in zip(cache, (k, v)):
            kept[index] = (t if prompts is None else t[prompts]).transpose(1, 2)
        if index < len(blocks) - 1:
            q = spread(projected(attn.to_q, h))
            out = ops.attention(q, k, v, scale=attn.scale, causal=True, mask=logits)
            x = _after_attention(block, out.flatten(0, 1)[slots], x, dtype)
    logits = logits if logits is None or prompts is None else logits[prompts]
    return Prefix(*cache, logits, prompts, prepared(blocks) if x.is_cpu else None)


def share(prefix: Prefix, layout: RowLayout) -> Prefix:
    """The prefix for steps whose rows hold several samples of a prompt."""
    heads, tokens = prefix.k.shape[2:4]
    bias = torch.zeros(layout.hidden.shape, device=prefix.k.device).masked_fill(layout.hidden, -math.inf)
    bias = F.pad(bias, (tokens, 0))[:, None].repeat(1, heads, 1)
    return prefix._replace(layout=layout, bias=bias)


def _decode(prefix: Prefix, index: int, attn: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of suffix tokens in one block."""
    cache = (t[index].transpose(1, 2) for t in (prefix.k, prefix.v))
    return ops.decode_attention(q, k, v, *cache, scale=attn.scale, bias=prefix.bias, mask=prefix.mask)


def _by_blocks(blocks: Sequence[nn.Module], x: Tensor, prefix: Prefix, outputs: int) -> Tensor | None:
    """`ops.run_blocks`; None where it does not compute this."""
    if not x.is_cpu:
        return None
    found = prefix.blocks
    if found is None or found.owner is not blocks:
        found = prepared(blocks)
    k, v = prefix.k.transpose(2, 3), prefix.v.transpose(2, 3)
    return ops.run_blocks(x, found, k, v, outputs=outputs, bias=prefix.bias, mask=prefix.mask)


def prepared(blocks: Sequence[nn.Module]) -> ops.Blocks | None:
    """All blocks as one kernel of the CPU runs them, for as long as no module changes.

    None where there is no such kernel, something stands in the place of a linear (LoRA), norms differ, or a trace must
    look at each module.
    """
    if torch.compiler.is_compiling():
        return None
    found = []
    if len({norm.eps for block in blocks for norm in (block.norm1, block.norm3)}) > 1:
        return None
    for block in blocks:
        attn, (expand, _, contract) = block.attn1, block.ff.net
        linears = attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], expand.proj, contract
        if any(type(linear) not in PLAIN for linear in linears):
            return None
        scales = {f"{name}_scale": scale_of(linear) for name, linear in zip(ops.Block._fields, linears)}
        biases = {f"{name}_bias": linear.bias for name, linear in zip(ops.Block._fields, linears)}
        norms = dict(norm_gain=block.norm1.weight, norm_bias=block.norm1.bias)
        norms |= dict(ff_gain=block.norm3.weight, ff_bias=block.norm3.bias)
        found.append(ops.Block(*(linear.weight for linear in linears), **scales, **biases, **norms))
    attn, eps = blocks[0].attn1, blocks[0].norm1.eps
    sizes = dict(owner=blocks, heads=attn.heads, kv_heads=attn.heads, dim_head=len(found[0].q) // attn.heads)
    return ops.prepare_blocks(found, **sizes, scale=attn.scale, cosine=False, activation="gelu", eps=eps)


def step(
    blocks: Sequence[nn.Module], x: Tensor, prefix: Prefix, outputs: int, dtype: torch.dtype | None = None
) -> Tensor:
    """The last `outputs` of the suffix tokens x (rows, suffix, dim) behind a prefix: (rows, outputs, dim).

    `rows` is a multiple of the prefix's prompts; the rows of one prompt lie together. `dtype`: see `prefill`.
    """
    dtype = dtype or x.dtype
    if (found := _by_blocks(blocks, x, prefix, outputs)) is not None:
        return found
    for index, block in enumerate(blocks):
        attn, h = block.attn1, normed(block.norm1, x, dtype)
        k, v = projected(attn.to_k, h), projected(attn.to_v, h)
        if index == len(blocks) - 1:
            x, h = x[:, -outputs:], h[:, -outputs:]
        q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (projected(attn.to_q, h), k, v))
        x = _after_attention(block, _decode(prefix, index, attn, q, k, v), x, dtype)
    return x
