"""The CPU kernels: results against the reference in fp64, what reaches them, how they are compiled, their memory."""

import contextlib
import copy
import itertools
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastprior import layers, prior_blocks
from fastprior.kernels import cpu, ops, reference

FP32, BF16 = torch.float32, torch.bfloat16
EPS = torch.finfo(FP32).eps
# int8 weights may meet x rounded to 16 bits of its largest number, here under 5 times its root mean square: an error
# of 5 / 32767 / sqrt(12) = 4.4e-5 of the product, which activations may double; a few results may cancel to a third
FLOORS = {FP32: 32 * EPS, BF16: 32 * EPS, torch.int8: 3e-4}
HASWELL = tuple("-march=haswell" if flag == "-march=native" else flag for flag in cpu.FLAGS)
QUICK = *(flag for flag in cpu.FLAGS if flag != "-O3"), "-O0"  # to compile
X86 = platform.machine() == "x86_64"
ON_X86 = pytest.mark.skipif(not X86, reason="instructions of x86")

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no CPU kernels: {cpu.unavailable()}")


@contextlib.contextmanager
def built(flags=None, **environment):
    """The kernels as a process finds them that has not asked for them yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_loaded", None)
        patch.setattr(cpu, "_most_rows", {})
        patch.setattr(cpu, "FLAGS", flags or cpu.FLAGS)
        for name, value in environment.items():
            patch.setenv(name, str(value))
        yield


@pytest.fixture(scope="session")
def haswell(tmp_path_factory):
    with built(HASWELL, FASTPRIOR_CACHE=tmp_path_factory.mktemp("haswell")):
        assert cpu.unavailable() is None and cpu.most_rows(FP32) == 16
        return cpu._loaded, cpu._most_rows


@pytest.fixture(params=["native", pytest.param("haswell", marks=ON_X86)])
def build(request, monkeypatch):
    """Both instruction sets of x86, where this machine has them."""
    if request.param == "haswell":
        loaded, most_rows = request.getfixturevalue("haswell")
        monkeypatch.setattr(cpu, "_loaded", loaded)
        monkeypatch.setattr(cpu, "_most_rows", most_rows)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
ROWS = [1, 2, 3, 4, 6, 7, 8, 9, 15, 16, 17, 31, 32]  # around where the forms change
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


def check_linear(inputs, run=None):
    got, rounded = (run or cpu.linear)(**inputs), reference.linear(**inputs)
    exact, plain = (reference.linear(**cast(inputs, dtype)) for dtype in (torch.float64, FP32))
    if "stream" in inputs:
        (got, total), (rounded, _) = got, rounded
        (exact, true_total), (plain, plain_total) = exact, plain
        assert total.dtype == FP32
        check(total, true_total, plain_total)
    assert got.dtype == rounded.dtype
    check(got, exact, plain, FLOORS[inputs["weight"].dtype])


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)
def test_linear_of_every_shape(build, shape, dtypes):
    for rows in ROWS:
        if rows <= cpu.most_rows(FP32):
            check_linear(make(rows, *shape, dtypes, ("bias",)))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_linear_with_every_option(build, options, dtypes):
    for (rows, shape), count in zip(itertools.product((2, 5, 10, 16), ((23, 77), (50, 300))), itertools.cycle((1, 3))):
        inputs = make(rows, *shape, dtypes, OPTIONS[options])
        if dtypes == "bf16-beside-fp32" and "bias" in inputs:  # PyTorch's linear takes one dtype
            inputs["bias"] = inputs["bias"].bfloat16()
        with threads(count):
            check_linear(inputs)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 6])
@pytest.mark.parametrize("options", [("norm_gain",), OPTIONS["all-swiglu"]], ids=["norm", "all"])
def test_bf16_weights_under_a_stream_of_fp32(build, options, rows):
    """What was normalised is not rounded in between: the result in fp32 is exact as that of fp32 weights is."""
    inputs = make(rows, 40, 300, "fp32", options)
    inputs["weight"] = inputs["weight"].bfloat16()
    got, exact, plain = cpu.linear(**inputs, dtype=FP32), *(
        reference.linear(**cast(inputs, dtype)) for dtype in (torch.float64, FP32)
    )  # fmt: skip
    if "stream" in options:
        got, exact, plain = got[0], exact[0], plain[0]
    assert got.dtype == FP32
    check(got, exact, plain)


def test_the_comparison_rejects():
    inputs = make(5, 50, 300)
    got, exact, plain = cpu.linear(**inputs), *(reference.linear(**cast(inputs, d)) for d in (torch.float64, FP32))
    check(got, exact, plain)
    one_wrong, nan, swapped = got.clone(), got.clone(), got.clone()
    one_wrong[4, 49] += 0.1
    nan[0, 0] = math.nan
    swapped[:, 48:] = got[:, 48:].flip(1)
    for wrong in (torch.zeros_like(got), -got, one_wrong, nan, swapped, got[:4], got * (1 + 1e-4)):
        with pytest.raises(AssertionError):
            check(wrong, exact, plain)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 3, 5, 9, 16])
def test_strides(build, rows, dtypes):
    """Rows of a wider weight are read in place; x and the rest may lie as they like. NaN stands between."""
    inputs = make(rows, 50, 100, dtypes, OPTIONS["all-swiglu"])
    expected = cpu.linear(**inputs)
    views = {}
    for name, t in inputs.items():
        views[name] = t
        if isinstance(t, torch.Tensor):
            big = torch.full([n * 2 + 3 for n in t.shape], 77 if t.dtype == torch.int8 else math.nan, dtype=t.dtype)
            step = 1 if name == "weight" else 2
            views[name] = big[tuple(slice(1, 1 + step * n, step) for n in t.shape)].copy_(t)
    torch.testing.assert_close(cpu.linear(**views), expected, rtol=0, atol=0)
    three = {name: inputs[name].view(rows, 1, -1) for name in ("x", "stream", "residual")}
    for got, wanted in zip(cpu.linear(**inputs | three), expected):
        assert torch.equal(got, wanted.view(rows, 1, -1))
    if rows == 1:
        one = {name: inputs[name][0] for name in ("x", "stream", "residual")}
        for got, wanted in zip(cpu.linear(**inputs | one), expected):
            assert torch.equal(got, wanted[0])


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 3, 5, 9, 16])
def test_bits_are_those_of_the_inputs(build, rows, dtypes):
    """Not of the number of threads, be they more than columns, nor of what memory held before."""
    for outputs, dim in (1, 100), (7, 33), (97, 700):
        inputs = make(rows, outputs, dim, dtypes, OPTIONS["all-swiglu"])
        expected = cpu.linear(**inputs)
        for count in (1, 2, 3, 7):
            freed = [
                torch.full((size,), math.nan) for size in (100, 1000, 10000, 20000, 50000, 100000) for _ in range(3)
            ]
            del freed
            with threads(count):
                torch.testing.assert_close(cpu.linear(**inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [2, 3, 6, 7, 16])
def test_rows_do_not_meet(build, rows, dtypes):
    inputs = make(rows, 50, 300, dtypes, ("norm_gain", "bias"))
    expected = cpu.linear(**inputs)
    for row in range(rows):
        alone = cpu.linear(**inputs | dict(x=inputs["x"][row : row + 1]))
        floor = FLOORS[inputs["weight"].dtype] if expected.dtype == FP32 else torch.finfo(BF16).eps
        assert error(alone[0], expected[row].double()) <= floor
        x = torch.full_like(inputs["x"], math.nan)
        x[row] = inputs["x"][row]
        assert torch.equal(cpu.linear(**inputs | dict(x=x))[row], expected[row])


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [3, 6, 9, 16])
def test_nan_and_infinity_stay_in_their_rows_and_columns(build, rows, dtypes):
    inputs = make(rows, 50, 100, dtypes)
    expected = cpu.linear(**inputs)
    inputs["x"][1, 99], inputs["x"][2, 3] = math.nan, -math.inf
    got = cpu.linear(**inputs)
    assert got[1].isnan().all() and not got[2].isfinite().any() and torch.equal(got[0], expected[0])
    assert got[3:].isfinite().all()
    inputs = make(rows, 50, 100, dtypes)
    values = inputs["scale"] if dtypes == "int8" else inputs["weight"][:, 99]
    values[7], values[48] = math.nan, math.inf
    got = cpu.linear(**inputs)
    others = [n for n in range(50) if n not in (7, 48)]
    assert got[:, 7].isnan().all() and got[:, 48].isinf().all() and torch.equal(got[:, others], expected[:, others])


@pytest.mark.parametrize("rows", [1, 3, 9, 16])
def test_activations_saturate(build, rows):
    """Each result within some units in the last place; the error of gelu is one of erf, times x."""
    values = torch.tensor([0, 1e-30, 1e-3, 0.5, 1, 3, 5, 6, 10, 20, 87, 88, 89, 104, 1e3, 1e4])
    values = torch.cat((values, -values)).expand(rows, -1)
    eye, exact = torch.eye(32), values.double()
    got = cpu.linear(values, eye, activation="gelu")
    assert ((got - nn.functional.gelu(exact)).abs() <= 3e-7 * exact.abs()).all()
    bias = torch.cat((torch.ones(32), torch.zeros(32)))
    got = cpu.linear(values, torch.cat((torch.zeros(32, 32), eye)), bias, activation="swiglu")
    wanted = nn.functional.silu(exact)
    assert ((got - wanted).abs() <= 1e-6 * wanted.abs() + 1e-30).all()


def test_offset_rows(build):
    """A mean far from zero: the variance is centred, not a difference of squares."""
    inputs = make(3, 24, 300, options=("norm_gain", "norm_bias"))
    inputs["x"] += 1000
    check_linear(inputs)


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
    got = cpu.decode_attention(**given)
    assert got.dtype == given["q"].dtype
    results = []
    for dtype in (torch.float64, FP32):
        rotary = given["rotary"] and tuple(table.to(dtype) for table in given["rotary"])
        results.append(reference.decode_attention(**cast(given, dtype) | dict(rotary=rotary)))
    check(got, *results)


@pytest.mark.parametrize("dim_head", [7, 16, 64, 256])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_decode_shapes(build, dim_head, kv_heads, dtype):
    for seq, samples, prefix in (1, 1, 1), (2, 3, 9), (5, 1, 80), (5, 2, 77):
        given = dict(rows=2 * samples, suffix=5, seq=seq, prefix=prefix, dim_head=dim_head, kv_heads=kv_heads)
        check_decode(make_decode(**given, dtype=dtype))


DECODE_OPTIONS = dict(
    rotary=dict(width=16), part=dict(width=6), still=dict(width=0), bias=dict(bias=True), mask=dict(mask=True),
    cosine=dict(cosine=True), all=dict(width=6, bias=True, mask=True, cosine=True),
)  # fmt: skip


@pytest.mark.parametrize("options", DECODE_OPTIONS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_decode_options(build, options, kv_heads):
    for (seq, samples), count in zip(((1, 1), (2, 3), (3, 2), (3, 20)), (1, 3, 1, 7)):
        with threads(count):
            check_decode(make_decode(rows=2 * samples, seq=seq, kv_heads=kv_heads, **DECODE_OPTIONS[options]))


def test_decode_comparison_rejects():
    given = make_decode(bias=True)
    got, exact = cpu.decode_attention(**given), reference.decode_attention(**cast(given, torch.float64))
    plain = reference.decode_attention(**given)
    other = cpu.decode_attention(**given | dict(scale=given["scale"] * 1.01))
    for wrong in (torch.zeros_like(got), -got, got.roll(1, -1), other):
        with pytest.raises(AssertionError):
            check(wrong, exact, plain)


def test_decode_strides(build):
    given = make_decode(prompts=2, prefix=9, kv_heads=2, suffix=5, seq=5)
    expected = cpu.decode_attention(**given)
    by_head = {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("prefix_k", "prefix_v")}
    by_dim = {name: given[name].transpose(1, 3).contiguous().transpose(1, 3) for name in ("q", "k", "v", *by_head)}
    mixed = dict(k=given["k"].contiguous(), v=by_dim["v"], prefix_k=by_head["prefix_k"])
    for change in by_head, by_dim, mixed:
        assert torch.equal(cpu.decode_attention(**given | change), expected)
    last = cpu.decode_attention(**given | dict(q=given["q"][:, -2:]))
    assert error(last, expected[:, -2:].double()) <= 32 * EPS


def test_a_query_that_sees_nothing_is_nan(build):
    given = make_decode(bias=True)
    given["bias"][1] = -math.inf
    got = cpu.decode_attention(**given)
    assert got[:, 1].isnan().all() and got[:, [0, 2]].isfinite().all()
    given["q"][0, 2, 3, 0] = math.nan
    got = cpu.decode_attention(**given).unflatten(-1, (4, 16))
    assert got[0, 2, 3].isnan().all() and got[0, 2, :3].isfinite().all() and got[1, 2].isfinite().all()


def test_decode_does_not_overflow(build):
    """Logits of ±1e4 give the one key that has the most."""
    given = make_decode(bias=True) | dict(scale=1e4)
    check_decode(given)


# blocks


def make_transformer(dtype=FP32, **config):
    torch.manual_seed(0)
    transformer = layers.CausalTransformer(**dict(dim=40, depth=3, dim_head=12, heads=3) | config).eval()
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.2 + (0.8 if weight.dim() == 1 else 0))
    return transformer.to(dtype)


def make_tokens(prompts=2, samples=2, prefix=6, suffix=3, dim=40):
    return random(prompts, prefix, dim, seed=5), random(prompts * samples, suffix, dim, seed=6)


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel of `cpu` ran."""
    counts = dict(linear=0, decode_attention=0, run_blocks=0)
    for name in counts:
        run = getattr(cpu, name)

        def counted(*args, name=name, run=run, **kwargs):
            counts[name] += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(cpu, name, counted)
    monkeypatch.setattr(ops, "run_blocks", cpu.run_blocks)
    return counts


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


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_blocks_of_the_causal_transformer(build, calls, config, dtype):
    transformer = make_transformer(dtype, **CONFIGS[config])
    exact = copy.deepcopy(transformer).double()
    for suffix in (1, 3):
        for samples in range(1, cpu.most_rows(dtype) // (2 * suffix) + 1):
            prefix, x = make_tokens(samples=samples, suffix=suffix, dim=transformer.norm.g.shape[0])
            before = dict(calls)
            got = step(transformer, prefix, x)
            assert calls["run_blocks"] == before["run_blocks"] + 1
            true, plain = through_reference(step, exact, prefix.double(), x.double()), through_reference(
                step, transformer, prefix, x
            )  # fmt: skip
            assert got.dtype == plain.dtype
            floor = 32 * EPS if got.dtype == FP32 else 4 * torch.finfo(BF16).eps
            check(got, true, plain, floor)


def make_blocks(depth=3, heads=4, dim_head=10, dtype=FP32):
    blocks = nn.ModuleList(prior_blocks.Block(heads, dim_head, 0.0) for _ in range(depth)).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in blocks.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) * 0.2 + (0.8 if weight.dim() == 1 else 0))
    return blocks.to(dtype)


def mask_of(prompts=2, prefix=6):
    mask = torch.zeros(prompts, prefix)
    mask[1, 3:] = prior_blocks.HIDDEN
    mask[0, 0] = -2.0
    return mask


@torch.no_grad()
def prior_step(blocks, prefix, x, outputs=1):
    mask = mask_of(*prefix.shape[:2]).to(prefix.dtype)
    dtype = None if blocks[0].norm1.weight.dtype != BF16 else BF16
    return prior_blocks.step(blocks, x, prior_blocks.prefill(blocks, prefix, mask, dtype=dtype), outputs, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("config", [dict(), dict(heads=2, dim_head=7), dict(heads=3, dim_head=64, depth=1)], ids=str)
def test_blocks_of_the_prior_transformer(build, calls, config, dtype):
    blocks = make_blocks(**config, dtype=dtype)
    dim, exact = blocks[0].norm1.weight.shape[0], copy.deepcopy(blocks).double()
    for suffix, outputs in (1, 1), (3, 1), (3, 2), (3, 3):
        for samples in range(1, cpu.most_rows(dtype) // (2 * suffix) + 1):
            prefix, x = make_tokens(samples=samples, suffix=suffix, dim=dim)
            before = calls["run_blocks"]
            got = prior_step(blocks, prefix, x, outputs)
            assert calls["run_blocks"] == before + 1 and got.shape == (len(x), outputs, dim)
            true = through_reference(prior_step, exact, prefix.double(), x.double(), outputs)
            check(got, true, through_reference(prior_step, blocks, prefix, x, outputs))


@pytest.mark.parametrize("samples", [1, 2, 3, 5])
def test_blocks_are_the_same_with_any_threads(samples):
    """A last layer of fewer rows may take the other form, which wants room for each thread."""
    transformer, (prefix, x) = make_transformer(normformer=True), make_tokens(samples=samples)
    expected = step(transformer, prefix, x)
    for count in (2, 3, 7, 32):
        with threads(count):
            assert torch.equal(step(transformer, prefix, x), expected)


def test_blocks_comparison_rejects():
    """A layer that is missing, or tokens in another order, are seen."""
    transformer, (prefix, x) = make_transformer(), make_tokens()
    got, plain = step(transformer, prefix, x), through_reference(step, transformer, prefix, x)
    exact = through_reference(step, copy.deepcopy(transformer).double(), prefix.double(), x.double())
    shorter = copy.deepcopy(transformer)
    del shorter.layers[1]
    for wrong in (-got, got.flip(0), step(transformer, prefix, x.flip(1)), step(shorter, prefix, x)):
        with pytest.raises(AssertionError):
            check(wrong, exact, plain)


class Adapter(layers.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def hook(transformer):
    transformer.layers[1][0].to_kv.register_forward_hook(lambda module, args, y: y * 2)


def hook_attention_output(transformer):
    transformer.layers[1][0].to_out.register_forward_hook(lambda module, args, y: y * 2)


def hook_feed_forward(transformer):
    transformer.layers[1][1].register_forward_pre_hook(lambda module, args: (args[0] * 0,))


def adapt(transformer):
    transformer.layers[2][1][5].__class__ = Adapter


def other_eps(transformer):
    transformer.layers[0][1][0].eps = 1.0


@pytest.mark.parametrize(
    "change", [hook, hook_attention_output, hook_feed_forward, adapt, other_eps], ids=lambda change: change.__name__
)
def test_what_is_not_plain_is_called(calls, change):
    transformer, (prefix, x) = make_transformer(), make_tokens()
    before = step(transformer, prefix, x)
    change(transformer)
    calls["run_blocks"] = 0
    got = step(transformer, prefix, x)
    assert calls["run_blocks"] == 0 and relative_error(got, before) > 1e-3
    assert relative_error(got, through_reference(step, transformer, prefix, x)) < 1e-5


class Lora(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def replace_linear(blocks):
    blocks[1].attn1.to_v.__class__ = Lora


def replace_eps(blocks):
    blocks[2].norm3.eps = 1.0


@pytest.mark.parametrize("change", [replace_linear, replace_eps], ids=lambda change: change.__name__)
def test_what_is_not_plain_in_a_prior_transformer_is_called(calls, change):
    blocks, (prefix, x) = make_blocks(), make_tokens()
    before = prior_step(blocks, prefix, x)
    change(blocks)
    calls["run_blocks"] = 0
    got = prior_step(blocks, prefix, x)
    assert calls["run_blocks"] == 0 and relative_error(got, before) > 1e-3
    assert relative_error(got, through_reference(prior_step, blocks, prefix, x)) < 1e-5


# what reaches the kernels


def run_linear(**changes):
    inputs = make(3, 40, 52, options=("norm_gain", "bias")) | changes
    return ops.linear(**inputs)


def run_decode(**changes):
    return ops.decode_attention(**make_decode() | changes)


def run_step(dtype=FP32, samples=2, grad=False, training=False):
    transformer, (prefix, x) = make_transformer().to(dtype).train(training), make_tokens(samples=samples)
    with torch.set_grad_enabled(grad):
        return transformer.step(x.to(dtype), transformer.prefill(prefix.to(dtype), 3))


INT8 = random(5, 8).to(torch.int8)
LEFT = {  # to PyTorch: which kernel, and a call
    "fp64": ("linear", lambda: ops.linear(random(3, 8).double(), random(5, 8).double())),
    "fp16": ("linear", lambda: ops.linear(random(3, 8).half(), random(5, 8).half())),
    "fp64-residual": ("linear", lambda: ops.linear(random(3, 8), random(5, 8), residual=random(3, 5).double())),
    "many-rows": ("linear", lambda: run_linear(x=random(33, 52))),
    "no-rows": ("linear", lambda: run_linear(x=random(0, 52))),
    "gradient-of-x": ("linear", lambda: run_linear(x=random(3, 52).requires_grad_())),
    "gradient-of-bias": ("linear", lambda: run_linear(bias=random(40).requires_grad_())),
    "gradient-of-beside": ("linear", lambda: run_linear(bias=None, beside=random(40, 52).requires_grad_())),
    "gradient-of-norm-bias": ("linear", lambda: run_linear(norm_bias=random(52).requires_grad_())),
    "transposed-weight": ("linear", lambda: run_linear(weight=random(52, 40).t())),
    "transposed-beside": ("linear", lambda: run_linear(bias=None, beside=random(52, 40).t())),
    "int8-of-fp16": ("linear", lambda: ops.linear(random(3, 8).half(), INT8, scale=random(5))),
    "gradient-of-q": ("decode_attention", lambda: run_decode(q=random(2, 3, 4, 16).requires_grad_())),
    "gradient-of-mask": ("decode_attention", lambda: run_decode(mask=random(2, 9).requires_grad_())),
    "dropout": ("decode_attention", lambda: run_decode(dropout=0.5)),
    "wide-heads": ("decode_attention", lambda: ops.decode_attention(**make_decode(dim_head=257))),
    "many-own-keys": ("decode_attention", lambda: ops.decode_attention(**make_decode(suffix=1025, seq=1, dim_head=64))),
    "gradient-of-a-step": ("run_blocks", lambda: run_step(grad=True)),
    "step-in-training": ("run_blocks", lambda: run_step(training=True)),
    "step-of-many-rows": ("run_blocks", lambda: run_step(samples=6)),
    "step-in-fp64": ("run_blocks", lambda: run_step(torch.float64)),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_pytorch(calls, case):
    kernel, call = LEFT[case]
    call()
    assert calls[kernel] == 0


TAKEN = dict(linear=run_linear, decode_attention=run_decode, run_blocks=run_step)


@pytest.mark.parametrize("kernel", TAKEN)
def test_the_door(calls, kernel):
    """The same calls reach the kernels where nothing forbids it: the counts above are of something."""
    taken = TAKEN[kernel]()
    assert calls[kernel] == 1
    with ops.using("reference"):
        plain = TAKEN[kernel]()
    assert calls[kernel] == 1 and relative_error(taken, plain) < 1e-5
    if kernel != "decode_attention":  # which has no linear for autocast to cast
        with torch.autocast("cpu", BF16):
            TAKEN[kernel]()
        assert calls[kernel] == 1


def test_the_environment_forbids_them():
    program = """
import torch
from fastprior.kernels import cpu, ops
ops.linear(torch.ones(2, 8), torch.ones(3, 8))
assert cpu._loaded is None
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | dict(FASTPRIOR_KERNELS="reference"))


def followed_by_fake_tensors(x):
    with FakeTensorMode() as mode:
        fake = ops.linear(mode.from_tensor(x), mode.from_tensor(random(5, 8)))
    assert fake.shape == (3, 5) and fake.dtype == FP32


def followed_by_jvp(x):
    weight, along = random(5, 8), random(3, 8, seed=9)
    got, tangent = torch.func.jvp(lambda x: ops.linear(x, weight), (x,), (along,))
    torch.testing.assert_close((got, tangent), (x @ weight.t(), along @ weight.t()))
    with torch.autograd.forward_ad.dual_level():
        dual = ops.linear(torch.autograd.forward_ad.make_dual(x, along), weight)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, along @ weight.t())


def followed_by_vmap(x):
    weight = random(5, 8)
    torch.testing.assert_close(torch.func.vmap(lambda x: ops.linear(x, weight))(x), x @ weight.t())


@pytest.mark.filterwarnings("ignore")
def followed_by_traces(x):
    weight = random(5, 8)
    for trace in (lambda f: torch.jit.trace(f, (x,), check_trace=False), lambda f: make_fx(f)(x)):
        torch.testing.assert_close(trace(lambda x: ops.linear(x, weight))(x * 2), x @ weight.t() * 2)


def followed_by_a_subclass(x):
    class Scaled(torch.Tensor):  # as quantised weights are: what it is of lies elsewhere
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs or {})

    weight = random(5, 8).as_subclass(Scaled)
    assert not cpu.takes_linear(x, weight) and cpu.takes_linear(x, random(5, 8))


FOLLOWED = followed_by_fake_tensors, followed_by_jvp, followed_by_vmap, followed_by_traces, followed_by_a_subclass


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("check_it", FOLLOWED, ids=lambda f: f.__name__)
def test_what_follows_operations_sees_pytorchs(check_it):
    check_it(random(3, 8))


@pytest.mark.parametrize("dtype", [torch.float64, BF16], ids=str)
def test_defaults_of_the_program_change_nothing(dtype):
    inputs, transformer, tokens = make(3, 40, 52, options=("stream", "residual")), make_transformer(), make_tokens()
    with torch.no_grad():
        cache, x = transformer.prefill(tokens[0], 3), tokens[1]
        given = dict(outputs=1, heads=3, scale=1.0, rotary=cache.rotary, bias=cache.bias)
        blocks = transformer._blocks()
        expected = *cpu.linear(**inputs), cpu.run_blocks(x, blocks, cache.k, cache.v, **given)
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                got = *cpu.linear(**inputs), cpu.run_blocks(x, blocks, cache.k, cache.v, **given)
        finally:
            torch.set_default_dtype(FP32)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    torch._dynamo.reset()
    inputs = make(5, 40, 52, options=OPTIONS["all-swiglu"])
    transformer, (prefix, x) = make_transformer(normformer=True), make_tokens()
    decode = make_decode(width=6, bias=True, mask=True)

    def all_of_it(inputs, decode, x, cache):
        return ops.linear(**inputs), ops.decode_attention(**decode), transformer.step(x, cache)

    with torch.no_grad():
        cache = transformer.prefill(prefix, 3)
        graphs = []
        if backend == "aot_eager":

            def backend(graph, example):
                graphs.append(graph)
                return graph

        got = torch.compile(all_of_it, fullgraph=True, backend=backend)(inputs, decode, x, cache)
        torch.testing.assert_close(got, all_of_it(inputs, decode, x, cache), rtol=1e-5, atol=1e-6)
    for graph in graphs:
        names = {str(node.target) for node in graph.graph.nodes}
        assert {"fastprior.cpu_linear.default", "fastprior.cpu_decode.default", "fastprior.cpu_blocks.default"} <= names


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("options", ["all-gelu", "all-swiglu"])
def test_op_linear(options, dtypes):
    inputs = make(3, 40, 52, dtypes, OPTIONS[options])
    names = "x", "weight", "bias", "beside", "scale", "stream", "stream_gain", "norm_gain", "norm_bias"
    arguments = *(inputs.get(name) for name in names), 1e-5, inputs["activation"], inputs["residual"], BF16
    torch.library.opcheck(torch.ops.fastprior.cpu_linear.default, arguments)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_op_decode(dtype):
    given = make_decode(seq=2, width=6, bias=True, mask=True, dtype=dtype)
    tensors = [given[name] for name in ("q", "k", "v", "prefix_k", "prefix_v")]
    arguments = *tensors, given["scale"], *given["rotary"], True, given["bias"], given["mask"]
    torch.library.opcheck(torch.ops.fastprior.cpu_decode.default, arguments)


def block_arguments(suffix=3, **changes):
    """The arguments of `run_blocks` for two layers, of which layer 0 has changes."""
    transformer, (prefix, x) = make_transformer(depth=2, normformer=True), make_tokens(suffix=suffix)
    with torch.no_grad():
        cache = transformer.prefill(prefix, suffix)
        blocks = [ops.Block(*(None if t is None else t.detach() for t in block)) for block in transformer._blocks()]
    blocks[0] = blocks[0]._replace(**changes)
    given = dict(outputs=1, heads=3, scale=1.0, rotary=cache.rotary, cosine=True, bias=cache.bias)
    return dict(x=x, blocks=blocks, prefix_k=cache.k, prefix_v=cache.v, **given)


def test_op_blocks():
    given = block_arguments()
    tensors = [t for block in given["blocks"] for t in block]
    arguments = given["x"], tensors, given["prefix_k"], given["prefix_v"], 2, 3, 1.0, *given["rotary"], True
    torch.library.opcheck(torch.ops.fastprior.cpu_blocks.default, (*arguments, given["bias"], None, "swiglu", 1e-5))


def test_blocks_of_a_cache_that_lies_otherwise():
    given = block_arguments()
    expected = cpu.run_blocks(**given)
    for name in ("prefix_k", "prefix_v"):
        given[name] = given[name].transpose(0, 4).contiguous().transpose(0, 4)
    assert torch.equal(cpu.run_blocks(**given), expected)


# shapes that C would read out of bounds


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=random(6, 7)), "weight has shape (6, 7); it must be (6, 8)"),
        (dict(beside=random(6, 7)), "beside has shape (6, 7); it must be (6, 8)"),
        (dict(bias=random(5)), "bias has shape (5,); it must be (6,)"),
        (dict(bias=random(6), beside=random(2, 8)), "bias has shape (6,); it must be (8,)"),
        (dict(weight=random(6, 8).to(torch.int8), scale=random(5)), "scale has shape (5,); it must be (6,)"),
        (dict(norm_gain=random(7)), "norm_gain has shape (7,); it must be (8,)"),
        (dict(norm_gain=random(8), norm_bias=random(7)), "norm_bias has shape (7,); it must be (8,)"),
        (dict(stream=random(1, 8), stream_gain=random(8)), "stream has shape (1, 8); it must be (2, 8)"),
        (dict(stream=random(2, 8), stream_gain=random(7)), "stream_gain has shape (7,); it must be (8,)"),
        (dict(stream=random(2, 8)), "stream and stream_gain must be given together"),
        (dict(residual=random(2, 5)), "residual has shape (2, 5); it must be (2, 6)"),
        (dict(residual=random(2, 6), activation="swiglu"), "residual has shape (2, 6); it must be (2, 3)"),
        (dict(weight=random(5, 8), activation="swiglu"), "'swiglu' needs one weight"),
        (dict(beside=random(2, 8), activation="swiglu"), "'swiglu' needs one weight"),
        (dict(x=random(65, 8)), "x has 65 rows; they must be 1 to"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_messages_of_linear(change, message):
    with pytest.raises(ValueError) as raised:
        cpu.linear(**dict(x=random(2, 8), weight=random(6, 8)) | change)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=random(2, 3, 1, 15)), "k has shape (2, 3, 1, 15); it must be (2, 3, 1, 16)"),
        (dict(v=random(2, 2, 1, 16)), "v has shape (2, 2, 1, 16); it must be (2, 3, 1, 16)"),
        (dict(q=random(2, 4, 4, 16)), "4 tokens of queries; they must be 1 to 3"),
        (dict(q=random(3, 3, 4, 16), k=random(3, 3, 1, 16), v=random(3, 3, 1, 16)), "3 rows of 4 heads"),
        (dict(prefix_k=random(2, 9, 1, 8)), "prefix_v has shape (2, 9, 1, 16); it must be (2, 9, 1, 8)"),
        (dict(prefix_k=random(2, 9, 1, 8), prefix_v=random(2, 9, 1, 8)), "prefix_k has shape (2, 9, 1, 8)"),
        (dict(prefix_v=random(2, 8, 1, 16)), "prefix_v has shape (2, 8, 1, 16); it must be (2, 9, 1, 16)"),
        (dict(bias=random(3, 3, 12)), "bias has shape (3, 3, 12); it must be (3, 4, 12)"),
        (dict(bias=random(3, 4, 11)), "bias has shape (3, 4, 11); it must be (3, 4, 12)"),
        (dict(bias=random(2, 1, 12)), "bias has shape (2, 1, 12); it must be (3, 1, 12)"),
        (dict(mask=random(1, 9)), "mask has shape (1, 9); it must be (2, 9)"),
        (dict(rotary=(random(2, 16), random(2, 16))), "cos has shape (2, 16); it must be (3, 16)"),
        (dict(rotary=(random(3, 18), random(3, 18))), "cos has shape (3, 18); it must be (3, 16)"),
        (dict(rotary=(random(3, 7), random(3, 7))), "cos has shape (3, 7); it must be (3, 6)"),
        (dict(rotary=(random(3, 16), random(3, 14))), "sin has shape (3, 14); it must be (3, 16)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_messages_of_decode(change, message):
    with pytest.raises(ValueError) as raised:
        cpu.decode_attention(**make_decode() | change)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "change, of_block, message",
    [
        (dict(outputs=4), {}, "4 tokens of queries; they must be 1 to 3"),
        (dict(outputs=0), {}, "0 tokens of queries; they must be 1 to 3"),
        (dict(heads=4), {}, "q has shape (36, 40); it must be (48, 40)"),
        (dict(x=random(4, 3, 39)), {}, "q has shape (36, 40); it must be (36, 39)"),
        (dict(x=random(3, 3, 40)), {}, "3 rows of 3 heads"),
        (dict(x=random(44, 3, 40)), {}, "x has 132 rows; they must be 1 to"),
        (dict(x=random(4, 2, 40)), {}, "bias has shape (3, 3, 10); it must be (2, 3, 9)"),
        (dict(prefix_k=random(1, 2, 7, 1, 12)), {}, "prefix_k has 1 layers; it must have 2"),
        (dict(prefix_v=random(1, 2, 7, 1, 12)), {}, "prefix_v has shape (1, 2, 7, 1, 12)"),
        (dict(mask=random(2, 6)), {}, "mask has shape (2, 6); it must be (2, 7)"),
        ({}, dict(k=random(12, 40)), "k has shape (12, 40); it must be (24, 40)"),
        ({}, dict(v=random(12, 40)), "k has shape (24, 40); it must be (12, 40)"),
        ({}, dict(out=random(40, 35)), "out has shape (40, 35); it must be (40, 36)"),
        ({}, dict(expand=random(319, 40)), "expand has shape (319, 40); it must be (320, 40)"),
        ({}, dict(contract=random(39, 160)), "contract has shape (39, 160); it must be (40, 160)"),
        ({}, dict(q_scale=random(35)), "q_scale has shape (35,); it must be (36,)"),
        ({}, dict(expand_bias=random(160)), "expand_bias has shape (160,); it must be (320,)"),
        ({}, dict(norm_gain=random(39)), "norm_gain has shape (39,); it must be (40,)"),
        ({}, dict(out_gain=random(39)), "out_gain has shape (39,); it must be (40,)"),
        ({}, dict(inner_gain=random(40)), "inner_gain has shape (40,); it must be (160,)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_messages_of_blocks(change, of_block, message):
    with pytest.raises(ValueError) as raised:
        cpu.run_blocks(**block_arguments(**of_block) | change)
    assert message in str(raised.value)


# threads and processes


def test_threads_of_a_program_call_at_once():
    """Each with an input and a number of threads of its own."""
    cases = [make(rows, 97, 300, dtypes, OPTIONS["all-swiglu"]) for rows in (2, 9) for dtypes in ("fp32", "bf16")]
    expected, wrong = [cpu.linear(**inputs) for inputs in cases], []
    given = block_arguments()
    whole = cpu.run_blocks(**given)

    def work(index):
        torch.set_num_threads(1 + index % 3)
        for _ in range(30):
            for got, wanted in zip(cpu.linear(**cases[index]), expected[index]):
                if not torch.equal(got, wanted):
                    wrong.append(index)
            if not torch.equal(cpu.run_blocks(**given), whole):
                wrong.append("blocks")

    with threads(1):
        workers = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


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


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_does_not_wait_for_threads_that_it_does_not_have():
    inputs = make(3, 97, 300)
    with threads(3):
        expected = cpu.linear(**inputs)
        assert child(lambda: sys.exit(not torch.equal(cpu.linear(**inputs), expected))) == 0
        assert torch.equal(cpu.linear(**inputs), expected)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_two_processes_compile_at_once(tmp_path):
    def work():
        with built(FASTPRIOR_CACHE=tmp_path):
            check_linear(make(3, 23, 77))

    context = multiprocessing.get_context("fork")
    both = [context.Process(target=work) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1


# compiling


def goes_on(words):
    """PyTorch computes, and `unavailable` has these words."""
    inputs, tokens = make(3, 40, 52), make_tokens()
    assert relative_error(ops.linear(**inputs), reference.linear(**inputs)) < 1e-5
    assert (
        relative_error(step(make_transformer(), *tokens), through_reference(step, make_transformer(), *tokens)) < 1e-5
    )
    assert words in cpu.unavailable()
    with pytest.raises(RuntimeError, match="the CPU kernels cannot be compiled"):
        cpu.linear(**inputs)


def refusing(folder, lines):
    script = folder / "compiler"
    script.write_text("#!/bin/sh\n" + lines)
    script.chmod(0o755)
    return script


def test_no_compiler(tmp_path):
    with built(CC="/nonexistent/cc", FASTPRIOR_CACHE=tmp_path):
        goes_on("no C compiler")


def test_a_compiler_that_refuses(tmp_path):
    refuses = refusing(tmp_path, '[ "$1" = --version ] && exit 0\necho no licence >&2; exit 1\n')
    with built(CC=refuses, FASTPRIOR_CACHE=tmp_path / "cache"):
        goes_on("failed: no licence")
    assert not list((tmp_path / "cache").iterdir())
    with built(CC=refusing(tmp_path, "exit 3\n"), FASTPRIOR_CACHE=tmp_path / "cache"):
        goes_on("failed")


def test_a_compiler_with_arguments(tmp_path):
    with built(QUICK, CC="env cc -g0", FASTPRIOR_CACHE=tmp_path):
        assert cpu.unavailable() is None


@ON_X86
def test_a_machine_without_vectors(tmp_path):
    flags = tuple(flag.replace("native", "x86-64") for flag in cpu.FLAGS)
    with built(flags, FASTPRIOR_CACHE=tmp_path):
        goes_on("neither AVX2 nor NEON")


def test_no_place_to_write_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/fastprior"):
        with built(FASTPRIOR_CACHE=place):
            goes_on("no place for what it makes")

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTPRIOR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with built():
        goes_on("home directory")


def test_a_cache_that_was_filled_is_only_read(tmp_path):
    with built(QUICK, FASTPRIOR_CACHE=tmp_path):
        path = cpu.build()
        refuses = refusing(tmp_path, '[ "$1" = --version ] && exec cc --version\nexit 1\n')
        with built(QUICK, CC=refuses):
            assert cpu.build() == path and cpu.unavailable() is None


def test_a_broken_library_is_made_again(tmp_path):
    """As a crash or a full disk leaves it: a loader that maps half of one would die at its first page."""
    with built(QUICK, FASTPRIOR_CACHE=tmp_path):
        path = cpu.build()
        whole = path.read_bytes()
        for left in b"", b"no", whole[: len(whole) // 2], whole[:4096] + bytes(len(whole) - 4096):
            path.write_bytes(left)
            assert cpu.build() == path and len(path.read_bytes()) == len(whole)
        check_linear(make(3, 23, 77))


# memory


def sanitized():
    """For a process that has the sanitizer: shapes at every border, and at last a weight that is shorter than said."""
    assert cpu.unavailable() is None, cpu.unavailable()
    for dtypes, rows, shape in itertools.product(("fp32", "bf16", "int8"), (1, 3, 6, 7, 17, 32), SHAPES[::2]):
        if rows <= cpu.most_rows(FP32):
            for options in "all-swiglu", "all-gelu":
                check_linear(make(rows, *shape, dtypes, OPTIONS[options]))
    for kv_heads, options in itertools.product((1, 2, 4), DECODE_OPTIONS.values()):
        check_decode(make_decode(dim_head=7, kv_heads=kv_heads, seq=2, rows=4, **options | {"width": 6}))
    for transformer in make_transformer(**CONFIGS["odd"]), make_transformer(normformer=True):
        for samples, count in (1, 1), (5, 2):
            tokens = make_tokens(samples=samples, dim=transformer.norm.g.shape[0])
            with threads(count):
                step(transformer, *tokens)
    for count in 2, 32:
        with threads(count):
            prior_step(make_blocks(heads=3, dim_head=7), *make_tokens(dim=21), outputs=2)
    print("every access was within bounds", flush=True)
    cpu._fit = lambda *args: None
    cpu.linear(x=random(3, 64), weight=random(5, 7))


SANITIZED = *QUICK, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
IN_SANITIZER = """
import sys, test_kernel_cpu as tests
with tests.built(tests.SANITIZED, FASTPRIOR_CACHE=sys.argv[1], LD_PRELOAD=""):  # the compiler does without it
    tests.sanitized()
"""


def test_memory_is_read_and_written_within_bounds(tmp_path):
    """Under gcc's sanitizers, in memory that holds NaN before it is written; at last they show that they see."""
    library = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("the compiler has no libasan")
    options = "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000"
    environment = os.environ | dict(LD_PRELOAD=library, ASAN_OPTIONS=options, PYTHONPATH=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", IN_SANITIZER, tmp_path], env=environment, capture_output=True, text=True
    )
    assert "every access was within bounds" in done.stdout, done.stderr[-3000:]
    assert done.returncode and "ERROR: AddressSanitizer" in done.stderr
