"""Records: one JSON line per measurement, with what is needed to compare it later."""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path

import torch


def line(op: str, provider: str, samples: list[float], unit: str, device: torch.device, **details) -> dict:
    low, mid, high = (
        statistics.quantiles(samples, n=10, method="inclusive")[i] if len(samples) > 1 else samples[0]
        for i in (1, 4, 7)
    )
    found = dict(op=op, provider=provider, unit=unit, p20=low, p50=mid, p80=high, runs=len(samples), **details)
    return found | dict(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        versions=_versions(),
        commit=_commit(),
        date=datetime.date.today().isoformat(),
    )


def append(path: str | Path, record: dict) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


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
