"""Runs of one shape on buffers of their own, which CUDA graphs replay: a step is one launch, whatever is in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastprior.network import Conditioning
from fastprior.sampler import map_rows

WARMUPS = 3  # runs before a capture: lazy initialisation and compilation must not happen within


Pool = tuple[int, int]  # of memory, as torch.cuda.CUDAGraph names it


def capture(run: Callable[[], None], device: torch.device, pool: Pool | None) -> tuple[Callable[[], None], Pool, int]:
    """Record what `run` launches, after a few plain runs on a side stream.

    Returns:
        what launches it again; the pool of its memory, and by how many bytes that grew.

    `run` must take its inputs from tensors that stay where they are, and leave its results in such tensors.
    Raises RuntimeError where something in it cannot be captured, or there is too little memory.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool):
        before = torch.cuda.memory_reserved(device)  # in here: on entering, what is cached and free was given back
        run()
    return graph.replay, graph.pool(), torch.cuda.memory_reserved(device) - before


class StepGraph:
    """The prefill and the step of one batch size, in a pool of memory of their own.

    A pool that several batch sizes share would be as large as the largest of them needs, but give nothing back before
    the last is gone. One of their own is free as soon as this object is, and goes back to the device at the next
    `torch.cuda.empty_cache`, capture, or allocation that would fail otherwise. For sizes of 1, 8 and 64 that is a
    seventh more.

    Args:
        prefill: (text condition) to what `step` needs of it.
        step: (condition, cond_scale, x, x0, noise, index) to the next x and x0: see `sampler.denoise_step`.
        text_cond: an example of the text condition, whose shapes hold for all.
        shape: (rows, dim) of x.
        steps: of a run.

    Attributes:
        bytes: of the pool and the buffers.
    """

    def __init__(
        self,
        prefill: Callable[[dict], Conditioning],
        step: Callable[..., tuple[Tensor, Tensor]],
        text_cond: dict,
        shape: tuple[int, int],
        steps: int,
    ):
        device = text_cond["text_embed"].device
        self.text_cond = map_rows(text_cond, torch.clone)
        self.scale = torch.ones((), device=device)
        self.x, self.x0, self.noise = torch.zeros(3, *shape, device=device)
        self.index = torch.zeros((), dtype=torch.int64, device=device)
        self.cond: Conditioning | None = None

        def run_prefill() -> None:
            self.cond = prefill(self.text_cond)

        def run_step() -> None:
            x, x0 = step(self.cond, self.scale, self.x, self.x0, self.noise, self.index)
            self.x.copy_(x)
            self.x0.copy_(x0)
            self.index.add_(1).remainder_(steps)  # so that it is never out of range, also while warming up

        self._prefill, pool, prefill_bytes = capture(run_prefill, device, None)
        self._step, _, step_bytes = capture(run_step, device, pool)
        buffers = [self.x, self.x0, self.noise]
        map_rows(self.text_cond, buffers.append)
        self.bytes = prefill_bytes + step_bytes + sum(buffer.nbytes for buffer in buffers)

    def begin(self, text_cond: dict, cond_scale: Tensor) -> None:
        """Run the prefill for a text condition of the shapes given."""
        _copy(text_cond, self.text_cond)
        self.scale.copy_(cond_scale)
        self.index.zero_()
        self._prefill()

    def step(self, x: Tensor, x0: Tensor, noise: Callable[[], Tensor], index: int) -> tuple[Tensor, Tensor]:
        """The next step of the run, as `sampler.run_steps` asks for it; its results are the buffers."""
        if index == 0:
            self.x.copy_(x)
            self.x0.copy_(x0)
        self.noise.copy_(noise())
        self._step()
        return self.x, self.x0


def _copy(source: dict, target: dict) -> None:
    for name, t in target.items():
        if isinstance(t, dict):
            _copy(source[name], t)
        else:
            t.copy_(source[name])
