"""A run whose steps are calls of C: the bits of the steps that PyTorch puts together, and what is left to these."""

import copy
import functools

import pytest
import torch
from torch import nn

from fastprior import DiffusionPriorNetwork, PriorSampler
from fastprior.engine import steps
from fastprior.kernels import ops
from fastprior.kernels.cpu import blocks as cpu_blocks
from fastprior.kernels.cpu import library as cpu_library
from fastprior.kernels.cpu import run as cpu_run
from fastprior.prior import loop
from helpers.cpu_cases import BF16, EPS, FP32, NEEDS_KERNELS, check, random, threads, through_reference
from helpers.priors import make_prior, make_text, relative_error, sample
from helpers.step_cases import CONFIGS, STEPS, conditioned, inputs, network, prepare

pytestmark = [NEEDS_KERNELS, pytest.mark.skipif(cpu_library.most_rows(FP32) < 32, reason="these steps have 32 tokens")]
LOOP = dict(clamp=None, radius=1.5, scale=2.5)


@torch.no_grad()
def by_steps(net, samples, dtype=FP32, clamp=None, radius=1.5, scale=2.5):
    """A run of 2 prompts as PyTorch puts its steps together."""
    cond, rows = conditioned(net, samples=samples), 2 * samples
    x, noise, null, table = inputs(net, rows, dtype)
    x0, scale = torch.zeros_like(x), torch.tensor(scale, dtype=dtype)
    step, tables = steps.solver_step(loop.predictor(net), clamp, radius), steps.StepInputs(cond, table, null)
    for number, drawn in enumerate(noise):
        drawn = torch.zeros_like(x) if drawn is None else drawn
        x, x0 = step(tables, scale, x, x0, drawn, torch.tensor(number))
    return x


def by_calls(net, samples=4, parts=(2, 3), **loop):
    """The same by calls of some steps each."""
    run, (x, noise, *_) = prepare(net, samples, **loop), inputs(net, 2 * samples)
    run.start(x)
    for first, last in zip((0, *parts), (*parts, STEPS)):
        run(first, noise[first:last])
    return run.x


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_bits_are_those_of_steps(config, dtype):
    net = network(dtype, **CONFIGS[config])
    for samples in 1, 2, 4, 5:
        for clamp in None, "range":
            assert torch.equal(by_calls(net, samples, clamp=clamp), by_steps(net, samples, clamp=clamp))
        assert relative_error(by_calls(net, samples, clamp="l2"), by_steps(net, samples, clamp="l2")) < 1e-5


@pytest.mark.parametrize("clamp", [None, "range", "l2"])
def test_against_fp64(clamp):
    net = network()
    run = functools.partial(by_steps, samples=4, clamp=clamp)
    exact = through_reference(functools.partial(run, dtype=torch.float64), copy.deepcopy(net).double())
    plain = through_reference(run, net)
    check(by_calls(net, clamp=clamp), exact, plain)
    changes = dict(scale=1.0), dict(radius=1.4), dict(coefficients=random(STEPS, 6)), dict(null_table=random(STEPS, 40))
    for change in changes:
        if clamp or "radius" not in change:
            with pytest.raises(AssertionError):
                check(by_calls(net, **dict(clamp=clamp) | change), exact, plain)


def test_calls_may_have_any_number_of_steps():
    net = network()
    expected = by_calls(net, parts=())
    for parts in (1,), (1, 2, 3, 4), (0, 5):
        assert torch.equal(by_calls(net, parts=parts), expected)
    for count in 1, 3, 32:
        with threads(count):
            assert torch.equal(by_calls(net), expected)


def test_a_run_starts_again():
    net = network()
    run, (x, noise, *_) = prepare(net), inputs(net, 8)
    for _ in range(2):
        run.start(x)
        run(0, noise)
        assert torch.equal(run.x, by_calls(net))


def test_noise_of_other_strides_and_dtypes():
    net = network()
    run, (x, noise, *_) = prepare(net), inputs(net, 8)
    run.start(x.t().contiguous().t())
    run(0, [n if n is None else n.double().t().contiguous().t() for n in noise])
    assert torch.equal(run.x, by_calls(net))


@pytest.mark.parametrize("clamp", [None, "range", "l2"])
def test_nan_stays_in_its_prompt(clamp):
    net = network()
    run, (x, noise, *_) = prepare(net, clamp=clamp), inputs(net, 8)
    x[1, 7] = torch.nan
    run.start(x)
    run(0, noise)
    assert run.x[1].isnan().all() and torch.equal(run.x[4:], by_calls(net, clamp=clamp)[4:])


def test_an_estimate_of_zeros_has_no_length():
    table = random(STEPS, 6)
    table[:, :2] = 0
    got = by_calls(network(), clamp="l2", coefficients=table)
    assert got.isfinite().all() and got.abs().amin() > 0


def hook(module):
    module.register_forward_hook(lambda module, inputs, result: result * 2)


def replace_forward(module):
    module.forward = lambda x: x * 2


CHANGES = {
    "hook-on-tokens": lambda net: hook(net.to_image_embeds),
    "hook-on-an-embedding": lambda net: hook(net.to_image_embeds[0]),
    "hook-on-a-shape": lambda net: hook(net.to_image_embeds[1]),
    "another-embedding": lambda net: net.to_image_embeds.__setitem__(0, nn.Linear(40, 40)),
    "another-forward": lambda net: replace_forward(net.to_image_embeds[0]),
    "hook-on-the-first-norm": lambda net: hook(net.causal_transformer.init_norm),
    "hook-on-a-norm": lambda net: hook(net.causal_transformer.layers[0][0].norm),
    "training": lambda net: net.train(),
    "weights-with-gradient": lambda net: net.requires_grad_(),
}
OTHERS = {
    "self-cond": dict(self_cond=True),
    "two-images": dict(num_image_embeds=2),
    "first-norm": dict(norm_in=True),
    "no-head": dict(final_proj=False),
    "no-last-norm": dict(norm_out=False),
}


@pytest.mark.parametrize("case", [*CHANGES, *OTHERS])
def test_what_is_left_to_steps(case):
    net = network(**OTHERS.get(case, {}))
    assert case in OTHERS or prepare(net) is not None
    CHANGES.get(case, lambda net: None)(net)
    assert prepare(net) is None


def test_no_run_where_something_forbids_it(monkeypatch):
    net = network()
    cond, many = conditioned(net), conditioned(net, prompts=2, samples=1)
    assert prepare(net, cond=cond)
    with ops.using("reference"):
        assert prepare(net, cond=cond) is None
    with torch.autocast("cpu", BF16):
        assert prepare(net, cond=cond) is None
    assert prepare(network(), cond=cond) is None, "the blocks of another network"
    assert prepare(net, cond=cond._replace(null_rows=1)) is None
    assert prepare(net, null_table=random(STEPS, 40).double()) is None
    assert prepare(net, coefficients=random(STEPS, 6).requires_grad_()) is None
    samples = cpu_blocks.most_tokens(FP32) // 3 // 2 + 1
    table = dict(coefficients=random(STEPS, 6), null_table=random(STEPS, 40), cond_scale=1.0)
    assert net.prepare_run(many, 2 * samples, **table) is None, "too many tokens"


def test_the_programs_default_dtype_decides_that_of_noise():
    prior, text = make_prior(), make_text(2, 32)
    torch.set_default_dtype(torch.float64)
    try:
        assert sample(prior, text, timesteps=4).dtype == torch.float64
    finally:
        torch.set_default_dtype(FP32)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(coefficients=random(STEPS, 5)), "coefficients has shape (5, 5); it must be (5, 6)"),
        (dict(coefficients=random(4, 6)), "coefficients has shape (4, 6); it must be (5, 6)"),
        (dict(null_table=random(4, 40)), "null_table has shape (4, 40); it must be (5, 40)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_messages(change, message):
    with pytest.raises(ValueError) as raised:
        prepare(network(), **change)
    assert message in str(raised.value)


def test_messages_of_calls():
    run = prepare(network())
    with pytest.raises(ValueError, match=r"x has shape \(7, 40\); it must be \(8, 40\)"):
        run.start(random(7, 40))
    with pytest.raises(ValueError, match=r"noise has shape \(8, 39\); it must be \(8, 40\)"):
        run(0, [random(8, 39)])
    for first, count in (0, 6), (-1, 1), (5, 1):
        with pytest.raises(IndexError, match=f"steps {first} to {first + count - 1}; there are 5"):
            run(first, [None] * count)


@pytest.mark.parametrize(
    "solver, given",
    [
        ("ddpm", {}), ("ddim", dict(eta=0.5)), ("ddim", {}), ("dpm++", {}), ("dpm++", dict(spacing="logsnr")),
        ("sde-dpm++", dict(spacing="logsnr")), ("ddim_trailing", dict(spacing="karras", eta=0.5)),
    ],
)  # fmt: skip
def test_runs_of_a_prior(monkeypatch, solver, given):
    """More steps than a call takes, with noise in the order in which steps one by one draw it."""
    prior, text = make_prior(), make_text(3, 32)
    timesteps = 20 if solver == "ddpm" else 11
    kinds = []

    def runs(**options):
        torch.manual_seed(7)
        found = prior.sample(
            **text, timesteps=timesteps, solver=solver, cond_scale=2.0, **options, **given, progress=False
        )
        sampled = PriorSampler(
            prior, batch_sizes=(2,), timesteps=timesteps, solver=solver, samples_per_prompt=2, compile=False, **given
        )(**text, cond_scale=2.0)
        return found, sampled, torch.rand(())

    def noted(table, step, *args, make=steps.run_table):
        kinds.append(type(step) is cpu_run.Run)
        return make(table, step, *args)

    for module in (loop, steps):
        monkeypatch.setattr(module, "run_table", noted)
    by_calls = runs(num_samples_per_batch=2)
    assert all(kinds)
    monkeypatch.setattr(DiffusionPriorNetwork, "prepare_run", lambda *args, **kwargs: None)
    kinds.clear()
    by_steps = runs(num_samples_per_batch=2)
    assert not any(kinds) and kinds
    for got, wanted in zip(by_calls, by_steps):
        torch.testing.assert_close(got, wanted, rtol=2 * EPS, atol=2 * EPS)


def test_progress_counts_steps(capsys):
    prior, text = make_prior(), make_text(1, 32)
    prior.sample(**text, timesteps=11, solver="dpm++", num_samples_per_batch=1)
    shown = capsys.readouterr().err
    assert " 0/11 " in shown and " 11/11 " in shown
