"""Weight-only quantisation of the linears that every denoising step reads, and what it must keep of the quality."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprior.layers import Linear, QuantisedLinear
from fastprior.network import DiffusionPriorNetwork

DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
MEDIAN, WORST = 0.999, 0.995  # least cosine to the embeddings of the weights as they were, with the same noise


class Quality(NamedTuple):
    """Cosines between embeddings of the quantised weights and of the weights as they were: the median and the worst."""

    median: float
    worst: float


def quantised(net: DiffusionPriorNetwork, kind: str) -> DiffusionPriorNetwork:
    """A network with the linears of its transformer quantised, for `step`. All other parameters are the network's own.

    Args:
        net: with plain linears.
        kind: "int8" or "float8" (e4m3), with one scale for each row of a weight.
    Raises:
        ValueError: something stands in the place of a linear, or another kind.
    """
    if kind not in DTYPES:
        raise ValueError(f"quantise={kind!r}; it must be one of {', '.join(map(repr, DTYPES))}")
    shared = {id(t): t for t in (*net.parameters(), *net.buffers())}
    other = copy.deepcopy(net, shared)

    def replace(owner: nn.Module, name: str) -> None:
        linear = getattr(owner, name)
        if type(linear) is not Linear:
            found = f"{name} of the {type(owner).__name__} is a {type(linear).__name__}"
            raise ValueError(f"{found}; it must be a plain Linear to be quantised")
        setattr(owner, name, QuantisedLinear(linear, DTYPES[kind]))

    transformer = other.causal_transformer
    for attn, ff in transformer.layers:
        for owner, name in (attn, "to_q"), (attn, "to_kv"), (attn.to_out, "0"), (ff, "1"), (ff, "5"):
            replace(owner, name)
        # parts of one, so that one kernel can compute both projections
        attn.qkv_scale = torch.cat((attn.to_q.scale, attn.to_kv.scale))
        attn.to_q.scale, attn.to_kv.scale = attn.qkv_scale.split((len(attn.to_q.scale), len(attn.to_kv.scale)))
    if not isinstance(transformer.project_out, nn.Identity):
        replace(transformer, "project_out")
    return other


def update(net: DiffusionPriorNetwork) -> None:
    """Quantise the weights that a network of `quantised` was made from again, in place."""
    for module in net.modules():
        if isinstance(module, QuantisedLinear):
            module.update()


def random_prompts(net: DiffusionPriorNetwork, count: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Prompts that depend on the seed alone: text embeddings of length 1, encodings of random lengths."""
    draw = torch.Generator().manual_seed(seed)
    embeds = F.normalize(torch.randn(count, net.text_embed_dim, generator=draw), dim=-1)
    encodings = torch.randn(count, net.max_text_len, net.text_dim, generator=draw)
    lengths = torch.randint(1, net.max_text_len + 1, (count, 1, 1), generator=draw)
    encodings = encodings * (torch.arange(net.max_text_len)[:, None] < lengths)
    device = net.learned_query.device
    return dict(text_embed=embeds.to(device), text_encodings=encodings.to(device))


def judge(kind: str, got: Tensor, wanted: Tensor) -> Quality:
    """The quality of embeddings (rows, dim) of quantised weights, beside those of the weights as they were.

    Raises:
        ValueError: it is not enough, with the figures.
    """
    cosine = F.cosine_similarity(got.float(), wanted.float(), dim=-1)
    quality = Quality(cosine.median().item(), cosine.min().item())
    if not (quality.median >= MEDIAN and quality.worst >= WORST):  # NaN is not enough
        raise ValueError(
            f"quantise={kind!r} loses too much: over {len(cosine)} embeddings their cosine to those of the weights as "
            f"they were is {quality.median:.5f} in the median and {quality.worst:.5f} at worst; it must be at least "
            f"{MEDIAN} and {WORST}"
        )
    return quality
