"""Options and the record writer: one JSON line per measurement, with what is needed to compare it later."""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
# inductor's CPU code waits at barriers: more threads than cores, or a nested pool, cost more than they give
torch.set_num_threads(os.cpu_count() if "OMP_NUM_THREADS" not in os.environ else torch.get_num_threads())


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="append the measurements to this file, as JSON lines")
    parser.addoption("--device", default="cpu", help="where to run: cpu or cuda")
    parser.addoption("--rounds", type=int, help="rounds of whole runs; by default 3 at batch 1 and 8, 2 at batch 64")
    parser.addoption(
        "--full-peer", action="store_true", help="run the peer's every step, also where that takes minutes"
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _versions() -> dict:
    names = ("fastprior", "torch", "triton", "dalle2-pytorch", "diffusers")
    found = {name: importlib.metadata.version(name) for name in names if _installed(name)}
    return found | {"python": platform.python_version()}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def record(request, device):
    """record(op, provider, samples, unit=..., **details): note one measurement, and return its median."""

    def write(op: str, provider: str, samples: list[float], unit: str = "s", **details) -> float:
        low, mid, high = (
            statistics.quantiles(samples, n=10, method="inclusive")[i] if len(samples) > 1 else samples[0]
            for i in (1, 4, 7)
        )
        line = dict(op=op, provider=provider, unit=unit, p20=low, p50=mid, p80=high, runs=len(samples), **details)
        line |= dict(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
            versions=_versions(),
            commit=_commit(),
            date=datetime.date.today().isoformat(),
        )
        path = request.config.getoption("--record")
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
        return mid

    return write
