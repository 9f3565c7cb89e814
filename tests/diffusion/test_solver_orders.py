"""How fast solvers converge, without sampling noise: to the flow of a mixture, and to the moments of normal data."""

import math

import numpy as np
import pytest
import torch

from fastprior.diffusion.schedule import NoiseScheduler
from fastprior.diffusion.solvers import StepTable, step_table
from helpers.mixtures import Mixture

STEPS = 16, 24, 32, 48, 64, 96, 128
FINE = NoiseScheduler(beta_schedule="linear", timesteps=4000, loss_type="l2")
SPACINGS = pytest.mark.parametrize("spacing", ["logsnr", "karras"])


def order(error) -> float:
    """The power of the step size with which an error falls, by regression."""
    return -np.polyfit(np.log(STEPS), np.log([error(steps) for steps in STEPS]), 1)[0]


def flow_error(table: StepTable) -> float:
    """How far, in the mean, samples of a mixture end from where the probability flow takes them."""
    mixture, alphas = Mixture(), FINE.alphas_cumprod.double()
    start = x = torch.linspace(-2, 2, 81, dtype=torch.float64)
    x0 = torch.zeros_like(x)
    for t, (p, q, a, b, c, s) in zip(table.times, table.rows.tolist()):
        assert (p, q, s) == (0, 1, 0)
        estimate = mixture.x0(x, alphas[t].item())
        x, x0 = a * x + b * estimate + c * x0, estimate
    return (x - mixture.flow(start, alphas[table.times[0]].item(), 1.0)).abs().mean().item()


@pytest.mark.parametrize("spacing", ["trailing", "logsnr", "karras"])
@pytest.mark.parametrize("solver, kwargs, wanted", [("ddim_trailing", dict(eta=0.0), 1), ("dpm++", {}, 2)])
def test_order_of_the_flow(solver, kwargs, wanted, spacing):
    found = order(lambda steps: flow_error(step_table(FINE, solver, steps, spacing=spacing, **kwargs)))
    assert found == pytest.approx(wanted, abs=0.2)


def moments(table: StepTable, schedule: NoiseScheduler, mean: float, std: float) -> tuple[float, float]:
    """Mean and standard deviation that a run gives for normal data: its denoiser is a line, so they are exact.

    The state of a step is (x, last x0), which is jointly normal.
    """
    center, spread = torch.zeros(2, dtype=torch.float64), torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    for t, (_, _, a, b, c, s) in zip(table.times, table.rows.tolist()):
        alpha = schedule.alphas_cumprod[t].item()
        slope = math.sqrt(alpha) * std**2 / (alpha * std**2 + 1 - alpha)
        offset = mean - slope * math.sqrt(alpha) * mean
        step = torch.tensor([[a + b * slope, c], [slope, 0.0]], dtype=torch.float64)
        center = step @ center + offset * torch.tensor([b, 1.0], dtype=torch.float64)
        spread = step @ spread @ step.T + torch.tensor([[s**2, 0.0], [0.0, 0.0]], dtype=torch.float64)
    return center[0].item(), spread[0, 0].sqrt().item()


NORMALS = [(0.0, 1.0), (0.7, 0.1), (-1.0, 0.5), (0.3, 2.0)]  # mean, standard deviation


@SPACINGS
@pytest.mark.parametrize("solver, kwargs, wanted", [("ddim_trailing", dict(eta=1.0), 1), ("sde-dpm++", {}, 2)])
def test_order_of_the_moments(solver, kwargs, wanted, spacing):
    def error(steps: int) -> float:
        table = step_table(FINE, solver, steps, spacing=spacing, **kwargs)
        return sum(math.dist(moments(table, FINE, *normal), normal) for normal in NORMALS)

    assert error(STEPS[-1]) < 0.2 / wanted**5
    assert order(error) == pytest.approx(wanted, abs=0.25)
