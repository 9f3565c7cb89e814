"""Clients of dalle2-pytorch, run on dalle2-pytorch and, unmodified, on fastprior: same weights, same seeds."""

from __future__ import annotations

import inspect
import json
import pickle
import random
import subprocess
import sys
import textwrap
from contextlib import nullcontext

import pytest
import torch
from conftest import relative_error

import fastprior
from fastprior import dropin, train_configs
from fastprior.optimizer import get_optimizer
from fastprior.utils import Timer, import_or_print_error, print_ribbon

FORWARD_TOLERANCE, RUN_TOLERANCE = 1e-5, 1e-4  # of the scale of the peer's result: the drop-in contract

# What the clients share: small sizes, seeded data, and a count of calls.
PREAMBLE = """
import torch
from collections import Counter
calls = Counter()
DIM, STEPS, TOKENS = 32, 12, 5

def data(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)

def network(cls, **options):
    return cls(dim=DIM, depth=2, dim_head=8, heads=2, num_timesteps=STEPS, max_text_len=TOKENS, **options)
"""

CLIENTS = {
    # brain decoding: its own forward, p_sample and p_sample_loop around the stock network
    "overrides_p_sample": """
from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork
from dalle2_pytorch.dalle2_pytorch import default, l2norm

class BrainPrior(DiffusionPrior):
    def __init__(self, *args, **kwargs):
        self.encoder_width = kwargs.pop("encoder_width")
        super().__init__(*args, **kwargs)
        self.encoder = torch.nn.Linear(self.encoder_width, self.image_embed_dim)

    def p_sample(self, x, t, text_cond=None, self_cond=None, clip_denoised=True, cond_scale=1.0, generator=None):
        calls["p_sample"] += 1
        mean, _, log_variance, x_start = self.p_mean_variance(
            x=x, t=t, text_cond=text_cond, self_cond=self_cond, clip_denoised=clip_denoised, cond_scale=cond_scale
        )
        noise = torch.randn(x.size(), generator=generator)
        keep = (t != 0).float().reshape(len(x), *((1,) * (x.ndim - 1)))
        return mean + 0.9 * keep * (0.5 * log_variance).exp() * noise, x_start

    def p_sample_loop(self, *args, timesteps=None, **kwargs):
        calls["p_sample_loop"] += 1
        timesteps = default(timesteps, self.noise_scheduler.num_timesteps)
        if timesteps < self.noise_scheduler.num_timesteps:
            return self.p_sample_loop_ddim(*args, **kwargs, timesteps=timesteps)
        return self.p_sample_loop_ddpm(*args, **kwargs)

    def forward(self, voxel=None, text_embed=None, image_embed=None, *args, **kwargs):
        calls["forward"] += 1
        text_embed = l2norm(self.encoder(voxel)) if voxel is not None else text_embed
        times = self.noise_scheduler.sample_random_times(len(image_embed))
        return self.p_losses(image_embed * self.image_embed_scale, times, *args, text_cond=dict(text_embed=text_embed))

def build(net_options, options):
    net = network(DiffusionPriorNetwork, **net_options)
    return BrainPrior(net=net, image_embed_dim=DIM, timesteps=STEPS, condition_on_text_encodings=False,
                      encoder_width=7, cond_drop_prob=0.2, **options)

def run(prior):
    loss = prior(voxel=torch.randn(3, 7), image_embed=data(3, DIM))
    loss.backward()
    text_cond = dict(text_embed=data(3, DIM))
    out = dict(loss=loss, grad=prior.encoder.weight.grad)
    prior.eval()
    out["ddpm"] = prior.p_sample_loop((3, DIM), text_cond=text_cond, cond_scale=1.5)
    out["ddim"] = prior.p_sample_loop((3, DIM), text_cond, cond_scale=2.0, timesteps=6)
    return out

expected = dict(p_sample=STEPS, p_sample_loop=2, forward=1)
""",
    # its own ddpm loop, over the stock p_sample; sampled through the stock p_sample_loop and sample()
    "overrides_the_ddpm_loop": """
from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork
from dalle2_pytorch.dalle2_pytorch import l2norm, tqdm
from dalle2_pytorch.dalle2_pytorch import BaseClipAdapter, EmbeddedText

class ToyClip(BaseClipAdapter):
    def __init__(self):
        super().__init__(torch.nn.Embedding(20, DIM))
    dim_latent = property(lambda self: DIM)
    image_size = property(lambda self: 8)
    image_channels = property(lambda self: 3)
    max_text_len = property(lambda self: TOKENS)
    def embed_text(self, text):
        encodings = self.clip(text).masked_fill((text == 0)[..., None], 0.0)
        return EmbeddedText(l2norm(encodings.sum(1)), encodings)

class Prior(DiffusionPrior):
    @torch.no_grad()
    def p_sample_loop_ddpm(self, shape, text_cond, cond_scale=1.0):
        calls["ddpm"] += 1
        x, x_start = torch.randn(shape, device=self.device), None
        if self.init_image_embed_l2norm:
            x = l2norm(x) * self.image_embed_scale
        for i in tqdm(reversed(range(self.noise_scheduler.num_timesteps)), disable=True):
            t = torch.full((shape[0],), i, device=self.device)
            self_cond = x_start if self.net.self_cond else None
            x, x_start = self.p_sample(x, t, text_cond=text_cond, self_cond=self_cond, cond_scale=cond_scale)
        if self.sampling_final_clamp_l2norm and self.predict_x_start:
            x = self.l2norm_clamp_embed(x)
        return x + 0.25

def build(net_options, options):
    return Prior(network(DiffusionPriorNetwork, **net_options), clip=ToyClip(), timesteps=STEPS, cond_drop_prob=0.1,
                 **options)

def run(prior):
    text = torch.tensor([[3, 4, 0, 0, 0], [5, 6, 7, 8, 9]])
    embed, encodings = prior.clip.embed_text(text)
    text_cond = dict(text_embed=embed, text_encodings=encodings)
    out = dict(loop=prior.p_sample_loop((2, DIM), text_cond=text_cond, cond_scale=1.5))
    out["ddim"] = prior.p_sample_loop((2, DIM), text_cond=text_cond, timesteps=STEPS // 2)
    out["sample"] = prior.sample(text, num_samples_per_batch=3, cond_scale=2.0)
    return out

expected = dict(ddpm=2)
""",
    # a network of its own over token sequences, made of the library's blocks
    "foreign_net": """
from dalle2_pytorch import DiffusionPrior
from dalle2_pytorch.dalle2_pytorch import (
    Attention, FeedForward, LayerNorm, MLP, RelPosBias, RotaryEmbedding, SinusoidalPosEmb, exists, prob_mask_like,
    rearrange, repeat, Rearrange,
)
from torch import nn

class TokenTransformer(nn.Module):
    def __init__(self, dim, depth, dim_head, heads, causal):
        super().__init__()
        self.rel_pos_bias = RelPosBias(heads=heads)
        rotary = RotaryEmbedding(dim=min(32, dim_head))
        self.layers = nn.ModuleList([
            nn.ModuleList([
                Attention(dim=dim, causal=causal, dim_head=dim_head, heads=heads, dropout=0.0, rotary_emb=rotary),
                FeedForward(dim=dim, mult=2, dropout=0.0, post_activation_norm=True),
            ]) for _ in range(depth)
        ])
        self.norm = LayerNorm(dim, stable=True)
        self.project_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        bias = self.rel_pos_bias(x.shape[1], x.shape[1] + 1, device=x.device)
        for attention, feed_forward in self.layers:
            x = attention(x, attn_bias=bias) + x
            x = feed_forward(x) + x
        return self.project_out(self.norm(x))

class TokenNet(nn.Module):
    def __init__(self, dim, tokens, causal, self_cond=False):
        super().__init__()
        self.dim, self.tokens, self.self_cond = dim, tokens, self_cond
        self.to_time = nn.Sequential(SinusoidalPosEmb(dim), MLP(dim, dim * 2), Rearrange("b (n d) -> b n d", n=2))
        self.positions = nn.Parameter(torch.randn(tokens, dim) * dim**-0.5)
        self.transformer = TokenTransformer(dim, 2, 8, 2, causal)
        self.null_text = nn.Parameter(torch.randn(tokens, dim))
        self.null_image = nn.Parameter(torch.randn(tokens, dim))

    def forward_with_cond_scale(self, *args, cond_scale=1.0, **kwargs):
        calls["forward_with_cond_scale"] += 1
        logits = self.forward(*args, **kwargs)
        if cond_scale == 1:
            return logits
        null = self.forward(*args, text_cond_drop_prob=1.0, image_cond_drop_prob=1, **kwargs)
        return null + (logits - null) * cond_scale

    def forward(self, image_embed, diffusion_timesteps, *, self_cond=None, text_embed=None, text_cond_drop_prob=0.0,
                image_cond_drop_prob=0.0):
        batch, device = len(image_embed), image_embed.device
        keep_text = rearrange(prob_mask_like((batch,), 1 - text_cond_drop_prob, device=device), "b -> b 1 1")
        keep_image = rearrange(prob_mask_like((batch,), 1 - image_cond_drop_prob, device=device), "b -> b 1 1")
        text = torch.where(keep_text, text_embed, self.null_text)
        image = torch.where(keep_image, image_embed, self.null_image)
        if self.self_cond and exists(self_cond):
            image = image + self_cond
        time = self.to_time(diffusion_timesteps.type(image_embed.dtype))
        tokens = torch.cat((text, time, image + repeat(self.positions, "n d -> b n d", b=batch)), dim=-2)
        return self.transformer(tokens)[..., -self.tokens:, :]

def build(net_options, options):
    net = TokenNet(DIM, 6, **net_options)
    return DiffusionPrior(net, image_embed_dim=DIM, timesteps=STEPS, cond_drop_prob=0.2,
                          condition_on_text_encodings=False, image_embed_scale=2.0, **options)

def run(prior):
    loss = prior(text_embed=data(3, 6, DIM), image_embed=data(3, 6, DIM))
    loss.backward()
    out = dict(loss=loss)
    for name, parameter in prior.net.named_parameters():
        if parameter.grad is not None:
            out["grad " + name] = parameter.grad
    text_cond = dict(text_embed=data(3, 6, DIM))
    out["ddpm"] = prior.p_sample_loop((3, 6, DIM), text_cond=text_cond, cond_scale=1.0, timesteps=STEPS)
    out["ddim"] = prior.p_sample_loop((3, 6, DIM), text_cond=text_cond, cond_scale=1.5, timesteps=5)
    return out

expected = dict(forward_with_cond_scale=STEPS + 4)
""",
    # asks by TypeError whether the ddim loop takes a generator
    "probes_generator": """
from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork

def build(net_options, options):
    return DiffusionPrior(network(DiffusionPriorNetwork, **net_options), image_embed_dim=DIM, timesteps=STEPS,
                          condition_on_text_encodings=False, **options)

def run(prior):
    text_cond = dict(text_embed=data(2, DIM))
    generator = torch.Generator().manual_seed(1)
    try:
        embeds = prior.p_sample_loop_ddim((2, DIM), text_cond, timesteps=5, generator=generator)
    except TypeError:
        calls["fallback"] += 1
        embeds = prior.p_sample_loop_ddim((2, DIM), text_cond, timesteps=5, eta=0.5)
    return dict(embeds=embeds / prior.image_embed_scale)

expected = dict(fallback=1)
""",
    # p_losses returns the prediction too, which the training step rescales in place before backward
    "divides_pred_in_place": """
import torch.nn.functional as F
from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork
from dalle2_pytorch.optimizer import get_optimizer

class Prior(DiffusionPrior):
    def p_losses(self, image_embed, times, text_cond, noise=None):
        calls["p_losses"] += 1
        noise = torch.randn_like(image_embed) if noise is None else noise
        noisy = self.noise_scheduler.q_sample(x_start=image_embed, t=times, noise=noise)
        self_cond = self.net(noisy, times, **text_cond).detach() if self.net.self_cond else None
        pred = self.net(noisy, times, self_cond=self_cond, text_cond_drop_prob=self.text_cond_drop_prob,
                        image_cond_drop_prob=self.image_cond_drop_prob, **text_cond)
        if self.predict_x_start and self.training_clamp_l2norm:
            pred = self.l2norm_clamp_embed(pred)
        return (pred - image_embed).square().mean(), pred

def build(net_options, options):
    net = network(DiffusionPriorNetwork, **net_options)
    return Prior(net, image_embed_dim=DIM, timesteps=STEPS, cond_drop_prob=0.2, **options)

def run(prior):
    optimizer = get_optimizer(prior.parameters(), lr=1e-3, wd=1e-2, filter_by_requires_grad=True)
    out = {}
    for step in range(3):
        target = data(4, DIM)
        loss, pred = prior(text_embed=data(4, DIM), text_encodings=data(4, 3, DIM), image_embed=target.clone())
        pred /= prior.image_embed_scale
        loss = loss + F.mse_loss(F.normalize(pred, dim=-1), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out[f"loss {step}"], out[f"pred {step}"] = loss, pred
    return out

expected = dict(p_losses=3)
""",
    # the same under autocast, where the loss keeps its own copy of the prediction
    "autocast_in_place": """
from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork

class Prior(DiffusionPrior):
    def p_losses(self, image_embed, times, text_cond, noise=None):
        noise = torch.randn_like(image_embed) if noise is None else noise
        noisy = self.noise_scheduler.q_sample(x_start=image_embed, t=times, noise=noise)
        pred = self.net(noisy, times, **text_cond)
        return self.noise_scheduler.loss_fn(pred, image_embed), pred

def build(net_options, options):
    net = network(DiffusionPriorNetwork, **net_options)
    return Prior(net, image_embed_dim=DIM, timesteps=STEPS, condition_on_text_encodings=False, **options)

def run(prior):
    with torch.autocast("cpu", torch.bfloat16):
        loss, pred = prior(text_embed=data(4, DIM), image_embed=data(4, DIM))
        calls["dtype of pred: " + str(pred.dtype)] += 1
        pred /= prior.image_embed_scale
    loss.backward()
    return {}

expected = {"dtype of pred: torch.bfloat16": 1}
""",
    # overrides the innermost methods: each must be called at each step
    "overrides_p_mean_variance": """
from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork

class Prior(DiffusionPrior):
    def p_mean_variance(self, *args, **kwargs):
        calls["p_mean_variance"] += 1
        mean, variance, log_variance, x_start = super().p_mean_variance(*args, **kwargs)
        return mean * 0.9, variance, log_variance, x_start

def build(net_options, options):
    return Prior(network(DiffusionPriorNetwork, **net_options), image_embed_dim=DIM, timesteps=STEPS,
                 cond_drop_prob=0.1, **options)

def run(prior):
    text_cond = dict(text_embed=data(2, DIM), text_encodings=data(2, 9, DIM))
    return dict(embeds=prior.p_sample_loop((2, DIM), text_cond=text_cond, cond_scale=1.5))

expected = dict(p_mean_variance=STEPS)
""",
    # a network that subclasses the stock one
    "subclasses_the_network": """
from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork

class Net(DiffusionPriorNetwork):
    def forward(self, image_embed, diffusion_timesteps, **kwargs):
        calls["forward"] += 1
        return super().forward(image_embed, diffusion_timesteps, **kwargs) + 0.1 * image_embed

def build(net_options, options):
    return DiffusionPrior(network(Net, **net_options), image_embed_dim=DIM, timesteps=STEPS, cond_drop_prob=0.1,
                          **options)

def run(prior):
    text_cond = dict(text_embed=data(2, DIM), text_encodings=data(2, 3, DIM))
    out = dict(ddpm=prior.p_sample_loop((2, DIM), text_cond=text_cond, cond_scale=1.5))
    out["ddim"] = prior.p_sample_loop((2, DIM), text_cond=text_cond, timesteps=4)
    return out

expected = dict(forward=2 * STEPS + 3)
""",
    # its own schedule
    "subclasses_the_schedule": """
from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork
from dalle2_pytorch.dalle2_pytorch import NoiseScheduler, extract

class Scheduler(NoiseScheduler):
    def q_posterior(self, x_start, x_t, t):
        calls["q_posterior"] += 1
        mean, variance, log_variance = super().q_posterior(x_start=x_start, x_t=x_t, t=t)
        return mean + 0.1 * extract(self.sqrt_alphas_cumprod, t, x_t.shape), variance, log_variance

def build(net_options, options):
    prior = DiffusionPrior(network(DiffusionPriorNetwork, **net_options), image_embed_dim=DIM, timesteps=STEPS,
                           condition_on_text_encodings=False, **options)
    prior.noise_scheduler = Scheduler(beta_schedule="cosine", timesteps=STEPS, loss_type="l2")
    return prior

def run(prior):
    return dict(ddpm=prior.p_sample_loop((2, DIM), text_cond=dict(text_embed=data(2, DIM))))

expected = dict(q_posterior=STEPS)
""",
    # replaces a method of one schedule
    "patches_predict_noise": """
from types import MethodType
from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork

def build(net_options, options):
    prior = DiffusionPrior(network(DiffusionPriorNetwork, **net_options), image_embed_dim=DIM, timesteps=STEPS,
                           condition_on_text_encodings=False, **options)
    stock = prior.noise_scheduler.predict_noise_from_start
    def predict_noise(self, x_t, t, x0):
        calls["predict_noise_from_start"] += 1
        return 0.9 * stock(x_t, t=t, x0=x0)
    prior.noise_scheduler.predict_noise_from_start = MethodType(predict_noise, prior.noise_scheduler)
    return prior

def run(prior):
    return dict(ddim=prior.p_sample_loop((2, DIM), text_cond=dict(text_embed=data(2, DIM)), timesteps=5))

expected = dict(predict_noise_from_start=4)
""",
    # a network with a condition of another name
    "names_its_own_condition": """
from torch import nn
from dalle2_pytorch import DiffusionPrior

class AudioNet(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim, self.self_cond = dim, False
        self.out = nn.Linear(dim * 2 + 1, dim)

    def forward_with_cond_scale(self, *args, cond_scale=1.0, **kwargs):
        calls["forward_with_cond_scale"] += 1
        return self.forward(*args, **kwargs)

    def forward(self, x, times, *, audio_embed, self_cond=None, **kwargs):
        return self.out(torch.cat((x, audio_embed, times[:, None] / STEPS), dim=-1))

def build(net_options, options):
    return DiffusionPrior(AudioNet(DIM), image_embed_dim=DIM, timesteps=STEPS, condition_on_text_encodings=False)

def run(prior):
    text_cond = dict(audio_embed=data(3, DIM))
    out = dict(ddpm=prior.p_sample_loop((3, DIM), text_cond=text_cond))
    out["ddim"] = prior.p_sample_loop((3, DIM), text_cond=text_cond, timesteps=5)
    return out

expected = dict(forward_with_cond_scale=STEPS + 4)
""",
}

STOCK_OPTIONS = {
    "plain": ({}, {}),
    "self_cond": (dict(self_cond=True, normformer=True), {}),
    "v": ({}, dict(predict_v=True, sampling_final_clamp_l2norm=True)),
    "noise": ({}, dict(predict_x_start=False)),
    "clamps": (
        dict(num_time_embeds=2, num_image_embeds=2, num_text_embeds=2, norm_in=True, rotary_emb=False),
        dict(
            sampling_clamp_l2norm=True, sampling_final_clamp_l2norm=True, training_clamp_l2norm=True,
            init_image_embed_l2norm=True,
        ),
    ),
}  # fmt: skip
NET_OPTIONS = {
    "noncausal": (dict(causal=False), {}),
    "causal-self_cond-v": (dict(causal=True, self_cond=True), dict(predict_v=True)),
}
CASES = {
    f"{client}-{name}": (client, *options)
    for client in CLIENTS
    for name, options in (NET_OPTIONS if client == "foreign_net" else STOCK_OPTIONS).items()
    if client in ("overrides_p_sample", "overrides_the_ddpm_loop", "foreign_net", "divides_pred_in_place")
    or name == "plain"
    or (name == "self_cond" and client != "names_its_own_condition")
}


def play(client: str, net_options: dict, options: dict, on_fastprior: bool, state: dict | None = None):
    """Build the client's prior, give it `state` (or make one up), and run it: its namespace, prior, state, results."""
    with dropin.installed() if on_fastprior else nullcontext():
        space = {"__name__": "client"}
        exec(compile(PREAMBLE + CLIENTS[client], f"<{client}>", "exec"), space)
        torch.manual_seed(0)
        prior = space["build"](dict(net_options), dict(options))
        if state is None:
            with torch.no_grad():
                for parameter in prior.parameters():
                    if parameter.requires_grad:  # no gain left at 1; small, since at their first size a run is chaotic
                        parameter.mul_(0.5).add_(0.05 * torch.randn_like(parameter))
            state = {name: value.clone() for name, value in prior.state_dict().items()}
        prior.load_state_dict(state)
        torch.manual_seed(1)
        random.seed(1)
        return space, prior, state, {name: t.detach() for name, t in space["run"](prior).items()}


@pytest.mark.parametrize("case", CASES)
def test_client(peer, case):
    client, net_options, options = CASES[case]
    space, prior, state, wanted = play(client, net_options, options, on_fastprior=False)
    assert not isinstance(prior, fastprior.DiffusionPrior)
    assert space["calls"] == space["expected"]
    space, prior, _, actual = play(client, net_options, options, on_fastprior=True, state=state)
    assert isinstance(prior, fastprior.DiffusionPrior)
    assert space["calls"] == space["expected"]
    assert actual.keys() == wanted.keys()
    for name in wanted:
        tolerance = FORWARD_TOLERANCE if name.startswith("loss") else RUN_TOLERANCE
        if wanted[name].any():
            assert relative_error(actual[name], wanted[name]) < tolerance, name
        else:
            assert not actual[name].any(), name


# what is not fastprior's


class ToyClip(fastprior.BaseClipAdapter):
    dim_latent = property(lambda self: 16)
    image_size = property(lambda self: 8)
    image_channels = property(lambda self: 3)
    max_text_len = property(lambda self: 4)

    def embed_text(self, text):
        from fastprior.clip import EmbedTextReturn

        return EmbedTextReturn(torch.nn.functional.normalize(self.clip(text).sum(1), dim=-1), self.clip(text))


def test_decoder_and_dalle2_are_the_peers(peer):
    names = ("Decoder", "Unet", "DALLE2", "VQGanVAE", "DecoderTrainer")
    sources = [inspect.getsourcefile(getattr(peer, name)) for name in names]
    with dropin.installed():
        import dalle2_pytorch
        from dalle2_pytorch import CLIP, DALLE2, Decoder, DiffusionPrior, DiffusionPriorNetwork, Unet, VQGanVAE
        from dalle2_pytorch.dalle2_pytorch import NullVQGanVAE
        from dalle2_pytorch.vqgan_vae import NullVQGanVAE as SameNullVQGanVAE

        assert dalle2_pytorch.__version__ == dalle2_pytorch.version.__version__ == peer.__version__
        assert dalle2_pytorch.__fastprior_version__ == fastprior.__version__
        assert NullVQGanVAE is SameNullVQGanVAE and CLIP is peer.CLIP
        assert (Decoder, Unet, VQGanVAE) == (fastprior.Decoder, fastprior.Unet, fastprior.VQGanVAE)
        assert [inspect.getsourcefile(getattr(dalle2_pytorch, name)) for name in names] == sources

        torch.manual_seed(0)
        clip = ToyClip(torch.nn.Embedding(9, 16))
        unet = Unet(dim=8, image_embed_dim=16, text_embed_dim=16, cond_dim=8, channels=3, dim_mults=(1, 2),
                    cond_on_text_encodings=True, attn_dim_head=4, attn_heads=2, resnet_groups=4)  # fmt: skip
        decoder = Decoder(unet=unet, clip=clip, image_sizes=(8,), timesteps=2, learned_variance=False)
        net = DiffusionPriorNetwork(dim=16, depth=1, dim_head=8, heads=2, max_text_len=4)
        dalle2 = DALLE2(prior=DiffusionPrior(net, clip=clip, timesteps=3), decoder=decoder)
        images = dalle2(torch.randint(1, 9, (2, 4)))
        assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
    twin = pickle.loads(pickle.dumps(unet))  # by reference to a module that any process with fastprior can import
    assert type(twin) is Unet and all(torch.equal(a, b) for a, b in zip(twin.parameters(), unet.parameters()))


def test_the_peers_trainer_takes_our_prior(peer):
    pytest.importorskip("accelerate")

    def losses(on_fastprior, state=None):
        with dropin.installed() if on_fastprior else nullcontext():
            from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork, DiffusionPriorTrainer

            torch.manual_seed(0)
            net = DiffusionPriorNetwork(dim=16, depth=1, dim_head=8, heads=2, max_text_len=4, num_timesteps=10)
            prior = DiffusionPrior(net, image_embed_dim=16, timesteps=10, condition_on_text_encodings=False)
            state = state or {name: value.clone() for name, value in prior.state_dict().items()}
            prior.load_state_dict(state)
            trainer = DiffusionPriorTrainer(prior, lr=1e-2, device="cpu", ema_beta=0.9, accelerator_cpu=True)
            torch.manual_seed(1)
            found = []
            for _ in range(3):
                found.append(trainer(text_embed=torch.randn(4, 16), image_embed=torch.randn(4, 16)))
                trainer.update()
            return found, state

    wanted, state = losses(on_fastprior=False)
    assert losses(on_fastprior=True, state=state)[0] == pytest.approx(wanted, rel=RUN_TOLERANCE)


def test_install_and_uninstall(peer):
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "dalle2_pytorch"}
    with pytest.warns(UserWarning, match="imported before"):
        dropin.install()
    try:
        dropin.install()  # once is enough, and says nothing more
        with dropin.installed():
            import dalle2_pytorch
        import dalle2_pytorch.train_configs as configs
        from dalle2_pytorch import tokenizer
        from dalle2_pytorch.optimizer import get_optimizer as optimizer
        from dalle2_pytorch.tokenizer import YttmTokenizer, tokenize

        assert dropin.is_installed() and dalle2_pytorch.DiffusionPrior is fastprior.DiffusionPrior
        assert configs.TrainDiffusionPriorConfig is train_configs.TrainDiffusionPriorConfig
        assert configs.TrainDecoderConfig.__name__ == "TrainDecoderConfig"  # the peer's
        assert optimizer is get_optimizer and tokenizer.tokenize is tokenize
        assert YttmTokenizer.__module__ == "fastprior.dropin.peer.tokenizer"
        space = {}
        exec("from dalle2_pytorch import *\nfrom dalle2_pytorch.dalle2_pytorch import *", space)
        assert space["DiffusionPrior"] is fastprior.DiffusionPrior and space["ResnetBlock"] and space["rearrange"]
        with pytest.raises(ModuleNotFoundError, match=r"dalle2_pytorch\.nothing"):
            import dalle2_pytorch.nothing
        for module in ("dalle2_pytorch", "dalle2_pytorch.dalle2_pytorch", "dalle2_pytorch.vqgan_vae"):
            with pytest.raises(ImportError, match="nothing"):
                exec(f"from {module} import nothing")
    finally:
        dropin.uninstall()
    dropin.uninstall()
    after = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "dalle2_pytorch"}
    assert after == before and sys.modules["dalle2_pytorch"] is peer
    assert peer.dalle2_pytorch.DiffusionPrior is peer.DiffusionPrior is not fastprior.DiffusionPrior


def run_python(*args, cwd=None) -> str:
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ("open_clip", "torchvision", "embedding_reader", "accelerate", "diffusers", "pydantic", "pandas", "kornia")


def test_runs_a_script_without_the_peer(tmp_path):
    (tmp_path / "beside.py").write_text("from dalle2_pytorch.dalle2_pytorch import l2norm\n")
    (tmp_path / "client.py").write_text(
        textwrap.dedent(f"""
        import sys

        class Hidden:
            def find_spec(self, fullname, path=None, target=None):
                if fullname.split(".")[0] in ("dalle2_pytorch", "x_clip"):
                    raise ModuleNotFoundError(f"No module named {{fullname!r}}", name=fullname)

        sys.meta_path.insert(0, Hidden())

        import torch
        from typing import Optional
        import dalle2_pytorch
        from beside import l2norm
        from dalle2_pytorch import (
            CLIP, DALLE2, Decoder, DecoderTrainer, DiffusionPrior, DiffusionPriorNetwork, Unet,
        )
        from dalle2_pytorch.dalle2_pytorch import ResnetBlock
        from dalle2_pytorch.vqgan_vae import VQGanVAE
        from dalle2_pytorch.utils import Timer, print_ribbon

        def decode(decoder: Optional[Decoder] = None) -> Unet: ...

        def refuses(use):
            try:
                use()
            except ImportError as error:
                return "dalle2-pytorch" in str(error) and "pip install" in str(error)

        for missing in (CLIP, DALLE2, Decoder, DecoderTrainer, ResnetBlock, VQGanVAE):
            assert refuses(missing) and refuses(lambda: missing.sample) and not isinstance(1, missing)
            assert refuses(lambda: type("Mine", (missing,), {{}})), missing
            source = "class Mine(missing, torch.nn.Module): pass"
            assert refuses(lambda: exec(source, dict(missing=missing, torch=torch)))
        try:
            from dalle2_pytorch.dalle2_pytorch import NeverThere
        except ImportError:
            pass
        else:
            raise AssertionError
        heavy = set({HEAVY!r}) - {{"accelerate"}}  # which the module of the trainers needs
        assert not heavy & sys.modules.keys()
        if __name__ == "__main__":
            net = DiffusionPriorNetwork(dim=16, depth=1, dim_head=8, heads=2, max_text_len=4)
            prior = DiffusionPrior(net, image_embed_dim=16, timesteps=5, condition_on_text_encodings=False)
            embeds = prior.p_sample_loop((2, 16), text_cond=dict(text_embed=l2norm(torch.randn(2, 16))))
            print(sys.argv[1:], type(prior).__module__, tuple(embeds.shape), dalle2_pytorch.__version__)
    """)
    )
    wanted = "['--name', 'x'] fastprior.prior (2, 16) 1.15.6\n"
    assert run_python("-m", "fastprior.dropin", tmp_path / "client.py", "--name", "x") == wanted
    assert run_python("-m", "fastprior.dropin", "-m", "client", "--name", "x", cwd=tmp_path) == wanted


def test_the_training_modules_are_ours():
    script = """
    from fastprior import dropin
    dropin.install()
    from dalle2_pytorch import DiffusionPriorTrainer
    from dalle2_pytorch.trainer import DiffusionPriorTrainer as same
    from dalle2_pytorch.trackers import Tracker
    from dalle2_pytorch.dataloaders import get_reader, make_splits
    assert same is DiffusionPriorTrainer
    print(*(part.__module__ for part in (DiffusionPriorTrainer, Tracker, get_reader, make_splits)))
    """
    wanted = "fastprior.trainer fastprior.trackers fastprior.dataloaders fastprior.dataloaders\n"
    assert run_python("-c", textwrap.dedent(script)) == wanted


def test_a_trainer_without_its_extra_says_so_on_use():
    script = """
    import sys
    sys.modules["accelerate"] = None
    from fastprior import dropin
    dropin.install()
    from dalle2_pytorch.trainer import DecoderTrainer, DiffusionPriorTrainer
    from fastprior import DiffusionPriorTrainer as same
    for trainer in (DiffusionPriorTrainer, same, DecoderTrainer):
        try:
            trainer()
        except ImportError as error:
            print("fastprior[train]" in str(error))
    """
    assert run_python("-c", textwrap.dedent(script)) == "True\nTrue\nTrue\n"


def test_import_is_light():
    others = "torch._dynamo", "dalle2_pytorch", "fastprior.dropin.peer"
    run_python(
        "-c",
        textwrap.dedent(f"""
        import sys, time
        import torch
        start = time.perf_counter()
        import fastprior
        from fastprior import *
        assert time.perf_counter() - start < 2
        import fastprior.dalle2_pytorch, fastprior.dropin
        heavy = [name for name in {(*HEAVY, *others)!r} if name in sys.modules]
        assert not heavy, heavy
        trainer = fastprior.DiffusionPriorTrainer
        try:
            getattr(fastprior, "Nothing")
        except AttributeError:
            print("fine")
    """),
    )


# optimizer, utils


@pytest.mark.parametrize("group", [True, False], ids=["grouped", "ungrouped"])
@pytest.mark.parametrize("frozen", [True, False], ids=["filtered", "all"])
@pytest.mark.parametrize("wd", [0.0, 0.1], ids=["adam", "adamw"])
def test_get_optimizer(peer, wd, frozen, group):
    from dalle2_pytorch.optimizer import get_optimizer as peers

    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    module[0].requires_grad_(False)
    kwargs = dict(lr=2e-4, wd=wd, eps=1e-6, filter_by_requires_grad=frozen, group_wd_params=group)
    ours, theirs = get_optimizer(module.parameters(), **kwargs), peers(module.parameters(), **kwargs)
    assert type(ours) is type(theirs) and ours.defaults == theirs.defaults
    assert len(ours.param_groups) == len(theirs.param_groups)
    for our, their in zip(ours.param_groups, theirs.param_groups):
        assert [id(p) for p in our.pop("params")] == [id(p) for p in their.pop("params")]
        assert our == their


def test_get_optimizer_refuses_unknown_arguments():
    with pytest.raises(TypeError, match="amsgrad"):
        get_optimizer([torch.nn.Parameter(torch.ones(2))], amsgrad=True)


def test_utils():
    timer = Timer()
    assert 0 <= timer.elapsed() < 60
    assert print_ribbon("x", "-", 2) == "-- x --"
    assert import_or_print_error("json") is json
    with pytest.raises(ImportError, match="install the package nothing"):
        import_or_print_error("no_such_package", "install the package nothing")


# configurations

CONFIG = {
    "prior": {
        "net": {
            "dim": 16, "depth": 2, "max_text_len": 5, "num_timesteps": 9, "num_time_embeds": 1, "num_image_embeds": 2,
            "num_text_embeds": 1, "dim_head": 8, "heads": 2, "ff_mult": 2, "norm_out": True, "attn_dropout": 0.05,
            "ff_dropout": 0.05, "final_proj": True, "normformer": True, "rotary_emb": True,
        },
        "image_embed_dim": 16, "image_size": 32, "image_channels": 3, "timesteps": 9, "sample_timesteps": 4,
        "cond_drop_prob": 0.1, "loss_type": "l2", "predict_x_start": True, "beta_schedule": "cosine",
        "condition_on_text_encodings": True,
    },
    "data": {
        "batch_size": 8, "num_data_points": 100, "eval_every_seconds": 1600, "image_url": "images", "meta_url": "meta",
        "splits": {"train": 0.8, "val": 0.1, "test": 0.1},
    },
    "train": {
        "epochs": 5, "lr": 1.1e-4, "wd": 6.02e-2, "max_grad_norm": 0.5, "use_ema": True, "ema_beta": 0.9999,
        "ema_update_after_step": 50, "warmup_steps": 50, "amp": False, "save_every_seconds": 3600,
        "eval_timesteps": [4, 9], "random_seed": 84513,
    },
    "tracker": {
        "data_path": ".prior", "overwrite_data_path": True,
        "log": {"log_type": "wandb", "wandb_entity": "me", "wandb_project": "p", "wandb_resume": False},
        "load": {"load_from": None},
        "save": [{"save_to": "local", "save_type": "checkpoint", "save_latest_to": "latest.pth"}],
    },
}  # fmt: skip
X_CLIP = {
    "make": "x-clip", "model": "ViT-L/14",
    "base_model_kwargs": {
        "dim_text": 16, "dim_image": 16, "dim_latent": 16, "num_text_tokens": 20, "text_enc_depth": 1,
        "text_seq_len": 5, "text_heads": 2, "visual_enc_depth": 1, "visual_heads": 2, "visual_image_size": 32,
        "visual_patch_size": 16,
    },
}  # fmt: skip


def write(tmp_path, changes: dict):
    """CONFIG as a file, with dotted keys set to new values, or left out where the value is `...`."""
    config = json.loads(json.dumps(CONFIG))
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        section = config
        for name in sections:
            section = section[name]
        if value is ...:
            del section[key]
        else:
            section[key] = value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


EXTRAS = {"prior.net.self_cond": True, "prior.sampling_final_clamp_l2norm": True, "prior.image_embed_scale": 2.0,
          "prior.net.rotary_emb": False}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, EXTRAS, {"prior.clip": X_CLIP}], ids=["example", "extras", "x-clip"])
def test_config_creates_what_the_peers_does(peer, tmp_path, changes):
    from dalle2_pytorch.train_configs import TrainDiffusionPriorConfig as Peers

    path = write(tmp_path, changes)
    theirs, config = Peers.from_json_path(path), train_configs.TrainDiffusionPriorConfig.from_json_path(path)
    prior, wanted = config.prior.create(), theirs.prior.create()
    shapes = {name: t.shape for name, t in prior.state_dict().items()}
    assert shapes == {name: t.shape for name, t in wanted.state_dict().items()}
    for name in ("sample_timesteps", "image_embed_scale", "sampling_final_clamp_l2norm", "can_classifier_guidance"):
        assert getattr(prior, name) == getattr(wanted, name)
    assert prior.net.self_cond == wanted.net.self_cond
    for section in ("data", "train", "tracker"):  # with what the peer drops besides
        ours, other = (getattr(c, section).model_dump() for c in (config, theirs))
        assert {key: ours[key] for key in other} == other


@pytest.mark.parametrize("changes", [{"prior.net.max_text_len": ...}, {"prior.net.max_text_len": None}])
def test_config_without_max_text_len(tmp_path, changes):
    path = write(tmp_path, {**changes, "prior.image_size": ...})
    assert train_configs.TrainDiffusionPriorConfig.from_json_path(path).prior.create().net.max_text_len == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior.net.num_timestep": 9}, r"prior\.net: unknown key 'num_timestep', the nearest is 'num_timesteps'"),
        ({"prior.cond_drop_probs": 0.1}, r"prior: unknown key 'cond_drop_probs', the nearest is 'cond_drop_prob'"),
        ({"train.zzz": 1}, r"train: unknown key 'zzz', it must be one of 'epochs', "),
        ({"prior.net.depth": ...}, r"prior\.net\.depth: Field required"),
        ({"prior.net.depth": "deep"}, r"prior\.net\.depth: .*integer.*'deep'"),
        ({"data.splits.test": 0.2}, r"data\.splits: train, val and test sum to 1\.1"),
        ({"prior.clip": {"make": "clap"}}, r"prior\.clip\.make: .*'x-clip'.*'clap'"),
    ],
    ids=["net", "prior", "train", "missing", "type", "splits", "make"],
)  # fmt: skip
def test_config_errors_name_file_and_key(tmp_path, changes, message):
    path = write(tmp_path, changes)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        train_configs.TrainDiffusionPriorConfig.from_json_path(path)


def test_config_that_is_not_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{'prior': 1}")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        train_configs.TrainDiffusionPriorConfig.from_json_path(path)


@pytest.mark.parametrize("splits", [(0.7, 0.2, 0.1), (0.9, 0.1, 0.0), (0.9, 1e-7, 0.0999999), (1.0, 0.0, 0.0)], ids=str)
def test_splits(splits):
    config = train_configs.TrainSplitConfig(**dict(zip(("train", "val", "test"), splits)))
    assert (config.train, config.val, config.test) == splits


@pytest.mark.parametrize("config", ["DiffusionPriorConfig", "DiffusionPriorNetworkConfig"])
def test_config_knows_every_constructor_argument(config):
    fields = set(getattr(train_configs, config).model_fields)
    wanted = set(inspect.signature(getattr(fastprior, config.removesuffix("Config"))).parameters)
    if "kwargs" in wanted:
        wanted |= set(inspect.signature(fastprior.layers.CausalTransformer).parameters)
    assert fields == wanted - {"kwargs"}


def test_config_without_pydantic():
    program = (
        "import sys; sys.modules['pydantic'] = None\ntry: import fastprior.train_configs\n"
        "except ImportError as error: print(error)"
    )
    assert 'pip install "fastprior[train]"' in run_python("-c", program)
