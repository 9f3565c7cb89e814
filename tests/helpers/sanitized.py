"""A program for a process that has a sanitizer: the CPU kernels at every border of their shapes, and calls from a seed.

    LD_PRELOAD=libasan.so python -m helpers.sanitized address --march native --calls 300
    LD_PRELOAD=libtsan.so setarch -R python -m helpers.sanitized thread --seconds 300 --seed 1

It says that all was well, and does at last what the sanitizer must report: it reads beyond an array, or two threads
write to one.
"""

import argparse
import itertools
import math

import torch

from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.cpu import cache
from fastprior.kernels.cpu import calls as cpu_calls
from fastprior.kernels.cpu import library as cpu_library
from fastprior.kernels.cpu import linear as cpu_linear
from helpers.at_once import at_once
from helpers.c_calls import fuzz, report, team_of
from helpers.cpu_cases import (
    CONFIGS,
    DECODE_OPTIONS,
    FP32,
    HAS_TILES,
    OPTIONS,
    QUICK,
    SHAPES,
    built,
    check_decode,
    check_linear,
    make,
    make_blocks,
    make_decode,
    make_tokens,
    make_transformer,
    prior_step,
    random,
    step,
    threads,
)  # fmt: skip
from helpers.priors import make_prior, make_text

FLAGS = *(flag for flag in QUICK if not flag.startswith("-march")), "-O1", "-g", "-fno-sanitize-recover=all"
SANITIZERS = {"address": "address,undefined", "thread": "thread"}


def borders():
    """Shapes at every border."""
    options = itertools.cycle(("all-swiglu", "all-gelu"))
    for dtypes, rows, shape in itertools.product(("fp32", "bf16", "int8"), (1, 3, 6, 7, 17, 32, 64, 67), SHAPES[::2]):
        if rows <= cpu_library.most_rows(FP32):
            check_linear(make(rows, *shape, dtypes, OPTIONS[next(options)]))
    if HAS_TILES:
        check_linear(make(64, 70, 3500, "fp32", OPTIONS["all-swiglu"]))  # a sum in parts
    for kv_heads, options in itertools.product((1, 2, 4), DECODE_OPTIONS.values()):
        check_decode(make_decode(dim_head=7, kv_heads=kv_heads, seq=2, rows=4, **options | {"width": 6}))
    for transformer in make_transformer(**CONFIGS["odd"]), make_transformer(normformer=True):
        for samples, count in (1, 1), (5, 2):
            tokens = make_tokens(samples=samples, dim=transformer.norm.g.shape[0])
            with threads(count):
                step(transformer, *tokens)
    prior, text = make_prior(), make_text(2, 32)
    for crowded in 0, 1:  # threads of OpenMP, and of our own
        cpu_library.library().set_crowded(crowded)
        with threads(2):
            prior.sample(**text, timesteps=9, num_samples_per_batch=2, progress=False)
    for count in 2, 32:
        with threads(count):
            prior_step(make_blocks(heads=3, dim_head=7), *make_tokens(dim=21), outputs=2)


def of_several_callers(seed: int, **until):
    """Calls of two threads at once, each with a team of C's own: no sanitizer knows OpenMP's."""
    with team_of(2, True):
        founds = at_once(lambda number: fuzz(seed + number, threads=2, **until), range(2))
    for found in founds:
        print(report(found))


def read_beyond():
    """A weight is shorter than said."""
    cpu_calls.check_shapes = lambda *args: None
    cpu_linear.linear(LinearArgs(x=random(3, 64), weight=random(5, 7)))


def write_at_once():
    """Two calls have one result."""
    result, args = torch.empty(3, 300), LinearArgs(x=random(3, 64), weight=random(300, 64))
    cpu_linear._result = lambda args: result
    with team_of(2, True):
        at_once(lambda _: [cpu_linear.linear(args) for _ in range(200)], range(2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sanitizer", choices=SANITIZERS)
    parser.add_argument("--march", default="native")
    parser.add_argument("--calls", type=int)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    flags = *FLAGS, f"-fsanitize={SANITIZERS[given.sanitizer]}", f"-march={given.march}"
    until = dict(calls=given.calls, seconds=given.seconds)
    # kept, as the library is; the compiler does without the sanitizer itself
    with built(flags, FASTPRIOR_CACHE=cache.cache_dir() / "sanitized", LD_PRELOAD=""):
        assert cpu_library.unavailable() is None, cpu_library.unavailable()
        if given.sanitizer == "address":
            borders()
            print(report(fuzz(given.seed, **until)))
            print("every access was within bounds", flush=True)
            read_beyond()
        else:
            of_several_callers(given.seed, **until)
            print("no two threads met", flush=True)
            write_at_once()
