"""Weights are swapped while others call: each answer is of one set of them, and what does not fit changes nothing."""

import copy
import threading
from functools import partial

import pytest
import torch

import fastprior
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.models.prior_transformer import prompt_memory
from fastprior.models.prior_transformer.as_network import PriorTransformerNet
from fastprior.models.prior_transformer.forward import PriorForward
from fastprior.models.weight_lock import weights_locked
from fastprior.pipelines.prior_pipeline import PriorPipeline
from fastprior.pipelines.shap_e import ShapEPrior
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.prior.loop import CachedSteps
from fastprior.serving.prior_sampler import PriorSampler
from helpers.priors import NETWORK, WordClip, make_prior, make_text, plain
from helpers.soak import live_bytes
from helpers.storm import DIM, Models, answers, make_transformer, storm

SHORT, LONG = 0.2, 30.0  # seconds: in which a swap would get into a call that lets it, and of a deadlock
CALLS = "fp32", "bf16", "int8", "guided", "sample", "p_sample_loop", "dpm++", "loop", "pipeline"


@pytest.fixture(scope="module")
def wanted():
    torch.manual_seed(0)
    return answers()


def _prior(models, states):
    models.prior.load_state_dict(states.prior.state_dict())
    models.transformer.load_state_dict(states.transformer.state_dict())


def _networks(models, states):
    models.prior.net.load_state_dict(states.prior.net.state_dict(), assign=True)
    models.transformer.load_state_dict(states.transformer.state_dict(), assign=True)


def _update(models, states):
    models.samplers["bf16"].update(states.prior)
    models.pipeline.update(states.transformer)


def _write(models, states):
    for model, other in ((models.prior.net, states.prior.net), (models.transformer, states.transformer)):
        with weights_locked(model):
            for weight, value in zip(model.parameters(), other.parameters()):
                weight.data = value.data.clone()


def swap_within(monkeypatch, swap):
    """Let `swap` begin in the middle of the next call: when its prefix is made, and no step has run."""
    threads = []

    def hooked(original):
        def inner(*args, **kwargs):
            made = original(*args, **kwargs)
            if not threads:
                threads.append(threading.Thread(target=swap, daemon=True))
                threads[0].start()
                threads[0].join(SHORT)
            return made

        return inner

    for owner, name in ((CachedSteps, "prefill"), (PriorForward, "prefill"), (prompt_memory, "recall")):
        monkeypatch.setattr(owner, name, hooked(getattr(owner, name)))
    return threads


@pytest.mark.slow
@pytest.mark.parametrize("swap", [_prior, _networks, _update, _write])
def test_a_swap_in_the_middle_of_a_call(swap, wanted, monkeypatch):
    models, others = Models(0), [Models(0), Models(1)]
    calls = models.calls()
    for turn, name in enumerate(CALLS):
        before, after = turn % 2, 1 - turn % 2
        calls[name](0)  # whatever is kept, is of the weights before
        threads = swap_within(monkeypatch, partial(swap, models, others[after]))
        got = calls[name](0)
        assert torch.equal(got, wanted[name, 0][before]), name
        threads[0].join(LONG)
        monkeypatch.undo()
        assert not threads[0].is_alive() and torch.equal(calls[name](0), wanted[name, 0][after]), name


def test_a_swap_between_steps_that_call_modules():
    prior, other = plain(make_prior()), make_prior(seed=1)
    run = dict(text_cond=make_text(2, 32), timesteps=3, progress=False)

    def sampled():
        return prior.p_sample_loop((2, 32), **run, generator=torch.Generator().manual_seed(0))

    threads, swaps = [], []

    def swap(*_):
        if swaps and not threads:
            load = partial(prior.load_state_dict, plain(other).state_dict())
            threads.append(threading.Thread(target=load, daemon=True))
            threads[0].start()
            threads[0].join(SHORT)

    prior.net.inner.causal_transformer.layers[1][0].register_forward_hook(swap)
    wanted = sampled()
    swaps.append(True)
    assert torch.equal(sampled(), wanted)
    threads[0].join(LONG)
    assert not threads[0].is_alive() and not torch.equal(sampled(), wanted)


@pytest.mark.slow
def test_storm_in_short(wanted):
    found = storm(calls=10**6, seconds=3, wanted=wanted)
    assert not found.errors and not found.wrong, found
    assert found.calls > 20 and found.changes, found


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(3))
def test_storm(seed):
    levels = []
    for part in range(4):
        found = storm(calls=1250, seconds=600, seed=seed * 10 + part)
        print(found)
        assert not found.errors and not found.wrong, found
        levels.append(live_bytes())
    assert max(levels[1:]) - levels[0] < 2**20, levels


# what takes weights


def answer(sampler, seed=0):
    return sampler(**make_text(2, DIM), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def served():
    return PriorSampler(make_prior(clip=WordClip()), timesteps=3, batch_sizes=(2,))


def _saved(prior, path, save):
    save(prior, path)
    return path


KINDS = {
    "prior": lambda prior, _: prior,
    "network": lambda prior, _: prior.net,
    "state dict": lambda prior, _: prior.state_dict(),
    "with a clip": lambda prior, _: make_prior(seed=1, clip=WordClip()).state_dict(),
    "network's state dict": lambda prior, _: prior.net.state_dict(),
    "in 16 bits": lambda prior, _: copy.deepcopy(prior).bfloat16().float().state_dict(),
    "file": lambda prior, folder: _saved(prior, folder / "prior.safetensors", fastprior.save),
    "raw file": lambda prior, folder: _saved(prior.state_dict(), folder / "prior.pth", torch.save),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*assumed")  # of a file that does not say how it was made
def test_a_sampler_takes(kind, served, tmp_path):
    other = make_prior(seed=1)
    clip = copy.deepcopy(served.prior.clip.state_dict())
    served.update(KINDS[kind](other, tmp_path))
    expected = copy.deepcopy(other).bfloat16().float() if kind == "in 16 bits" else other
    assert torch.equal(answer(served), answer(PriorSampler(expected, timesteps=3, batch_sizes=(2,))))
    assert all(torch.equal(clip[name], value) for name, value in served.prior.clip.state_dict().items())


def _changed(make, name="learned_query"):
    return lambda: make_prior(seed=1).state_dict() | {f"net.{name}": make(torch.ones(DIM))}


def _without(name):
    return lambda: {key: value for key, value in make_prior(seed=1).state_dict().items() if key != name}


UNFIT = {
    "missing": (_without("net.learned_query"), "learned_query is missing"),
    "unexpected": (_changed(lambda t: t, "more"), "more is unexpected"),
    "of something else": (lambda: {"step": 3}, "is missing"),
    "empty": (dict, "is missing"),
    "shape": (_changed(lambda t: t[:3]), r"has shape \(3,\); it must be \(32,\)"),
    "no tensor": (_changed(lambda t: 3), "is a int"),
    "complex": (_changed(lambda t: t.to(torch.complex64)), "complex64"),
    "integers": (_changed(lambda t: t.to(torch.int8)), "int8"),
    "meta": (_changed(lambda t: t.to("meta")), "meta"),
    "sparse": (_changed(lambda t: t.to_sparse()), "sparse"),
    "nan": (_changed(lambda t: t * float("nan")), "NaN or infinity"),
    "infinite here": (_changed(lambda t: t.double() * 1e300), "NaN or infinity"),
    "schedule": (lambda: make_prior(seed=1, beta_schedule="linear").state_dict(), "betas"),
    "steps": (lambda: make_prior(seed=1, timesteps=21), "betas"),
    "prediction": (lambda: make_prior(seed=1, predict_v=True), "prediction='v'"),
    "scale": (lambda: make_prior(seed=1, image_embed_scale=3.0), "image_embed_scale=3.0"),
    "attention": (lambda: make_prior(dict(cosine_sim=False), seed=1), "cosine_sim=False"),
    "guidance": (lambda: make_prior(seed=1, cond_drop_prob=0.0), "can_classifier_guidance=False"),
    "transformer": (lambda: make_transformer(1), "is missing|kind"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_does_not_fit_changes_nothing(kind, served):
    make, message = UNFIT[kind]
    before, wanted = copy.deepcopy(served.prior.state_dict()), answer(served)
    with pytest.raises(ValueError, match=message):
        served.update(make())
    assert all(torch.equal(before[name], value) for name, value in served.prior.state_dict().items())
    assert torch.equal(answer(served), wanted)


def test_what_is_no_weights(served, tmp_path):
    with pytest.raises(TypeError, match="weights is a int"):
        served.update(3)
    with pytest.raises(FileNotFoundError):
        served.update(tmp_path / "none.safetensors")


@pytest.mark.slow
def test_quantised_weights_are_judged_before_they_serve():
    sampler = PriorSampler(make_prior(), timesteps=3, batch_sizes=(2,), quantise="int8")
    other = make_prior(seed=1)
    sampler.update(other)
    fresh = PriorSampler(other, timesteps=3, batch_sizes=(2,), quantise="int8")
    assert sampler.quality == fresh.quality and torch.equal(answer(sampler), answer(fresh))
    bad = make_prior(seed=2)
    with torch.no_grad():  # numbers so large that 8 bits keep nothing else of their rows, and that say nothing
        for attn, _ in bad.net.causal_transformer.layers:
            attn.norm.g[0] = 0
            attn.to_q.weight[:, 0] = attn.to_kv.weight[:, 0] = 1e4
    with pytest.raises(ValueError, match="loses too much"):
        sampler.update(bad)
    assert sampler.quality == fresh.quality and torch.equal(answer(sampler), answer(fresh))


def test_quantised_weights_are_judged_by_the_steps_that_they_serve(monkeypatch):
    """Of the same solver and spacing, when they are built and when others come."""
    plan, seen, steps = DiffusionPrior.sampling_plan, [], dict(timesteps=3, solver="sde-dpm++", spacing="logsnr")

    def noted(self, *args, **kwargs):
        made = plan(self, *args, **kwargs)
        seen.append((len(made.table), made.table.solver, made.table.spacing))
        return made

    monkeypatch.setattr(DiffusionPrior, "sampling_plan", noted)
    sampler = PriorSampler(make_prior(), batch_sizes=(2,), quantise="int8", **steps)
    built = len(seen)
    sampler.update(make_prior(seed=1))
    assert 1 < built < len(seen) and set(seen) == {tuple(steps.values())}


def pipeline_answer(pipeline):
    encoding = Models(0).encoding
    draw = torch.Generator().manual_seed(0)
    return pipeline(encoding, num_inference_steps=3, guidance_scale=1.0, generator=draw).image_embeds


PIPELINE_KINDS = {
    "transformer": lambda model, _: model,
    "state dict": lambda model, _: model.state_dict(),
    "network": lambda model, _: PriorTransformerNet(model),
    "prior": lambda model, _: fastprior.DiffusionPrior(PriorTransformerNet(model), image_embed_dim=DIM),
    "prior's state dict": lambda model, _: PIPELINE_KINDS["prior"](model, _).state_dict(),
    "folder": lambda model, folder: _saved(model, folder, lambda model, path: model.save_pretrained(path)),
    "pipeline's folder": lambda model, folder: model.save_pretrained(folder / "prior") or folder,
    "file": lambda model, f: _saved(PIPELINE_KINDS["prior"](model, f), f / "prior.safetensors", fastprior.save),
}


@pytest.mark.parametrize("kind", PIPELINE_KINDS)
def test_a_pipeline_takes(kind, tmp_path):
    schedule, other = DiffusersSchedule("UnCLIPScheduler"), make_transformer(1)
    pipeline = PriorPipeline(make_transformer(0), schedule)
    before = pipeline_answer(pipeline)
    pipeline.update(PIPELINE_KINDS[kind](other, tmp_path))
    wanted = pipeline_answer(PriorPipeline(other, schedule))
    assert torch.equal(pipeline_answer(pipeline), wanted) and not torch.equal(before, wanted)


@pytest.mark.parametrize("kind", ["prior", "nan", "layers", "dalle2"])
def test_what_does_not_fit_changes_nothing_of_a_pipeline(kind):
    model = make_transformer(0)
    pipeline, shap_e = (make(model, DiffusersSchedule("UnCLIPScheduler")) for make in (PriorPipeline, ShapEPrior))
    before, other = copy.deepcopy(model.state_dict()), make_transformer(1)
    if kind == "layers":
        other = type(model)(**dict(model.config, num_layers=3))
    if kind == "nan":
        with torch.no_grad():
            other.proj_in.weight[0, 0] = float("nan")
    given = dict(prior=[], dalle2=make_prior(NETWORK)).get(kind, other)
    for served in (pipeline, shap_e):
        with pytest.raises((ValueError, TypeError)):
            served.update(given)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_a_quantised_pipeline_judges_before_it_serves(lenient):
    schedule, other = DiffusersSchedule("UnCLIPScheduler"), make_transformer(1)
    pipeline = PriorPipeline(make_transformer(0), schedule, quantise="int8")
    pipeline_answer(pipeline)
    pipeline.update(other)
    fresh = PriorPipeline(other, schedule, quantise="int8")
    wanted = pipeline_answer(fresh)
    assert torch.equal(pipeline_answer(pipeline), wanted) and pipeline.quality == fresh.quality
    bad = make_transformer(2)
    with torch.no_grad():
        for block in bad.transformer_blocks:
            block.norm1.weight[0] = block.norm1.bias[0] = 0  # so that the large numbers say nothing
            block.attn1.to_q.weight[:, 0] = block.attn1.to_v.weight[:, 0] = 1e4
    with pytest.raises(ValueError, match="loses too much"):
        pipeline.update(bad)
    assert torch.equal(pipeline_answer(pipeline), wanted)


def test_shap_e_takes_weights():
    schedule, other = DiffusersSchedule("HeunDiscreteScheduler"), make_transformer(1)
    shap_e = ShapEPrior(make_transformer(0), schedule)
    shap_e.update(other.state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in shap_e.prior.state_dict().items())
