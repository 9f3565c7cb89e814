"""A prior whose rows are each at a step of their own: prefixes by text, tables by solver, and steps of any rows."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastprior.engine.runs import Run
from fastprior.engine.steps import Noise, bind
from fastprior.kernels import ops
from fastprior.models import snapshot
from fastprior.models.dalle2.layers import l2norm
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.learned import check_weights
from fastprior.prior.loop import CachedSteps
from fastprior.prior.plan import SamplingPlan

PREFIX_MEMORY = 2**28  # bytes of prefixes that are kept by default
PLANS = 64  # solvers whose tables are kept
TRIED = 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64  # rows, of which the cap is one
ENOUGH = 0.95  # of the best throughput
TIMED, TIMED_SECONDS = 5, 0.05  # steps at least, and what they take together; the fastest counts


class Solver(NamedTuple):
    """What a request may choose of its run; None leaves it to the prior, see `DiffusionPrior.p_sample_loop`."""

    timesteps: int | None = None
    solver: str | None = None
    spacing: str | None = None
    eta: float | None = None


@dataclass
class Row:
    """A request on its way.

    Attributes:
        text_cond: what the network is conditioned on, of one prompt.
        key: of its prefix: equal texts have equal keys.
        solver, cond_scale: see `DiffusionPrior.p_sample_loop`.
        generator: of all its noise.
        place: of its state; rows that are on their way at once have different ones.
        index: its next step.
        steps: how many it has.
    """

    text_cond: dict
    key: Hashable
    solver: Solver
    cond_scale: float
    generator: torch.Generator
    place: int = 0
    index: int = 0
    steps: int = 0
    made: _InRows | _Alone | None = field(default=None, repr=False)  # what the model keeps of it


class _Tables(NamedTuple):
    """A solver's tables for the weights as they are; `rows` where C steps them."""

    plan: SamplingPlan
    steps: CachedSteps
    rows: ops.RowTable | None


class _InRows:
    """A row that C steps with others."""

    def __init__(self, rows: ops.Rows, place: int, prompt: int, tables: _Tables, noise: Noise, x: Tensor):
        self.tables, self.noise, self.prompt = tables, noise, prompt
        self._rows, self._place = rows, place
        rows.start(place, x[0])

    @property
    def x(self) -> Tensor:
        return self._rows.x[self._place][None]

    def next(self, row: Row, noise: Tensor | None) -> ops.RowStep:
        noise = None if noise is None else noise[0]
        return ops.RowStep(self._place, self.prompt, self.tables.rows, row.index, row.cond_scale, noise)


class _Alone:
    """A row that is stepped by itself."""

    def __init__(self, row: Row, tables: _Tables, noise: Noise, x: Tensor):
        self.tables, self.noise, self.x = tables, noise, x
        self._x0 = self._no_noise = torch.zeros_like(x)
        inputs = tables.steps.prefill(row.text_cond, 1)
        self._step = tables.steps.run(inputs, row.cond_scale, 1)
        if isinstance(self._step, Run):
            self._step.start(x)
        else:
            scale = torch.tensor(row.cond_scale, dtype=torch.float32, device=x.device)
            self._step = bind(tables.steps.step, inputs, scale)

    def advance(self, index: int, noise: Tensor | None) -> None:
        if isinstance(self._step, Run):
            self._step(index, [noise])
            self.x = self._step.x
        else:
            noise = self._no_noise if noise is None else noise
            self.x, self._x0 = self._step(self.x, self._x0, noise, index)


class Prefixes:
    """Which prompt has its prefix where, those in use and those used last."""

    def __init__(self, count: int):
        self._free, self._uses = list(range(count)), {}
        self._places: OrderedDict[Hashable, int] = OrderedDict()

    def take(self, key: Hashable) -> tuple[int, bool]:
        """A place for a prefix, in use until `release`, and whether it lies there. At most `count` may be in use."""
        found = key in self._places
        if not found:
            if self._free:
                place = self._free.pop()
            else:
                unused = next(other for other, place in self._places.items() if not self._uses.get(place))
                place = self._places.pop(unused)
            self._places[key] = place
        self._places.move_to_end(key)
        place = self._places[key]
        self._uses[place] = self._uses.get(place, 0) + 1
        return place, found

    def release(self, place: int) -> None:
        self._uses[place] -= 1

    def forget(self, key: Hashable) -> None:
        """A prefix that was not made after all, whose place one alone has taken."""
        place = self._places.pop(key)
        del self._uses[place]
        self._free.append(place)


class RowModel:
    """Steps of a `DiffusionPrior` for rows that begin, and end, when they like.

    Where C steps rows together (see `ops.prepare_rows`) a step of several reads the weights once. Elsewhere, as on a
    GPU, rows take turns.

    Args:
        prior: in eval mode, with a network that can be cached.
        dtype: of the network; with another than its own, of a copy.
        places: how many rows may be on their way at once.
        prefixes: texts whose prefixes are kept besides those of the rows; by default as PREFIX_MEMORY has room for.
        alike: a row is the same to the bit whatever other rows there are; by default in fp32.

    Attributes:
        together: whether C steps rows together; None before `build`.
        most: rows of a call of `step`.

    Raises:
        ValueError: the prior cannot be cached.
    """

    def __init__(
        self,
        prior: DiffusionPrior,
        *,
        dtype: torch.dtype | None = None,
        places: int = 64,
        prefixes: int | None = None,
        alike: bool | None = None,
    ):
        self.prior, self.places, self.alike = prior, places, alike
        self._dtype, self._wanted = dtype, prefixes
        self._plans: OrderedDict[tuple, SamplingPlan] = OrderedDict()
        self.together: bool | None = None
        self.most = places

    def plan(self, solver: Solver, cond_scale: float) -> SamplingPlan:
        """The plan of a request, from any thread. ValueError where it does not fit the prior."""
        scale = cond_scale if solver.solver == "learned" or cond_scale == 1 else 2.0  # any other has the same plan
        plans, key = self._plans, (solver, scale)
        found = plans.get(key)
        if found is None:
            found = self.prior.sampling_plan(solver.timesteps, scale, solver.solver, solver.eta, spacing=solver.spacing)
            if found.path != "cached":
                raise ValueError(f"this prior cannot be served step by step: {'; '.join(found.reasons)}")
            if not found.table.times:
                name = found.table.solver
                raise ValueError(
                    f"timesteps={solver.timesteps}; {name} makes one evaluation less, so it must be at least 2"
                )
            plans[key] = found
            if len(plans) > PLANS:
                plans.popitem(last=False)
        return found

    def build(self) -> None:
        """(Re)build all that depends on weights. No row may be on its way."""
        given = self.prior.net
        own = snapshot.held(given)
        dtype = self._dtype or own.learned_query.dtype
        self._net = own if dtype == own.learned_query.dtype else copy.deepcopy(own).to(dtype)
        if self._net is not own:
            snapshot.state(given).add_twin(self._net)
        self._plans.clear()
        self._tables: OrderedDict[SamplingPlan, _Tables] = OrderedDict()
        self._rows, self.together = None, None

    def begin(self, row: Row) -> bool:
        """Put a row at its first step; whether its prefix was there."""
        plan = self.plan(row.solver, row.cond_scale)
        tables = self._tables_of(plan)
        if self.together is None:
            self._prepare(row, tables)
            tables = self._tables_of(plan)
        row.steps, row.index = len(plan.table), 0
        noise = Noise((1, self.prior.image_embed_dim), self.prior.device, row.generator)
        x = next(noise)
        if self.prior.init_image_embed_l2norm:
            x = l2norm(x) * self.prior.image_embed_scale
        if tables.rows is None:
            row.made = _Alone(row, tables, noise, x)
            return False
        prompt, found = self._prefix(row, tables)
        row.made = _InRows(self._rows, row.place, prompt, tables, noise, x)
        return found

    def _tables_of(self, plan: SamplingPlan) -> _Tables:
        if id(plan) not in self._tables:
            check_weights(self.prior, plan.table)
            steps, rows = CachedSteps(self._net, plan), None
            if self.together and plan.guidance != "second branch":
                time_tokens, null = self._net.time_tokens(steps.times).float(), steps.null_table.float()
                rows = self._rows.table(time_tokens, steps.rows, null, plan.clamp, plan.radius)
            self._tables[id(plan)] = _Tables(plan, steps, rows)
            if len(self._tables) > PLANS:
                self._tables.popitem(last=False)
        self._tables.move_to_end(id(plan))
        return self._tables[id(plan)]

    def _prefix(self, row: Row, tables: _Tables) -> tuple[int, bool]:
        """Where the prefix of a row's prompt lies, and whether it did before."""
        prompt, found = self._prefixes.take(row.key)
        if not found:
            try:
                cache = tables.steps.prefill(row.text_cond, 1).cond.cache
                self._rows.keep(prompt, cache.k, cache.v)
            except BaseException:
                self._prefixes.forget(row.key)
                raise
        return prompt, found

    def _prepare(self, row: Row, tables: _Tables) -> None:
        """Make room for prefixes like that of a row, and rows on them, where C takes these."""
        cond = tables.steps.prefill(row.text_cond, 1).cond
        cache, rows = cond.cache, None
        each = (cache.k[:, :1].numel() + cache.v[:, :1].numel()) * cache.k.element_size()
        prompts = self.places + (max(1, PREFIX_MEMORY // each) if self._wanted is None else self._wanted)
        if isinstance(self._net, DiffusionPriorNetwork):
            alike = self._net.learned_query.dtype == torch.float32 if self.alike is None else self.alike
            rows = self._net.prepare_rows(cond, prompts=prompts, places=self.places, alike=alike)
        self._rows, self.together = rows, rows is not None
        self._tables.clear()
        if rows is not None:
            self._prefixes, self.most = Prefixes(prompts), min(self.places, rows.most)

    def step(self, rows: Sequence[Row]) -> list[tuple[Row, Exception]]:
        """Make the next step of each row; gives those that failed, each with its error, and only these."""
        failed, together = [], {}
        for index, row in enumerate(rows):
            made = row.made
            try:
                drawn = next(made.noise) if made.tables.plan.table.draws_noise[row.index] else None
                if isinstance(made, _InRows):
                    together[index] = made.next(row, drawn)
                else:
                    made.advance(row.index, drawn)
                row.index += 1
            except Exception as error:  # such as of its generator
                failed.append((row, error))
        if together:
            try:
                self._rows.step(list(together.values()))
            except MemoryError as error:
                failed += [(rows[index], error) for index in together]
        return failed

    def finish(self, row: Row) -> Tensor:
        """The embedding (dim,) of a row that made all its steps, on the CPU and not scaled."""
        prior, x = self.prior, row.made.x
        if prior.sampling_final_clamp_l2norm and prior.predict_x_start:
            x = prior.l2norm_clamp_embed(x)
        return prior.denormalize(x)[0].cpu().clone()

    def end(self, row: Row) -> None:
        """Let go of what a row had, finished or not."""
        if isinstance(row.made, _InRows):
            self._prefixes.release(row.made.prompt)
        row.made = None

    def calibrate(self, row: Row) -> dict[int, float]:
        """Seconds of a step by numbers of rows, all of them like this one; nobody else may be on its way.

        Numbers rise until two in a row have gained less than 1 - ENOUGH.
        """
        seconds: dict[int, float] = {}
        best, idle = 0.0, 0
        for count in [count for count in TRIED if count <= self.places]:
            if count > self.most or idle == 2:
                break
            seconds[count] = self._seconds_of_step(row, count)
            idle = 0 if count / seconds[count] * ENOUGH >= best else idle + 1
            best = max(best, count / seconds[count])
            if not self.together:
                break
        return seconds

    def _seconds_of_step(self, row: Row, count: int) -> float:
        """The least of a few steps of so many rows."""
        rows = [copy.copy(row) for _ in range(count)]
        times: list[float] = []
        try:
            for place, one in enumerate(rows):
                one.place, one.generator = place, torch.Generator(row.generator.device).manual_seed(0)
                self.begin(one)
            while len(times) < TIMED or sum(times) < TIMED_SECONDS:
                if rows[0].index == rows[0].steps:
                    for one in rows:
                        one.index = 0
                start = time.perf_counter()
                self.step(rows)
                times.append(time.perf_counter() - start)
        finally:
            for one in rows:
                self.end(one)
        return min(times)


def best_cap(seconds: dict[int, float]) -> int:
    """The fewest rows that reach ENOUGH of the best throughput, of the seconds of a step by numbers of rows."""
    best = max(count / taken for count, taken in seconds.items())
    return next(count for count, taken in sorted(seconds.items()) if count / taken >= ENOUGH * best)
