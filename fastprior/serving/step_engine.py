"""Everybody's requests in one loop: each step is one of all rows that are on their way, wherever each of them is."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from concurrent.futures import Future

import torch
from torch import Tensor

from fastprior.batches import map_rows
from fastprior.checkpoints.for_serving import Weights, of_prior
from fastprior.checks import check_count, check_number
from fastprior.engine.engine import Engine
from fastprior.models import snapshot
from fastprior.models.weight_lock import lock_of, weights_locked
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.learned import check_weights
from fastprior.serving.prior_sampler import default_run
from fastprior.serving.requests import EngineClosed, Events, QueueFull, Request, key_of
from fastprior.serving.row_model import TRIED, Row, RowModel, Solver, best_cap

ADMITTED = 2  # requests whose texts run between two steps: each takes as long as some steps, and all rows wait for it
SMOOTHING = 0.1  # of the running mean of a step's seconds, the newest one's part

_log = logging.getLogger(__name__)


_OPEN: weakref.WeakSet[StepEngine] = weakref.WeakSet()


class StepEngine:
    """Serve many requests at once: they join and leave at any step, and share each reading of the weights.

    A thread of its own makes the steps. Requests are taken first in, first out. Each has its own solver, steps, scale,
    conditions and generator; its result is what it is alone: in fp32, and with `alike` in 16 bits too, equal to the bit
    whatever else runs. On a GPU, and for networks whose steps are not calls of C, rows take turns.

    Weights may change meanwhile, by `update` or under `weights_locked`: rows that are on their way end with the weights
    that they began with, and others wait for that.

    Args:
        prior: in eval mode, with a network that can be cached (see `prior.sampling_plan`).
        timesteps, solver, spacing, eta: of requests that say nothing of it, as `PriorSampler` has them.
        dtype: run the network in this dtype; with another than its own, on a copy. State and schedule stay fp32.
        rows: how many are on their way at most; by default the fewest that reach 95 % of the best throughput, measured
            before the first request runs.
        waiting: how many requests wait at most.
        prefixes: texts that are kept besides those of the rows; by default as many as 256 MiB hold.
        alike: use the one form of products whose results do not depend on the number of rows; by default for weights
            of fp32. Without it results of 16 bits (on some processors of fp32, too) depend on what else runs in their
            last places, and steps of many rows are faster.
        events: is told what happens.

    Raises:
        ValueError: the prior cannot be cached, or an argument does not fit.
    """

    def __init__(
        self,
        prior: DiffusionPrior,
        *,
        timesteps: int | None = None,
        solver: str | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        dtype: torch.dtype | None = None,
        rows: int | None = None,
        waiting: int = 256,
        prefixes: int | None = None,
        alike: bool | None = None,
        events: Events | None = None,
    ):
        if not isinstance(prior, DiffusionPrior):
            raise ValueError(f"prior is a {type(prior).__name__}; it must be a DiffusionPrior")
        if rows is not None:
            check_count("rows", rows, most=TRIED[-1])
        check_count("waiting", waiting)
        if prefixes is not None:
            check_count("prefixes", prefixes)
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"dtype={dtype}; it must be a floating point dtype of 16 bits or more")
        self.prior, self.waiting, self.events = prior, waiting, events or Events()
        self.rows = rows
        self._default = Solver(*default_run(prior, timesteps, solver, spacing, eta))
        self._model = RowModel(prior, dtype=dtype, places=rows or TRIED[-1], prefixes=prefixes, alike=alike)
        self._model.plan(self._default, 1.0)
        self._engine = Engine(prior.device, compile=False, graphs=False)
        self._changed = threading.Condition()
        self._queue: deque[Request] = deque()
        self._running: list[Request] = []
        self._closing = self._aborted = False
        self._counts = dict(steps=0, row_steps=0, prefills=0, prefix_hits=0, done=0, cancelled=0, failed=0, expired=0)
        self._step_seconds: float | None = None
        self._last_step = time.monotonic()
        self._thread = threading.Thread(target=self._serve, name="fastprior-steps", daemon=True)
        self._thread.start()
        _OPEN.add(self)

    def __enter__(self) -> StepEngine:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def submit(
        self,
        text_embed: Tensor,
        text_encodings: Tensor | None = None,
        *,
        seed: int | torch.Generator | None = None,
        cond_scale: float = 1.0,
        timesteps: int | None = None,
        solver: str | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        conditions: dict[str, Tensor | float | int] | None = None,
        timeout: float | None = None,
    ) -> Future[Tensor]:
        """Ask for an embedding; returns at once, from any thread.

        Args:
            text_embed: (dim,).
            text_encodings: (length, dim), all-zero rows are padding; required by priors conditioned on it.
            seed: of the noise, or a generator on the prior's device; a random one by default. It means the same as in
                `prior.sample` for this prompt alone.
            cond_scale: classifier-free guidance.
            timesteps, solver, spacing, eta: of this request; where none is given, the engine's.
            conditions: values of the extra conditions.
            timeout: seconds from now, after which the request ends with TimeoutError.
        Returns:
            a future of the embedding: (dim,) on the CPU, not scaled. It can be cancelled until it is done, which frees
            its row at the next step. Its exception is a ValueError where the embedding is not finite.
        Raises:
            ValueError: an argument does not fit the prior; it is named.
            QueueFull: too many requests wait.
            EngineClosed: `close` was called.
        """
        given = timesteps, solver, spacing, eta
        chosen = self._default if given == (None,) * 4 else Solver(*default_run(self.prior, *given))
        check_number("cond_scale", cond_scale)
        if timeout is not None:
            check_number("timeout", timeout, above=0)
        self._model.plan(chosen, cond_scale)
        text_cond = self._text_condition(text_embed, text_encodings, conditions)
        generator = seed
        if not isinstance(seed, torch.Generator):
            if seed is not None:
                check_count("seed", seed, least=-(2**63), most=2**64 - 1)
            generator = torch.Generator(self.prior.device)
            generator.seed() if seed is None else generator.manual_seed(seed)
        request = Request(Row(text_cond, key_of(text_cond), chosen, float(cond_scale), generator), timeout)
        with self._changed:
            if self._closing:
                raise EngineClosed("the engine was closed")
            if len(self._queue) >= self.waiting:
                raise QueueFull(len(self._queue), self._seconds_until_one_ends())
            self._queue.append(request)
            self._changed.notify_all()
        return request.future

    def _text_condition(self, text_embed, text_encodings, conditions) -> dict:
        """A condition of one prompt, which is the engine's own."""
        for name, t, ndim in (("text_embed", text_embed, 1), ("text_encodings", text_encodings, 2)):
            if t is not None and (not torch.is_tensor(t) or t.ndim != ndim):
                found = tuple(t.shape) if torch.is_tensor(t) else type(t).__name__
                rule = "a tensor (dim,)" if ndim == 1 else "a tensor (length, dim)"
                raise ValueError(f"{name} is {found}; it must be {rule}")
        device = self.prior.device
        given = {name: torch.as_tensor(value)[None] for name, value in (conditions or {}).items()}
        encodings = None if text_encodings is None else text_encodings[None]
        text_cond = self.prior.text_condition(None, text_embed[None], encodings, conditions=given)
        text_cond = map_rows(text_cond, lambda t: None if t is None else t.detach().to(device).clone())
        self.prior.check_text_condition((1, self.prior.image_embed_dim), text_cond)
        encodings = text_cond.get("text_encodings")
        self.prior.net.check_inputs(text_cond["text_embed"], encodings, text_cond.get("conditions"))
        return text_cond

    @torch.no_grad()
    def update(self, weights: Weights) -> None:
        """Serve other weights: rows that are on their way end with the old ones, and later ones have the new.

        Args:
            weights: see `PriorSampler.update`.
        Raises:
            ValueError: they do not fit, or are not finite. Nothing has changed then.
            FileNotFoundError: there is no such file.
        """
        fitting = of_prior(self.prior, weights)
        check_weights(self.prior, self._model.plan(self._default, 1.0).table, fitting)
        with weights_locked(self.prior):
            self.prior.net.load_state_dict(fitting)

    def stats(self) -> dict[str, float]:
        """How it goes.

        Returns:
            running, waiting: requests; rows: how many may run, 0 before that was measured; together: whether they share
            steps. Since the start: steps, row_steps (rows of all of them), prefills, prefix_hits, done, cancelled,
            failed, expired. last_step: `time.monotonic()` at the end of the last step, or now where there is nothing to
            do; step_ms: a running mean.
        """
        with self._changed:
            idle = not self._running and not self._queue
            return dict(
                self._counts,
                running=len(self._running),
                waiting=len(self._queue),
                rows=self.rows or 0,
                together=bool(self._model.together),
                last_step=time.monotonic() if idle else self._last_step,
                step_ms=(self._step_seconds or 0.0) * 1e3,
            )

    def close(self, drain: float = 0.0) -> None:
        """Take no more requests, and end when those that were taken are done, or have had `drain` seconds.

        Those that are not done end with EngineClosed.
        """
        check_number("drain", drain, least=0)
        with self._changed:
            self._closing = True
            if not drain:
                self._aborted = True
            self._changed.notify_all()
        if threading.current_thread() is self._thread:
            return
        self._thread.join(drain or None)
        if self._thread.is_alive():
            with self._changed:
                self._aborted = True
                self._changed.notify_all()
            self._thread.join()

    @property
    def closed(self) -> bool:
        """Whether it takes no requests any more."""
        return self._closing

    def _seconds_until_one_ends(self) -> float:
        """About how long the request that is nearest to its end takes, at the pace of late; at least 0.1."""
        left = [request.row.steps - request.row.index for request in self._running if request.row.steps]
        return max(0.1, (self._step_seconds or 0.0) * min(left, default=1))

    def _tell(self, event: str, *figures: object) -> None:
        try:
            getattr(self.events, event)(*figures)
        except Exception:  # of whoever listens, for whom no request should suffer
            _log.exception("events.%s", event)

    def _serve(self) -> None:
        """The thread: as long as there is something to do, generations of rows that have the same weights."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or self._closing)
                    if self._aborted or (self._closing and not self._queue):
                        return
                    self._last_step = time.monotonic()
                self._generation()
        except BaseException:
            _log.exception("the engine ends")
            raise
        finally:
            with self._changed:
                self._closing = True
                left, self._running, self._queue = [*self._running, *self._queue], [], deque()
            for request in left:
                self._end(request, EngineClosed("the engine was closed before this request was done"), "failed")

    @torch.no_grad()
    def _generation(self) -> None:
        """Steps until no row is left: requests join until there are none, or somebody waits to change the weights."""
        lock = lock_of(self.prior)
        with lock, self._engine.lock:
            with snapshot.running(self.prior.net):
                try:
                    self._engine.refresh(self.prior.net, self._model.build)
                except Exception as error:  # such as of a network that can no longer be served
                    with self._changed:
                        failed, self._queue = self._queue, deque()
                    for request in failed:
                        self._end(request, error, "failed")
                    return
                while not self._aborted:
                    self._drop_those_that_ended()
                    if not lock.is_wanted:
                        self._admit()
                    if not self._running:
                        return
                    self._step()

    def _drop_those_that_ended(self) -> None:
        """Let go of what was cancelled, or is past its deadline."""
        now, ended = time.monotonic(), []
        with self._changed:
            for kept in (self._running, self._queue):
                over = [request for request in kept if request.future.cancelled() or now >= request.deadline]
                ended += over
                for request in over:
                    kept.remove(request)
        for request in ended:
            if request.row.made is not None:
                self._model.end(request.row)
            self._end(request, TimeoutError("the request is past its deadline"), "expired")

    def _admit(self) -> None:
        """Begin some requests, those first that came first."""
        if self.rows is None and self._queue:
            self._calibrate(self._queue[0])
        for _ in range(ADMITTED):
            with self._changed:
                free = sorted(set(range(self._cap())) - {request.row.place for request in self._running})
                if not free or not self._queue:
                    return
                request = self._queue.popleft()
                request.row.place = free[0]
                self._running.append(request)
            request.began = start = time.monotonic()
            try:
                found = self._model.begin(request.row)
            except Exception as error:
                self._leave(request, error)
                continue
            if found:
                self._counts["prefix_hits"] += 1
                self._tell("prefix_hit")
            else:
                self._counts["prefills"] += 1
                self._tell("prefill", 1, time.monotonic() - start)

    def _cap(self) -> int:
        return min(self.rows or 1, self._model.most)

    def _calibrate(self, request: Request) -> None:
        try:
            seconds = self._model.calibrate(request.row)
        except Exception:  # the request itself will say why
            return
        self.rows = best_cap(seconds)
        self._step_seconds = seconds[self.rows]
        _log.info("%d rows: %s", self.rows, ", ".join(f"{n}: {s * 1e3:.1f} ms" for n, s in seconds.items()))

    def _step(self) -> None:
        running, start = list(self._running), time.monotonic()
        failed = self._model.step([request.row for request in running])
        seconds = time.monotonic() - start
        with self._changed:
            self._last_step = start + seconds
            self._counts["steps"] += 1
            self._counts["row_steps"] += len(running)
            before = self._step_seconds
            self._step_seconds = seconds if before is None else before + SMOOTHING * (seconds - before)
        self._tell("step", len(running), seconds)
        errors = {id(row): error for row, error in failed}
        for request in running:
            if (error := errors.get(id(request.row))) is not None:
                self._leave(request, error)
            elif request.row.index >= request.row.steps:
                self._finish(request)

    def _finish(self, request: Request) -> None:
        wrong: Exception | None = None
        try:
            embed = self._model.finish(request.row)
            if not embed.isfinite().all():
                wrong = ValueError("the embedding of this request is not finite")
        except Exception as error:  # too little memory
            embed, wrong = None, error
        self._leave(request, wrong, embed)

    def _leave(self, request: Request, error: Exception | None, embed: Tensor | None = None) -> None:
        """A request that ran is over."""
        if request.row.made is not None:
            self._model.end(request.row)
        with self._changed:
            self._running.remove(request)
        self._end(request, error, "failed", embed)

    def _end(self, request: Request, error: Exception | None, outcome: str, embed: Tensor | None = None) -> None:
        """Tell a request how it ended, unless it was cancelled."""
        now = time.monotonic()
        if not request.future.set_running_or_notify_cancel():
            outcome = "cancelled"
        elif error is not None:
            request.future.set_exception(error)
        else:
            outcome = "done"
            request.future.set_result(embed)
        self._counts[outcome] += 1
        self._tell("finished", outcome, (request.began or now) - request.submitted, now - request.submitted)


@atexit.register
def _close_all() -> None:
    for engine in list(_OPEN):
        engine.close()
