"""Threads that do something at once, and whose errors are not lost with them."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor


def at_once(work: Callable, given: Iterable) -> list:
    """What `work` returns for each of these, by a thread each, which begin together; raises what one of them raised."""
    given = list(given)
    ready = threading.Barrier(len(given))

    def begin(one):
        ready.wait()
        return work(one)

    with ThreadPoolExecutor(len(given)) as pool:
        return list(pool.map(begin, given))
