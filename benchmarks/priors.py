"""The priors that are measured, ours and the peer's with the same weights, and how they are timed."""

import functools

import dalle2_pytorch
import torch

import fastprior
from fastprior.layers import l2norm

D2_SMALL = dict(dim=768, depth=12, dim_head=64, heads=12, max_text_len=77, normformer=True, num_timesteps=1000)


def build(module, device) -> torch.nn.Module:
    torch.manual_seed(0)
    net = module.DiffusionPriorNetwork(**D2_SMALL)
    return module.DiffusionPrior(net, image_embed_dim=768, timesteps=1000, cond_drop_prob=0.1).eval().to(device)


@functools.cache
def pair(device):
    """(ours, the peer's): the same seed makes the same weights."""
    return build(fastprior, device), build(dalle2_pytorch, device)


def text(prompts: int, device) -> dict:
    """Random captions of full length."""
    draw = torch.Generator().manual_seed(prompts)
    embed, encodings = torch.randn(prompts, 768, generator=draw), torch.randn(prompts, 77, 768, generator=draw)
    return dict(text_embed=l2norm(embed).to(device), text_encodings=encodings.to(device))
