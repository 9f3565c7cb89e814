"""What was patched of that which the fast ways of networks stand for: nothing of it may be ignored in silence."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as all_modules
from torch.utils._device import DeviceContext

GLOBAL_HOOKS = {
    "forward": (all_modules._global_forward_hooks, all_modules._global_forward_pre_hooks),
    "backward": (all_modules._global_backward_hooks, all_modules._global_backward_pre_hooks),
}
CALLED, WHOLE, PRIOR_TRANSFORMER = "called", "whole", "prior_transformer"
FUNCTIONS = "linear", "layer_norm", "gelu", "silu", "mish", "relu", "embedding"
MODULES = (
    *(nn.Linear, nn.LayerNorm, nn.Embedding, nn.Identity, nn.Sequential, nn.Unflatten),
    *(nn.SiLU, nn.GELU, nn.Mish, nn.ReLU),
)

_WATCHED: list[tuple[str, Any, str, Any]] = []  # kind, owner, name, and what stands there unpatched
_OWNERS, _NAMES, _UNPATCHED = _COLUMNS = [], [], []  # the same in columns, to be compared at once
_patched = False


class Found(NamedTuple):
    """What is patched, as reasons.

    Attributes:
        called: of modules that are called one by one where anything is patched: slower, but behind a prefix all the
            same.
        whole: of what is called with all tokens only, so that there can be no prefix.
        prior_transformer: the same, of the blocks of a PriorTransformer alone.
    """

    called: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    prior_transformer: tuple[str, ...] = ()


NOTHING = Found()


def _is_of(owner: ModuleType | type, name: str, function: Any) -> bool:
    """Whether a function is of its owner's own package: what was patched before this is imported is found, too."""
    code = getattr(function, "__code__", None)
    if code is None:
        return function is getattr(torch._C._nn, name, None)
    home = owner.__module__ if isinstance(owner, type) else owner.__name__
    return home.split(".")[0] in code.co_filename.split(os.sep)


def watch(*owners: ModuleType | type, names: tuple[str, ...] = ("forward",), kind: str = CALLED) -> None:
    """Find patches of these functions from now on, as a kind of `Found`: our own code computes what they do."""
    for owner in owners:
        for name in names:
            function = vars(owner)[name]
            found = owner, name, function if _is_of(owner, name, function) else None
            _WATCHED.append((kind, *found))
            for column, value in zip(_COLUMNS, found):
                column.append(value)


watch(F, names=FUNCTIONS)
watch(*MODULES)
watch(F, names=("dropout",), kind=WHOLE)
watch(nn.Dropout, kind=WHOLE)
watch(nn.Module, names=("__call__", "_call_impl"), kind=WHOLE)
watch(F, names=("scaled_dot_product_attention",), kind=PRIOR_TRANSFORMER)


def found() -> Found:
    """What is patched now. It takes some microseconds: once for a run, or for a call of a network."""
    global _patched
    if torch.compiler.is_compiling():
        return NOTHING
    hooked = any(GLOBAL_HOOKS["forward"]) or any(GLOBAL_HOOKS["backward"])
    if not hooked and not torch._C._len_torch_function_stack() and [*map(getattr, _OWNERS, _NAMES)] == _UNPATCHED:
        _patched = False
        return NOTHING
    reasons = [
        (kind, f"{owner.__name__}.{name} is patched")
        for kind, owner, name, function in _WATCHED
        if getattr(owner, name) is not function
    ]
    reasons += ((WHOLE, f"all modules have a {kind} hook") for kind, hooks in GLOBAL_HOOKS.items() if any(hooks))
    for level in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(level)
        if type(mode) is not DeviceContext:  # which says where tensors are made, no more
            reasons.append((WHOLE, f"a {type(mode).__name__} follows functions of torch"))
    _patched = any(kind != PRIOR_TRANSFORMER for kind, _ in reasons)
    if not reasons:
        return NOTHING
    return Found(*(tuple(reason for kind, reason in reasons if kind == name) for name in Found._fields))


def is_patched() -> bool:
    """Whether `found` last found patches, other than of the blocks of a PriorTransformer."""
    return _patched


# what torch.compiler.assume_constant_result marks; it would import all of torch.compile, which takes 1.5 s
found._dynamo_marked_constant = True


def has_hook(module: nn.Module) -> bool:
    """Whether a module has a hook, of forward or of backward."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


class Same(functools.partial):
    """A forward in the place of a module's own that computes the same, such as by torch's checkpoint: no patch."""


def touched(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Which modules have a hook, or a forward of their own."""
    return [m for m in modules if has_hook(m) or type(vars(m).get("forward")) not in (Same, type(None))]


def are_called_as_they_are(*modules: nn.Module) -> bool:
    """Whether calls run the forward of the modules' classes alone, as those were written: see `is_patched`."""
    if _patched:
        return False
    for module in modules:  # of several hundred, at each step: written out
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return False
        if "forward" in vars(module):
            return False
    return True
