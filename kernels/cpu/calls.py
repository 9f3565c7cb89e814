"""What the calls of C share: which tensors may reach it, where their numbers lie, and the checks of their shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .library import KINDS, most_rows

ACTIVATIONS = {None: 0, "gelu": 1, "swiglu": 2}
FLOATS = torch.float32, torch.bfloat16

_operations = torch.library.Library("fastprior", "FRAGMENT")


def define_operation(schema: str, run: Callable, fake: Callable) -> None:
    """Define an operation of `torch.ops.fastprior` on the CPU, which a trace keeps as one call.

    Args:
        schema: its name and arguments, see `torch.library`.
        run: what it does on the CPU.
        fake: the shapes and dtypes of its results.
    """
    name = schema.split("(")[0]
    _operations.define(schema)
    _operations.impl(name, run, "CPU")
    torch.library.register_fake(f"fastprior::{name}", fake, lib=_operations)


def is_watched() -> bool:
    """Whether a mode, a transform, forward-mode gradients or a trace follow operations: C would pass them by."""
    if torch.compiler.is_compiling():  # which sees an operation of its own
        return False
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    return transformed or is_in_torch_dispatch_mode() or torch.jit.is_tracing()


def are_numbers(tensors: Sequence[Tensor]) -> bool:
    """Whether these are on the CPU, not in fp64, and not of a subclass that keeps others."""
    return all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype != torch.float64 for t in tensors)


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether those that are given are numbers without gradient."""
    tensors = [t for t in tensors if t is not None]
    return are_numbers(tensors) and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def vector_of(t: Tensor | None, kept: list, first: int = 0) -> tuple[int, int]:
    """`structs.Vector` of a tensor from an element on; what has to be copied for it is kept."""
    if t is None:
        return 0, 0
    if t.dtype not in FLOATS or not t.is_contiguous():
        t = t.float().contiguous()
        kept.append(t)
    return t.data_ptr() + (first and first * t.element_size()), KINDS[t.dtype]


def address_of(t: Tensor | None, kept: list) -> int:
    """Where contiguous numbers in fp32 lie; what has to be copied for that is kept."""
    if t is None:
        return 0
    if t.dtype != torch.float32 or not t.is_contiguous():
        t = t.float().contiguous()
        kept.append(t)
    return t.data_ptr()


def check_memory(failed: int, x: Tensor) -> None:
    """Raise MemoryError where a call of C says that it failed."""
    if failed:
        raise MemoryError(f"no memory to lay out x of shape {tuple(x.shape)}")


def check_shape(name: str, t: Tensor | None, *shape: int) -> None:
    """Raise ValueError where a tensor that is given has another shape: C trusts its numbers."""
    if t is not None and t.shape != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be {shape}")


def check_rows(rows: int) -> None:
    """Raise ValueError for more rows than C takes, or none."""
    most = most_rows(torch.float32)
    if not 0 < rows <= most:
        raise ValueError(f"x has {rows} rows; they must be 1 to {most}")
