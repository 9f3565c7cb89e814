"""In place of a GPU's runs of launches alone: the same calls, which operations of PyTorch carry out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastprior.engine.steps import StepInputs, solver_step, with_unconditional
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.models.prior_transformer.forward import PriorForward
from fastprior.prior.loop import predictor

LEFT = 1e3  # noise of who knows which run before


class FakeRun:
    """A `DeviceRun` of the steps of a `solver_step`; its memory holds nothing that may be read before it is written.

    Attributes:
        asked: what was called, and with which numbers.
    """

    launches = 7

    def __init__(self, step: Callable, inputs: StepInputs, rows: int, dim: int, cond_scale: float | Tensor = 1.0):
        self._step, self._inputs, self.steps, self.asked = step, inputs, len(inputs.rows), []
        self.x, self._x0 = torch.full((2, rows, dim), torch.nan)
        self.noise = torch.full((self.steps, rows, dim), LEFT)
        self.scale, self.index = (
            torch.as_tensor(cond_scale).float().expand(rows).clone(),
            torch.zeros(rows, dtype=torch.int64),
        )
        self.buffers = [self.x, self._x0, self.noise, self.scale, self.index]

    def start(self, x: Tensor) -> None:
        self.asked.append("start")
        self.x.copy_(x)
        self._x0.zero_()
        self.index.zero_()

    def advance(self, count: int) -> None:
        self.asked.append(count)
        for _ in range(count):
            noise = self.noise.index_select(0, self.index[:1])[0]
            x, x0 = self._step(self._inputs, self.scale, self.x, self._x0, noise, self.index[0])
            self.x.copy_(x)
            self._x0.copy_(x0)
            self.index.add_(1).remainder_(self.steps)

    def draw(self, first: int, noise: Sequence[Tensor | None]) -> None:
        for index, drawn in enumerate(noise, first):
            if drawn is not None:
                self.noise[index].copy_(drawn)

    def __call__(self, first: int, noise: Sequence[Tensor | None]) -> None:
        self.draw(first, noise)
        self.advance(len(noise))


def of_networks(monkeypatch) -> list[FakeRun]:
    """Let every network prepare such runs; gives those that were made."""
    made: list[FakeRun] = []

    def of_dalle2(net, cond, samples, *, coefficients, null_table, cond_scale, clamp, radius):
        if cond.null_rows or net.self_cond:
            return None
        inputs = StepInputs(cond, coefficients, null_table)
        made.append(FakeRun(solver_step(predictor(net), clamp, radius), inputs, samples, net.dim, cond_scale))
        return made[-1]

    def of_transformer(net, cond, rows, guided, *, coefficients, cond_scale, clamp, radius, uses_prediction):
        if uses_prediction:
            return None
        step = solver_step(with_unconditional(net.step, guided), clamp, radius)
        made.append(FakeRun(step, StepInputs(cond, coefficients), rows, net.config["embedding_dim"], cond_scale))
        return made[-1]

    monkeypatch.setattr(DiffusionPriorNetwork, "prepare_run", of_dalle2)
    monkeypatch.setattr(PriorForward, "prepare_run", of_transformer)
    return made
