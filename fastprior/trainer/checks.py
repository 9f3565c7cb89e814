"""What a checkpoint's entries must be: looked at before a trainer takes any of them."""

from __future__ import annotations

import math
import numbers
import random
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastprior.trainer.fsdp import local

LARGEST = 2**63 - 1  # that a count of int64 holds


def as_dict(value: Any, name: str) -> Mapping[str, Any]:
    """The value, a dict with strings as keys, or ValueError."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is a {type(value).__name__}; it must be a dict")
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"{name} has the key {key!r:.100}; its keys must be strings")
    return value


def _plain(value: Any) -> Any:
    """The number in a tensor of one element; anything else as it is."""
    if isinstance(value, Tensor) and not value.is_meta and value.layout == torch.strided and value.numel() == 1:
        return value.item()
    return value


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.100}"


def as_count(value: Any, name: str) -> int:
    """The integer in a number or a tensor of one, or ValueError; it counts something, and fits int64."""
    found = _plain(value)
    whole = found.is_integer() if isinstance(found, float) else isinstance(found, numbers.Integral)
    if not whole or not 0 <= found <= LARGEST:
        raise ValueError(f"{name} is {_shown(found)}; it must be an integer of at least 0")
    return int(found)


def as_number(value: Any, name: str) -> float:
    """The number in a number or a tensor of one, or ValueError; it is finite and not negative."""
    found = _plain(value)
    if not isinstance(found, numbers.Real) or not math.isfinite(found) or found < 0:
        raise ValueError(f"{name} is {_shown(found)}; it must be a finite number of at least 0")
    return float(found)


def bounds(value: Tensor) -> tuple[float, float]:
    """The least and the largest of what lies here of a dense tensor; both NaN where one is, 0 where there is none."""
    value = local(value.detach())
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    if not value.numel():
        return 0.0, 0.0
    if value.itemsize == 1 and value.is_floating_point():
        value = value.float()  # float8 has no order
    least, largest = torch.aminmax(value)  # ten times faster than `isfinite().all()`
    return least.item(), largest.item()


def _kind(value: Tensor) -> str:
    return "complex" if value.is_complex() else "floating point" if value.is_floating_point() else "integers"


def check_tensor(value: Any, like: Tensor, name: str, least: float = -math.inf) -> None:
    """Raise ValueError unless a value can be copied into a tensor as it is: dense, here, of its shape and kind.

    Finite, too, and nowhere below `least`; but a buffer may be infinite where that one is, as tables of some noise
    schedules are.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; it must be a tensor")
    if value.is_nested or value.is_quantized or value.layout != torch.strided or value.is_meta:
        found = "a meta tensor" if value.is_meta else f"of layout {value.layout}, nested or quantized"
        raise ValueError(f"{name} is {found}; it must be a dense tensor")
    if value.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {tuple(like.shape)}")
    if _kind(value) != _kind(like):
        raise ValueError(f"{name} has dtype {value.dtype}; it must be of {_kind(like)}, as {like.dtype}")
    if _kind(value) == "integers":
        return
    found = bounds(value)
    if not all(map(math.isfinite, found)) and (isinstance(like, Parameter) or all(map(math.isfinite, bounds(like)))):
        raise ValueError(f"{name} holds NaN or infinity; it must be finite")
    if found[0] < least:
        raise ValueError(f"{name} holds {found[0]:g}; it must be at least {least:g}")


def check_moments(
    moments: Mapping[str, Any],
    trained: Mapping[str, Parameter],
    needed: Collection[str],
    name: str,
    strict: bool = True,
) -> None:
    """Raise ValueError where moments do not fit the trained parameters, or are none.

    Args:
        moments: by name of the parameter, such as the "state" of `Stepper.named_state`; empty before the first step.
        needed: what the optimizer reads of each parameter.
        name: of the moments, for messages.
        strict: every parameter has an entry, and the other way round.
    """
    if strict and moments and moments.keys() != trained.keys():
        other = min(moments.keys() ^ trained.keys())
        where = "the checkpoint" if other in moments else "this trainer"
        raise ValueError(f"{name}: only {where} trains {other}; strict=False loads the moments of the others")
    for parameter in moments.keys() & trained.keys():
        kept = as_dict(moments[parameter], f"{name}: the entry of {parameter}")
        if missing := [key for key in needed if key not in kept]:
            raise ValueError(f"{name}: {parameter} has no {missing[0]}; it must have {', '.join(needed)}")
        for key, value in kept.items():
            what = f"{name}: {key} of {parameter}"
            if key == "step":
                as_count(value, what)
            elif isinstance(value, Tensor) and value.ndim:
                check_tensor(value, trained[parameter], what, 0 if key.endswith("_sq") else -math.inf)
            elif value is not None and not isinstance(_plain(value), numbers.Real):
                raise ValueError(f"{what} is a {type(value).__name__}; it must be a tensor or a number")


def check_generators(state: Any, device: torch.device, name: str) -> Mapping[str, Any]:
    """The states of a process's generators, which others here take, or ValueError."""
    state = as_dict(state, name)
    if missing := [kind for kind in ("torch", "python") if kind not in state]:
        raise ValueError(f"{name} has no {missing[0]!r}; it must have torch and python")
    trials = dict(torch=torch.Generator().set_state, python=random.Random().setstate)
    if device.type == "cuda" and "cuda" in state:
        trials["cuda"] = torch.Generator(device).set_state
    for kind, take in trials.items():
        try:
            take(state[kind])
        except Exception as error:  # setstate raises whatever it meets
            raise ValueError(f"{name}[{kind!r}] is no state of a generator: {error}") from error
    following = state["python"][2]  # any value is taken, until the next normal number
    if not isinstance(following, (float, type(None))):
        raise ValueError(f"{name}['python'] is no state of a generator: it ends in {following!r:.100}")
    return state
