"""A run beside other processes that keep every core busy, against the same run when they do not: on the CPU.

Half of each core's time makes a run twice as long. What it takes beyond that is lost between its threads, which wait
for each other several times a layer. Quiet and busy spells take turns.
"""

import contextlib
import os
import statistics
import subprocess
import sys

import priors
import pytest
import torch
from priors import pair, text
from test_sampling import SEED, our_run, peer_run

from fastprior.serving.measure import seconds
from fastprior.serving.prior_sampler import PriorSampler

STEPS, TURNS = priors.steps(16), 5
CALLS = {"quiet": 12, "busy": 24}  # in a turn
GOALS = dict(slowdown=2.1, slowdown_p99=2.6)
PROVIDERS = "drop-in", "sampler-float32", "sampler-bfloat16"


@contextlib.contextmanager
def busy_cores():
    """Every core busy with a process of its own."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def percentile(samples: list[float], share: float) -> float:
    return float(torch.tensor(samples, dtype=torch.float64).quantile(share))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_beside_busy_processes(benchmark, record, device, request, provider):
    if device.type != "cpu":
        pytest.skip("about cores, on the CPU")
    quick = request.config.getoption("--quick")
    turns = 1 if quick else request.config.getoption("--rounds") or TURNS
    ours, peer = pair(device)
    if provider == "drop-in":

        def run():
            return our_run(ours, 1, 1.0, device, STEPS)
    else:
        dtype = getattr(torch, provider.removeprefix("sampler-"))
        built = PriorSampler(ours, batch_sizes=(1,), timesteps=STEPS, solver="ddim", dtype=dtype)

        def run():
            return built(**text(1, device), generator=torch.Generator().manual_seed(SEED))

    wanted = peer_run(peer, 1, 1.0, device, STEPS)
    assert torch.cosine_similarity(run(), wanted).min() > 0.999
    mine, theirs = {"quiet": [], "busy": []}, {"quiet": [], "busy": []}

    def turn():
        for state, calls in CALLS.items():
            with busy_cores() if state == "busy" else contextlib.nullcontext():
                theirs[state].append(seconds(lambda: peer_run(peer, 1, 1.0, device, STEPS), device))
                mine[state] += [seconds(run, device) for _ in range(2 if quick else calls)]

    benchmark.pedantic(turn, rounds=turns)
    details = dict(model="D2-small", batch=1, steps=STEPS)
    for name, samples, dtype in (("peer eager", theirs, "float32"), (provider, mine, provider.split("-")[-1])):
        quiet, p99 = statistics.median(samples["quiet"]), percentile(samples["quiet"], 0.99)
        busy = samples["busy"]
        figures = dict(slowdown=statistics.median(busy) / quiet, slowdown_p99=percentile(busy, 0.99) / p99)
        if name == provider:
            figures |= dict(ratio=statistics.median(theirs["busy"]) / statistics.median(busy), goals=GOALS)
            figures["quiet_ratio"] = statistics.median(theirs["quiet"]) / quiet
            benchmark.extra_info.update(figures)
        dtype = "float32" if dtype == "in" else dtype
        record("beside busy processes", name, busy, **details, dtype=dtype, quiet_s=quiet, quiet_p99_s=p99, **figures)
