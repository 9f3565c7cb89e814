"""Recognising the text of the last call, so that a loop which only ever calls `forward` prefills once."""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from fastprior.kernels import ops
from fastprior.models import patches, snapshot
from fastprior.models.prior_transformer.cached_blocks import Prefix

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DIM_HEADS, LONGEST_SUFFIX = range(16, 129), 16  # what the kernels take
KNOWN = {  # modules that `cached_blocks` runs as they would run themselves
    "torch.nn.modules": "LayerNorm Linear Dropout ModuleList SiLU Mish GELU ReLU",
    "fastprior.models.prior_transformer.blocks": "Block Attention FeedForward GELU TimeFeatures TimeEmbedding",
    "diffusers.models": "BasicTransformerBlock Attention FeedForward GELU Timesteps TimestepEmbedding",
}
# processors of diffusers that differ in memory and speed alone
PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")

TextTensors = tuple[Tensor | None, ...]  # embedding, encodings and mask, as a caller of `forward` has them


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


def prefix_obstacles(model: nn.Module, suffix: int) -> list[str]:
    """Why a prior transformer cannot run as a prefix and `suffix` tokens behind it; empty when it can."""
    find, key = partial(_each_obstacle, model, suffix), ("obstacles", suffix, ops.forced())
    return snapshot.once(model.transformer_blocks, key, lambda: list(dict.fromkeys(find())))


def _each_obstacle(model: nn.Module, suffix: int) -> Iterator[str]:
    yield from itertools.chain(*patches.found())
    modules = list(model.modules())[1:]
    for module in patches.touched(modules):
        yield f"a {type(module).__name__} has a hook or a replaced forward, which the cached path would not call"
    for module in modules:
        processor = getattr(module, "processor", None)
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


def is_plain_call(text: TextTensors) -> bool:
    """Whether tensors hold what they seem to, and may be looked into: no gradients, tracing, transforms, capture."""
    return not (
        torch.compiler.is_compiling()  # first: of the others a compiler may know nothing
        or torch.is_grad_enabled()
        or torch.jit.is_tracing()
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # of make_fx
        or any(type(t) not in (Tensor, nn.Parameter) or t.is_meta for t in text if t is not None)
    )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class Remembered:
    """A prefix and all it was made of; `model` runs what stands behind it, see `snapshot.twin_of`."""

    def __init__(self, model: nn.Module, twin: nn.Module, text: TextTensors, key: tuple, prefix: Prefix):
        self.prefix, self.key, self.snapshot = prefix, key, snapshot.Snapshot(model)
        self.model = None if twin is model else twin  # else it would keep itself alive
        self.text = tuple(None if t is None else t.detach().clone() for t in text)
        self.callers: list[weakref.ref] = []

    def fits(self, text: TextTensors, key: tuple) -> bool:
        return (
            self.same_key(key)
            and self.snapshot.same_weights()
            and self.snapshot.same_modules()
            and self.same_text(text)
            and self.snapshot.same_values()
        )

    def same_key(self, key: tuple) -> bool:
        return key == self.key

    def same_text(self, text: TextTensors) -> bool:
        return all(map(_equal, text, self.text))


class _Slot:
    """Holds the last prefix of one model in one thread."""

    entry: Remembered | None = None

    def watch(self, text: TextTensors) -> None:
        """Drop the entry when the caller's last tensor of the text is gone: nothing outlives the run."""
        gone = partial(_release, weakref.ref(self))
        self.entry.callers = [weakref.ref(t, gone) for t in text if t is not None]


def _release(slot_ref: weakref.ref, _: weakref.ref) -> None:
    slot = slot_ref()
    entry = slot and slot.entry
    if entry and all(caller() is None for caller in entry.callers):
        slot.entry = None


class _SlotOfThread(threading.local):
    def __init__(self):
        self.slot = _Slot()


_SLOTS: weakref.WeakKeyDictionary[nn.Module, _SlotOfThread] = weakref.WeakKeyDictionary()


def remembered(model: nn.Module) -> Remembered | None:
    """The prefix that the last call of a model in this thread left, and what it was made of."""
    return _SLOTS[model].slot.entry if model in _SLOTS else None


def forget(model: nn.Module) -> None:
    """Drop what is remembered for a model, in all threads."""
    _SLOTS.pop(model, None)
    snapshot.forget(model)


def recall(
    model: nn.Module, text: TextTensors, suffix: int, make: Callable[[nn.Module], Prefix | None]
) -> Remembered | None:
    """The prefix of this text: that of the last call where everything is the same, else a new one.

    Tensors are compared by value, so that every kind of edit is seen.

    Args:
        text: tensors that the prefix is made of, as the caller gave them.
        suffix: number of tokens behind the prefix.
        make: computes the prefix by the model that is given; None where this text has none.
    Returns:
        None where there are obstacles to running behind a prefix.
    """
    kind = text[0].device.type
    key = suffix, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), ops.forced()
    slot = _SLOTS.setdefault(model, _SlotOfThread()).slot
    entry = slot.entry
    if entry is None or not entry.fits(text, key):
        slot.entry = entry = None  # before the new one is made: there is never room for two
        if any(_each_obstacle(model, suffix)):
            return None
        twin = snapshot.twin_of(model) if kind == "cpu" else model
        prefix = make(twin)
        if prefix is None:
            return None
        slot.entry = entry = Remembered(model, twin, text, key, prefix)
    slot.watch(text)
    return entry
