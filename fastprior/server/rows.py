"""Rows of a request on their way through the engine: begun together, waited for together, ended together."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from starlette.requests import Request
from torch import Tensor

from fastprior.server.errors import ApiError
from fastprior.server.schemas import Options
from fastprior.server.settings import Settings
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

    async def sample(self, request: Request, texts: Sequence[dict[str, Tensor]], options: Options) -> Tensor:
        """Embeddings (texts * n, dim), those of a text together.

        Raises:
            ApiError: 400 for what does not fit the prior, or makes embeddings that are not finite, 429 where too many
                wait, 503 while the server ends, 504 past the deadline.
            Gone: the client has left; its rows are let go of.
        """
        timeout = min(options.timeout or math.inf, self._settings.timeout)
        futures = self._begin(texts, options, timeout)
        waiting = asyncio.gather(*map(asyncio.wrap_future, futures))
        left = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({waiting, left}, return_when=asyncio.FIRST_COMPLETED, timeout=timeout + 1)
            if waiting.done():
                return torch.stack(await waiting)
            if left.done():
                raise Gone
            raise TimeoutError
        except (TimeoutError, asyncio.TimeoutError):  # which are two before Python 3.11
            self._note("deadline")
            raise ApiError(504, f"there was no answer within {timeout:g} s", "timeout", "deadline_exceeded") from None
        except EngineClosed:
            raise _closing() from None
        except ValueError as error:
            rule = "guidance_scale, eta and the text must not be so large"
            raise ApiError(400, f"{error}; {rule}", None, "not_finite") from None
        finally:
            left.cancel()
            waiting.cancel()
            for future in futures:
                future.cancel()

    def _begin(self, texts: Sequence[dict[str, Tensor]], options: Options, timeout: float) -> list[Future]:
        count = len(texts) * options.n
        if count > self._settings.most_rows:
            self._note("rows")
            rule = f"it must ask for at most {self._settings.most_rows}"
            raise ApiError(400, f"the request asks for {count} embeddings; {rule}", "n", "too_many_rows")
        seed = secrets.randbits(62) if options.seed is None else options.seed
        given: dict[str, Any] = dict(
            cond_scale=options.guidance_scale, timesteps=options.steps, solver=options.solver, spacing=options.spacing,
            eta=options.eta, conditions=_conditions(options), timeout=timeout,
        )  # fmt: skip
        futures: list[Future] = []
        try:
            for number in range(count):
                text = texts[number // options.n]
                futures.append(self._engine.submit(**text, **given, seed=(seed + number) % 2**63))
        except Exception as error:
            for future in futures:
                future.cancel()
            if isinstance(error, QueueFull):
                self._note("queue")
                after = {"Retry-After": str(math.ceil(error.retry_after))}
                raise ApiError(429, str(error), None, "queue_full", after) from None
            if isinstance(error, EngineClosed):
                raise _closing() from None
            if isinstance(error, (ValueError, TypeError)):
                raise ApiError(400, *_named(str(error))) from None
            raise
        return futures


def _closing() -> ApiError:
    return ApiError(503, "the server is ending; ask another one", None, "closing", {"Retry-After": "1"})


def _named(message: str) -> tuple[str, str | None]:
    """A message of the engine with the name that the field has in a request, and that field."""
    argument = message.replace("(", "=").replace(" ", "=").split("=")[0].removeprefix("text_cond['").split("'")[0]
    if argument not in NAMES:
        return message, None
    return message.replace(argument, NAMES[argument], 1), NAMES[argument]


def _conditions(options: Options) -> dict[str, Tensor] | None:
    return options.conditions and {name: torch.tensor(value) for name, value in options.conditions.items()}


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
