"""Step tables of diffusers' schedulers, made from a `scheduler_config.json`, without diffusers.

Coefficients are computed in fp32 and in diffusers' order: at small times `1 - ā` cancels, and the same rounding is part
of the same embedding.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastprior.checks import check_choice, check_count, check_number, check_share, is_integer
from fastprior.diffusion.schedule import BETA_SCHEDULES
from fastprior.diffusion.solvers import SPACED, StepTable, check_spacing, spaced_rows
from fastprior.reading import quoted, read_json
from fastprior.utils import nearest

_COMMON = dict(
    num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", trained_betas=None,
    prediction_type="epsilon", clip_sample=True, clip_sample_range=1.0, timestep_spacing="leading", steps_offset=0,
    thresholding=False, rescale_betas_zero_snr=False,
)  # fmt: skip
_SIGMAS = dict(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)
DEFAULTS = {
    "UnCLIPScheduler": dict(_COMMON, beta_schedule="squaredcos_cap_v2", variance_type="fixed_small_log"),
    "DDPMScheduler": dict(_COMMON, variance_type="fixed_small"),
    "DDIMScheduler": dict(_COMMON, set_alpha_to_one=True),
    "HeunDiscreteScheduler": dict(
        _COMMON, **_SIGMAS, beta_start=0.00085, beta_end=0.012, clip_sample=False, timestep_spacing="linspace"
    ),
}
# `from_config` of another scheduler leaves its entries in the file, where they mean nothing
_KNOWN = {key for config in DEFAULTS.values() for key in config} | {"dynamic_thresholding_ratio", "sample_max_value"}
_ALLOWED = dict(
    prediction_type=("epsilon", "sample", "v_prediction"), timestep_spacing=("leading", "linspace", "trailing"),
    thresholding=(False,), rescale_betas_zero_snr=(False,),
)  # fmt: skip
_BETAS = "linear", "scaled_linear", "squaredcos_cap_v2"
_ALLOWED_BY_KIND = {
    "UnCLIPScheduler": dict(beta_schedule=_BETAS[2:], variance_type=("fixed_small_log",)),
    "DDPMScheduler": dict(
        beta_schedule=(*_BETAS, "sigmoid"), variance_type=("fixed_small", "fixed_small_log", "fixed_large")
    ),
    "DDIMScheduler": dict(beta_schedule=_BETAS),
    "HeunDiscreteScheduler": dict(
        beta_schedule=(*_BETAS, "exp"), use_exponential_sigmas=(False,), use_beta_sigmas=(False,)
    ),
}


def _betas(config: Mapping) -> Tensor:
    """(timesteps,) fp32."""
    timesteps, kind = config["num_train_timesteps"], config["beta_schedule"]
    start, end, trained = (config[name] for name in ("beta_start", "beta_end", "trained_betas"))
    if trained is not None:
        if not isinstance(trained, (list, tuple)):
            raise ValueError(f"trained_betas={quoted(trained)}; it must be a list of numbers")
        if len(trained) != timesteps:
            raise ValueError(f"trained_betas has {len(trained)} entries; num_train_timesteps says {timesteps}")
        for beta in trained:
            check_number("trained_betas", beta, 0, below=1)
        return torch.tensor(trained, dtype=torch.float32)
    check_number("beta_start", start, 0, below=1)
    check_number("beta_end", end, 0, below=1)
    if kind == "squaredcos_cap_v2":
        return BETA_SCHEDULES["cosine"](timesteps).float()
    if kind == "exp":  # ā falls from 1 to exp(-12)
        return torch.full((timesteps,), min(-np.expm1(-12 / timesteps), 0.999))
    if kind == "sigmoid":
        return torch.linspace(-6, 6, timesteps).sigmoid() * (end - start) + start
    power = 2 if kind == "scaled_linear" else 1
    return torch.linspace(start ** (1 / power), end ** (1 / power), timesteps) ** power


def _known(kind: str, config: Mapping) -> dict:
    """A configuration without diffusers' own entries. Raises ValueError for a key that no scheduler has."""
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in config.items():
        if key not in _KNOWN:
            rule = f"is no entry of a {kind}'s configuration; {nearest(key, _KNOWN)}"
            raise ValueError(f"{key:.100}={quoted(value)} {rule}")
    return config


def _check_solver(solver: str | None, spacing: str | None) -> None:
    """Raise ValueError unless a solver, and a spacing of its times, can take the place of a scheduler's."""
    if solver is not None:
        check_choice("solver", solver, (None, *SPACED))
        check_spacing(solver, spacing)
    elif spacing is not None:
        raise ValueError(f"spacing={quoted(spacing)}; a scheduler has times of its own, so it goes with a solver")


class DiffusersSchedule:
    """A scheduler of diffusers 0.42, by its configuration.

    Args:
        kind: its class: "UnCLIPScheduler", "DDPMScheduler", "DDIMScheduler" or "HeunDiscreteScheduler".
        **config: entries of its `scheduler_config.json`; the rest has that class's defaults. Keys that begin with an
            underscore, and those of the other classes, mean nothing.

    Attributes:
        clamp, radius: how a predicted x0 is clamped, see `kernels.reference.clamp_x0`.
        alphas_cumprod: (timesteps,) fp32, on the host.

    Raises:
        ValueError: naming the argument, its value and the rule.
    """

    def __init__(self, kind: str, **config):
        check_choice("kind", kind, DEFAULTS)
        config = _known(kind, config)
        self.kind, self.config = kind, DEFAULTS[kind] | config
        for key, values in (_ALLOWED_BY_KIND[kind] | _ALLOWED).items():
            if self.config[key] not in values:
                rule = f"for a {kind} it must be {' or '.join(map(repr, values))}"
                raise ValueError(f"{key}={quoted(self.config[key])}; {rule}")
        self.timesteps = self.config["num_train_timesteps"]
        check_count("num_train_timesteps", self.timesteps)
        check_number("clip_sample_range", self.config["clip_sample_range"], 0)
        check_count("steps_offset", self.config["steps_offset"], 0)
        self.betas = _betas(self.config)
        self.alphas_cumprod = (1.0 - self.betas).cumprod(dim=0)
        self.clamp = "range" if self.config["clip_sample"] else None
        self.radius = float(self.config["clip_sample_range"])

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> DiffusersSchedule:
        """Read a `scheduler_config.json`, or the one in a folder.

        Raises FileNotFoundError, and ValueError naming the file for what is none, and as the class.
        """
        path = Path(path)
        path = path / "scheduler_config.json" if path.is_dir() else path
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; it must be a scheduler_config.json")
        config = read_json(path, where=f"{path} is no scheduler_config.json: it")
        if "_class_name" not in config:
            raise ValueError(f"{path} is no scheduler_config.json: it has no _class_name")
        try:
            kind = config["_class_name"]
            return cls(kind, **_known(quoted(kind), config))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def table(
        self,
        steps: int,
        *,
        eta: float = 0.0,
        strength: float = 1.0,
        solver: str | None = None,
        spacing: str | None = None,
    ) -> StepTable:
        """Make the table of a run.

        Args:
            steps: `num_inference_steps`; a Heun scheduler evaluates the network 2 * steps - 1 times.
            eta: noise of the DDIM scheduler, or of "ddim_trailing", 0 (none) to 1.
            strength: run only the last part of the steps, from x0 with noise added (`add_noise`).
            solver: "ddim_trailing", "dpm++" or "sde-dpm++" in place of the scheduler's own, with `steps` evaluations.
            spacing: of that solver's times, see `fastprior.diffusion.solvers.step_table`.
        Raises:
            ValueError: naming the argument, its value and the rule.
        """
        _check_solver(solver, spacing)
        kind = solver or self.kind
        least = 2 if kind == "UnCLIPScheduler" else 1
        if not (is_integer(steps) and least <= steps <= self.timesteps):
            rule = f"for a {self.kind} of {self.timesteps} timesteps it must be {least} to {self.timesteps}"
            raise ValueError(f"num_inference_steps={quoted(steps)}; {rule}")
        steps = int(steps)
        check_number("eta", eta)
        check_number("strength", strength)
        if eta and kind not in ("DDIMScheduler", "ddim_trailing"):
            raise ValueError(f"eta={eta}; a {kind} has no eta, only a DDIMScheduler and ddim_trailing have")
        check_share("eta", eta)
        start = steps - min(int(steps * strength), steps)
        if not 0 <= strength <= 1 or start == steps:
            rule = f"it must be at most 1, and at least 1 / num_inference_steps, {1 / steps:.3g}"
            raise ValueError(f"strength={strength}; {rule}")
        if start and kind == "HeunDiscreteScheduler":
            raise ValueError(f"strength={strength}; a HeunDiscreteScheduler runs from pure noise, so it must be 1")
        make = {"DDIMScheduler": self._ddim, "HeunDiscreteScheduler": self._heun}.get(kind, self._ancestral)
        spacing = spacing or (solver and "trailing")
        try:
            if solver:
                rows = spaced_rows(self.alphas_cumprod, solver, steps, spacing, eta, start)
                rows = [(t, self._alpha(t), *row) for t, *row in rows]
            else:
                rows = make(steps, eta)[start:]
        except ZeroDivisionError:
            rows = []
        coefficients = [(*self._x0_from_prediction(alpha), *row) for _, alpha, *row, _ in rows]
        if not rows or not all(math.isfinite(number) for row in coefficients for number in row):
            raise ValueError(f"num_inference_steps={steps}; the betas of this schedule give steps that are not finite")
        heun_from_sigma = kind == "HeunDiscreteScheduler" and self.config["timestep_spacing"] != "leading"
        return StepTable(
            solver=kind,
            times=tuple(row[0] for row in rows),
            rows=torch.tensor(coefficients, dtype=torch.float64),
            draws_noise=tuple(row[-1] for row in rows),
            spacing=spacing,
            uses_prediction=kind == "DDIMScheduler",
            noise_scale=float(1 - rows[0][1]) ** 0.5 if heun_from_sigma else 1.0,
        )

    def add_noise(self, x0: Tensor, noise: Tensor, time: int) -> Tensor:
        """x0 (rows, dim) with noise of the same shape, as it is at a time."""
        alpha = self.alphas_cumprod[time]
        return alpha.sqrt().item() * x0 + (1 - alpha).sqrt().item() * noise

    def _x0_from_prediction(self, alpha: Tensor) -> tuple[float, float]:
        """p and q of `x0 = p*x + q*pred` where ā is alpha."""
        if self.config["prediction_type"] == "sample":
            return 0.0, 1.0
        if self.config["prediction_type"] == "v_prediction":
            return float(alpha**0.5), -float((1 - alpha) ** 0.5)
        return float(1 / alpha**0.5), -float((1 - alpha) ** 0.5 / alpha**0.5)

    def _grid(self, steps: int) -> np.ndarray:
        """The times of a run, falling, in fp64."""
        spacing, timesteps = self.config["timestep_spacing"], self.timesteps
        if self.kind == "UnCLIPScheduler":
            return np.round(np.arange(steps) * ((timesteps - 1) / (steps - 1)))[::-1]
        if spacing == "trailing":
            return np.round(np.arange(timesteps, 0, -timesteps / steps)) - 1
        if spacing == "leading":
            offset, ratio = self.config["steps_offset"], timesteps // steps
            if not 0 <= offset < timesteps - (steps - 1) * ratio:
                rule = f"with {steps} steps of {ratio} it leaves the {timesteps} timesteps"
                raise ValueError(f"steps_offset={offset}; {rule}")
            return np.arange(steps)[::-1] * ratio + float(offset)
        times = np.linspace(0, timesteps - 1, steps)[::-1]
        return times if self.kind == "HeunDiscreteScheduler" else np.round(times)

    def _alpha(self, time: int) -> Tensor:
        return self.alphas_cumprod[time] if time >= 0 else torch.tensor(1.0)

    def _ancestral(self, steps: int, eta: float) -> list[tuple]:
        """DDPM over a part of the times (Ho et al. 2020, eq. 7, with the betas between the times that are visited)."""
        times = [int(time) for time in self._grid(steps)]
        rows = []
        for t, after in zip(times, [*times[1:], -1]):
            alpha, alpha_after = self._alpha(t), self._alpha(after)
            ratio, beta = alpha / alpha_after, 1 - alpha / alpha_after
            if self.kind == "UnCLIPScheduler" and after == t - 1:
                ratio, beta = 1 - self.betas[t], self.betas[t]
            x = ratio**0.5 * (1 - alpha_after) / (1 - alpha)
            x0 = alpha_after**0.5 * beta / (1 - alpha)
            variance = ((1 - alpha_after) / (1 - alpha) * beta).clamp(min=1e-20)
            if self.config["variance_type"] == "fixed_large":
                variance = beta
            rows.append((t, alpha, float(x), float(x0), 0.0, float(variance**0.5) if t else 0.0, t > 0))
        return rows

    def _ddim(self, steps: int, eta: float) -> list[tuple]:
        """DDIM (Song et al. 2021, eq. 12). The noise comes from the prediction itself, so it is not clamped with x0."""
        rows = []
        for time in self._grid(steps):
            t, after = int(time), int(time) - self.timesteps // steps
            alpha = self._alpha(t)
            alpha_after = self._alpha(after if after >= 0 or self.config["set_alpha_to_one"] else 0)
            variance = (1 - alpha_after) / (1 - alpha) * (1 - alpha / alpha_after)
            sigma = eta * variance**0.5
            direction = (1 - alpha_after - sigma**2) ** 0.5
            p, q = self._x0_from_prediction(alpha)
            # noise = (x - sqrt(ā) * (p*x + q*pred)) / sqrt(1 - ā), which for a noise prediction is the prediction
            x = float(direction * (1 - alpha**0.5 * p) / (1 - alpha) ** 0.5)
            pred = float(direction * -(alpha**0.5) * q / (1 - alpha) ** 0.5)
            if self.config["prediction_type"] == "epsilon":
                x, pred = 0.0, float(direction)
            rows.append((t, alpha, x, float(alpha_after**0.5), pred, float(sigma), eta > 0))
        return rows

    def _heun(self, steps: int, eta: float) -> list[tuple]:
        """Heun's method (Karras et al. 2022, algorithm 1, without churn), two evaluations a step but for the last.

        The state is the scaled network input, `X / sqrt(σ² + 1)`. The second evaluation corrects the Euler step to X:
        with r the ratio of the sigmas, `X <- X + (1 - 1/r) / 2 * (x0_prev - x0)`.
        """
        times = self._grid(steps).astype(np.float32)
        sigmas = np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod).numpy()
        numbers, log_sigmas = np.arange(self.timesteps), np.log(sigmas)
        sigmas = np.interp(times, numbers, sigmas)
        if self.config["use_karras_sigmas"]:
            rho = 7.0
            sigmas = np.linspace(sigmas[0] ** (1 / rho), sigmas[-1] ** (1 / rho), steps) ** rho
            times = np.interp(np.log(np.maximum(sigmas, 1e-10)), log_sigmas, numbers)
        times, sigmas = times.astype(np.float32).tolist(), [*sigmas.astype(np.float32).tolist(), 0.0]
        rows = []
        for i, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:])):
            alpha, alpha_after = (torch.tensor(1 / (s * s + 1), dtype=torch.float64) for s in (sigma, after))
            scale, scale_after, r = float(alpha) ** 0.5, float(alpha_after) ** 0.5, after / sigma
            rows.append((times[i], alpha, r * scale_after / scale, (1 - r) * scale_after, 0.0, 0.0, False))
            if after:
                correction = (1 - 1 / r) / 2 * scale_after
                rows.append((times[i + 1], alpha_after, 1.0, -correction, correction, 0.0, False))
        return rows
