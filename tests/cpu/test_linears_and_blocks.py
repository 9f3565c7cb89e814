"""The CPU kernels: results of linears, decode attention and blocks against the reference in fp64, and their bits."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from fastprior.kernels import reference
from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.cpu import attention as cpu_attention
from fastprior.kernels.cpu import blocks as cpu_blocks
from fastprior.kernels.cpu import library as cpu_library
from fastprior.kernels.cpu import linear as cpu_linear
from fastprior.models.prior_transformer import cached_blocks
from helpers.cpu_cases import (
    BF16,
    CONFIGS,
    DECODE_OPTIONS,
    DOT,
    DTYPES,
    EPS,
    FLOORS,
    FP32,
    HAS_TILES,
    NEEDS_KERNELS,
    ON_X86,
    OPTIONS,
    ROUNDED,
    ROUNDED_FLOOR,
    SHAPES,
    TILES,
    block_arguments,
    built,
    cast,
    check,
    check_decode,
    check_linear,
    count_calls,
    error,
    floor,
    form,
    make,
    make_blocks,
    make_decode,
    make_tokens,
    make_transformer,
    mask_of,
    prefill,
    prepare,
    prior_step,
    random,
    step,
    threads,
    through_reference,
)
from helpers.priors import relative_error

HASWELL = tuple("-march=haswell" if flag == "-march=native" else flag for flag in cpu_library.FLAGS)
WITHOUT_TILES = *cpu_library.FLAGS, "-mno-amx-tile", "-mno-amx-bf16"

pytestmark = NEEDS_KERNELS


@pytest.fixture(scope="session")
def haswell(tmp_path_factory):
    with built(HASWELL, FASTPRIOR_CACHE=tmp_path_factory.mktemp("haswell")):
        assert cpu_library.unavailable() is None and cpu_library.most_rows(FP32) > 1024
        return cpu_library._loaded, cpu_library._most_rows


@pytest.fixture(scope="session")
def without_tiles(tmp_path_factory):
    if not HAS_TILES:
        pytest.skip("as native: this processor multiplies no tiles")
    with built(WITHOUT_TILES, FASTPRIOR_CACHE=tmp_path_factory.mktemp("without_tiles")):
        assert cpu_library.unavailable() is None and form(FP32, 64) == DOT
        return cpu_library._loaded, cpu_library._most_rows


@pytest.fixture(params=["native", *(pytest.param(name, marks=ON_X86) for name in ("haswell", "without_tiles"))])
def build(request, monkeypatch):
    """The instruction sets of x86, where this machine has them."""
    if request.param != "native":
        loaded, most_rows = request.getfixturevalue(request.param)
        monkeypatch.setattr(cpu_library, "_loaded", loaded)
        monkeypatch.setattr(cpu_library, "_most_rows", most_rows)


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


# linears

ROWS = [1, 2, 3, 4, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65, 128, 130, 257]  # around where the forms change


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)
def test_linear_of_every_shape(build, shape, dtypes):
    for rows in ROWS:
        if rows <= cpu_library.most_rows(FP32):
            check_linear(make(rows, *shape, dtypes, ("bias",)))


@pytest.mark.parametrize("dtypes", ["fp32", "bf16-beside-fp32", "int8"])
def test_linear_of_every_number_of_rows(build, dtypes):
    """The passes over them are of several sizes, the last often of another than the rest."""
    for rows in range(1, min(cpu_library.most_rows(FP32), 66) + 1):
        check_linear(make(rows, 50, 100, dtypes, ("norm_gain",)))


@pytest.mark.parametrize("rows", [1, 6, 7, 8, 13, 40, 64])
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)
def test_products_of_bf16_are_exact(build, rows, shape):
    """Where x is rounded to bf16 that is all that is lost: of an x that bf16 holds the result is that of fp32."""
    if rows <= cpu_library.most_rows(BF16):
        inputs = make(rows, *shape, "bf16")
        inputs["x"] = inputs["x"].float()
        exact, plain = (reference.linear(LinearArgs(**cast(inputs, dtype))) for dtype in (torch.float64, FP32))
        check(cpu_linear.linear(LinearArgs(**inputs)), exact, plain, 3e-5 if form(BF16, rows) == TILES else 32 * EPS)


@pytest.mark.skipif(form(BF16, 7) != ROUNDED, reason="this processor has no products of bf16, or tiles")
def test_few_rows_are_not_rounded():
    inputs = make(7, 50, 300, "bf16")
    inputs["x"] = random(7, 300)
    exact = reference.linear(LinearArgs(**cast(inputs, torch.float64)))
    assert 1e-4 < error(cpu_linear.linear(LinearArgs(**inputs)), exact) < ROUNDED_FLOOR
    few = cpu_linear.linear(LinearArgs(**inputs | dict(x=inputs["x"][:6])))
    assert error(few, exact[:6]) < FLOORS[FP32]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_linear_with_every_option(build, options, dtypes):
    for (rows, shape), count in zip(itertools.product((2, 5, 10, 16), ((23, 77), (50, 300))), itertools.cycle((1, 3))):
        inputs = make(rows, *shape, dtypes, OPTIONS[options])
        if dtypes == "bf16-beside-fp32" and "bias" in inputs:  # PyTorch's linear takes one dtype
            inputs["bias"] = inputs["bias"].bfloat16()
        with threads(count):
            check_linear(inputs)


@pytest.mark.skipif(not HAS_TILES, reason="this processor multiplies no tiles")
@pytest.mark.parametrize("dim", [96, 768, 3072])
def test_tiles_are_as_exact_as_fp32(dim):
    """Numbers are three parts of 8 bits in them, over the whole range of exponents that fp32 keeps exactly."""
    inputs = make(40, 64, dim)
    for name, t in ("x", inputs["x"]), ("weight", inputs["weight"]):
        inputs[name] = t * 2.0 ** torch.arange(-40, 40, 80 / len(t))[:, None]
    exact = reference.linear(LinearArgs(**cast(inputs, torch.float64)))
    of_rows, of_columns = (inputs[name].abs().amax(dim=1).double() for name in ("x", "weight"))
    scale = of_rows[:, None] * of_columns * dim**0.5
    ours, theirs = (
        ((got - exact) / scale).square().mean().sqrt()
        for got in (cpu_linear.linear(LinearArgs(**inputs)), reference.linear(LinearArgs(**inputs)))
    )
    assert ours <= 2 * theirs


@pytest.mark.skipif(not HAS_TILES, reason="this processor multiplies no tiles")
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("count", [1, 3])
def test_sums_in_several_parts(dtypes, count):
    """Where the tiles of all of x are more than a cache holds."""
    for rows, dim in (64, 3500), (130, 7001):
        with threads(count):
            check_linear(make(rows, 70, dim, dtypes, OPTIONS["all-swiglu"]))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 6])
@pytest.mark.parametrize("options", [("norm_gain",), OPTIONS["all-swiglu"]], ids=["norm", "all"])
def test_bf16_weights_under_a_stream_of_fp32(build, options, rows):
    """What was normalised is not rounded in between: the result in fp32 is exact as that of fp32 weights is."""
    inputs = make(rows, 40, 300, "fp32", options)
    inputs["weight"] = inputs["weight"].bfloat16()
    got, exact, plain = cpu_linear.linear(LinearArgs(**inputs, dtype=FP32)), *(
        reference.linear(LinearArgs(**cast(inputs, dtype))) for dtype in (torch.float64, FP32)
    )  # fmt: skip
    if "stream" in options:
        got, exact, plain = got[0], exact[0], plain[0]
    assert got.dtype == FP32
    check(got, exact, plain)


def test_the_comparison_rejects():
    inputs = make(5, 50, 300)
    got, exact, plain = (
        cpu_linear.linear(LinearArgs(**inputs)),
        *(reference.linear(LinearArgs(**cast(inputs, d))) for d in (torch.float64, FP32)),
    )
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
    expected = cpu_linear.linear(LinearArgs(**inputs))
    views = {}
    for name, t in inputs.items():
        views[name] = t
        if isinstance(t, torch.Tensor):
            big = torch.full([n * 2 + 3 for n in t.shape], 77 if t.dtype == torch.int8 else math.nan, dtype=t.dtype)
            step = 1 if name == "weight" else 2
            views[name] = big[tuple(slice(1, 1 + step * n, step) for n in t.shape)].copy_(t)
    torch.testing.assert_close(cpu_linear.linear(LinearArgs(**views)), expected, rtol=0, atol=0)
    three = {name: inputs[name].view(rows, 1, -1) for name in ("x", "stream", "residual")}
    for got, wanted in zip(cpu_linear.linear(LinearArgs(**inputs | three)), expected):
        assert torch.equal(got, wanted.view(rows, 1, -1))
    if rows == 1:
        one = {name: inputs[name][0] for name in ("x", "stream", "residual")}
        for got, wanted in zip(cpu_linear.linear(LinearArgs(**inputs | one)), expected):
            assert torch.equal(got, wanted[0])


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 3, 5, 9, 16])
def test_bits_are_those_of_the_inputs(build, rows, dtypes):
    """Not of the number of threads, be they more than columns, nor of what memory held before."""
    for outputs, dim in (1, 100), (7, 33), (97, 700):
        inputs = make(rows, outputs, dim, dtypes, OPTIONS["all-swiglu"])
        expected = cpu_linear.linear(LinearArgs(**inputs))
        for count in (1, 2, 3, 7):
            freed = [
                torch.full((size,), math.nan) for size in (100, 1000, 10000, 20000, 50000, 100000) for _ in range(3)
            ]
            del freed
            with threads(count):
                torch.testing.assert_close(cpu_linear.linear(LinearArgs(**inputs)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [2, 3, 6, 7, 16])
def test_rows_do_not_meet(build, rows, dtypes):
    inputs = make(rows, 50, 300, dtypes, ("norm_gain", "bias"))
    expected = cpu_linear.linear(LinearArgs(**inputs))
    for row in range(rows):
        alone = cpu_linear.linear(LinearArgs(**inputs | dict(x=inputs["x"][row : row + 1])))
        most = floor(inputs["weight"].dtype, rows) if expected.dtype == FP32 else torch.finfo(BF16).eps
        assert error(alone[0], expected[row].double()) <= most
        x = torch.full_like(inputs["x"], math.nan)
        x[row] = inputs["x"][row]
        assert torch.equal(cpu_linear.linear(LinearArgs(**inputs | dict(x=x)))[row], expected[row])


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [3, 6, 9, 16, 32])
def test_nan_and_infinity_stay_in_their_rows_and_columns(build, rows, dtypes):
    if rows > cpu_library.most_rows(FP32):
        pytest.skip("PyTorch computes so many")
    inputs = make(rows, 50, 100, dtypes)
    expected = cpu_linear.linear(LinearArgs(**inputs))
    inputs["x"][1, 99], inputs["x"][2, 3] = math.nan, -math.inf
    got = cpu_linear.linear(LinearArgs(**inputs))
    assert got[1].isnan().all() and not got[2].isfinite().any() and torch.equal(got[0], expected[0])
    assert got[3:].isfinite().all()
    inputs = make(rows, 50, 100, dtypes)
    values = inputs["scale"] if dtypes == "int8" else inputs["weight"][:, 99]
    values[7], values[48] = math.nan, math.inf
    got = cpu_linear.linear(LinearArgs(**inputs))
    others = [n for n in range(50) if n not in (7, 48)]
    assert got[:, 7].isnan().all() and not got[:, 48].isfinite().any()
    assert torch.equal(got[:, others], expected[:, others])


@pytest.mark.parametrize("rows", [1, 3, 9, 16])
def test_activations_saturate(build, rows):
    """Each result within some units in the last place; the error of gelu is one of erf, times x."""
    values = torch.tensor([0, 1e-30, 1e-3, 0.5, 1, 3, 5, 6, 10, 20, 87, 88, 89, 104, 1e3, 1e4])
    values = torch.cat((values, -values)).expand(rows, -1)
    eye, exact = torch.eye(32), values.double()
    got = cpu_linear.linear(LinearArgs(values, eye, activation="gelu"))
    assert ((got - nn.functional.gelu(exact)).abs() <= 3e-7 * exact.abs()).all()
    bias = torch.cat((torch.ones(32), torch.zeros(32)))
    got = cpu_linear.linear(LinearArgs(values, torch.cat((torch.zeros(32, 32), eye)), bias, activation="swiglu"))
    wanted = nn.functional.silu(exact)
    assert ((got - wanted).abs() <= 1e-6 * wanted.abs() + 1e-30).all()


def test_offset_rows(build):
    """A mean far from zero: the variance is centred, not a difference of squares."""
    inputs = make(3, 24, 300, options=("norm_gain", "norm_bias"))
    inputs["x"] += 1000
    check_linear(inputs)


# attention


@pytest.mark.parametrize("dim_head", [7, 16, 64, 256])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_decode_shapes(build, dim_head, kv_heads, dtype):
    for seq, samples, prefix in (1, 1, 1), (2, 3, 9), (5, 1, 80), (5, 2, 77):
        given = dict(rows=2 * samples, suffix=5, seq=seq, prefix=prefix, dim_head=dim_head, kv_heads=kv_heads)
        check_decode(make_decode(**given, dtype=dtype))


@pytest.mark.parametrize("options", DECODE_OPTIONS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_decode_options(build, options, kv_heads):
    for (seq, samples), count in zip(((1, 1), (2, 3), (3, 2), (3, 20)), (1, 3, 1, 7)):
        with threads(count):
            check_decode(make_decode(rows=2 * samples, seq=seq, kv_heads=kv_heads, **DECODE_OPTIONS[options]))


def test_decode_comparison_rejects():
    given = make_decode(bias=True)
    got, exact = cpu_attention.decode_attention(**given), reference.decode_attention(**cast(given, torch.float64))
    plain = reference.decode_attention(**given)
    other = cpu_attention.decode_attention(**given | dict(scale=given["scale"] * 1.01))
    for wrong in (torch.zeros_like(got), -got, got.roll(1, -1), other):
        with pytest.raises(AssertionError):
            check(wrong, exact, plain)


def test_decode_strides(build):
    given = make_decode(prompts=2, prefix=9, kv_heads=2, suffix=5, seq=5)
    expected = cpu_attention.decode_attention(**given)
    by_head = {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("prefix_k", "prefix_v")}
    by_dim = {name: given[name].transpose(1, 3).contiguous().transpose(1, 3) for name in ("q", "k", "v", *by_head)}
    mixed = dict(k=given["k"].contiguous(), v=by_dim["v"], prefix_k=by_head["prefix_k"])
    for change in by_head, by_dim, mixed:
        assert torch.equal(cpu_attention.decode_attention(**given | change), expected)
    last = cpu_attention.decode_attention(**given | dict(q=given["q"][:, -2:]))
    assert error(last, expected[:, -2:].double()) <= 32 * EPS


def test_a_query_that_sees_nothing_is_nan(build):
    given = make_decode(bias=True)
    given["bias"][1] = -math.inf
    got = cpu_attention.decode_attention(**given)
    assert got[:, 1].isnan().all() and got[:, [0, 2]].isfinite().all()
    given["q"][0, 2, 3, 0] = math.nan
    got = cpu_attention.decode_attention(**given).unflatten(-1, (4, 16))
    assert got[0, 2, 3].isnan().all() and got[0, 2, :3].isfinite().all() and got[1, 2].isfinite().all()


def test_decode_does_not_overflow(build):
    """Logits of ±1e4 give the one key that has the most."""
    given = make_decode(bias=True) | dict(scale=1e4)
    check_decode(given)


# blocks


def some_samples(dtype, suffix):
    """Of two prompts each: every number for few rows, and those around where the forms change."""
    return [n for n in (*range(1, 17), 24, 25, 32, 33) if 2 * n * suffix <= cpu_blocks.most_tokens(dtype)]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_blocks_of_the_causal_transformer(build, calls, config, dtype):
    transformer = make_transformer(dtype, **CONFIGS[config])
    exact = copy.deepcopy(transformer).double()
    for suffix in (1, 3):
        for samples in some_samples(dtype, suffix):
            prefix, x = make_tokens(samples=samples, suffix=suffix, dim=transformer.norm.g.shape[0])
            calls.update(run_blocks=0, linear=0)
            got = step(transformer, prefix, x)
            assert calls["run_blocks"] == 2 and not calls["linear"], "a prefill and a step"
            true, plain = through_reference(step, exact, prefix.double(), x.double()), through_reference(
                step, transformer, prefix, x
            )  # fmt: skip
            check(got, true, plain, 32 * EPS if got.dtype == FP32 else 4 * torch.finfo(BF16).eps)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("config", [dict(), dict(heads=2, dim_head=7), dict(heads=3, dim_head=64, depth=1)], ids=str)
def test_blocks_of_the_prior_transformer(build, calls, config, dtype):
    blocks = make_blocks(**config, dtype=dtype)
    dim, exact = blocks[0].norm1.weight.shape[0], copy.deepcopy(blocks).double()
    for suffix, outputs in (1, 1), (3, 1), (3, 2), (3, 3):
        for samples in some_samples(dtype, suffix):
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


@pytest.mark.parametrize("dtype", [torch.float64, BF16], ids=str)
def test_defaults_of_the_program_change_nothing(dtype):
    inputs, transformer, tokens = make(3, 40, 52, options=("stream", "residual")), make_transformer(), make_tokens()
    with torch.no_grad():
        cache, x = transformer.prefill(tokens[0], 3), tokens[1]
        given = dict(outputs=1, rotary=cache.rotary, bias=cache.bias)
        blocks = prepare(transformer)
        expected = *cpu_linear.linear(LinearArgs(**inputs)), cpu_blocks.run_blocks(x, blocks, cache.k, cache.v, **given)
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                got = (
                    *cpu_linear.linear(LinearArgs(**inputs)),
                    cpu_blocks.run_blocks(x, blocks, cache.k, cache.v, **given),
                )
        finally:
            torch.set_default_dtype(FP32)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_prefill(build, calls, monkeypatch, config, dtype):
    """In one call, and in parts of some prompts where all tokens are too many for one."""
    transformer = make_transformer(dtype, **CONFIGS[config])
    exact = copy.deepcopy(transformer).double()
    for prompts, prefix, most in (3, 5, 16), (5, 6, 13), (1, 1, 1):
        monkeypatch.setattr(cpu_blocks, "most_tokens", lambda _, most=most: most)
        x = random(prompts, prefix, transformer.norm.g.shape[0])
        calls.update(run_blocks=0, linear=0)
        got = prefill(transformer, x)
        assert calls["run_blocks"] == math.ceil(prompts / (most // prefix)) and not calls["linear"]
        plain, true = through_reference(prefill, transformer, x), through_reference(prefill, exact, x.double())
        for name in "k", "v":
            check(getattr(got, name), getattr(true, name), getattr(plain, name))
        for name in "bias", "rotary":
            torch.testing.assert_close(getattr(got, name), getattr(plain, name), rtol=0, atol=0)


def test_the_head_divides_by_the_signed_maximum():
    """Of rows below zero it changes the sign; and rows much smaller than eps are normalised as others."""
    transformer, (prefix, x) = make_transformer(), make_tokens()
    with torch.no_grad():
        for _, ff in transformer.layers:
            ff[5].weight.zero_()
        for attn, _ in transformer.layers:
            attn.to_out[1].g.zero_()
        x = torch.stack((x[0] - 9, x[1] * 1e-3 + 0.01, x[2], x[3] * 1e-4))
        expected = transformer.double()._head(x[:, -1].double())
        assert relative_error(step(transformer.float(), prefix, x), expected) < 1e-5
        for row, wanted in zip(step(transformer, prefix, x), expected):
            assert relative_error(row, wanted) < 1e-5


def test_steps_see_weights_that_change_in_place():
    transformer, (prefix, x) = make_transformer(), make_tokens()
    cache = prefill(transformer, prefix, 3)
    with torch.no_grad():
        before = transformer.step(x, cache)
        transformer.layers[1][1][5].weight.mul_(2)
        after = transformer.step(x, cache)
        assert relative_error(after, before) > 1e-3
        assert torch.equal(after, transformer.step(x, cache._replace(blocks=None)))


def test_steps_of_another_model_have_its_weights():
    transformer, (prefix, x) = make_transformer(), make_tokens()
    other, cache = make_transformer(normformer=True), prefill(transformer, prefix, 3)
    with torch.no_grad():
        assert torch.equal(other.step(x, cache), other.step(x, cache._replace(blocks=None)))
        blocks = make_blocks()
        twin, behind = copy.deepcopy(blocks).requires_grad_(False), cached_blocks.prefill(blocks, prefix, mask_of())
        twin[1].attn1.to_q.weight.mul_(2)
        alone = cached_blocks.step(twin, x, behind._replace(blocks=None), 1)
        assert torch.equal(cached_blocks.step(twin, x, behind, 1), alone)
        assert relative_error(cached_blocks.step(blocks, x, behind, 1), alone) > 1e-3


def test_weights_that_are_replaced_lie_where_they_were():
    transformer, (prefix, x) = make_transformer(), make_tokens()
    cache = prefill(transformer, prefix, 3)
    with torch.no_grad():
        before = transformer.step(x, cache)
        transformer.to(BF16)
        held = [torch.full((40, 160), 7.0) for _ in range(200)]  # in memory that was given back
        assert torch.equal(transformer.step(x, cache), before) and held


def test_blocks_of_a_cache_that_lies_otherwise():
    given = block_arguments()
    expected = cpu_blocks.run_blocks(**given)
    for name in ("prefix_k", "prefix_v"):
        given[name] = given[name].transpose(0, 4).contiguous().transpose(0, 4)
    assert torch.equal(cpu_blocks.run_blocks(**given), expected)


def test_sums_that_cancel():
    """A result of 5e-6 is left of sums of 280: PyTorch's rounding to bf16 is 54 times as large, C's is that of bf16."""
    draw = torch.Generator().manual_seed(7347)
    x, weight, gain = (torch.randn(shape, generator=draw) for shape in ((1, 15), (2, 15), (15,)))
    inputs = dict(x=x.to(BF16), weight=(weight * 15**-0.5).to(BF16), norm_gain=gain.to(BF16), activation="swiglu")
    exact = reference.linear(LinearArgs(**cast(inputs, torch.float64)))
    if form(BF16, 1) == DOT:
        assert error(cpu_linear.linear(LinearArgs(**inputs)), exact) < 2**-8
    assert error(reference.linear(LinearArgs(**inputs)), exact) > 5
