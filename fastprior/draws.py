"""Random draws, which wait while a CUDA graph is captured."""

from __future__ import annotations

import contextlib
import threading

import torch
from torch import Tensor

capturing = threading.RLock()  # a process may have one capture at a time
_nothing = contextlib.nullcontext()


def drawing(device: torch.device, generator: torch.Generator | None = None) -> contextlib.AbstractContextManager:
    """Hold draws of random numbers while a capture is under way, where these would fail: from the default generators.

    A capture takes them over for the whole process (torch 2.11 says "Offset increment outside graph capture").

    Args:
        device: where is drawn.
        generator: the device's default one where None.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return _nothing
    return capturing if generator is None or generator in torch.cuda.default_generators else _nothing


def randn_like(t: Tensor) -> Tensor:
    """Standard normal noise of its shape, dtype and device, from the default generator."""
    with drawing(t.device):
        return torch.randn_like(t)


def prob_mask_like(shape: tuple[int, ...], prob: float, device) -> Tensor:
    """A bool tensor whose elements are True with probability `prob`; 0 and 1 draw no random numbers."""
    if prob in (0, 1):
        # a trace of torch.jit keeps no bool as what to fill with
        return torch.full(shape, float(prob), dtype=torch.bool, device=device)
    drawn = torch.zeros(shape, device=device)
    with drawing(drawn.device):
        return drawn.uniform_(0, 1) < prob
