"""Several processes that fail together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import gather_object


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """A block that raises on all processes where it raises on one; each must leave it before one goes on.

    In it no process may wait for another. Those without an error of their own raise an OSError or a ValueError that
    names the process which has one.
    """
    own = None
    try:
        yield
    except Exception as error:
        own = error
    said = gather_object([own and (isinstance(own, OSError), str(own))])
    if own is not None:
        raise own
    for rank, failed in enumerate(said):
        if failed:
            raise (OSError if failed[0] else ValueError)(f"process {rank}: {failed[1]}")
