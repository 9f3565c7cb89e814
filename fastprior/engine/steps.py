"""Runs through a table of steps: their noise, the step of any solver, and the parts of a batch that take turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from fastprior.diffusion.solvers import StepTable
from fastprior.draws import drawing
from fastprior.engine import shapes
from fastprior.engine.runs import GRAPH_STEPS, Run
from fastprior.kernels import ops

STEPS_AT_ONCE = 8  # of a run in C: between them Python runs, which is slow to wake, and sees an interruption
Generators = torch.Generator | Sequence[torch.Generator] | None
Predict = Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
Step = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]  # x, x0, noise, index -> x, x0


class StepInputs(NamedTuple):
    """Inputs of all steps of a run, besides the state.

    Attributes:
        cond: what the model's prefill gave.
        rows: (steps, 6), the solver's coefficients, see `StepTable`.
        null_table: (steps, dim), unconditional predictions of guidance, for steps that predict none.
    """

    cond: Any
    rows: Tensor
    null_table: Tensor | None = None


def solver_step(predict: Predict, clamp: str | None, radius: float, uses_prediction: bool = False) -> Callable:
    """Bind all that is constant of a step of any solver; the result is what is compiled, and captured.

    Args:
        predict: takes the condition, x, x0 and the index (1,) of the step; gives the prediction, and the unconditional
            one of guidance or None, (rows, dim).
        clamp, radius: how a predicted x0 is clamped, see `ops.diffusion_step`.
        uses_prediction: see `StepTable`.
    Returns:
        step(inputs, scale, x, x0, noise, index) to the next x and the clean estimate x0: (rows, dim) each, fp32 or
        wider; `inputs` are `StepInputs`, `scale` of guidance is 0-d, `index` 0-d int64.
    """

    def step(inputs, scale, x, x0, noise, index):
        index = index.reshape(-1)
        pred, null = predict(inputs.cond, x, x0, index)
        null_table = inputs.null_table if null is None else None
        if uses_prediction:
            x0 = pred = (pred if null is None else torch.lerp(null, pred, scale)).to(x.dtype)
            null = None
        coefficients = inputs.rows, index, clamp, radius
        return ops.diffusion_step(x, pred, null, scale, x0, noise, *coefficients, null_table=null_table)

    return step


def with_unconditional(step: Callable[[Tensor, Tensor, Any], Tensor], guided: int) -> Predict:
    """Predictions of a model's `step(x, index, cond)` with guidance for the first `guided` rows, and for no others.

    The condition is that of all rows, then the unconditional one of those that are guided.
    """

    def predict(cond, x, x0, index):
        if not guided:
            return step(x, index, cond), None
        pred, null = step(torch.cat((x, x[:guided])), index, cond).split((len(x), guided))
        return pred, torch.cat((null, pred[guided:]))

    return predict


def bind(step: Callable, inputs: StepInputs, scale: Tensor) -> Step:
    """A step of `solver_step` as `run_table` asks for it: behind one condition, by the number of the step."""
    indices = torch.arange(len(inputs.rows), device=inputs.rows.device)
    return lambda x, x0, noise, index: step(inputs, scale, x, x0, noise, indices[index])


class Noise(Iterator[Tensor]):
    """Standard normal noise of a run: an iterator that draws one tensor after the other.

    Args:
        shape: (rows, …) of each.
        device: where it is wanted; a generator draws where it lives.
        generator: one, or one for each row; the device's default one by default.
        dtype: that is drawn, and given as fp32 or wider; the default one as it is where None.
    Raises:
        ValueError: there are other than one or `rows` generators.
    """

    def __init__(
        self, shape: Sequence[int], device: torch.device, generator: Generators = None, dtype: torch.dtype | None = None
    ):
        generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
        rows, *rest = shape
        if len(generators) not in (1, rows):
            raise ValueError(f"generator has {len(generators)} entries; it must be one, or one for each of {rows} rows")
        self._shape = rows // len(generators), *rest
        self._device, self._dtype = device, dtype and torch.promote_types(dtype, torch.float32)
        self._sources = []
        for one in generators:
            place = one.device if one else device
            self._sources.append((drawing(place, one), dict(generator=one, device=place, dtype=dtype)))

    def __next__(self) -> Tensor:
        drawn = []
        for while_drawing, options in self._sources:
            with while_drawing:
                drawn.append(torch.randn(self._shape, **options))
        noise = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        return noise.to(self._device, self._dtype)


def run_table(table: StepTable, step: Step | Run, x: Tensor, noise: Iterator[Tensor], progress: bool = False) -> Tensor:
    """Run every step of a table from x (rows, dim), with the next noise at those that draw some: the last x."""
    steps, bar = len(table.times), dict(desc="sampling loop time step", disable=not progress)
    if isinstance(step, Run):
        step.start(x)
        at_once = STEPS_AT_ONCE if isinstance(step, ops.Run) else GRAPH_STEPS[0]
        with tqdm(total=steps, **bar) as shown:
            for first in range(0, steps, at_once):
                drawn = [next(noise) if draws else None for draws in table.draws_noise[first : first + at_once]]
                step(first, drawn)
                shown.update(len(drawn))
        return step.x
    x0 = no_noise = torch.zeros_like(x)
    for index in tqdm(range(steps), **bar):
        x, x0 = step(x, x0, next(noise) if table.draws_noise[index] else no_noise, index)
    return x


def run_parts(
    table: StepTable,
    x: Tensor,
    noise: Iterator[Tensor],
    begin: Callable[[slice, int], tuple[Step | Run, int]],
    batch_sizes: Sequence[int],
    prompts: int,
    groups: int = 1,
) -> Tensor:
    """Run a batch in parts of few sizes, one after the other; the result of each row is what it is alone.

    Args:
        x, noise: (rows, dim); the rows are groups of prompts, and those of one prompt lie together.
        begin: takes which prompts of each group are a part, and the batch size to pad them to; gives their steps, and
            how many prompts of a group these take: that size, or just the part's.
        batch_sizes: in order.
        prompts: in each of the groups.
    """
    parts, results = shapes.parts(batch_sizes, prompts), []
    draws = itertools.tee(noise, len(parts)) if len(parts) > 1 else [noise]  # parts have rows of the same tensors
    for (part, batch), drawn in zip(parts, draws):
        step, taken = begin(part, batch)
        count = part.stop - part.start
        if taken == prompts:
            return run_table(table, step, x, noise).clone()  # it may be a buffer

        def cut(t, part=part, missing=taken - count):
            t = t.view(groups, prompts, -1)[:, part]
            return (F.pad(t, (0, 0, 0, missing)) if missing else t).reshape(-1, x.shape[1])

        result = run_table(table, step, cut(x), map(cut, drawn))
        results.append(result.view(groups, taken, -1)[:, :count].clone())
    return torch.cat(results, dim=1).view_as(x)
