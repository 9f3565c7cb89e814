"""Small priors and trainers on the CPU, their data, and all that a step may change."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from fastprior.clip import BaseClipAdapter, EmbeddedText
from fastprior.models.dalle2.layers import l2norm
from fastprior.trainer import DiffusionPriorTrainer
from helpers.priors import make_prior

NET = dict(dim=16, depth=2, dim_head=8, heads=2, num_timesteps=10, max_text_len=4)
BATCH = 8
SCHEDULES = {
    "plain": {},
    "warm-up": dict(warmup_steps=10),
    "both": dict(warmup_steps=10, cosine_decay_max_steps=40, max_grad_norm=0.05, wd=0.1),
    "adam": dict(wd=0, group_wd_params=False),
}


class ToyClip(BaseClipAdapter):
    dim_latent = property(lambda self: 16)
    image_size = property(lambda self: 8)
    image_channels = property(lambda self: 3)
    max_text_len = property(lambda self: 4)

    def __init__(self):
        super().__init__(torch.nn.Embedding(4000, 16))

    def embed_text(self, text):
        return EmbeddedText(l2norm(self.clip(text).sum(1)), self.clip(text))


def small_prior(net=None, **kwargs):
    kwargs = dict(timesteps=10, condition_on_text_encodings=False) | kwargs
    return make_prior(NET | (net or {}), **kwargs).train()


def make_trainer(prior=None, cls=DiffusionPriorTrainer, **kwargs):
    """On the CPU, with an average that moves at once."""
    if "accelerator" not in kwargs:
        kwargs["accelerator_cpu"] = True
    kwargs = dict(lr=1e-2, ema_beta=0.9, ema_update_after_step=0, ema_update_every=1) | kwargs
    return cls(small_prior() if prior is None else prior, **kwargs)


def batch(seed=0, rows=BATCH):
    draw = torch.Generator().manual_seed(seed)
    return {name: l2norm(torch.randn(rows, 16, generator=draw)) for name in ("text_embed", "image_embed")}


def run(trainer, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        losses.append(trainer(**batch(step)))
        trainer.update()
    return losses


def tensors(trainer):
    """Copies of all that a step may change."""
    state = trainer.training_state()
    moments = {f"{n}.{k}": v for n, kept in state["optimizer"]["state"].items() for k, v in kept.items()}
    named = {"model": state["model"], "ema": state.get("ema_model", {}), "moments": moments}
    return {f"{kind}.{key}": value.clone() for kind, own in named.items() for key, value in own.items()}


def differing(one, other):
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


def lr_of(trainer):
    (lr,) = {group["lr"] for group in trainer.optimizer.param_groups}
    return lr


def fixed_times(prior):
    prior.noise_scheduler.sample_random_times = lambda rows: torch.full((rows,), 4)
    return prior


def fp16_accelerator():
    """accelerate refuses fp16 on a CPU, though torch's GradScaler runs there."""
    if torch.cuda.is_available():
        return Accelerator(mixed_precision="fp16")
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator


def distributed_accelerator(**options):
    """On the CPU; accelerate must be told how DeepSpeed's processes talk there."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")], **options)
    return Accelerator(cpu=True, **options)
