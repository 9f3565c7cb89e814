"""What runs below autograd, and what is kept for it."""

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Trace(TorchDispatchMode):
    """Notes each operation as (name, arguments that are tensors, results)."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        results = out if isinstance(out, tuple | list) else (out,)
        tensors = [[t for t in found if isinstance(t, Tensor)] for found in (args, results)]
        self.calls.append((str(function).removeprefix("aten."), *tensors))
        return out

    def of(self, *names: str) -> list[tuple[str, list[Tensor], list[Tensor]]]:
        """The calls of operations whose names begin so."""
        return [call for call in self.calls if call[0].startswith(names)]


@contextlib.contextmanager
def kept_for_backward():
    """The memory that autograd keeps, each piece once."""
    kept = {}

    def note(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage()._cdata, t.untyped_storage())
        return t

    found: list[torch.UntypedStorage] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield found
    found += kept.values()
