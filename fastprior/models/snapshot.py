"""Noticing that a model is no longer what it was: other weights, in-place edits, other modules, hooks or adapters."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

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
        self.counted = [part for part in parts if not part.is_inference()]
        self.versions = [part._version for part in self.counted]
        self.views = [_middle(part.detach()) for part in parts if part.device == parts[0].device]
        self.sample = torch.cat(self.views) if self.views else None

    def same_weights(self) -> bool:
        """Whether every weight and buffer is the tensor it was, with no edit that autograd counted."""
        return (
            all(owner.get(name) is weight for owner, name, weight in self.weights)
            and [part.data_ptr() for part in self.placed] == self.addresses
            and [part._version for part in self.counted] == self.versions
        )

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
    """Stands for a model's modules and weights as they were."""

    def __init__(self, model: nn.Module):
        self.snapshot: Snapshot | None = Snapshot(model)


def state(model: nn.Module) -> State:
    """The state of a model: the same object for as long as nothing changes in the model, and the caller keeps it."""
    found = _STATES[model]() if model in _STATES else None
    then = found and found.snapshot
    if not (then and then.same_weights() and then.same_modules() and then.same_values()):
        found = State(model)
        _STATES[model] = weakref.ref(found)
    return found


def forget(model: nn.Module) -> None:
    """Drop what is kept of a model: it holds its weights, also where they were."""
    found = _STATES.pop(model, lambda: None)()
    if found is not None:
        found.snapshot = None
