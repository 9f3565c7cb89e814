"""Memory between the programs of a split sum, which one run owns: its launches come one after the other."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

COUNTERS = 256  # tiles of a split sum, at most: see `linear.linear_config`
_local = threading.local()


class Workspace:
    """Partial sums and counters for launches on one stream at a time.

    Partial sums grow to the largest that was asked for: a CUDA graph must be captured with one that has its size, and
    keeps it. Counters are cleared once: each launch leaves them zero.
    """

    def __init__(self):
        self._sums = self._counters = None

    @property
    def tensors(self) -> list[Tensor]:
        """All its memory."""
        return [t for t in (self._sums, self._counters) if t is not None]

    def sums(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory of a shape, fp32, on the device of `like`; it holds what launches before left there."""
        from . import launch  # which needs triton, as those have that ask for this

        size = math.prod(shape)
        if self._sums is None or self._sums.device != like.device or len(self._sums) < size:
            self._sums = launch.empty((size,), like, torch.float32)
        return self._sums[:size].view(shape)

    def counters(self, count: int, like: Tensor) -> Tensor:
        """(count,) int32 zeros, at most `COUNTERS`, on the device of `like`."""
        if self._counters is None or self._counters.device != like.device:
            self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device=like.device)
        return self._counters[:count]


@contextlib.contextmanager
def sharing(workspace: Workspace | None = None) -> Iterator[Workspace]:
    """Let all kernels of a run share a workspace: the given one, else that of a block around this, else a new one.

    It is for this thread, and must not be in use on another stream meanwhile.
    """
    outer = getattr(_local, "workspace", None)
    _local.workspace = workspace or outer or Workspace()
    try:
        yield _local.workspace
    finally:
        _local.workspace = outer


def current() -> Workspace:
    """The workspace that this thread shares; else a new one."""
    return getattr(_local, "workspace", None) or Workspace()
