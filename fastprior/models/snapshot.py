"""Noticing that a model is no longer what it was: other weights, in-place edits, other modules, hooks or adapters."""

from __future__ import annotations

import contextlib
import copy
import operator
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastprior.kernels import ops
from fastprior.models import patches

SAMPLE = 64  # neighbouring elements of each weight that are compared


class Snapshot:
    """The modules and weights of a model as they were; it does not keep the model itself alive."""

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self.model, self.modules, self.types = weakref.ref(model), modules[1:], list(map(type, modules))
        self.forwards = {kind: kind.forward for kind in self.types}
        self.patches = patches.found()
        # one level deep: hooks, parameters and what peft switches are in dicts and lists of the modules
        self.states = [(vars(module), _copy(vars(module))) for module in modules[1:]]
        parts = model._parameters, model._buffers, model._modules, model._forward_hooks, model._forward_pre_hooks
        self.states += [(part, dict(part)) for part in parts]
        self.weights = [
            (owner, name, weight)
            for module in modules
            for owner in (module._parameters, module._buffers)
            for name, weight in owner.items()
            if weight is not None
        ]
        parts = [part for _, _, weight in self.weights for part in _plain_parts(weight)]
        self.placed, self.addresses = parts, [part.data_ptr() for part in parts]
        self.layouts = [(part.shape, part.stride()) for part in parts]
        self.counted = [part for part in parts if not part.is_inference()]
        read_in_place = all(t.dtype in (torch.float32, torch.bfloat16) and t.is_contiguous() for t in parts)
        self.may_be_kept = read_in_place and not patches.touched(modules)
        self.views = [_middle(part.data) for part in parts if part.device == parts[0].device]
        self.look_at_values()

    def look_at_values(self) -> None:
        """Take the numbers as they are now for what they were."""
        self.versions = [part._version for part in self.counted]
        self.sample = torch.cat(self.views) if self.views else None

    def same_weights(self) -> bool:
        """Whether every weight and buffer is the tensor it was, with no edit that autograd counted."""
        return self.same_tensors() and [part._version for part in self.counted] == self.versions

    def same_tensors(self) -> bool:
        """Whether every weight and buffer is the tensor it was, in the same place."""
        return (
            all(owner.get(name) is weight for owner, name, weight in self.weights)
            and [part.data_ptr() for part in self.placed] == self.addresses
        )

    def same_layouts(self) -> bool:
        """Whether no weight's `.data` was replaced by a view of the same memory, as pruning or a transposition may."""
        return [(part.shape, part.stride()) for part in self.placed] == self.layouts

    def same_modules(self) -> bool:
        """Whether no module, class of one, hook, adapter or other attribute changed, and nothing was patched."""
        model = self.model()
        if model is None or [type(model), *map(type, self.modules)] != self.types or patches.found() != self.patches:
            return False
        if any(kind.forward is not forward for kind, forward in self.forwards.items()):
            return False
        try:
            return all(now == then for now, then in self.states)
        except (RuntimeError, ValueError):  # another tensor or array stands there: that has no one truth value
            return False

    def same_values(self) -> bool:
        """Whether no whole weight was edited behind autograd's back, as `weight.data.copy_` does it."""
        return self.sample is None or torch.equal(torch.cat(self.views), self.sample)


def _copy(state: dict) -> dict:
    copies = {name: type_(value) for name, value in state.items() for type_ in (dict, list) if isinstance(value, type_)}
    return state | copies


def _plain_parts(weight: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a weight's numbers: itself, or those within a subclass of 8 or 4 bits."""
    if hasattr(weight, "__tensor_flatten__"):
        for name in weight.__tensor_flatten__()[0]:
            yield from _plain_parts(getattr(weight, name))
    elif weight.layout is torch.strided and not weight.is_quantized:
        yield weight


def _middle(weight: Tensor) -> Tensor:
    """A few elements, (n,), in the weight's own memory."""
    while weight.dim() > 1 and weight.numel():
        weight = weight[len(weight) // 2]
    return weight.view(-1)[max(0, weight.numel() - SAMPLE) // 2 :][:SAMPLE]


_STATES: weakref.WeakKeyDictionary[nn.Module, weakref.ref[State]] = weakref.WeakKeyDictionary()


class State:
    """Stands for a model's modules and weights as they were.

    Attributes:
        snapshot: these; None where they were forgotten.
        made: what was made of them and depends on no number, see `once`.
        tables: what does, see `of_numbers`.
        parts: ids of the modules within the model.
        twins: see `add_twin`; `twin` is the one of `twin_of`.
        runs: how many began with it.
        settled: whether the weights were moved to huge pages before.
    """

    def __init__(self, model: nn.Module):
        self.snapshot: Snapshot | None = Snapshot(model)
        self.parts = set(map(id, self.snapshot.modules))
        self.twins: list[nn.Module] = []
        self.twin: nn.Module | None = None
        self.made: dict[Hashable, Any] = {}
        self.tables: dict[Hashable, Any] = {}
        self.runs, self.settled = 0, False

    def edited(self, then: Snapshot) -> State:
        """The state of the same modules and tensors with other numbers: what was made of them sees edits in place.

        `then` is its snapshot, which another thread may forget meanwhile.
        """
        other = copy.copy(self)
        other.snapshot, other.twins, other.tables = copy.copy(then), [], {}
        other.snapshot.look_at_values()
        other.parts = set(map(id, other.snapshot.modules))
        if other.twin is not None:
            other.add_twin(other.twin)
        other.made = {key: made for key, made in self.made.copy().items() if key[0] in other.parts}
        return other

    def add_twin(self, model: nn.Module) -> None:
        """Count the modules of another model as parts: of one that is made of this one for each state."""
        self.twins.append(model)  # so that no other object takes the id of one
        self.parts |= set(map(id, model.modules()))


def state(model: nn.Module) -> State:
    """The state of a model: the same object for as long as nothing changes in the model, and the caller keeps it.

    Within `running` it is that of the beginning.
    """
    found = _running.state
    then = found and found.snapshot
    if then and (then.model() is model or _running.twin is model):
        return found
    found = _STATES[model]() if model in _STATES else None
    then = found and found.snapshot
    if not (then and then.same_tensors() and then.same_layouts() and then.same_modules()):
        found = State(model)
    elif then.same_weights() and then.same_values():
        return found
    else:
        found = found.edited(then) if then.may_be_kept else State(model)
    _STATES[model] = weakref.ref(found)
    return found


def forget(model: nn.Module) -> None:
    """Drop what is kept of a model: it holds its weights, also where they were."""
    _KEPT.pop(model, None)
    _TWINS.pop(model, None)
    found = _STATES.pop(model, lambda: None)()
    if found is not None:
        found.snapshot = None
        found.made.clear()


class _Running(threading.local):
    state: State | None = None  # of the model that runs in this thread
    twin: nn.Module | None = None  # which runs in its place


_running = _Running()
_WITH_TABLES: weakref.WeakKeyDictionary[nn.Module, State] = weakref.WeakKeyDictionary()
_KEPT: weakref.WeakKeyDictionary[nn.Module, State | None] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def running(model: nn.Module) -> Iterator[nn.Module]:
    """Look at a model once for the whole of a run on the CPU, without gradients; gives its twin, see `twin_of`.

    What is made of its modules and weights is kept. Not where a mode or a trace follows operations; nor where there are
    hooks, which may refer to the model, as what is kept would keep it alive then; nor where kernels read copies of
    weights, which do not see every edit.
    """
    found = state(model) if _can_run(model) else None
    then = found and found.snapshot
    if not then or not then.may_be_kept:
        if found:
            _KEPT[model] = None
        yield model
        return
    _KEPT[model] = found
    if not found.runs and (twin := twin_of(model)) is not model:  # else it would keep itself alive
        found.twin = twin
        found.add_twin(twin)
    found.runs += 1
    if found.runs == 2 and not found.settled:
        ops.to_huge_pages([weight for weight in then.placed if weight.ndim == 2])
    twin, outer = model if found.twin is None else found.twin, (_running.state, _running.twin)
    if twin is not model:
        vars(twin).update({name: value for name, value in vars(model).items() if name not in CONTENTS})
    _running.state, _running.twin = found, twin
    try:
        yield twin
    finally:
        _running.state, _running.twin = outer


def _can_run(model: nn.Module) -> bool:
    weight = next(model.parameters(), None)
    if torch.compiler.is_compiling() or type(weight) not in (nn.Parameter, Tensor) or not weight.is_cpu:
        return False
    followed = is_in_torch_dispatch_mode() or torch._C._functorch.peek_interpreter_stack() is not None
    if followed or torch.is_grad_enabled() or torch.jit.is_tracing():
        return False
    return _KEPT.get(model, True) is not None


def held(model: nn.Module) -> nn.Module:
    """The twin of a model that runs in this thread; else the model."""
    found = _running.state
    then = found and found.snapshot
    return _running.twin if then and then.model() is model else model


def once(part: nn.Module, key: Hashable, make: Callable[[], Any], *, of_numbers: bool = False) -> Any:
    """What `make` gives of a part of a model or its twin, made once for each state of the model that runs.

    None is not kept: what cannot be made now may be later. What is made `of_numbers` of weights, not of where they lie,
    is made again after edits in place.
    """
    found = _running.state
    if found is None or found.snapshot is None or id(part) not in found.parts:
        return make()
    key, kept = (id(part), key), found.made
    if of_numbers:
        key, kept = (*key, _autocast()), found.tables
    made = kept.get(key)
    if made is None:
        made = kept[key] = make()
    return made


def of_numbers(model: nn.Module, key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` gives of a model's numbers, remembered for as long as the model lives and its weights stay."""
    found = state(model)
    if found.twin is not model:  # whose state keeps it alive, and is kept
        _WITH_TABLES[model] = found
    key = key, _autocast()
    if key not in found.tables:
        found.tables[key] = make()
    return found.tables[key]


def _autocast() -> tuple:
    """How autocast rounds here what is made of numbers."""
    return tuple(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda"))


CONTENTS = "_parameters", "_buffers", "_modules"
KNOWN = "fastprior", "diffusers"
_TWINS: weakref.WeakKeyDictionary[nn.Module, tuple[list[nn.Module], list[nn.Module]]] = weakref.WeakKeyDictionary()


def twin_of(model: nn.Module) -> nn.Module:
    """A model of the same weights, for runs without gradients, in which nobody replaces any.

    `weight.data = …` in one thread is seen in the middle of an operation of another, which may read memory that is free
    then. What the twin holds are aliases, that go on pointing to what was replaced; edits in place they see. For other
    states of the model it is the same object, with other aliases where weights were replaced.

    Returns:
        the model itself where something in it is of an unknown kind, which may keep what is the model's own.
    """
    modules = list(model.modules())
    if not all(_is_known(module) for module in modules):
        return model
    twins, inner = _TWINS.get(model, ([], []))
    same = len(modules) == len(twins) and all(map(operator.is_, inner, modules[1:]))
    if not same or any(type(twin) is not type(module) for twin, module in zip(twins, modules)):
        twins = [object.__new__(type(module)) for module in modules]
        _TWINS[model] = twins, modules[1:]
    of = dict(zip(map(id, modules), twins))
    for module, twin in zip(modules, twins):
        own, before = dict(vars(module)), vars(twin)
        own["_modules"] = {name: part if part is None else of[id(part)] for name, part in module._modules.items()}
        for kind in CONTENTS[:2]:
            kept = before.get(kind, {})
            own[kind] = {name: _alias(weight, kept.get(name)) for name, weight in own[kind].items()}
        before.update(own)
    return twins[0]


def _is_known(module: nn.Module) -> bool:
    home, weights = type(module).__module__, (*module._parameters.values(), *module._buffers.values())
    known = home.split(".")[0] in KNOWN or home.startswith("torch.nn.modules.")
    return known and all(type(weight) in (nn.Parameter, Tensor, type(None)) for weight in weights)


def _alias(weight: Tensor | None, before: Tensor | None) -> Tensor | None:
    """Its numbers under another name, the one from before where they are the same."""
    if weight is None:
        return None
    alias = weight.data
    same = before is not None and alias.data_ptr() == before.data_ptr() and alias.dtype == before.dtype
    return before if same and (alias.shape, alias.stride()) == (before.shape, before.stride()) else alias
