"""Where the proof runs: on a GPU; on the CPU in Triton's interpreter, tiny; or there at full width, only to compile."""

import contextlib
import itertools
import os
from collections.abc import Iterator

import kernel_cache
import priors
import torch

from fastprior.engine import graphs
from fastprior.engine import steps as engine_steps
from fastprior.models import quality

REAL = torch.cuda.is_available() and not kernel_cache.filling()
DEVICE = torch.device("cuda" if REAL else "cpu")
INTERPRETED = not REAL and not kernel_cache.filling()  # takes seconds for each step

if INTERPRETED and os.environ.get("PROOF_DEVICE") == "cuda":
    raise RuntimeError("the GPU is gone: nothing that runs on the CPU proves anything of it")

if kernel_cache.filling():
    priors.fewer_layers()


def steps(count: int) -> int:
    """Of a run; to compile, all of them, since tables of as many rows go through kernels too."""
    return 2 if INTERPRETED else count


def scales(*all: float) -> tuple[float, ...]:
    """Of guidance."""
    return all[-1:] if INTERPRETED else all


@contextlib.contextmanager
def few_steps() -> Iterator[None]:
    """Where launches are only compiled, runs end after two steps, whose kernels are those of all."""
    plain = engine_steps.tqdm
    if kernel_cache.filling():
        engine_steps.tqdm = lambda steps, **_: itertools.islice(steps, 2)
    try:
        yield
    finally:
        engine_steps.tqdm = plain


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Elsewhere: "graphs" run what they captured, and weights of 8 bits are good whatever they give."""
    if REAL:
        yield
        return
    plain = graphs.capture, quality.judge
    graphs.capture = lambda run, device, pool: (run(), (run, pool, 0))[1]
    quality.judge = lambda *args: quality.Quality(1.0, 1.0)
    try:
        yield
    finally:
        graphs.capture, quality.judge = plain


def with_graphs(built):
    """A sampler or pipeline that takes graphs, which only CUDA has."""
    built.graphs = True
    return built
