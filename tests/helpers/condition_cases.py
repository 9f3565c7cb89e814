"""Networks with extra conditions and text encoders of other widths, and inputs for them."""

import torch

from helpers.priors import make_text

TOLERANCE = 1e-4  # of scale, what a whole fp32 run may differ by: two orders of summation, amplified by the solver
SPECS = dict(
    style=dict(kind="vector", size=6),
    aesthetic=dict(kind="scalar", mean=5.0, std=1.5),
    people=dict(kind="category", size=4),
)


NETS = {
    "conditions": dict(conditions=SPECS),
    "self_cond": dict(conditions=SPECS, self_cond=True, num_timesteps=20, norm_in=True),
    "t5": dict(text_dim=24, text_embed_dim=12, num_text_embeds=2),
    "all": dict(conditions=SPECS, text_dim=24, max_text_len=3),
}


def make_values(prompts: int, seed: int = 0) -> dict:
    """Values of all conditions; of every third prompt, each is missing."""
    draw = torch.Generator().manual_seed(seed)
    values = dict(
        aesthetic=torch.randn(prompts, generator=draw) * 1.5 + 5,
        people=torch.randint(4, (prompts,), generator=draw),
        style=torch.randn(prompts, 6, generator=draw),
    )
    values["aesthetic"][0::3], values["people"][1::3], values["style"][2::3, 1] = torch.nan, -1, torch.nan
    return values


def make_inputs(net: dict, prompts: int) -> dict:
    """A text condition for a network of these arguments, with values where it has conditions."""
    text = make_text(prompts, net.get("text_dim", 32))
    text["text_embed"] = make_text(prompts, net.get("text_embed_dim", 32), seed=1)["text_embed"]
    return text | (dict(conditions=make_values(prompts)) if "conditions" in net else {})
