"""What a grid barrier costs: the phases of a step of D2-small in one launch, in one launch each, and with no waiting.

Every mode is first checked, with other vectors and poisoned results each time: what a launch before left in memory must
not pass for a result. On the CPU the kernels run in Triton's interpreter, on small shapes: that shows that this file
works, and is not recorded.
"""

import functools

import pytest
import torch
from timing import copy_bandwidth, input_sets, interleaved, median

from fastprior.kernels import reference

GOAL_US = 1.0  # a phase, exposed by the barrier over the time of reading the weights
# 12 layers of three phases, each a third of a layer's 8.4 M weights
PHASES, DIM = 36, 1664


def test_barrier(benchmark, record, device):
    pytest.importorskip("triton")
    from fastprior.kernels.gpu import barrier, launch

    if device.type == "cpu" and not launch.interpreted():
        pytest.skip("needs a CUDA device (or TRITON_INTERPRET=1, to try the benchmark itself)")
    if device.type == "cuda":
        phases, dim, dtype = PHASES, DIM, torch.bfloat16
        programs = torch.cuda.get_device_properties(device).multi_processor_count
        absent = () if torch.cuda.get_device_capability(device) >= (9, 0) else barrier.MODES_FROM_90
    else:
        phases, dim, dtype, programs, absent = 3, 48, torch.float16, 1, ("dependent launches",)

    def make(seed):
        draw = torch.Generator(device).manual_seed(seed)
        weights = torch.empty(phases, dim, dim, device=device, dtype=dtype).normal_(0, dim**-0.5, generator=draw)
        x = torch.randn(dim, device=device, generator=draw)
        return x, weights, torch.empty(phases, dim, device=device), torch.zeros((), dtype=torch.int32, device=device)

    def run(mode, given):
        # two programs a multiprocessor, where none waits for the other, keep memory busy
        barrier.matvec_chain_fwd(*given, programs * 2 if mode == "independent" else programs, mode)

    inputs = input_sets(make, phases * dim * dim * dtype.itemsize, device)
    runs = {mode: functools.partial(run, mode) for mode in barrier.MODES if mode not in absent}
    for mode, call in runs.items():
        for x, weights, out, arrived in inputs * 10:
            x.copy_(x.roll(1))
            out.fill_(torch.nan)
            call((x, weights, out, arrived))
            exact = reference.matvec_chain(x.double(), weights, chained=mode != "independent")
            error = (out - exact).norm(dim=1) / exact.norm(dim=1)
            # one row that came late is 1 in dim, so an error of dim**-0.5; rounding to fp32 in every phase is 1e-6
            assert (error < 1e-4).all(), f"{mode} is wrong: relative error of each phase {error.tolist()}"

    times = {}
    benchmark.pedantic(lambda: times.update(interleaved(runs, inputs, device)), rounds=1)
    us = {mode: [s * 1e6 / phases for s in samples] for mode, samples in times.items()}
    exposed = {mode: median(samples) - median(us["independent"]) for mode, samples in us.items()}
    benchmark.extra_info.update(exposed_us_per_phase=exposed, goal=GOAL_US)
    if device.type == "cpu":
        return
    bandwidth = copy_bandwidth(device)
    for mode, samples in us.items():
        share = dim * dim * dtype.itemsize / median(samples) * 1e6 / bandwidth
        print(f"{mode}: {median(samples):.2f} us a phase, {exposed[mode]:.2f} exposed, {share:.2f} of copy bandwidth")
        goal = dict(goal=GOAL_US) if mode.startswith("barrier") else {}
        record(
            "grid barrier", mode, samples, "us per phase", exposed_us=exposed[mode], share_of_copy=share, **goal,
            phases=phases, dim=dim, programs=programs, dtype=str(dtype)[6:],
        )  # fmt: skip
