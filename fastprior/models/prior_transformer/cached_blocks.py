"""Transformer blocks of either make, ours or diffusers', with a cache: a prefill of the prefix, and steps behind it."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprior.kernels import ops
from fastprior.models import snapshot
from fastprior.models.linears import are_known, dtype_of, projected, scales_of
from fastprior.models.patches import are_called_as_they_are
from fastprior.models.quantised_linear import QuantisedLinear
from fastprior.models.shared_rows import RowLayout

HIDDEN = -10000.0  # added to the logit of a key that must not be seen: what the weights were trained with


class Prefix(NamedTuple):
    """Keys and values of the prefix tokens.

    Attributes:
        k, v: (depth, prompts, heads, prefix, dim_head).
        mask: (prompts, prefix) fp32, added to the logits; None where nothing is hidden.
        texts: (prompts,) int64, which of the texts that ran each is; None where they are the prompts.
        blocks: what `prepared` gives of the blocks that run behind it; without it each step asks.
        positions: (1, suffix, dim) fp32 or wider, added to the tokens of a step; without it each step asks the model.
        samples: how many a row holds.
        bias: (suffix, heads, prefix + suffix) fp32, added to the logits of rows that hold several.
        dtype: of the weights.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None
    texts: Tensor | None = None
    blocks: ops.Blocks | None = None
    positions: Tensor | None = None
    samples: int = 1
    bias: Tensor | None = None
    dtype: torch.dtype = torch.float32


def normed(
    norm: nn.Module, x: Tensor, dtype: torch.dtype, given: torch.dtype | None = None, known: bool = False
) -> Tensor:
    """The norm of x in a dtype; what stands in the place of a LayerNorm is `given` x in that one, or in another."""
    if known or (type(norm) is nn.LayerNorm and are_called_as_they_are(norm)):
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, dtype=dtype)
    return norm(x.to(given or dtype)).to(dtype)


def _after_attention(block: nn.Module, out: Tensor, x: Tensor, dtype: torch.dtype, known: bool = False) -> Tensor:
    expand, _, contract = block.ff.net
    x = projected(block.attn1.to_out[0], out.to(dtype), residual=x, known=known)
    h = projected(expand.proj, normed(block.norm3, x, dtype, known=known), activation="gelu", known=known)
    return projected(contract, h, residual=x, known=known)


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
    dtype, of_steps = dtype or x.dtype, prepared(blocks) if x.is_cpu else None
    if pack:
        keep = mask > HIDDEN
        rank = keep.cumsum(dim=1)
        longest = max(1, int(rank[:, -1].max()))
        slots = (torch.arange(len(x), device=x.device)[:, None] * longest + rank - 1)[keep]
        logits = mask.new_full((len(x) * longest,), HIDDEN)
        logits[slots] = mask[keep]
        logits = logits.view(len(x), longest) if (logits != 0).any() else None
        x = x[keep]
        found = None if mask[keep].any() else _keys_values(of_steps, x, rank[:, -1].tolist())
        if found is not None:
            cache = _spread(found, slots, len(mask), longest, prompts)
            return Prefix(*cache, _of_prompts(logits, prompts), prompts, of_steps, dtype=dtype)
    else:
        longest, slots, logits, x = mask.shape[1], slice(None), mask, x.flatten(0, 1)

    def spread(t: Tensor) -> Tensor:
        """(tokens, dim) to (batch, longest, heads, dim_head), zeros where a row has fewer tokens."""
        if pack:
            rows = t.new_zeros(len(mask) * longest, t.shape[-1])
            rows[slots] = t
            t = rows
        return t.view(len(mask), longest, blocks[0].attn1.heads, -1)

    cache, known = [], of_steps is not None
    for index, block in enumerate(blocks):
        attn, h = block.attn1, normed(block.norm1, x, dtype, known=known)
        k, v = (spread(projected(linear, h, known=known)) for linear in (attn.to_k, attn.to_v))
        if not cache:
            # the reference computes in fp32 what kernels read as it is
            stored = k.dtype if ops.on_triton(k) else torch.promote_types(k.dtype, torch.float32)
            count = len(mask) if prompts is None else len(prompts)
            cache = [k.new_empty(len(blocks), count, *k.transpose(1, 2).shape[1:], dtype=stored) for _ in range(2)]
        for kept, t in zip(cache, (k, v)):
            kept[index] = (t if prompts is None else t[prompts]).transpose(1, 2)
        if index < len(blocks) - 1:
            q = spread(projected(attn.to_q, h, known=known))
            out = ops.attention(q, k, v, scale=attn.scale, causal=True, mask=logits)
            x = _after_attention(block, out.flatten(0, 1)[slots], x, dtype, known)
    return Prefix(*cache, _of_prompts(logits, prompts), prompts, of_steps, dtype=dtype)


def _of_prompts(t: Tensor | None, prompts: Tensor | None) -> Tensor | None:
    return t if t is None or prompts is None else t[prompts]


def _keys_values(blocks: ops.Blocks | None, x: Tensor, lengths: list[int]) -> Tensor | None:
    """Keys and values of packed texts by `ops.run_blocks`; None where it does not compute them.

    Args:
        x: (tokens, dim), those of each text side by side.
        lengths: of the texts.
    Returns:
        (depth, tokens, 2, heads, dim_head).
    """
    if blocks is None:
        return None
    depth, _, _, _, *heads, _, _ = blocks.shape
    parts = []
    while lengths:
        ends = list(itertools.accumulate(lengths))
        taken = max(1, bisect.bisect_right(ends, blocks.most_tokens))
        none = x.new_empty(depth, taken, 0, *heads)
        starts = [0, *ends[:taken]]
        parts.append(ops.run_blocks(x[None, : starts[-1]], blocks, none, none, outputs=0, starts=starts))
        if parts[-1] is None:
            return None
        x, lengths = x[starts[-1] :], lengths[taken:]
    return torch.cat(parts, dim=2).squeeze(1)


def _spread(kv: Tensor, slots: Tensor, texts: int, longest: int, prompts: Tensor | None) -> Tensor:
    """Keys and values of packed texts as a `Prefix` has them: both, (2, depth, prompts, heads, longest, dim_head).

    Zeros where a text has fewer tokens.
    """
    depth, tokens, *rest = kv.shape
    if tokens < texts * longest:
        rows = kv.new_zeros(depth, texts * longest, *rest)
        rows[:, slots] = kv
        kv = rows
    kv = kv.view(depth, texts, longest, *rest)
    return _of_prompts(kv.transpose(0, 1), prompts).permute(3, 1, 0, 4, 2, 5).contiguous()


def share(prefix: Prefix, layout: RowLayout) -> Prefix:
    """Make a prefix ready for steps whose rows hold several samples of a prompt."""
    heads, tokens = prefix.k.shape[2:4]
    bias = torch.zeros(layout.hidden.shape, device=prefix.k.device).masked_fill(layout.hidden, -math.inf)
    bias = F.pad(bias, (tokens, 0))[:, None].repeat(1, heads, 1)
    return prefix._replace(positions=prefix.positions[:, layout.tokens], samples=layout.samples, bias=bias)


def prepared(blocks: Sequence[nn.Module]) -> ops.Blocks | None:
    """All blocks as one kernel of the CPU runs them, for as long as no module changes.

    None where there is no such kernel, something stands in the place of a linear (LoRA) or norm, norms differ, or a
    trace must look at each module.
    """
    return None if torch.compiler.is_compiling() else snapshot.once(blocks, "blocks", partial(_prepared, blocks))


def _prepared(blocks: Sequence[nn.Module]) -> ops.Blocks | None:
    if (described := _described(blocks)) is None:
        return None
    parts, options = described
    heads = options["heads"]
    return ops.prepare_blocks(parts, owner=blocks, kv_heads=heads, dim_head=len(parts[0].q) // heads, **options)


def _described(blocks: Sequence[nn.Module]) -> tuple[list[ops.Block], dict] | None:
    """The blocks' weights, and how kernels compute them; None where they do not."""
    norms = [norm for block in blocks for norm in (block.norm1, block.norm3)]
    if any(type(norm) is not nn.LayerNorm or norm.weight is None for norm in norms):
        return None
    if not are_called_as_they_are(*norms) or len({norm.eps for norm in norms}) > 1:
        return None
    parts = []
    for block in blocks:
        attn, (expand, _, contract) = block.attn1, block.ff.net
        linears = attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], expand.proj, contract
        if not are_known(*linears):
            return None
        named = list(zip(ops.Block._fields, linears))
        part = ops.Block(
            *(linear.weight for linear in linears),
            **{f"{name}_scale": scale for name, scale in zip(ops.Block._fields, scales_of(*linears))},
            **{f"{name}_bias": linear.bias for name, linear in named},
            norm_gain=block.norm1.weight, norm_bias=block.norm1.bias,
            ff_gain=block.norm3.weight, ff_bias=block.norm3.bias,
        )  # fmt: skip
        parts.append(part)
    attn, eps = blocks[0].attn1, blocks[0].norm1.eps
    return parts, dict(heads=attn.heads, scale=attn.scale, cosine=False, activation="gelu", eps=eps)


def prepare_launches(
    blocks: nn.ModuleList, prefix: Prefix, head: tuple[nn.Module, nn.Module], entry: nn.Module, **options
) -> ops.Launches | None:
    """`ops.prepare_launches` of blocks behind a prefix; None where it does not compute them.

    Args:
        head: the norm and the linear that outputs pass at last.
        entry: the linear that makes tokens of noisy embeddings.
    """
    norm, linear = head
    if not ops.on_triton(prefix.k) or not are_known(linear, entry) or not are_called_as_they_are(norm):
        return None
    if type(norm) is not nn.LayerNorm or norm.weight is None or (described := _described(blocks)) is None:
        return None
    parts, shared = described
    linears = [m for m in (linear, entry, *blocks.modules()) if type(m) in (nn.Linear, QuantisedLinear)]
    if {dtype_of(one, one) for one in linears} != {prefix.dtype}:
        return None
    first, last = (
        ops.Block(one.weight, q_scale=scale, q_bias=one.bias)
        for one, scale in zip((entry, linear), scales_of(entry, linear))
    )
    last = last._replace(norm_gain=norm.weight, norm_bias=norm.bias)
    shared |= dict(dtype=prefix.dtype, samples=prefix.samples, bias=prefix.bias, mask=prefix.mask, head_eps=norm.eps)
    k, v = prefix.k.transpose(2, 3), prefix.v.transpose(2, 3)
    return ops.prepare_launches(parts, last, k, v, entry=first, **shared, **options)


def step(
    blocks: Sequence[nn.Module],
    x: Tensor,
    prefix: Prefix,
    outputs: int,
    head: tuple[nn.LayerNorm, nn.Module] | None = None,
) -> Tensor:
    """The last `outputs` of the suffix tokens behind a prefix: (rows, outputs, dim), with a head its columns.

    Args:
        x: (rows, suffix, dim); rows is a multiple of the prefix's prompts, those of one prompt together.
        head: the norm and the linear that outputs pass at last.
    """
    out, dtype = None, prefix.dtype
    if x.is_cpu:
        found = prefix.blocks
        if found is None or found.owner is not blocks:
            found = prepared(blocks)
        k, v = prefix.k.transpose(2, 3), prefix.v.transpose(2, 3)
        out = ops.run_blocks(x, found, k, v, outputs=outputs, bias=prefix.bias, mask=prefix.mask)
    out = _step_by_layers(blocks, x, prefix, outputs) if out is None else out
    if head is None:
        return out
    norm, linear = head
    return projected(linear, normed(norm, out, dtype)).to(out.dtype)


def _step_by_layers(blocks: Sequence[nn.Module], x: Tensor, prefix: Prefix, outputs: int) -> Tensor:
    dtype = prefix.dtype
    for index, block in enumerate(blocks):
        attn, h = block.attn1, normed(block.norm1, x, dtype)
        k, v = projected(attn.to_k, h), projected(attn.to_v, h)
        if index == len(blocks) - 1:
            x, h = x[:, -outputs:], h[:, -outputs:]
        q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (projected(attn.to_q, h), k, v))
        cache = (t[index].transpose(1, 2) for t in (prefix.k, prefix.v))
        out = ops.decode_attention(q, k, v, *cache, scale=attn.scale, bias=prefix.bias, mask=prefix.mask)
        x = _after_attention(block, out, x, dtype)
    return x
