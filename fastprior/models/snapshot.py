"""Noticing that a model is no longer what it was: other weights, in-place edits, other modules, hooks or adapters."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

SAMPLE = 64  # neighbouring elements of each weight that are compared


class Snapshot:
    """The modules and weights of a model as they were; it does not keep the model itself alive."""

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        # one level deep: hooks, parameters and what peft switches are in dicts and lists of the modules
        self.states = [(vars(module), _copy(vars(module))) for module in modules[1:]]
        parts = model._parameters, model._modules, model._forward_hooks, model._forward_pre_hooks
        self.states += [(part, dict(part)) for part in parts]
        self.weights = [
            (module._parameters, name, weight, None if weight.is_inference() else weight._version, weight.data_ptr())
            for module in modules
            for name, weight in module._parameters.items()
            if weight is not None
        ]
        self.views = [_middle(weight.detach()) for _, _, weight, _, _ in self.weights]
        self.sample = torch.cat(self.views)

    def same_weights(self) -> bool:
        """Whether every weight is the tensor it was, with no edit that autograd counted."""
        return all(
            owner.get(name) is weight
            and weight.data_ptr() == address
            and (version is None or weight._version == version)
            for owner, name, weight, version, address in self.weights
        )

    def same_modules(self) -> bool:
        """Whether no module, hook, adapter or other attribute changed."""
        try:
            return all(now == then for now, then in self.states)
        except (RuntimeError, ValueError):  # another tensor or array stands there: that has no one truth value
            return False

    def same_values(self) -> bool:
        """Whether no whole weight was edited behind autograd's back, as `weight.data.copy_` does it."""
        return torch.equal(torch.cat(self.views), self.sample)


def _copy(state: dict) -> dict:
    copies = {name: type_(value) for name, value in state.items() for type_ in (dict, list) if isinstance(value, type_)}
    return state | copies


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
