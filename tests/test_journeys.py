"""How far a call travels: the way from what users call to C goes through few files, and seldom back and forth."""

import pytest
import torch

from fastprior import PriorSampler
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.pipelines.prior_pipeline import PriorPipeline, TextEncoding
from helpers.cpu_cases import NEEDS_KERNELS
from helpers.journeys import follow
from helpers.priors import make_prior, make_text

pytestmark = NEEDS_KERNELS  # without them every layer is a call of its own
STEPS = 4
NETWORK = dict(dim=64, depth=1, max_text_len=16)


def a_sample():
    prior, text = make_prior(NETWORK, timesteps=100), make_text(2, 64, 16)
    return lambda: prior.sample(**text, timesteps=STEPS, cond_scale=3.0, progress=False)


def a_call_of_the_sampler():
    prior, text = make_prior(NETWORK, timesteps=100), make_text(2, 64, 16)
    sampler = PriorSampler(prior, batch_sizes=(1, 4), timesteps=STEPS, compile=False)
    return lambda: sampler(**text, cond_scale=3.0)


def a_call_of_the_pipeline():
    sizes = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=32, num_embeddings=7)
    schedule = DiffusersSchedule("UnCLIPScheduler", num_train_timesteps=100)
    pipeline = PriorPipeline(PriorTransformer(**sizes, additional_embeddings=4).eval(), schedule)

    def texts(count: int) -> TextEncoding:
        return TextEncoding(torch.randn(count, 32), torch.randn(count, 7, 32), torch.ones(count, 7, dtype=torch.bool))

    given = texts(2), texts(1)
    return lambda: pipeline(*given, zero_embed=torch.zeros(1, 32), num_inference_steps=STEPS)


@pytest.mark.parametrize("journey, most", [(a_sample, 92), (a_call_of_the_sampler, 98), (a_call_of_the_pipeline, 173)])
def test_few_crossings_between_files(journey, most):
    run = journey()
    run()
    found = follow(run).crossings
    assert 0 < sum(found.values()) <= most, found.most_common(20)


def test_what_is_counted():
    journey = follow(lambda: make_text(2, 8, 3))
    assert not journey.crossings
    prior = make_prior()
    journey = follow(lambda: prior.l2norm_clamp_embed(torch.ones(1, 8)))
    (crossing,) = journey.crossings
    assert crossing[0].endswith("diffusion_prior.py:l2norm_clamp_embed") and crossing[1].endswith("layers.py:l2norm")
    assert len(journey.files) == 2 and len(journey.functions) == 2
