"""What the arguments of a `DiffusionPrior` must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastprior.checks import check_count, check_number, check_share

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
