"""A mixture of Gaussians on the line: its best denoiser, and where the probability flow takes each sample."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Weights, means and standard deviations of data; all tensors here are fp64, and alpha is ā."""

    weights: tuple[float, ...] = (0.5, 0.2, 0.3)
    means: tuple[float, ...] = (-1.2, 0.3, 1.4)
    stds: tuple[float, ...] = (0.35, 0.2, 0.5)

    def _at(self, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, means and variances (parts,) of a sample at some noise."""
        weights, means, stds = (torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.stds))
        return weights, math.sqrt(alpha) * means, alpha * stds**2 + 1 - alpha

    def x0(self, x: Tensor, alpha: float) -> Tensor:
        """The mean of the clean sample, given x (samples,) at some noise."""
        weights, means, variances = self._at(alpha)
        offset = x[:, None] - means
        share = (weights.log() - 0.5 * variances.log() - 0.5 * offset**2 / variances).softmax(dim=-1)
        clean, stds = (torch.tensor(v, dtype=torch.float64) for v in (self.means, self.stds))
        return (share * (clean + math.sqrt(alpha) * stds**2 / variances * offset)).sum(dim=-1)

    def flow(self, x: Tensor, alpha: float, alpha_after: float) -> Tensor:
        """Where the probability flow takes x (samples,) to: on the line it keeps every sample's quantile."""
        wanted, low, high = self._cdf(x, alpha), torch.full_like(x, -20), torch.full_like(x, 20)
        for _ in range(60):
            middle = (low + high) / 2
            above = self._cdf(middle, alpha_after) > wanted
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    def _cdf(self, x: Tensor, alpha: float) -> Tensor:
        weights, means, variances = self._at(alpha)
        return (weights * torch.special.ndtr((x[:, None] - means) / variances.sqrt())).sum(dim=-1)
