"""Whole steps of a run on the CPU, in one call: calls of `c/run.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import Rotary
from . import calls, library, structs
from .blocks import Blocks, blocks_of, takes_blocks

CLAMPS = {None: 0, "range": 1, "l2": 2}


class Run:
    """A run whose steps are calls of C; from `prepare_run`.

    Attributes:
        x: the state, (samples, dim) fp32, which a call overwrites.
        steps: how many there are.
    """

    def __init__(self, call: structs.Run, x: Tensor, x0: Tensor, kept: object, steps: int):
        self.x, self.steps = x, steps
        self._x0, self._call, self._kept = x0, call, kept

    def start(self, x: Tensor) -> None:
        """Begin at x (samples, dim)."""
        calls.check_shapes([("x", x, self.x.shape)])
        self.x.copy_(x)
        self._x0.zero_()

    def __call__(self, first: int, noise: Sequence[Tensor | None]) -> None:
        """Some steps that follow each other.

        Args:
            first: the number of the first.
            noise: that of each step, (samples, dim) on the CPU, or None.
        Raises:
            IndexError: there are not so many steps.
        """
        kept, count, shape = [], len(noise), self.x.shape
        if not 0 <= first <= first + count <= self.steps:
            raise IndexError(f"steps {first} to {first + count - 1}; there are {self.steps}")
        noise = library.aliases(noise)
        addresses = calls.addresses_of([("noise", drawn, shape) for drawn in noise], kept)
        library.run("run_steps", self._call, (ctypes.c_void_p * count)(*addresses), first, count, x=self.x)


def prepare_run(
    blocks: Blocks | None,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    rows: int,
    samples: int,
    time_tokens: Tensor,
    query: Tensor,
    coefficients: Tensor,
    null_table: Tensor,
    cond_scale: float | Tensor,
    clamp: str | None = None,
    radius: float = 1.0,
    rotary: Rotary | None = None,
    bias: Tensor | None = None,
) -> Run | None:
    """A run, each step of which makes its tokens, runs all blocks, and does `diffusion_step`.

    A row holds the time's tokens, the noisy embeddings of its samples, and as many queries. None without blocks, where
    `run_blocks` does not take this, or what the head gives is no embedding.

    Args:
        blocks, prefix_k, prefix_v, rotary, bias: see `run_blocks`.
        rows, samples: how many rows, and samples in each; those of one prompt lie together.
        time_tokens: (steps, tokens, dim) fp32.
        query: (dim,).
        coefficients: (steps, 6) fp32, the table of `diffusion_step`, as are the next.
        null_table: (steps, dim) fp32; zeros leave predictions as they are.
        cond_scale, clamp, radius: see there; a scale may also be (samples of all rows,).
    """
    steps, times, dim = time_tokens.shape
    if blocks is None or not blocks.has_head or blocks.shape[-1] != dim:
        return None
    suffix = times + 2 * samples
    tensors = prefix_k, prefix_v, time_tokens, coefficients, null_table, query, bias, *(rotary or (None, None))
    found = library.take(tensors)
    if found is None or not takes_blocks(blocks, rows * suffix, suffix, found[:5]):
        return None
    prefix_k, prefix_v, time_tokens, coefficients, null_table, query, bias, cos, sin = found
    x = torch.empty(rows * samples, dim, dtype=torch.float32, device="cpu")
    scale = torch.as_tensor(cond_scale, dtype=torch.float64).cpu().expand(rows * samples).contiguous()
    x0, kept = torch.empty_like(x), [blocks, scale, *found]
    arrays = [
        ("time_tokens", time_tokens, (steps, times, dim)), ("coefficients", coefficients, (steps, 6)),
        ("null_table", null_table, (steps, dim)),
    ]  # fmt: skip
    time, coefficients, null = calls.addresses_of(arrays, kept)
    (query,) = calls.vectors_of([("query", query, (dim,))], kept)
    call = structs.Run(
        blocks=blocks_of(
            kept, rows, suffix, blocks.table, prefix_k, prefix_v, samples, blocks.shape, blocks.scale, cos, sin,
            blocks.cosine, bias, None, blocks.activation, blocks.eps,
        ),
        time=time, null=null, coefficients=coefficients, query=query,
        x=x.data_ptr(), x0=x0.data_ptr(), cond_scale=scale.data_ptr(), clamp=CLAMPS[clamp],
        radius=radius,
    )  # fmt: skip
    return Run(call, x, x0, kept, steps)
