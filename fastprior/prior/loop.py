"""One denoising loop over a step table: behind a prefix cache where that is exact, by plain calls where it is not."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastprior.batches import repeat_rows
from fastprior.diffusion.schedule import NoiseScheduler
from fastprior.diffusion.solvers import StepTable
from fastprior.draws import drawing
from fastprior.kernels import ops
from fastprior.models import snapshot
from fastprior.models.dalle2.layers import l2norm
from fastprior.models.dalle2.network import Conditioning, DiffusionPriorNetwork
from fastprior.prior.plan import SamplingPlan, is_overridden, method_overrides

if TYPE_CHECKING:
    from fastprior.prior.diffusion_prior import DiffusionPrior

STEPS_AT_ONCE = 8  # of a run on the CPU: between them Python runs, which is slow to wake, and sees an interruption
Step = Callable[[Tensor, Tensor, Callable[[], Tensor], int], tuple[Tensor, Tensor]]  # x, x0, noise, index -> x, x0


class NullTables:
    """The null tables of one network, by schedule; forgotten when its weights change."""

    def __init__(self):
        self.state: snapshot.State | None = None
        self.tables: dict[tuple[int, ...], Tensor] = {}

    def get(self, net: DiffusionPriorNetwork, times: tuple[int, ...]) -> Tensor:
        """(steps, dim) null predictions at the given times."""
        state = snapshot.state(net)
        if state is not self.state:
            self.state = state
            self.tables.clear()
        if times not in self.tables:
            self.tables[times] = net.null_table(torch.tensor(times, device=net.learned_query.device))
        return self.tables[times]


_NULL_TABLES: weakref.WeakKeyDictionary[nn.Module, NullTables] = weakref.WeakKeyDictionary()


def null_table(net: DiffusionPriorNetwork, times: tuple[int, ...]) -> Tensor:
    """`net.null_table(times)`, remembered for as long as the network lives and its weights stay."""
    return _NULL_TABLES.setdefault(net, NullTables()).get(net, times)


def denoise_step(
    net: DiffusionPriorNetwork,
    cond: Conditioning,
    null_preds: Tensor,
    rows: Tensor,
    cond_scale: Tensor,
    x: Tensor,
    x0: Tensor,
    noise: Tensor,
    index: Tensor,
    clamp: str | None,
    radius: float,
) -> tuple[Tensor, Tensor]:
    """One step of any solver behind the prefix cache: the function that is compiled, and captured.

    Args:
        cond: from `net.prefill`; with null rows in it, both branches of guidance run as one batch.
        null_preds: (steps, dim), the null predictions; zeros without guidance, which leaves the prediction as it is.
        rows: (steps, 6), the solver's coefficients.
        cond_scale: 0-d.
        x, x0, noise: (rows, dim), fp32: the state, the last clean estimate (zeros at first) and this step's noise.
        index: 0-d int64, the step.
    Returns:
        the next x, and the clean estimate.
    """
    index = index.reshape(1)
    if cond.null_rows:
        pred, null = net.step(x.repeat(2, 1), index, cond, x0.repeat(2, 1)).chunk(2)
        null_preds = None
    else:
        pred, null = net.step(x, index, cond, x0), None
    return ops.diffusion_step(x, pred, null, cond_scale, x0, noise, rows, index, clamp, radius, null_table=null_preds)


def prepare_run(
    net: nn.Module,
    plan: SamplingPlan,
    cond: Conditioning,
    null_preds: Tensor,
    rows: Tensor,
    cond_scale: float,
    samples: int,
) -> ops.Run | None:
    """A run for `samples` rows whose steps are each one kernel of the CPU; None where there is none for them.

    What it takes: see `denoise_step`. Noise must be fp32.
    """
    if not isinstance(net, DiffusionPriorNetwork) or torch.get_default_dtype() != torch.float32:
        return None
    solver = dict(coefficients=rows, null_table=null_preds, cond_scale=cond_scale)
    return net.prepare_run(cond, samples, **solver, clamp=plan.clamp, radius=plan.radius)


def sample_loop(
    prior: DiffusionPrior,
    plan: SamplingPlan,
    shape: tuple[int, ...],
    text_cond: dict,
    cond_scale: float,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Tensor:
    """Run a plan: (rows, dim) scaled embeddings, before the division by `image_embed_scale`."""
    device = prior.device

    def draw() -> Tensor:
        with drawing(device, generator):
            return torch.randn(shape, device=device, generator=generator)

    if plan.graphs:
        from fastprior.prior import graphs as prior_graphs

        run = prior_graphs.graphs_of(prior).run
        x = run(prior, plan, shape[0], text_cond, cond_scale, draw=draw, progress=progress)
        if x is not None:
            return x
    make = _cached_step if plan.path == "cached" else _plain_step
    with ops.sharing():
        return run_steps(prior, plan.table, make(prior, plan, shape, text_cond, cond_scale), draw, progress)


def run_steps(
    prior: DiffusionPrior, table: StepTable, step: Step | ops.Run, draw: Callable[[], Tensor], progress: bool = False
) -> Tensor:
    """A whole run. Noise is drawn as DALLE2-pytorch draws it: the start, then one tensor at each step that has one."""
    x = draw()
    if prior.init_image_embed_l2norm:
        x = l2norm(x) * prior.image_embed_scale
    x = run_table(table, step, x, draw, progress)
    if prior.sampling_final_clamp_l2norm and prior.predict_x_start:
        x = prior.l2norm_clamp_embed(x)
    return x


def run_table(
    table: StepTable, step: Step | ops.Run, x: Tensor, draw: Callable[[], Tensor], progress: bool = False
) -> Tensor:
    """Every step of a table from x (rows, dim), with noise drawn at those that have some."""
    bar = dict(desc="sampling loop time step", disable=not progress)
    if isinstance(step, ops.Run):
        return _run_several(table, step, x, draw, bar)
    x0 = no_noise = torch.zeros_like(x)
    for index in tqdm(range(len(table)), **bar):
        x, x0 = step(x, x0, draw if table.draws_noise[index] else lambda: no_noise, index)
    return x


def _run_several(table: StepTable, run: ops.Run, x: Tensor, draw: Callable[[], Tensor], bar: dict) -> Tensor:
    """The same by calls of several steps, whose noise is drawn before, in the same order."""
    run.start(x)
    with tqdm(total=len(table), **bar) as shown:
        for first in range(0, len(table), STEPS_AT_ONCE):
            drawn = table.draws_noise[first : first + STEPS_AT_ONCE]
            run(first, [draw() if noisy else None for noisy in drawn])
            shown.update(len(drawn))
    return run.x


def step_inputs(net: DiffusionPriorNetwork, plan: SamplingPlan) -> tuple[Tensor, Tensor, Tensor]:
    """What `denoise_step` needs besides the condition: the times, the null predictions and the coefficient rows."""
    device = next(net.parameters()).device
    rows = plan.table.rows.to(device, torch.float32)
    if plan.guidance == "null table":
        null_preds = null_table(net, plan.table.times)
    else:
        null_preds = rows.new_zeros(len(rows), net.dim)
    return torch.tensor(plan.table.times, device=device), null_preds, rows


def prefill(
    net: DiffusionPriorNetwork, plan: SamplingPlan, text_cond: dict, times: Tensor, samples: int = 1
) -> Conditioning:
    """What the steps of a plan share, for `samples` rows of each prompt."""
    text_embed = text_cond["text_embed"]
    second_branch = len(text_embed) if plan.guidance == "second branch" else 0
    given = text_cond.get("text_encodings"), times, second_branch, text_cond.get("conditions")
    return net.share(net.prefill(text_embed, *given), samples)


def _cached_step(prior, plan, shape, text_cond, cond_scale) -> Step | ops.Run:
    times, null_preds, rows = step_inputs(prior.net, plan)
    cond = prefill(prior.net, plan, text_cond, times, shape[0] // max(len(text_cond["text_embed"]), 1))
    if (run := prepare_run(prior.net, plan, cond, null_preds, rows, cond_scale, shape[0])) is not None:
        return run
    scale = torch.tensor(cond_scale, dtype=torch.float32, device=prior.device)
    indices = torch.arange(len(rows), device=prior.device)
    fixed = prior.net, cond, null_preds, rows, scale

    def step(x, x0, noise, index):
        return denoise_step(*fixed, x, x0, noise(), indices[index], plan.clamp, plan.radius)

    return step


def _plain_step(prior, plan, shape, text_cond, cond_scale) -> Step:
    text_cond = repeat_rows(text_cond, shape[0])
    schedule = prior.noise_scheduler
    by_p_sample = plan.table.solver == "ddpm" and bool(method_overrides(prior))
    by_noise = plan.table.solver == "ddim" and is_overridden(schedule, "predict_noise_from_start", NoiseScheduler)

    def step(x, x0, noise, index):
        t = torch.full((shape[0],), plan.table.times[index], device=x.device, dtype=torch.long)
        self_cond = x0 if prior.net.self_cond and index else None
        if by_p_sample:
            return prior.p_sample(x, t, text_cond=text_cond, self_cond=self_cond, cond_scale=cond_scale)
        pred = prior.net.forward_with_cond_scale(x, t, cond_scale=cond_scale, self_cond=self_cond, **text_cond)
        start = prior.x_start_from(x, t, pred)
        _, _, a, b, c, s = plan.table.rows[index].tolist()
        if by_noise:  # the table folds the noise prediction into a and b: take it out again
            recip, recipm1 = (
                table[plan.table.times[index]].item()
                for table in (schedule.sqrt_recip_alphas_cumprod, schedule.sqrt_recipm1_alphas_cumprod)
            )
            direction = a * recipm1 / recip
            predicted = schedule.predict_noise_from_start(x, t=t, x0=start)
            return direction * predicted + (b + direction / recipm1) * start + s * noise(), start
        return a * x + b * start + c * x0 + s * noise(), start

    return step
