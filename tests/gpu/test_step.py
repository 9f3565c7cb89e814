"""The diffusion step kernel against its reference: results, gradients, noise, in-place results, errors."""

from functools import partial

import pytest
import torch

from fastprior.kernels import ops, reference
from fastprior.kernels.gpu import launch, step
from fastprior.kernels.reference import StepArgs
from helpers.kernel_checks import CANARY, DEVICE, DTYPES, check, check_gradients, guarded, random, sliced
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


# steps that write the tokens of the next

CLAMPED = {None: (torch.inf, 0.0), "range": (0.7, 0.0), "l2": (torch.inf, 0.9)}


def make_run(
    samples=3, dim=40, width=None, *, rows=None, together=1, guided=0, times=1, null=False, clamps=(None,),
    positions=False, of_prediction=False, dtype=torch.float16, index=0,
):  # fmt: skip
    """A run's state, a prediction, its tables, and the clamp of each of its steps."""
    width, steps = width or dim, STEPS
    index = torch.as_tensor(index).expand(samples).contiguous().to(DEVICE)
    x, x0 = random(2, samples, dim).unbind()
    state = step.RunState(
        x.clone(), x0.clone(), index, random(samples, seed=2), random(steps, samples, dim, seed=3)
    )  # fmt: skip
    clamps = [clamps[number % len(clamps)] for number in range(steps)]
    tables = step.RunTables(
        random(steps, 6, seed=4),
        torch.tensor([CLAMPED[name] for name in clamps], device=DEVICE) if any(clamps) else None,
        random(steps, dim, dtype=dtype, seed=5) if null else None,
        random(steps, times, width, dtype=dtype, seed=6),
        random(width, dtype=dtype, seed=7),
        random(times, width, seed=8) if positions else None,
        random(width, seed=9) if positions else None,
        of_prediction,
    )
    assert (samples + guided) % together == 0
    pred = random((samples + guided) // together, together, dim, dtype=dtype, seed=10)
    return state, pred, tables, clamps


def stepped(state, pred, tables, clamps):
    """x and x0 of each sample by `reference.diffusion_step`, in fp64, and the steps that follow."""
    samples, of_all = len(state.x), pred.double().flatten(0, 1)
    guided, found = len(of_all) - samples, []
    for number in range(samples):
        row, at = slice(number, number + 1), state.index[number]
        null = of_all[samples + number, None] if number < guided else of_all[row] if guided else None
        scale, noise, x = (t.double() for t in (state.scale[row], state.noise[at, row], state.x[row]))
        null_table = None if tables.null is None or guided else tables.null.double()
        x0_prev, table = state.x0[row].double(), tables.coefficients.double()
        limits = dict(clamp=clamps[at], radius={"l2": 0.9}.get(clamps[at], 0.7), null_table=null_table)
        given = of_all[row], null, scale
        if tables.of_prediction:
            guiding = null if null_table is None else null_table[at, None]
            x0_prev = of_all[row] if guiding is None else guiding + (of_all[row] - guiding) * scale
        x, x0 = exact_step(x, *given, x0_prev, noise, table, at[None], **limits)
        found.append((x, x0_prev if tables.of_prediction else x0))
    x, x0 = (torch.cat(parts) for parts in zip(*found))
    return x, x0, (state.index + 1) % STEPS


def tokens_of(x, index, tables, rows, together):
    """Of every row: times, the noisy embeddings of its samples (NaN where these have another width), and queries."""
    time, query = (t.float() for t in (tables.time[index], tables.query))
    time = time if tables.time_position is None else time + tables.time_position
    query = query if tables.query_position is None else query + tables.query_position
    samples = [number % len(x) for number in range(rows * together)]
    queries = query.expand(rows, together, -1)
    noisy = x[samples].view(rows, together, -1) if x.shape[1] == len(query) else torch.full_like(queries, torch.nan)
    return torch.cat((time[samples[::together]], noisy, queries), dim=1)


def advance(state, pred, tables, *, updates=True, enters=False):
    rows, together, dim = pred.shape
    _, times, width = tables.time.shape
    entry = None
    with guarded():
        tokens = launch.empty((rows, times + 2 * together, width), state.x)
        if enters:
            entry = launch.empty((rows * together, dim), state.x)
        step.launch_advance(state, pred, tables, tokens, entry, updates=updates)
    return tokens, entry


def check_advance(state, pred, tables, clamps, *, count=1, updates=True, enters=False):
    """Steps one after the other, each from what the one before left."""
    rows, together, _ = pred.shape
    for _ in range(count):
        wanted = stepped(state, pred, tables, clamps) if updates else (state.x.clone(), state.x0.clone(), state.index)
        tokens, entry = advance(state, pred, tables, updates=updates, enters=enters)
        for got, exact in zip(state[:2], wanted):
            torch.testing.assert_close(got.double(), exact.double(), rtol=1e-5, atol=1e-5)  # some 50 units of fp32
        assert torch.equal(state.index, wanted[2])
        expected = tokens_of(state.x, state.index, tables, rows, together)
        if enters:
            assert torch.equal(entry, torch.cat((state.x, state.x))[: rows * together])
            times = tables.time.shape[1]
            assert tokens[:, times : times + together].isnan().all(), "the linear's part was written"
            expected[:, times : times + together] = torch.nan
        torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples, dim", [(1, 1), (3, 40), (2, 257), (1, 4096)])
def test_a_run_advances(samples, dim, dtype):
    check_advance(*make_run(samples, dim, dtype=dtype), count=2)


@pytest.mark.parametrize(
    "clamps, guidance, of_prediction, positions, enters, times",
    pairwise(
        clamps=[(None,), ("range",), ("l2",), ("range", "l2", None)],
        guidance=["none", "null table", "rows", "some rows"],
        of_prediction=[False, True], positions=[False, True], enters=[False, True], times=[1, 2],
    ),
)  # fmt: skip
def test_options_of_a_run(clamps, guidance, of_prediction, positions, enters, times):
    guided = {"rows": 3, "some rows": 2}.get(guidance, 0)
    run = make_run(
        3, 40, 56 if enters else 40, guided=guided, null=guidance == "null table", clamps=clamps, positions=positions,
        of_prediction=of_prediction, times=times, index=[0, 4, 2],
    )  # fmt: skip
    check_advance(*run, count=2, enters=enters)


@pytest.mark.parametrize("enters", [False, True])
@pytest.mark.parametrize("guided", [0, 4, 2])
def test_several_samples_in_a_row(guided, enters):
    """They follow each other, and the time token is that of the first."""
    run = make_run(4, 40, together=2, guided=guided, times=2, index=[0, 4, 2, 1])
    check_advance(*run, count=2, enters=enters)
    check_advance(*make_run(3, 40, together=3, guided=guided and 3), enters=enters)


def test_each_sample_is_at_a_step_of_its_own_and_begins_again():
    state, pred, tables, clamps = make_run(3, 40, clamps=("l2", None), null=True, index=[STEPS - 1, 0, STEPS - 2])
    check_advance(state, pred, tables, clamps, count=3)
    assert state.index.tolist() == [2, 3, 1]


@pytest.mark.parametrize("guided", [0, 2])
def test_the_first_tokens_change_nothing(guided):
    state, pred, tables, clamps = make_run(3, 40, guided=guided, clamps=("l2",), index=[3, 0, 6])
    before = [t.clone() for t in state]
    check_advance(state, torch.full_like(pred, torch.nan), tables, clamps, updates=False)
    assert all(torch.equal(a, b) for a, b in zip(state, before))


def test_predictions_among_others():
    """Of a row's tokens only the last are predictions; and inputs are left alone."""
    state, pred, tables, clamps = make_run(4, 40, together=2, guided=4, null=True)
    whole = torch.full((len(pred), 5, 43), CANARY, device=DEVICE, dtype=pred.dtype)
    whole[:, 3:, :40] = pred
    check_advance(state, whole[:, 3:, :40], tables, clamps)
    assert torch.equal(whole[:, 3:, :40], pred) and (whole[:, :3] == CANARY).all()


@pytest.mark.parametrize("clamps", [(None,), ("range",), ("l2",)])
def test_nan_is_not_hidden_in_a_run(clamps):
    state, pred, tables, _ = make_run(2, 40, clamps=clamps)
    pred[1, 0, 5] = torch.nan
    advance(state, pred, tables)
    assert state.x[1, 5].isnan() and not state.x[0].isnan().any()
    assert state.x[1].isnan().all() == (clamps == ("l2",))
