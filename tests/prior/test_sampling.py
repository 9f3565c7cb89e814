"""Which path a run takes, that every path gives the same result, and that nothing a user overrides is skipped."""

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import fastprior
from fastprior import PriorSampler
from fastprior.models.dalle2.layers import Attention, l2norm
from helpers.pairwise import pairwise
from helpers.priors import WordClip, make_prior, make_text, plain, relative_error, sample

TOLERANCE = 1e-4  # of scale, what a whole fp32 run may differ by: two orders of summation, amplified by the solver


NETWORKS = {
    "default": {},
    "self_cond": dict(self_cond=True),
    "discrete": dict(num_timesteps=20, normformer=True, norm_in=True),
    "many": dict(num_time_embeds=2, num_image_embeds=3, num_text_embeds=2, rotary_emb=False),
    "bare": dict(norm_out=False, final_proj=False, depth=1),
    "dot": dict(cosine_sim=False, dot_scale=0.25),
}
RUNS = {
    "ddpm": {},
    "ddim": dict(timesteps=9),
    "ddim_eta": dict(timesteps=9, eta=0.3),
    "trailing": dict(timesteps=9, solver="ddim_trailing"),
    "dpm++": dict(timesteps=9, solver="dpm++"),
    "logsnr": dict(timesteps=9, solver="dpm++", spacing="logsnr"),
    "sde": dict(timesteps=9, solver="sde-dpm++", spacing="logsnr"),
    "karras": dict(timesteps=9, solver="ddim_trailing", spacing="karras", eta=0.3),
}


@pytest.mark.parametrize(
    "net, run, cond_scale, prediction",
    pairwise(net=NETWORKS, run=RUNS, cond_scale=[1.0, 4.0], prediction=["x0", "v"]),
)
def test_cached_equals_plain(net, run, cond_scale, prediction):
    prior = make_prior(NETWORKS[net], predict_v=prediction == "v", clamp=None if run == "ddpm" else "l2")
    text, kwargs = make_text(3, 32), dict(RUNS[run], cond_scale=cond_scale)
    other = plain(prior)
    with torch.no_grad():
        got, wanted = sample(prior, text, **kwargs), sample(other, text, **kwargs)
    plan = prior.sampling_plan(**dict(dict(timesteps=None), **kwargs))
    assert plan.path == "cached" and not plan.reasons
    assert other.net.calls == len(plan.table)
    assert relative_error(got, wanted) < TOLERANCE
    assert relative_error(sample(prior, text, seed=2, **kwargs), wanted) > 3 * TOLERANCE, "the seed must matter"


@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
@pytest.mark.parametrize("net", ["default", "self_cond"])
def test_samples_of_a_prompt_share_its_prefix(net, cond_scale):
    prior, text = make_prior(NETWORKS[net]), make_text(2, 32)
    repeated = {name: t.repeat_interleave(3, dim=0) for name, t in text.items()}
    kwargs = dict(rows=6, timesteps=7, cond_scale=cond_scale)
    assert relative_error(sample(prior, text, **kwargs), sample(prior, repeated, **kwargs)) < TOLERANCE
    assert relative_error(sample(plain(prior), text, **kwargs), sample(prior, repeated, **kwargs)) < TOLERANCE


def test_plan_says_what_happens():
    prior = make_prior()
    plan = prior.sampling_plan(8, cond_scale=2.0)
    assert (plan.path, plan.guidance, plan.table.solver, len(plan.table)) == ("cached", "null table", "ddim", 7)
    assert (plan.prefix_tokens, plan.suffix_tokens) == (8, 3)
    assert str(plan) == (
        "cached path, ddim, 7 evaluations, guidance: null table\n"
        "prefix of 8 tokens once per prompt, 3 tokens per step\n"
        "no CUDA graphs: the prior is on cpu"
    )
    spaced = prior.sampling_plan(8, solver="dpm++", spacing="logsnr")
    assert str(spaced).startswith("cached path, dpm++ at logsnr times, 8 evaluations, guidance: none\n")
    assert str(prior.sampling_plan(8, solver="dpm++")).startswith("cached path, dpm++ at trailing times, 8 evaluations")
    assert make_prior(dict(self_cond=True)).sampling_plan(8, 2.0).guidance == "second branch"
    foreign = plain(prior).sampling_plan(8, 2.0)
    assert (foreign.path, foreign.guidance, foreign.prefix_tokens) == ("plain", "two passes", None)
    assert "not cached: net is a Foreign, not a fastprior.DiffusionPriorNetwork" in str(foreign)


def counting(owner, name):
    """Count the calls of a method replaced on the class of `owner`, by a subclass that calls the original."""
    calls = []
    original = getattr(type(owner), name)

    def method(self, *args, **kwargs):
        calls.append(name)
        return original(self, *args, **kwargs)

    owner.__class__ = type("Custom" + type(owner).__name__, (type(owner),), {name: method})
    return calls


OVERRIDES = [
    ("prior", "p_sample", "ddpm", 20),
    ("prior", "p_mean_variance", "ddpm", 20),
    ("prior", "p_sample_loop_ddpm", "ddpm", 1),
    ("prior", "p_sample_loop_ddim", "ddim", 1),
    ("prior", "l2norm_clamp_embed", "ddim", 8),
    ("prior.net", "forward", "ddim", 8),
    ("prior.net", "forward_with_cond_scale", "ddim", 8),
    ("prior.noise_scheduler", "q_posterior", "ddpm", 20),
    ("prior.noise_scheduler", "predict_start_from_v", "ddim", 8),
]


@pytest.mark.parametrize("owner, name, run, times", OVERRIDES)
def test_overridden_methods_are_called(owner, name, run, times):
    clamp = name == "l2norm_clamp_embed"
    prior = make_prior(predict_v=name == "predict_start_from_v", sampling_clamp_l2norm=clamp)
    text, wanted = make_text(2, 32), None
    wanted = sample(prior, text, **RUNS[run])
    calls = counting(eval(owner), name)
    got = sample(prior, text, **RUNS[run])
    assert len(calls) == times
    assert relative_error(got, wanted) < TOLERANCE


def test_overridden_loop_is_called_by_sample():
    prior, text = make_prior(), make_text(3, 32)
    torch.manual_seed(1)
    wanted = prior.sample(**rename(text), timesteps=6, progress=False)
    calls = counting(prior, "p_sample_loop")
    torch.manual_seed(1)
    assert relative_error(prior.sample(**rename(text), timesteps=6, progress=False), wanted) < TOLERANCE
    assert calls == ["p_sample_loop"]


def rename(text):
    return dict(text_embed=text["text_embed"], text_encodings=text["text_encodings"])


def test_what_else_leaves_the_cached_path():
    def reason(change, prior=None):
        prior = prior or make_prior(dict(attn_dropout=0.1))
        change(prior)
        plan = prior.sampling_plan(8)
        assert plan.path == "plain"
        return " ".join(plan.reasons)

    layers = "prior.net.causal_transformer.layers"
    assert "dropout is active" in reason(lambda prior: prior.train())
    assert "a forward hook" in reason(lambda prior: eval(layers)[0][0].register_forward_hook(lambda *a: None))
    assert "a forward hook" in reason(lambda prior: prior.net.register_forward_pre_hook(lambda *a: None))
    assert "a Sequential stands in" in reason(lambda prior: eval(layers)[0].__setitem__(1, nn.Sequential()))
    assert "causal_transformer is a Identity" in reason(lambda p: setattr(p.net, "causal_transformer", nn.Identity()))
    assert "Attention was replaced" in reason(
        lambda prior: setattr(eval(layers)[1][0], "forward", lambda x, **kwargs: x)
    )
    assert "DiffusionPriorNetwork.forward is overridden" in reason(lambda p: setattr(p.net, "forward", p.net.forward))
    prior = make_prior()
    assert isinstance(prior.net.causal_transformer.layers[0][0], Attention)
    assert prior.train().sampling_plan(8).path == "cached", "training mode without dropout changes nothing"


def test_wrapped_linears_are_called():
    """LoRA and parametrizations replace or wrap the linears: both paths must go through the modules."""
    prior, text = make_prior(), make_text(2, 32)
    before = sample(prior, text, timesteps=6)
    for attn, _ in prior.net.causal_transformer.layers:
        nn.utils.parametrizations.weight_norm(attn.to_q)
        attn.to_q.parametrizations.weight.original0.data.mul_(3)
        attn.to_kv.register_forward_hook(lambda module, args, out: out * 0.5)
    got = sample(prior, text, timesteps=6)
    assert relative_error(got, sample(plain(prior), text, timesteps=6)) < TOLERANCE
    assert relative_error(got, before) > 1e-3


@pytest.mark.parametrize("edit", ["data", "inplace", "load", "replace"])
def test_null_table_follows_the_weights(edit):
    prior, text = make_prior(), make_text(2, 32)
    kwargs = dict(timesteps=6, cond_scale=3.0)
    before = sample(prior, text, **kwargs)
    weight = prior.net.null_image_embed
    with torch.no_grad():
        if edit == "data":
            weight.data.mul_(-2)
        elif edit == "inplace":
            weight.mul_(-2)
        elif edit == "load":
            prior.load_state_dict(prior.state_dict() | {"net.null_image_embed": weight * -2})
        else:
            prior.net.null_image_embed = nn.Parameter(weight * -2)
    after = sample(prior, text, **kwargs)
    assert relative_error(after, before) > 1e-3
    assert relative_error(after, sample(plain(prior), text, **kwargs)) < TOLERANCE


@pytest.mark.parametrize("dtype, median, worst", [(torch.bfloat16, 0.999, 0.97), (torch.float16, 0.9999, 0.999)])
@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
def test_16_bit_weights(dtype, median, worst, cond_scale):
    """A tiny random network is far more sensitive than a trained one; its typical row must still agree."""
    prior, text = make_prior(dict(dim=64, num_timesteps=20)), make_text(16, 64)
    wanted = sample(prior, text, timesteps=8, cond_scale=cond_scale)
    got = sample(prior.to(dtype), text, timesteps=8, cond_scale=cond_scale)
    assert prior.net.learned_query.dtype == dtype and prior.noise_scheduler.betas.dtype == torch.float32
    assert got.dtype == torch.float32
    similarity = torch.cosine_similarity(got, wanted)
    assert similarity.median() > median and similarity.min() > worst
    times = torch.arange(1000)
    continuous = make_prior().to(dtype).net.time_tokens(times)
    assert len(continuous.unique(dim=0)) > 990, "times must not be rounded to 16 bits"
    loss = prior(image_embed=l2norm(torch.randn(16, 64)), **text)
    loss.backward()
    assert loss.isfinite() and prior.net.learned_query.grad.abs().sum() > 0


def test_embeddings_with_more_dimensions_through_a_foreign_net():
    class Net(nn.Module):
        dim, self_cond = 16, False

        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(16, 16)

        def forward(self, x, t, *, text_embed, self_cond=None, text_cond_drop_prob=0.0, image_cond_drop_prob=0.0):
            return self.mix(x) + text_embed + t.view(-1, 1, 1) / 100

        def forward_with_cond_scale(self, *args, cond_scale=1.0, **kwargs):
            return self(*args, **kwargs)

    prior = fastprior.DiffusionPrior(Net(), image_embed_dim=16, timesteps=30, condition_on_text_encodings=False)
    text = dict(text_embed=torch.randn(2, 5, 16))
    assert prior(image_embed=torch.randn(2, 5, 16), **text).isfinite()
    torch.manual_seed(1)
    out = prior.p_sample_loop((2, 5, 16), text_cond=text, timesteps=10, progress=False)
    assert out.shape == (2, 5, 16) and out.isfinite().all() and out.std() > 0.01


def clip_prior():
    torch.manual_seed(0)
    net = fastprior.DiffusionPriorNetwork(dim=32, depth=2, dim_head=16, heads=4, max_text_len=7)
    return fastprior.DiffusionPrior(net, clip=WordClip(), timesteps=20, cond_drop_prob=0.2, sample_timesteps=6)


def test_sample_from_strings_tokens_and_embeddings_agree():
    prior = clip_prior()
    words = ["cat", "a dog"]
    tokens = prior.clip.tokenize(words)
    embed, encodings = prior.clip.embed_text(tokens)
    prior.clip.calls = 0
    results = []
    for kwargs in (
        dict(text=words), dict(text=tokens), dict(text_embed=embed, text_encodings=encodings),
        dict(text_embed=embed, text_encodings=prior.clip.clip(tokens), mask=tokens != 0),
    ):  # fmt: skip
        torch.manual_seed(1)
        results.append(prior.sample(**kwargs, progress=False))
    assert prior.clip.calls == 2, "CLIP is run once per call, not once per sample"
    for result in results[1:]:
        assert relative_error(result, results[0]) < TOLERANCE
    assert prior.sample("cat", progress=False).shape == (1, 32)


def test_best_of_n_takes_the_most_similar_and_both_spellings_work():
    prior, text = make_prior(), make_text(3, 32)
    every = sample(prior, text, rows=12, timesteps=6).view(3, 4, 32)
    similarity = torch.cosine_similarity(every, text["text_embed"][:, None], dim=-1)
    wanted = every[torch.arange(3), similarity.argmax(dim=-1)]
    assert similarity.std() > 0
    for spelling in ("num_samples_per_batch", "n_samples_per_batch"):
        torch.manual_seed(1)
        got = prior.sample(**rename(text), timesteps=6, progress=False, **{spelling: 4})
        assert relative_error(got, wanted) < TOLERANCE


def test_generator_and_progress(capsys):
    prior, text = make_prior(), make_text(2, 32)
    before = torch.get_rng_state()
    runs = [
        prior.sample(**rename(text), timesteps=6, generator=torch.Generator().manual_seed(4), progress=bar)
        for bar in (True, False)
    ]
    assert torch.equal(*runs) and torch.equal(torch.get_rng_state(), before)
    assert capsys.readouterr().err.count("sampling loop time step") > 0
    prior.sample(**rename(text), timesteps=6, progress=False)
    assert capsys.readouterr().err == ""
    with pytest.raises(TypeError, match="generator"):  # clients look for this signature
        prior.p_sample_loop_ddim((2, 32), text, timesteps=6, generator=None)


def test_sample_restores_the_mode_and_batch_size_sampling_works():
    prior, text = make_prior(dict(attn_dropout=0.5)), make_text(2, 32)
    prior.train()
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(prior.sample(**rename(text), timesteps=6, progress=False))
    assert prior.training and prior.net.training
    assert torch.equal(*runs)
    assert prior.sample_batch_size(2, text).norm(dim=-1).mean() > 0.1


def test_pred_can_be_divided_in_place_before_backward():
    prior, text = make_prior(), make_text(2, 32)
    pred = prior.net(torch.randn(2, 32), torch.tensor([1, 2]), **text)
    pred /= 3
    (pred * torch.randn(2, 32)).sum().backward()
    assert prior.net.learned_query.grad.abs().sum() > 0


def test_clamps():
    text = make_text(3, 32)
    for clamp, limit in ((0.5, 0.5), (None, float("inf"))):
        prior = make_prior(clamp=clamp)
        out = sample(prior, text, timesteps=6) * prior.image_embed_scale
        assert out.abs().max() <= limit + 1e-6 and (clamp is None or out.abs().max() > 0.49)
    prior = make_prior(clamp="l2")
    assert torch.allclose(sample(prior, text, timesteps=6).norm(dim=-1), torch.ones(3), atol=1e-5)
    assert make_prior(predict_x_start=False).sampling_plan(6).clamp == "range"
    assert make_prior(predict_x_start=False, clamp=None).sampling_plan(6).clamp is None
    assert make_prior(sampling_clamp_l2norm=True).sampling_plan(6).clamp == "l2"


@pytest.mark.parametrize("name, steps", [("p_sample_loop_ddim", 5), ("p_sample_loop_ddpm", None)])
def test_an_overridden_loop_is_given_no_spacing(name, steps):
    prior = make_prior()
    calls = counting(prior, name)
    with pytest.raises(ValueError, match="spacing='logsnr'; the dd.m solver has times of its own"):
        sample(prior, TEXT, timesteps=steps, spacing="logsnr")
    assert not calls
    sample(prior, TEXT, timesteps=steps, spacing=None)
    assert calls == [name]


TEXT = make_text(2, 32)
BAD_CALLS = [
    (dict(cond_scale=2.0), dict(cond_drop_prob=0.0), "cond_scale=2.0; this prior was built without conditional"),
    (dict(timesteps=21), {}, "timesteps=21; the schedule has 20, so it must be 1 to 20"),
    (dict(solver="euler"), {}, "solver='euler'; it must be one of"),
    (dict(solver="dpm++", timesteps=5, eta=0.1), {}, "eta=0.1; the dpm"),
    (dict(solver="dpm++", timesteps=5, spacing="even"), {}, "spacing='even'; it must be one of 'trailing', 'logsnr'"),
    (dict(timesteps=5, spacing="logsnr"), {}, "spacing='logsnr'; the ddim solver has times of its own, so it must be"),
    (dict(text=dict(text_embed=TEXT["text_embed"][:, :16])), {}, r"text_embed has shape \(2, 16\); it must be"),
    (dict(text=dict(TEXT, text_encodings=torch.zeros(2, 5, 8))), {}, r"text_encodings has shape \(2, 5, 8\); it"),
    (dict(text=dict(TEXT, text_encodings=torch.zeros(1, 5, 32))), {}, "has 1 rows and text_embed 2; they must agree"),
    (dict(text=dict(TEXT, text_embed=TEXT["text_embed"] * float("nan"))), {}, r"text_cond\['text_embed'\] holds NaN"),
    (dict(text={}), {}, "it must hold 'text_embed'"),
    (dict(rows=3), {}, "its rows must be a multiple of text_embed's, 2"),
    (dict(rows=0, text=dict(text_embed=torch.zeros(0, 32))), {}, "the batch must not be empty"),
]


@pytest.mark.parametrize("call, prior, message", BAD_CALLS)
def test_bad_calls(call, prior, message):
    call = dict(call)
    text, rows = call.pop("text", TEXT), call.pop("rows", 2)
    prior = make_prior(**prior)
    with pytest.raises(ValueError, match=message):
        prior.p_sample_loop((rows, 32), text_cond=text, progress=False, **call)


def test_bad_dtype_names_the_argument():
    text = dict(TEXT, text_embed=torch.ones(2, 32, dtype=torch.long))
    with pytest.raises(TypeError, match="text_embed has dtype torch.int64; it must be a floating point tensor"):
        make_prior().p_sample_loop((2, 32), text_cond=text, progress=False)


def test_arrays_and_lists_are_refused_by_name():
    prior = clip_prior()
    embed, encodings = (TEXT[name] for name in ("text_embed", "text_encodings"))
    array, is_array = embed.numpy(), "is a numpy.ndarray; it must be a torch.Tensor"
    embeds, loss = partial(prior.sample, progress=False), partial(prior, image_embed=embed)
    loop = partial(prior.p_sample_loop, (2, 32), progress=False)
    for call, message in (
        (lambda: embeds(np.array([[1, 2, 3]])), "text has an item of type ndarray; it must be strings, or a tensor"),
        (lambda: embeds(3), "text has an item of type int"),
        (lambda: embeds(b"cat"), "text has an item of type bytes"),
        (lambda: embeds(["cat", None]), "text has an item of type NoneType"),
        (lambda: embeds(text_embed=array, text_encodings=encodings), f"text_embed {is_array}"),
        (lambda: embeds(text_embed=array.tolist(), text_encodings=encodings), "text_embed is a list"),
        (lambda: embeds(text_embed=embed, text_encodings=encodings.numpy()), f"text_encodings {is_array}"),
        (lambda: embeds(text_embed=embed, text_encodings=encodings, mask=np.ones((2, 7))), f"mask {is_array}"),
        (lambda: loop(text_cond=dict(TEXT, text_embed=array)), f"text_embed {is_array}"),
        (lambda: loop(text_cond=embed), "text_cond is a Tensor; it must be a dict"),
        (lambda: loss(text_embed=array, text_encodings=encodings), f"text_embed {is_array}"),
        (lambda: prior(image_embed=array, **TEXT), f"image_embed {is_array}"),
        (lambda: PriorSampler(prior.eval(), timesteps=2)(array, encodings), f"text_embed {is_array}"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_bad_sample_arguments():
    prior = make_prior()
    with pytest.raises(ValueError, match="exactly one of text and text_embed"):
        prior.sample()
    with pytest.raises(ValueError, match="text was given, but this prior has no clip"):
        prior.sample(torch.ones(1, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="text_encodings=None; this prior is conditioned on text encodings"):
        prior.sample(text_embed=TEXT["text_embed"])
    with pytest.raises(ValueError, match="num_samples_per_batch=0; it must be at least 1"):
        prior.sample(**TEXT, num_samples_per_batch=0)
    with pytest.raises(ValueError, match="exactly one of image and image_embed"):
        prior(text_embed=TEXT["text_embed"])


BAD_PRIORS = [
    (dict(image_embed_dim=16), "image_embed_dim=16; it must be the network's dim, 32"),
    (dict(image_embed_dim=None), "image_embed_dim=None; it must be given where no clip is"),
    (dict(clamp=-1.0), "clamp=-1.0; it must be None, 'l2', a positive radius"),
    (dict(clip=nn.Linear(1, 1)), "Linear"),
]


@pytest.mark.parametrize("kwargs, message", BAD_PRIORS)
def test_bad_constructor_arguments(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_prior(**kwargs)


def test_embeddings_that_are_not_normalised_are_reported_once():
    prior, text = make_prior(), dict(TEXT, text_embed=TEXT["text_embed"] * 5)
    with pytest.warns(UserWarning, match="text_embed rows have norms up to 5"):
        sample(prior, text, timesteps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(prior, text, timesteps=4)
        sample(make_prior(), TEXT, timesteps=4)


def test_one_step_of_the_peers_ddim_is_noise_and_says_so():
    with pytest.warns(UserWarning, match="timesteps=1: the ddim solver makes no evaluation, the result is noise"):
        sample(make_prior(), TEXT, timesteps=1)
    assert relative_error(sample(make_prior(), TEXT, timesteps=1, solver="ddim_trailing"), torch.zeros(2, 32)) != 0


@pytest.mark.parametrize("net", [{}, dict(self_cond=True)], ids=["null table", "second branch"])
@pytest.mark.parametrize("reads", [True, False], ids=["text", "no text"])
def test_what_autocast_rounds_is_of_its_runs_alone(net, reads):
    """Tables and prefixes that are kept for the next runs."""
    prior, text = make_prior(net), make_text(2, 32)
    prior.condition_on_text_encodings = reads
    text = text if reads else dict(text_embed=text["text_embed"])

    def run(prior, **autocast):
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            return sample(prior, text, cond_scale=2.0, timesteps=4)

    plain, rounded = (run(copy.deepcopy(prior), enabled=enabled) for enabled in (False, True))
    assert not torch.equal(plain, rounded)
    for enabled, expected in (True, rounded), (False, plain), (True, rounded):
        assert torch.equal(run(prior, enabled=enabled), expected)
