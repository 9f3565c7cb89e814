"""Journeys through the product: which of its functions a call passes, and how often it changes the file."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import fastprior
from fastprior.kernels import reference

HOMES = str(Path(fastprior.__file__).parent) + "/", str(Path(reference.__file__).parent) + "/"


class Journey(NamedTuple):
    """files, functions: that ran, of the product. crossings: calls from a function of one file to one of another."""

    files: set[str]
    functions: set[tuple[str, str]]
    crossings: Counter[tuple[str, str]]


def follow(run: Callable[[], object]) -> Journey:
    """The journey of a call, in this thread; what PyTorch and other libraries do between is not counted."""
    journey = Journey(set(), set(), Counter())

    def note(frame, event: str, _) -> None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if event != "call" or not file.startswith(HOMES):
            return
        journey.files.add(file)
        journey.functions.add((file, f"{name}:{frame.f_code.co_firstlineno}"))
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(HOMES):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename != file:
            journey.crossings[f"{caller.f_code.co_filename}:{caller.f_code.co_name}", f"{file}:{name}"] += 1

    outer = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(outer)
    return journey
