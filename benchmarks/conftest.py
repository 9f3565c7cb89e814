"""Options and the record writer: one JSON line per measurement, with what is needed to compare it later.

`--quick` shows in minutes, on any machine, that everything runs, and measures nothing: of each test its first and last
case run, each for one round, on models of 2 layers of width 64, with batches of at most 2 and runs of 5 steps; and on
the CPU torch.compile traces, but generates no code.
"""

import functools
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import recording

# inductor's CPU code waits at barriers: more threads than cores, or a nested pool, cost more than they give
torch.set_num_threads(os.cpu_count() if "OMP_NUM_THREADS" not in os.environ else torch.get_num_threads())


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="append the measurements to this file, as JSON lines")
    parser.addoption("--device", default="cpu", help="where to run: cpu or cuda")
    parser.addoption("--quick", action="store_true", help="only try everything, on tiny models; see above")
    parser.addoption("--rounds", type=int, help="rounds of whole runs; by default 3 at batch 1 and 8, 2 at batch 64")
    parser.addoption(
        "--full-peer", action="store_true", help="run the peer's every step, also where that takes minutes"
    )


def pytest_configure(config):
    if not config.getoption("--quick"):
        return
    path = config.getoption("--record")
    if path and (Path(__file__).parent / "records") in Path(path).resolve().parents:
        raise pytest.UsageError(f"--record {path}: with --quick nothing is measured, so no record of it is kept")
    import priors

    priors.shrink()
    if config.getoption("--device") == "cpu":
        torch.compile = functools.partial(torch.compile, backend="eager")
    config.option.rounds = 1


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--quick"):
        return
    cases = {}
    for item in items:
        cases.setdefault((item.path, item.originalname), []).append(item)
    kept = {id(item) for found in cases.values() for item in (found[0], found[-1])}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def record(request, device):
    """record(op, provider, samples, unit=..., **details): note one measurement, and return its median.

    Details that are figures: `bytes` and `flops` of one call (not in GB or TFLOP), `share` of the floor, and `goals`,
    {field: value}, such as dict(ratio=3.0); at most for those of `report.AT_MOST`, of all others at least.
    """

    def write(op: str, provider: str, samples: list[float], unit: str = "s", **details) -> float:
        if request.config.getoption("--quick"):
            details["quick"] = True
        line = recording.line(op, provider, samples, unit, device, **details)
        if path := request.config.getoption("--record"):
            recording.append(path, line)
        return line["p50"]

    return write
