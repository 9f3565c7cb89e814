"""Whole steps of a run on the CPU, in one call: calls of `c/run.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import calls, structs
from .blocks import Blocks, blocks_of, takes_blocks
from .library import library, thread_count

CLAMPS = {None: 0, "range": 1, "l2": 2}


class Run:
    """A run whose steps are calls of C; from `prepare_run`.

    Attributes:
        x: the state, (samples, dim) fp32, which a call overwrites.
        steps: how many there are.
    """

    def __init__(self, call: structs.Run, x: Tensor, x0: Tensor, kept: object, steps: int):
        self.x, self.steps = x, steps
        self._x0, self._call, self._kept, self._run = x0, call, kept, library().run_steps

    def start(self, x: Tensor) -> None:
        """Begin at x (samples, dim)."""
        calls.check_shape("x", x, *self.x.shape)
        self.x.copy_(x)
        self._x0.zero_()

    def __call__(self, first: int, noise: Sequence[Tensor | None]) -> None:
        """Some steps that follow each other.

        Args:
            first: the number of the first.
            noise: that of each step, (samples, dim), or None.
        Raises:
            IndexError: there are not so many steps.
        """
        kept, count = [], len(noise)
        if not 0 <= first <= first + count <= self.steps:
            raise IndexError(f"steps {first} to {first + count - 1}; there are {self.steps}")
        for drawn in noise:
            calls.check_shape("noise", drawn, *self.x.shape)
        pointers = (ctypes.c_void_p * count)(*(calls.address_of(drawn, kept) for drawn in noise))
        calls.check_memory(self._run(self._call, pointers, first, count, thread_count()), self.x)


def prepare_run(
    blocks: Blocks,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    rows: int,
    samples: int,
    time_tokens: Tensor,
    query: Tensor,
    coefficients: Tensor,
    null_table: Tensor,
    cond_scale: float,
    clamp: str | None = None,
    radius: float = 1.0,
    rotary: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
) -> Run | None:
    """A run, each step of which makes its tokens, runs all blocks, and does `reference.diffusion_step`.

    A row holds the time's tokens, the noisy embeddings of its samples, and as many queries. None where `run_blocks`
    does not take this, or what the head gives is no embedding.

    Args:
        blocks, prefix_k, prefix_v, rotary, bias: see `run_blocks`.
        rows, samples: how many rows, and samples in each; those of one prompt lie together.
        time_tokens: (steps, tokens, dim) fp32.
        query: (dim,).
        coefficients: (steps, 6) fp32, the table of `reference.diffusion_step`, as are the next.
        null_table: (steps, dim) fp32; zeros leave predictions as they are.
        cond_scale, clamp, radius: see there.
    """
    steps, times, dim = time_tokens.shape
    x = torch.empty(rows * samples, dim, dtype=torch.float32, device="cpu")
    x0, suffix = torch.empty_like(x), times + 2 * samples
    given, (cos, sin) = (prefix_k, prefix_v, time_tokens, coefficients, null_table), rotary or (None, None)
    kept = [blocks, query, cos, sin, bias, *given]
    if not blocks.has_head or blocks.shape[-1] != dim or not calls.are_plain(query, *given):
        return None
    tokens = x.new_empty(rows, suffix, 0)
    taken = takes_blocks(tokens, blocks, prefix_k, prefix_v, rotary=rotary, bias=bias)
    if not taken or any(t.dtype != torch.float32 for t in given):
        return None
    calls.check_shape("query", query, dim)
    calls.check_shape("coefficients", coefficients, steps, 6)
    calls.check_shape("null_table", null_table, steps, dim)
    call = structs.Run(
        blocks=blocks_of(
            rows, suffix, blocks.table, prefix_k, prefix_v, samples, blocks.shape, blocks.scale, cos, sin,
            blocks.cosine, bias, None, blocks.activation, blocks.eps, kept,
        ),
        time=calls.address_of(time_tokens, kept), null=calls.address_of(null_table, kept),
        coefficients=calls.address_of(coefficients, kept), query=calls.vector_of(query, kept),
        x=x.data_ptr(), x0=x0.data_ptr(), clamp=CLAMPS[clamp], cond_scale=cond_scale, radius=radius,
    )  # fmt: skip
    return Run(call, x, x0, kept, steps)
