"""What this machine can do, measured: the bandwidths and the peak that the other figures are shares of."""

import subprocess

import torch
from timing import copy_bandwidth, median, op_seconds

from fastprior.serving.measure import read_bandwidth


def test_bandwidth(benchmark, record, device):
    found = benchmark.pedantic(lambda: (copy_bandwidth(device), read_bandwidth(device)), rounds=1)
    for op, value in zip(("copy bandwidth", "read bandwidth"), found):
        record(op, "torch", [value / 1e9], "GB/s", driver=driver() if device.type == "cuda" else None)
        benchmark.extra_info[op] = f"{value / 1e9:.0f} GB/s"


def test_bf16_peak(benchmark, record, device):
    size = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    seconds = benchmark.pedantic(lambda: median(op_seconds(lambda _: a @ b, [None], device)), rounds=1)
    rate = 2 * size**3 / seconds / 1e12
    record("bf16 peak", f"torch.matmul of {size} x {size}", [rate], "TFLOP/s")
    benchmark.extra_info["bf16 peak"] = f"{rate:.1f} TFLOP/s"


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
