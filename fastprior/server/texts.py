"""Texts through the prior's CLIP: those that wait together run together, in a thread of their own."""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.server.errors import ApiError

MOST = 64  # texts of a batch


class Encoded(NamedTuple):
    """What the prior is conditioned on: `text_embed` (dim,), maybe `text_encodings` (length, dim); its tokens."""

    condition: dict[str, Tensor]
    tokens: int


class Texts:
    """What encodes texts; of one event loop.

    Args:
        prior: with a clip.
        waiting: how many texts wait at most.
    """

    def __init__(self, prior: DiffusionPrior, waiting: int):
        self._prior, self._most = prior, waiting
        self._waiting: list[tuple[str, asyncio.Future]] = []
        self._busy: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(1, "fastprior-texts")
        self._seconds = 0.0  # of the last batch

    @property
    def waiting(self) -> int:
        """How many texts wait, besides those that are being encoded."""
        return sum(not future.done() for _, future in self._waiting)

    async def encode(self, texts: list[str]) -> list[Encoded]:
        """Encode texts, with whatever else waits.

        Raises:
            ApiError: 400 for a text that cannot be encoded, 429 where too many wait.
        """
        self._waiting = [(text, future) for text, future in self._waiting if not future.done()]
        if self._waiting and len(self._waiting) + len(texts) > self._most:
            after = {"Retry-After": str(math.ceil(max(0.1, self._seconds * len(self._waiting) / MOST)))}
            raise ApiError(429, f"{len(self._waiting)} texts wait to be encoded", None, "queue_full", after)
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in texts]
        self._waiting += zip(texts, futures)
        if self._busy is None or self._busy.done():
            self._busy = loop.create_task(self._work())
        try:
            return await asyncio.gather(*futures)
        finally:
            for future in futures:
                future.cancel()  # whoever asked is gone

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
            batch = [(text, future) for text, future in batch if not future.done()]
            if not batch:
                continue
            start = time.monotonic()
            found = await loop.run_in_executor(self._thread, self._each, [text for text, _ in batch])
            self._seconds = time.monotonic() - start
            for (_, future), one in zip(batch, found):
                if future.done():
                    continue
                if isinstance(one, Exception):
                    future.set_exception(one)
                else:
                    future.set_result(one)

    def _each(self, texts: list[str]) -> list[Encoded | Exception]:
        """Every text encoded, or why it cannot be; one that cannot does not hurt those beside it."""
        try:
            return self._encode(texts)
        except Exception as error:
            if len(texts) > 1:
                return [one for text in texts for one in self._each([text])]
            return [ApiError(400, str(error), "input", "not_encoded") if isinstance(error, ValueError) else error]

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> list[Encoded]:
        tokens = self._prior.clip.tokenize(texts)
        found = self._prior.text_condition(tokens, None, None)
        places = torch.arange(1, tokens.shape[1] + 1)
        counts = ((tokens.cpu() != 0) * places).amax(dim=1).tolist()  # up to the last that is no padding
        return [Encoded({name: t[row] for name, t in found.items()}, count) for row, count in enumerate(counts)]

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
