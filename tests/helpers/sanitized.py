"""A program for a process that has the address sanitizer: the CPU kernels, at every border of their shapes.

    LD_PRELOAD=libasan.so python -m helpers.sanitized MARCH

It says that every access was within bounds, and reads at last beyond them, which the sanitizer reports.
"""

import itertools
import sys

from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.cpu import calls as cpu_calls
from fastprior.kernels.cpu import library as cpu_library
from fastprior.kernels.cpu import linear as cpu_linear
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

FLAGS = *(flag for flag in QUICK if not flag.startswith("-march")), "-O1", "-g", "-fsanitize=address,undefined"


def sanitized():
    """Shapes at every border, and at last a weight that is shorter than said."""
    assert cpu_library.unavailable() is None, cpu_library.unavailable()
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
    print("every access was within bounds", flush=True)
    cpu_calls.check_shapes = lambda *args: None
    cpu_linear.linear(LinearArgs(x=random(3, 64), weight=random(5, 7)))


if __name__ == "__main__":
    flags = *FLAGS, "-fno-sanitize-recover=all", "-march=" + sys.argv[1]
    # kept, as the library is; the compiler does without the sanitizer itself
    with built(flags, FASTPRIOR_CACHE=cpu_library.cache_dir() / "sanitized", LD_PRELOAD=""):
        sanitized()
