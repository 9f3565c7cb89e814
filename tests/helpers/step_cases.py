"""Small networks whose steps are calls of C, and what these are given."""

import torch

from fastprior import DiffusionPriorNetwork
from helpers.cpu_cases import FP32, random

STEPS = 5
CONFIGS = {
    "plain": {},
    "two-times": dict(num_time_embeds=2),
    "continuous": dict(num_timesteps=None, normformer=True),
    "odd": dict(dim=33, dim_head=7, heads=5, ff_mult=1.5, rotary_emb=False),
}


def network(dtype=FP32, **config):
    torch.manual_seed(0)
    sizes = dict(dim=40, depth=2, heads=3, dim_head=12, num_timesteps=STEPS, max_text_len=4)
    net = DiffusionPriorNetwork(**sizes | config).eval().requires_grad_(False)
    for weight in net.parameters():
        if weight.ndim == 2:
            weight.copy_(torch.randn(weight.shape) * 0.2)
    return net.to(dtype)


@torch.no_grad()
def conditioned(net, prompts=2, samples=4):
    times = torch.linspace(0, 1, STEPS) if net.num_timesteps is None else torch.arange(STEPS)
    text = random(prompts, net.dim, seed=1), random(prompts, 3, net.dim, seed=2)
    dtype = net.stream_dtype
    return net.share(net.prefill(*(t.to(dtype) for t in text), times), samples)


def inputs(net, rows, dtype=FP32):
    """x, noise of each step, the null table, coefficients."""
    tables = random(STEPS, net.dim, seed=5), random(STEPS, 6, seed=6) * 0.5
    noise = [random(rows, net.dim, seed=number) if number % 3 else None for number in range(STEPS)]
    given = random(rows, net.dim, seed=3), noise, *tables
    return [t.to(dtype) if torch.is_tensor(t) else [n if n is None else n.to(dtype) for n in t] for t in given]


def prepare(net, samples=4, cond=None, clamp=None, radius=1.5, scale=2.5, **changes):
    _, _, null, table = inputs(net, 2 * samples)
    given = dict(coefficients=table, null_table=null, cond_scale=scale, clamp=clamp, radius=radius) | changes
    return net.prepare_run(cond or conditioned(net, samples=samples), 2 * samples, **given)
