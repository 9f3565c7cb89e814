"""In runs of every kind all layers of a step, or steps, are one call of C, also where a trace or a twin is between."""

import pytest
import torch

from fastprior import PriorPipeline, PriorSampler, PriorTransformer
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.kernels.cpu import library as cpu_library
from fastprior.pipelines.text_encoding import TextEncoding
from helpers.cpu_cases import NEEDS_KERNELS
from helpers.priors import make_prior, make_text

pytestmark = [
    NEEDS_KERNELS,
    pytest.mark.skipif(cpu_library.most_rows(torch.float32) < 18, reason="these runs have 18 tokens"),
]
STEPS = 5


class Counted:
    """The library, with the calls that reach it."""

    def __init__(self, library):
        self.library, self.calls = library, []

    def __getattr__(self, name):
        function = getattr(self.library, name)

        def call(*args):
            self.calls.append(name)
            return function(*args)

        return call


@pytest.fixture
def count(monkeypatch):
    """How often something calls blocks and steps in C; it must call nothing else there but linears outside of them."""
    counted = Counted(cpu_library.library())
    monkeypatch.setattr(cpu_library, "_loaded", counted)

    def count(run) -> tuple[int, int]:
        run()  # compiles
        counted.calls.clear()
        run()
        assert "decode_attention" not in counted.calls
        return tuple(map(counted.calls.count, ("run_blocks", "run_steps")))

    return count


KINDS = pytest.mark.parametrize("quantised", [None, "int8"])
WAYS = pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
SAMPLES = pytest.mark.parametrize("samples", [1, 4])


@pytest.mark.slow
@KINDS
@WAYS
@SAMPLES
@pytest.mark.parametrize("self_cond", [False, True])
def test_sampler(count, lenient, self_cond, samples, compile, quantised):
    torch._dynamo.reset()
    prior, text = make_prior(dict(self_cond=self_cond)), make_text(1, 32)
    options = dict(dtype=torch.bfloat16, compile=compile, quantise=quantised, timesteps=STEPS, solver="dpm++")
    sampler = PriorSampler(prior, batch_sizes=(1,), samples_per_prompt=samples, **options)
    assert count(lambda: sampler(**text, cond_scale=2.0)) == ((1 + STEPS, 0) if self_cond else (1, 1))


@SAMPLES
def test_drop_in(count, samples):
    prior, text = make_prior(), make_text(1, 32)
    options = dict(timesteps=STEPS, solver="dpm++", cond_scale=2.0, num_samples_per_batch=samples, progress=False)
    assert count(lambda: prior.sample(**text, **options)) == (1, 1)


def make_transformer():
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=2, attention_head_dim=16, num_layers=3, embedding_dim=32, num_embeddings=6)
    prior = PriorTransformer(**sizes).eval().requires_grad_(False)
    torch.nn.init.ones_(prior.clip_std)  # zeros, where no statistics are given: all embeddings would be
    return prior


@pytest.mark.slow
@KINDS
@WAYS
@SAMPLES
def test_pipeline(count, lenient, samples, compile, quantised):
    torch._dynamo.reset()
    schedule = DiffusersSchedule("UnCLIPScheduler", clip_sample_range=5.0, prediction_type="sample")
    options = dict(quantise=quantised, compile=compile, batch_sizes=(1,))
    pipeline = PriorPipeline(make_transformer().to(torch.bfloat16), schedule, **options)
    shown = torch.ones(1, 6, dtype=torch.bool)
    text, other = (TextEncoding(torch.randn(1, 32), torch.randn(1, 6, 32), shown) for _ in range(2))

    def run():
        pipeline(text, negative_prompt=other, num_images_per_prompt=samples, num_inference_steps=STEPS)

    assert count(run) == (1 + STEPS, 0)


def test_loop_of_forwards(count):
    prior = make_transformer()
    embeds, encodings, mask = torch.randn(1, 32), torch.randn(1, 6, 32), torch.ones(1, 6)

    @torch.no_grad()
    def run():
        for time in range(STEPS):
            prior(torch.randn(1, 32), time, embeds, encodings, mask)

    assert count(run) == (STEPS, 0)
