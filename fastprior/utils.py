"""Small helpers that training scripts import."""

from __future__ import annotations

import importlib
import time
from types import ModuleType


class Timer:
    """Seconds since it was made, or last reset."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.last_time = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.last_time


def print_ribbon(s: str, symbol: str = "=", repeat: int = 40) -> str:
    """`s` between two rows of `repeat` symbols; returned, not printed."""
    return f"{symbol * repeat} {s} {symbol * repeat}"


def import_or_print_error(pkg_name: str, err_str: str | None = None) -> ModuleType:
    """Import a package. Raises ImportError, with `err_str` as its message where given."""
    try:
        return importlib.import_module(pkg_name)
    except ImportError as error:
        if err_str is None:
            raise
        raise ImportError(err_str) from error
