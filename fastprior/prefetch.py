"""Making items ahead of their use, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any


def made_ahead(items: Iterator, depth: int) -> Iterator:
    """`items`, made by a thread that is at most `depth` ahead; closing this stops it."""
    ready: queue.Queue = queue.Queue(depth)
    closed = threading.Event()

    def put(*entry: Any) -> None:
        while not closed.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                pass

    def make() -> None:
        try:
            for item in items:
                put(item, None)
                if closed.is_set():
                    break
            put(None, None)
        except BaseException as error:
            put(None, error)
        finally:
            items.close()

    thread = threading.Thread(target=make, daemon=True, name="fastprior-pairs")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        closed.set()
        thread.join()
