"""Times of calls, which on CUDA wait for each other."""

from __future__ import annotations

import time
from collections import deque

import torch


class Clock:
    """Times what runs within it, call by call; on CUDA by events, and calls of several streams wait for each other."""

    KEPT = 1000

    def __init__(self, device: torch.device):
        self.device = device
        self.read = 0  # bytes that the steps of the call read
        self.counts = True  # whether the call is one of those that are asked for
        self.kept: deque = deque(maxlen=self.KEPT)

    def now(self):
        """A time that `add` takes as the beginning."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def __enter__(self) -> None:
        if self.device.type == "cuda" and self.kept:
            torch.cuda.current_stream(self.device).wait_event(self.kept[-1][1])
        self.began, self.read, self.counts = self.now(), 0, True

    def __exit__(self, kind, error, trace) -> None:
        try:
            ended = self.now()
        except RuntimeError:
            if kind is None:
                raise
            return  # the device is lost, of which the error that is under way says more
        if kind is None or self.device.type == "cuda":  # what failed may still run
            self.kept.append((self.began, ended, self.read, self.counts))

    def add(self, began, read: int) -> None:
        """Note what was not within it: it may be calls of several threads at a time, and none waits for another."""
        self.kept.append((began, self.now(), read, True))

    def wait(self) -> None:
        """Wait until the device is done with all that ran."""
        if self.device.type == "cuda" and self.kept:
            self.kept[-1][1].synchronize()

    def calls(self) -> tuple[list[float], int]:
        """Milliseconds of each call that counts, and the bytes that all of them read."""
        kept = [call[:3] for call in tuple(self.kept) if call[3]]  # other threads may add to it
        read = sum(read for _, _, read in kept)
        if self.device.type != "cuda":
            return [(end - begin) * 1e3 for begin, end, _ in kept], read
        for _, end, _ in kept:
            end.synchronize()
        return [begin.elapsed_time(end) for begin, end, _ in kept], read
