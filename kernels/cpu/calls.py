"""What the calls of C share: checks of shapes, where the numbers of tensors lie, and operations that a trace keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .library import KINDS, aliases

ACTIVATIONS = {None: 0, "gelu": 1, "swiglu": 2}
FP32, FLOATS = (torch.float32,), (torch.float32, torch.bfloat16)
Array = tuple[str, Tensor | None, tuple[int, ...]]  # the name of an argument, what is given for it, and its shape

_operations = torch.library.Library("fastprior", "FRAGMENT")


def define_operation(schema: str, run: Callable, takes: Callable, fake: Callable) -> None:
    """Define an operation of `torch.ops.fastprior` on the CPU, which a trace keeps as one call.

    Args:
        schema: its name and arguments, see `torch.library`.
        run: what it does on the CPU.
        takes: whether it does, of the same arguments: those of the trace were asked, and may have been replaced.
        fake: the shapes and dtypes of its results.
    """
    name = schema.split("(")[0]

    def checked(*given):
        given = aliases(given)
        if any(t.dtype == torch.float64 for t in given if isinstance(t, Tensor)) or not takes(*given):
            found = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in given if isinstance(t, Tensor))
            raise ValueError(f"{name} was traced with other tensors, and does not take {found}")
        return run(*given)

    _operations.define(schema)
    _operations.impl(name, checked, "CPU")
    torch.library.register_fake(f"fastprior::{name}", fake, lib=_operations)


def check_shapes(arrays: Iterable[Array]) -> None:
    """Raise ValueError where a tensor that is given has another shape: C trusts its numbers."""
    for name, t, shape in arrays:
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be {tuple(shape)}")


def vectors_of(arrays: Sequence[Array], kept: list, others: Sequence[Array] = ()) -> list[tuple[int, int]]:
    """`structs.Vector` of each tensor, with no data where none is given, behind a check of all shapes.

    Args:
        kept: is given what has to be copied, because it does not lie side by side in fp32 or bf16.
        others: whose shapes are checked before.
    """
    check_shapes(others)
    check_shapes(arrays)
    found = (t if t is None else _side_by_side(t, FLOATS, kept) for _, t, _ in arrays)
    return [(0, 0) if t is None else (t.data_ptr(), KINDS[t.dtype]) for t in found]


def addresses_of(arrays: Sequence[Array], kept: list, others: Sequence[Array] = ()) -> list[int]:
    """Where the numbers of each tensor lie in fp32; see `vectors_of`."""
    check_shapes(others)
    check_shapes(arrays)
    return [0 if t is None else _side_by_side(t, FP32, kept).data_ptr() for _, t, _ in arrays]


def _side_by_side(t: Tensor, dtypes: tuple[torch.dtype, ...], kept: list) -> Tensor:
    if t.dtype not in dtypes or not t.is_contiguous():
        t = t.float().contiguous()
        kept.append(t)
    return t
