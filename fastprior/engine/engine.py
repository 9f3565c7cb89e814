"""What all runs of one model's steps share, whichever way they go: eagerly, compiled, in C, or by CUDA graphs."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial

import torch
from torch import nn
from torch.utils._pytree import tree_map

from fastprior.checks import check_number
from fastprior.engine import shapes
from fastprior.engine.clock import Clock
from fastprior.engine.graphs import GraphCache, StepGraph, settings
from fastprior.engine.runs import Run
from fastprior.engine.step_cost import StepReads, count_launches, step_seconds
from fastprior.engine.steps import Step, StepInputs
from fastprior.kernels import ops
from fastprior.models import snapshot
from fastprior.models.weight_lock import free_in_forks


class Engine:
    """Notices that a model changed, keeps the steps and graphs of each shape, and times the calls.

    What differs between models comes with each call: what to build, a prefill and a step of a shape, what is read.

    Args:
        device: where the model lies.
        batch_sizes: numbers of prompts that compiled and captured steps run.
        compile: use torch.compile for steps; None: where it has the compiler that it needs.
        graphs: replay CUDA graphs; by default on CUDA. False after a capture that failed.
        graph_memory: bytes that they may hold, without limit by default, see `GraphCache`.

    Attributes:
        lock: to hold while something is built or graphs run.
        clock: times of calls.
        cache: the graphs.
        noted: what steps read, and what counts the kernels that they launch, by the key that they were noted with.

    Raises:
        ValueError: an argument does not fit.
    """

    def __init__(
        self,
        device: torch.device,
        batch_sizes: Sequence[int] = shapes.BATCH_SIZES,
        *,
        compile: bool | None = False,
        graphs: bool | None = None,
        graph_memory: int | None = None,
    ):
        self.batch_sizes = shapes.check_batch_sizes(batch_sizes)
        if graphs and device.type != "cuda":
            raise ValueError(f"graphs=True; the prior is on {device}, and CUDA graphs need CUDA")
        self.compile, self.graphs, self.cache = compile, graphs, GraphCache(graph_memory)
        self.clock = Clock(device)
        self.free()
        free_in_forks(self)
        self._state: snapshot.State | None = None
        self._model: nn.Module | None = None  # that steps were compiled for
        self._compiled: dict[Hashable, Callable] = {}
        self.noted: dict[int, tuple[StepReads, Callable[[], int]]] = {}

    def __reduce__(self) -> tuple:
        """A copy begins anew: locks, graphs, compiled steps and what is known of a model are of this one alone."""
        options = dict(compile=self.compile, graph_memory=self.cache.memory)
        return partial(Engine, self.clock.device, self.batch_sizes, **options), (), dict(graphs=self.graphs)

    def free(self) -> None:
        """Let nobody hold the lock."""
        self.lock = threading.Lock()

    @property
    def replays(self) -> bool:
        """Whether runs go by graphs, where there are some."""
        return self.clock.device.type == "cuda" if self.graphs is None else self.graphs

    def refresh(self, model: nn.Module, build: Callable[[], None]) -> None:
        """Where a model's modules or weights changed, drop its graphs and build what depends on them.

        `lock` must be held. A build that raises is made again at the next call.
        """
        state = snapshot.state(model)
        if state is not self._state:
            self._state = None
            self.clock.wait()
            self.cache.kept.clear()  # graphs hold addresses of weights
            build()
            self._state = state

    def forget_steps(self) -> None:
        """Drop what is of modules that are no more, besides graphs."""
        for kept in (self._compiled, self.noted, self.cache.too_large):
            kept.clear()

    def step(self, model: nn.Module, key: Hashable, step: Callable, **options) -> Callable:
        """A model's step for tensors of one shape, which the key says: compiled once, where steps are compiled.

        Steps of another model are dropped; `options` are torch.compile's.
        """
        if self.compile is None:
            self.compile = shapes.can_compile(self.clock.device)
        if not self.compile:
            return step
        if model is not self._model:
            self._model, self._compiled = model, {}
        if key not in self._compiled:
            self._compiled[key] = shapes.compiled(step, **options)
        return self._compiled[key]

    def key(self, *shape: Hashable) -> tuple:
        """A key of graphs: of a shape, as things are set now."""
        return *shape, settings(self.clock.device)

    def graph(self, key: tuple, name: str, capture: Callable[[], StepGraph]) -> StepGraph | None:
        """Find or capture the graphs of a `key`, see `GraphCache.get`."""
        graph = self.cache.get(key, name, capture)
        if self.cache.failed:
            self.graphs = False
        return graph

    def note(
        self, key: int, reads: StepReads, step: Callable, inputs: StepInputs, shape: tuple[int, int], bound: Step | Run
    ) -> int:
        """Keep for `stats` what a step is, of x of a shape: in all the bytes that it reads.

        Its launches are those that the steps of a run, where they are `bound` by one, are known to be; else counted.
        """
        launches = partial(int, getattr(bound, "launches", 0))
        if not launches() and ops.on_triton(inputs.rows):
            like = tree_map(lambda t: torch.empty_like(t, device="meta") if torch.is_tensor(t) else t, inputs)
            launches = cache(partial(count_launches, step, like, shape, self.clock.device))
        self.noted[key] = reads, launches
        return sum(reads)

    def stats(self, steps: int, bandwidth: float | None) -> dict[str, float]:
        """Figures of the last 1000 calls, and of the noted step with the largest key: see `PriorSampler.stats`."""
        with self.lock:
            (times, read), graphs = self.clock.calls(), self.cache.stats()
            reads, count = self.noted[max(self.noted)] if self.noted else (StepReads(0, 0, 0), int)
        launches = count()  # takes half a second at first, for which no call should wait
        stats = dict(
            calls=len(times),
            p50_ms=statistics.median(times) if times else float("nan"),
            p99_ms=statistics.quantiles(times, n=100)[98] if len(times) > 1 else float("nan"),
            weight_bytes=reads.weights,
            prefix_bytes=reads.prefix,
            table_bytes=reads.tables,
            launches=launches,
            run_launches=launches * steps,
            **graphs,
        )
        if bandwidth is not None:
            check_number("bandwidth", bandwidth, above=0)
            stats["floor_share"] = read / bandwidth / (sum(times) / 1e3) if times else float("nan")
            stats["modelled_step_ms"] = step_seconds(sum(reads), bandwidth, launches) * 1e3
        return stats
