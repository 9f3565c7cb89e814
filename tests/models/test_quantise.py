"""Weights of 8 bits in the steps of a sampler: what they are, that steps read them, and what they may cost."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastprior import PriorPipeline, PriorSampler
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.kernels import ops
from fastprior.models import quality, quantise
from fastprior.models.dalle2.layers import Linear
from fastprior.models.quantised_linear import QuantisedLinear
from fastprior.pipelines.text_encoding import TextEncoding
from fastprior.prior.loop import CachedSteps
from helpers.priors import make_prior, make_text, relative_error
from helpers.pt_cases import make_stock, without_diffusers

KINDS = pytest.mark.parametrize("kind", ["int8", "float8"])
NET = dict(dim=64, depth=2, dim_head=32, heads=2, normformer=True)
# a step over the range: int8 has 127 of them, float8_e4m3fn 3 bits behind the first
ROUNDING = {"int8": 0.5 / 127, "float8": 2**-4}


def build(prior, kind="int8", **kwargs):
    return PriorSampler(prior, **dict(batch_sizes=(2,), timesteps=6, compile=False, quantise=kind) | kwargs)


@KINDS
def test_weights_are_rounded_over_the_range_of_their_row(kind):
    linear = Linear(50, 30, bias=True)
    with torch.no_grad():
        linear.weight *= torch.logspace(-6, 3, 30)[:, None]
        linear.weight[3] = 0
    own = QuantisedLinear(linear, quantise.DTYPES[kind])
    got, wanted = own.weight.float() * own.scale[:, None], linear.weight
    largest = wanted.abs().amax(dim=1, keepdim=True)
    error = (got - wanted).abs() / (largest if kind == "int8" else wanted.abs().clamp(min=largest / 2**8))
    assert error.nan_to_num().max() <= ROUNDING[kind] * 1.001
    assert error.nan_to_num().max() > ROUNDING[kind] / 2, "that coarse it is"
    assert torch.equal(got[3], wanted[3]) and own.scale.isfinite().all()
    x = torch.randn(4, 50)
    with torch.no_grad():
        assert relative_error(own(x), F.linear(x, got, linear.bias)) < 1e-4  # products of 16 bits round to 3e-5
    with torch.no_grad():
        linear.weight *= -2
    own.update()
    assert relative_error(own.weight.float() * own.scale[:, None], -2 * got) < 1e-6


def test_only_the_transformers_linears_are_quantised_and_the_rest_is_shared():
    net = make_prior(NET).net
    before = {name: value.clone() for name, value in net.state_dict().items()}
    other = quantise.quantised(net, "int8")
    replaced = [name for name, module in other.named_modules() if isinstance(module, QuantisedLinear)]
    wanted = [name for name, module in net.causal_transformer.named_modules() if isinstance(module, nn.Linear)]
    assert [name.removeprefix("causal_transformer.") for name in replaced] == wanted
    own = {id(p) for p in net.parameters()}
    assert all(id(p) in own for p in other.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert len(list(net.modules())) == len(list(other.modules()))


@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@KINDS
def test_samples_are_those_of_the_rounded_weights(lenient, kind, dtype, cond_scale):
    prior = make_prior(NET)
    text = make_text(2, 64, length=7)
    sampler = build(prior, kind, dtype=dtype)
    rounded = copy.deepcopy(prior)
    with torch.no_grad():
        for name, module in sampler._step_net.named_modules():
            if isinstance(module, QuantisedLinear):
                rounded.net.get_submodule(name).weight.copy_(module.weight.float() * module.scale[:, None])
    # the same steps, in fp32 and over the prefix of the weights as they were
    exact = PriorSampler(prior, batch_sizes=(2,), timesteps=6, compile=False)
    exact(**text)  # builds what is replaced here
    exact._steps = CachedSteps(prior.net, exact.plan, rounded.net)
    exact._steps.null_table = sampler._steps.null_table.float()
    got, wanted, other = (
        s(**text, cond_scale=cond_scale, generator=torch.Generator().manual_seed(3))
        for s in (sampler, exact, PriorSampler(prior, batch_sizes=(2,), timesteps=6, compile=False))
    )
    limit = 1e-3 if dtype == torch.float32 else 0.05
    assert relative_error(got, wanted) < limit
    if dtype == torch.float32:
        assert relative_error(other, wanted) > 2 * limit, "the weights as they were give something else"


def test_all_paths_give_the_same(monkeypatch):
    prior, text = make_prior(NET), make_text(2, 64, length=7)
    runs = {}
    for path in "blocks", "linears", "reference", "compiled":
        with monkeypatch.context() as patch:
            if path == "linears":
                patch.setattr(ops.cpu_blocks, "takes_blocks", lambda *args, **kwargs: False)
            with ops.using("reference" if path == "reference" else None):
                sampler = build(prior, compile=path == "compiled")
                runs[path] = sampler(**text, generator=torch.Generator().manual_seed(3))
    for path, got in runs.items():
        assert relative_error(got, runs["reference"]) < 1e-3, path  # products of 16 bits round to 3e-5 in each


def test_too_great_a_loss_is_refused_with_figures():
    prior = make_prior(NET)
    with pytest.raises(ValueError, match=r"quantise='float8' loses too much: over 32 embeddings .* at least 0.999 and"):
        build(prior, "float8", timesteps=20)
    sampler = build(prior)
    assert sampler.quality.median >= 0.999 and sampler.quality.worst >= 0.995
    assert sampler.quality.median < 1, "it was quantised"


@pytest.mark.parametrize("median,worst", [(0.9989, 0.998), (0.9995, 0.9949), (float("nan"), 1.0)])
def test_both_limits_hold(median, worst):
    cosines = torch.tensor([1.0, median, worst] if median < 1 else [float("nan")] * 3).clamp(max=1)
    turned = torch.stack((cosines, (1 - cosines**2).sqrt()), dim=-1)
    with pytest.raises(ValueError, match="loses too much"):
        quality.judge("int8", turned, torch.tensor([[1.0, 0.0]]).expand(3, -1))


def test_quality_is_judged_on_the_prompts_given(monkeypatch):
    seen = []
    judge = quality.judge

    def look(kind, got, wanted):
        seen.append((got, wanted))
        return judge(kind, got, wanted)

    monkeypatch.setattr(quality, "judge", look)
    prior, text = make_prior(NET), make_text(5, 64, length=7)
    sampler = build(prior, quality_prompts=text, samples_per_prompt=2)
    ((got, wanted),) = seen
    assert got.shape == wanted.shape == (5 * 2 * 2, 64)
    assert relative_error(got, wanted) < 0.1 and sampler.quality == judge("int8", got, wanted)
    other = build(prior, guidance=False)
    assert len(seen[1][0]) == 16 and other.quality is not None


def test_changed_weights_are_quantised_and_judged_again(lenient):
    prior, text = make_prior(NET), make_text(2, 64, length=7)
    sampler = build(prior)

    def run(s):
        return s(**text, generator=torch.Generator().manual_seed(3))

    first = run(sampler)
    with torch.no_grad():
        prior.net.causal_transformer.layers[1][1][5].weight.mul_(-1.5)
    changed = run(sampler)
    assert relative_error(changed, first) > 0.01
    assert torch.equal(changed, run(build(prior)))
    prior.net.load_state_dict({name: value * 1.01 for name, value in prior.net.state_dict().items()}, assign=True)
    assert torch.equal(run(sampler), run(build(prior)))
    with torch.no_grad():
        prior.net.causal_transformer.layers[0][0].to_q.weight[0, 0] = float("nan")
    for _ in range(2):
        with pytest.raises(ValueError, match="loses too much"):
            run(sampler)


def test_bad_arguments():
    prior = make_prior(NET)
    with pytest.raises(ValueError, match="quantise='int4'; it must be None or 'int8' or 'float8'"):
        build(prior, "int4")

    class Adapter(Linear):
        pass

    prior.net.causal_transformer.layers[0][0].to_q.__class__ = Adapter
    with pytest.raises(ValueError, match="to_q of the Attention is a Adapter; it must be a plain Linear"):
        build(prior)


@pytest.mark.slow
def test_prior_pipelines_take_quantised_steps(monkeypatch):
    prior = without_diffusers(make_stock())
    schedule = DiffusersSchedule("UnCLIPScheduler", prediction_type="sample", variance_type="fixed_small_log")
    config = prior.config
    draw = torch.Generator().manual_seed(1)
    embeds, encodings = (torch.randn(*shape, config["embedding_dim"], generator=draw) for shape in ((2,), (2, 7)))
    text = TextEncoding(embeds, encodings, torch.arange(7) < torch.tensor([[3], [7]]))

    def run(pipeline):
        generator = torch.Generator().manual_seed(2)
        null, zero = TextEncoding(*(t[:1] for t in text)), torch.zeros(1, config["embedding_dim"])
        return pipeline(text, null, num_inference_steps=5, generator=generator, zero_embed=zero).image_embeds

    plain = PriorPipeline(prior, schedule)
    wanted, runs = run(plain), {}
    for path in "blocks", "modules", "reference", "compiled":
        pipeline = PriorPipeline(prior, schedule, quantise="int8", compile=path == "compiled", batch_sizes=(2,))
        with monkeypatch.context() as patch, ops.using("reference" if path == "reference" else None):
            if path == "modules":
                patch.setattr(ops.cpu_blocks, "takes_blocks", lambda *args, **kwargs: False)
            runs[path] = run(pipeline)
        assert relative_error(runs[path], runs["blocks"]) < 1e-3, path
        assert 1e-4 < relative_error(runs[path], wanted) < 0.1, path
        assert 0.999 <= pipeline.quality.median < 1
    first = runs["blocks"]
    with torch.no_grad():
        prior.transformer_blocks[1].ff.net[2].weight.mul_(-1)
    pipeline = PriorPipeline(prior, schedule, quantise="int8")
    changed = run(pipeline)
    assert relative_error(changed, first) > 0.01 and relative_error(changed, run(plain)) < 0.1
    with torch.no_grad():
        prior.transformer_blocks[0].attn1.to_k.weight[0, 0] = float("nan")
    for _ in range(2):
        with pytest.raises(ValueError, match="loses too much"):
            run(pipeline)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
@KINDS
def test_kernels_take_quantised_weights(kind):
    """As a step of a model calls them: all projections at once, the stream, the activation and the norms fused."""
    net = quantise.quantised(make_prior(dict(NET, dim=32, max_text_len=3)).net, kind)
    text = make_text(2, 32, length=3)
    with torch.no_grad():
        cond = net.prefill(**text, times=torch.arange(3))
        x, index = torch.randn(2, 32), torch.tensor(1)
        with ops.using("reference"):
            wanted = net.step(x, index, cond)
        with ops.using("triton"):
            got = net.step(x, index, cond)
    assert relative_error(got, wanted) < 1e-5
