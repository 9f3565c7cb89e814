"""How many threads compute on the CPU: no more than there are cores for, and one alone what is little."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .library import library, unavailable

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OF_PROCESS = Path("/proc/self/cgroup")
LITTLE = 2**19  # numbers, on which an operation takes one thread a tenth of a millisecond

_outer = threading.local()


def _read_quota(group: Path) -> float | None:
    """Cores that a control group of either version pays for; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return None if quota < 0 else quota / period
    return None


@functools.cache
def quota() -> float | None:
    """Cores that the control groups of this process pay for, as a container's limit says; None without a limit.

    Read once. A group may be limited by any that it lies in.
    """
    with contextlib.suppress(OSError):
        found = []
        for line in OF_PROCESS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = CONTROL_GROUPS / "cpu" if controllers else CONTROL_GROUPS
            group = root / path.lstrip("/")
            while group != root.parent:
                found.append(_read_quota(group))
                group = group.parent
        return min((cores for cores in found if cores), default=None)
    return None


def thread_count() -> int:
    """Threads of a kernel: `torch.get_num_threads()`, but not more than the process has cores, or is paid for.

    More would take turns on the same cores, and be waited for at each of several meetings a layer.
    """
    wanted = getattr(_outer, "threads", None) or torch.get_num_threads()
    if wanted == 1:
        return 1
    paid = quota()
    cores = max(1, library().omp_get_num_procs())
    return min(wanted, cores if paid is None else min(cores, max(1, -int(-paid // 1))))


def one_thread(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Within the block PyTorch computes on this thread alone, where x lies on the CPU and is little; kernels do not.

    A second thread gains nothing there, and where another process has its core it is waited for.
    """
    if torch.compiler.is_compiling() or not x.is_cpu or x.numel() > LITTLE:  # a trace keeps no number of threads
        return contextlib.nullcontext()
    return _one_thread()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    if threads == 1 or unavailable():
        yield
        return
    _outer.threads = threads
    library().set_threads(1)  # of this thread alone
    try:
        yield
    finally:
        library().set_threads(threads)
        _outer.threads = None
