"""Figures of a server for Prometheus: requests, queue, prefills, steps."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastprior.serving.requests import Events

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Metrics(Events):
    """Counters and histograms with a registry of their own; the engine tells them of its steps."""

    def __init__(self):
        self.registry = CollectorRegistry()
        where = dict(registry=self.registry)
        self.requests = Counter("fastprior_requests", "Requests by route and status.", ["route", "code"], **where)
        self.rejected = Counter("fastprior_rejected", "Requests not taken, by reason.", ["reason"], **where)
        self.request_seconds = Histogram(
            "fastprior_request_seconds", "From a request's arrival to its answer.", ["route"], buckets=SECONDS, **where
        )
        self.ended = Counter("fastprior_rows", "Embeddings by how they ended.", ["outcome"], **where)
        self.queue_seconds = Histogram("fastprior_queue_seconds", "Until a row begins.", buckets=SECONDS, **where)
        self.row_seconds = Histogram("fastprior_row_seconds", "Of a row, with waiting.", buckets=SECONDS, **where)
        self.prefill_seconds = Histogram("fastprior_prefill_seconds", "To run a text.", buckets=SECONDS, **where)
        self.step_seconds = Histogram("fastprior_step_seconds", "Of a step of all rows.", buckets=SECONDS, **where)
        self.step_rows = Histogram("fastprior_step_rows", "Rows that share a step.", buckets=ROWS, **where)
        self.hits = Counter("fastprior_prefix_hits", "Texts that had been run before.", **where)
        self._running = Gauge("fastprior_running", "Rows on their way.", **where)
        self._waiting = Gauge("fastprior_waiting", "Rows in the queue.", **where)

    def step(self, rows: int, seconds: float) -> None:
        self.step_seconds.observe(seconds)
        self.step_rows.observe(rows)

    def prefill(self, prompts: int, seconds: float) -> None:
        self.prefill_seconds.observe(seconds)

    def prefix_hit(self) -> None:
        self.hits.inc()

    def finished(self, outcome: str, waited: float, seconds: float) -> None:
        self.ended.labels(outcome).inc()
        self.queue_seconds.observe(waited)
        if outcome == "done":
            self.row_seconds.observe(seconds)

    def text(self, running: int, waiting: int) -> bytes:
        """All of it as Prometheus reads it."""
        self._running.set(running)
        self._waiting.set(waiting)
        return generate_latest(self.registry)
