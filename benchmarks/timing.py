"""Timing of single operations: inside a CUDA graph on a GPU, over input sets that do not fit its caches."""

import ctypes
import functools
import os
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastprior.kernels.cpu.library import FLAGS
from fastprior.serving.measure import read_bandwidth

CACHE_BYTES = 256 * 2**20  # more than any L2: each call finds its inputs in memory


def copy_bandwidth(device) -> float:
    """Bytes per second, read and written, of copying a tensor larger than the caches."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(op_seconds(lambda _: target.copy_(source), [None], device))


@functools.cache
def floor_bandwidth(device) -> float:
    """Bytes per second that floors are of: on a GPU of copying, which is timed without its launch."""
    return copy_bandwidth(device) if device.type == "cuda" else read_bandwidth(device)


@functools.cache
def cpu_peak() -> float:
    """FLOP/s of products and sums of fp32 in the registers of as many cores as PyTorch has threads, see peak.c."""
    source = Path(__file__).with_name("peak.c")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "peak.so"
        subprocess.run([*shlex.split(os.environ.get("CC") or "cc"), *FLAGS, str(source), "-o", str(made)], check=True)
        peak = ctypes.CDLL(str(made)).peak
    peak.restype, peak.argtypes = ctypes.c_double, [ctypes.c_long] * 3
    return peak(torch.get_num_threads(), 100, 500_000)  # a few ms each


def floor_share(samples: list[float], read: int, device) -> float:
    """What part of these seconds it takes to read so many bytes."""
    return read / floor_bandwidth(device) / median(samples)


def input_sets(make: Callable[[int], object], bytes_each: int, device) -> list:
    """As many input sets, made from seeds, as fill the caches; one on the CPU, where that is not attempted."""
    count = 1 if device.type == "cpu" else max(2, min(64, CACHE_BYTES // max(bytes_each, 1) + 1))
    return [make(seed) for seed in range(count)]


def op_seconds(run: Callable, inputs: list, device, repeats: int = 20) -> list[float]:
    """Seconds of one call of `run(inputs[i])`, several samples of an average over all input sets.

    On a GPU the calls are captured in a CUDA graph, so that the host's launches are not measured.
    """
    if device.type != "cuda":
        run(inputs[0])
        samples = []
        for _ in range(min(repeats, 5)):
            start = time.perf_counter()
            for given in inputs:
                run(given)
            samples.append((time.perf_counter() - start) / len(inputs))
        return samples
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            for given in inputs:
                run(given)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for given in inputs:
            run(given)
    graph.replay()
    samples = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3 / len(inputs))
    return samples


def interleaved(runs: dict[str, Callable], inputs: list, device, rounds: int = 3) -> dict[str, list[float]]:
    """`op_seconds` of several functions in turns, so that all see the same state of the machine."""
    samples = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name] += op_seconds(run, inputs, device)
    return samples


def median(samples: list[float]) -> float:
    return statistics.median(samples)
