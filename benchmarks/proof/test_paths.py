"""Every path of both samplers and of training on the device, with models of real size, against the reference.

Of each sampler: graphs give the bits of plain launches (D2) or their result (PT, whose graphs take padded texts), the
reference's result, and the same bits when they are replayed.
"""

import copy
from functools import partial

import kernel_cache
import places
import priors
import pytest
import runs
import torch
from places import DEVICE

from fastprior import PriorPipeline
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.kernels import ops
from fastprior.models.dalle2.layers import l2norm
from fastprior.serving.prior_sampler import PriorSampler

BATCH = 32  # of training
REPLAYS, MANY = 20, 200  # of each case, and of the first of a path
# of the cosine in the median, to the reference in fp32
LEAST = {"float32": 1 - 1e-5, "float16": 0.999, "bfloat16": 0.999, "int8": 0.998}


@pytest.fixture(autouse=True)
def here():
    with places.as_on_gpu(), places.few_steps(), torch.no_grad():
        yield


def judge(got: torch.Tensor, wanted: torch.Tensor, dtype: str) -> None:
    if kernel_cache.filling():
        return
    cosine = torch.cosine_similarity(got.double(), wanted.double())
    print(f"{dtype}: cosine {cosine.median():.7f} in the median, {cosine.min():.7f} at worst")
    least = LEAST[dtype] if places.REAL else 0.9  # tiny models round more
    assert cosine.median() >= least, cosine
    if dtype == "float32":
        assert (got - wanted).abs().max() <= 1e-3 * wanted.abs().max()


def replayed(run, first: torch.Tensor, many: bool) -> None:
    for number in range((MANY if many else REPLAYS) if places.REAL else 0):
        assert torch.equal(run(), first), f"run {number} again differs"


def sampled(dtype: str, batch: int, samples: int) -> None:
    prior, batch = priors.ours(DEVICE), priors.batch_size(batch)
    options = dict(batch_sizes=(batch,), timesteps=places.steps(64), samples_per_prompt=samples, solver="ddim")
    options |= dict(dtype=torch.bfloat16, quantise="int8") if dtype == "int8" else dict(dtype=getattr(torch, dtype))
    sampler, plain = (PriorSampler(prior, compile=False, graphs=False, **options) for _ in range(2))
    places.with_graphs(sampler)

    def run(which, scale):
        draw = torch.Generator(DEVICE).manual_seed(runs.SEED)
        return which(**priors.text(batch, DEVICE), cond_scale=scale, generator=draw)

    for scale in places.scales(1.0, 3.0):
        first = run(sampler, scale)
        assert sampler.graphs and sampler.stats()["graphs"] == 1, "the capture failed"
        equal = torch.equal(first, run(plain, scale))
        assert equal or kernel_cache.filling(), "graphs give other bits than launches"
        if samples == 1 or dtype == "float32":  # of several, rounding may choose another
            with ops.using("reference"):
                exact = PriorSampler(prior, compile=False, graphs=False, **options | dict(dtype=None, quantise=None))
                judge(first, run(exact, scale), dtype)
        replayed(partial(run, sampler, scale), first, (batch, samples, scale) == (1, 1, 1.0))


SIZES = pytest.mark.parametrize("batch, samples", [(1, 1), (8, 1), (1, 4)])


@SIZES
def test_sampler_float32(batch, samples):
    sampled("float32", batch, samples)


@SIZES
def test_sampler_bfloat16(batch, samples):
    sampled("float16" if places.INTERPRETED else "bfloat16", batch, samples)


@SIZES
def test_sampler_int8(batch, samples):
    if places.INTERPRETED:
        pytest.skip("the interpreter computes bf16 wrongly")
    sampled("int8", batch, samples)


@pytest.mark.parametrize("batch, scale", [(1, 1.0), (8, 1.0), (1, 3.0), (8, 3.0)])
def test_drop_in(batch, scale):
    """Launch by launch, and by graphs."""
    prior, batch = priors.ours(DEVICE), priors.batch_size(batch)
    run = partial(runs.our_run, prior, batch, scale, DEVICE, max(places.steps(64), 5))  # of fewer there are no graphs
    prior.graphs = False
    first = run()
    prior.graphs = True
    equal = torch.equal(first, run())
    assert equal or kernel_cache.filling(), "graphs give other bits than launches"
    replayed(run, first, (batch, scale) == (1, 1.0))
    assert prior.sampling_plan(64, scale, rows=batch).graph_reasons == ()  # no capture failed
    with ops.using("reference"):
        prior.graphs = False
        judge(first, run(), "float32")


def pipelined(dtype: str, batch: int, images: int) -> None:
    prior = priors.pt_prior(DEVICE)
    schedule = DiffusersSchedule("UnCLIPScheduler", **priors.UNCLIP)
    batch, tokens = priors.batch_size(batch), priors.PT_1B["num_embeddings"]
    given = dict(images=images, steps=places.steps(25))
    wanted = {}
    for scale in places.scales(1.0, runs.SCALE):
        plain = PriorPipeline(prior, schedule, graphs=False, batch_sizes=(batch,))
        wanted[scale] = runs.by_pipeline(plain, batch, tokens, DEVICE, scale, "reference", **given)
    prior.to(getattr(torch, dtype))
    pipeline = places.with_graphs(PriorPipeline(prior, schedule, graphs=False, batch_sizes=(batch,)))
    plain = PriorPipeline(prior, schedule, graphs=False, batch_sizes=(batch,))
    for scale in places.scales(1.0, runs.SCALE):
        run = partial(runs.by_pipeline, pipeline, batch, tokens, DEVICE, scale, **given)
        first = run()
        assert pipeline.graphs and pipeline.stats()["graphs"] > 0, "the capture failed"
        judge(first, wanted[scale], dtype)
        judge(runs.by_pipeline(plain, batch, tokens, DEVICE, scale, **given), wanted[scale], dtype)
        replayed(run, first, (batch, images, scale) == (1, 1, 1.0))


IMAGES = pytest.mark.parametrize("batch, images", [(1, 1), (8, 1), (1, 4)])


@IMAGES
def test_pipeline_float32(batch, images):
    pipelined("float32", batch, images)


@IMAGES
def test_pipeline_bfloat16(batch, images):
    pipelined("float16" if places.INTERPRETED else "bfloat16", batch, images)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training(dtype):
    """A step's loss and gradients, in bf16 under autocast, where the reference's own rounding is the measure."""
    if places.INTERPRETED and dtype == "bfloat16":
        pytest.skip("the interpreter computes bf16 wrongly")
    prior = priors.ours(DEVICE)
    batch = BATCH if DEVICE.type == "cuda" or kernel_cache.filling() else 2
    draw = torch.Generator().manual_seed(1)
    image = l2norm(torch.randn(batch, prior.image_embed_dim, generator=draw)).to(DEVICE)

    def step(dtype: str) -> tuple[float, torch.Tensor]:
        model = copy.deepcopy(prior).train()
        torch.manual_seed(3)
        with torch.enable_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**priors.text(batch, DEVICE), image_embed=image)
        loss.backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(found) > 10
        return loss.item(), torch.cat([grad.flatten().double() for grad in found])

    loss, grads = step(dtype)
    if kernel_cache.filling():
        return
    with ops.using("reference"):
        exact_loss, exact = step("float32")
        _, own = step(dtype)

    def error(got):
        return ((got - exact).norm() / exact.norm()).item()

    ours, theirs = error(grads), error(own)
    print(f"{dtype}: loss {loss:.7f}, reference {exact_loss:.7f}; gradients' error {ours:.1e}, plain {theirs:.1e}")
    assert abs(loss - exact_loss) <= (1e-4 if dtype == "float32" else 2e-2) * abs(exact_loss)
    assert ours <= 3 * theirs + (1e-3 if dtype == "float32" else 1e-2)
