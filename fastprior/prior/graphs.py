"""Runs of a `DiffusionPrior` on CUDA by graphs: the result of runs without, to the bit, at few launches."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastprior.batches import map_rows
from fastprior.engine.engine import Engine
from fastprior.engine.graphs import StepGraph, padded_length, padded_table
from fastprior.engine.steps import run_table
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.models.patches import has_hook
from fastprior.prior.loop import CachedSteps, run_prior
from fastprior.prior.plan import SamplingPlan

# Not measured: a capture takes about as long as 30 steps without graphs, and a step of so many rows keeps a device busy
# for longer than its launches take.
FEWEST_STEPS = 4
PAYS_ALONE = 256  # steps of a run that is captured at once, not only when its shape comes again
MOST_ROWS = 64
MOST_SHAPES = 256  # that are remembered to have come once
TEXT = "text_embed", "text_encodings", "conditions"


def _foreign(net: nn.Module) -> str | None:
    """Why a replay would not do what a call does: Python that is not ours runs in it."""
    for module in net.modules():
        if has_hook(module):
            return f"{type(module).__name__} has a forward hook, which a replay would not call"
        known = type(module).__module__.startswith(("fastprior.", "torch.nn.modules."))
        if not known or "forward" in vars(module):
            return f"what {type(module).__name__} computes is not known, and a replay would not call it"
    return None


def graph_obstacles(prior: nn.Module, path: str, steps: int, rows: int | None) -> tuple[str, ...]:
    """Why runs of so many steps, and rows where given, are not replayed as CUDA graphs; empty where they are."""
    if prior.graphs is False:
        return ("prior.graphs=False",)
    if prior.graphs is None and (device := prior.device).type != "cuda":
        return (f"the prior is on {device}",)
    net = prior.net
    if path != "cached":
        return ("the path is plain",)
    if type(net) is not DiffusionPriorNetwork:
        return (f"net is a {type(net).__name__}",)
    found, graphs = [], _GRAPHS.get(prior)
    if graphs is not None and graphs.cache.failed:
        found.append("a capture failed before")
    if graphs is not None and graphs.cache.memory == prior.graph_memory:
        if any(key[0] == rows for key in graphs.cache.too_large):
            found.append(f"those of {rows} rows take more than graph_memory={prior.graph_memory}")
    if net.stream_dtype != torch.float32 or torch.get_default_dtype() != torch.float32:
        found.append("the state is not fp32")
    if steps < FEWEST_STEPS:
        found.append(f"{steps} steps are too few")
    if rows is not None and rows > MOST_ROWS:
        found.append(f"{rows} rows keep the device busy; up to {MOST_ROWS} do not")
    if foreign := _foreign(net):
        found.append(foreign)
    return tuple(found)


class PriorGraphs:
    """The graphs of one prior, by what their runs have in common.

    Attributes:
        cache: the graphs.
    """

    def __init__(self, device: torch.device, memory: int | None):
        self._engine = Engine(device, graph_memory=memory)
        self.cache = self._engine.cache
        self._thread: int | None = None  # that a run is under way in
        self._seen: set[tuple] = set()  # keys of runs that came once, of the same weights

    def run(
        self,
        prior: nn.Module,
        plan: SamplingPlan,
        rows: int,
        text_cond: dict,
        cond_scale: float,
        noise: Iterator[Tensor],
        progress: bool,
    ) -> Tensor | None:
        """Run a plan as `sample_loop` does; None where there are no graphs for such a run."""
        sources, thread = self._sources(prior, text_cond), threading.get_ident()
        if sources is None or is_in_torch_dispatch_mode() or torch.compiler.is_compiling():
            return None
        if self._thread == thread:  # whose buffers it would overwrite
            return None
        with self._engine.lock:
            self._thread = thread
            try:
                self.cache.limit(prior.graph_memory)
                self._engine.refresh(prior.net, self._seen.clear)
                key = self._due(prior, plan, rows, sources)
                if key is None:
                    return None
                steps, samples = CachedSteps(prior.net, plan), rows // len(sources["text_embed"])
                sources |= map_rows(steps.tables(), padded_table)
                prefill, shape = (lambda s: steps.prefill(s, samples, s)), (rows, prior.net.dim)
                run = partial(steps.run, cond_scale=1.0, samples=rows)
                what = partial(StepGraph, prefill, steps.step, sources, shape, len(sources["rows"]), run=run)
                graph = self._engine.graph(key, f"a run of {rows} rows", what)
                if graph is None:
                    return None
                with self._engine.clock:
                    step = graph.begin(sources, cond_scale)
                    x = run_prior(prior, noise, lambda x: run_table(plan.table, step, x, noise, progress))
                    return x.clone()  # it may be a buffer
            finally:
                self._thread = None

    def _sources(self, prior: nn.Module, text_cond: dict) -> dict | None:
        """What the prefill takes of a text condition; None where a part of it is somewhere else, which is an error."""
        sources, devices = {name: text_cond[name] for name in TEXT if text_cond.get(name) is not None}, set()
        if "text_encodings" in sources:
            sources["text_encodings"] = sources["text_encodings"][:, : prior.net.max_text_len]
        map_rows(sources, lambda t: devices.add(t.device))
        return sources if devices == {prior.device} else None

    def _due(self, prior: nn.Module, plan: SamplingPlan, rows: int, sources: dict) -> tuple | None:
        """The key of a run that goes by graphs: when it comes again, or at once where told to, or where that pays."""
        shapes, steps = [], len(plan.table.times)
        map_rows(sources, lambda t: shapes.append((t.shape, t.dtype)))
        names = *sources, *sources.get("conditions", ())
        fixed = plan.guidance == "second branch", plan.clamp, plan.radius, plan.prefix_tokens, plan.suffix_tokens
        key = self._engine.key(rows, padded_length(steps), *fixed, names, *shapes)
        if key in self.cache.kept or prior.graphs or key in self._seen or steps >= PAYS_ALONE:
            self._seen.discard(key)  # where others take its place, it must come twice again
            return key
        if len(self._seen) == MOST_SHAPES:
            self._seen.clear()
        self._seen.add(key)
        return None


_GRAPHS: weakref.WeakKeyDictionary[nn.Module, PriorGraphs] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def graphs_of(prior: nn.Module) -> PriorGraphs:
    """The graphs of a prior, for as long as it lives, stays where it is, and nobody forgets them."""
    with _making:
        if prior not in _GRAPHS:
            _GRAPHS[prior] = PriorGraphs(prior.device, prior.graph_memory)
        return _GRAPHS[prior]


def forget(prior: nn.Module) -> None:
    """Drop the graphs of a prior, and their memory."""
    _GRAPHS.pop(prior, None)
