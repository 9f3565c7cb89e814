"""What an operator decides of a server; impossible settings are refused before it listens."""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST_TEXT = 20_000  # characters, of which a CLIP keeps 77 tokens


@dataclass(frozen=True)
class Settings:
    """Limits and names of a server.

    Attributes:
        name: of the model, in requests and answers.
        api_key: that requests under /v1 must carry; None for none.
        timeout: seconds of a request that names none, and the most that one may name.
        most_body: bytes of a request.
        most_rows: embeddings that one request may ask for.
        body_seconds: in which a request must have arrived whole.
        stall: seconds without a step, of an engine that has work, after which the server is not ready.
        drain: seconds that requests have left when the server is told to end.
    """

    name: str
    api_key: str | None = None
    timeout: float = 60.0
    most_body: int = 32 * 2**20
    most_rows: int = 64
    body_seconds: float = 30.0
    stall: float = 30.0
    drain: float = 30.0

    def __post_init__(self):
        for name, least in (("timeout", 0), ("body_seconds", 0), ("stall", 0), ("drain", -1)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > least) or value < 0:
                raise ValueError(f"{name}={value}; it must be a finite number of seconds, more than {max(least, 0)}")
        for name in ("most_body", "most_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key is empty; it must have characters, or not be given")

    def check_queue(self, waiting: int) -> None:
        """Raise ValueError where the queue is too short for a request of the most rows."""
        if self.most_rows > waiting:
            raise ValueError(f"most_rows={self.most_rows}; it must be at most the queue's length, {waiting}")
