"""Solvers as tables: each step of each solver is `x <- a*x + b*x0 + c*x0_prev + s*noise` with fixed coefficients.

A row also holds how to read a clean embedding off the network's prediction, `x0 = p*x + q*pred`. The rows are made once
on the host in fp64 from the schedule's fp32 buffers, so one loop runs every solver with no branch on a tensor.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastprior.checks import check_choice, check_share, is_integer
from fastprior.diffusion.schedule import NoiseScheduler
from fastprior.reading import quoted

FIRST_LOG_SNR = -3.5  # half of it, where ā is 0.001: a sample is as good as noise, and earlier steps change nothing
Pair = tuple[int, float, float]  # a time, ā at it, and ā at the next one, which after the last is 1


@dataclass(frozen=True)
class StepTable:
    """The steps of one run.

    Attributes:
        solver: its name.
        times: the network's time at each step, in order.
        rows: (steps, 6) fp64 on the host, columns p, q, a, b, c, s.
        draws_noise: which steps draw a noise tensor, whether or not its coefficient is zero: the draws are part of what
            a seed means.
        spacing: how its times were chosen; None where they are the solver's own.
        uses_prediction: c multiplies the guided prediction of the same step instead of the last x0.
        noise_scale: of the initial noise.
    """

    solver: str
    times: tuple[float, ...]
    rows: Tensor
    draws_noise: tuple[bool, ...]
    spacing: str | None = None
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


def _trailing(alphas: Tensor, steps: int) -> list[int]:
    """Evenly spaced from the last time downwards ("trailing", Lin et al. 2024)."""
    timesteps = len(alphas)
    return [round(timesteps - i * timesteps / steps) - 1 for i in range(steps)]


def _half_log_snr(alphas: Tensor) -> tuple[np.ndarray, float, float]:
    """(timesteps,) fp64, falling, without infinities where ā is 0 or 1; those of a run's first step and of its end."""
    alphas = alphas.double().numpy()
    with np.errstate(divide="ignore"):
        log_snr = (0.5 * (np.log(alphas) - np.log1p(-alphas))).clip(-9, 9)  # the next ā of fp32 to 1 is below
    return log_snr, max(FIRST_LOG_SNR, log_snr[-1]), log_snr[0]


def _times_at(log_snr: np.ndarray, levels: np.ndarray) -> list[int]:
    """The times nearest to rising half log-SNRs, all different: where levels are closer than times, the next ones."""
    nearest = np.interp(-levels, -log_snr, np.arange(len(log_snr))).round().astype(int).tolist()
    times, last = [], len(log_snr)
    for after, time in zip(reversed(range(len(levels))), nearest):
        last = max(min(time, last - 1), after)  # with room for those that come after
        times.append(last)
    return times


def _logsnr(alphas: Tensor, steps: int) -> list[int]:
    """Uniform in half log-SNR (Lu et al. 2022), from where a sample is still as good as noise."""
    log_snr, first, end = _half_log_snr(alphas)
    return _times_at(log_snr, np.linspace(first, end, steps + 1)[:-1])


def _karras(alphas: Tensor, steps: int) -> list[int]:
    """Uniform in the 7th root of sigma (Karras et al. 2022, eq. 5), between the ends of `_logsnr`."""
    log_snr, first, end = _half_log_snr(alphas)
    roots = np.linspace(math.exp(-first / 7), math.exp(-end / 7), steps + 1)[:-1]
    return _times_at(log_snr, -7 * np.log(roots))


SPACINGS = {"trailing": _trailing, "logsnr": _logsnr, "karras": _karras}


def _ddim_trailing(pairs: list[Pair], eta: float) -> list[tuple]:
    """DDIM as published (Song et al. 2021, eq. 12): `steps` evaluations from the noisiest time, variances in time."""
    rows = []
    for t, alpha, alpha_next in pairs:
        sigma = eta * math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
        x = math.sqrt(max(1 - alpha_next - sigma**2, 0.0) / (1 - alpha))
        rows.append((t, x, math.sqrt(alpha_next) - x * math.sqrt(alpha), 0.0, sigma, alpha_next < 1))
    return rows


def _multistep(pairs: list[Pair], noise: bool) -> list[tuple]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) of the probability flow ODE, or of the reverse SDE.

    With h the step in half log-SNR, the step from alpha to alpha_next that is exact for an x0 that stays is

        ODE: x <- sqrt((1 - alpha_next) / (1 - alpha)) * x + sqrt(alpha_next) * (1 - exp(-h)) * x0
        SDE: x <- sqrt((1 - alpha_next) / (1 - alpha)) * exp(-h) * x + sqrt(alpha_next) * (1 - exp(-2h)) * x0
                  + sqrt((1 - alpha_next) * (1 - exp(-2h))) * noise

    of which the second is the posterior q(x_next | x, x0). Of second order it is with the x0 of the middle of the step,
    on the line through the last two. The first step has no last x0, and the last gives x0 itself.
    """
    log_snr = [_log_snr(alpha) for _, alpha, _ in pairs]
    rows = []
    for i, (t, alpha, alpha_next) in enumerate(pairs):
        if alpha_next == 1:
            rows.append((t, 0.0, 1.0, 0.0, 0.0, False))
            continue
        h, before = log_snr[i + 1] - log_snr[i], log_snr[i] - log_snr[i - 1] if i else 0.0
        ratio = math.sqrt((1 - alpha_next) / (1 - alpha)) * (math.exp(-h) if noise else 1.0)
        gain = -math.sqrt(alpha_next) * math.expm1(-2 * h if noise else -h)
        second_order = 0.5 * h / before if before else 0.0
        sigma = math.sqrt(-(1 - alpha_next) * math.expm1(-2 * h)) if noise else 0.0
        rows.append((t, ratio, gain * (1 + second_order), -gain * second_order, sigma, noise))
    return rows


def _log_snr(alpha: float) -> float:
    """Half the log of the ratio of signal to noise."""
    return 0.5 * (math.log(alpha) - math.log1p(-alpha)) if 0 < alpha < 1 else math.copysign(math.inf, alpha - 0.5)


def _dpm_solver_pp(pairs: list[Pair], eta: float) -> list[tuple]:
    return _multistep(pairs, noise=False)


def _sde_dpm_solver_pp(pairs: list[Pair], eta: float) -> list[tuple]:
    return _multistep(pairs, noise=True)


PEERS = {"ddpm": _ddpm, "ddim": _ddim}  # whose times are part of what a seed means
SPACED = {"ddim_trailing": _ddim_trailing, "dpm++": _dpm_solver_pp, "sde-dpm++": _sde_dpm_solver_pp}
SOLVERS = PEERS | SPACED
LEARNED = "learned"  # a table of a checkpoint, see `learned_tables`
STOCHASTIC = ("ddim", "ddim_trailing")  # the solvers that `eta` means something to


def spaced_rows(alphas: Tensor, solver: str, steps: int, spacing: str, eta: float, first: int = 0) -> list[tuple]:
    """Rows (t, a, b, c, s, draws_noise) of a solver whose times can be spaced.

    Args:
        alphas: (timesteps,), ā on the host.
        spacing: one of SPACINGS.
        first: the step that a run begins with, of `steps`.
    """
    return _rows_at(alphas, solver, SPACINGS[spacing](alphas, steps)[first:], eta)


def _rows_at(alphas: Tensor, solver: str, times: list[int], eta: float) -> list[tuple]:
    bars = [alphas[t].item() for t in times] + [1.0]
    return SPACED[solver](list(zip(times, bars[:-1], bars[1:])), eta)


def choose_solver(solver: str | None, timesteps: int, steps: int | None) -> str:
    """The solver named, or else by DALLE2-pytorch's rule: DDPM over the whole schedule, DDIM for fewer steps."""
    if solver is None:
        return "ddpm" if steps in (None, timesteps) else "ddim"
    if not isinstance(solver, str) or solver not in SOLVERS:
        check_choice("solver", solver, (*SOLVERS, LEARNED))
    return solver


def check_spacing(solver: str, spacing: str | None) -> None:
    """Raise ValueError unless a solver can be given that spacing."""
    if spacing is None:
        return
    if solver not in SPACED:
        raise ValueError(f"spacing={quoted(spacing)}; the {solver} solver has times of its own, so it must be None")
    check_choice("spacing", spacing, SPACINGS)


def step_table(
    schedule: NoiseScheduler,
    solver: str | None,
    steps: int | None,
    prediction: str = "x0",
    eta: float | None = None,
    spacing: str | None = None,
) -> StepTable:
    """Make the table of a run.

    Args:
        schedule: whose buffers the coefficients are read from.
        solver: "ddpm" (all timesteps), "ddim" (DALLE2-pytorch's grid and its steps - 1 evaluations), "ddim_trailing"
            (as published, at any spacing), "dpm++" (DPM-Solver++(2M)) or "sde-dpm++" (the same of the SDE, with DDPM's
            noise); None as `choose_solver` says.
        steps: 1 up to the schedule's timesteps; None for all.
        prediction: what the network predicts: "x0", "v" or "noise".
        eta: noise of the DDIM solvers, 0 (none) to 1 (ancestral, the default).
        spacing: how the times of all but "ddpm" and "ddim" are chosen: "trailing" (evenly, from the last; the default),
            "logsnr" (evenly in half log-SNR, from -3.5 on) or "karras" (evenly in the 7th root of sigma, between the
            same ends). No time comes twice: where those wanted are closer than the schedule's, the next ones are taken.
    Raises:
        ValueError: naming the argument, its value and the rule.
    """
    timesteps = schedule.num_timesteps
    steps = timesteps if steps is None else steps
    solver = choose_solver(solver, timesteps, steps)
    if not (is_integer(steps) and 1 <= steps <= timesteps):
        raise ValueError(f"timesteps={quoted(steps)}; the schedule has {timesteps}, so it must be 1 to {timesteps}")
    steps = int(steps)
    if solver == LEARNED:
        raise ValueError(f"solver={solver!r}; its tables belong to the weights of a prior, which must be called itself")
    if solver == "ddpm" and steps != timesteps:
        raise ValueError(f"timesteps={steps}; the ddpm solver visits all {timesteps} of the schedule")
    if eta is not None and solver not in STOCHASTIC:
        raise ValueError(f"eta={eta}; the {solver} solver has no eta, only {' and '.join(STOCHASTIC)} do")
    if eta is not None:
        check_share("eta", eta)
    check_spacing(solver, spacing)
    host, eta = _OnHost(schedule), 1.0 if eta is None else eta
    if solver in SPACED:
        spacing = spacing or "trailing"
        rows = spaced_rows(host.alphas_cumprod, solver, steps, spacing, eta)
    else:
        rows = PEERS[solver](host, steps, eta)
    return _table(host, solver, steps, rows, prediction, spacing)


def ode_table(schedule: NoiseScheduler, prediction: str, evaluations: int) -> StepTable:
    """Make the table of a run that comes near the solution of the probability flow ODE: "dpm++" with many evaluations.

    Their times are spaced evenly in half log-SNR over the whole schedule, also where a sample is as good as noise.
    """
    host = _OnHost(schedule)
    log_snr, _, end = _half_log_snr(host.alphas_cumprod)
    times = _times_at(log_snr, np.linspace(log_snr[-1], end, evaluations + 1)[:-1])
    rows = _rows_at(host.alphas_cumprod, "dpm++", times, 0.0)
    return _table(host, "dpm++", evaluations, rows, prediction, None)


def _table(
    host: NoiseScheduler, solver: str, steps: int, rows: list[tuple], prediction: str, spacing: str | None
) -> StepTable:
    """The table of rows as `SOLVERS` give them."""
    coefficients = [(*_x0_from_prediction(host, prediction, t), *row) for t, *row, _ in rows]
    if any(math.isinf(row[0]) for row in coefficients):
        rule = f"it ends without signal, and {solver} would read x0 off a prediction of {prediction} there"
        raise ValueError(f"timesteps={steps}; with this schedule not every step is finite: {rule}")
    return StepTable(
        solver=solver,
        times=tuple(row[0] for row in rows),
        rows=torch.tensor(coefficients, dtype=torch.float64).view(-1, 6),
        draws_noise=tuple(row[-1] for row in rows),
        spacing=spacing,
    )
