"""Thousands of requests at once on a StepEngine: each has the bits that it has alone, and memory stays.

`REQUESTS=10000 pytest -m fuzz -s tests/fuzz/test_storm.py` for more than CI has.
"""

import gc
import os
import random
import resource
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch

from fastprior.kernels.cpu import library as cpu_library
from fastprior.serving.requests import QueueFull
from fastprior.serving.step_engine import StepEngine
from helpers.priors import make_prior, make_text

pytestmark = pytest.mark.fuzz
REQUESTS, CLIENTS, KINDS = int(os.environ.get("REQUESTS", 400)), 8, 60
RUNS = dict(timesteps=9, solver="ddim"), dict(timesteps=6, solver="dpm++"), dict()
TEXT = make_text(KINDS, 32)


def ask(engine, kind, **options):
    run = RUNS[kind % len(RUNS)] | dict(seed=kind, cond_scale=(1.0, 2.0, 3.5)[kind // 3 % 3]) | options
    return engine.submit(TEXT["text_embed"][kind], TEXT["text_encodings"][kind], **run)


def memory() -> int:
    """Bytes that the process has in memory now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(cpu_library.unavailable() is not None, reason="bits are of the kernels")
def test_storm():
    prior, wrong, counts, lock = make_prior(), [], dict(done=0, cancelled=0, refused=0, expired=0), threading.Lock()
    with StepEngine(prior, rows=24, waiting=100, prefixes=20) as engine:
        alone = [ask(engine, kind).result(60) for kind in range(KINDS)]
        before, start = memory(), time.monotonic()

        def client(number: int) -> None:
            draw = random.Random(number)
            for _ in range(REQUESTS // CLIENTS):
                kind, fate = draw.randrange(KINDS), draw.random()
                try:
                    future = ask(engine, kind, timeout=draw.uniform(1e-4, 5e-3) if fate < 0.05 else None)
                except QueueFull as error:
                    outcome = "refused"
                    time.sleep(min(error.retry_after, 0.01))
                else:
                    if fate > 0.95:
                        time.sleep(draw.uniform(0, 5e-3))
                        future.cancel()
                    try:
                        outcome = "done" if torch.equal(future.result(60), alone[kind]) else "wrong"
                    except CancelledError:
                        outcome = "cancelled"
                    except TimeoutError:
                        outcome = "expired"
                with lock:
                    counts[outcome] = counts.get(outcome, 0) + 1
                    if outcome == "wrong":
                        wrong.append(kind)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(600)
            assert not thread.is_alive(), "a request got no answer"
        stats, grown = engine.stats(), memory() - before
    rows = stats["row_steps"] / stats["steps"]
    print(f"\n{counts} in {time.monotonic() - start:.1f} s, {rows:.1f} rows a step, {grown / 2**20:+.1f} MiB")
    assert not wrong and counts["done"] > REQUESTS * 0.8 and sum(counts.values()) == REQUESTS // CLIENTS * CLIENTS
    assert stats["running"] == stats["waiting"] == stats["failed"] == 0
    assert grown < 64 * 2**20, "memory grew"
