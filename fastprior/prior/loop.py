"""One denoising loop over a step table: behind a prefix cache where that is exact, by plain calls where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastprior.batches import repeat_rows
from fastprior.engine.runs import Run
from fastprior.engine.step_cost import StepReads, step_reads
from fastprior.engine.steps import Predict, Step, StepInputs, bind, run_table, solver_step
from fastprior.kernels import ops
from fastprior.models import snapshot
from fastprior.models.dalle2.layers import l2norm
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.prior.plan import SamplingPlan


def null_table(net: DiffusionPriorNetwork, times: tuple[int, ...]) -> Tensor:
    """`net.null_table(times)`, remembered for as long as the network lives and its weights stay."""
    device = net.learned_query.device
    return snapshot.of_numbers(net, times, lambda: net.null_table(torch.tensor(times, device=device)))


def network_reads(net: DiffusionPriorNetwork, inputs: StepInputs) -> StepReads:
    """What a step of a network reads."""
    cond, cache = inputs.cond, inputs.cond.cache
    tables = cache.bias, *(cache.rotary or ()), cond.time_tokens[:1], inputs.null_table[:1], inputs.rows[:1]
    return step_reads([net.causal_transformer], (cache.k, cache.v), tables)


def predictor(net: nn.Module) -> Predict:
    """Predictions of a network behind its conditioning; with null rows in that, both branches run as one batch."""

    def predict(cond, x, x0, index):
        if cond.null_rows:
            return net.step(x.repeat(2, 1), index, cond, x0.repeat(2, 1)).chunk(2)
        return net.step(x, index, cond, x0), None

    return predict


class CachedSteps:
    """The steps of a plan behind the prefix cache, for any number of texts.

    Args:
        net: with `prefill`, `share` and `step`, see `DiffusionPriorNetwork`.
        step_net: runs the steps in its place, such as one that is quantised.

    Attributes:
        step: see `solver_step`.
        times: (steps,), of the network.
        rows: (steps, 6) fp32, the solver's coefficients.
        null_table: (steps, dim) null predictions; zeros, which leave predictions as they are, without guidance by them.
    """

    def __init__(self, net: nn.Module, plan: SamplingPlan, step_net: nn.Module | None = None):
        table, device = plan.table, next(net.parameters()).device
        self.net, self.step_net, self.plan = net, step_net or net, plan
        self.times, self.rows = torch.tensor(table.times, device=device), table.rows.to(device, torch.float32)
        if plan.guidance == "null table":
            self.null_table = null_table(net, table.times)
        else:
            self.null_table = self.rows.new_zeros(len(self.rows), net.dim)
        self.step = solver_step(predictor(self.step_net), plan.clamp, plan.radius)

    def tables(self) -> dict[str, Tensor]:
        """All tables of the plan, for a prefill that they are an input of."""
        return dict(times=self.net.time_tokens(self.times), null_table=self.null_table, rows=self.rows)

    def prefill(self, text_cond: dict, samples: int, tables: dict[str, Tensor] | None = None) -> StepInputs:
        """Run the texts once, for steps of `samples` rows of each prompt; their tables may be others, see `tables`."""
        tables = tables or dict(times=self.times, null_table=self.null_table, rows=self.rows)
        net, text_embed, times = self.net, text_cond["text_embed"], tables["times"]
        null_rows = len(text_embed) if self.plan.guidance == "second branch" else 0
        cond = net.prefill(text_embed, text_cond.get("text_encodings"), times, null_rows, text_cond.get("conditions"))
        cond = net.share(cond, samples)
        cond = cond if self.step_net is net else self.step_net.prepare(cond)
        return StepInputs(cond, tables["rows"], tables["null_table"])

    def run(self, inputs: StepInputs, cond_scale: float, samples: int) -> Run | None:
        """A run for `samples` rows whose steps are kernels alone, in C one each; None where there is none for them."""
        net = self.step_net
        if not isinstance(net, DiffusionPriorNetwork) or torch.get_default_dtype() != torch.float32:  # of the noise
            return None
        solver = dict(coefficients=inputs.rows, null_table=inputs.null_table, cond_scale=cond_scale)
        return net.prepare_run(inputs.cond, samples, **solver, clamp=self.plan.clamp, radius=self.plan.radius)


def run_prior(prior: nn.Module, noise: Iterator[Tensor], run: Callable[[Tensor], Tensor]) -> Tensor:
    """A whole run of a `DiffusionPrior` from the first noise on, by what takes that through all steps.

    Noise is drawn as DALLE2-pytorch draws it: the start, then one tensor at each step that has one.
    """
    x = next(noise)
    if prior.init_image_embed_l2norm:
        x = l2norm(x) * prior.image_embed_scale
    x = run(x)
    if prior.sampling_final_clamp_l2norm and prior.predict_x_start:
        x = prior.l2norm_clamp_embed(x)
    return x


def sample_loop(
    prior: nn.Module,
    plan: SamplingPlan,
    rows: int,
    text_cond: dict,
    cond_scale: float,
    noise: Iterator[Tensor],
    progress: bool = True,
) -> Tensor:
    """Run a plan of a `DiffusionPrior`: (rows, dim) scaled embeddings, before `denormalize`."""
    table = plan.table
    with ops.sharing():
        if plan.path == "cached":
            step = _cached_step(snapshot.held(prior.net), plan, rows, text_cond, cond_scale)
        else:
            step = _plain_step(prior, plan, rows, text_cond, cond_scale, noise)
            table = replace(table, draws_noise=(False,) * len(table.times))  # it draws itself, behind the network
        return run_prior(prior, noise, lambda x: run_table(table, step, x, noise, progress))


def _cached_step(net: nn.Module, plan: SamplingPlan, rows: int, text_cond: dict, cond_scale: float) -> Step | Run:
    steps = CachedSteps(net, plan)
    inputs = steps.prefill(text_cond, rows // max(len(text_cond["text_embed"]), 1))
    if (run := steps.run(inputs, cond_scale, rows)) is not None:
        return run
    return bind(steps.step, inputs, torch.tensor(cond_scale, dtype=torch.float32, device=steps.rows.device))


def _plain_step(
    prior: nn.Module, plan: SamplingPlan, rows: int, text_cond: dict, cond_scale: float, noise: Iterator[Tensor]
) -> Step:
    text_cond, table, schedule = repeat_rows(text_cond, rows), plan.table, prior.noise_scheduler
    by_p_sample = table.solver == "ddpm" and bool(plan.overrides)
    by_noise = table.solver == "ddim" and "predict_noise_from_start" in plan.overrides

    def step(x, x0, _, index):
        t = torch.full((rows,), table.times[index], device=x.device, dtype=torch.long)
        self_cond = x0 if prior.net.self_cond and index else None
        if by_p_sample:
            return prior.p_sample(x, t, text_cond=text_cond, self_cond=self_cond, cond_scale=cond_scale)
        pred = prior.net.forward_with_cond_scale(x, t, cond_scale=cond_scale, self_cond=self_cond, **text_cond)
        start = prior.x_start_from(x, t, pred)
        _, _, a, b, c, s = table.rows[index].tolist()
        drawn = next(noise) if table.draws_noise[index] else 0.0
        if by_noise:  # the table folds the noise prediction into a and b: take it out again
            recip, recipm1 = (
                values[table.times[index]].item()
                for values in (schedule.sqrt_recip_alphas_cumprod, schedule.sqrt_recipm1_alphas_cumprod)
            )
            direction = a * recipm1 / recip
            predicted = schedule.predict_noise_from_start(x, t=t, x0=start)
            return direction * predicted + (b + direction / recipm1) * start + s * drawn, start
        return a * x + b * start + c * x0 + s * drawn, start

    return step
