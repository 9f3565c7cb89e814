"""Small helpers: atomic files, and what training scripts import."""

from __future__ import annotations

import difflib
import glob
import importlib
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import islice
from pathlib import Path
from types import ModuleType

from safetensors import SafetensorError

from fastprior.reading import quoted


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and is removed when it does not.

    So at any moment there is the old file or the new one, whole. Raises FileNotFoundError where no file can be, and
    OSError, naming the file, where writing fails.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written; it must be a file in a folder that exists")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask gives; safetensors would leave 0600
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # of torch's writer and safetensors'
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | os.PathLike) -> None:
    """Delete what `atomic` writes of a path left when they were killed; its name may have placeholders in braces."""
    path = Path(path)
    stem, suffix = re.sub(r"\{.*?\}", "*", glob.escape(path.stem)), glob.escape(path.suffix)
    for name in (stem, f"{stem}_step*"):
        for hidden in (f".{name}", f"..{name}"):  # a write within a write has two dots
            for leftover in path.parent.glob(f"{hidden}{suffix}.{'[0-9a-f]' * 8}.tmp*"):
                leftover.unlink(missing_ok=True)


def in_eval_mode(method):
    """Make a method run in eval mode; the mode comes back afterwards, also after an error."""

    @wraps(method)
    def inner(self, *args, **kwargs):
        training = self.training
        self.eval()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.train(training)

    return inner


def nearest(name: str, known: Iterable[str]) -> str:
    """Name what is most like an unknown name, or else all that there are, for a message."""
    name, known = name[:100], list(known)  # of files, too, whose names may be of any length
    close = difflib.get_close_matches(name, known, n=1)
    return f"the nearest is {close[0]!r}" if close else f"it must be one of {', '.join(map(repr, known))}"


def first_few(items: Iterable) -> str:
    """The first five items, as text: of what files hold, too, so long ones are cut and odd characters escaped."""
    items = list(items)
    texts = (item if type(item) is str and len(item) < 100 and item.isprintable() else quoted(item) for item in items)
    return ", ".join(islice(texts, 5)) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


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
