"""Load as users make it: requests that come when they come, whatever the server is at, and how long each took."""

from __future__ import annotations

import queue
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.serving.prior_sampler import PriorSampler

Submit = Callable[["Ask"], Future]


class Ask(NamedTuple):
    """A request: its number, also its seed; steps of its run; which of the texts it has."""

    number: int
    timesteps: int
    text: int


class Measured(NamedTuple):
    """What a load took.

    Attributes:
        rate: of requests that came, per second.
        throughput: of those that were answered, from the first that came to the last answer.
        latencies: seconds of each that was answered, from when it should have come, in the order of coming.
        refused: how many were not answered, by the kind of their error.
    """

    rate: float
    throughput: float
    latencies: list[float]
    refused: dict[str, int]

    def percentile(self, share: int) -> float:
        """Seconds that so many percent of the answered requests took at most; NaN of fewer than two."""
        if len(self.latencies) < 2:
            return float("nan")
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[share - 1]


def asks(count: int, steps: Sequence[int], weights: Sequence[float] | None = None, texts: int = 1) -> list[Ask]:
    """Requests whose steps are drawn from some, always the same ones for the same arguments."""
    draw = random.Random(0)
    return [Ask(number, draw.choices(steps, weights)[0], number % texts) for number in range(count)]


def offer(submit: Submit, requests: Sequence[Ask], rate: float, seed: int = 0, patience: float = 600.0) -> Measured:
    """Let requests come by a Poisson process, whether those before were answered or not, and wait for all answers.

    Args:
        submit: takes a request at once; gives its answer's future, or raises where it is refused.
        rate: per second, in the mean.
        seed: of the times between them.
        patience: seconds after the last request, after which what is not answered counts as refused.
    """
    draw, done = random.Random(seed), threading.Semaphore(0)
    ended: dict[int, float] = {}
    refused: dict[str, int] = {}
    came: dict[int, float] = {}
    futures: list[tuple[Ask, Future]] = []

    def note(ask: Ask) -> Callable[[Future], None]:
        def end(_: Future) -> None:
            ended[ask.number] = time.perf_counter()
            done.release()

        return end

    due = start = time.perf_counter()
    for ask in requests:
        due += draw.expovariate(rate)
        if (left := due - time.perf_counter()) > 0:
            time.sleep(left)
        came[ask.number] = due
        try:
            future = submit(ask)
        except Exception as error:
            refused[type(error).__name__] = refused.get(type(error).__name__, 0) + 1
            continue
        future.add_done_callback(note(ask))
        futures.append((ask, future))
    limit = time.perf_counter() + patience
    for _ in futures:
        if not done.acquire(timeout=max(0.0, limit - time.perf_counter())):
            break
    latencies = []
    for ask, future in futures:
        error = TimeoutError() if not future.done() else future.exception()
        if error is None:
            latencies.append(ended[ask.number] - came[ask.number])
        else:
            refused[type(error).__name__] = refused.get(type(error).__name__, 0) + 1
    span = max(ended.values(), default=time.perf_counter()) - start
    return Measured(rate, len(latencies) / span, latencies, refused)


def one_by_one(submit: Submit, requests: Sequence[Ask]) -> list[float]:
    """Seconds of requests that each come when the one before was answered: those of a server without load."""
    times = []
    for ask in requests:
        start = time.perf_counter()
        submit(ask).result()
        times.append(time.perf_counter() - start)
    return times


class Batches:
    """A server that runs whole batches of a `PriorSampler`, to compare with: those that wait when one begins.

    Requests of a batch have the same number of steps, that of the one which waited longest.

    Args:
        text: of requests, by name: (texts, …).
        most: prompts of a batch; 1 is one request at a time.
        window: seconds that a batch waits for others.
        options: of its samplers.
    """

    def __init__(
        self,
        prior: DiffusionPrior,
        text: dict[str, Tensor],
        cond_scale: float,
        most: int,
        window: float = 0.01,
        **options,
    ):
        self._prior, self._text, self._scale, self._most, self._window = prior, text, cond_scale, most, window
        self._options, self._samplers = options, {}
        self._queue: queue.Queue[tuple[Ask, Future] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def submit(self, ask: Ask) -> Future:
        future: Future = Future()
        self._queue.put((ask, future))
        return future

    def close(self) -> None:
        """Answer what came, and end."""
        self._queue.put(None)
        self._thread.join()

    def _sampler(self, timesteps: int) -> PriorSampler:
        if timesteps not in self._samplers:
            sizes = dict(batch_sizes=(self._most,), compile=False)
            self._samplers[timesteps] = PriorSampler(self._prior, timesteps=timesteps, **sizes, **self._options)
        return self._samplers[timesteps]

    def _serve(self) -> None:
        waiting: list[tuple[Ask, Future]] = []
        ended = False
        while not ended or waiting:
            if not waiting:
                ended = self._take(waiting, block=True)
            limit = time.perf_counter() + self._window * (self._most > 1)
            while not ended and len(waiting) < self._most and time.perf_counter() < limit:
                ended = self._take(waiting, timeout=max(0.0, limit - time.perf_counter()))
            while not ended and not self._queue.empty():
                ended = self._take(waiting)
            steps = waiting[0][0].timesteps if waiting else 0
            batch = [one for one in waiting if one[0].timesteps == steps][: self._most]
            waiting = [one for one in waiting if one not in batch]
            if batch:
                self._run(steps, batch)

    def _take(self, waiting: list, block: bool = False, timeout: float | None = None) -> bool:
        """One request more, if there is one; whether it was the end."""
        try:
            found = self._queue.get(block or timeout is not None, timeout)
        except queue.Empty:
            return False
        if found is None:
            return True
        waiting.append(found)
        return False

    def _run(self, timesteps: int, batch: list[tuple[Ask, Future]]) -> None:
        index = torch.tensor([ask.text for ask, _ in batch])
        try:
            seeds = [ask.number for ask, _ in batch]
            text = {name: t[index] for name, t in self._text.items()}
            embeds = self._sampler(timesteps)(**text, cond_scale=self._scale, generator=seeds)
        except Exception as error:
            for _, future in batch:
                future.set_exception(error)
            return
        for embed, (_, future) in zip(embeds, batch):
            future.set_result(embed)
