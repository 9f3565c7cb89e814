"""Exponential moving average of a prior's weights, exchangeable with ema-pytorch's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fastprior.checks import check_count, check_number, check_share
from fastprior.trainer.checks import as_count, check_tensor
from fastprior.trainer.fsdp import local, shard_like
from fastprior.utils import first_few


def _averages(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


class EMA(nn.Module):
    """A second copy of a prior, `ema_model`, whose weights follow the online one's.

    Every `update_every` updates: `ema += (1 - decay) * (online - ema)`, with `decay = min(beta, 1 - (1 + n / inv_gamma)
    ** -power)` at least `min_value`, where n counts updates from `update_after_step`; until then `ema = online`. That
    holds for buffers of floats too; others are copied. The CLIP is shared, and the copy stays in eval mode. Methods,
    arguments and the state dict's keys are ema-pytorch's, but for the online model, which is no submodule.

    Args:
        model: the online prior.
        beta: largest decay, at least 0 and below 1.
        update_after_step, update_every: in updates.
        inv_gamma, power, min_value: how fast the decay grows.
        ema_model: the second copy, or a function that makes it, in place of a deep copy.
        param_or_buffer_names_no_ema: names of what is copied from the online prior instead of averaged.
        ignore_names, ignore_startswith_names: names, or their beginnings, of what an average leaves as it is.
        include_online_model: whether the state dict holds the online prior, too; loading one takes it where it is.
        update_model_with_ema_every: move the online prior to the average every so many updates, and keep
            `update_model_with_ema_beta` of it.
        forward_method_names: methods of `ema_model` that this object gets as well.
        move_ema_to_online_device: let the average follow the online prior to its device.
        lazy_init_ema: make the copy at the first update, or in `init_ema`.
        allow_different_devices, coerce_dtype, use_foreach: taken from ema-pytorch's callers; this is always so.
    """

    is_frozen = False  # of a client that wants no averages for a while

    def __init__(
        self,
        model: nn.Module,
        beta: float = 0.9999,
        update_after_step: int = 100,
        update_every: int = 10,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_value: float = 0.0,
        *,
        ema_model: nn.Module | Callable[[], nn.Module] | None = None,
        param_or_buffer_names_no_ema: Collection[str] = (),
        ignore_names: Collection[str] = (),
        ignore_startswith_names: Collection[str] = (),
        include_online_model: bool = False,
        update_model_with_ema_every: int | None = None,
        update_model_with_ema_beta: float = 0.0,
        forward_method_names: Collection[str] = (),
        move_ema_to_online_device: bool = False,
        lazy_init_ema: bool = False,
        allow_different_devices: bool = True,
        coerce_dtype: bool = True,
        use_foreach: bool = True,
    ):
        super().__init__()
        check_number("ema_beta", beta, 0, below=1)
        check_count("ema_update_after_step", update_after_step, 0, None)
        check_count("ema_update_every", update_every, most=None)
        if update_model_with_ema_every is not None:
            check_count("ema_update_model_with_ema_every", update_model_with_ema_every, most=None)
        check_number("ema_inv_gamma", inv_gamma, above=0)
        check_number("ema_power", power)
        check_share("ema_min_value", min_value)
        check_share("ema_update_model_with_ema_beta", update_model_with_ema_beta)
        self.beta, self.update_after_step, self.update_every = beta, update_after_step, update_every
        self.inv_gamma, self.power, self.min_value = inv_gamma, power, min_value
        self.param_or_buffer_names_no_ema = param_or_buffer_names_no_ema
        self.ignore_names, self.ignore_startswith_names = ignore_names, ignore_startswith_names
        self.include_online_model, self.forward_method_names = include_online_model, forward_method_names
        self.update_model_with_ema_every = update_model_with_ema_every
        self.update_model_with_ema_beta = update_model_with_ema_beta
        self.move_ema_to_online_device = move_ema_to_online_device
        self.allow_different_devices, self.coerce_dtype = allow_different_devices, coerce_dtype
        self.use_foreach = use_foreach
        self._online = (model,)  # in a tuple, so that it is no submodule
        self.ema_model = None
        if not lazy_init_ema:
            self.init_ema(ema_model)
        # counted on the CPU, where reading them does not wait for a GPU
        self.register_buffer("initted", torch.tensor(False, device="cpu"))
        self.register_buffer("step", torch.tensor(0, device="cpu"))

    def init_ema(self, ema_model: nn.Module | Callable[[], nn.Module] | None = None) -> None:
        """Make the average: of a module, or of what a function returns, or of a copy of the online prior."""
        if ema_model is None:
            clip = getattr(self.model, "clip", None)
            ema_model = copy.deepcopy(self.model, {id(clip): clip})
        self.ema_model = (ema_model if isinstance(ema_model, nn.Module) else ema_model()).eval()
        for _, average, _ in self._pairs("parameters", self.ema_model, self.model):
            average.requires_grad_(False)
            average.grad = None
        self.parameter_names = {name for name, value in self.ema_model.named_parameters() if _averages(value)}
        self.buffer_names = {name for name, value in self.ema_model.named_buffers() if _averages(value)}
        for name in self.forward_method_names:
            setattr(self, name, getattr(self.ema_model, name))

    @property
    def model(self) -> nn.Module:
        """The online prior."""
        return self._online[0]

    online_model = model

    def get_params_iter(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of floats of a model like `ema_model`, with their names."""
        return ((name, value) for name, value in model.named_parameters() if name in self.parameter_names)

    def get_buffers_iter(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The buffers of floats of a model like `ema_model`, with their names."""
        return ((name, value) for name, value in model.named_buffers() if name in self.buffer_names)

    def _pairs(self, what: str, to: nn.Module, source: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
        """Name and values of the "parameters" or "buffers" of two models, without those that they share."""
        there = dict(getattr(source, f"named_{what}")())
        own = getattr(to, f"named_{what}")()
        return [(name, value, there[name]) for name, value in own if value is not there[name]]

    def train(self, mode: bool = True):
        return super().train(False)

    def eval(self) -> nn.Module:
        """The average, which is in eval mode anyway."""
        return self.ema_model.eval()

    def forward(self, *args, **kwargs):
        return self.ema_model(*args, **kwargs)

    @torch.no_grad()
    def forward_eval(self, *args, **kwargs):
        """What the average makes of its arguments, without gradients."""
        return self.ema_model(*args, **kwargs)

    def restore_ema_model_device(self) -> None:
        """Move the average to where the online prior is."""
        self.ema_model.to(next(self.model.parameters()).device)

    def add_to_optimizer_post_step_hook(self, optimizer: Optimizer) -> RemovableHandle:
        """Update after each step of an optimizer, until the handle is removed."""
        return optimizer.register_step_post_hook(lambda *_: self.update())

    # how much stays

    def _decay_at(self, n: int) -> float:
        if n <= 0:
            return 0.0
        return min(max(1 - (1 + n / self.inv_gamma) ** -self.power, self.min_value), self.beta)

    @property
    def decay(self) -> float:
        """What the next average keeps of the old one."""
        return self._decay_at(int(self.step) - self.update_after_step)

    def get_current_decay(self) -> float:
        """What an average at the last update keeps of the old one."""
        return self._decay_at(int(self.step) - self.update_after_step - 1)

    # values, either way

    @torch.no_grad()
    def _copy(self, to: nn.Module, source: nn.Module) -> None:
        for what in ("parameters", "buffers"):
            for _, value, new in self._pairs(what, to, source):
                value.copy_(new)

    def copy_params_from_model_to_ema(self) -> None:
        """Give the average the online prior's parameters and buffers."""
        if self.ema_model is None:
            self.init_ema()
        self._copy(self.ema_model, self.model)

    def copy_params_from_ema_to_model(self) -> None:
        """Give the online prior those of the average."""
        self._copy(self.model, self.ema_model)

    def update_model_with_ema(self, decay: float | None = None) -> None:
        """Move the online prior to the average; `decay` is what it keeps, by default `update_model_with_ema_beta`."""
        decay = self.update_model_with_ema_beta if decay is None else decay
        if decay:
            self.update_moving_average(self.model, self.ema_model, decay)
        else:
            self.copy_params_from_ema_to_model()

    def shard(self) -> None:
        """Keep the part of each average that this process has of the online parameter."""
        shard_like(self.ema_model, self.model)

    @torch.no_grad()
    def update(self) -> None:
        """Count one step of the optimizer, and average when it is time."""
        step = int(self.step)
        self.step += 1
        due = step % self.update_every == 0
        if not self.initted or (due and step <= self.update_after_step):
            self.copy_params_from_model_to_ema()
            self.initted.fill_(True)
            return
        if due:
            self.update_moving_average(self.ema_model, self.model)
        if self.update_model_with_ema_every and step % self.update_model_with_ema_every == 0:
            self.update_model_with_ema()

    @torch.no_grad()
    def update_moving_average(
        self, ma_model: nn.Module, current_model: nn.Module, current_decay: float | None = None
    ) -> None:
        """Move `ma_model` to `current_model`, a model like it; it keeps `current_decay`, by default the schedule's."""
        if self.is_frozen:
            return
        if self.move_ema_to_online_device:
            ma_model.to(next(current_model.parameters()).device)
        share = 1 - (self.get_current_decay() if current_decay is None else current_decay)
        averages: list[Tensor] = []
        currents: list[Tensor] = []
        for what in ("parameters", "buffers"):
            for name, average, current in self._pairs(what, ma_model, current_model):
                if name in self.ignore_names or name.startswith(tuple(self.ignore_startswith_names)):
                    continue
                if name in self.param_or_buffer_names_no_ema or not _averages(average):
                    average.copy_(current)
                    continue
                average, current = local(average), local(current).to(local(average))
                if what == "buffers":  # inf - inf is no number: what is equal stays
                    average.copy_(torch.where(average == current, average, average.lerp(current, share)))
                else:
                    averages.append(average)
                    currents.append(current)
        if averages:
            torch._foreach_lerp_(averages, currents, share)

    # state dicts of ema-pytorch's, which hold the online prior too

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.include_online_model:
            self.model.state_dict(destination=destination, prefix=f"{prefix}online_model.", keep_vars=keep_vars)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """Load as torch does, but all or nothing.

        Raises RuntimeError for names that do not fit, and ValueError for values.
        """
        root, wanted = "online_model.", self.state_dict(keep_vars=True)
        wanted = {key: value for key, value in wanted.items() if not key.startswith(root)}
        if any(key.startswith(root) for key in state_dict):
            wanted |= self.model.state_dict(prefix=root, keep_vars=True)
        if strict and state_dict.keys() != wanted.keys():
            missing, unexpected = wanted.keys() - state_dict.keys(), state_dict.keys() - wanted.keys()
            names = f"missing keys: {first_few(sorted(missing)) or 'none'}"
            names += f"; unexpected keys: {first_few(sorted(unexpected)) or 'none'}"
            raise RuntimeError(f"the state does not fit this EMA; strict=False loads what fits; {names}")
        for key in state_dict.keys() & wanted.keys():
            if key in ("initted", "step"):
                as_count(state_dict[key], f"the state's {key}")
            elif isinstance(wanted[key], Tensor):  # a module's extra state may be anything
                check_tensor(state_dict[key], wanted[key], f"the state's {key}")
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        root = f"{prefix}online_model."
        online = {key.removeprefix(root): state_dict.pop(key) for key in [*state_dict] if key.startswith(root)}
        if online:
            result = self.model.load_state_dict(online, strict=False)
            missing += [root + key for key in result.missing_keys]
            unexpected += [root + key for key in result.unexpected_keys]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
