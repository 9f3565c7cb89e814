"""Rows of a request on their way through the engine: begun together, waited for together, ended together."""

from __future__ import annotations

import asyncio
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from starlette.requests import Request
from torch import Tensor

from fastprior.models.dalle2.conditions import Condition, find
from fastprior.server.errors import ApiError
from fastprior.server.schemas import Options
from fastprior.server.settings import Settings
from fastprior.server.wire import tensor_of
from fastprior.serving.requests import EngineClosed, QueueFull
from fastprior.serving.step_engine import StepEngine

NAMES = {  # of the engine's arguments, as requests have them
    "timesteps": "steps",
    "cond_scale": "guidance_scale",
    **{name: name for name in ("text_embed", "text_encodings", "solver", "spacing", "eta", "seed", "conditions")},
}


class Gone(Exception):
    """The client has left: nobody reads an answer."""


class Rows:
    """Embeddings of texts by an engine.

    Args:
        note: is told why a request was not taken.
    """

    def __init__(self, engine: StepEngine, settings: Settings, note: Callable[[str], None]):
        self._engine, self._settings, self._note = engine, settings, note

    async def sample(
        self,
        request: Request,
        texts: Sequence[dict[str, Tensor]] | Awaitable[Sequence[dict[str, Tensor]]],
        options: Options,
    ) -> Tensor:
        """Embeddings (texts * n, dim), those of a text together; texts may have to be waited for.

        Raises:
            ApiError: 400 for what does not fit the prior, or makes embeddings that are not finite, 429 where too many
                wait, 503 while the server ends, 504 past the deadline.
            Gone: the client has left; its rows are let go of.
        """
        timeout = min(options.timeout or math.inf, self._settings.timeout)
        end, futures = time.monotonic() + timeout, []
        left = asyncio.ensure_future(_left(request))
        try:
            if not isinstance(texts, Sequence):
                texts = await _first(texts, left, end)
            futures = self._begin(texts, options, max(1e-3, end - time.monotonic()))
            waiting = asyncio.gather(*map(asyncio.wrap_future, futures))
            return torch.stack(await _first(waiting, left, end + 1))  # by then the engine says so itself
        except (TimeoutError, asyncio.TimeoutError):  # which are two before Python 3.11
            self._note("deadline")
            raise ApiError(504, f"there was no answer within {timeout:g} s", "timeout", "deadline_exceeded") from None
        except ApiError as error:
            if error.status == 429:  # of the engine's queue, or of the texts'
                self._note("queue")
            raise
        except EngineClosed:
            raise _closing() from None
        except ValueError as error:
            rule = "guidance_scale, eta and the text must not be so large"
            raise ApiError(400, f"{error}; {rule}", None, "not_finite") from None
        finally:
            left.cancel()
            for future in futures:
                future.cancel()

    def _begin(self, texts: Sequence[dict[str, Tensor]], options: Options, timeout: float) -> list[Future]:
        count = len(texts) * options.n
        if count > self._settings.most_rows:
            self._note("rows")
            rule = f"it must ask for at most {self._settings.most_rows}"
            raise ApiError(400, f"the request asks for {count} embeddings; {rule}", "n", "too_many_rows")
        seed = secrets.randbits(62) if options.seed is None else options.seed
        futures: list[Future] = []
        try:
            given: dict[str, Any] = dict(
                cond_scale=options.guidance_scale, timesteps=options.steps, solver=options.solver,
                spacing=options.spacing, eta=options.eta, conditions=self._conditions(options), timeout=timeout,
            )  # fmt: skip
            for number in range(count):
                text = texts[number // options.n]
                futures.append(self._engine.submit(**text, **given, seed=(seed + number) % 2**63))
        except Exception as error:
            for future in futures:
                future.cancel()
            if isinstance(error, ApiError):
                raise
            if isinstance(error, QueueFull):
                after = {"Retry-After": str(math.ceil(error.retry_after))}
                raise ApiError(429, str(error), None, "queue_full", after) from None
            if isinstance(error, EngineClosed):
                raise _closing() from None
            if isinstance(error, (ValueError, TypeError)):
                raise ApiError(400, *_named(str(error))) from None
            raise
        return futures

    def _conditions(self, options: Options) -> dict[str, Tensor] | None:
        """Values of extra conditions as the prior takes them; those that are null are left out."""
        given = options.conditions
        if given is None:
            return None
        if not isinstance(given, dict):
            kind = type(given).__name__
            raise ApiError(400, f"conditions is a {kind}; it must be an object of names and values", "conditions")
        known = getattr(self._engine.prior.net, "conditions", None)
        return {
            name: _value(find(known, name[:100]), name, value) for name, value in given.items() if value is not None
        }


def _value(condition: Condition, name: str, value: Any) -> Tensor:
    """A value as that condition takes it. Raises ApiError where it is no number, or no list of them."""
    where = f"conditions[{name!r}]"
    if condition.kind == "vector":
        try:
            return tensor_of(value, where, condition.shape[0], 1)
        except ApiError as error:
            raise ApiError(400, error.message, "conditions") from None
    whole = condition.kind == "category"
    if type(value) is int and not whole and -(2**53) <= value <= 2**53:
        value = float(value)
    if type(value) is not (int if whole else float) or (whole and abs(value) >= 2**63):
        rule = "an integer" if whole else "a number"
        raise ApiError(400, f"{where}={str(value)[:100]}; it must be {rule}", "conditions")
    return torch.tensor(value)


def _closing() -> ApiError:
    return ApiError(503, "the server is ending; ask another one", None, "closing", {"Retry-After": "1"})


def _named(message: str) -> tuple[str, str | None]:
    """A message of the engine with the name that the field has in a request, and that field."""
    found = re.match(r"(?:text_cond\[')?(\w+)", message)
    argument = found[1] if found else ""
    if argument not in NAMES:
        return message, None
    return message.replace(argument, NAMES[argument], 1), NAMES[argument]


async def _first(work: Awaitable[Any], left: asyncio.Future, end: float) -> Any:
    """What comes of work, unless the client leaves before, or the time `end` comes."""
    task = asyncio.ensure_future(work)
    try:
        timeout = max(0.0, end - time.monotonic())
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED, timeout=timeout)
        if task.done():
            return task.result()
        if left.done():
            raise Gone
        raise TimeoutError
    finally:
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # which nobody else looks at
        task.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
