"""Clients of dalle2-pytorch as they are written: programs that `dropin/test_dropin.py` runs on it and on fastprior."""

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
