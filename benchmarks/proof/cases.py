"""Calls of the launchers, with meta tensors, that reach every launch configuration: what `resources` compiles.

Each configuration is reached with all options, the heaviest, in fp32 and bf16; for one architecture with none as well,
and in fp16, whose configurations are those of bf16. Those of launches of up to 16 rows are as many as there are shapes:
of them the cases reach what runs of the measured priors launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from meta_runs import DEPTHS, meta, meta_run

from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.gpu import attention, barrier, decode, launch, linear, norm, skinny_linear, step
from fastprior.kernels.gpu.launch import FLOATS
from fastprior.kernels.gpu.run import Run
from fastprior.kernels.reference import NormArgs, StepArgs

Case = Callable[[], object]
WHOLE = 90  # the architecture with every dtype, and without options too


def cases(arch: int) -> Iterator[Case]:
    dtypes = FLOATS if arch == WHOLE else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        bare = arch == WHOLE and dtype != torch.float16
        for everything in (True, False) if bare else (True,):
            yield from norm_cases(dtype, everything)
            yield from step_cases(dtype, everything)
            yield from linear_cases(dtype, everything)
            yield from decode_cases(dtype, everything)
        yield from attention_cases(dtype, bare)
    yield from quantised_cases(arch)
    yield from run_cases(arch)
    yield from barrier_cases(arch)
    yield from decode_cases(torch.bfloat16, True, cached=torch.float32)
    if arch == WHOLE:
        yield from decode_cases(torch.float32, True, cached=torch.bfloat16)  # laid out as over a cache of fp32


def norm_cases(dtype: torch.dtype, everything: bool) -> Iterator[Case]:
    for dim in (256, 512, 768, 2048, 4096):
        x, gain = meta(64, dim, dtype=dtype), meta(dim)
        flags = dict(eps=1e-5, stable=everything, rms=False, l2=everything)
        extra = (gain, x, x) if everything else (None, None, None)
        yield partial(norm.layer_norm_fwd, NormArgs(x, gain, *extra, **flags, dtype=dtype))
        needs = dict(need_dx=True, need_dgain=True, need_dbias=everything)
        bias, dtotal = (gain, x) if everything else (None, None)
        yield partial(norm.layer_norm_bwd, NormArgs(x, gain, bias, **flags), x, dtotal, **needs)


def step_cases(dtype: torch.dtype, everything: bool) -> Iterator[Case]:
    table, index, scale = meta(64, 6), meta(dtype=torch.int64), meta()
    for dim in (256, 512, 768, 2048, 4096):
        x, pred = meta(64, dim), meta(64, dim, dtype=dtype)
        end = (None, table, index, "l2", 1.0, pred, index) if everything else (x, table, index, None, 1.0, None, None)
        yield partial(step.diffusion_step_fwd, StepArgs(x, pred, None, scale, x, *end))


def linear_cases(dtype: torch.dtype, everything: bool, stored: torch.dtype | None = None) -> Iterator[Case]:
    for rows in (16, 32, 64):
        skinny = skinny_linear.takes(rows, dtype)
        for outputs in (768,) if skinny else (768, 6144):  # split and not
            x, weight = meta(rows, 768, dtype=dtype), meta(outputs, 768, dtype=stored or dtype)
            if not everything:
                yield partial(linear.linear_fwd, LinearArgs(x, weight))
                continue
            gain = meta(768, dtype=dtype)
            normed = dict(stream=meta(rows, 768), stream_gain=gain, norm_gain=gain, norm_bias=gain)
            normed = normed if rows <= linear.MAX_NORM_ROWS else {}
            for activation, beside in (("swiglu", None),) if skinny else (("gelu", weight), ("swiglu", None)):
                args = LinearArgs(x, weight, beside=beside, activation=activation, **normed)
                scale = meta(args.outputs) if stored else None
                vectors = dict(bias=meta(args.outputs, dtype=dtype), scale=scale)
                residual = meta(rows, args.columns, dtype=dtype)
                yield partial(linear.linear_fwd, args._replace(**vectors, residual=residual))
            if rows <= linear.MAX_NORM_ROWS and not skinny and stored is None:  # a stream of fp32
                args = LinearArgs(meta(rows, 768), weight, norm_gain=gain, dtype=dtype)
                yield partial(linear.linear_fwd, args)


def quantised_cases(arch: int) -> Iterator[Case]:
    for stored in stored_on(arch):
        yield from linear_cases(torch.bfloat16, True, stored)


def stored_on(arch: int) -> list[torch.dtype]:
    """Dtypes of weights of 8 bits: chips before 8.9 do not convert float8."""
    return [stored for stored in linear.QUANTISED if arch >= 89 or stored == torch.int8]


def run_cases(arch: int) -> Iterator[Case]:
    """Steps of runs, from 9.0 on as dependent launches."""
    brain, half = torch.bfloat16, torch.float16
    runs = [meta_run(model, brain, depth=2) for model in DEPTHS]  # the last layer is of fewer tokens
    runs.append(meta_run("D2-small", brain, depth=2, prompts=2))
    runs += [meta_run("D2-small", brain, depth=1, stored=stored) for stored in stored_on(arch)]
    if arch == WHOLE:
        runs.append(meta_run("D2-small", half, depth=1))
    for run in runs:
        yield partial(run_case, run, arch)


def run_case(run: Run, arch: int) -> None:
    with mock.patch.object(launch, "can_depend", lambda device: arch >= 90):
        run.advance(1)


def decode_cases(dtype: torch.dtype, everything: bool, cached: torch.dtype | None = None) -> Iterator[Case]:
    heads, suffix = 12, 3
    # heads that are not aligned have tiles of their own: all in fp32, those beyond 64 in 16 bits
    for dim_head in (20, 32, 52, 64, 100, 128) if torch.float32 in (dtype, cached) else (32, 64, 100, 128):
        for rows, prefix in ((1, 256), (1, 512)):  # whole and split
            q = meta(rows, suffix, heads, dim_head, dtype=dtype)
            k, v = meta(2, rows, suffix, 1, dim_head, dtype=dtype)
            prefix_k, prefix_v = meta(2, rows, prefix, 1, dim_head, dtype=cached or dtype)
            options = (None,) * 4
            if everything:
                options = *meta(2, suffix, dim_head), meta(suffix, heads, prefix + suffix), meta(rows, prefix)
            yield partial(decode.decode_attention_fwd, q, k, v, prefix_k, prefix_v, *options, 0.125, everything)


def barrier_cases(arch: int) -> Iterator[Case]:
    x, out, arrived = meta(1664), meta(3, 1664), meta(dtype=torch.int32)
    weights = meta(3, 1664, 1664, dtype=torch.bfloat16)
    for mode in barrier.MODES:
        if arch >= 90 or mode not in barrier.MODES_FROM_90:
            programs = 264 if mode == "independent" else 132
            yield partial(barrier.matvec_chain_fwd, x, weights, out, arrived, programs, mode)


def attention_cases(dtype: torch.dtype, bare: bool) -> Iterator[Case]:
    everything = dict(prepared=True, relative=True, dropout=0.1)
    yield partial(attention_case, dtype, 100, **everything)  # not aligned
    for dim_head in (52, 64, 128):
        yield partial(attention_case, dtype, dim_head, **everything)
        yield partial(attention_case, dtype, dim_head, prepared=True)
        if bare:
            yield partial(attention_case, dtype, dim_head)
    if bare and dtype == torch.bfloat16:
        yield partial(attention_case, dtype, 64, prepared=True, dense=True, dropout=0.1, causal_fill=-1e4)
        yield partial(attention_case, dtype, 64, dense=True)
        yield partial(attention_case, dtype, 64, causal_fill=-1e4)


def attention_case(
    dtype: torch.dtype,
    dim_head: int,
    *,
    prepared: bool = False,
    relative: bool = False,
    dense: bool = False,
    dropout: float = 0.0,
    causal_fill: float = -math.inf,
) -> None:
    """Forward and backward; `prepared` is rotary, cosine, a null key, a mask, causal, and one head of keys for all."""
    batch, keys, heads = 16, 256, 16
    kv_heads, columns = (1, keys + 1) if prepared else (heads, keys)
    q, k, v = (meta(batch, keys, h, dim_head, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    null_kv = cos = sin = bias = buckets = mask = seed = None
    if prepared:
        null_kv, cos, sin = meta(2, kv_heads, dim_head, dtype=dtype), *meta(2, keys, 32)
        mask = meta(batch, keys, dtype=torch.float32 if dense else torch.bool)
    if relative:
        bias, buckets = meta(32, heads), meta(keys, dtype=torch.int64)
    if dense:
        bias = meta(keys, heads, columns, dtype=dtype)
    if dropout:
        seed = meta(dtype=torch.int64)
    causal = prepared or causal_fill > -math.inf
    numbers = dim_head**-0.5, prepared, causal, causal_fill, dropout
    args = attention.AttentionArgs(q, k, v, null_kv, cos, sin, bias, buckets, mask, seed, *numbers)
    out, stats = attention.attention_fwd(args)
    attention.attention_bwd(args, out, out, stats, relative or dense)
