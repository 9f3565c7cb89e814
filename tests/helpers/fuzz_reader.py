"""A reader of files that come from elsewhere, as the fuzzer takes it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class Wrong(Exception):
    """What was read is not what a file may give, or what was there before is no longer there."""


@dataclass(frozen=True)
class Reader:
    """Makes folders of valid files below one, and reads such a folder; names: of arguments that messages may say."""

    make: Callable[[Path], list[Path]]
    read: Callable[[Path], object]
    names: tuple[str, ...] = ()
    valid: bool = True  # what is made is read; otherwise it may be refused


def check_finite(tensors, what):
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise Wrong(f"{what} {name} is not finite")
