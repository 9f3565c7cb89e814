"""Recognising the conditioning of the last call, so that a loop which only ever calls `forward` prefills once."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from fastprior.kernels import ops
from fastprior.models import snapshot
from fastprior.models.prior_transformer.blocks import Prefix

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DIM_HEADS, LONGEST_SUFFIX = range(16, 129), 16  # what the kernels take
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
KNOWN = {  # modules that `prior_blocks` runs as they would run themselves
    "torch.nn.modules": "LayerNorm Linear Dropout ModuleList SiLU Mish GELU ReLU",
    "fastprior.models.prior_transformer.blocks": "Block Attention FeedForward GELU TimeFeatures TimeEmbedding",
    "diffusers.models": "BasicTransformerBlock Attention FeedForward GELU Timesteps TimestepEmbedding",
}
# processors of diffusers that differ in memory and speed alone
PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")

Conditioning = tuple[Tensor | None, ...]


def _is_known(module: nn.Module) -> bool:
    cls = type(module)
    return any(cls.__module__.startswith(home) and cls.__name__ in names.split() for home, names in KNOWN.items())


def _strangers(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that the cached path does not know; adapters of peft are called as they are."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    for child in module.children():
        if peft is None or not isinstance(child, peft.BaseTunerLayer):
            if not _is_known(child):
                yield child
            yield from _strangers(child)


def obstacles(model: nn.Module, suffix: int) -> list[str]:
    """Why a prior transformer cannot run as a prefix and `suffix` tokens behind it; empty when it can."""
    return list(dict.fromkeys(_find_obstacles(model, suffix)))


def _find_obstacles(model: nn.Module, suffix: int) -> Iterator[str]:
    for module in list(model.modules())[1:]:
        name, processor = type(module).__name__, getattr(module, "processor", None)
        if "forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS):
            yield f"a {name} has a hook or a replaced forward, which the cached path would not call"
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            yield "dropout is active (the model is in training mode)"
        if processor is not None and (
            type(processor).__name__ not in PROCESSORS or not type(processor).__module__.startswith("diffusers.")
        ):
            yield f"an attention processor is a {type(processor).__name__}"
    for module in _strangers(model):
        yield f"a {type(module).__name__} stands in the model"
    weights = list(model.parameters())
    if len({weight.device for weight in weights}) != 1 or weights[0].is_meta:
        yield "the weights lie on several devices, or on none"
        return
    if any(type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in DTYPES for weight in weights):
        yield "weights are quantised or sharded"
    dim_head = model.config["attention_head_dim"]
    if ops.on_triton(weights[0]) and (suffix > LONGEST_SUFFIX or dim_head not in DIM_HEADS):
        yield f"the kernels take at most {LONGEST_SUFFIX} suffix tokens and dim_head from 16 to 128"


def is_plain_call(conditioning: Conditioning) -> bool:
    """Whether tensors hold what they seem to, and may be looked into: no gradients, tracing, transforms, capture."""
    return not (
        torch.compiler.is_compiling()  # first: of the others a compiler may know nothing
        or torch.is_grad_enabled()
        or torch.jit.is_tracing()
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(type(t) not in (Tensor, nn.Parameter) or t.is_meta for t in conditioning if t is not None)
    )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class _Entry:
    """A prefix and all it was made of."""

    def __init__(self, model: nn.Module, conditioning: Conditioning, key: tuple, prefix: Prefix):
        self.prefix, self.key, self.snapshot = prefix, key, snapshot.Snapshot(model)
        self.conditioning = tuple(None if t is None else t.detach().clone() for t in conditioning)
        self.callers: list[weakref.ref] = []

    def fits(self, conditioning: Conditioning, key: tuple) -> bool:
        return (
            self.same_key(key)
            and self.snapshot.same_weights()
            and self.snapshot.same_modules()
            and self.same_conditioning(conditioning)
            and self.snapshot.same_values()
        )

    def same_key(self, key: tuple) -> bool:
        return key == self.key

    def same_conditioning(self, conditioning: Conditioning) -> bool:
        return all(map(_equal, conditioning, self.conditioning))


class _Slot:
    """The last prefix of one model in one thread."""

    entry: _Entry | None = None

    def watch(self, conditioning: Conditioning) -> None:
        """Drop the entry when the caller's last tensor of the conditioning is gone: nothing outlives the run."""
        gone = partial(_release, weakref.ref(self))
        self.entry.callers = [weakref.ref(t, gone) for t in conditioning if t is not None]


def _release(slot_ref: weakref.ref, _: weakref.ref) -> None:
    slot = slot_ref()
    entry = slot and slot.entry
    if entry and all(caller() is None for caller in entry.callers):
        slot.entry = None


_SLOTS: weakref.WeakKeyDictionary[nn.Module, threading.local] = weakref.WeakKeyDictionary()


def forget(model: nn.Module) -> None:
    """Drop what is remembered for a model, in all threads."""
    _SLOTS.pop(model, None)
    snapshot.forget(model)


def recall(
    model: nn.Module, conditioning: Conditioning, suffix: int, make: Callable[[], Prefix | None]
) -> Prefix | None:
    """The prefix of this conditioning: that of the last call where everything is the same, else a new one.

    Tensors are compared by value, so that every kind of edit is seen.

    Args:
        conditioning: tensors that the prefix is made of, as the caller gave them.
        suffix: number of tokens behind the prefix.
        make: computes the prefix; None where this conditioning has none.
    Returns:
        None where there are obstacles to running behind a prefix.
    """
    kind = conditioning[0].device.type
    key = suffix, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), ops.forced()
    local = _SLOTS.setdefault(model, threading.local())
    slot = vars(local).setdefault("slot", _Slot())
    entry = slot.entry
    if entry is None or not entry.fits(conditioning, key):
        slot.entry = entry = None  # before the new one is made: there is never room for two
        prefix = None if any(_find_obstacles(model, suffix)) else make()
        if prefix is None:
            return None
        slot.entry = entry = _Entry(model, conditioning, key, prefix)
    slot.watch(conditioning)
    return entry.prefix
