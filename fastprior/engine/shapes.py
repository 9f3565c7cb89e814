"""Few fixed shapes for compiled steps: batches and texts are padded to the nearest, so that few graphs serve all."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from types import FunctionType

import torch

from fastprior.checks import MOST, is_integer
from fastprior.reading import quoted

BATCH_SIZES = 1, 8, 64
TEXT_TOKENS = 16  # of which text lengths are multiples


def check_batch_sizes(batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """Sort different batch sizes. Raises ValueError unless there is one, and all are at least 1."""
    listed = isinstance(batch_sizes, Collection) and not isinstance(batch_sizes, (str, bytes))
    if not listed or not batch_sizes or not all(is_integer(size) and 1 <= size <= MOST for size in batch_sizes):
        rule = f"it must hold at least one number, each at least 1 and at most {MOST:,}"
        raise ValueError(f"batch_sizes={quoted(batch_sizes)}; {rule}")
    return tuple(sorted(set(batch_sizes)))


def parts(batch_sizes: Sequence[int], prompts: int) -> list[tuple[slice, int]]:
    """Which prompts run together, and the batch size (of those in order) that they are padded to."""
    most = batch_sizes[-1]
    found = [slice(at, min(at + most, prompts)) for at in range(0, prompts, most)]
    return [(part, min(size for size in batch_sizes if size >= part.stop - part.start)) for part in found]


def text_length(tokens: int, longest: int) -> int:
    """The length that a text is padded to: 16, 32, 48, …, or the longest there is."""
    return min(-(-tokens // TEXT_TOKENS) * TEXT_TOKENS, longest)


def cpp_compiler() -> tuple[str, str | None]:
    """The C++ compiler that torch.compile takes on the CPU, and where it is; None where it is not there."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return name, shutil.which(shlex.split(name)[0])


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs for a device; a warning says so where it has not."""
    name, found = cpp_compiler()
    if found or device.type != "cpu":
        return True
    message = f"steps run eagerly, and slower: torch.compile needs a C++ compiler, and {name} is none (CXX names it)"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return False


def compiled(function: Callable, **kwargs) -> Callable:
    """The function compiled for tensors of one shape: call this once for each shape.

    torch.compile counts recompilations by code object, so each takes one of its own.
    """
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, **kwargs)
