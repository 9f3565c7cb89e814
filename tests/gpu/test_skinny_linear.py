"""Linears of up to 16 rows whose programs own whole sums: results, norms in place, layouts, launch configurations."""

import pytest
import torch

pytest.importorskip("triton")

from fastprior.kernels import reference
from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.gpu import launch, skinny_linear
from fastprior.kernels.gpu.launch import ceil_div
from fastprior.kernels.gpu.skinny_linear import Weight, launch_skinny_linear, skinny_config
from fastprior.kernels.reference import NormArgs
from helpers.kernel_checks import DEVICE, DTYPES, cast, check, error, guarded, random, sliced
from helpers.pairwise import pairwise

# of rows that are none, 0 / 0
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
HALF = torch.float16
NORMS = "stream", "norm_gain", "norm_bias", "stable"
OPTIONS = {
    "plain": (),
    "bias": ("bias",),
    "gain": ("norm_gain",),
    "norm": ("norm_gain", "norm_bias"),
    "stable": ("stable",),
    "stable-norm": ("stable", "norm_gain", "norm_bias"),
    "stream": ("stream",),
    "stream-norm": ("stream", "norm_gain"),
    "gelu": ("gelu", "bias"),
    "swiglu": ("swiglu",),
    "residual": ("residual",),
    "all-gelu": ("bias", "stream", *NORMS[1:], "gelu", "residual"),
    "all-swiglu": ("bias", "stream", *NORMS[1:], "swiglu", "residual"),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs them one after the other; and little room for weights: some come in the loop."""
    if launch.interpreted():
        monkeypatch.setattr(skinny_linear, "MULTIPROCESSORS", 3)
        monkeypatch.setattr(skinny_linear, "AHEAD", 8)


def make(rows, outputs, dim, dtype, options=(), *, stored=None, stream=torch.float32) -> dict:
    """What `run` and `expected` take; `outputs` of each weight."""
    activation = next((name for name in ("gelu", "swiglu") if name in options), None)
    weights, columns = [], 0
    for number, count in enumerate(outputs):
        count *= 2 if activation == "swiglu" else 1
        weight, scale = random(count, dim, seed=10 + number, scale=dim**-0.5), None
        if stored is not None:
            scale = weight.abs().amax(dim=1) / (127 if stored == torch.int8 else 448)
            weight = weight / scale[:, None]
        weight = (weight.round() if stored == torch.int8 else weight).to(stored or dtype)
        bias = random(count, dtype=dtype, seed=20 + number) if "bias" in options else None
        weights.append(Weight(weight, bias, scale))
        columns += count // (2 if activation == "swiglu" else 1)
    given = dict(x=random(rows, dim, dtype=dtype), weights=weights, activation=activation, stable="stable" in options)
    shapes = dict(stream=(rows, dim), stream_gain=(dim,), norm_gain=(dim,), norm_bias=(dim,), residual=(rows, columns))
    for seed, (name, shape) in enumerate(shapes.items(), 2):
        if name in options or name.removesuffix("_gain") in options:
            given[name] = random(*shape, dtype=stream if name == "stream" else dtype, seed=seed)
    return given


def run(x, weights, *, operand, stream=None, residual=None, activation=None, shape=None, **options) -> tuple:
    """The result, and the sum of a stream or None; in memory that is guarded, of dtypes as `ops.linear` has them."""
    columns = sum(len(w.weight) for w in weights) // (2 if activation == "swiglu" else 1)
    dtype = operand if residual is None else torch.promote_types(operand, residual.dtype)
    with guarded():
        out = launch.empty((len(x), columns), x, dtype)
        total = None if stream is None else launch.empty(x.shape, x, torch.promote_types(x.dtype, stream.dtype))
        launch_skinny_linear(
            x, weights, out if shape is None else out.view(*shape, columns), operand=operand, stream=stream,
            total=total, residual=residual, activation=activation, **options,
        )  # fmt: skip
    return out, total


def expected(kind: str, x, weights, *, operand, stable=False, eps=1e-5, **given) -> tuple:
    """The same by the reference, in fp64 ("exact") or as PyTorch does in these dtypes ("plain")."""
    operand = torch.float64 if kind == "exact" else operand
    given = {name: cast(t, kind) if torch.is_tensor(t) else t for name, t in given.items()}
    x, total = cast(x, kind), None
    if given.get("stream") is not None:
        x = total = reference.layer_norm(NormArgs(x, given["stream_gain"], eps=eps, after=given["stream"]))
    if stable or given.get("norm_gain") is not None:
        norm = given.get("norm_gain"), given.get("norm_bias")
        x = reference.layer_norm(NormArgs(x, *norm, eps=eps, stable=stable))
    weight, bias, scale = (
        None if parts[0] is None else cast(torch.cat(parts), kind if parts[0].itemsize > 1 else "plain")
        for parts in zip(*weights)
    )
    args = LinearArgs(x.to(operand), weight, bias, scale=scale, activation=given.get("activation"))
    return reference.linear(args._replace(residual=given.get("residual"))), total


def compare(inputs: dict, operand: torch.dtype, **options) -> None:
    found, plain, exact = (
        run(**inputs, operand=operand, **options),
        *(expected(kind, **inputs, operand=operand) for kind in ("plain", "exact")),
    )
    for name, ours, theirs, true in zip(("result", "total"), found, plain, exact):
        if true is not None:
            check(ours, true, theirs, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 9, 16])
def test_rows(rows, dtype):
    compare(make(rows, (20,), 140, dtype, ("bias", "norm_gain")), dtype)


# no chunk whole, a chunk, chunks and a rest, and rows of one number
@pytest.mark.parametrize("dim", [1, 52, 128, 300, 520])
@pytest.mark.parametrize("outputs", [1, 3, 50])
def test_shapes(outputs, dim):
    compare(make(3, (outputs,), dim, HALF, ("bias", "stream")), HALF)


@pytest.mark.parametrize(
    "options, rows, outputs, dtype",
    pairwise(options=OPTIONS, rows=[2, 5, 16], outputs=[(26,), (20, 13), (17, 1, 22)], dtype=DTYPES),
    ids=str,
)
def test_options(options, rows, outputs, dtype):
    outputs = outputs[:1] if "swiglu" in options else outputs
    compare(make(rows, outputs, 300, dtype, OPTIONS[options]), dtype)


FLOAT8 = pytest.param(
    torch.float8_e4m3fn,
    id="fp8",
    marks=pytest.mark.skipif(
        DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="needs compute capability 8.9"
    ),
)


@pytest.mark.parametrize("stored", [pytest.param(torch.int8, id="int8"), FLOAT8])
@pytest.mark.parametrize("options", ["plain", "all-gelu", "all-swiglu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_weights(dtype, options, stored):
    outputs = (20,) if "swiglu" in options else (20, 7, 12)
    compare(make(5, outputs, 300, dtype, OPTIONS[options], stored=stored), dtype)


def test_mixed_dtypes():
    """The stream of a model of 16 bits is fp32, before the norm and as what the result is added to."""
    inputs = make(3, (24,), 300, HALF, ("norm_gain", "residual"))
    inputs |= dict(x=random(3, 300), residual=random(3, 24, seed=9))
    compare(inputs, HALF)
    compare(make(3, (24,), 300, HALF, ("norm_gain", "stream"), stream=HALF), HALF)


def test_weights_that_come_in_the_loop_and_those_asked_for_ahead():
    """Each position of the sum counts once, in whichever chunk it lies: ones times ones."""
    in_the_loop = []
    for dim in (127, 128, 129, 300, 640, 1000, 4200 if DEVICE == "cuda" else 1500):
        config = skinny_config(2, 5, dim, 2)
        in_the_loop.append(config.chunks - config.ahead)
        x, weight = (torch.ones(shape, device=DEVICE, dtype=HALF) for shape in ((2, dim), (5, dim)))
        x[1] = 2
        got, _ = run(x, [Weight(weight)], operand=HALF)
        assert (got == torch.tensor([[dim], [2 * dim]], device=DEVICE).half()).all()
    assert min(in_the_loop) == 0 and max(in_the_loop) > 0


@pytest.mark.parametrize("options", ["all-gelu", "all-swiglu"])
def test_strides(options):
    """Slices of larger tensors give the same bits, and what lies beside them is not read."""
    inputs = make(6, (20,), 300, HALF, OPTIONS[options])
    wanted = run(**inputs, operand=HALF)
    views = {name: sliced(inputs[name]) for name in ("x", "stream", "residual")}
    views["weights"] = [w._replace(weight=sliced(w.weight)) for w in inputs["weights"]]
    for got, other in zip(run(**inputs | views, operand=HALF), wanted):
        assert torch.equal(got, other)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (6, 1), (1, 6)], ids=str)
def test_results_among_others(shape):
    """Rows of a group side by side within longer ones, and columns within wider: the rest is left alone."""
    inputs = make(6, (20, 9), 140, HALF, ("bias",))
    wanted, _ = run(**inputs, operand=HALF)
    assert torch.equal(run(**inputs, operand=HALF, shape=shape)[0], wanted)
    whole = torch.full((shape[0], shape[1] + 3, 40), -7.0, dtype=HALF, device=DEVICE)
    out = whole[:, 2 : 2 + shape[1], 5:34]
    launch_skinny_linear(inputs["x"], inputs["weights"], out, operand=HALF)
    assert torch.equal(out.reshape(6, 29), wanted)
    out.fill_(-7)
    assert (whole == -7).all()


def test_rows_far_from_zero():
    """The variance is of what is centred: a difference of squares would lose a relative 1000² · 2⁻²⁴, some 6 %.

    A mean of fp32 is right to 1000 · 2⁻²⁴ times the depth of its sum, of which 16 is allowed.
    """
    inputs = make(3, (24,), 300, torch.float32, ("norm_gain",))
    inputs["x"] += torch.tensor([[1000.0], [-1000.0], [0.0]], device=DEVICE)
    got, exact = run(**inputs, operand=torch.float32)[0], expected("exact", **inputs, operand=torch.float32)[0]
    assert error(got[:2], exact[:2]) < 16 * 1000 * 2**-24
    assert error(got[2], exact[2]) < 1e-6
    stream = make(3, (24,), 300, torch.float32, ("norm_gain", "stream"))
    stream["stream"] += 1000
    (got, total), wanted = run(**stream, operand=torch.float32), expected("exact", **stream, operand=torch.float32)
    assert error(total, wanted[1]) < 2**-23 and error(got, wanted[0]) < 16 * 1000 * 2**-24


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("place", [0, 130, 299])
def test_a_row_with_one_huge_element(place, stable):
    """It is all of the variance, and the others are small: right to 16 units of fp32 in the last place.

    Where it is the first, from which differences are taken, to as many as the row has numbers.
    """
    inputs = make(3, (24,), 300, torch.float32, ("norm_gain", "stable") if stable else ("norm_gain",))
    inputs["x"][1, place] = 1e6
    got, exact = run(**inputs, operand=torch.float32)[0], expected("exact", **inputs, operand=torch.float32)[0]
    for row in range(3):
        units = 300 if place == 0 and row == 1 else 16
        assert error(got[row], exact[row]) < units * 2**-23


@pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")  # numpy's, of an overflow that is meant
@pytest.mark.parametrize("options", ["plain", "norm", "stream-norm", "stable", "swiglu"])
def test_zeros_and_nan(options):
    """Rows without a NaN keep theirs; a row of zeros has no variance, and by `stable` no maximum to divide by."""
    inputs = make(4, (24,), 300, HALF, OPTIONS[options])
    wanted = run(**inputs, operand=HALF)[0]
    inputs["x"][1, 299] = torch.nan
    inputs["x"][2] = 0
    got, plain = run(**inputs, operand=HALF)[0], expected("plain", **inputs, operand=HALF)[0]
    assert got[1].isnan().all() and torch.equal(got.isnan(), plain.isnan())
    assert torch.equal(got[[0, 3]], wanted[[0, 3]])
    if not plain[2].isnan().any():
        torch.testing.assert_close(got[2], plain[2], rtol=4e-3, atol=4e-3)  # 4 units of fp16


def test_what_it_takes():
    assert all(skinny_linear.takes(rows, dtype) for rows in (1, 16) for dtype in (HALF, torch.bfloat16))
    assert not skinny_linear.takes(17, HALF) and not skinny_linear.takes(1, torch.float32)
    assert not skinny_linear.takes(1, torch.int8)


# rows that tokens of the models are at batch 1; outputs, dim, pairs, and whether their norm is in place
LINEARS = {
    "D2-small qkv": (3, 896, 768, False, True),
    "D2-small out": (3, 768, 768, False, False),
    "D2-large qkv": (3, 2176, 768, False, True),
    "D2-large out": (3, 768, 2048, False, False),
    "D2 expand": (3, 3072, 768, True, True),
    "D2 contract": (3, 768, 3072, False, True),
    "D2 head": (1, 768, 768, False, True),
    "PT-1B out": (6, 2048, 2048, False, False),
    "PT-1B contract": (6, 2048, 8192, False, False),
    "PT-1B entry": (2, 2048, 768, False, False),
    "PT-1B head": (2, 768, 2048, False, True),
}


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows, outputs, dim, pairs, normed", LINEARS.values(), ids=LINEARS)
def test_config_of_the_models(rows, outputs, dim, pairs, normed, itemsize, monkeypatch):
    monkeypatch.undo()
    config = skinny_config(rows, outputs, dim, itemsize, pairs, normed)
    assert config.block_m >= rows and config.span * (2 if pairs else 1) <= config.pieces * config.piece
    assert 100 <= ceil_div(outputs, config.span) <= skinny_linear.MULTIPROCESSORS, "not one wave of all of the chip"


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("outputs", [1, 132, 133, 768, 8192, 30000])
@pytest.mark.parametrize("dim", [1, 52, 128, 768, 2048, 3000, 8192])
def test_config_covers_all_within_limits(dim, outputs, itemsize, monkeypatch):
    monkeypatch.undo()
    for rows in (1, 3, 16):
        for pairs in (False, True):
            for normed, joined in ((False, False), (True, False), (True, True)):
                config = skinny_config(rows, outputs, dim, itemsize, pairs, normed, joined)
                chunk = skinny_linear.WARPS * 4 * config.vector
                assert (config.chunks - 1) * chunk < dim <= config.chunks * chunk
                assert config.vector * itemsize == 16, "not the widest reads"
                assert 1 <= config.ahead <= config.chunks and 1 <= config.rows_ahead <= config.chunks
                assert config.span * (2 if pairs else 1) <= config.pieces * config.piece <= skinny_linear.MOST
                assert config.piece == 16 or not pairs
                registers = config.pieces * config.piece * chunk * itemsize // (4 * 32 * skinny_linear.WARPS)
                assert config.ahead == 1 or config.ahead * registers <= 3 * skinny_linear.AHEAD // 2
