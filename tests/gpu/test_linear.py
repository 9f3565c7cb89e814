"""Linear layers of few rows: results, gradients, splitting of sums, quantised weights, and messages."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastprior.kernels import ops, reference
from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.gpu import launch, skinny_linear
from fastprior.kernels.gpu import linear as module
from fastprior.kernels.gpu.linear import linear_config, linear_fwd
from fastprior.kernels.gpu.workspace import COUNTERS, Workspace, current, sharing
from helpers.at_once import at_once
from helpers.kernel_checks import DEVICE, DTYPES, check, check_gradients, guarded, random, sliced
from helpers.pairwise import pairwise

FLOAT8 = pytest.param(
    torch.float8_e4m3fn,
    id="fp8",
    marks=pytest.mark.skipif(
        DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="needs compute capability 8.9"
    ),
)
STORED = [pytest.param(torch.int8, id="int8"), FLOAT8]
# rows, outputs, dim: tiny, odd, of whole blocks; split or not; so many outputs as 3080 are not split
SHAPES = [
    (1, 1, 1),
    (1, 40, 52),
    (3, 33, 300),
    (16, 64, 768),
    (17, 30, 130),
    (33, 18, 520),
    (64, 72, 264),
    (2, 3080, 136),
]
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
    "all-gelu": ("beside", "bias", "norm_gain", "norm_bias", "gelu", "residual"),
    "all-swiglu": ("bias", "stream", "norm_gain", "norm_bias", "swiglu", "residual"),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Up to 16 rows of 16 bits are a skinny linear, of as many programs as the chip has multiprocessors."""
    if launch.interpreted():
        monkeypatch.setattr(skinny_linear, "MULTIPROCESSORS", 5)


def linear(**inputs) -> Tensor | tuple[Tensor, Tensor]:
    return module.linear(LinearArgs(**inputs))


def quantised(outputs: int, dim: int, stored: torch.dtype) -> dict[str, Tensor]:
    weight, scale = random(outputs, dim), random(outputs).abs() / dim**0.5
    if stored == torch.int8:
        return dict(weight=(weight * 30).round().clamp(-127, 127).to(stored), scale=scale / 30)
    return dict(weight=weight.to(stored), scale=scale)


def make(rows, outputs, dim, dtype, options=(), *, grad=False, stored=None) -> tuple[dict, str | None]:
    """Inputs by name, and the activation."""
    activation = next((name for name in ("gelu", "swiglu") if name in options), None)
    inputs = dict(x=random(rows, dim, dtype=dtype, grad=grad))
    both = outputs + 21 if "beside" in options else outputs
    if stored is None:
        weight = random(both, dim, dtype=dtype, seed=1, scale=dim**-0.5)
    else:
        scaled = quantised(both, dim, stored)
        weight, inputs["scale"] = scaled.values()
    for name, part in ("weight", weight[:outputs]), ("beside", weight[outputs:]):
        if len(part):
            inputs[name] = part.clone().requires_grad_(grad and stored is None)
    inner = both // 2 if activation == "swiglu" else both
    shapes = dict(
        bias=(both,), stream=(rows, dim), stream_gain=(dim,), norm_gain=(dim,), norm_bias=(dim,), residual=(rows, inner)
    )
    for seed, (name, shape) in enumerate(shapes.items(), 2):
        if name.removesuffix("_gain") in options or name in options:
            inputs[name] = random(*shape, dtype=dtype, seed=seed, grad=grad)
    return inputs, activation


def runs(activation: str | None = None, compiled=None):
    """The kernel and the reference, as functions of the tensors."""
    return (
        lambda **tensors: (compiled or linear)(**tensors, activation=activation),
        lambda **tensors: reference.linear(LinearArgs(**tensors, activation=activation)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}x{0[2]}".format)
def test_shapes(shape, dtype):
    inputs, _ = make(*shape, dtype, ("bias",), grad=True)
    with guarded():
        check_gradients(*runs(), inputs)


@pytest.mark.parametrize(
    "options, shape, dtype",
    pairwise(options=OPTIONS, shape=[(5, 36, 77), (16, 50, 300), (20, 36, 300)], dtype=DTYPES),
    ids=str,
)
def test_options(options, shape, dtype):
    inputs, activation = make(*shape, dtype, OPTIONS[options], grad=True)
    with guarded():
        check_gradients(*runs(activation), inputs)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    "options, shape, dtype",
    pairwise(
        options=["plain", "all-gelu", "all-swiglu"], shape=[(1, 40, 52), (16, 36, 300), (40, 36, 300)], dtype=DTYPES
    ),
    ids=str,
)
def test_quantised_weights(options, shape, dtype, stored):
    inputs, activation = make(*shape, dtype, OPTIONS[options], grad=True, stored=stored)
    with guarded():
        check_gradients(*runs(activation), inputs)


@pytest.mark.parametrize("options", [OPTIONS["all-gelu"], OPTIONS["all-swiglu"]], ids=["gelu", "swiglu"])
def test_strides(options):
    """Slices of larger tensors; a slice of a larger weight is read in place."""
    inputs, activation = make(6, 36, 300, torch.float16, options)
    ours, _ = runs(activation)
    expected = ours(**inputs)
    views = {name: sliced(t) if t.ndim == 2 else t for name, t in inputs.items()}
    with guarded():
        torch.testing.assert_close(ours(**views), expected, rtol=0, atol=0)
    rows = [name for name in ("x", "residual", "stream") if name in inputs]
    transposed = inputs | {name: inputs[name].t().contiguous().t() for name in rows}
    torch.testing.assert_close(ours(**transposed), expected, rtol=0, atol=0)


def test_leading_dimensions():
    inputs, _ = make(6, 36, 300, torch.float16, ("norm_gain", "stream", "residual"))
    expected = linear(**inputs)
    inputs |= {name: inputs[name].view(2, 3, -1) for name in ("x", "stream", "residual")}
    for got, wanted in zip(linear(**inputs), expected):
        assert torch.equal(got, wanted.view(2, 3, -1))
    inputs |= {name: inputs[name][0, 0] for name in ("x", "stream", "residual")}
    for got, wanted in zip(linear(**inputs), expected):
        assert torch.equal(got, wanted[0])


@pytest.mark.parametrize("rows", [5, 20, 70])
@pytest.mark.parametrize("options", [("norm_gain",), ("stream",), OPTIONS["all-swiglu"]], ids="-".join)
def test_a_stream_of_fp32_over_weights_of_16_bits(options, rows):
    """What was normalised in fp32 is rounded once, to the product's dtype; the stream stays what it is."""
    inputs, activation = make(rows, 36, 300, torch.float32, options)
    inputs["weight"] = inputs["weight"].half()
    inputs |= {name: inputs[name].half() for name in ("x", "bias") if "stream" in inputs and name in inputs}
    ours, theirs = runs(activation)
    got, plain = ours(**inputs), theirs(**inputs)
    exact = theirs(**{name: t.double() for name, t in inputs.items()})
    if "stream" not in inputs:
        got, plain, exact = (got,), (plain,), (exact,)
    else:
        assert got[1].dtype == torch.float32
    assert got[0].dtype == (torch.float32 if "residual" in inputs else torch.float16)
    for ours, theirs, true in zip(got, plain, exact):
        check(ours, true, theirs)


def test_quantised_weights_under_a_stream_of_fp32():
    """`dtype` says what the product is of, where neither x nor the weights do."""
    inputs, _ = make(4, 36, 300, torch.float32, ("norm_gain",), stored=torch.int8)
    got, plain = (run(**inputs, dtype=torch.float16) for run in runs())
    exact = reference.linear(LinearArgs(**{name: t if name == "weight" else t.double() for name, t in inputs.items()}))
    assert got.dtype == torch.float16
    check(got, exact, plain)


def test_mixed_dtypes():
    """Bias, norm and residual have dtypes of their own; the result is promoted with the residual's alone."""
    inputs, activation = make(4, 36, 300, torch.float32, OPTIONS["all-gelu"], grad=True)
    inputs |= {name: inputs[name].detach().half() for name in ("x", "weight", "beside")}
    ours, theirs = runs(activation)

    def rounded(**tensors):  # PyTorch's linear takes one dtype
        return theirs(**tensors | {"bias": tensors["bias"].to(tensors["x"].dtype)})

    assert ours(**inputs).dtype == torch.float32 and ours(**inputs | {"residual": None}).dtype == torch.float16
    check_gradients(ours, rounded, inputs)


def test_offset_rows():
    """A mean far from zero: the variance is centred, not a difference of squares."""
    inputs, _ = make(3, 24, 300, torch.float32, ("norm_gain", "norm_bias"))
    inputs["x"] += 1000
    check_gradients(*runs(), inputs)


@pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")  # numpy's, of an overflow that is meant
def test_overflow():
    """Only the rows of the result that depend on a NaN or an infinity have one; far gates close and open."""
    inputs, activation = make(4, 40, 300, torch.float32, ("swiglu",))
    inputs["x"][1, 7] = torch.nan
    inputs["x"][2] *= 1e4
    got, expected = (run(**inputs) for run in runs(activation))
    assert got[1].isnan().all() and torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(got[2], expected[2], rtol=1e-4, atol=1.0)  # of values around 1e7


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), OPTIONS["all-swiglu"]], ids=["plain", "all"])
def test_a_run_shares_a_workspace(options):
    """It serves call after call, of any shape: equal bits, and counters that are zero again."""
    calls = [make(5, width, dim, torch.float32, options) for width, dim in ((60, 300), (40, 150), (70, 400))]
    expected = [linear(**inputs, activation=activation) for inputs, activation in calls]
    with sharing() as workspace:
        for number in (0, 1, 2, 1, 0):
            inputs, activation = calls[number]
            if number == 1:
                workspace._sums.fill_(torch.nan)
            got, total = linear_fwd(LinearArgs(**inputs, activation=activation))
            torch.testing.assert_close((got, total) if total.numel() else got, expected[number], rtol=0, atol=0)
            assert len(workspace._counters) == COUNTERS and not workspace._counters.any()


def test_every_split_is_summed():
    """Ones times ones: each partial sum counts its own values, whatever the last share is."""
    for dim in (129, 256, 640, 1000):
        x, weight = (torch.ones(shape, device=DEVICE, dtype=torch.float16) for shape in ((17, dim), (5, dim)))
        with sharing() as workspace:
            assert (linear_fwd(LinearArgs(x, weight))[0] == dim).all()
        sums = workspace._sums.view(-1, 17, 5)
        assert len(sums) > 1 and (sums > 0).all() and (sums.sum(0) == dim).all()


@pytest.mark.parametrize(
    "rows, dtype, kernel",
    [
        (16, torch.float16, "_skinny_linear_fwd_kernel"),
        (17, torch.float16, "_linear_fwd_kernel"),
        (1, torch.float32, "_linear_fwd_kernel"),
    ],
)
@pytest.mark.parametrize("options", [(), OPTIONS["all-gelu"]], ids=["plain", "all"])
def test_up_to_16_rows_of_16_bits_are_skinny(rows, dtype, kernel, options):
    inputs, activation = make(rows, 36, 300, dtype, options)
    with launch.recording() as recorded:
        linear(**inputs, activation=activation)
    assert recorded[-1].kernel.__name__ == kernel


def test_a_norm_of_long_rows_is_a_kernel_of_its_own():
    """Registers do not hold them beside the weights; the result is the same."""
    rows, dim = 16, 1100
    assert not skinny_linear.holds(rows, dim) and skinny_linear.holds(rows, 1000) and skinny_linear.holds(3, 3072)
    inputs, activation = make(rows, 20, dim, torch.float16, ("stream", "norm_gain", "swiglu"))
    ours, theirs = runs(activation)
    with launch.recording() as recorded:
        ours(**inputs)
    assert [variant.kernel.__name__ for variant in recorded][-1] == "_skinny_linear_fwd_kernel" and len(recorded) == 3
    check_gradients(ours, theirs, inputs)


def test_a_workspace_is_of_the_run_around_and_of_one_thread():
    own, seen = Workspace(), []
    with sharing(own) as outer, sharing() as inner:
        at_once(lambda _: seen.append(current()), range(2))
        assert outer is inner is current() is own
    assert own not in seen and len(set(map(id, seen))) == 2 and current() is not own


@pytest.mark.parametrize("inner", [1, 16, 512, 768, 1024, 1536, 2048, 3040, 3072, 4096, 12288])
@pytest.mark.parametrize("dim", [40, 768, 1024, 3072, 8192])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_config_fills_the_chip(inner, dim, itemsize):
    for rows in (1, 16, 17, 64):
        config = linear_config(rows, inner, dim, itemsize)
        assert config.block_m >= rows
        programs, steps = -(-inner // config.block_n) * config.splits, -(-dim // config.block_k)
        assert programs >= 96 or config.splits > min(32, steps) / 2
        assert programs <= 400 or config.splits == 1
        share = -(-dim // (config.block_k * config.splits)) * config.block_k
        assert (config.splits - 1) * share < dim <= config.splits * share
        tiles = -(-inner // config.block_n) + 1  # one more where a weight stands beside
        assert config.splits == 1 or tiles <= COUNTERS


def test_many_rows_are_left_to_pytorch():
    inputs, activation = make(65, 36, 52, torch.float32, OPTIONS["all-gelu"], grad=True)
    ours, theirs = runs(activation)
    torch.testing.assert_close(ours(**inputs), theirs(**inputs), rtol=1e-5, atol=1e-5)  # the norm is a kernel
    check_gradients(ours, theirs, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [5, 20])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend, rows):
    torch._dynamo.reset()
    inputs, activation = make(rows, 36, 300, torch.float32, OPTIONS["all-swiglu"], grad=True)
    compiled = torch.compile(linear, fullgraph=True, backend=backend)
    check_gradients(*runs(activation, compiled), inputs)
    with torch.no_grad():
        got, expected = (run(**inputs, activation=activation) for run in (compiled, linear))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("stored", [None, torch.int8], ids=["fp32", "int8"])
def test_op(stored):
    inputs, activation = make(2, 12, 20, torch.float32, OPTIONS["all-gelu"], grad=True, stored=stored)
    names = "x", "weight", "bias", "beside", "scale", "stream", "stream_gain", "norm_gain", "norm_bias"
    arguments = *(inputs.get(name) for name in names), 1e-5, activation, inputs["residual"], torch.float32
    torch.library.opcheck(module._linear, arguments)


def test_the_door():
    """`ops.linear` takes the kernel, except under autocast and in fp64, and takes the reference where it is told to."""
    inputs, _ = make(3, 36, 300, torch.float32, ("norm_gain",))
    with ops.using("triton"):
        assert torch.equal(ops.linear(**inputs), linear(**inputs))
        with torch.autocast(DEVICE, torch.bfloat16):
            assert ops.linear(inputs["x"], inputs["weight"]).dtype == torch.bfloat16
        assert ops.linear(**{name: t.double() for name, t in inputs.items()}).dtype == torch.float64
    with ops.using("reference"):
        assert torch.equal(ops.linear(**inputs), reference.linear(LinearArgs(**inputs)))


@pytest.mark.parametrize("activation", [None, "gelu", "swiglu"])
def test_gradients_of_the_reference(activation):
    options = OPTIONS["all-swiglu" if activation == "swiglu" else "all-gelu"] + ("stream",)
    options = [name for name in options if name not in ("gelu", "swiglu") or name == activation]
    inputs, _ = make(2, 6, 5, torch.float64, options, grad=True)
    _, theirs = runs(activation)
    assert torch.autograd.gradcheck(lambda *tensors: theirs(**dict(zip(inputs, tensors))), tuple(inputs.values()))


X, WEIGHT = torch.zeros(2, 8, device=DEVICE), torch.zeros(6, 8, device=DEVICE)
VECTOR = torch.zeros(6, device=DEVICE)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(activation="relu"), ValueError, "activation='relu'; it must be None, 'gelu' or 'swiglu'"),
        (dict(x=X.double()), TypeError, "x has dtype torch.float64; it must be one of float32, bfloat16, float16"),
        (dict(x=X[:0]), ValueError, "x has shape (0, 8); no dimension may be zero"),
        (dict(x=X[0, 0]), ValueError, "x has shape (), weight (6, 8); they must be (..., in), (out, in)"),
        (dict(weight=WEIGHT[0]), ValueError, "x has shape (2, 8), weight (8,); they must be (..., in), (out, in)"),
        (dict(weight=WEIGHT[:, :7]), ValueError, "weight has shape (6, 7); it must be (6, 8)"),
        (
            dict(weight=WEIGHT[:5], activation="swiglu"),
            ValueError,
            "weight has 5 rows; 'swiglu' needs one weight",
        ),
        (dict(beside=WEIGHT, activation="swiglu"), ValueError, "a weight stands beside; 'swiglu' needs one weight"),
        (dict(beside=WEIGHT[:, :7]), ValueError, "beside has shape (6, 7); it must be (6, 8)"),
        (dict(stream=X), ValueError, "stream and stream_gain must be given together"),
        (dict(stream=X[:1], stream_gain=X[0]), ValueError, "stream has shape (1, 8); it must be (2, 8)"),
        (dict(dtype=torch.float16), TypeError, "dtype=torch.float16; without a norm it must be that of x"),
        (dict(weight=WEIGHT.new_zeros(8, 6).t()), ValueError, "weight has stride 6 in its last dimension"),
        (dict(weight=WEIGHT.to("meta")), ValueError, f"weight is on meta; it must be on {X.device}"),
        (
            dict(x=X.bfloat16()),
            TypeError,
            "weight has dtype torch.float32; without a scale it must be that of the product, torch.bfloat16",
        ),
        (dict(weight=WEIGHT.to(torch.int8)), TypeError, "weight has dtype torch.int8; without a scale"),
        (dict(scale=VECTOR), TypeError, "weight (with a scale) has dtype torch.float32; it must be one of int8"),
        (dict(weight=WEIGHT.to(torch.int8), scale=VECTOR.half()), TypeError, "scale has dtype torch.float16"),
        (dict(bias=VECTOR[:5]), ValueError, "bias has shape (5,); it must be (6,)"),
        (dict(bias=VECTOR.int()), TypeError, "bias has dtype torch.int32"),
        (dict(norm_gain=VECTOR), ValueError, "norm_gain has shape (6,); it must be (8,)"),
        (dict(norm_gain=X[0], norm_bias=VECTOR), ValueError, "norm_bias has shape (6,); it must be (8,)"),
        (dict(bias=VECTOR.repeat(2)[::2]), ValueError, "bias has stride 2 in its last dimension"),
        (dict(residual=X), ValueError, "residual has shape (2, 8); it must be (2, 6)"),
        (dict(residual=X[:, :6], activation="swiglu"), ValueError, "residual has shape (2, 6); it must be (2, 3)"),
        (dict(residual=X[:, :6].double()), TypeError, "residual has dtype torch.float64"),
    ],
    ids=lambda value: None if not isinstance(value, dict) else "-".join(value),
)
def test_messages(change, error, message):
    with pytest.raises(error) as raised:
        linear(**dict(x=X, weight=WEIGHT) | change)
    assert message in str(raised.value)
