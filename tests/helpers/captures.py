"""In place of CUDA graphs where there is no GPU: operations recorded once, and run again on the same tensors."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastprior.engine import graphs

# they wait for the device, or what they return depends on values: a capture ends there
REFUSED = "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"
REFUSED += ("lift_fresh",)  # a tensor of Python's numbers
FAR = {torch.int64: 2**40, torch.int32: 2**20}  # indices that no table has


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


def _address(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _whole(t: torch.Tensor) -> torch.Tensor:
    """All of a tensor's memory, flat, in its dtype."""
    storage = t.untyped_storage()
    return torch.empty(0, dtype=t.dtype).set_(storage, 0, (storage.nbytes() // t.element_size(),))


def _poison(t: torch.Tensor) -> None:
    t.fill_(float("nan") if t.is_floating_point() else FAR.get(t.dtype, True))


class Tape(TorchDispatchMode):
    """Records operations; each reads and writes where it did, and no Python of the recorded function runs again.

    As in a capture nothing is computed before the first replay: when the recording ends, what it made holds garbage,
    and what was there before, such as buffers that it wrote to, what it held.
    """

    def __init__(self):
        super().__init__()
        self.calls = []
        self.before = {}  # by address, tensors that were there and are written to, and what they held
        self.made = {}  # by address, tensors that are new

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.name().split("::")[1].split(".")[0], kwargs or {}
        index = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in REFUSED or any(t.dtype == torch.bool for t in _tensors(index)):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for argument, value in zip(func._schema.arguments, (*args, *[None] * len(func._schema.arguments))):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in _tensors(kwargs.get(argument.name, value)):
                    if _address(t) not in self.made and _address(t) not in self.before:
                        self.before[_address(t)] = _whole(t), _whole(t).clone()
        out = func(*args, **kwargs)
        given = {_address(t) for t in _tensors((args, kwargs))}
        written = [t for t in _tensors(out) if _address(t) not in given]
        self.made |= {_address(t): t for t in written}
        self.calls.append((func, args, kwargs, out, written))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for t in self.made.values():
            _poison(_whole(t))
        for t, value in self.before.values():
            t.copy_(value)

    def replay(self) -> None:
        with torch._C._DisableAutocast():  # whose casts were recorded, too
            for func, args, kwargs, out, written in self.calls:
                again = func(*args, **kwargs)
                for kept, new in zip(_tensors(out), _tensors(again)):
                    if any(kept is t for t in written):
                        kept.copy_(new)


def capture(run, device, pool, warmups=graphs.WARMUPS):
    """As `graphs.capture`: what was recorded runs again; each counts as 1000 bytes."""
    for _ in range(warmups):
        run()
    tape = Tape()
    with tape:
        run()
    return tape.replay, None, 1000
