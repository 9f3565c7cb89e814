"""Runs of one shape on buffers of their own, which CUDA graphs replay: a launch is a step or several."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprior.batches import map_rows
from fastprior.draws import capturing
from fastprior.engine.runs import GRAPH_STEPS, DeviceRun, ReplayedRun, Run
from fastprior.engine.steps import Step
from fastprior.kernels import ops

TABLE_STEPS = 64  # of which the lengths of step tables in graphs are multiples, so that many solvers share them
WARMUPS = 3  # runs before a capture: lazy initialisation and compilation must not happen within


class Pool(NamedTuple):
    """Memory that graphs share, as torch.cuda.CUDAGraph names it, and the stream that they are captured on."""

    id: tuple[int, int]
    stream: torch.cuda.Stream


def capture(
    run: Callable[[], None], device: torch.device, pool: Pool | None, warmups: int = WARMUPS
) -> tuple[Callable[[], None], Pool, int]:
    """Record what `run` launches, after a few plain runs on a side stream.

    `run` must take its inputs from tensors that stay where they are, and leave its results in such tensors. What it
    writes is there after the first replay, not before.

    Args:
        pool: of a capture whose memory this one may use too; a new one, with a stream of its own, by default.
    Returns:
        what launches it again; the pool, and by how many bytes it grew.
    Raises:
        RuntimeError: something in it cannot be captured, or there is too little memory.
    """
    if device.type != "cuda":
        raise RuntimeError(f"tensors are on {device}, and CUDA graphs need CUDA")
    if pool is None:  # torch has a stream for captures, but one for all devices
        pool = Pool(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))
    pool.stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(pool.stream):
        for _ in range(warmups):
            run()
    torch.cuda.current_stream(device).wait_stream(pool.stream)
    graph, options = torch.cuda.CUDAGraph(), dict(stream=pool.stream, capture_error_mode="thread_local")
    # what other threads do meanwhile, such as encoding texts, is no part of it and must not end it
    with capturing, torch.cuda.device(device), torch.cuda.stream(pool.stream), _own_workspaces():
        try:
            with torch.cuda.graph(graph, pool=pool.id, **options):
                before = torch.cuda.memory_reserved(device)  # in here: entering gave back what was cached and free
                run()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # of a lost device the error that is under way says more
                _clean_up(device, pool, options)
            raise
    return graph.replay, pool, torch.cuda.memory_reserved(device) - before


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """Let what is captured allocate cuBLAS's workspaces in its pool, and nobody else keep them.

    There is one for each stream, which another capture on it would take over, and race with this one for it.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _clean_up(device: torch.device, pool: Pool, options: dict) -> None:
    """Bring the allocator and the default generator back from an invalid capture; all later draws would fail."""
    with contextlib.suppress(RuntimeError):  # that much was ended
        torch._C._cuda_endAllocateToPool(device.index, pool.id)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), **options):  # whose end lets go of the generator
        torch.zeros((), device=device)


def _no_autocast_cache(kind: str) -> torch.autocast:
    """Autocast as it is, but casting weights anew: those that it keeps are gone when the caller leaves it."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, enabled, cache_enabled=False)


def settings(device: torch.device) -> tuple:
    """What decides besides shapes and weights which kernels run there: graphs are good for the same only."""
    kind, matmul = device.type, torch.backends.cuda.matmul
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    precision = matmul.fp32_precision, matmul.allow_fp16_reduced_precision_reduction
    precision += (matmul.allow_bf16_reduced_precision_reduction, torch.are_deterministic_algorithms_enabled())
    return ops.forced(), autocast, *precision


def padded_length(steps: int) -> int:
    """The length of step tables in graphs of runs of so many steps."""
    return -(-steps // TABLE_STEPS) * TABLE_STEPS


def padded_table(t: Tensor) -> Tensor:
    """A table (steps, …) of a run with zeros behind, up to its length in graphs."""
    return F.pad(t, (0, 0) * (t.ndim - 1) + (0, padded_length(len(t)) - len(t)))


class StepGraph:
    """The prefill and the steps of one shape, captured on a stream of their own.

    Their pool of memory is their own: it goes back to the device at the next `torch.cuda.empty_cache`, capture, or
    allocation that would fail otherwise. One for all shapes would give nothing back before the last is gone.

    Args:
        prefill: takes what a run depends on; gives the inputs of its steps.
        step: of these inputs, see `solver_step`.
        sources: an example of what a run depends on, a dict of tensors and such dicts, whose shapes hold for all.
        shape: (rows, dim) of x.
        steps: of a run, at most.
        dtype: of x and the scale.
        scales: whether guidance has a scale for each row.
        run: takes the inputs, which it may read where they lie and nowhere else; gives a run of so many steps, whose
            graphs hold GRAPH_STEPS of them. Where it gives no `DeviceRun`, a graph is one `step`.

    Attributes:
        inputs: what the prefill gave.
        bytes: of the pool and the buffers.
    """

    @torch.inference_mode(False)  # what is made there cannot be written to elsewhere
    @torch.no_grad()
    def __init__(
        self,
        prefill: Callable[[dict], Any],
        step: Callable[..., tuple[Tensor, Tensor]],
        sources: dict,
        shape: tuple[int, int],
        steps: int,
        dtype: torch.dtype = torch.float32,
        run: Callable[[Any], Run | None] | None = None,
        scales: bool = False,
    ):
        self.sources, self._buffers = map_rows(sources, torch.clone), []
        map_rows(self.sources, self._buffers.append)
        self._device = self._buffers[0].device
        self.inputs: Any = None
        self._run: ReplayedRun | None = None
        workspace = ops.Workspace()
        self._scale = torch.ones(shape[:1] if scales else (), device=self._device, dtype=dtype)

        def run_prefill() -> None:
            with ops.sharing(workspace):
                self.inputs = prefill(self.sources)

        with _no_autocast_cache(self._device.type):
            self._prefill, pool, self.bytes = capture(run_prefill, self._device, None)
            self._prefill()  # a capture computes nothing, and the warm-up of the steps reads what the prefill wrote
            made = None if run is None else run(self.inputs)
            if isinstance(made, DeviceRun):
                self._capture_run(made, pool)
            else:
                self._capture_step(step, shape, steps, dtype, pool)
        self._buffers += workspace.tensors
        self.bytes += sum(buffer.nbytes for buffer in self._buffers)

    def _capture_run(self, run: DeviceRun, pool: Pool) -> None:
        """Capture so many steps of a run as graphs may hold, each graph on the run's own buffers."""
        run.start(torch.zeros_like(run.x))  # compiles what it launches, and begins with numbers
        replays: dict[int, Callable[[], None]] = {}
        for count in sorted(count for count in GRAPH_STEPS if count <= run.steps):
            warmups = 1 if replays else WARMUPS  # all that several steps launch, those before launched
            replay, _, grown = capture(partial(run.advance, count), self._device, pool, warmups)
            replays = {count: replay} | replays
            self.bytes += grown
        self._run, self._scale = ReplayedRun(run, replays), run.scale
        self._buffers += run.buffers

    def _capture_step(self, step: Callable, shape: tuple[int, int], steps: int, dtype: torch.dtype, pool: Pool) -> None:
        """Capture one step, with copies of its results to where the next one reads them."""
        self._x, self._x0, self._noise = torch.zeros(3, *shape, device=self._device, dtype=dtype)
        self._index = torch.zeros((), dtype=torch.int64, device=self._device)
        # a graph has one for itself: it goes on using what it was captured with, and others may be replayed meanwhile
        workspace = ops.Workspace()

        def run_step() -> None:
            with ops.sharing(workspace):
                x, x0 = step(self.inputs, self._scale, self._x, self._x0, self._noise, self._index)
            self._x.copy_(x)
            self._x0.copy_(x0)
            self._index.add_(1).remainder_(steps)  # so that it is never out of range, also while warming up

        self._step, _, grown = capture(run_step, self._device, pool)
        self.bytes += grown
        self._buffers += self._x, self._x0, self._noise, self._scale, self._index, *workspace.tensors

    def begin(self, sources: dict, cond_scale: Tensor | float) -> Step | Run:
        """Run the prefill for what a run depends on, of the shapes of the example; gives its steps for `run_table`.

        Args:
            cond_scale: of guidance, 0-d; with `scales`, or of a `DeviceRun`, also (rows,).
        """
        for buffer in self._buffers:
            if buffer.is_cuda:  # made on another stream, for which it must not be free before this run ends
                buffer.record_stream(torch.cuda.current_stream(buffer.device))
        _copy(sources, self.sources)
        self._scale.copy_(cond_scale) if torch.is_tensor(cond_scale) else self._scale.fill_(cond_scale)
        self._prefill()
        return self._run or self._replay_step

    def _replay_step(self, x: Tensor, x0: Tensor, noise: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """The next step; its results are the buffers."""
        if index == 0:
            self._index.zero_()
            self._x.copy_(x)
            self._x0.copy_(x0)
        self._noise.copy_(noise)
        self._step()
        return self._x, self._x0


def _copy(source: dict, target: dict) -> None:
    for name, t in target.items():
        if isinstance(t, dict):
            _copy(source[name], t)
        else:
            t.copy_(source[name])


class GraphCache:
    """The graphs of several shapes by key, as many as a limit of memory allows.

    Args:
        memory: bytes that they may hold; None for no limit. Those that were not used for longest go first.

    Attributes:
        kept: the graphs, that which was used last behind. The device must be done with those that are dropped.
        failed: whether a capture did; no other is tried then.
        evictions: how many went for others.
        too_large: keys of graphs that alone are larger than the limit; they are not captured again.
    """

    def __init__(self, memory: int | None):
        self.memory, self.failed, self.evictions = None, False, 0
        self.kept: dict[Hashable, StepGraph] = {}
        self.too_large: set[Hashable] = set()
        self.limit(memory)

    def limit(self, memory: int | None) -> None:
        """Change the limit; those that are over it go. Raises ValueError for a limit below 1."""
        if memory is not None and not (isinstance(memory, (int, float)) and memory >= 1):
            raise ValueError(f"graph_memory={memory!r}; it must be None or at least 1 byte")
        if memory != self.memory:
            self.memory = memory
            self.too_large.clear()
            self._evict()

    def get(self, key: Hashable, name: str, make: Callable[[], StepGraph]) -> StepGraph | None:
        """Find the graphs of a key, or capture them; None, after a warning that calls them by `name`, where that fails.

        None, too, where they are larger than the limit.
        """
        if key in self.kept:
            self.kept[key] = self.kept.pop(key)
        elif not self.failed and key not in self.too_large:
            try:
                graph = make()
            except RuntimeError as error:  # too little memory too
                self.failed = True
                self.kept.clear()
                warnings.warn(f"{name} was not captured as a CUDA graph, all runs go on without: {error}")
                return None
            if self.memory is not None and graph.bytes > self.memory:
                self.too_large.add(key)
                needed = f"its CUDA graphs take {graph.bytes} bytes, and graph_memory={self.memory}"
                warnings.warn(f"{name} runs without graphs: {needed}")
                return None
            self.kept[key] = graph
            self._evict()
        return self.kept.get(key)

    def _evict(self) -> None:
        while self.memory is not None and self.bytes > self.memory:
            del self.kept[next(iter(self.kept))]
            self.evictions += 1
            torch.cuda.empty_cache()  # gives the memory of their pool back

    @property
    def bytes(self) -> int:
        return sum(graph.bytes for graph in self.kept.values())

    def stats(self) -> dict[str, int]:
        return dict(graphs=len(self.kept), graph_bytes=self.bytes, evictions=self.evictions)
