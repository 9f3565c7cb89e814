"""Runs of a `DiffusionPrior` on CUDA by graphs: the result of runs without, to the bit, at one launch a step."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastprior.batches import map_rows
from fastprior.engine.clock import Clock
from fastprior.engine.graphs import TABLE_STEPS, GraphCache, StepGraph, settings
from fastprior.models import snapshot
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.prior.loop import denoise_step, prefill, run_steps, step_inputs
from fastprior.prior.plan import HOOKS, SamplingPlan

if TYPE_CHECKING:
    from fastprior.prior.diffusion_prior import DiffusionPrior

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
        if any(getattr(module, hooks) for hooks in HOOKS):
            return f"{type(module).__name__} has a forward hook, which a replay would not call"
        known = type(module).__module__.startswith(("fastprior.", "torch.nn.modules."))
        if not known or "forward" in vars(module):
            return f"what {type(module).__name__} computes is not known, and a replay would not call it"
    if all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks:
        return "all modules have a forward hook, which a replay would not call"
    return None


def obstacles(prior: DiffusionPrior, path: str, steps: int, rows: int | None) -> tuple[str, ...]:
    """Why runs of so many steps, and rows where given, are not replayed as CUDA graphs; empty where they are."""
    if prior.graphs is False:
        return ("prior.graphs=False",)
    if prior.graphs is None and prior.device.type != "cuda":
        return (f"the prior is on {prior.device}",)
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
        self.cache = GraphCache(memory)
        self._clock, self._state = Clock(device), None
        self._lock, self._running = threading.RLock(), False
        self._seen: set[tuple] = set()  # keys of runs that came once, of the same weights

    def run(
        self, prior: DiffusionPrior, plan: SamplingPlan, rows: int, text_cond: dict, cond_scale: float, **how
    ) -> Tensor | None:
        """As `sampler.run_steps`, which takes `draw` and `progress`; None where there are no graphs for such a run."""
        given = self._given(prior, text_cond)
        if given is None or is_in_torch_dispatch_mode() or torch.compiler.is_compiling():
            return None
        with self._lock:
            if self._running:  # by this thread, whose buffers it would overwrite
                return None
            self._running = True
            try:
                self._refresh(prior)
                graph = self._graph(prior, plan, rows, given)
                if graph is None:
                    return None
                with self._clock:
                    graph.begin(given | self._tables(prior.net, plan), cond_scale)
                    return run_steps(prior, plan.table, graph.step, **how).clone()  # it may be a buffer
            finally:
                self._running = False

    def _given(self, prior: DiffusionPrior, text_cond: dict) -> dict | None:
        """What the prefill takes of a text condition; None where a part of it is somewhere else, which is an error."""
        given, devices = {name: text_cond[name] for name in TEXT if text_cond.get(name) is not None}, set()
        if "text_encodings" in given:
            given["text_encodings"] = given["text_encodings"][:, : prior.net.max_text_len]
        map_rows(given, lambda t: devices.add(t.device))
        return given if devices == {prior.device} else None

    def _refresh(self, prior: DiffusionPrior) -> None:
        """Drop the graphs of weights or modules that are no more."""
        self.cache.limit(prior.graph_memory)
        state = snapshot.state(prior.net)
        if state is not self._state:
            self._clock.wait()
            self.cache.clear()
            self._seen.clear()
            self._state = state

    def _tables(self, net: DiffusionPriorNetwork, plan: SamplingPlan) -> dict[str, Tensor]:
        """What the steps of a plan read, computed as without graphs, with zeros up to a length that many share."""
        times, null_preds, rows = step_inputs(net, plan)
        tables = dict(time_tokens=net.time_tokens(times), null_preds=null_preds, rows=rows)
        missing = -len(rows) % TABLE_STEPS
        return {name: F.pad(t, (0, 0) * (t.ndim - 1) + (0, missing)) for name, t in tables.items()}

    def _graph(self, prior: DiffusionPrior, plan: SamplingPlan, rows: int, given: dict) -> StepGraph | None:
        """Those of the key of a run: captured when it comes again, or at once where told to, or where that pays."""
        shapes = []
        map_rows(given, lambda t: shapes.append((t.shape, t.dtype)))
        steps, names = len(plan.table) + -len(plan.table) % TABLE_STEPS, (*given, *given.get("conditions", ()))
        fixed = plan.guidance == "second branch", plan.clamp, plan.radius, plan.prefix_tokens, plan.suffix_tokens
        key = rows, steps, *fixed, names, *shapes, settings(prior.device)
        if not (key in self.cache or prior.graphs or key in self._seen or len(plan.table) >= PAYS_ALONE):
            if len(self._seen) == MOST_SHAPES:
                self._seen.clear()
            self._seen.add(key)
            return None
        self._seen.discard(key)  # where others take its place, it must come twice again

        def capture() -> StepGraph:
            net, samples = prior.net, rows // len(given["text_embed"])

            def run_prefill(given):
                return prefill(net, plan, given, given["time_tokens"], samples), given["null_preds"], given["rows"]

            def step(cond, *state):
                return denoise_step(net, *cond, *state, plan.clamp, plan.radius)

            return StepGraph(run_prefill, step, given | self._tables(net, plan), (rows, net.dim), steps)

        return self.cache.get(key, f"a run of {rows} rows", capture)


_GRAPHS: weakref.WeakKeyDictionary[DiffusionPrior, PriorGraphs] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def graphs_of(prior: DiffusionPrior) -> PriorGraphs:
    """The graphs of a prior, for as long as it lives, stays where it is, and nobody forgets them."""
    with _making:
        if prior not in _GRAPHS:
            _GRAPHS[prior] = PriorGraphs(prior.device, prior.graph_memory)
        return _GRAPHS[prior]


def forget(prior: DiffusionPrior) -> None:
    """Drop the graphs of a prior, and their memory."""
    _GRAPHS.pop(prior, None)
