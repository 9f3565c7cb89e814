"""Texts through the prior's CLIP: those that wait together run together, in a thread of their own."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fastprior.prior.diffusion_prior import DiffusionPrior

MOST = 64  # texts of a batch


class Texts:
    """What encodes texts; of one event loop.

    Args:
        prior: with a clip.
    """

    def __init__(self, prior: DiffusionPrior):
        self._prior = prior
        self._waiting: list[tuple[str, asyncio.Future]] = []
        self._busy: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(1, "fastprior-texts")

    async def encode(self, texts: list[str]) -> list[dict[str, Tensor]]:
        """What the prior is conditioned on, of each text: `text_embed` (dim,), and `text_encodings` (length, dim)."""
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
        while self._waiting:
            batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
            batch = [(text, future) for text, future in batch if not future.done()]
            if batch:
                await self._encode_batch(batch)

    async def _encode_batch(self, batch: list[tuple[str, asyncio.Future]]) -> None:
        """Encode texts together; where that fails, each by itself, so that a text fails alone."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._thread, self._encode, [text for text, _ in batch])
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    await self._encode_batch([one])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, future), one in zip(batch, found):
            if not future.done():
                future.set_result(one)

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> list[dict[str, Tensor]]:
        found = self._prior.text_condition(texts, None, None)
        return [{name: t[row] for name, t in found.items()} for row in range(len(texts))]

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
