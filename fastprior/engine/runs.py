"""Runs that keep their state themselves: who asks for steps gives the noise of several, and nothing runs between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

# How many steps the graphs of a run hold, the largest first; replays of them make any number. Not measured: the usual
# runs of 16, 25 and 64 steps are 1, 4 and 4 launches, and no run has more than six beside those of the largest, which
# has about a thousand kernels for 12 layers. The noise of so many steps is drawn while those before them run.
GRAPH_STEPS = (16, 4, 1)


@runtime_checkable
class Run(Protocol):
    """What `run_table` asks of a run, such as `ops.Run`.

    Attributes:
        x: (rows, dim), the state, which a call overwrites.
        steps: how many there are, at most.
    """

    x: Tensor
    steps: int

    def start(self, x: Tensor) -> None:
        """Begin at x (rows, dim)."""

    def __call__(self, first: int, noise: Sequence[Tensor | None]) -> None:
        """Make as many steps as `noise` is of, from step `first` on, which is the one that comes next."""


@runtime_checkable
class DeviceRun(Run, Protocol):
    """A run whose steps are launches alone, always the same ones, on memory that stays where it is.

    What it is prepared with it reads where that lies, at every step or in `start`: graphs write other prompts and
    tables there. It copies nothing of them before.

    Attributes:
        noise: (steps, rows, dim) fp32, what each step adds. Finite, also before any is drawn.
        scale: (rows,) fp32, guidance of each row.
        index: (rows,) int64, the step that comes next for each row, which the steps count up modulo `steps`.
        buffers: all memory of its own.
        launches: kernels of a step.
    """

    noise: Tensor
    scale: Tensor
    index: Tensor
    buffers: list[Tensor]
    launches: int

    def advance(self, count: int) -> None:
        """Launch so many steps, whichever come next: what a graph captures."""

    def draw(self, first: int, noise: Sequence[Tensor | None]) -> None:
        """Take the noise of the steps from `first` on; a step with None has the coefficient 0 for it."""


class ReplayedRun:
    """A `DeviceRun` whose steps are replays of graphs, of several steps each.

    Args:
        replays: what launches so many steps, by their number: the largest first, and 1 among them.
    """

    def __init__(self, run: DeviceRun, replays: dict[int, Callable[[], None]]):
        self._run, self._replays = run, replays
        self.x, self.steps, self.launches = run.x, run.steps, run.launches

    def start(self, x: Tensor) -> None:
        self._run.start(x)

    def __call__(self, first: int, noise: Sequence[Tensor | None]) -> None:
        left = len(noise)
        if not 0 <= first <= first + left <= self.steps:
            raise IndexError(f"steps {first} to {first + left - 1}; there are {self.steps}")
        self._run.draw(first, noise)
        for count, replay in self._replays.items():
            for _ in range(left // count):
                replay()
            left %= count
