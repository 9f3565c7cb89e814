"""What quantised weights must keep of the quality, and how it is judged."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprior.models.dalle2.network import DiffusionPriorNetwork

MEDIAN, WORST = 0.999, 0.995  # least cosine to the embeddings of the weights as they were, with the same noise


class Quality(NamedTuple):
    """Cosines between embeddings of the quantised weights and of the weights as they were: the median and the worst."""

    median: float
    worst: float


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
