"""Moments of an optimizer by the names of their parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from fastprior.trainer.fsdp import part_like


def named_state(optimizer: Optimizer, names: Mapping[Parameter, str]) -> dict:
    """The optimizer's state dict with names in place of numbers. Tensors are not copied."""
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    return {"state": {names[p]: dict(state) for p, state in optimizer.state.items()}, "param_groups": groups}


def check_moments(moments: Mapping[str, Mapping], trained: Mapping[str, Parameter], strict: bool = True) -> None:
    """Raise ValueError where moments do not fit the trained parameters in names (if strict) or shapes.

    Args:
        moments: by name of the parameter, such as the "state" of `named_state`; empty before the first step.
        strict: every parameter has an entry, and the other way round.
    """
    if strict and moments and moments.keys() != trained.keys():
        name = min(moments.keys() ^ trained.keys())
        where = "the checkpoint" if name in moments else "this trainer"
        raise ValueError(f"optimizer: only {where} trains {name}; strict=False loads the moments of the others")
    for name in moments.keys() & trained.keys():
        for key, value in moments[name].items():
            if torch.is_tensor(value) and value.ndim and value.shape != trained[name].shape:
                shapes = f"{tuple(value.shape)}; it must be {tuple(trained[name].shape)}"
                raise ValueError(f"optimizer: {key} of {name} has shape {shapes}")


def load_moments(optimizer: Optimizer, moments: Mapping[str, Mapping], names: Mapping[Parameter, str]) -> None:
    """Take over copies of moments that fit, or of those that there are; the hyperparameters stay as they are."""
    state = {}
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        state[index] = {
            key: (part_like(value, parameter) if value.ndim else value).clone() if torch.is_tensor(value) else value
            for key, value in moments.get(names[parameter], {}).items()
        }
    state = {index: own for index, own in state.items() if own}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
