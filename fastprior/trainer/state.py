"""What a trainer's checkpoint holds, in our format and in dalle2-pytorch's."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from fastprior.optimizer import separate_weight_decayable_params
from fastprior.peer import PEER_VERSION
from fastprior.prior.record import TRAINED, entry
from fastprior.trainer.checks import as_count, as_dict, as_number, check_generators, check_moments, check_tensor
from fastprior.trainer.ema import EMA
from fastprior.trainer.fsdp import collected, part_like, without_clip
from fastprior.trainer.stepper import Stepper
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
    said = as_dict({} if payload.get(HEADER) is None else payload[HEADER], f"{source}: {HEADER}")
    for section, config in dict(net=getattr(prior.net, "config", {}), prior=prior.config).items():
        recorded = as_dict(said.get(section, {}), f"{source}: {HEADER}: {section}")
        config = config if isinstance(config, Mapping) else {}
        for name in (name for name in TRAINED if name in recorded and name in config):
            said_so, own = recorded[name], config[name]
            if not (type(said_so) in (bool, int, float, str, type(None)) and said_so == own):
                warnings.warn(f"{source} was trained with {name}={said_so!r:.100}; this prior has {own}")


def _names(prior: nn.Module) -> dict[Parameter, str]:
    return {parameter: name for name, parameter in prior.named_parameters()}


# random generators


def rng_state(device: torch.device) -> dict:
    """The state of this process's global generators, in plain types."""
    state = dict(torch=torch.get_rng_state(), python=random.getstate())
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _own_generators(saved: Any, trainer: Training, source: str) -> tuple[Mapping, bool]:
    """The states for this process's generators, checked, and whether they are rank 0's, as the file has none for it."""
    states = saved if isinstance(saved, list) else [saved]  # a mapping is that of one process
    if not states:
        raise ValueError(f"{source}: rng is empty; it must hold the generators of a process")
    accelerator = trainer.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    lent = rank >= len(states)
    state = check_generators(states[0 if lent else rank], trainer.device, f"{source}: rng")
    if len(states) != world and accelerator.is_main_process:
        warnings.warn(
            f"{source} holds the random generators of {len(states)} process(es), and this run has {world}: weights, "
            "average, moments and learning rate go on exactly; noise, dropout and dropped conditions will be others "
            "than without the interruption"
        )
    return state, lent


def _set_generators(state: Mapping, lent: bool, trainer: Training) -> None:
    """Put this process's generators where they were; from those of rank 0, it seeds its own."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if trainer.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], trainer.device)
    if lent:
        seed = int(torch.randint(2**62, ())) + trainer.accelerator.process_index
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


@dataclass
class Checked:
    """What `restore` takes from a checkpoint, of which every entry was looked at."""

    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    average_counts: dict[str, int]
    moments: Mapping[str, Mapping]
    step: int
    lr: float
    bad_steps: int
    scaler: Mapping | None
    generators: tuple[Mapping, bool] | None


def _fitting(state: Any, prior: nn.Module, name: str, strict: bool) -> dict[str, Tensor]:
    """The weights to load into a prior; ValueError, with the name of the state, where they do not fit it."""
    state, wanted = without_clip(as_dict(state, name)), without_clip(prior.state_dict(keep_vars=True))
    if strict and state.keys() != wanted.keys():
        lists = (", ".join(sorted(a.keys() - b.keys())[:5]) or "none" for a, b in ((wanted, state), (state, wanted)))
        raise ValueError("{}: missing keys: {}; unexpected keys: {}".format(name, *lists))
    for key in wanted.keys() & state.keys():
        check_tensor(state[key], wanted[key], f"{name}: {key}")
    return {key: part_like(value, wanted[key]) if key in wanted else value for key, value in state.items()}


def _scaler_of(payload: Mapping, trainer: Training, source: str) -> Mapping | None:
    """What the scaler of fp16 takes, where there is one and the file has its state."""
    scaler = trainer.accelerator.scaler
    if scaler is None or "scaler" not in payload:
        return None
    name, own = f"{source}: scaler", scaler.state_dict()
    state = as_dict(payload["scaler"], name)
    if missing := own.keys() - state.keys():
        raise ValueError(f"{name} has no {min(missing)!r}; it must have {', '.join(own)}")
    for key in own:
        (as_count if key.startswith("_") or "interval" in key else as_number)(state[key], f"{name}: {key}")
    return state


def check(
    trainer: Training, payload: Mapping, source: str, overwrite_lr: bool, strict: bool, restore_rng: bool
) -> Checked:
    """Everything of a payload that `restore` then takes; ValueError, with the `source` of it, where something is wrong.

    Nothing of the trainer has changed then. See `DiffusionPriorTrainer.load`.
    """
    prior, ema = trainer.prior, trainer.ema_diffusion_prior
    missing = [key for key in ("model", "optimizer", "scheduler", "step") if key not in payload]
    if missing:
        raise ValueError(f"{source} has no entry {missing[0]!r}; it must be a trainer's checkpoint")
    if ema is not None and strict and "ema_model" not in payload:
        raise ValueError(f"{source} has no 'ema_model'; it must have, with use_ema=True and strict=True")
    model = _fitting(payload["model"], prior, f"{source}: model", strict)
    average, counts = None, {}
    if ema is not None:
        name = "ema_model" if "ema_model" in payload else "model"
        average = _fitting(payload[name], ema.ema_model, f"{source}: {name}", strict)
        counts = as_dict(payload.get("ema", {}), f"{source}: ema")
        counts = {key: as_count(counts[key], f"{source}: ema: {key}") for key in ("step", "initted") if key in counts}
    optimizer = as_dict(payload["optimizer"], f"{source}: optimizer")
    if "state" not in optimizer:
        raise ValueError(f"{source}: optimizer has no 'state'; it must be the state of an optimizer")
    is_peers = "fastprior_version" not in payload
    moments = _moments_from_peer(payload, prior, source) if is_peers else optimizer["state"]
    name, trained = f"{source}: optimizer", {key: p for key, p in prior.named_parameters() if p.requires_grad}
    check_moments(as_dict(moments, name), trained, trainer.stepper.needed, name, strict)
    lr, scheduler = trainer.lr, as_dict(payload["scheduler"], f"{source}: scheduler")
    if not overwrite_lr:
        rates = scheduler.get("base_lrs")
        if not isinstance(rates, (list, tuple)) or not rates:
            raise ValueError(f"{source}: scheduler's base_lrs is {rates!r:.100}; it must list learning rates")
        lr = as_number(rates[0], f"{source}: scheduler's base_lrs[0]")
    _check_objective(payload, prior, source)
    return Checked(
        model, average, counts, moments, as_count(payload["step"], f"{source}: step"), lr,
        as_count(payload.get("bad_steps", 0), f"{source}: bad_steps"), _scaler_of(payload, trainer, source),
        _own_generators(payload["rng"], trainer, source) if restore_rng and "rng" in payload else None,
    )  # fmt: skip


def restore(trainer: Training, checked: Checked) -> None:
    """See `DiffusionPriorTrainer.load`."""
    prior, ema = trainer.prior, trainer.ema_diffusion_prior
    trainer.stepper.load_moments(checked.moments, _names(prior))  # the first, as it takes memory
    prior.load_state_dict(checked.model, strict=False)
    trainer.stepper.weights_changed()
    if ema is not None:
        ema.ema_model.load_state_dict(checked.average, strict=False)
        for name, count in checked.average_counts.items():
            getattr(ema, name).fill_(count)
    trainer.step.fill_(checked.step)
    _resume_schedule(trainer, checked.lr)
    trainer.bad_steps = checked.bad_steps
    if checked.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(dict(checked.scaler))
    if checked.generators is not None:
        _set_generators(*checked.generators, trainer)


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
    stored, groups = payload["optimizer"]["state"], payload["optimizer"].get("param_groups")
    if not isinstance(stored, Mapping) or not isinstance(groups, (list, tuple)) or len(groups) not in (1, 2):
        raise ValueError(f"{source}: optimizer is none of dalle2-pytorch's: its state must be a dict, in 1 or 2 groups")
    moments = {}
    for parameters, group in zip(_grouped(list(names), len(groups)), groups):
        numbers = as_dict(group, f"{source}: a group of optimizer").get("params")
        if not isinstance(numbers, (list, tuple)) or not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"{source}: a group of optimizer has no list of numbers as its params")
        surplus = len(numbers) - len(parameters)
        if surplus < 0:
            rule = f"it must be the prior's {len(parameters)} or more"
            raise ValueError(f"{source}: optimizer has {len(numbers)} parameters in a group; {rule}")
        moments.update({names[p]: stored[n] for p, n in zip(parameters, numbers[surplus:]) if n in stored})
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
