"""Learning step tables: its gradient, what it leaves as it was, and that no table is kept which is not better."""

import math
import re

import pytest
import torch

from fastprior.diffusion.learned_tables import Agreement, HeldOut
from fastprior.diffusion.solvers import ode_table
from fastprior.prior import tuning
from fastprior.prior.tuning import judge, tune
from helpers.learned import assert_same_tables, make_table, with_table
from helpers.priors import make_prior, make_text, relative_error

NET = dict(dim=16, depth=1, dim_head=8, heads=2, max_text_len=5)
RANGE = ((1.0, 1.6),)


def small_prior(net=(), **kwargs):
    return make_prior(NET | dict(net), **dict(timesteps=40) | kwargs)


def bent_prior():
    """One whose random weights bend the paths of samples."""
    return small_prior(predict_v=True)


def texts(prompts=12):
    return make_text(prompts, 16)


@pytest.fixture
def quick(monkeypatch):
    """A fit of a second, of few rows."""
    small = dict(STEPS=36, WITH_TIMES=18, JUDGED_EVERY=6, BATCHES=4, BATCH_ROWS=24, JUDGED_ROWS=48, ODE_EVALUATIONS=40)
    for name, value in small.items():
        monkeypatch.setattr(tuning, name, value)


class NoBar:
    def update(self):
        pass


KINDS = {
    "x0": {}, "v": dict(predict_v=True), "noise": dict(predict_x_start=False, clamp=None), "range": dict(clamp=1.0),
    "l2": dict(sampling_clamp_l2norm=True, sampling_final_clamp_l2norm=True, init_image_embed_l2norm=True),
    "discrete times": dict(net=dict(num_timesteps=40)), "self-conditioned": dict(net=dict(self_cond=True)),
    "conditions": dict(net=dict(conditions={"age": {"kind": "scalar"}})),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_where_a_run_ends_and_its_gradient(quick, kind, scale):
    """The run that is differentiated ends where the table is served, and its gradient is that of differences."""
    prior, text = small_prior(**KINDS[kind]), texts()
    if prior.net.conditions is not None:
        text["conditions"] = {"age": torch.linspace(-1, 1, 12)}
    prior.net.requires_grad_(False)
    fit = tuning._Fit(prior, text, 4, ((scale, scale),), seed=0)
    fit._tabulate()
    rows, cond = fit._batch(0, NoBar())
    table = make_table(prior, 4)
    assert torch.equal(fit.readings[list(table.times)], table.rows[:, :2])
    changes = table.rows[:, 2:5].float().requires_grad_()
    times = torch.tensor(table.times, dtype=torch.float32, requires_grad=True)
    end = fit._end(times, changes, rows, cond)
    assert relative_error(end.detach(), fit._sample(table, rows)) < 1e-4

    if kind == "range":
        return  # differences step over its corners
    weights = torch.randn(end.shape, generator=torch.Generator().manual_seed(3))
    between = times.detach() + 0.4  # where the way between two times is straight
    between[0] -= 1

    def value(times, changes):
        return (fit._end(times, changes, rows, cond).double() * weights).sum()

    inputs = between.requires_grad_(), changes.detach().requires_grad_()
    gradients = torch.autograd.grad(value(*inputs), inputs)
    for number, gradient in enumerate(gradients):
        draw = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(4))
        moved = [[t + sign * 3e-3 * draw if i == number else t for i, t in enumerate(inputs)] for sign in (1, -1)]
        with torch.no_grad():
            wanted = (value(*moved[0]) - value(*moved[1])) / 6e-3
        got = (gradient * draw).sum().item()
        assert abs(got - wanted) < 0.02 * abs(wanted) + 2e-3 * weights.norm() * end.detach().norm() / 100, (got, wanted)


def agreement(prior, text, noise, table, scale):
    rows = tuning._Rows(text, scale, noise, noise)
    fit = object.__new__(tuning._Fit)
    fit.prior = prior
    rows.solution = fit._sample(
        ode_table(prior.noise_scheduler, prior.prediction, prior.noise_scheduler.num_timesteps), rows
    )
    return fit._agreement(table, rows)


@pytest.mark.slow
def test_a_table_is_better_on_prompts_of_its_own(quick):
    prior, draw = bent_prior(), torch.get_rng_state()
    before = {name: t.clone() for name, t in prior.state_dict().items()}
    prior = with_table(prior, 5)
    table = tune(prior, texts(), 3, scales=RANGE, progress=False)
    assert torch.equal(torch.get_rng_state(), draw)
    assert all(p.requires_grad == ("freqs" not in name) for name, p in prior.named_parameters())
    assert all(torch.equal(before[name], t) for name, t in prior.state_dict().items())
    assert sorted(prior.learned_tables) == [3, 5] and prior.learned_tables[3] is table
    assert table.scales == RANGE and [one.cond_scale for one in table.held_out] == pytest.approx([1, 1.2, 1.4, 1.6])
    assert all(type(time) is int for time in table.times) and list(table.times) == sorted(set(table.times))[::-1]
    assert (table.rows[:, 5] == 0).all() and not any(table.draws_noise)
    fresh, noise = make_text(20, 16, seed=9), torch.randn(200, 16, generator=torch.Generator().manual_seed(5))
    for scale in (1.0, 1.3, 1.6):
        untuned = prior.sampling_plan(3, scale, "dpm++", spacing="logsnr").table
        (median, *_), (base, *_) = (agreement(prior, fresh, noise, of, scale) for of in (table, untuned))
        assert 1 - median < 0.8 * (1 - base)


@pytest.mark.slow
def test_a_seed_decides(quick, monkeypatch):
    monkeypatch.setattr(tuning, "judge", lambda *_: None)
    prior, text = bent_prior(), texts()
    first, again, other = (tune(prior, text, 3, seed=seed, progress=False) for seed in (0, 0, 1))
    assert_same_tables({3: first}, {3: again})
    assert not torch.equal(first.rows, other.rows) and prior.learned_tables == {3: other}  # the last of one number
    prior.net.bfloat16()
    with torch.no_grad():  # of callers
        assert tune(prior, text, 3, progress=False).digests != first.digests
    assert prior.sampling_plan(3, solver="learned").path == "cached"


def test_no_table_is_kept_that_is_not_better(quick, monkeypatch):
    prior = with_table(bent_prior(), 5)
    monkeypatch.setattr(tuning, "STEPS", 0)  # what is left is dpm++ itself
    with pytest.raises(ValueError) as error:
        tune(prior, texts(), 3, scales=RANGE, progress=False)
    text = str(error.value)
    figure = r"median (0\.\d{5}) at cond_scale 1, it must be more than (0\.\d{5})"
    assert text.startswith("no table of 3 evaluations was learned that is better than dpm++ at logsnr times")
    one, other = re.search(figure, text).groups()
    assert one == other and list(prior.learned_tables) == [5]


GOOD, BASE = Agreement(0.99, 0.9, 0.5), Agreement(0.98, 0.9, 0.5)


@pytest.mark.parametrize("learned, message", [
    (GOOD, None), (GOOD._replace(percentile_5=0.95, worst=0.4), None), (GOOD._replace(worst=0.2501), None),
    (GOOD._replace(median=0.98), "median 0.98000 at cond_scale 2, it must be more than 0.98000"),
    (GOOD._replace(percentile_5=0.899), "5 % 0.89900 at cond_scale 2, it must be at least 0.90000"),
    (GOOD._replace(worst=0.2499), "worst 0.24990 of all, it must be at least 0.25000"),
    (GOOD._replace(median=math.nan), "median nan"), (GOOD._replace(percentile_5=math.nan), "5 % nan"),
    (GOOD._replace(worst=math.nan), "worst nan"),
])  # fmt: skip
def test_the_gate(learned, message):
    fine = HeldOut(1.0, Agreement(1.0, 1.0, 1.0), Agreement(0.9, 0.9, 0.9))
    found = HeldOut(2.0, learned, BASE)
    if message is None:
        judge(6, [fine, found])
        return
    for both in ([fine, found], [found, fine]):
        with pytest.raises(ValueError) as error:
            judge(6, both)
        assert message in str(error.value)


def without_dropout():
    return small_prior(cond_drop_prob=0.0)


def with_a_hook():
    prior = small_prior()
    prior.net.register_forward_hook(lambda *_: None)
    return prior


@pytest.mark.parametrize("make, kwargs, message", [
    (lambda: small_prior().train(), {}, "prior.training=True"),
    (small_prior, dict(evaluations=1), "evaluations=1; it must be at least 2"),
    (small_prior, dict(evaluations=41), "evaluations=41; it must be at most 40"),
    (small_prior, dict(scales=((3.0, 1.0),)), "scales=1.0; it must be a finite number and at least 3.0"),
    (small_prior, dict(scales=()), "scales=(); it must be 1 to 16 pairs"),
    (small_prior, dict(scales=(1.0, 2.0)), "pairs (least, most)"),
    (small_prior, dict(text=texts(7)), "text_cond has 7 different prompts; it must have at least 8"),
    (small_prior, dict(text={n: t[:1].repeat(99, *[1] * (t.ndim - 1)) for n, t in texts().items()}), "1 different"),
    (without_dropout, dict(scales=RANGE), "cond_scale must be 1"),
    (with_a_hook, {}, "this prior cannot be tuned: DiffusionPriorNetwork has a forward hook"),
    (small_prior, dict(text=make_text(12, 8)), "text_embed"),
])  # fmt: skip
def test_what_cannot_be_tuned(make, kwargs, message):
    options = dict(evaluations=3, scales=((1.0, 1.0),)) | kwargs
    with pytest.raises(ValueError) as error:
        tune(make(), options.pop("text", texts()), progress=False, **options)
    assert message in str(error.value)


def test_every_scale_is_learned_on(monkeypatch):
    monkeypatch.setattr(tuning._Fit, "_sample", lambda self, table, of: of.noise)
    for pairs in (((1.0, 4.0),), ((1.0, 1.0), (2.0, 3.0), (7.5, 7.5)), tuple((i, i + 0.5) for i in range(16))):
        fit = tuning._Fit(small_prior(), texts(), 3, pairs, seed=0)
        fit._tabulate()
        found = [fit._batch(number, NoBar())[0].cond_scale for number in range(fit.batches)]
        assert {end for pair in pairs for end in pair} <= set(found)
        assert all(any(least <= scale <= most for least, most in pairs) for scale in found)


def test_no_prompt_is_in_two_parts():
    text = {name: torch.cat((t, t)) for name, t in texts(10).items()}
    fit = tuning._Fit(small_prior(), text, 3, RANGE, seed=0)
    parts = [{tuple(row.tolist()) for row in part["text_embed"]} for part in fit.parts]
    assert [len(part) for part in parts] == [5, 2, 3] and len(set().union(*parts)) == 10


@pytest.mark.slow
def test_the_solution_of_the_ode():
    """The table that stands for the ODE agrees with one of all times."""
    prior, noise = make_prior(NET, timesteps=1000), torch.randn(40, 16, generator=torch.Generator().manual_seed(5))
    found = agreement(
        prior, make_text(20, 16), noise, ode_table(prior.noise_scheduler, "x0", tuning.ODE_EVALUATIONS), 2.0
    )
    assert found.worst > 0.9999
