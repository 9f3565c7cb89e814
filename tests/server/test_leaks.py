"""Thousands of requests of every kind: afterwards the process holds what it held before."""

import gc
import json
import os
import resource
import threading
import time
from collections import Counter

import httpx
import pytest

from helpers.priors import WordClip, make_prior, make_text
from helpers.servers import raw, serving

TEXT = make_text(64, 32)
BODIES = [
    dict(text_embed=embed, text_encodings=encodings, steps=2, solver="ddim")
    for embed, encodings in zip(TEXT["text_embed"].tolist(), TEXT["text_encodings"].tolist())
]
CLIENTS, WARM, REQUESTS = 4, 1000, int(os.environ.get("REQUESTS", 2000))  # 5000 by hand
MOST_MIB = 12  # that 4,000 requests may add: 3 kB each would, of 5,000


def held() -> tuple[float, int, int]:
    """MiB of this process, files it has open, and its threads."""
    gc.collect()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * resource.getpagesize() / 2**20, len(os.listdir("/proc/self/fd")), threading.active_count()


def ask(client: httpx.Client, number: int) -> int:
    """One request, of ten kinds in turn; its status, or 0 of one that left."""
    body = BODIES[number % len(BODIES)]
    kind = number % 10
    if kind == 0:
        data = json.dumps(body | dict(n=4)).encode()
        head = f"POST /v1/priors/sample HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        with raw(client, head + data):
            time.sleep(0.001)
        return 0
    if kind == 1:
        return client.post("/v1/embeddings", json=dict(input=[f"a{number}", "b"], steps=2, solver="ddim")).status_code
    changes = {2: dict(text_embed=[1.0]), 3: dict(steps=20, timeout=1e-4), 4: dict(n=8)}
    return client.post("/v1/priors/sample", json=body | changes.get(kind, {})).status_code


def storm(address: str, requests: int, statuses: Counter) -> None:
    def work(first: int) -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            for number in range(first, requests, CLIENTS):
                statuses[ask(client, number)] += 1

    threads = [threading.Thread(target=work, args=(first,)) for first in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_nothing_is_left(caplog):
    with serving(make_prior(clip=WordClip()), rows=8, prefixes=20, waiting=64) as (client, server):
        statuses: Counter = Counter()
        storm(str(client.base_url), WARM, statuses)
        before = held()
        storm(str(client.base_url), REQUESTS - WARM, statuses)
        end = time.monotonic() + 20
        while held()[1:] != before[1:] and time.monotonic() < end:  # connections that are still being closed
            time.sleep(0.1)
        after = held()
        stats = server.engine.stats()
        assert after[0] - before[0] < MOST_MIB and after[1:] == before[1:], (before, after)
        assert stats["running"] == stats["waiting"] == 0 and stats["expired"] > 0 and stats["failed"] == 0
        assert statuses.keys() <= {0, 200, 400, 429, 504} and statuses[200] > REQUESTS / 2
        assert statuses[400] == statuses[0] == REQUESTS / 10
    assert "never retrieved" not in caplog.text
