"""Linears of 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastprior.kernels import ops


class QuantisedLinear(nn.Module):
    """A linear of few rows whose weight is int8 or float8_e4m3fn, with a scale for each row of it; no gradients.

    Args:
        linear: whose weight it takes; `update` takes it again.
        dtype: of the quantised weight.

    Attributes:
        product_dtype: that of the linear, and of results.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.source, self.bias, self.product_dtype = (linear,), linear.bias, linear.weight.dtype
        self.register_buffer("weight", torch.empty_like(linear.weight, dtype=dtype))
        self.register_buffer("scale", torch.empty(len(linear.weight), device=linear.weight.device))
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Quantise the source's weight again: each row over the range of the dtype, int8 rounded to nearest."""
        # an alias of one moment: `.data` may be replaced meanwhile, and a weight read while it is has any numbers
        weight, whole = self.source[0].weight.data.float(), not self.weight.dtype.is_floating_point
        most = torch.iinfo(torch.int8).max if whole else torch.finfo(self.weight.dtype).max
        self.scale.copy_(weight.abs().amax(dim=1).clamp(min=1e-30) / most)
        weight = weight / self.scale[:, None]
        self.weight.copy_(weight.round() if whole else weight)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, scale=self.scale)
