"""The norm kernels against their reference: results, gradients, layouts, compilation and errors."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastprior.kernels import ops, reference
from fastprior.kernels.gpu import launch, norm
from fastprior.kernels.reference import NormArgs
from helpers.kernel_checks import DTYPES, check_gradients, guarded, random
from helpers.pairwise import pairwise

OPTIONS = {
    "plain": {},
    "stable": dict(stable=True),
    "rms": dict(rms=True),
    "rms stable": dict(rms=True, stable=True),
    "l2": dict(l2=True),
    "rms l2": dict(rms=True, l2=True),
    "all": dict(stable=True, l2=True),
}
SHAPES = [(1, 1), (3, 2), (1, 257), (33, 100), (2, 3, 64), (2, 4096)]


def layer_norm(*given, **options):
    return norm.layer_norm(NormArgs(*given, **options))


def exact_norm(*given, **options):
    return reference.layer_norm(NormArgs(*given, **options))


def make_inputs(*shape, dtype=torch.float32, gain_dtype=torch.float32, seed=0):
    """All tensors that the op takes, away from the zero row maxima that `stable` would divide by."""
    names = "x", "residual", "after"
    inputs = {name: random(*shape, dtype=dtype, seed=seed + i, grad=True) for i, name in enumerate(names)}
    inputs["gain"] = (random(shape[-1], seed=seed + 3) + 1).to(gain_dtype).detach().requires_grad_()
    inputs["bias"] = random(shape[-1], dtype=gain_dtype, seed=seed + 4, grad=True)
    return inputs


def pick(inputs, *names):
    return {name: inputs[name] for name in names}


def compare(inputs, run=layer_norm, exact=exact_norm, **options):
    with guarded():
        check_gradients(partial(run, **options), partial(exact, **options), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_shapes(shape, dtype, name):
    if shape[-1] <= 2 and name == "all":
        pytest.skip("a normalised row of one or two elements is a sign: nothing is left to compare")
    inputs = make_inputs(*shape, dtype=dtype)
    names = ("x", "gain", "bias") if name == "plain" else tuple(inputs)
    compare(pick(inputs, *names), **OPTIONS[name])


@pytest.mark.parametrize(
    "name, vectors, dtype",
    pairwise(name=OPTIONS, vectors=[(), ("gain",), ("bias",), ("gain", "bias")], dtype=DTYPES),
    ids=str,
)
def test_options(name, vectors, dtype):
    inputs = pick(make_inputs(19, 72, dtype=dtype), "x", *vectors)
    compare(inputs, eps=1e-3, **OPTIONS[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", [("residual",), ("after",), ("residual", "after")], ids="+".join)
def test_fused_sums(names, dtype):
    inputs = pick(make_inputs(19, 72, dtype=dtype), "x", "gain", *names)
    compare(inputs)


@pytest.mark.parametrize("needed", ["x", "residual", "gain", "bias", "after"])
def test_gradient_of_one_input_alone(needed):
    inputs = make_inputs(19, 72)
    inputs = {name: t.detach().requires_grad_(name == needed) for name, t in inputs.items()}

    def run(function, **given):
        return function(**given, l2=True)[0]

    compare(inputs, partial(run, layer_norm), partial(run, exact_norm))


@pytest.mark.parametrize("used", [0, 1], ids=["norm", "sum"])
def test_gradient_of_one_result_alone(used):
    inputs = pick(make_inputs(19, 72), "x", "gain", "residual")
    if used == 1:
        inputs["gain"] = inputs["gain"].detach()
    compare(inputs, lambda **i: layer_norm(**i)[used], lambda **i: exact_norm(**i)[used])


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("wide", ["x", "residual", "after", "gain"])
def test_mixed_dtypes(wide, dtype):
    """One tensor is fp32 among fp16 ones; the reference in fp64 sees the same, already rounded, values."""
    inputs = make_inputs(19, 72, dtype=torch.float16, gain_dtype=torch.float16)
    inputs[wide] = inputs[wide].detach().float().requires_grad_()

    def exact_or_plain(x, **others):
        return exact_norm(x, dtype=torch.float64 if x.dtype == torch.float64 else dtype, **others)

    compare(inputs, partial(layer_norm, dtype=dtype), exact_or_plain)


LAYOUTS = {
    "sliced": lambda t: F.pad(t.repeat_interleave(2, 0), (1, 3))[::2, ..., 1:-3],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "last dimension strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 72), (3, 5, 72)], ids=str)
def test_layouts(layout, shape):
    """Of inputs and of cotangents: what follows the op has the same layout."""
    change = LAYOUTS[layout]

    def run(function, **given):
        given = {name: change(t) if t.ndim > 1 else t for name, t in given.items()}
        assert not given["x"].is_contiguous()
        return tuple(change(out) for out in function(**given))

    compare(make_inputs(*shape), partial(run, layer_norm), partial(run, exact_norm))


def test_programs_that_take_several_tiles(monkeypatch):
    monkeypatch.setattr(norm, "PARTS", 2)
    compare(make_inputs(norm.layer_norm_config(72).rows * 4 + 5, 72))


def test_long_rows_are_left_to_pytorch():
    inputs = make_inputs(2, norm.MAX_DIM + 1)
    with launch.recording() as variants:
        compare(inputs)
    assert not variants
    with pytest.raises(ValueError, match="dim=4097; it must be at most 4096"):
        norm.layer_norm_config(4097)


def test_rms_norm():
    inputs = pick(make_inputs(5, 72), "x", "gain", "after")
    compare(inputs, partial(layer_norm, rms=True), partial(exact_norm, rms=True), eps=1e-2)


@pytest.mark.parametrize("length", [0.0, 1e-14])
def test_rows_shorter_than_the_floor_of_l2(length):
    """The divisor is the floor, a constant, and not the length."""
    inputs = pick(make_inputs(3, 72), "x", "gain")
    with torch.no_grad():
        inputs["gain"] *= length
    compare(inputs, l2=True)


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("rms", [False, True])
def test_eps_of_zero(rms):
    """Rows beyond the last, which are all zeros, must not leak into the gradient of the gain."""
    inputs = pick(make_inputs(3, 72), "x", "gain")
    compare(inputs, eps=0.0, rms=rms)


def test_large_mean_keeps_the_variance():
    inputs = pick(make_inputs(5, 100), "x", "gain")
    with torch.no_grad():
        inputs["x"] += 1000
    compare(inputs)


def test_sum_is_rounded_before_it_is_normalised():
    """As if the user had added: bits equal those of the norm of the returned sum."""
    inputs = pick(make_inputs(9, 72, dtype=torch.float16), "x", "gain", "residual")
    out, total = layer_norm(**inputs)
    assert torch.equal(total, inputs["x"] + inputs["residual"])
    assert torch.equal(out, layer_norm(total, inputs["gain"]))


def test_deterministic():
    inputs = make_inputs(70, 100)
    cotangents = [random(70, 100, seed=9), random(70, 100, seed=10)]

    def run():
        outputs = layer_norm(**inputs, stable=True, l2=True)
        return *outputs, *torch.autograd.grad(outputs, list(inputs.values()), cotangents)

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)


def test_inputs_are_left_alone():
    inputs = make_inputs(5, 72)
    before = {name: t.detach().clone() for name, t in inputs.items()}
    cotangents = [random(5, 72, seed=9), random(5, 72, seed=10)]
    kept = [c.clone() for c in cotangents]
    torch.autograd.grad(layer_norm(**inputs, l2=True), list(inputs.values()), cotangents)
    assert all(torch.equal(before[name], t) for name, t in inputs.items())
    assert all(torch.equal(c, k) for c, k in zip(cotangents, kept))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    options = dict(stable=True, l2=True)

    def between_other_operations(function, x, residual, after, **given):
        out, total = function(x * 2, residual=residual + 1, after=after, **given, **options)
        return out * 3, total.sin()

    compiled = torch.compile(partial(between_other_operations, layer_norm), fullgraph=True, backend=backend)
    check_gradients(compiled, partial(between_other_operations, exact_norm), make_inputs(9, 72))


@pytest.mark.parametrize("full", [False, True], ids=["plain", "all"])
def test_opcheck(full):
    x, residual, after, gain, bias = make_inputs(5, 72).values()
    if not full:
        residual = after = gain = bias = None
    arguments = x, gain, bias, residual, after, 1e-5, full, False, full, torch.float32
    torch.library.opcheck(norm._layer_norm, arguments)
    dout, dtotal, total, gain, bias = (None if t is None else t.detach() for t in (x, residual, x, gain, bias))
    norm_args = NormArgs(total, gain, bias, stable=full, l2=full)
    torch.library.opcheck(norm._layer_norm_bwd, (*norm_args, dout, dtotal, True, full, full))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reference_gradients(options):
    inputs = {name: t.detach().double().requires_grad_() for name, t in make_inputs(3, 6).items()}
    if options.get("stable"):  # whose divisor is a constant by definition, which finite differences do not know
        pytest.skip("not the derivative of the function")

    def run(*tensors):
        return exact_norm(**dict(zip(inputs, tensors)), **options)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


def test_dispatch():
    inputs = pick(make_inputs(5, 72), "x", "gain")
    with ops.using("triton"):
        assert torch.equal(ops.layer_norm(**inputs), layer_norm(**inputs))


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (dict(x=random(4, 8).double()), TypeError, "x has dtype torch.float64; it must be one of float32"),
        (dict(x=random(0, 8)), ValueError, r"x has shape \(0, 8\); no dimension may be zero"),
        (dict(x=random(1)[0]), ValueError, "x has no dimensions"),
        (dict(gain=random(7)), ValueError, r"gain has shape \(7,\); it must be \(8,\)"),
        (dict(bias=random(4, 8)), ValueError, r"bias has shape \(4, 8\); it must be \(8,\)"),
        (dict(residual=random(8)), ValueError, r"residual has shape \(8,\); it must be \(4, 8\)"),
        (dict(after=random(4, 8).int()), TypeError, "after has dtype torch.int32; it must be one of float32"),
        (dict(after=random(4, 8).to("meta")), ValueError, "after is on meta; it must be on"),
        (dict(dtype=torch.float64), TypeError, "dtype=torch.float64; it must be float32, bfloat16 or float16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(changed, error, message):
    with pytest.raises(error, match=message):
        layer_norm(**(dict(x=random(4, 8)) | changed))
