"""Solvers as tables: each step of each solver is `x <- a*x + b*x0 + c*x0_prev + s*noise` with fixed coefficients.

A row also holds how to read a clean embedding off the network's prediction, `x0 = p*x + q*pred`. The rows are made once
on the host in fp64 from the schedule's fp32 buffers, so one loop runs every solver with no branch on a tensor.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastprior.checks import check_choice, check_share, is_integer
from fastprior.diffusion.schedule import NoiseScheduler
from fastprior.reading import quoted


@dataclass(frozen=True)
class StepTable:
    """The steps of one run.

    Attributes:
        solver: its name.
        times: the network's time at each step, in order.
        rows: (steps, 6) fp64 on the host, columns p, q, a, b, c, s.
        draws_noise: which steps draw a noise tensor, whether or not its coefficient is zero: the draws are part of what
            a seed means.
        uses_prediction: c multiplies the guided prediction of the same step instead of the last x0.
        noise_scale: of the initial noise.
    """

    solver: str
    times: tuple[float, ...]
    rows: Tensor
    draws_noise: tuple[bool, ...]
    uses_prediction: bool = False
    noise_scale: float = 1.0

    def __len__(self) -> int:
        return len(self.times)


class _OnHost:
    """A schedule whose tensors are on the host: each is copied once, not number by number."""

    def __init__(self, schedule: NoiseScheduler):
        self.schedule = schedule

    def __getattr__(self, name: str):
        value = getattr(self.schedule, name)
        setattr(self, name, value.cpu() if torch.is_tensor(value) else value)
        return vars(self)[name]


def _x0_from_prediction(schedule: NoiseScheduler, prediction: str, t: int) -> tuple[float, float]:
    """p and q of `x0 = p*x + q*pred` at time t, where the network predicts "x0", "v" or "noise"."""
    if prediction == "x0":
        return 0.0, 1.0
    if prediction == "v":
        return schedule.sqrt_alphas_cumprod[t].item(), -schedule.sqrt_one_minus_alphas_cumprod[t].item()
    return schedule.sqrt_recip_alphas_cumprod[t].item(), -schedule.sqrt_recipm1_alphas_cumprod[t].item()


def _ddpm(schedule: NoiseScheduler, steps: int, eta: float) -> list[tuple]:
    """Ancestral sampling over the whole schedule (Ho et al. 2020); noise is drawn, and unused, at t = 0 too."""
    rows = []
    for t in reversed(range(steps)):
        sigma = math.exp(0.5 * schedule.posterior_log_variance_clipped[t].item()) if t else 0.0
        coefficients = schedule.posterior_mean_coef2[t].item(), schedule.posterior_mean_coef1[t].item()
        rows.append((t, *coefficients, 0.0, sigma, True))
    return rows


def _ddim(schedule: NoiseScheduler, steps: int, eta: float) -> list[tuple]:
    """DDIM on DALLE2-pytorch's grid: `steps - 1` evaluations, variances one timestep early, no noise into t = 0.

    The predicted noise is `(recip*x - x0) / recipm1`, so the update is linear in x and x0.
    """
    alphas = schedule.alphas_cumprod_prev
    grid = torch.linspace(-1.0, schedule.num_timesteps, steps + 1)[:-1].int().tolist()[::-1]
    rows = []
    for t, t_next in itertools.pairwise(grid):
        if t_next < 0:
            rows.append((t, 0.0, 1.0, 0.0, 0.0, False))
            continue
        # in fp32 and in this order: 1 - alpha / alpha_next cancels, and the same rounding is part of the same embedding
        alpha, alpha_next = alphas[t], alphas[t_next]
        sigma = eta * ((1 - alpha / alpha_next) * (1 - alpha_next) / (1 - alpha)).sqrt()
        direction = ((1 - alpha_next) - sigma.square()).clamp(min=0).sqrt().item()
        recip, recipm1 = schedule.sqrt_recip_alphas_cumprod[t].item(), schedule.sqrt_recipm1_alphas_cumprod[t].item()
        x, x0 = direction * recip / recipm1, alpha_next.sqrt().item() - direction / recipm1
        rows.append((t, x, x0, 0.0, sigma.item() if t_next > 0 else 0.0, t_next > 0))
    return rows


def trailing_times(timesteps: int, steps: int) -> list[int]:
    """`steps` evenly spaced times from timesteps - 1 downwards ("trailing", Lin et al. 2024)."""
    return [round(timesteps - i * timesteps / steps) - 1 for i in range(steps)]


def _trailing_pairs(schedule: NoiseScheduler, steps: int) -> list[tuple[int, float, float]]:
    """(t, ā at t, ā at the next time), ending at ā = 1, in fp64."""
    times = trailing_times(schedule.num_timesteps, steps)
    alphas = [schedule.alphas_cumprod[t].item() for t in times] + [1.0]
    return list(zip(times, alphas[:-1], alphas[1:]))


def _ddim_trailing(schedule: NoiseScheduler, steps: int, eta: float) -> list[tuple]:
    """DDIM as published (Song et al. 2021, eq. 12): `steps` evaluations from the noisiest time, variances in time."""
    rows = []
    for t, alpha, alpha_next in _trailing_pairs(schedule, steps):
        sigma = eta * math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
        x = math.sqrt(max(1 - alpha_next - sigma**2, 0.0) / (1 - alpha))
        rows.append((t, x, math.sqrt(alpha_next) - x * math.sqrt(alpha), 0.0, sigma, alpha_next < 1))
    return rows


def _dpm_solver_pp(schedule: NoiseScheduler, steps: int, eta: float) -> list[tuple]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), deterministic; the first and the last step are of first order."""
    pairs = _trailing_pairs(schedule, steps)
    log_snr = [0.5 * (math.log(alpha) - math.log1p(-alpha)) for _, alpha, _ in pairs]
    rows = []
    for i, (t, alpha, alpha_next) in enumerate(pairs):
        if alpha_next == 1:
            rows.append((t, 0.0, 1.0, 0.0, 0.0, False))
            continue
        h = log_snr[i + 1] - log_snr[i]
        ratio = math.sqrt((1 - alpha_next) / (1 - alpha))
        gain = -math.sqrt(alpha_next) * math.expm1(-h)
        second_order = 0.5 * h / (log_snr[i] - log_snr[i - 1]) if i else 0.0
        rows.append((t, ratio, gain * (1 + second_order), -gain * second_order, 0.0, False))
    return rows


SOLVERS = {"ddpm": _ddpm, "ddim": _ddim, "ddim_trailing": _ddim_trailing, "dpm++": _dpm_solver_pp}
STOCHASTIC = ("ddim", "ddim_trailing")  # the solvers that `eta` means something to


def choose_solver(solver: str | None, timesteps: int, steps: int) -> str:
    """The solver named, or else by DALLE2-pytorch's rule: DDPM over the whole schedule, DDIM for fewer steps."""
    if solver is not None:
        check_choice("solver", solver, SOLVERS)
    return solver or ("ddpm" if steps == timesteps else "ddim")


def step_table(
    schedule: NoiseScheduler, solver: str, steps: int, prediction: str = "x0", eta: float | None = None
) -> StepTable:
    """Make the table of a run.

    Args:
        schedule: whose buffers the coefficients are read from.
        solver: "ddpm" (all timesteps), "ddim" (DALLE2-pytorch's grid and its steps - 1 evaluations), "ddim_trailing"
            (as published) or "dpm++" (DPM-Solver++(2M)).
        steps: 1 up to the schedule's timesteps.
        prediction: what the network predicts: "x0", "v" or "noise".
        eta: noise of the DDIM solvers, 0 (none) to 1 (ancestral, the default).
    Raises:
        ValueError: naming the argument, its value and the rule.
    """
    timesteps = schedule.num_timesteps
    if not isinstance(solver, str) or solver not in SOLVERS:
        check_choice("solver", solver, SOLVERS)
    if not (is_integer(steps) and 1 <= steps <= timesteps):
        raise ValueError(f"timesteps={quoted(steps)}; the schedule has {timesteps}, so it must be 1 to {timesteps}")
    if solver == "ddpm" and steps != timesteps:
        raise ValueError(f"timesteps={steps}; the ddpm solver visits all {timesteps} of the schedule")
    if eta is not None and solver not in STOCHASTIC:
        raise ValueError(f"eta={eta}; the {solver} solver has no eta, only {' and '.join(STOCHASTIC)} do")
    if eta is not None:
        check_share("eta", eta)
    host = _OnHost(schedule)
    rows = SOLVERS[solver](host, steps, 1.0 if eta is None else eta)
    coefficients = [(*_x0_from_prediction(host, prediction, t), *row) for t, *row, _ in rows]
    return StepTable(
        solver=solver,
        times=tuple(row[0] for row in rows),
        rows=torch.tensor(coefficients, dtype=torch.float64).view(-1, 6),
        draws_noise=tuple(row[-1] for row in rows),
    )
