"""Requests to a step engine: how each ended, what is told of it, and which have the same text."""

from __future__ import annotations

import hashlib
import math
import time
from concurrent.futures import Future

import torch
from torch import Tensor

from fastprior.batches import map_rows
from fastprior.serving.row_model import Row


class QueueFull(RuntimeError):
    """So many requests wait that no other is taken.

    Attributes:
        retry_after: seconds, by then a place should be free.
    """

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests wait, which is the limit; try again in {retry_after:.1f} s")
        self.retry_after = retry_after


class EngineClosed(RuntimeError):
    """The engine takes no requests any more, or ended before this one was done."""


class Events:
    """What a `StepEngine` tells of its work, in its own thread: subclass it, and be quick."""

    def step(self, rows: int, seconds: float) -> None:
        """A step of so many rows was made."""

    def prefill(self, prompts: int, seconds: float) -> None:
        """So many texts were run."""

    def prefix_hit(self) -> None:
        """A text had been run before."""

    def finished(self, outcome: str, waited: float, seconds: float) -> None:
        """A request ended: "done", "cancelled", "failed" or "expired", after so many seconds, some of them waiting."""


class Request:
    """A request that waits or runs."""

    def __init__(self, row: Row, timeout: float | None):
        self.row, self.future = row, Future()
        self.submitted = time.monotonic()
        self.deadline = math.inf if timeout is None else self.submitted + timeout
        self.began: float | None = None


def key_of(text_cond: dict) -> bytes:
    """Equal keys for equal text conditions, and for no others."""
    digest = hashlib.blake2b(digest_size=16)

    def add(t: Tensor) -> Tensor:
        digest.update(f"{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.cpu().contiguous().view(torch.uint8).numpy().data)
        return t

    for name, value in sorted(text_cond.items()):
        if value is not None:
            digest.update(name.encode())
            map_rows({name: value}, add)
    return digest.digest()
