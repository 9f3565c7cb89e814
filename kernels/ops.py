"""The operations that models call: Triton kernels on CUDA; on the CPU linears of few rows in C, else the reference.

`FASTPRIOR_KERNELS=reference` or `triton`, read when this is imported, forces one; on the CPU Triton's kernels run only
in its interpreter (`TRITON_INTERPRET=1`). fp64 always takes the reference. Arguments: see `kernels.reference`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import reference
from .cpu import attention as cpu_attention
from .cpu import blocks as cpu_blocks
from .cpu import linear as cpu_linear
from .cpu import run as cpu_run
from .cpu import threads as cpu_threads
from .gpu import workspace

BACKENDS = "reference", "triton"
OPERATIONS = "layer_norm", "attention", "decode_attention", "diffusion_step", "linear"
HAS_TRITON = importlib.util.find_spec("triton") is not None

_forced = os.environ.get("FASTPRIOR_KERNELS") or None
if _forced not in (None, *BACKENDS):
    raise ValueError(f"FASTPRIOR_KERNELS={_forced!r}; it must be unset, 'reference' or 'triton'")


def forced() -> str | None:
    """The backend that is forced, if one is."""
    return _forced


@contextlib.contextmanager
def using(backend: str | None) -> Iterator[None]:
    """Force "reference" or "triton", or with None let the device decide, within the block."""
    global _forced
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend={backend!r}; it must be None, 'reference' or 'triton'")
    outer, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = outer


def on_triton(x: Tensor) -> bool:
    """Whether an operation on x runs as a Triton kernel."""
    if x.dtype == torch.float64:
        return False
    if _forced is None:
        return x.is_cuda and HAS_TRITON
    return _forced == "triton"


def launcher(name: str) -> Callable | None:
    """What an operation such as "fastprior::linear" runs, where that launches Triton's kernels; else None."""
    if not HAS_TRITON:
        return None
    from .gpu import launch

    return launch.LAUNCHERS.get(name)


# imported on first use: the kernels need triton, and most of its import time is not torch's


def layer_norm(x: Tensor, *args, **kwargs) -> Tensor | tuple[Tensor, Tensor]:
    if on_triton(x):
        from .gpu.norm import layer_norm as run
    else:
        run = reference.layer_norm
    return run(x, *args, **kwargs)


def attention(q: Tensor, *args, **kwargs) -> Tensor:
    if on_triton(q):
        from .gpu.attention import attention as run
    else:
        run = reference.attention
    return run(q, *args, **kwargs)


def decode_attention(q: Tensor, *args, dropout: float = 0.0, **kwargs) -> Tensor:
    if on_triton(q) and not dropout:  # which only training has
        from .gpu.decode import decode_attention as run

        return run(q, *args, **kwargs)
    takes = _forced is None and cpu_attention.takes_decode(q, *args, dropout=dropout, **kwargs)
    run = cpu_attention.decode_attention if takes else reference.decode_attention
    return run(q, *args, dropout=dropout, **kwargs)


def diffusion_step(x: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    if on_triton(x):
        from .gpu.step import diffusion_step as run
    else:
        run = reference.diffusion_step
    return run(x, *args, **kwargs)


def linear(x: Tensor, *args, **kwargs) -> Tensor:
    if on_triton(x) and not torch.is_autocast_enabled(x.device.type):  # which casts for PyTorch's own linear alone
        from .gpu.linear import linear as run
    elif _forced is None and cpu_linear.takes_linear(x, *args, **kwargs):
        run = cpu_linear.linear
    else:
        run = reference.linear
    return run(x, *args, **kwargs)


Block, Blocks, Run = cpu_blocks.Block, cpu_blocks.Blocks, cpu_run.Run
one_thread = cpu_threads.one_thread
Workspace, sharing = workspace.Workspace, workspace.sharing


def prepare_blocks(*args, **kwargs) -> Blocks | None:
    """See `kernels.cpu.blocks`."""
    return cpu_blocks.prepare_blocks(*args, **kwargs) if _forced is None else None


def most_tokens(blocks: Blocks) -> int:
    """That one call of `run_blocks` takes."""
    return cpu_blocks.most_tokens(blocks.dtype)


def prepare_run(blocks: Blocks | None, *args, **kwargs) -> Run | None:
    """See `kernels.cpu.run`; None without blocks, too."""
    return None if blocks is None or _forced is not None else cpu_run.prepare_run(blocks, *args, **kwargs)


def run_blocks(x: Tensor, blocks: Blocks | None, *args, **kwargs) -> Tensor | None:
    """See `kernels.cpu.blocks`; None for what it does not take, and without blocks."""
    if blocks is None or _forced is not None or not cpu_blocks.takes_blocks(x, blocks, *args, **kwargs):
        return None
    return cpu_blocks.run_blocks(x, blocks, *args, **kwargs)
