"""Inputs of the CPU kernels, small models that reach them, and the checks of their results against fp64."""

import contextlib
import math
import multiprocessing
import platform

import pytest
import torch
from torch import nn

from fastprior.kernels import ops, reference
from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.cpu import attention as cpu_attention
from fastprior.kernels.cpu import blocks as cpu_blocks
from fastprior.kernels.cpu import library as cpu_library
from fastprior.kernels.cpu import linear as cpu_linear
from fastprior.models.dalle2.transformer import CausalTransformer
from fastprior.models.prior_transformer import cached_blocks
from fastprior.models.prior_transformer.blocks import Block

FP32, BF16 = torch.float32, torch.bfloat16
EPS = torch.finfo(FP32).eps
# int8 weights may meet x rounded to 16 bits of its largest number, here under 5 times its root mean square: an error
# of 5 / 32767 / sqrt(12) = 4.4e-5 of the product, which activations may double; a few results may cancel to a third.
# bf16 weights may meet 16 bits of each number of x: an error of 2**-17 / sqrt(3) = 4.4e-6 of the product; or 8 bits, of
# 2**-9 / sqrt(3) = 1.1e-3
FLOORS = {FP32: 32 * EPS, BF16: 3e-5, torch.int8: 3e-4}
ROUNDED_FLOOR = 3e-3
X86 = platform.machine() == "x86_64"
ON_X86 = pytest.mark.skipif(not X86, reason="instructions of x86")

QUICK = *(flag for flag in cpu_library.FLAGS if flag != "-O3"), "-O0"  # to compile

DOT, ROUNDED, OUTER, TILES = range(4)


def form(dtype, rows):
    """How a linear of so many rows of weights of a dtype is computed here."""
    return DOT if cpu_library.unavailable() else cpu_library.library().form(cpu_library.KINDS[dtype], rows)


HAS_TILES = form(FP32, 64) == TILES
NEEDS_KERNELS = pytest.mark.skipif(
    cpu_library.unavailable() is not None, reason=f"no CPU kernels: {cpu_library.unavailable()}"
)


@contextlib.contextmanager
def built(flags=None, **environment):
    """The kernels as a process finds them that has not asked for them yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_library, "_loaded", None)
        patch.setattr(cpu_library, "_most_rows", {})
        patch.setattr(cpu_library, "FLAGS", flags or cpu_library.FLAGS)
        for name, value in environment.items():
            patch.setenv(name, str(value))
        yield


@contextlib.contextmanager
def threads(count):
    """So many threads, as if there were cores for them."""
    before, library = torch.get_num_threads(), cpu_library.library()
    torch.set_num_threads(count)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "omp_get_num_procs", lambda: count, raising=False)
            yield
    finally:
        torch.set_num_threads(before)


def child(work) -> int | None:
    """The exit status of a forked process that works; None where it hangs."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(timeout=20)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def random(*shape, seed=0, dtype=FP32, scale=1.0):
    draw = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=draw) * scale).to(dtype)


def error(got, exact):
    """Root mean square of the difference over that of `exact`; infinite for NaN or another shape."""
    if got.shape != exact.shape:
        return math.inf
    found = (got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt().clamp(min=1e-30)
    return found.item() if found.isfinite() else math.inf


def check(got, exact, plain, floor=32 * EPS):
    """The error against fp64 is at most twice that of PyTorch in fp32, rounded once to the dtype of the result.

    The floor is 32 units in the last place of fp32: the order of a long sum alone moves more than one.
    """
    ours, theirs = error(got, exact), error(plain.to(got.dtype), exact)
    assert ours <= 2 * theirs + floor, f"error {ours:.2e}; plain PyTorch {theirs:.2e}, floor {floor:.2e}"


def cast(inputs, dtype):
    """Floating point inputs in another dtype."""
    return {
        name: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for name, t in inputs.items()
    }


# linears

# outputs, dim: tiny, odd, fewer columns than a tile, of whole vectors, longer than a short sum
SHAPES = [(1, 1), (3, 7), (5, 15), (23, 17), (25, 100), (97, 33), (24, 512), (50, 768), (13, 3072)]


OPTIONS = {
    "plain": (),
    "bias": ("bias",),
    "gain": ("norm_gain",),
    "norm": ("norm_gain", "norm_bias"),
    "gelu": ("gelu",),
    "swiglu": ("swiglu",),
    "residual": ("residual",),
    "beside": ("beside",),
    "stream": ("stream",),
    "all-gelu": ("beside", "bias", "norm_gain", "norm_bias", "stream", "gelu", "residual"),
    "all-swiglu": ("bias", "stream", "norm_gain", "norm_bias", "swiglu", "residual"),
}


# dtype of weights, of x, of everything else
DTYPES = {
    "fp32": (FP32, FP32, FP32),
    "bf16": (BF16, BF16, BF16),
    "bf16-beside-fp32": (BF16, BF16, FP32),
    "int8": (torch.int8, FP32, FP32),
    "int8-bf16": (torch.int8, BF16, BF16),
}


def make(rows, outputs, dim, dtypes="fp32", options=()):
    """The arguments of a linear; with "beside", 21 outputs stand beside."""
    of_weight, of_x, of_others = DTYPES[dtypes]
    activation = next((name for name in ("gelu", "swiglu") if name in options), None)
    outputs += outputs % 2 if activation == "swiglu" else 0
    both = outputs + 21 if "beside" in options else outputs
    inputs = dict(x=random(rows, dim, dtype=of_x), activation=activation)
    weight = random(both, dim, seed=1, scale=dim**-0.5)
    if of_weight == torch.int8:
        inputs["scale"] = weight.abs().amax(dim=1) / 127
        weight = (weight / inputs["scale"][:, None]).round()
    weight = weight.to(of_weight)
    inputs["weight"] = weight[:outputs].clone()
    inner = both // 2 if activation == "swiglu" else both
    shapes = dict(
        bias=(both,), norm_gain=(dim,), norm_bias=(dim,), stream=(rows, dim), stream_gain=(dim,), residual=(rows, inner)
    )
    for seed, (name, shape) in enumerate(shapes.items(), 2):
        if name.removesuffix("_gain") in options or name in options:
            inputs[name] = random(*shape, seed=seed, dtype=of_others)
    if "beside" in options:
        inputs["beside"] = weight[outputs:].clone()
    return inputs


def floor(dtype, rows):
    """The error of weights of a dtype and so many rows, see FLOORS."""
    return ROUNDED_FLOOR if form(dtype, rows) == ROUNDED else FLOORS[dtype]


def check_linear(inputs, run=None):
    got = run(**inputs) if run else cpu_linear.linear(LinearArgs(**inputs))
    rounded = reference.linear(LinearArgs(**inputs))
    exact, plain = (reference.linear(LinearArgs(**cast(inputs, dtype))) for dtype in (torch.float64, FP32))
    if "stream" in inputs:
        (got, total), (rounded, _) = got, rounded
        (exact, true_total), (plain, plain_total) = exact, plain
        assert total.dtype == FP32
        check(total, true_total, plain_total)
    assert got.dtype == rounded.dtype
    check(got, exact, plain, floor(inputs["weight"].dtype, inputs["x"].numel() // inputs["x"].shape[-1]))


# attention


def make_decode(
    rows=2, prompts=2, prefix=9, suffix=3, seq=3, heads=4, kv_heads=1, dim_head=16, dtype=FP32, width=None, bias=False,
    mask=False, cosine=False,
):  # fmt: skip
    k, v = random(rows, suffix, kv_heads, 2 * dim_head, dtype=dtype).chunk(2, dim=-1)
    prefix_k, prefix_v = random(2, prompts, prefix, kv_heads, dim_head, seed=1)
    given = dict(q=random(rows, seq, heads, dim_head, dtype=dtype), k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v)
    given |= dict(scale=4.0 if cosine else dim_head**-0.5, cosine=cosine, rotary=None, bias=None, mask=None)
    if width is not None:
        angle = random(suffix, width // 2, seed=2).repeat_interleave(2, dim=-1)
        given["rotary"] = angle.cos(), angle.sin() * torch.tensor([-1.0, 1.0]).repeat(width // 2)
    if bias:
        given["bias"] = random(suffix, heads, prefix + suffix, seed=3)
        given["bias"][0, 0, 1:] = -math.inf
        given["bias"][:, :, prefix // 2] = -math.inf
    if mask:
        given["mask"] = random(prompts, prefix, seed=4)
        given["mask"][0, 1:] = -10000.0
        given["mask"][-1] = -10000.0
    return given


def check_decode(given):
    got = cpu_attention.decode_attention(**given)
    assert got.dtype == given["q"].dtype
    results = []
    for dtype in (torch.float64, FP32):
        rotary = given["rotary"] and tuple(table.to(dtype) for table in given["rotary"])
        results.append(reference.decode_attention(**cast(given, dtype) | dict(rotary=rotary)))
    check(got, *results)


DECODE_OPTIONS = dict(
    rotary=dict(width=16), part=dict(width=6), still=dict(width=0), bias=dict(bias=True), mask=dict(mask=True),
    cosine=dict(cosine=True), all=dict(width=6, bias=True, mask=True, cosine=True),
)  # fmt: skip


# blocks


def make_transformer(dtype=FP32, **config):
    torch.manual_seed(0)
    transformer = CausalTransformer(**dict(dim=40, depth=3, dim_head=12, heads=3) | config).eval()
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.2 + (0.8 if weight.dim() == 1 else 0))
    return transformer.to(dtype)


def make_tokens(prompts=2, samples=2, prefix=6, suffix=3, dim=40):
    return random(prompts, prefix, dim, seed=5), random(prompts * samples, suffix, dim, seed=6)


def count_calls(monkeypatch):
    """How often each kernel of `cpu` runs from here on."""
    modules = dict(linear=cpu_linear, decode_attention=cpu_attention, run_blocks=cpu_blocks)
    counts = dict.fromkeys(modules, 0)
    for name, module in modules.items():
        run = getattr(module, name)

        def counted(*args, name=name, run=run, **kwargs):
            counts[name] += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return counts


@torch.no_grad()
def prefill(transformer, prefix, suffix=2):
    return transformer.prefill(prefix, suffix)


@torch.no_grad()
def step(transformer, prefix, suffix):
    return transformer.step(suffix, transformer.prefill(prefix, suffix.shape[1]))


def through_reference(run, *args):
    with ops.using("reference"):
        return run(*args)


CONFIGS = {
    "plain": {},
    "normformer": dict(normformer=True),
    "no-rotary": dict(rotary_emb=False),
    "dot-scale": dict(cosine_sim=False, dot_scale=0.3),
    "odd": dict(dim=33, dim_head=7, heads=5, ff_mult=1.5, rotary_emb=False, norm_in=True, final_proj=False),
    "wide": dict(dim=128, dim_head=64, heads=8, depth=1, normformer=True),
}


def make_blocks(depth=3, heads=4, dim_head=10, dtype=FP32):
    blocks = nn.ModuleList(Block(heads, dim_head, 0.0) for _ in range(depth)).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in blocks.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) * 0.2 + (0.8 if weight.dim() == 1 else 0))
    return blocks.to(dtype)


def mask_of(prompts=2, prefix=6):
    mask = torch.zeros(prompts, prefix)
    mask[1, 3:] = cached_blocks.HIDDEN
    mask[0, 0] = -2.0
    return mask


@torch.no_grad()
def prior_step(blocks, prefix, x, outputs=1):
    mask = mask_of(*prefix.shape[:2]).to(prefix.dtype)
    dtype = None if blocks[0].norm1.weight.dtype != BF16 else BF16
    return cached_blocks.step(blocks, x, cached_blocks.prefill(blocks, prefix, mask, dtype=dtype), outputs)


def prepare(transformer, heads=3, scale=1.0, **changes):
    """What `run_blocks` takes of a transformer, of which layer 0 has changes."""
    blocks = [ops.Block(*(None if t is None else t.detach() for t in block)) for block in transformer._blocks()]
    blocks[0] = blocks[0]._replace(**changes)
    how = dict(owner=transformer, scale=scale, cosine=True, activation="swiglu", eps=1e-5)
    return ops.prepare_blocks(blocks, heads=heads, kv_heads=1, dim_head=12, **how)


def block_arguments(suffix=3, **changes):
    """The arguments of `run_blocks` for two layers; changes: see `prepare`."""
    transformer, (prefix, x) = make_transformer(depth=2, normformer=True), make_tokens(suffix=suffix)
    with torch.no_grad():
        cache = transformer.prefill(prefix, suffix)
    given = dict(outputs=1, rotary=cache.rotary, bias=cache.bias)
    return dict(x=x, blocks=prepare(transformer, **changes), prefix_k=cache.k, prefix_v=cache.v, **given)
