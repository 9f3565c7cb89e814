"""How fast a machine is: seconds of a call, and the bandwidth of its memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of reading a tensor larger than the caches, best of several."""
    x = torch.ones(2**28, device=device)  # 1 GiB
    return x.nbytes / min(seconds(x.sum, device) for _ in range(8))
