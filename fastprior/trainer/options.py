"""What the arguments of `DiffusionPriorTrainer` ask for: checked, sorted, and done where accelerate does not."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.checkpoint import checkpoint

from fastprior.models.patches import Same
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.trainer.ema import EMA

_EMA_OPTIONS = {f"ema_{name}" for name in inspect.signature(EMA).parameters if name != "model"}
_ACCELERATOR_OPTIONS = {f"accelerator_{name}" for name in inspect.signature(Accelerator).parameters}
_LEGACY_OPTIONS = {"amp", "device"}


def check_ranges(prior: DiffusionPrior, draws: int, **bounds: tuple[float | None, float]) -> None:
    """Raise ValueError for a value, of (value, bound), that is not greater than its bound, and for draws in vain."""
    for name, (value, bound) in (bounds | dict(draws=(draws, 0))).items():
        if value is not None and not value > bound:
            raise ValueError(f"{name}={value}; it must be greater than {bound}")
    if draws != 1 and "draws" not in inspect.signature(prior.forward).parameters:
        raise ValueError(f"draws={draws}; {type(prior).__name__}.forward takes no `draws`: it must be 1")


def sort_options(options: Mapping[str, Any], signature: Iterable[str]) -> tuple[dict, dict, dict]:
    """The arguments of `EMA`, those of `Accelerator`, and legacy ones, among a trainer's further arguments.

    Raises TypeError for an unknown one, naming the nearest of these and of the trainer's signature.
    """
    known = _EMA_OPTIONS | _ACCELERATOR_OPTIONS | _LEGACY_OPTIONS
    for name, value in options.items():
        if name not in known:
            close = difflib.get_close_matches(name, known | {*signature}, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see DiffusionPriorTrainer"
            raise TypeError(f"unknown argument {name}={value!r}; {hint}")
    return (
        {name.removeprefix("ema_"): options[name] for name in _EMA_OPTIONS & options.keys()},
        {name.removeprefix("accelerator_"): options[name] for name in _ACCELERATOR_OPTIONS & options.keys()},
        {name: options[name] for name in _LEGACY_OPTIONS & options.keys()},
    )


def checked_accelerator(
    accelerator: Accelerator | None, options: dict, amp: bool = False, device: str | torch.device | None = None
) -> Accelerator:
    """The accelerator given, or one of these options; `amp` and `device` hold for either, or ValueError is raised."""
    device = None if device is None else torch.device(device)
    if accelerator is None:
        if device is not None and device.type == "cpu":
            options.setdefault("cpu", True)
        if amp:
            on_gpu = torch.cuda.is_available() and not options.get("cpu")
            options.setdefault("mixed_precision", "fp16" if on_gpu else "bf16")
        accelerator = Accelerator(**options)
    elif options:
        raise ValueError(f"accelerator_{min(options)} was given with accelerator=; it must be set in that one")
    if amp and accelerator.mixed_precision == "no":
        raise ValueError(
            "amp=True, but the accelerator has mixed_precision='no'; it must be made with 'fp16' or 'bf16'"
        )
    if device is not None:
        there = accelerator.device
        if device.type != there.type or device.index not in (None, there.index or 0):
            raise ValueError(f"device={str(device)!r}; it must be the accelerator's, {str(there)!r}")
    return accelerator


def recompute_activations(prior: DiffusionPrior) -> None:
    """Keep only queries, keys, values and the residual stream of each layer, and compute the rest again in backward."""
    if hasattr(prior.net, "enable_gradient_checkpointing"):
        prior.net.enable_gradient_checkpointing()
        return
    layers = getattr(getattr(prior.net, "causal_transformer", None), "layers", None)
    if layers is None:
        kind = type(prior.net).__name__
        raise ValueError(f"checkpoint_activations=True needs a net with a causal_transformer; this is a {kind}")
    for attention, feed_forward in layers:
        attention.attend = functools.partial(checkpoint, attention.attend, use_reentrant=False)
        feed_forward.forward = Same(checkpoint, feed_forward.forward, use_reentrant=False)
