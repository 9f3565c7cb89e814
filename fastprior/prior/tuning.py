"""Step tables learned for the weights of a prior: few evaluations that end near where many would.

A table has few numbers, and the network stays as it is: the gradient of the distance between a short run and the
solution of the ODE from the same noise goes through the steps behind the prefix cache to coefficients and times.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from fastprior.batches import map_rows
from fastprior.checks import check_count
from fastprior.diffusion.learned_tables import Agreement, HeldOut, LearnedTable, Scales, check_scales
from fastprior.diffusion.solvers import StepTable, ode_table, step_table
from fastprior.kernels import reference
from fastprior.models import snapshot
from fastprior.models.weight_lock import lock_of
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.learned import digests
from fastprior.prior.loop import null_table, predictor, run_prior, sample_loop
from fastprior.prior.plan import make_plan

ODE_EVALUATIONS = 64  # on the demos' priors the median cosine to 1000 is 1.00000, and the 5 % figure 0.9999
STEPS, WITH_TIMES = 240, 144  # of the fit, and those of them that move the times, too
JUDGED_EVERY = 12  # of the others
BATCHES, BATCH_ROWS, BATCH_PROMPTS = 16, 96, 32  # that the fit goes round, each at one guidance scale
JUDGED_ROWS = 256  # of each guidance scale, in selection; twice as many are held out
LEAST_PROMPTS, MOST_PROMPTS = 8, 1024  # different ones; of more some are drawn
JUDGED_SCALES = 4  # of each interval of guidance, its ends among them
WORST_SHARE = 1.5
RATE, TIME_RATE = 0.02, 0.006  # of Adam, for coefficients, and for times as a share of the schedule


def tune(
    prior: DiffusionPrior,
    text_cond: dict,
    evaluations: int,
    *,
    scales: Sequence[Sequence[float]] = ((1.0, 1.0),),
    seed: int = 0,
    progress: bool = True,
) -> LearnedTable:
    """Learn the step table of `solver="learned"` for a prior's weights, and add it to `prior.learned_tables`.

    Half of the prompts are learned on; a quarter chooses the best of what the fit passes through, and the others, held
    out, decide whether it is good enough. Only then is it kept.

    Args:
        prior: in eval mode, with a network that can be cached (see `prior.sampling_plan`).
        text_cond: of prompts that matter, 8 different ones or more: a dict as `DiffusionPrior.p_sample_loop` takes it.
        evaluations: of the network, as `timesteps` of its runs.
        scales: pairs (least, most) of guidance scales that it will serve; twice the same for one alone.
        seed: of noise and prompts; the global random generators are not touched.
        progress: show a bar.
    Returns:
        The table, with what the held-out prompts showed.
    Raises:
        ValueError: an argument does not fit, the prior cannot be cached; or for some scale the table is no better than
            "dpm++" at "logsnr" times with as many evaluations, with the figures of both.
    """
    scales = check_scales("scales", scales)
    _check(prior, text_cond, evaluations, scales)
    with torch.inference_mode(False), torch.enable_grad():
        with lock_of(prior):
            digest, twin = digests(prior), copy.deepcopy(prior, {id(prior.clip): prior.clip})
        twin.net.float().requires_grad_(False)
        fit = _Fit(twin, text_cond, int(evaluations), scales, seed)
        with tqdm(total=fit.length, desc=f"{evaluations} evaluations", disable=not progress) as bar:
            table = fit.run(bar)
            found = fit.held_out(table, bar)
    judge(len(table), found)
    table = replace(table, scales=scales, digests=digest, held_out=found)
    prior.learned_tables = {**prior.learned_tables, len(table): table}
    return table


def _check(prior: DiffusionPrior, text_cond: dict, evaluations: int, scales: Scales) -> None:
    if prior.training:
        raise ValueError("prior.training=True; it must be in eval mode: call prior.eval()")
    check_count("evaluations", evaluations, 2, prior.noise_scheduler.num_timesteps)
    for scale in sorted({end for pair in scales for end in pair}):
        plan = prior.sampling_plan(evaluations, scale, "dpm++", spacing="logsnr")
    if plan.path != "cached":
        raise ValueError(f"this prior cannot be tuned: {'; '.join(plan.reasons)}")
    prompts = len(text_cond["text_embed"])
    prior.check_text_condition((prompts, prior.image_embed_dim), text_cond)


def judge(evaluations: int, found: Sequence[HeldOut]) -> None:
    """Raise ValueError, with the figures, unless a table is good enough to be kept.

    For each scale it must be better than "dpm++" in the median, and no worse in the 5 % figure. The worst of all is one
    row of many hundred, often one whose noise lies between two solutions: its distance from 1 may be half as much more.
    """
    faults = [
        f"{name} {now:.5f} at cond_scale {one.cond_scale:g}, it must be {rule} {then:.5f}"
        for one in found
        for name, rule, now, then in zip(("median", "5 %"), ("more than", "at least"), one.learned, one.untuned)
        if not (now > then or (now == then and name != "median"))  # nor is NaN
    ]
    worst, least = (float(np.min([getattr(one, kind).worst for one in found])) for kind in ("learned", "untuned"))
    least = 1 - WORST_SHARE * (1 - least)
    if not worst >= least:
        faults.append(f"worst {worst:.5f} of all, it must be at least {least:.5f}")
    if faults:
        raise ValueError(
            f"no table of {evaluations} evaluations was learned that is better than dpm++ at logsnr times, by the "
            f"cosine of held-out prompts to the solution of the ODE: {'; '.join(faults)}"
        )


@dataclass
class _Rows:
    """Rows of some prompts at one guidance scale, their noise, and where the ODE leads from it."""

    text: dict
    cond_scale: float
    noise: Tensor
    solution: Tensor


class _Fit:
    """The fit of one table."""

    def __init__(self, prior: DiffusionPrior, text_cond: dict, evaluations: int, scales: Scales, seed: int):
        self.prior, self.net, self.scales = prior, prior.net, scales
        self.draw = torch.Generator().manual_seed(seed)
        self.schedule, self.timesteps = prior.noise_scheduler, prior.noise_scheduler.num_timesteps
        self.ode = ode_table(self.schedule, prior.prediction, min(ODE_EVALUATIONS, self.timesteps))
        self.judged = [scale for pair in scales for scale in np.unique(np.linspace(*pair, JUDGED_SCALES)).tolist()]
        self.untuned = step_table(self.schedule, "dpm++", evaluations, prior.prediction, spacing="logsnr")
        self.parts = self._parts(text_cond)
        self.batches = max(BATCHES, 2 * len(scales))  # so that each interval has both its ends
        self.length = self.batches + 2 * len(self.judged) + STEPS

    def _parts(self, text_cond: dict) -> list[dict]:
        """Prompts to learn on, to select by and to hold out, of which none comes twice."""
        rows = {row.tobytes(): index for index, row in enumerate(text_cond["text_embed"].float().cpu().numpy())}
        different = torch.tensor(list(rows.values()))
        if len(different) < LEAST_PROMPTS:
            raise ValueError(f"text_cond has {len(different)} different prompts; it must have at least {LEAST_PROMPTS}")
        different = different[torch.randperm(len(different), generator=self.draw)][:MOST_PROMPTS]
        half, quarter = len(different) // 2, len(different) // 4
        parts = different.split((half, quarter, len(different) - half - quarter))
        return [map_rows(text_cond, itemgetter(part.to(self.prior.device))) for part in parts]

    def _rows(self, text: dict, count: int, cond_scale: float) -> _Rows:
        """About `count` rows of some prompts, as many of each."""
        rows = len(text["text_embed"]) * max(1, round(count / len(text["text_embed"])))
        noise = torch.randn(rows, self.prior.image_embed_dim, generator=self.draw).to(self.prior.device)
        made = _Rows(text, cond_scale, noise, noise)
        made.solution = self._sample(self.ode, made)
        return made

    @torch.no_grad()
    def _sample(self, table: StepTable, of: _Rows) -> Tensor:
        """What a table gives, by the way that serves it, scaled."""
        prior = self.prior
        with snapshot.running(prior.net):
            plan = make_plan(prior, table, of.cond_scale, *prior.sampling_clamp())
            return sample_loop(prior, plan, len(of.noise), of.text, of.cond_scale, iter([of.noise]), progress=False)

    def _agreement(self, table: StepTable, of: _Rows) -> Agreement:
        cosine = F.cosine_similarity(self._sample(table, of), of.solution, dim=-1)
        return Agreement(cosine.median().item(), cosine.quantile(0.05).item(), cosine.min().item())

    def _judged_rows(self, text: dict, count: int, bar: tqdm) -> list[_Rows]:
        found = []
        for scale in self.judged:
            found.append(self._rows(text, count, scale))
            bar.update()
        return found

    def held_out(self, table: StepTable, bar: tqdm) -> tuple[HeldOut, ...]:
        rows = self._judged_rows(self.parts[2], 2 * JUDGED_ROWS, bar)
        return tuple(HeldOut(of.cond_scale, *(self._agreement(t, of) for t in (table, self.untuned))) for of in rows)

    def run(self, bar: tqdm) -> LearnedTable:
        """The table that the selection finds best."""
        self._tabulate()
        batches = [self._batch(number, bar) for number in range(self.batches)]
        selection = self._judged_rows(self.parts[1], JUDGED_ROWS, bar)
        base = [self._agreement(self.untuned, of) for of in selection]
        best, least = LearnedTable.of(self.untuned.times, self.untuned.rows), 0.0
        for table in self._fitted(batches, bar):
            score = _score([self._agreement(table, of) for of in selection], base)
            if score < least:
                best, least = table, score
        return best

    def _tabulate(self) -> None:
        """What a step takes of the time, at all times of the schedule: between them the fit goes straight."""
        device, times = self.prior.device, tuple(range(self.timesteps))
        with torch.no_grad():
            self.tokens = self.net.time_tokens(torch.tensor(times, device=device))
            self.nulls = torch.zeros(len(times), self.net.dim, device=device)
            if self.judged != [1.0] and not self.net.null_sees_image:
                self.nulls = null_table(self.net, times)
        self.readings = step_table(self.schedule, "ddpm", None, self.prior.prediction).rows[:, :2].flip(0)

    def _batch(self, number: int, bar: tqdm) -> tuple[_Rows, Any]:
        """Rows to learn on, at a scale of their own, with their prefix."""
        text, pairs = self.parts[0], self.scales
        least, most = pairs[number % len(pairs)]
        share = min(1.0, number // len(pairs) / (self.batches // len(pairs) - 1))
        chosen = torch.randperm(len(text["text_embed"]), generator=self.draw)[:BATCH_PROMPTS].to(self.prior.device)
        rows = self._rows(map_rows(text, itemgetter(chosen)), BATCH_ROWS, least + (most - least) * share)
        both = rows.cond_scale != 1 and self.net.null_sees_image
        with torch.no_grad():
            prefix = rows.text["text_embed"], rows.text.get("text_encodings"), self.tokens[:1]
            cond = self.net.prefill(*prefix, len(chosen) if both else 0, rows.text.get("conditions"))
            cond = self.net.share(cond, len(rows.noise) // len(chosen))
        bar.update()
        return rows, cond

    def _end(self, times: Tensor, coefficients: Tensor, rows: _Rows, cond: Any) -> Tensor:
        """Where a run ends, with gradient to real times (steps,) and to a, b, c (steps, 3).

        p and q are the schedule's: another q would only scale x0, as b and c do, and learning p gained nothing.
        """
        low = times.detach().floor().clamp(0, self.timesteps - 2).long()
        share = times - low

        def at(table: Tensor) -> Tensor:
            table = table.to(times.device, torch.float32)
            return torch.lerp(table[low], table[low + 1], share.view(-1, *[1] * (table.ndim - 1)))

        tokens, nulls, readings = map(at, (self.tokens, self.nulls, self.readings))
        cond, predict = cond._replace(time_tokens=tokens), predictor(self.net)
        clamp, index = self.prior.sampling_clamp(), torch.arange(len(times), device=times.device)

        def run(x: Tensor) -> Tensor:
            x0 = torch.zeros_like(x)
            for i, ((p, q), (a, b, c)) in enumerate(zip(readings, coefficients)):
                pred, null = predict(cond, x, x0, index[i])
                pred, before = torch.lerp(nulls[i] if null is None else null, pred, rows.cond_scale), x0
                x0 = reference.clamp_x0(p * x + q * pred, *clamp)
                x = a * x + b * x0 + c * before
            return x

        return run_prior(self.prior, iter([rows.noise]), run)

    def _loss(self, *run: Any) -> Tensor:
        """Mean distance from the solutions: rows whose noise lies between two of them do not outweigh all others."""
        solution = run[2].solution
        missed = (self._end(*run) - solution).square().sum(dim=-1)
        return (missed + 1e-4 * solution.square().sum(dim=-1)).sqrt().mean()

    def _fitted(self, batches: list, bar: tqdm) -> Iterator[LearnedTable]:
        """Tables that the fit passes through, of integer times."""
        device, start = self.prior.device, self.untuned
        times = torch.tensor(start.times, dtype=torch.float32, device=device)
        coefficients = start.rows[:, 2:5].to(device, torch.float32, copy=True)
        with torch.no_grad():  # so that no scale outweighs the others
            usual = [self._loss(times, coefficients, *batch) for batch in batches]
        times.requires_grad_()
        coefficients.requires_grad_()
        rates = (coefficients, RATE), (times, TIME_RATE * self.timesteps)
        groups = [dict(params=[part], rate=rate) for part, rate in rates]
        optimizer = torch.optim.Adam(groups, lr=RATE, betas=(0.9, 0.99))
        for step in range(STEPS):
            if step == WITH_TIMES:
                with torch.no_grad():
                    times.copy_(torch.tensor(self._integers(times), device=device))
                times.requires_grad_(False)
            if step % len(batches) == 0:
                order = torch.randperm(len(batches), generator=self.draw).tolist()
            chosen = order[step % len(batches)]
            optimizer.zero_grad()
            (self._loss(times, coefficients, *batches[chosen]) / usual[chosen]).backward()
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * min(1, (step + 1) / 10) * (1 + math.cos(math.pi * step / STEPS)) / 2
                torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            with torch.no_grad():
                times.clamp_(0, self.timesteps - 1)
            bar.update()
            if step >= WITH_TIMES and (step + 1) % JUDGED_EVERY == 0:
                yield self._table(times, coefficients)

    def _integers(self, times: Tensor) -> list[int]:
        """The nearest times of the schedule, falling."""
        found, last = [], self.timesteps
        for after, time in zip(reversed(range(len(times))), times.round().long().tolist()):
            last = max(min(time, last - 1), after)  # with room for those that come after
            found.append(last)
        return found

    def _table(self, times: Tensor, coefficients: Tensor) -> LearnedTable:
        chosen = self._integers(times)
        numbers = F.pad(coefficients.detach().cpu().double(), (0, 1))
        return LearnedTable.of(chosen, torch.cat((self.readings[chosen], numbers), dim=1))


def _score(found: Sequence[Agreement], base: Sequence[Agreement]) -> float:
    """How much of the untuned table's distances is left, as a mean logarithm: less is better."""
    left = [[math.log((1 - now + 1e-7) / (1 - then + 1e-7)) for now, then in zip(*pair)] for pair in zip(found, base)]
    typical = sum(median + percentile for median, percentile, _ in left) / (2 * len(left))
    return typical + 0.1 * max(map(max, left))
