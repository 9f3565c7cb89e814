"""Peak memory of a whole process that samples: ours must not need more than the peer's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
import dalle2_pytorch
import fastprior
import torch
from priors import build, text
module, batch, dtype = sys.argv[2], int(sys.argv[3]), sys.argv[4]
device = torch.device("cpu")
prior = build({"peer": dalle2_pytorch, "fastprior": fastprior}[module], device)
condition = text(batch, device)
def peak():  # not ru_maxrss, which begins at that of the process that started this one
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
if module == "peer":
    prior.p_sample_loop((batch, 768), text_cond=condition, timesteps=3)
elif dtype == "float32":
    prior.p_sample_loop((batch, 768), text_cond=condition, timesteps=3, progress=False)
else:
    from fastprior.serving import PriorSampler
    PriorSampler(prior.to(getattr(torch, dtype)), batch_sizes=(batch,), timesteps=3)(**condition)
print(json.dumps(dict(before=before, peak=peak())))
"""


def peak(module: str, batch: int, dtype: str) -> dict:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(Path(__file__).parent), module, str(batch), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory(benchmark, record, device, batch, dtype):
    if device.type != "cpu":
        pytest.skip("measures the process, on the CPU")
    ours, theirs = benchmark.pedantic(
        lambda: (peak("fastprior", batch, dtype), peak("peer", batch, "float32")), rounds=1
    )  # fmt: skip
    details = dict(model="D2-small", batch=batch, dtype=dtype)
    record("peak memory", "peer eager", [theirs["peak"] / 2**20], "MiB", **details | dict(dtype="float32"))
    record("peak memory", "fastprior", [ours["peak"] / 2**20], "MiB", **details, ratio=ours["peak"] / theirs["peak"])
    benchmark.extra_info.update(ours_mib=ours["peak"] >> 20, peer_mib=theirs["peak"] >> 20)
    if dtype == "float32":
        assert ours["peak"] <= theirs["peak"] * 1.02
