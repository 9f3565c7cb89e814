"""Files made to break a load are refused by one clear error, or load as a prior that is whole."""

import math
import os
import resource
import signal
import sys
import time
import traceback
import warnings

import pytest
import torch

import fastprior
from helpers.hostile_files import all_cases, some_cases

SECONDS, BYTES = 8, 2**30  # of processor time, which other processes do not lengthen
WAIT = 120  # seconds that a case may wait for anything
ERRORS = ValueError, FileNotFoundError, TypeError
LETTERS = 1500  # of a message


def chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def fault(name, make, folder):
    """What is wrong with the way that a case ends; None where nothing is."""
    path, kwargs = make(folder)
    load = kwargs.pop("by", fastprior.load)
    begun = time.process_time()
    try:
        prior = load(path, **kwargs)
    except ERRORS as error:
        text = str(error)
        named = (str(path), str(path.parent), *(f"{key}=" for key in kwargs), "config", *map(str, kwargs.values()))
        found = "" if any(part in text for part in named) else f"names neither file nor argument: {text:.300}"
        if any(isinstance(one, MemoryError) or "allocate memory" in str(one) for one in chain(error)):
            found = f"took memory: {text:.300}"
        if len(text) > LETTERS + len(str(path)) * 3 or not text.isprintable():
            found = f"a message of {len(text)} letters: {text[:300]!r}"
        if name.startswith("fine"):
            found = f"was refused: {text:.300}"
        return found or None
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {frame.filename}:{frame.lineno}: {error!s:.300}"
    if name.startswith("refused"):
        return f"was loaded: {prior}"[:500]
    if load is not fastprior.load:
        bad = [key for key, value in prior[0].state_dict().items() if value.is_meta or not value.isfinite().all()]
        return f"loaded {bad[:3]}" if bad else None
    state = prior.net.state_dict()
    bad = [key for key, value in state.items() if not value.is_floating_point() or not value.isfinite().all()]
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in type(prior.net)(**prior.net.config).state_dict().items()}
    bad += [key for key in state if state[key].shape != shapes[key]]
    if not all(math.isfinite(value) for value in (prior.image_embed_scale, *prior.noise_scheduler.betas)):
        bad.append("a number of the prior")
    seconds = time.process_time() - begun
    return f"loaded {bad[:3]}" if bad else f"took {seconds:.1f} s" if seconds > SECONDS else None


def virtual_memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def run_from(cases, first, folder, report):
    """Run cases in this process, which may end at any of them; what is wrong, and that it was reached, go to a file."""
    limit = virtual_memory() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with open(report, "a", buffering=1) as file:
        for number in range(first, len(cases)):
            place = folder / str(number)
            place.mkdir()
            file.write(f"{number}\n")
            signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
            signal.alarm(WAIT)
            found = fault(*cases[number], place)
            signal.alarm(0)
            if found:
                file.write(f"{number} {found!a}\n")


@pytest.mark.slow
@pytest.mark.parametrize("which", [some_cases, pytest.param(all_cases, marks=pytest.mark.fuzz)])
def test_hostile_files(tmp_path, which):
    if sys.platform != "linux":
        pytest.skip("limits of memory and processes are Linux's")
    cases, report, first, faults = which(), tmp_path / "report", 0, []
    assert len(cases) > 500 and len({name for name, _ in cases}) == len(cases)
    folder = tmp_path / "files"
    folder.mkdir()
    while first < len(cases):
        report.write_text("")
        if not (child := os.fork()):
            try:
                run_from(cases, first, folder, report)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        lines = [line.partition(" ") for line in report.read_text().splitlines()]
        faults += [f"{cases[int(number)][0]}: {text}" for number, space, text in lines if space]
        last = int(lines[-1][0])
        if os.WIFSIGNALED(status):
            faults.append(f"{cases[last][0]}: {signal.Signals(os.WTERMSIG(status)).name}")
        elif last < len(cases) - 1:
            faults.append(f"{cases[last][0]}: the process ended")
        first = last + 1
    assert not faults, f"{len(faults)} of {len(cases)}\n" + "\n".join(faults)
