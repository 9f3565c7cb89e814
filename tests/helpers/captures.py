"""In place of CUDA graphs where there is no GPU: operations recorded once, and run again on the same tensors."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# they wait for the device, or what they return depends on values: a capture ends there
REFUSED = "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"
REFUSED += ("lift_fresh",)  # a tensor of Python's numbers


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


class Tape(TorchDispatchMode):
    """Records operations; each reads and writes where it did, and no Python of the recorded function runs again."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        index = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in REFUSED or any(t.dtype == torch.bool for t in _tensors(index)):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        written = [t for t in _tensors(out) if t.untyped_storage().data_ptr() not in given]
        self.calls.append((func, args, kwargs or {}, out, written))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out, written in self.calls:
            again = func(*args, **kwargs)
            for kept, new in zip(_tensors(out), _tensors(again)):
                if any(kept is t for t in written):
                    kept.copy_(new)


def capture(run, device, pool):
    """As `graphs.capture`: what was recorded runs again; each counts as 1000 bytes."""
    run()  # as warming up does
    tape = Tape()
    with tape:
        run()
    return tape.replay, None, 1000
