"""Backward passes and steps of an optimizer, and its moments by the names of their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Adam, Optimizer

from fastprior.trainer.fsdp import part_like, wants_shards, whole

MOMENTS = "exp_avg", "exp_avg_sq"  # of Adam


class Stepper:
    """Trains a prior on one process, under DDP, or in FSDP's shards; `Zero` does so under DeepSpeed.

    `model` is the prior in its wrappers, `optimizer` the one given in accelerate's.
    """

    def __init__(self, accelerator: Accelerator, prior: nn.Module, optimizer: Optimizer):
        self.accelerator = accelerator
        if wants_shards(accelerator):  # which `shard` has made
            self.model, self.optimizer = prior, accelerator.prepare_optimizer(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(prior, optimizer)

    @property
    def needed(self) -> tuple[str, ...]:
        """What the optimizer reads of each parameter's moments, where that is known."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # behind accelerate's wrapper
        return ("step", *MOMENTS) if isinstance(optimizer, Adam) else ()

    def syncing(self, is_last: bool) -> AbstractContextManager:
        """The context of a chunk's forward and backward: gradients are added up over the processes in the last."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def autocast(self) -> AbstractContextManager:
        """The context of a forward; accelerate's wrapper casts by itself."""
        return nullcontext()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add to the gradient."""
        self.accelerator.backward(loss)

    def step(self, max_grad_norm: float | None) -> bool:
        """Whether a step was taken, and not skipped as the gradient is not finite; it is cleared in any case."""
        self.accelerator.unscale_gradients(self.optimizer)
        trained = [p for p in self.model.parameters() if p.grad is not None]
        norm = whole(get_total_norm([p.grad for p in trained]))  # the same on all ranks
        finite = bool(norm.isfinite())  # the host waits for the backward here
        if finite:
            if max_grad_norm is not None:
                clip_grads_with_norm_(trained, max_grad_norm, norm)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return finite

    def named_state(self, names: Mapping[Parameter, str]) -> dict:
        """The optimizer's state dict with names in place of numbers, not copied; every process must call."""
        groups = [{**group, "params": [names[p] for p in group["params"]]} for group in self.optimizer.param_groups]
        return {"state": {names[p]: dict(state) for p, state in self.optimizer.state.items()}, "param_groups": groups}

    def load_moments(self, moments: Mapping[str, Mapping], names: Mapping[Parameter, str]) -> None:
        """Take over copies of moments that fit, or of those that there are; the hyperparameters stay as they are."""
        trained = (p for group in self.optimizer.param_groups for p in group["params"])
        state = {
            index: {key: _copied(value, parameter) for key, value in moments[names[parameter]].items()}
            for index, parameter in enumerate(trained)
            if moments.get(names[parameter])
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def weights_changed(self) -> None:
        """Take note of weights that were loaded into the prior."""


def _copied(value: Any, like: Parameter) -> Any:
    """A copy of a moment of a parameter, divided as that is; of a count or another value, the whole."""
    if not torch.is_tensor(value):
        return value
    return (part_like(value, like) if value.ndim else value).clone()
