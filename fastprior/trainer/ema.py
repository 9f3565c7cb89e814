"""Exponential moving average of a prior's weights, exchangeable with ema-pytorch's."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastprior.trainer.fsdp import local, shard_like


class EMA(nn.Module):
    """A second copy of a prior, `ema_model`, whose weights follow the online one's.

    Every `update_every` updates: `ema += (1 - decay) * (online - ema)`, with `decay = min(beta, 1 - (1 + n / inv_gamma)
    ** -power)` at least `min_value`, where n counts updates from `update_after_step`; until then `ema = online`.
    Buffers are copied, and the CLIP is shared. The copy stays in eval mode. The schedule and the state dict's keys are
    ema-pytorch's, but for the online model, which is not part of it.

    Args:
        model: the online prior.
        beta: largest decay, at least 0 and below 1.
        update_after_step, update_every: in updates.
        inv_gamma, power, min_value: how fast the decay grows.
    """

    def __init__(
        self,
        model: nn.Module,
        beta: float = 0.9999,
        update_after_step: int = 100,
        update_every: int = 10,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_value: float = 0.0,
    ):
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"ema_beta={beta}; it must be at least 0 and below 1")
        if update_after_step < 0:
            raise ValueError(f"ema_update_after_step={update_after_step}; it must not be negative")
        if update_every < 1:
            raise ValueError(f"ema_update_every={update_every}; it must be at least 1")
        self.beta, self.update_after_step, self.update_every = beta, update_after_step, update_every
        self.inv_gamma, self.power, self.min_value = inv_gamma, power, min_value
        self._online = (model,)  # in a tuple, so that it is no submodule
        clip = getattr(model, "clip", None)
        self.ema_model = copy.deepcopy(model, {id(clip): clip}).eval()
        for _, average in self._pairs("parameters"):
            average.requires_grad_(False)
            average.grad = None
        # counted on the CPU, where reading them does not wait for a GPU
        self.register_buffer("initted", torch.tensor(False, device="cpu"))
        self.register_buffer("step", torch.tensor(0, device="cpu"))

    @property
    def model(self) -> nn.Module:
        """The online prior."""
        return self._online[0]

    def _pairs(self, what: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Online and averaged "parameters" or "buffers", without those that are shared."""
        pairs = zip(getattr(self.model, what)(), getattr(self.ema_model, what)())
        return [(online, average) for online, average in pairs if online is not average]

    def train(self, mode: bool = True):
        return super().train(False)

    def forward(self, *args, **kwargs):
        return self.ema_model(*args, **kwargs)

    @property
    def decay(self) -> float:
        """What the next average keeps of the old one."""
        n = int(self.step) - self.update_after_step
        if n <= 0:
            return 0.0
        return min(max(1 - (1 + n / self.inv_gamma) ** -self.power, self.min_value), self.beta)

    @torch.no_grad()
    def copy_params_from_model_to_ema(self) -> None:
        for what in ("parameters", "buffers"):
            for online, average in self._pairs(what):
                average.copy_(online)

    def shard(self) -> None:
        """Keep the part of each average that this process has of the online parameter."""
        shard_like(self.ema_model, self.model)

    @torch.no_grad()
    def update(self) -> None:
        """Count one step of the optimizer, and average when it is time."""
        step = int(self.step)
        due = step % self.update_every == 0
        if not self.initted or (due and step <= self.update_after_step):
            self.copy_params_from_model_to_ema()
            self.initted.fill_(True)
        elif due:
            online, average = map(list, zip(*self._pairs("parameters")))
            torch._foreach_lerp_([*map(local, average)], [*map(local, online)], 1 - self.decay)
            for online, average in self._pairs("buffers"):
                average.copy_(online)
        self.step += 1
