"""The diffusion step kernel against its reference: results, gradients, noise, in-place results, errors."""

from functools import partial

import pytest
import torch

from fastprior.kernels import ops, reference
from fastprior.kernels.gpu import launch, step
from fastprior.kernels.reference import StepArgs
from helpers.kernel_checks import DEVICE, DTYPES, check, check_gradients, guarded, random, sliced
from helpers.pairwise import pairwise

STEPS = 7
SHAPES = [(1, 1), (3, 2), (2, 257), (5, 100), (2, 4096)]
GUIDANCE = {"no guidance": (), "null rows": ("null_pred",), "null table": ("null_table",)}


def diffusion_step(*given, **options):
    return step.diffusion_step(StepArgs(*given, **options))


def exact_step(*given, **options):
    return reference.diffusion_step(StepArgs(*given, **options))


def make_inputs(rows, dim, *, guidance="null rows", dtype=torch.float32, per_row=False, noise=True):
    tensors = {name: random(rows, dim, seed=seed, grad=True) for seed, name in enumerate(("x", "x0_prev", "noise"))}
    tensors["pred"] = random(rows, dim, seed=3, dtype=dtype, grad=True)
    tensors["null_pred"] = random(rows, dim, seed=4, dtype=dtype, grad=True)
    tensors["null_table"] = random(STEPS, dim, seed=5, dtype=dtype, grad=True)
    for name in {"null_pred", "null_table"} - set(GUIDANCE[guidance]):
        tensors[name] = None
    tensors["table"] = random(STEPS, 6, seed=6, grad=True)
    tensors["cond_scale"] = random(*((rows,) if per_row else ()), seed=7, grad=guidance != "no guidance")
    index = torch.arange(rows) * 3 % STEPS if per_row else torch.tensor(4)
    tensors["index"] = index.to(DEVICE)
    tensors["seed"] = None
    if not noise:
        tensors |= dict(noise=None, seed=torch.tensor(-(2**40) + 12345, device=DEVICE))
    return tensors


def compare(inputs, run=diffusion_step, exact=exact_step, **options):
    with guarded():
        check_gradients(partial(run, **options), partial(exact, **options), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    compare(make_inputs(*shape, dtype=dtype))


@pytest.mark.parametrize(
    "clamp, guidance, steps, noise",
    pairwise(clamp=step.CLAMPS, guidance=GUIDANCE, steps=["one step", "step by row"], noise=["noise", "seed"]),
)
def test_options(clamp, guidance, steps, noise):
    inputs = make_inputs(5, 72, guidance=guidance, per_row=steps == "step by row", noise=noise == "noise")
    compare(inputs, clamp=clamp, radius=0.7)


@pytest.mark.parametrize("noise", [True, False], ids=["noise", "seed"])
def test_table_is_preferred_to_null_rows(noise):
    inputs = make_inputs(5, 72, guidance="null table", noise=noise) | dict(null_pred=random(5, 72, seed=8))
    compare(inputs)


@pytest.mark.parametrize("name", ["cond_scale", "index"])
def test_one_value_as_a_vector(name):
    inputs = make_inputs(5, 72)
    expected = diffusion_step(**inputs)
    found = diffusion_step(**inputs | {name: inputs[name].reshape(1)})
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_mixed_dtypes():
    """fp16 predictions, an fp32 null table."""
    inputs = make_inputs(5, 72, guidance="null table")
    compare(inputs | dict(pred=random(5, 72, dtype=torch.float16, grad=True)))


def test_row_strides():
    inputs = make_inputs(5, 72) | dict(null_table=random(STEPS, 72, seed=5))
    rows = "x", "pred", "null_pred", "x0_prev", "noise", "null_table", "table"
    strided = inputs | {name: sliced(inputs[name]) for name in rows}
    for a, b in zip(diffusion_step(**strided), diffusion_step(**inputs)):
        assert torch.equal(a, b)


def test_noise_is_that_of_the_reference():
    """And standard normal, different in every row, step and seed."""
    rows, dim = 16, 512
    table = torch.tensor([[0.0, 0, 0, 0, 0, 1]], device=DEVICE).expand(STEPS, -1)
    zeros = torch.zeros(rows, dim, device=DEVICE)

    def draw(seed, index):
        seed, index = (torch.tensor(value, device=DEVICE) for value in (seed, index))
        with guarded():
            noise, _ = diffusion_step(zeros, zeros, None, seed.float(), zeros, None, table, index, seed=seed)
        return noise, reference.philox_normal(seed, index.expand(rows), dim)

    noise, exact = draw(11, 3)
    check(noise, exact, exact)
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    others = draw(12, 3)[0], draw(11, 4)[0], draw(11 + 2**32, 3)[0], noise.roll(1, 0), noise.roll(1, 1)
    for other in others:
        assert abs((noise * other).mean()) < 4 / noise.numel() ** 0.5


@pytest.mark.parametrize("clamp", step.CLAMPS)
@pytest.mark.parametrize("strided", [False, True])
def test_in_place(clamp, strided):
    """Results in x and x0_prev themselves equal those in new tensors, step after step, as in a captured graph."""
    inputs = {name: t if t is None else t.detach() for name, t in make_inputs(5, 300, noise=False).items()}
    inputs |= dict(clamp=clamp, radius=0.7)
    x, x0 = inputs["x"], inputs["x0_prev"]
    state = sliced(x) if strided else x.clone(), sliced(x0) if strided else x0.clone()
    for index in range(3):
        inputs["index"] = torch.tensor(index, device=DEVICE)
        x, x0 = diffusion_step(**inputs | dict(x=x, x0_prev=x0))
        given = inputs | dict(x=state[0], x0_prev=state[1])
        step.diffusion_step_into(state, StepArgs(**given))
        assert torch.equal(state[0], x) and torch.equal(state[1], x0)


def test_results_in_given_tensors():
    inputs = make_inputs(5, 72) | dict(clamp="l2", radius=2.0)
    out = torch.empty(2, 5, 72, device=DEVICE).unbind()
    step.diffusion_step_into(out, StepArgs(**inputs))
    assert all(torch.equal(a, b) for a, b in zip(out, diffusion_step(**inputs)))


@pytest.mark.parametrize("clamp", step.CLAMPS)
def test_nan_is_not_hidden_by_a_clamp(clamp):
    inputs = {name: t if t is None else t.detach() for name, t in make_inputs(2, 72).items()}
    inputs["pred"][1, 5] = float("nan")
    found, expected = (op(**inputs, clamp=clamp) for op in (diffusion_step, exact_step))
    for a, b in zip(found, expected):
        assert torch.equal(a.isnan(), b.isnan()) and b.isnan().any()


@pytest.mark.filterwarnings("ignore")
def test_zero_row_under_the_floor_of_l2():
    inputs = make_inputs(2, 72, guidance="no guidance")
    with torch.no_grad():
        for name in ("x", "pred"):
            inputs[name][1] = 0
    compare({name: t if t is None else t.detach() for name, t in inputs.items()}, clamp="l2")


def test_long_rows_are_left_to_pytorch():
    inputs = make_inputs(2, step.MAX_DIM + 1)
    with launch.recording() as variants:
        compare(inputs, clamp="l2")
    assert not variants
    with pytest.raises(ValueError, match="dim=4097; it must be at most 4096"):
        step.diffusion_step_config(4097)


def test_deterministic():
    inputs = make_inputs(5, 300, noise=False)
    first, second = (diffusion_step(**inputs, clamp="l2") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_inputs_are_left_alone():
    inputs = make_inputs(5, 72)
    before = {name: t if t is None else t.detach().clone() for name, t in inputs.items()}
    diffusion_step(**inputs, clamp="range")
    assert all(t is None or torch.equal(before[name], t) for name, t in inputs.items())


@pytest.mark.slow
@pytest.mark.parametrize("backend, noise", [("aot_eager", True), ("aot_eager", False), ("inductor", True)])
def test_compiled(backend, noise):
    def between_other_operations(function, x, pred, **given):
        x, x0 = function(x * 2, pred + 1, **given, clamp="l2", radius=3.0)
        return x.sin(), x0 * 2

    compiled = torch.compile(partial(between_other_operations, diffusion_step), fullgraph=True, backend=backend)
    compare(make_inputs(3, 72, noise=noise), compiled, partial(between_other_operations, exact_step))


@pytest.mark.slow
@pytest.mark.parametrize("noise", [True, False], ids=["noise", "seed"])
def test_opcheck(noise):
    given = make_inputs(3, 72, guidance="null table", per_row=True, noise=noise)
    names = "x", "pred", "null_pred", "cond_scale", "x0_prev", "noise", "table", "index"
    torch.library.opcheck(
        step._diffusion_step, (*(given[name] for name in names), "l2", 0.7, given["null_table"], given["seed"])
    )


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("clamp", step.CLAMPS)
def test_reference_gradients(clamp, guidance):
    given = make_inputs(2, 5, guidance=guidance)
    given = {
        name: t.detach().double().requires_grad_() if t is not None and t.is_floating_point() else t
        for name, t in given.items()
    }
    names = [name for name, t in given.items() if t is not None and t.requires_grad]
    if guidance == "no guidance":
        names.remove("cond_scale")

    def run(*tensors):
        return exact_step(**given | dict(zip(names, tensors)), clamp=clamp)

    assert torch.autograd.gradcheck(run, tuple(given[name] for name in names))


def test_dispatch():
    inputs = make_inputs(3, 72)
    with ops.using("triton"):
        found = ops.diffusion_step(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, diffusion_step(**inputs)))


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (dict(clamp="clip"), ValueError, "clamp='clip'; it must be None, 'range' or 'l2'"),
        (dict(x=random(8)), ValueError, r"x has shape \(8,\); it must be \(rows, dim\)"),
        (dict(x=random(4, 8, dtype=torch.float16)), TypeError, "x has dtype torch.float16; it must be one of float32"),
        (dict(x0_prev=random(4, 8).double()), TypeError, "x0_prev has dtype torch.float64; it must be one of float32"),
        (dict(noise=random(4, 8, dtype=torch.float16)), TypeError, "noise has dtype torch.float16; it must be one of"),
        (dict(table=random(STEPS, 6).double()), TypeError, "table has dtype torch.float64; it must be one of float32"),
        (dict(pred=random(4, 8).int()), TypeError, "pred has dtype torch.int32; it must be one of float32, bfloat16"),
        (dict(pred=random(4, 9)), ValueError, r"pred has shape \(4, 9\); it must be \(4, 8\)"),
        (dict(null_table=random(3, 8)), ValueError, r"null_table has shape \(3, 8\); it must be \(7, 8\)"),
        (dict(table=random(STEPS, 5)), ValueError, r"table has shape \(7, 5\); it must be \(7, 6\)"),
        (dict(table=random(6)), ValueError, r"table has shape \(6,\); it must be \(steps, 6\)"),
        (dict(noise=random(8, 4).t()), ValueError, "noise has stride 4 in its last dimension; it must be contiguous"),
        (dict(index=torch.tensor([1, 2])), ValueError, r"index has shape \(2,\); it must be \(4,\)"),
        (dict(index=torch.tensor(1.0)), TypeError, "index has dtype torch.float32; it must be one of int64"),
        (dict(cond_scale=random(4, 1)), ValueError, r"cond_scale has shape \(4, 1\); it must be \(4,\)"),
        (dict(noise=None), ValueError, "noise=None and seed=None; one of them must be given"),
        (dict(seed=random(1)), TypeError, "seed has dtype torch.float32; it must be one of int64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(changed, error, message):
    with pytest.raises(error, match=message):
        diffusion_step(**make_inputs(4, 8) | changed)
