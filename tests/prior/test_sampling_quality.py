"""What fewer evaluations cost: the distance and its bias, and what is measured of each way to sample."""

import math

import pytest
import torch

import fastprior
from fastprior.prior import sampling_quality as quality
from fastprior.prior.sampling_quality import Way, energy_distance
from helpers.priors import make_prior, make_text, sample

NET = dict(dim=16, depth=1, dim_head=8, heads=2)


def small_prior():
    return make_prior(NET, timesteps=12), make_text(5, 16)


def test_distance_of_points_that_are_known():
    one, other = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    other[1, :, 0] = 2.5
    assert energy_distance(one, other).tolist() == [0, 5]
    spread = torch.tensor([[[0.0], [1.0], [3.0]]])  # mean of |x - x'| over pairs of two is 2, of |x - 0| it is 4/3
    assert energy_distance(spread, torch.zeros(1, 2, 1)).item() == pytest.approx(2 * 4 / 3 - 2)


def test_distance_is_unbiased_and_sees_what_differs():
    draw = torch.Generator().manual_seed(0)
    prompts = 4000
    one, other = (torch.randn(prompts, n, 6, generator=draw) for n in (3, 4))
    for shift, scale in ((0, 1), (0.7, 1), (0, 2)):
        found = energy_distance(one, other * scale + shift)
        error = found.std() / math.sqrt(prompts)
        assert found.dtype == torch.float64 and found.shape == (prompts,)
        if (shift, scale) == (0, 1):
            assert abs(found.mean()) < 4 * error
        else:
            assert found.mean() > 20 * error


@pytest.mark.parametrize("one, other", [((2, 3, 4), (3, 3, 4)), ((2, 3, 4), (2, 3, 5)), ((3, 4), (3, 4)),
                                        ((2, 1, 4), (2, 3, 4)), ((2, 3, 4), (2, 1, 4))])  # fmt: skip
def test_samples_of_other_shapes_are_refused(one, other):
    with pytest.raises(ValueError, match="one and other have shapes .*must be \\(prompts, n, dim\\), n at least 2"):
        energy_distance(torch.zeros(one), torch.zeros(other))


@pytest.mark.parametrize("text", ["ddim", "ddpm", "dpm++:logsnr", "ddim_trailing:karras:eta=0.5", "ddim:eta=0"])
def test_ways_are_read_as_they_are_printed(text):
    assert str(Way.parse(text)) == text


@pytest.mark.parametrize("text, message", [
    ("euler", "solver='euler'"), ("", "solver=''"), ("dpm++:logsnr:karras", "it must be SOLVER"),
    ("ddim:eta=much", "it must be SOLVER"), ("ddim:eta=0:eta=1", "it must be SOLVER"),
])  # fmt: skip
def test_no_other_ways_are_read(text, message):
    with pytest.raises(ValueError) as error:
        Way.parse(text)
    assert message in str(error.value)


@pytest.mark.slow
def test_what_is_measured():
    prior, text = small_prior()
    images = sample(prior, text)
    ways = "ddim", "dpm++:trailing", "dpm++:logsnr", "sde-dpm++:logsnr", "ddim_trailing:eta=0"
    before = torch.get_rng_state()
    rows = quality.sampling_quality(
        prior, text, ways=ways, evaluations=(2, 11), cond_scales=(1.0, 2.0), samples=6, image_embed=images,
        progress=False,
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    expected = [("ddpm", 12), *((way, count) for way in ways for count in (2, 11))]
    assert [(row.cond_scale, str(row.way), row.evaluations) for row in rows] == [
        (scale, *run) for scale in (1.0, 2.0) for run in expected
    ]
    for row in rows:
        assert math.isfinite(row.distance) and row.error > 0 and row.milliseconds > 0
        assert (row.cosine_median is None) == (str(row.way) in ("ddpm", "ddim", "sde-dpm++:logsnr"))
        assert -1 <= row.similarity <= 1 and 1 <= row.median_rank <= 5
        faster = [r for r in rows if r.cond_scale == row.cond_scale and r.milliseconds < row.milliseconds]
        assert not row.is_frontier or all(other.distance > row.distance for other in faster)
    for scale in (1.0, 2.0):
        of = {(str(row.way), row.evaluations): row for row in rows if row.cond_scale == scale}
        assert any(row.is_frontier for row in of.values())
        for way in ("dpm++:trailing", "ddim_trailing:eta=0"):
            assert of[way, 11].cosine_worst > of[way, 2].cosine_worst
    one, two = rows[: len(expected)], rows[len(expected) :]
    assert all(a.distance != b.distance for a, b in zip(one, two)), "guidance did nothing"


def test_all_evaluations_of_the_ode_are_its_solution_and_all_of_ddpm_are_like_it():
    prior, text = small_prior()
    found = quality.sampling_quality(prior, text, ways=("dpm++", "ddpm"), evaluations=(12,), samples=40, progress=False)
    chance, ode, ddpm = found
    assert ode.cosine_median == pytest.approx(1, abs=1e-6) and ode.cosine_worst == pytest.approx(1, abs=1e-6)
    assert abs(chance.distance) < 4 * chance.error and abs(ddpm.distance) < 4 * ddpm.error
    assert ddpm.distance != chance.distance, "the run was held against itself"


def test_parts_of_prompts_keep_their_texts(monkeypatch):
    """Prompts are sampled in parts where they are many: each part with its own texts and with noise of its own."""
    prior, text = small_prior()
    of = quality.PriorRuns(prior, text, 3, 1.0, 0)
    whole = of.sample(Way("dpm++"), 4)
    monkeypatch.setattr(quality, "ROWS", 6)
    parts = quality.PriorRuns(prior, text, 3, 1.0, 0)
    assert parts.chunk == 2
    split = parts.sample(Way("dpm++"), 4)
    assert whole.shape == split.shape == (5, 3, 16)
    for start in (0, 2, 4):
        part = {name: t[start : start + 2] for name, t in text.items()}
        alone = quality.PriorRuns(prior, part, 3, 1.0, 0)
        seed = parts.seed_of(0, start)
        want = alone.run(slice(None), 3, Way("dpm++"), 4, seed)
        assert torch.equal(split[start : start + 2].flatten(0, 1), torch.nn.functional.normalize(want, dim=-1))
    assert not torch.equal(split[0], split[2]) and torch.equal(split, parts.sample(Way("dpm++"), 4))
    assert not torch.equal(split, parts.sample(Way("dpm++"), 4, stream=1))


@pytest.mark.parametrize("change, message", [
    (dict(samples=1), "samples=1"), (dict(ways=()), "ways=\\[\\]"), (dict(evaluations=[]), "evaluations=\\[\\]"),
    (dict(cond_scales=()), "cond_scales=\\(\\)"), (dict(evaluations=(0,)), "evaluations=0"),
    (dict(evaluations=(13,)), "evaluations=13"), (dict(ways=("ddpm",), evaluations=(3,)), "timesteps=3"),
    (dict(ways=("ddim:logsnr",)), "spacing='logsnr'"), (dict(cond_scales=(math.nan,)), "cond_scales=nan"),
    (dict(image_embed=torch.zeros(4, 16)), "image_embed has shape \\(4, 16\\)"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_before_anything_runs(monkeypatch, change, message):
    prior, text = small_prior()
    monkeypatch.setattr(prior, "p_sample_loop", None)
    options = dict(ways=("dpm++",), evaluations=(2,), progress=False) | change
    with pytest.raises(ValueError, match=message):
        quality.sampling_quality(prior, text, **options)


def test_a_prior_in_training_is_refused():
    prior, text = small_prior()
    with pytest.raises(ValueError, match="it must be in eval mode"):
        fastprior.sampling_quality(prior.train(), text)
