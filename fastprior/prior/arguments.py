"""What the arguments of a `DiffusionPrior` must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastprior.checks import check_count, check_number, check_share
from fastprior.models.dalle2.network import DiffusionPriorNetwork

_DEFAULTS = "image_embed_dim", "sample_timesteps", "text_cond_drop_prob", "image_cond_drop_prob", "image_embed_scale"


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise ValueError for a value with which there is no prior, naming the argument, its value and the rule."""
    given = {name: value for name, value in given.items() if value is not None or name not in _DEFAULTS}
    for name in ("image_embed_dim", "image_channels", "timesteps"):
        if name in given:
            check_count(name, given[name])
    if "sample_timesteps" in given:
        check_count("sample_timesteps", given["sample_timesteps"], most=given["timesteps"])
    for name in ("cond_drop_prob", "text_cond_drop_prob", "image_cond_drop_prob"):
        if name in given:
            check_share(name, given[name])
    if "image_embed_scale" in given:
        check_number("image_embed_scale", given["image_embed_scale"], above=0)
    clamp = given["clamp"]
    if not (clamp in (None, "default", "l2") or (isinstance(clamp, (int, float)) and clamp > 0)):
        raise ValueError(f"clamp={clamp!r}; it must be None, 'l2', a positive radius, or left out")


def check_models(net: nn.Module, clip: nn.Module | None, image_embed_dim: int, reads_encodings: bool) -> None:
    """Raise ValueError unless a prior's network and its CLIP adapter fit its embeddings, and each other."""
    if net.dim != image_embed_dim:
        raise ValueError(f"image_embed_dim={image_embed_dim}; it must be the network's dim, {net.dim}")
    if isinstance(net, DiffusionPriorNetwork) and net.text_dim != net.dim and not reads_encodings:
        raise ValueError(f"text_dim={net.text_dim}; with condition_on_text_encodings=False no encodings are read")
    if clip is not None and clip.dim_latent != image_embed_dim:
        raise ValueError(f"image_embed_dim={image_embed_dim}; the CLIP given embeds in {clip.dim_latent}")
