"""Extra conditions and text encoders of another width: every path, nulls and dropout, checkpoints, values."""

import copy

import pytest
import torch

from fastprior.batches import repeat_rows
from fastprior.checkpoints import dalle2 as checkpoint
from fastprior.models.dalle2.conditions import Conditions
from fastprior.serving.prior_sampler import PriorSampler
from helpers.condition_cases import NETS, SPECS, TOLERANCE, make_inputs
from helpers.priors import make_prior, make_text, relative_error, sample


def plain(prior):
    """The same prior on the plain path."""
    other = copy.deepcopy(prior)
    other.net.register_forward_pre_hook(lambda *args: None)
    assert other.sampling_plan(4).path == "plain" and prior.sampling_plan(4).path == "cached"
    return other


# one result on every path


@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
@pytest.mark.parametrize("net", NETS)
def test_cached_equals_plain(net, cond_scale):
    prior, text = make_prior(NETS[net]), make_inputs(NETS[net], 3)
    kwargs = dict(rows=6, timesteps=8, cond_scale=cond_scale)
    wanted = sample(plain(prior), text, **kwargs)
    assert relative_error(sample(prior, text, **kwargs), wanted) < TOLERANCE
    if "conditions" in text:
        other = text | dict(conditions=text["conditions"] | dict(people=torch.tensor([3, 0, 2])))
        assert relative_error(sample(prior, other, **kwargs), wanted) > 1e-3


@pytest.mark.parametrize("net", NETS)
def test_steps_and_draws_equal_forward(net):
    """Behind a prefill, and with several draws to a prompt: outputs, and the gradient of every weight."""
    net = make_prior(NETS[net]).net
    text, rows, times = make_inputs(net.config, 3), 12, torch.arange(12)
    x, cotangent = torch.randn(rows, 32), torch.randn(rows, 32)
    repeated = net(x, times, **repeat_rows(text, rows))
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    wanted = torch.autograd.grad(repeated, parameters.values(), cotangent, allow_unused=True)
    cond = net.prefill(text["text_embed"], text["text_encodings"], times, conditions=text.get("conditions"))
    for got in (net(x, times, **text), net.step(x, torch.arange(rows), cond)):
        assert relative_error(got, repeated) < 1e-5
        for name, ours, theirs in zip(
            parameters, torch.autograd.grad(got, parameters.values(), cotangent, allow_unused=True), wanted
        ):
            assert ours is None or not theirs.any() or relative_error(ours, theirs) < 1e-4, name
    for name, gradient in zip(parameters, wanted):
        if "conditions." in name or "to_text" in name:
            assert gradient.isfinite().all() and gradient.any(), f"no gradient reaches {name}"


def test_the_unconditional_branch_sees_no_condition():
    net, text = make_prior(NETS["conditions"]).net, make_inputs(NETS["conditions"], 3)
    x, times = torch.randn(3, 32), torch.tensor([3, 7, 11])
    drop = dict(text_cond_drop_prob=1.0, image_cond_drop_prob=1.0)
    null = net(x, times, **text, **drop)
    assert torch.equal(null, net(x, times, **(text | dict(conditions=None)), **drop))
    assert relative_error(net.null_table(times), null) < 1e-5


@pytest.mark.parametrize("net", NETS)
def test_served(net):
    """Padded to a batch size, in parts, best of n."""
    prior, text = make_prior(NETS[net]), make_inputs(NETS[net], 5)
    repeats = 3 if prior.can_compare_text else 1
    sampler = PriorSampler(prior, batch_sizes=(2, 4), timesteps=6, samples_per_prompt=repeats, compile=False)
    sampler.warmup()
    for prompts in (1, 5):
        given = {name: t[:prompts] for name, t in text.items() if name != "conditions"}
        if "conditions" in text:
            given["conditions"] = {name: t[:prompts] for name, t in text["conditions"].items()}
        kwargs = dict(cond_scale=2.0, timesteps=6, progress=False, num_samples_per_batch=repeats)
        wanted = prior.sample(**given, **kwargs, generator=torch.Generator().manual_seed(1))
        got = sampler(**given, cond_scale=2.0, generator=torch.Generator().manual_seed(1))
        assert relative_error(got, wanted) < TOLERANCE


@pytest.mark.slow
def test_compiled_once_whatever_is_given():
    from torch._dynamo.utils import counters

    net = NETS["all"] | dict(depth=1, self_cond=True)  # whose steps are compiled on the CPU, too
    prior, text = make_prior(net), make_inputs(net, 2)
    sampler = PriorSampler(prior, batch_sizes=(2,), timesteps=4)
    sampler.warmup()
    counters.clear()
    for values in (text["conditions"], dict(people=text["conditions"]["people"]), None):
        given = text | dict(conditions=values)
        wanted = sample(prior, given, timesteps=4, generator=torch.Generator().manual_seed(1))
        got = sampler(**given, generator=torch.Generator().manual_seed(1))
        assert relative_error(got, wanted) < TOLERANCE
    assert not counters["stats"].get("unique_graphs"), "a call after warmup compiled something"


def test_rows_of_zeros_are_padding_before_they_are_projected():
    net, text = make_prior(NETS["t5"]).net, make_inputs(NETS["t5"], 1)
    x, times = torch.randn(1, 32), torch.tensor([3])
    real = torch.ones(1, 2, 24)
    padded = torch.cat((real, torch.zeros(1, 3, 24)), dim=1)
    short, long = (net(x, times, **(text | dict(text_encodings=given))) for given in (real, padded))
    assert torch.equal(short, long)


# nulls and dropout


@pytest.mark.parametrize("name", SPECS)
def test_what_is_missing_is_the_learned_null(name):
    net, text = make_prior(NETS["conditions"]).net, make_inputs(NETS["conditions"], 3)
    x, times, values = torch.randn(3, 32), torch.tensor([3, 7, 11]), text["conditions"]
    missing = torch.arange(3) == ["aesthetic", "people", "style"].index(name)
    before = net(x, times, **text)
    nowhere = net(x, times, **(text | dict(conditions={other: v for other, v in values.items() if other != name})))
    assert torch.equal(nowhere[missing], before[missing])
    assert ((nowhere - before)[~missing].abs().amax(dim=1) > 1e-4).all()
    with torch.no_grad():
        net.conditions[name].null.mul_(-1)
    after = net(x, times, **text)
    assert ((after - before)[missing].abs().amax(dim=1) > 1e-4).all()
    assert torch.equal(after[~missing], before[~missing])


def test_each_is_dropped_at_its_own_rate_independently():
    rates = dict(aesthetic=0.2, people=0.5, style=0.8)
    torch.manual_seed(0)
    conditions = Conditions(8, {name: spec | dict(dropout=rates[name]) for name, spec in SPECS.items()})
    prompts = 6000
    values = dict(aesthetic=torch.zeros(prompts), people=torch.zeros(prompts).long(), style=torch.zeros(prompts, 6))
    keep = torch.arange(prompts)[:, None] % 4 > 0
    nulls = torch.stack([conditions[name].null for name in rates])
    dropped = (conditions(values, keep) == nulls).all(dim=-1)
    assert dropped[::4].all(), "with the text, everything is dropped"
    own = dropped[keep[:, 0]].double()
    assert own.mean(dim=0).tolist() == pytest.approx(list(rates.values()), abs=4 * (0.25 / len(own)) ** 0.5)
    assert (torch.corrcoef(own.T) - torch.eye(3)).abs().max() < 4 / len(own) ** 0.5
    assert not (conditions.eval()(values, keep | True) == nulls).all(dim=-1).any()


def test_sampling_drops_nothing():
    net = dict(conditions={name: spec | dict(dropout=0.9) for name, spec in SPECS.items()})
    prior, text = make_prior(net), make_inputs(net, 3)
    wanted = sample(prior, text, timesteps=4)
    assert "dropout is active" in prior.train().sampling_plan(4).reasons[0]
    torch.manual_seed(1)
    got = prior.sample(**text, timesteps=4, num_samples_per_batch=1, progress=False)
    assert relative_error(got, wanted) < TOLERANCE and prior.training


def test_other_weights_are_drawn_as_without_conditions():
    without, extended = make_prior().net, make_prior(NETS["conditions"]).net
    state = extended.state_dict()
    assert {name for name in state if name not in without.state_dict()} == {
        name for name in state if name.startswith("conditions.")
    }
    for name, weight in without.state_dict().items():
        assert torch.equal(weight, state[name]), name
    assert "conditions" not in without.config and "text_dim" not in without.config
    renamed = dict(conditions=dict(reversed(SPECS.items())))
    assert list(make_prior(renamed).net.state_dict()) == list(state), "the order in the config does not matter"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    prior, text = make_prior(NETS["all"]), make_inputs(NETS["all"], 6)
    wanted = sample(prior, text, timesteps=6, cond_scale=2.0)
    prior.net.to(dtype)
    got = sample(prior, text, timesteps=6, cond_scale=2.0)
    assert torch.cosine_similarity(got, wanted).median() > (0.999 if dtype == torch.bfloat16 else 1 - 1e-6)


@pytest.mark.slow
def test_the_prior_follows_a_condition_that_alone_tells():
    """One text for all; the image is of the category, turned by the scalar."""
    torch.manual_seed(0)
    specs = dict(people=dict(kind="category", size=3, dropout=0.1), angle=dict(kind="scalar", mean=1.0, std=0.5))
    prior = make_prior(dict(dim=16, depth=2, conditions=specs, max_text_len=1), condition_on_text_encodings=False)
    axes = torch.linalg.qr(torch.randn(16, 6))[0].T.view(3, 2, 16)

    def image_of(people, angle):
        return axes[people, 0] * angle.cos()[:, None] + axes[people, 1] * angle.sin()[:, None]

    def pairs(count):
        values = dict(people=torch.randint(3, (count,)), angle=torch.rand(count) * 1.5)
        text = torch.eye(16)[:1].expand(count, -1)
        return dict(text_embed=text, conditions=values), image_of(**values)

    optimizer = torch.optim.Adam(prior.net.parameters(), lr=3e-3)
    prior.train()
    for _ in range(250):
        text, image = pairs(64)
        prior(**text, image_embed=image, draws=4).backward()
        optimizer.step()
        optimizer.zero_grad()
    text, image = pairs(64)
    sampled = prior.eval().p_sample_loop((64, 16), text, timesteps=10, solver="dpm++", progress=False)
    similarity = torch.cosine_similarity(sampled, image)
    assert similarity.mean() > 0.9
    for name in specs:
        shuffled = text["conditions"] | {name: text["conditions"][name].roll(1)}
        sampled = prior.p_sample_loop((64, 16), text | dict(conditions=shuffled), timesteps=10, progress=False)
        assert torch.cosine_similarity(sampled, image).mean() < similarity.mean() - 0.05


# checkpoints


@pytest.mark.parametrize("net", NETS)
def test_saved_and_loaded(net, tmp_path):
    prior, text = make_prior(NETS[net]), make_inputs(NETS[net], 3)
    wanted = sample(prior, text, timesteps=4)
    checkpoint.save(prior, tmp_path / "prior.safetensors")
    loaded = checkpoint.load(tmp_path / "prior.safetensors")
    assert loaded.net.config == prior.net.config
    assert torch.equal(sample(loaded, text, timesteps=4), wanted)
    with pytest.raises(ValueError, match="the network has (conditions|text_dim)=.*; dalle2-pytorch's has no such arg"):
        checkpoint.save_peer(prior, tmp_path / "prior.pt")


def test_of_bare_weights_widths_are_seen_and_conditions_must_be_told(tmp_path):
    for net in ("t5", "all"):
        prior, text = make_prior(NETS[net]), make_inputs(NETS[net], 3)
        torch.save(prior.state_dict(), tmp_path / "prior.pt")
        config = dict(net=dict(conditions=SPECS)) if net == "all" else None
        loaded = checkpoint.load(tmp_path / "prior.pt", config=config)
        assert torch.equal(sample(loaded, text, timesteps=4), sample(prior, text, timesteps=4))
    with pytest.raises(ValueError, match="has the conditions aesthetic, people, style, .* give config="):
        checkpoint.load(tmp_path / "prior.pt")


# values


BAD_VALUES = [
    (
        dict(asthetic=torch.ones(3)),
        ValueError,
        "has the unknown name 'asthetic'; the nearest is 'aesthetic'",
    ),
    (dict(aesthetic=torch.ones(3, 1)), ValueError, r"conditions\['aesthetic'\] has shape \(3, 1\); it must be \(3,\)"),
    (dict(aesthetic=6.5), TypeError, r"conditions\['aesthetic'\] is a float; it must be a tensor"),
    (dict(aesthetic=torch.ones(3).long()), TypeError, "has dtype torch.int64; it must be floating point"),
    (dict(aesthetic=torch.ones(3) / 0), ValueError, r"conditions\['aesthetic'\] holds infinity"),
    (dict(people=torch.ones(3)), TypeError, r"conditions\['people'\] has dtype torch.float32; it must be integers"),
    (dict(people=torch.ones(2).long()), ValueError, r"conditions\['people'\] has shape \(2,\); it must be \(3,\)"),
    (dict(people=torch.tensor([0, 4, 1])), ValueError, r"conditions\['people'\] holds 4; it must be below its size, 4"),
    (dict(style=torch.ones(3, 5)), ValueError, r"conditions\['style'\] has shape \(3, 5\); it must be \(3, 6\)"),
]


@pytest.mark.parametrize("values, error, message", BAD_VALUES)
def test_bad_values(values, error, message):
    prior, text = make_prior(NETS["conditions"]), make_text(3, 32)
    with pytest.raises(error, match=message):
        sample(prior, text | dict(conditions=values), timesteps=4)
    with pytest.raises(error, match=message):
        prior(**text, image_embed=torch.randn(3, 32), conditions=values)
    with pytest.raises(error, match=message):
        PriorSampler(prior, timesteps=4, compile=False)(**text, conditions=values)


def test_what_a_prior_has_not():
    prior, text = make_prior(), make_text(3, 32)
    with pytest.raises(ValueError, match="conditions has the unknown name 'people'; the network has none"):
        sample(prior, text | dict(conditions=dict(people=torch.ones(3).long())), timesteps=4)
    prior, text = make_prior(NETS["t5"]), make_inputs(NETS["t5"], 3)
    with pytest.raises(ValueError, match="num_samples_per_batch=2; it must be 1, since a text_embed of width 12 "):
        prior.sample(**text, timesteps=4)
    with pytest.raises(ValueError, match=r"text_encodings has shape \(3, 5, 32\); it must be \(3, 5, 24\)"):
        sample(prior, text | dict(text_encodings=torch.ones(3, 5, 32)), timesteps=4)
    with pytest.raises(ValueError, match=r"text_embed has shape \(3, 32\); it must be \(3, 12\)"):
        sample(prior, text | dict(text_embed=torch.ones(3, 32)), timesteps=4)
