"""Weight-only quantisation of the linears that every denoising step reads, and what it must keep of the quality."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from fastprior.models.dalle2.layers import Attention
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.models.quantised_linear import QuantisedLinear

DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}


def _linears(net: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Owner and name of each linear that a step reads."""
    if isinstance(net, DiffusionPriorNetwork):
        transformer = net.causal_transformer
        for attn, ff in transformer.layers:
            yield from ((attn, "to_q"), (attn, "to_kv"), (attn.to_out, "0"), (ff, "1"), (ff, "5"))
        if not isinstance(transformer.project_out, nn.Identity):
            yield transformer, "project_out"
    else:
        for block in net.transformer_blocks:
            yield from ((block.attn1, name) for name in ("to_q", "to_k", "to_v"))
            yield from ((block.attn1.to_out, "0"), (block.ff.net[0], "proj"), (block.ff.net, "2"))


def quantised(net: nn.Module, kind: str) -> nn.Module:
    """A network with the linears of its transformer quantised, for `step`. All other parameters are the network's own.

    Args:
        net: a DiffusionPriorNetwork or a PriorTransformer, with plain linears.
        kind: "int8" or "float8" (e4m3), with one scale for each row of a weight.
    Raises:
        ValueError: something stands in the place of a linear, or another kind.
    """
    check(kind)
    shared = {id(t): t for t in (*net.parameters(), *net.buffers())}
    other = copy.deepcopy(net, shared)
    for owner, name in _linears(other):
        linear = getattr(owner, name)
        if type(linear) is not nn.Linear:
            found = f"{name} of the {type(owner).__name__} is a {type(linear).__name__}"
            raise ValueError(f"{found}; it must be a plain Linear to be quantised")
        setattr(owner, name, QuantisedLinear(linear, DTYPES[kind]))
    for attn in other.modules():
        if isinstance(attn, Attention):  # parts of one, so that one kernel can compute both projections
            attn.qkv_scale = torch.cat((attn.to_q.scale, attn.to_kv.scale))
            attn.to_q.scale, attn.to_kv.scale = attn.qkv_scale.split((len(attn.to_q.scale), len(attn.to_kv.scale)))
    return other


def check(kind: str | None) -> None:
    if kind is not None and kind not in DTYPES:
        raise ValueError(f"quantise={kind!r}; it must be None or {' or '.join(map(repr, DTYPES))}")


def update(net: nn.Module) -> None:
    """Quantise the weights that a network of `quantised` was made from again, in place."""
    for module in net.modules():
        if isinstance(module, QuantisedLinear):
            module.update()
