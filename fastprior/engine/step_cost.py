"""What a denoising step costs: the bytes that it reads, the kernels that it launches, and how long both should take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastprior.engine.steps import StepInputs
from fastprior.kernels import ops

LAUNCH_SECONDS = 1.7e-6
NO_KERNEL = "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"


class StepReads(NamedTuple):
    """Bytes that a step reads.

    Attributes:
        weights: of the transformer's matrices.
        prefix: of keys and values of the prefix.
        tables: of the transformer's vectors, bias and rotary tables, and a row each of the tables of the run.
    """

    weights: int
    prefix: int
    tables: int


def step_reads(modules: Iterable[nn.Module], prefix: Iterable[Tensor], tables: Iterable[Tensor | None]) -> StepReads:
    """Count what a step reads whose tokens pass some modules, behind a prefix; `tables` are what else it reads."""
    weights = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    vectors = *(t for t in weights if t.ndim == 1), *(t for t in tables if t is not None)
    return StepReads(*(sum(t.nbytes for t in read) for read in ((t for t in weights if t.ndim == 2), prefix, vectors)))


def step_seconds(read_bytes: int, bandwidth: float, launches: int) -> float:
    """`read_bytes / bandwidth + launches * 1.7e-6`: how long a step of few rows should take on a GPU.

    Reading comes at full bandwidth, and each kernel waits for the one before. That takes 1.7 µs a phase in the fastest
    decoder known to us: one kernel that reads Llama-1B in about 120 phases at 78 % of the bandwidth of an H100
    (Spector et al. 2025, Look Ma, No Bubbles!). Arithmetic is left out: up to about 60 rows of 16 bits it is hidden.

    Args:
        read_bytes: see `StepReads`.
        bandwidth: bytes per second.
        launches: kernels, one after the other; 0 on the CPU.
    """
    return read_bytes / bandwidth + launches * LAUNCH_SECONDS


class CountLaunches(TorchDispatchMode):
    """Counts the kernels that a GPU runs for what runs within it, in this thread: every node of a graph of it.

    Ours are those that their launchers choose; the launchers run, and nothing is launched. Each operation of PyTorch is
    one, but for those that give a view, or memory with nothing in it. torch.compile would fuse some of them.

    Attributes:
        count: of all of them.
        names: of each, in order.
    """

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self._workspace = ops.Workspace()

    @property
    def count(self) -> int:
        return len(self.names)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        launcher = ops.launcher(func.name()) if func.namespace == "fastprior" else None
        if launcher is None:
            out = func(*args, **(kwargs or {}))
            if _is_kernel(func, out):
                self.names.append(func.name())
            return out
        from fastprior.kernels.gpu import launch

        with launch.instead(self._note), ops.sharing(self._workspace), self:
            return launcher(*args, **(kwargs or {}))

    def _note(self, kernel, *_) -> None:
        self.names.append(kernel.__name__)


@torch.no_grad()
def count_launches(step: Callable, inputs: StepInputs, shape: tuple[int, int], device: torch.device) -> int:
    """Kernels that a `solver_step` of x of a shape launches without torch.compile; traced, and nothing runs.

    `inputs` say shapes and dtypes alone.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # which takes long to import

    with FakeTensorMode(allow_non_fake_inputs=True), CountLaunches() as launches, torch.device(device):
        inputs = tree_map(lambda t: torch.empty_like(t, device=device) if torch.is_tensor(t) else t, inputs)
        x, scale = (torch.zeros(size, dtype=inputs.rows.dtype) for size in (shape, ()))
        index = torch.zeros((), dtype=torch.int64)
        for _ in range(2):  # what the first clears is cleared
            launches.names.clear()
            step(inputs, scale, x, x, x, index)
    return launches.count


def _is_kernel(func, out) -> bool:
    tensors = [t for t in tree_leaves(out) if torch.is_tensor(t)]
    views = all(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return any(t.numel() for t in tensors) and not views and func.overloadpacket.__name__ not in NO_KERNEL
