"""Adam and AdamW with weight decay on matrices only, and the learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch.nn import Parameter
from torch.optim import Adam, AdamW, Optimizer

from fastprior.checks import check_number


def separate_weight_decayable_params(params: Iterable[Parameter]) -> tuple[list[Parameter], list[Parameter]]:
    """Matrices and larger, which are decayed, and the rest (gains, biases, scalars), which are not."""
    params = list(params)
    return [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]


def get_optimizer(
    params: Iterable[Parameter],
    lr: float = 1e-4,
    wd: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    filter_by_requires_grad: bool = False,
    group_wd_params: bool = True,
    fused: bool | None = None,
) -> Optimizer:
    """Adam, or AdamW where there is weight decay.

    Args:
        params: the parameters; an iterator is consumed.
        lr, betas, eps: as in torch.
        wd: weight decay; 0 makes it Adam.
        filter_by_requires_grad: leave frozen parameters out.
        group_wd_params: decay only parameters of two or more dimensions.
        fused: one kernel for all of a step, on CPU and CUDA; None leaves the choice to torch.
    Raises ValueError for numbers that are not finite, negative, or betas of 1 and more.
    """
    for name, value in (("lr", lr), ("wd", wd), ("eps", eps)):
        check_number(name, value, 0)
    for beta in betas:
        check_number("betas", beta, 0, below=1)
    params = [p for p in params if p.requires_grad or not filter_by_requires_grad]
    if wd == 0:
        return Adam(params, lr=lr, betas=betas, eps=eps, fused=fused)
    if group_wd_params:
        decayed, kept = separate_weight_decayable_params(params)
        params = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    return AdamW(params, lr=lr, weight_decay=wd, betas=betas, eps=eps, fused=fused)


def learning_rate_factor(step: int, warmup_steps: int | None, decay_steps: int | None) -> float:
    """What the learning rate is multiplied with at a step: a linear warm-up times a cosine that ends at 0."""
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / decay_steps))) if decay_steps else 1.0
    return warmup * decay
