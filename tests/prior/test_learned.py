"""Runs by learned step tables: the same bits whichever way they go, and never with other weights than the table's."""

import copy
import pickle
import re

import pytest
import torch

from fastprior import PriorSampler
from fastprior.engine.steps import bind, run_table
from fastprior.kernels import ops
from fastprior.models import quality
from fastprior.prior import learned
from fastprior.prior.loop import CachedSteps
from helpers.cpu_cases import NEEDS_KERNELS
from helpers.learned import make_table, with_table
from helpers.priors import make_prior, make_text, relative_error, sample

N = 5
OTHER_WEIGHTS = "was learned for other weights than these; tune the prior again"


def run_of(**kwargs):
    return dict(timesteps=N, solver="learned", cond_scale=2.5) | kwargs


@pytest.fixture
def prior():
    return with_table(make_prior(timesteps=30))


def generator():
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("kind", [
    dict(), dict(predict_v=True), dict(predict_x_start=False, clamp=2.0), dict(sampling_clamp_l2norm=True),
    dict(init_image_embed_l2norm=True, sampling_final_clamp_l2norm=True),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("self_cond", [False, True])
def test_every_way_gives_the_same(kind, self_cond):
    prior = with_table(make_prior(dict(self_cond=self_cond), timesteps=30, **kind))
    text = make_text(3, 32)
    embeds = sample(prior, text, rows=6, **run_of())
    assert prior.sampling_plan(N, 2.5, "learned").path == "cached"
    hook = prior.net.register_forward_hook(lambda *_: None)
    assert prior.sampling_plan(N, 2.5, "learned").path == "plain"
    assert relative_error(sample(prior, text, rows=6, **run_of()), embeds) < 1e-4
    hook.remove()
    untuned = sample(prior, text, rows=6, **run_of(solver="dpm++", spacing="logsnr"))
    assert relative_error(untuned, embeds) > 1e-2


@NEEDS_KERNELS
def test_bits_of_c_and_of_the_sampler(prior):
    """A run of C, its steps one by one, `sample`, and a sampler have the same bits."""
    text, draw = make_text(3, 32), torch.randn(3, 32, generator=generator())
    wanted = prior.p_sample_loop((3, 32), text, generator=generator(), progress=False, **run_of())
    plan = prior.sampling_plan(N, 2.5, "learned")
    with torch.no_grad(), ops.sharing():
        steps = CachedSteps(prior.net, plan)
        inputs = steps.prefill(text, 1)
        assert isinstance(steps.run(inputs, 2.5, 3), ops.Run)
        step = bind(steps.step, inputs, torch.tensor(2.5))
        assert torch.equal(prior.denormalize(run_table(plan.table, step, draw, iter(()))), wanted)
    sampler = PriorSampler(prior, batch_sizes=(3,), timesteps=N, solver="learned", compile=False)
    assert torch.equal(sampler(**text, cond_scale=2.5, generator=generator()), wanted)
    once = prior.sample(**text, num_samples_per_batch=1, generator=generator(), progress=False, **run_of())
    assert torch.equal(once, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs")
def test_bits_of_graphs(prior):
    prior, text = prior.cuda(), {name: t.cuda() for name, t in make_text(3, 32).items()}

    def run():
        draw = torch.Generator("cuda").manual_seed(7)
        return prior.p_sample_loop((3, 32), text, generator=draw, progress=False, **run_of())

    prior.graphs = False
    wanted = run()
    prior.graphs = True
    assert prior.sampling_plan(N, 2.5, "learned", rows=3).graphs and torch.equal(run(), wanted)
    sampler = PriorSampler(prior, batch_sizes=(3,), timesteps=N, solver="learned", compile=False)
    assert sampler.graphs
    draw = torch.Generator("cuda").manual_seed(7)
    assert torch.equal(sampler(**text, cond_scale=2.5, generator=draw), wanted)


def test_a_table_is_one_of_the_weights_in_any_dtype(prior):
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        other = copy.deepcopy(prior)
        other.net.to(dtype)
        assert other.sampling_plan(N, 2.0, "learned").table is other.learned_tables[N]
        other.net.learned_query.data[3] += 0.25
        with pytest.raises(ValueError, match=OTHER_WEIGHTS):
            other.sampling_plan(N, 2.0, "learned")


def load_others(prior):
    prior.load_state_dict(make_prior(timesteps=30, seed=5).state_dict())


@torch.no_grad()
def step_of_training(prior):
    prior.net.learned_query.add_(1e-6)  # too little for bf16


def average(prior):
    for own, other in zip(prior.parameters(), make_prior(timesteps=30, seed=5).parameters()):
        own.data.lerp_(other.data, 0.001)


def another_network(prior):
    prior.net = copy.deepcopy(make_prior(timesteps=30, seed=5).net)


def rounded(prior):
    prior.net.bfloat16().float()


def another_schedule(prior):
    prior.load_state_dict(make_prior(timesteps=30, beta_schedule="linear").state_dict())


def another_prediction(prior):
    prior.predict_v = True


def another_clamp(prior):
    prior.clamp = "l2"


CHANGES = [load_others, step_of_training, average, another_network, rounded, another_schedule, another_prediction,
           another_clamp]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_table_of_other_weights_is_refused(prior, change):
    text = make_text(2, 32)
    before = sample(prior, text, **run_of())
    state, settings = copy.deepcopy(prior.state_dict()), {n: vars(prior)[n] for n in ("predict_v", "clamp")}
    change(prior)
    for run in (lambda: sample(prior, text, **run_of()), lambda: PriorSampler(prior, timesteps=N, solver="learned")):
        with pytest.raises(ValueError, match=OTHER_WEIGHTS):
            run()
    assert sample(prior, text, **run_of(solver="dpm++")).isfinite().all()
    vars(prior).update(settings)
    prior.load_state_dict(state)
    assert torch.equal(sample(prior, text, **run_of()), before)


def test_weights_are_hashed_once(prior, monkeypatch):
    found, text = [], make_text(2, 32)
    digest = learned._digest
    monkeypatch.setattr(learned, "_digest", lambda *args: found.append(args) or digest(*args))
    sampler = PriorSampler(prior, batch_sizes=(2,), timesteps=N, solver="learned", compile=False)
    for _ in range(3):
        sample(prior, text, **run_of())
        sampler(**text, cond_scale=2.0)
    assert len(found) == 1
    prior.net.learned_query.data.add_(0)  # bits stay, and nobody can know without looking
    step_of_training(prior)
    with pytest.raises(ValueError, match=OTHER_WEIGHTS):
        sampler(**text, cond_scale=2.0)
    assert len(found) == 2


def test_a_sampler_refuses_other_weights(prior):
    text, state = make_text(2, 32), copy.deepcopy(prior.state_dict())
    sampler = PriorSampler(prior, batch_sizes=(2,), timesteps=N, solver="learned", compile=False)
    before = sampler(**text, cond_scale=2.0, generator=generator())
    others = make_prior(timesteps=30, seed=5)
    for weights in (others, others.state_dict(), others.net.state_dict()):
        with pytest.raises(ValueError, match=OTHER_WEIGHTS):
            sampler.update(weights)
        assert torch.equal(sampler(**text, cond_scale=2.0, generator=generator()), before)  # nothing has changed
    sampler.update(state)  # the same
    assert torch.equal(sampler(**text, cond_scale=2.0, generator=generator()), before)
    prior.load_state_dict(others.state_dict())  # behind its back
    for _ in range(2):
        with pytest.raises(ValueError, match=OTHER_WEIGHTS):
            sampler(**text, cond_scale=2.0)
    prior.learned_tables = with_table(others).learned_tables  # which the sampler was not built for
    with pytest.raises(ValueError, match=OTHER_WEIGHTS):
        sampler(**text, cond_scale=2.0)
    assert PriorSampler(prior, batch_sizes=(2,), timesteps=N, solver="learned")(**text).isfinite().all()
    prior.load_state_dict(state)
    assert torch.equal(sampler(**text, cond_scale=2.0, generator=generator()), before)


@pytest.mark.parametrize("scales, guidance, right, wrong", [
    (((1.0, 4.0),), True, (1, 2.5, 4.0), (0.99, 4.01)),
    (((2.0, 3.0),), True, (2, 3), (1, 1.9)),
    (((1.0, 1.0),), False, (1,), (2,)),
    (((1.0, 1.0), (3.0, 3.0)), True, (1, 3), (2, 3.001)),
])  # fmt: skip
def test_guidance_out_of_range_is_refused(scales, guidance, right, wrong):
    prior, text = with_table(make_prior(timesteps=30), scales=scales), make_text(2, 32)
    sampler = PriorSampler(prior, batch_sizes=(2,), timesteps=N, solver="learned", compile=False)
    assert sampler.guidance == guidance and list(sampler.warmup()) == [2]
    for scale in right:
        assert sampler(**text, cond_scale=scale).isfinite().all()
        assert sample(prior, text, **run_of(cond_scale=scale)).isfinite().all()
    for scale in wrong:
        for run in (sampler, lambda **text: sample(prior, text, **run_of(cond_scale=text.pop("cond_scale")))):
            with pytest.raises(ValueError, match=f"cond_scale={scale}; "):
                run(**text, cond_scale=scale)


def test_a_quantised_sampler_is_judged_at_the_tables_scales(prior, monkeypatch):
    scales = []
    run = prior.p_sample_loop
    monkeypatch.setattr(prior, "p_sample_loop", lambda *args, **kw: scales.append(args[2]) or run(*args, **kw))
    monkeypatch.setattr(quality, "judge", lambda *_: quality.Quality(1, 1))  # these weights are random
    PriorSampler(prior, batch_sizes=(16,), timesteps=N, solver="learned", quantise="int8", compile=False)
    assert scales == [1.0, 4.0]


@pytest.mark.parametrize("kwargs, message", [
    (dict(timesteps=6), "timesteps=6; learned tables of this prior have these evaluations: 5"),
    (dict(timesteps=None), "timesteps=30; learned tables of this prior have these evaluations: 5"),
    (dict(timesteps=5.0), "timesteps=5.0; learned tables"),
    (dict(spacing="logsnr"), "spacing='logsnr'; a learned table has times and no noise, so it must be None"),
    (dict(eta=0.0), "eta=0.0; a learned table has times and no noise, so it must be None"),
    (dict(cond_scale=5.0), "cond_scale=5.0; the table of 5 evaluations was learned for 1:4, and it must be within"),
    (dict(cond_scale=float("nan")), "cond_scale=nan"),
])  # fmt: skip
def test_what_does_not_fit_a_table(prior, kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(prior, make_text(2, 32), **run_of(**kwargs))
    if "cond_scale" not in kwargs:  # of calls
        with pytest.raises(ValueError, match=re.escape(message)):
            PriorSampler(prior, **dict(timesteps=N, solver="learned") | kwargs)


def test_a_prior_without_tables():
    prior = make_prior(timesteps=30)
    assert not prior.learned_tables
    with pytest.raises(ValueError, match="have these evaluations: none, which `fastprior tune` makes"):
        sample(prior, make_text(2, 32), **run_of())


def test_steps_that_somebody_replaced():
    """They are called, as with any solver."""
    prior, text, calls = with_table(make_prior(timesteps=30, sampling_clamp_l2norm=True)), make_text(2, 32), []
    wanted, own = sample(prior, text, **run_of()), prior.l2norm_clamp_embed
    prior.l2norm_clamp_embed = lambda x: calls.append(x) or own(x)
    assert relative_error(sample(prior, text, **run_of()), wanted) < 1e-4 and len(calls) == N


def test_copies_have_the_table(prior):
    text = make_text(2, 32)
    wanted = sample(prior, text, **run_of())
    for other in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
        assert torch.equal(sample(other, text, **run_of()), wanted)


def test_tables_of_a_prior_from_before_them(prior):
    del vars(prior)["learned_tables"]  # as unpickled
    assert sample(prior, make_text(2, 32), timesteps=4).isfinite().all() and not prior.learned_tables


def test_a_table_says_what_it_is_for(prior):
    assert str(make_table(prior, scales=((1.0, 1.0), (2.0, 3.5)))) == "5 evaluations, cond_scale 1 and 2:3.5"
