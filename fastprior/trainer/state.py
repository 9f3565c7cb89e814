"""What a trainer's checkpoint holds, in our format and in dalle2-pytorch's."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from fastprior.optimizer import separate_weight_decayable_params
from fastprior.peer import PEER_VERSION
from fastprior.prior.record import TRAINED, entry
from fastprior.trainer.ema import EMA
from fastprior.trainer.fsdp import collected, part_like, without_clip
from fastprior.trainer.stepper import Stepper, check_moments
from fastprior.version import __version__
from fastprior.weight_files.safe import HEADER


class Training(Protocol):
    """What a checkpoint is made of and loaded into; `DiffusionPriorTrainer` has these attributes."""

    accelerator: Accelerator
    device: torch.device
    prior: nn.Module
    ema_diffusion_prior: EMA | None
    stepper: Stepper
    scheduler: LambdaLR
    step: Tensor
    bad_steps: int
    lr: float
    cosine_decay_max_steps: int | None


def check_plain(value: Any, name: str) -> None:
    """Raise TypeError, naming the entry, unless value is made of tensors, dicts, lists, tuples and plain values."""
    if type(value) is dict:
        for key, item in value.items():
            check_plain(key, f"{name}'s key {key!r}")
            check_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            check_plain(item, f"{name}[{index}]")
    elif not (torch.is_tensor(value) or type(value) in (type(None), bool, int, float, str, bytes)):
        raise TypeError(f"{name} is a {type(value).__name__}; a checkpoint holds tensors and plain values only")


def _check_objective(payload: Mapping, prior: nn.Module, source: str) -> None:
    """Warn where a file was trained for something else than the prior that it is loaded into."""
    said, own = payload.get(HEADER) or {}, dict(net=getattr(prior.net, "config", {}), prior=prior.config)
    for section, config in own.items():
        recorded, config = said.get(section, {}), config if isinstance(config, Mapping) else {}
        for name in TRAINED:
            if name in recorded and name in config and recorded[name] != config[name]:
                warnings.warn(f"{source} was trained with {name}={recorded[name]}; this prior has {config[name]}")


def _names(prior: nn.Module) -> dict[Parameter, str]:
    return {parameter: name for name, parameter in prior.named_parameters()}


# random generators


def rng_state(device: torch.device) -> dict:
    """The state of this process's global generators, in plain types."""
    state = dict(torch=torch.get_rng_state(), python=random.getstate())
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_states(saved: list[Mapping] | Mapping, trainer: Training, source: str) -> None:
    """Put each process's generators where they were; a process that has none in the file seeds its own by rank 0's."""
    states = saved if isinstance(saved, list) else [saved]  # a mapping is that of one process
    accelerator, device = trainer.accelerator, trainer.device
    rank, world = accelerator.process_index, accelerator.num_processes
    if len(states) != world and accelerator.is_main_process:
        warnings.warn(
            f"{source} holds the random generators of {len(states)} process(es), and this run has {world}: weights, "
            "average, moments and learning rate go on exactly; noise, dropout and dropped conditions will be others "
            "than without the interruption"
        )
    state = states[rank if rank < len(states) else 0]
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if rank >= len(states):
        seed = int(torch.randint(2**62, ())) + rank
        torch.manual_seed(seed)
        random.seed(seed)


# our format


def capture(trainer: Training, generators: list[dict]) -> dict:
    """See `DiffusionPriorTrainer.training_state`; `generators` are the `rng_state` of each process."""
    prior, ema, scheduler = trainer.prior, trainer.ema_diffusion_prior, trainer.scheduler
    state = dict(
        fastprior_version=__version__,
        **entry(prior),
        step=trainer.step.cpu(),
        model=without_clip(prior.state_dict()),
        optimizer=trainer.stepper.named_state(_names(prior)),
        scheduler=dict(base_lrs=list(scheduler.base_lrs), last_epoch=scheduler.last_epoch),
        rng=generators,
        bad_steps=trainer.bad_steps,
    )
    if trainer.accelerator.scaler is not None:
        state["scaler"] = trainer.accelerator.scaler.state_dict()
    if ema is not None:
        state["ema_model"] = without_clip(ema.ema_model.state_dict())
        state["ema"] = dict(step=ema.step, initted=ema.initted)
    return collected(state, keep=trainer.accelerator.is_main_process)


def _fitting(state: Mapping[str, Tensor], prior: nn.Module, name: str, strict: bool) -> dict[str, Tensor]:
    """The weights to load into a prior; ValueError, with the name of the state, where they do not fit it."""
    state, wanted = without_clip(state), without_clip(prior.state_dict())
    if strict and state.keys() != wanted.keys():
        lists = (", ".join(sorted(a.keys() - b.keys())[:5]) or "none" for a, b in ((wanted, state), (state, wanted)))
        raise ValueError("{}: missing keys: {}; unexpected keys: {}".format(name, *lists))
    for key in state.keys() & wanted.keys():
        if state[key].shape != wanted[key].shape:
            shapes = f"{tuple(state[key].shape)}; it must be {tuple(wanted[key].shape)}"
            raise ValueError(f"{name}: {key} has shape {shapes}")
    return state


def restore(
    trainer: Training, payload: Mapping, source: str, overwrite_lr: bool, strict: bool, restore_rng: bool
) -> None:
    """See `DiffusionPriorTrainer.load`; messages name the `source` of the payload."""
    prior, ema, scaler = trainer.prior, trainer.ema_diffusion_prior, trainer.accelerator.scaler
    missing = [key for key in ("model", "optimizer", "scheduler", "step") if key not in payload]
    if missing:
        raise ValueError(f"{source} has no entry {missing[0]!r}; it must be a trainer's checkpoint")
    if ema is not None and strict and "ema_model" not in payload:
        raise ValueError(f"{source} has no 'ema_model'; it must have, with use_ema=True and strict=True")
    model = _fitting(payload["model"], prior, f"{source}: model", strict)
    average = _fitting(payload.get("ema_model", model), prior, f"{source}: ema_model", strict)
    is_peers = "fastprior_version" not in payload
    moments = _moments_from_peer(payload, prior, source) if is_peers else payload["optimizer"]["state"]
    _check_objective(payload, prior, source)
    names = _names(prior)
    check_moments(moments, {name: p for p, name in names.items() if p.requires_grad}, strict)  # the last to raise

    trainer.stepper.load_moments(moments, names)
    _load(prior, model)
    trainer.stepper.weights_changed()
    if ema is not None:
        _load(ema.ema_model, average)
        for name in payload.get("ema", {}).keys() & {"step", "initted"}:
            getattr(ema, name).fill_(int(payload["ema"][name]))
    trainer.step.fill_(int(payload["step"]))
    _resume_schedule(trainer, trainer.lr if overwrite_lr else payload["scheduler"]["base_lrs"][0])
    trainer.bad_steps = payload.get("bad_steps", 0)
    if scaler is not None and "scaler" in payload:
        scaler.load_state_dict(payload["scaler"])
    if restore_rng and "rng" in payload:
        _set_rng_states(payload["rng"], trainer, source)


def _load(prior: nn.Module, state: Mapping[str, Tensor]) -> None:
    divided = prior.state_dict()
    parts = {key: part_like(value, divided[key]) if key in divided else value for key, value in state.items()}
    prior.load_state_dict(parts, strict=False)


def _resume_schedule(trainer: Training, lr: float) -> None:
    """Set the learning rate to what it is at this step with `lr` as its base."""
    scheduler, groups = trainer.scheduler, trainer.stepper.optimizer.param_groups
    scheduler.last_epoch = int(trainer.step)
    scheduler.base_lrs = [lr] * len(groups)
    for group, factor in zip(groups, scheduler.lr_lambdas):
        group["initial_lr"], group["lr"] = lr, lr * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]


# dalle2-pytorch's format, which numbers the parameters in their order in the prior, group by group, a CLIP's first


def _grouped(parameters: list[Parameter], groups: int) -> list[list[Parameter]]:
    return [parameters] if groups == 1 else list(separate_weight_decayable_params(parameters))


def _moments_from_peer(payload: Mapping, prior: nn.Module, source: str) -> dict[str, dict]:
    """The optimizer's moments by name; whether the file or the prior has a CLIP does not matter."""
    trained = without_clip(dict(prior.named_parameters()))
    names = {trained[name]: name for name in payload["model"] if name in trained}
    stored, groups = payload["optimizer"]["state"], payload["optimizer"]["param_groups"]
    moments = {}
    for parameters, group in zip(_grouped(list(names), len(groups)), groups):
        surplus = len(group["params"]) - len(parameters)
        if surplus < 0:
            rule = f"it must be the prior's {len(parameters)} or more"
            raise ValueError(f"{source}: optimizer has {len(group['params'])} parameters in a group; {rule}")
        numbers = group["params"][surplus:]
        moments.update({names[p]: dict(stored[n]) for p, n in zip(parameters, numbers) if n in stored})
    return moments


def to_peer(trainer: Training) -> dict:
    """A checkpoint that dalle2-pytorch's trainer loads, in plain types; tensors are not copied."""
    prior, ema, steps = trainer.prior, trainer.ema_diffusion_prior, int(trainer.step)
    names, keep = _names(prior), trainer.accelerator.is_main_process
    optimizer = collected(trainer.stepper.named_state(names), keep)
    grouped = _grouped(list(names), len(optimizer["param_groups"]))
    numbers = {names[p]: number for number, p in enumerate(p for parameters in grouped for p in parameters)}
    state = {numbers[name]: moments for name, moments in optimizer["state"].items()}
    groups = [
        {**group, "params": [numbers[names[p]] for p in parameters], "fused": None, "foreach": None}
        for parameters, group in zip(grouped, optimizer["param_groups"])
    ]
    scheduler = dict(
        base_lrs=list(trainer.scheduler.base_lrs),
        last_epoch=steps,
        _step_count=steps + 1,
        _last_lr=[group["lr"] for group in groups],
    )
    if trainer.cosine_decay_max_steps is None:
        scheduler["lr_lambdas"] = [None] * len(groups)
    else:
        scheduler.update(T_max=trainer.cosine_decay_max_steps, eta_min=0.0)
    model = collected(dict(prior.state_dict()), keep)
    payload = dict(
        model=model, optimizer={"state": state, "param_groups": groups}, scheduler=scheduler, warmup_scheduler=None,
        version=PEER_VERSION, step=trainer.step.cpu(), **entry(prior),
    )  # fmt: skip
    if ema is not None:
        average = collected(dict(ema.ema_model.state_dict()), keep)
        both = {"online_model": model, "ema_model": average}
        nested = {f"{name}.{key}": value for name, weights in both.items() for key, value in weights.items()}
        payload.update(ema={"initted": ema.initted, "step": ema.step, **nested}, ema_model=average)
    return payload
