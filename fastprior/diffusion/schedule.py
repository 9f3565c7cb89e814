"""Noise schedules: the betas, the forward process q, and its posterior."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprior.checks import check_choice, check_count, check_number
from fastprior.draws import drawing, randn_like

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}


def _cosine(timesteps: int) -> Tensor:
    """Nichol & Dhariwal 2021, with s = 0.008."""
    s = 0.008
    at = torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64) / timesteps
    alphas_cumprod = torch.cos((at + s) / (1 + s) * (math.pi / 2)) ** 2
    alphas_cumprod = alphas_cumprod / alphas_cumprod[0]
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, 0.999)


def _linear(timesteps: int) -> Tensor:
    """Ho et al. 2020, stretched to any number of timesteps."""
    return torch.linspace(0.1 / timesteps, 20 / timesteps, timesteps, dtype=torch.float64)


def _quadratic(timesteps: int) -> Tensor:
    return torch.linspace((0.1 / timesteps) ** 0.5, (20 / timesteps) ** 0.5, timesteps, dtype=torch.float64) ** 2


def _jsd(timesteps: int) -> Tensor:
    """1 / (T - t), Sohl-Dickstein et al. 2015."""
    return 1.0 / torch.linspace(timesteps, 1, timesteps)


def _sigmoid(timesteps: int) -> Tensor:
    low, high = 0.1 / timesteps, 20 / timesteps
    return torch.linspace(-6, 6, timesteps, dtype=torch.float64).sigmoid() * (high - low) + low


BETA_SCHEDULES = {"cosine": _cosine, "linear": _linear, "quadratic": _quadratic, "jsd": _jsd, "sigmoid": _sigmoid}


def _choose(name: str, value: str, options: dict):
    check_choice(name, value, options)
    return options[value]


def extract(a: Tensor, t: Tensor, x_shape: tuple[int, ...]) -> Tensor:
    """The entries of table `a` (timesteps,) at times t (batch,), as (batch, 1, ...) with as many dims as `x_shape`."""
    return a.gather(-1, t).view(-1, *(1,) * (len(x_shape) - 1))


def schedule_tables(betas: Tensor, p2_loss_weight_gamma: float = 0.0, p2_loss_weight_k: float = 1) -> dict[str, Tensor]:
    """All that a `NoiseScheduler` looks up, by name: (timesteps,) fp32 each, computed in the dtype of `betas`."""
    alphas = 1 - betas
    alphas_cumprod = alphas.cumprod(dim=0)
    alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
    posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
    tables = {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas_cumprod).log(),
        "sqrt_recip_alphas_cumprod": (1 / alphas_cumprod).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas_cumprod - 1).sqrt(),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": posterior_variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - alphas_cumprod_prev) * alphas.sqrt() / (1 - alphas_cumprod),
        "p2_loss_weight": (p2_loss_weight_k + alphas_cumprod / (1 - alphas_cumprod)) ** -p2_loss_weight_gamma,
    }
    return {name: value.float() for name, value in tables.items()}


class NoiseScheduler(nn.Module):
    """A variance-preserving schedule of `timesteps` betas, its loss, and the arithmetic between x_t, x_0, v and noise.

    The tables are buffers, part of the state dict, and stay fp32 when the module is cast. All methods take x of shape
    (batch, ...) and t of shape (batch,), int64.

    Args:
        beta_schedule: "cosine", "linear", "quadratic", "jsd" or "sigmoid".
        timesteps: length of the schedule.
        loss_type: "l1", "l2" or "huber".
        p2_loss_weight_gamma, p2_loss_weight_k: P2 weighting (Choi et al. 2022), off at gamma 0.
    """

    def __init__(
        self,
        *,
        beta_schedule: str,
        timesteps: int,
        loss_type: str,
        p2_loss_weight_gamma: float = 0.0,
        p2_loss_weight_k: float = 1,
    ):
        super().__init__()
        check_count("timesteps", timesteps)
        check_number("p2_loss_weight_gamma", p2_loss_weight_gamma)
        check_number("p2_loss_weight_k", p2_loss_weight_k)
        with torch.device("cpu"):  # they are known where the rest of a model is made on the meta device, too
            betas = _choose("beta_schedule", beta_schedule, BETA_SCHEDULES)(timesteps)
        if betas.max() > 1:
            rule = "they must not exceed 1: take more timesteps"
            raise ValueError(f"{beta_schedule=} with {timesteps=} has betas up to {betas.max():.3g}; {rule}")
        self.loss_fn = _choose("loss_type", loss_type, LOSSES)
        self.loss_type, self.num_timesteps = loss_type, timesteps
        self.has_p2_loss_reweighting = p2_loss_weight_gamma > 0
        wanted = torch.get_default_device()
        for name, value in schedule_tables(betas, p2_loss_weight_gamma, p2_loss_weight_k).items():
            self.register_buffer(name, value if wanted.type == "meta" else value.to(wanted))

    def _apply(self, fn, recurse: bool = True):
        # `.half()` and `.bfloat16()` would round the schedule away (bf16 keeps half of 1000 values): move, never cast
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            if not value.is_meta:
                self._buffers[name] = value.to(self._buffers[name].device)
        return self

    def sample_random_times(self, batch: int) -> Tensor:
        """(batch,) int64, uniform over the schedule."""
        with drawing(self.betas.device):
            return torch.randint(0, self.num_timesteps, (batch,), device=self.betas.device, dtype=torch.long)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0)."""
        tables = self.posterior_mean_coef1, self.posterior_mean_coef2, self.posterior_variance
        of_start, of_now, variance = (extract(table, t, x_t.shape) for table in tables)
        log_variance = extract(self.posterior_log_variance_clipped, t, x_t.shape)
        return of_start * x_start + of_now * x_t, variance, log_variance

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """A draw of x_t given x_0."""
        noise = randn_like(x_start) if noise is None else noise
        signal = extract(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
        return signal + extract(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise

    def q_sample_from_to(self, x_from: Tensor, from_t: Tensor, to_t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Move x from time `from_t` to time `to_t`, adding noise."""
        noise = randn_like(x_from) if noise is None else noise
        tables = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        alpha, sigma = (extract(table, from_t, x_from.shape) for table in tables)
        alpha_to, sigma_to = (extract(table, to_t, x_from.shape) for table in tables)
        return x_from * (alpha_to / alpha) + noise * (sigma_to * alpha - sigma * alpha_to) / alpha

    def calculate_v(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """v of Salimans & Ho 2022: sqrt(ā) * noise - sqrt(1 - ā) * x_0."""
        noise = randn_like(x_start) if noise is None else noise
        signal = extract(self.sqrt_alphas_cumprod, t, x_start.shape) * noise
        return signal - extract(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * x_start

    def predict_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        signal = extract(self.sqrt_alphas_cumprod, t, x_t.shape) * x_t
        return signal - extract(self.sqrt_one_minus_alphas_cumprod, t, x_t.shape) * v

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        signal = extract(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
        return signal - extract(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * noise

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        signal = extract(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
        return (signal - x0) / extract(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape)

    def p2_reweigh_loss(self, loss: Tensor, times: Tensor) -> Tensor:
        return loss * extract(self.p2_loss_weight, times, loss.shape) if self.has_p2_loss_reweighting else loss
