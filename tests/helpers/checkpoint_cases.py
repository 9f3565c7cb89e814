"""Priors as releases of dalle2-pytorch saved them, and whether what is loaded samples as they do."""

import re

import torch
import torch.nn.functional as F
from torch import nn

from fastprior import DiffusionPrior, DiffusionPriorNetwork

DIM, STEPS, TEXT = 32, 6, 5
BIAS = "net.causal_transformer.rel_pos_bias.relative_attention_bias.weight"
UNSEEN = {"net": {}, "prior": {"cond_drop_prob": 0.2, "image_embed_scale": 3.0, "sampling_clamp_l2norm": True}}
NULLS = {"net.null_text_encodings", "net.null_text_embeds", "net.null_image_embed"}
NETS = {
    "plain": {},
    "norms": dict(norm_in=True, norm_out=False, normformer=True, final_proj=False),
    "norm in": dict(norm_in=True),
    "no rotary": dict(rotary_emb=False),
    "continuous": dict(num_timesteps=None, num_time_embeds=2),
    "embeds": dict(num_time_embeds=2, num_image_embeds=3, num_text_embeds=4),
    "heads": dict(heads=1, dim_head=12, depth=1, ff_mult=2),
    "odd ff": dict(ff_mult=1.7, max_text_len=7),
    "odder ff": dict(ff_mult=0.9),
    "no text": dict(max_text_len=0),
    "deep": dict(depth=11, dim_head=4, heads=2),
}


def make_prior(seed=0, prior=None, **net):
    """A tiny prior whose every weight matters: gains are not 1."""
    net = dict(dim=DIM, depth=2, dim_head=8, heads=3, num_timesteps=STEPS, max_text_len=TEXT) | net
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = DiffusionPrior(
            DiffusionPriorNetwork(**net),
            **dict(image_embed_dim=DIM, timesteps=STEPS, cond_drop_prob=0.1) | (prior or {}),
        )
        for name, parameter in made.named_parameters():
            if name.endswith(".g"):
                nn.init.normal_(parameter.data, 1, 0.3)
    return made.eval()


def make_prior_like(state):
    prior = make_prior()
    prior.load_state_dict(state)
    return prior


def dot_product(**net):
    return make_prior(cosine_sim=False, dot_scale=8**-0.5, **net)


def sample(prior, encodings=True, cond_scale=1.0, **kwargs):
    generator = torch.Generator().manual_seed(3)
    cond = dict(text_embed=F.normalize(torch.randn(3, DIM, generator=generator), dim=-1))
    if encodings:
        cond["text_encodings"] = torch.randn(3, TEXT, DIM, generator=generator)
        cond["text_encodings"][1, 2:] = 0
    torch.manual_seed(7)
    return prior.p_sample_loop((3, DIM), text_cond=cond, cond_scale=cond_scale, **kwargs)


def assert_same_samples(loaded, origin, tol=0.0, **kwargs):
    """Equal up to `tol` of the largest sample, and not what another prior gives."""
    ours, theirs, other = (sample(prior, **kwargs) for prior in (loaded, origin, make_prior(99)))
    scale = theirs.abs().max()
    assert scale > 1e-2
    assert (ours - theirs).abs().max() <= tol * scale
    assert (ours - other).abs().max() > 0.05 * scale


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def network_of(state):
    return {key[4:]: value for key, value in state.items() if key.startswith("net.")}


def old_norms(state):
    """As before 0.16.0: the gain of a norm is `gamma`, and it has a zero `beta`."""
    out = {}
    for key, value in state.items():
        out[re.sub(r"\.g$", ".gamma", key)] = value
        if key.endswith(".g"):
            out[re.sub(r"\.g$", ".beta", key)] = torch.zeros_like(value)
    return out


def single_null(state):
    """As from 0.23.1 to 1.8.4."""
    out = {key: value for key, value in state.items() if key not in NULLS}
    return out | {"net.null_text_embed": state["net.null_text_encodings"]}


def file_with(folder, payload, name="file.pth"):
    torch.save(payload, folder / name)
    return folder / name
