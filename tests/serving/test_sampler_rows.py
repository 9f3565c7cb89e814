"""Rows of a batch of a PriorSampler: noise, scales and work of their own."""

import pytest
import torch

from fastprior.kernels import ops
from fastprior.kernels.cpu import library as cpu_library
from fastprior.serving.prior_sampler import PriorSampler
from helpers.priors import make_prior, make_text, relative_error, sample

TOLERANCE = 1e-5


@pytest.mark.parametrize("with_runs", [True, False])
def test_rows_of_a_batch_have_noise_and_scales_of_their_own(with_runs):
    """A list of generators or seeds: a row is what it is alone, in any batch, with the candidates of a prompt too."""
    prior, text = make_prior(), make_text(5, 32)
    options = dict(batch_sizes=(2,), timesteps=6, solver="sde-dpm++", samples_per_prompt=2, compile=False)
    scales = [1.0, 3.0, 1.5, 1.0, 2.0]
    with ops.using(None if with_runs else "reference"):
        sampler = PriorSampler(prior, **options)
        draws = [torch.Generator().manual_seed(seed) for seed in range(10)]
        got = sampler(**text, cond_scale=scales, generator=draws)
        for row in range(5):
            seeds, alone = [2 * row, 2 * row + 1], {name: t[row : row + 1] for name, t in text.items()}
            wanted = sampler(**alone, cond_scale=scales[row], generator=seeds)
            assert relative_error(got[row : row + 1], wanted) < TOLERANCE
            draw = torch.Generator().manual_seed(2 * row)
            one = sample(prior, alone, cond_scale=scales[row], generator=draw, timesteps=6, solver="sde-dpm++")
            first = PriorSampler(prior, **options | dict(samples_per_prompt=1))
            given = dict(cond_scale=torch.tensor(scales[row : row + 1]), generator=seeds[:1])
            assert relative_error(first(**alone, **given), one) < TOLERANCE
    assert not torch.equal(got[0], sampler(**text, cond_scale=scales, generator=list(range(20, 30)))[0])


@pytest.mark.skipif(cpu_library.unavailable() is not None, reason="these steps are calls of C")
def test_steps_in_c_are_of_no_more_prompts_than_there_are():
    prior, text = make_prior(), make_text(9, 32)
    sampler = PriorSampler(prior, batch_sizes=(8, 64), timesteps=4, guidance=False)
    sampler(**text)
    assert sampler.stats()["prefix_bytes"] == 9 * 2 * 2 * 9 * 16 * 4, "of 9 prompts, not of 64"
    assert not sampler._engine._compiled


@pytest.mark.parametrize("options, error, message", [
    (dict(cond_scale=[1.0]), ValueError, "cond_scale has 1 entries; it must be a number, or one for each of 2"),
    (dict(cond_scale=[1.0, float("inf")]), ValueError, "cond_scale=inf"),
    (dict(generator=[1, 2, 3]), ValueError, "generator has 3 entries; it must be one, or one for each of 2 rows"),
    (dict(generator=[1, "a"]), ValueError, "generator='a'; it must be an integer"),
])  # fmt: skip
def test_bad_lists(options, error, message):
    sampler, text = PriorSampler(make_prior(), batch_sizes=(2,), timesteps=4, compile=False), make_text(2, 32)
    with pytest.raises(error, match=message):
        sampler(**text, **options)
    with pytest.raises(ValueError, match="cond_scale=2.0; this sampler was built with guidance=False"):
        PriorSampler(make_prior(), batch_sizes=(2,), guidance=False)(**text, cond_scale=[1.0, 2.0])
