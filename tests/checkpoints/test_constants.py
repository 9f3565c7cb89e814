"""Files without constants: what can be derived is, what is assumed is said, and never is it another network."""

import warnings
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from fastprior.checkpoints.dalle2 import load, save, save_peer
from fastprior.clip import BaseClipAdapter
from fastprior.diffusion.schedule import schedule_tables
from helpers.checkpoint_cases import (
    DIM,
    STEPS,
    TEXT,
    assert_same_samples,
    file_with,
    make_prior,
    network_of,
    prefixed,
)

FREQS = "net.causal_transformer.layers.{}.0.rotary_emb.freqs"
SCHEDULE = "noise_scheduler."
WHOLE = dict(dim=DIM, depth=2, dim_head=8, heads=3, num_timesteps=STEPS, max_text_len=TEXT)


def without(state, *words):
    return {key: value.clone() for key, value in state.items() if not any(word in key for word in words)}


def popped(prior, *words):
    """A state dict as torch made it, less some of its entries."""
    state = prior.state_dict()
    for key in [key for key in state if any(word in key for word in words)]:
        del state[key]
    return state


def trained(module):
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def average_beside(prior):
    """A model and the average of what is trained of it."""
    return {"model": make_prior(5).state_dict(), "ema": trained(prior)}


def write(folder, payload, **metadata):
    if not callable(payload):
        return file_with(folder, payload)
    payload(folder / "file.safetensors")
    return folder / "file.safetensors"


def by_hand(state, metadata=None):
    return lambda path: safetensors.torch.save_file(state, path, metadata=metadata)


# the payload of a file of a prior with rotary embedding, and what is assumed of it
STRIPPED = {
    "trained weights": (trained, ["beta_schedule='cosine'", "rotary_emb=True"]),
    "trained weights of the network": (
        lambda prior: trained(prior.net),
        ["beta_schedule='cosine'", "rotary_emb=True"],
    ),
    "parameters": (lambda prior: dict(prior.named_parameters()), ["beta_schedule='cosine'"]),
    "average beside its model": (average_beside, []),
    "taken out of a state dict": (lambda prior: popped(prior, "rotary"), []),
    "taken out of a network's": (lambda prior: popped(prior.net, "rotary"), ["beta_schedule='cosine'"]),
    "one layer's alone": (lambda prior: without(prior.state_dict(), FREQS.format(0)), []),
    "safetensors by hand": (lambda prior: by_hand(without(prior.state_dict(), "rotary")), ["rotary_emb=True"]),
    "safetensors.save_model": (lambda prior: lambda path: safetensors.torch.save_model(prior, path), []),
    "accelerate": (lambda prior: by_hand(without(prior.state_dict(), FREQS.format(1)), {"format": "pt"}), []),
}


def load_and_see(path, **kwargs):
    """The prior, and the arguments that were assumed, in warnings and in the report."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prior = load(path, **kwargs)
    assert [str(w.message) for w in caught] == [f"{path}: assumed {guess}" for guess in prior.load_report.guesses]
    assert all(guess in str(prior.load_report) and "config=" in guess for guess in prior.load_report.guesses)
    return prior, sorted(guess.partition(", ")[0] for guess in prior.load_report.guesses)


@pytest.mark.parametrize("case", STRIPPED)
def test_rotary_embedding_without_its_frequencies(tmp_path, case):
    origin = make_prior()
    make, assumed = STRIPPED[case]
    path = write(tmp_path, make(origin))
    prior, found = load_and_see(path)
    assert found == assumed and prior.load_report.missing == prior.load_report.unexpected == []
    assert prior.state_dict().keys() == origin.state_dict().keys()
    assert_same_samples(prior, origin)
    for config in ({"net": WHOLE, "prior": {"cond_drop_prob": 0.1}}, {"net": {"rotary_emb": True}}):
        prior, found = load_and_see(path, config=config)
        assert "rotary_emb=True" not in found
        assert_same_samples(prior, origin)
    assert_same_samples(load_and_see(path, strict=False)[0], origin)


@pytest.mark.parametrize("case", ["trained weights", "safetensors by hand"])
def test_what_is_derived_is_reported(tmp_path, case):
    prior, _ = load_and_see(write(tmp_path, STRIPPED[case][0](make_prior())))
    assert prior.load_report.derived[-2:] == [FREQS.format(0), FREQS.format(1)]
    assert "derived: " in str(prior.load_report)
    assert (f"{SCHEDULE}betas" in prior.load_report.derived) == (case == "trained weights")


# the payload of a file of a prior without rotary embedding, what is assumed, and what must be stated
PLAIN = {
    "state dict": (lambda prior: {"model": prior.state_dict()}, [], {}),
    "network's state dict": (lambda prior: prior.net.state_dict(), ["beta_schedule='cosine'"], {}),
    "average beside its model": (
        lambda prior: {"model": prior.state_dict(), "ema_model": trained(prior)},
        [],
        {},
    ),
    "plain dict": (lambda prior: dict(prior.state_dict()), ["rotary_emb=False"], {}),
    "accelerate": (lambda prior: by_hand(prior.state_dict(), {"format": "pt"}), ["rotary_emb=False"], {}),
    "trained weights": (trained, ["beta_schedule='cosine'"], {"net": {"rotary_emb": False}}),
    "by hand": (lambda prior: by_hand(prior.state_dict()), [], {"net": {"rotary_emb": False}}),
}


@pytest.mark.parametrize("case", PLAIN)
def test_no_rotary_embedding(tmp_path, case):
    origin = make_prior(rotary_emb=False)
    make, assumed, config = PLAIN[case]
    prior, found = load_and_see(write(tmp_path, make(origin)), config=config or None)
    assert found == assumed
    assert prior.state_dict().keys() == origin.state_dict().keys()
    assert_same_samples(prior, origin)


def test_a_stated_rotary_embedding_must_be_what_the_file_has(tmp_path):
    path = file_with(tmp_path, make_prior().state_dict())
    with pytest.raises(ValueError, match=r"given architecture.*unexpected: .*rotary_emb\.freqs"):
        load(path, config={"net": {"rotary_emb": False}})


def test_layers_that_a_file_lacks_are_said(tmp_path):
    layers = "net.causal_transformer.norm.g", "net.causal_transformer.project_out.weight"
    state = without(make_prior().state_dict(), *layers)
    prior, assumed = load_and_see(file_with(tmp_path, state))
    assert assumed == ["norm_out=False"] and "norm_out=False, final_proj=False: there are no" in str(prior.load_report)
    with pytest.raises(ValueError, match="Missing: net.causal_transformer.norm.g, net.causal_transformer.project_out"):
        load(tmp_path / "file.pth", config={"net": dict(norm_out=True, final_proj=True)})
    origin = make_prior(norm_out=False, final_proj=False)
    prior, assumed = load_and_see(file_with(tmp_path, origin.state_dict()))
    assert assumed == []
    assert_same_samples(prior, origin)


def test_files_for_the_peer_say_that_there_is_no_rotary_embedding(tmp_path):
    origin = make_prior(rotary_emb=False)
    save_peer(origin, tmp_path / "peer.pth")
    prior, assumed = load_and_see(tmp_path / "peer.pth")
    assert assumed == []
    assert_same_samples(prior, origin)


def test_all_layers_share_the_frequencies_that_one_has(tmp_path):
    origin = make_prior()
    origin.net.causal_transformer.layers[0][0].rotary_emb.freqs.data.mul_(0.5)
    prior = load(write(tmp_path, lambda path: safetensors.torch.save_model(origin, path)))
    assert_same_samples(prior, origin)
    prior = load(file_with(tmp_path, without(origin.state_dict(), FREQS.format(0))))
    assert_same_samples(prior, origin)


# schedules


def with_schedule(betas=None, **prior):
    origin = make_prior(prior=dict(timesteps=24, **prior), num_timesteps=24)
    if betas is not None:
        origin.noise_scheduler.load_state_dict(schedule_tables(betas))
    return origin


@pytest.mark.parametrize("kept", ["betas", "alphas_cumprod", "sqrt_alphas_cumprod", "posterior_log_variance_clipped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_table_tells_a_schedule_of_a_name(tmp_path, kept, dtype):
    origin = with_schedule(beta_schedule="linear")
    state = without(origin.state_dict(), SCHEDULE)
    state[SCHEDULE + kept] = origin.noise_scheduler.state_dict()[kept].to(dtype)
    prior, assumed = load_and_see(file_with(tmp_path, state))
    assert assumed == [] and prior.config["beta_schedule"] == "linear"
    assert_same_samples(prior, origin)
    with pytest.raises(ValueError, match="'linear' betas; config has 'cosine'"):
        load(tmp_path / "file.pth", config={"prior": {"beta_schedule": "cosine"}})


@pytest.mark.parametrize("kept", ["betas", "alphas_cumprod", "sqrt_alphas_cumprod"])
@pytest.mark.parametrize("strict", [True, False])
def test_tables_follow_from_betas_without_a_name(tmp_path, kept, strict):
    origin = with_schedule(torch.linspace(0.02, 0.2, 24, dtype=torch.float64))
    state = without(origin.state_dict(), SCHEDULE)
    state[SCHEDULE + kept] = origin.noise_scheduler.state_dict()[kept]
    prior = load(file_with(tmp_path, state), strict=strict)
    assert "fit no named schedule" in str(prior.load_report)
    assert len(prior.load_report.derived) == 12
    assert_same_samples(prior, origin, tol=1e-5)


def test_betas_that_do_not_follow_are_missing(tmp_path):
    origin = with_schedule(torch.linspace(0.02, 0.2, 24, dtype=torch.float64))
    state = without(origin.state_dict(), SCHEDULE)
    state[f"{SCHEDULE}posterior_variance"] = origin.noise_scheduler.posterior_variance
    with pytest.raises(ValueError, match="Missing: noise_scheduler.betas"):
        load(file_with(tmp_path, state))
    state[f"{SCHEDULE}betas"] = torch.tensor(0.1)
    with pytest.raises(ValueError, match=r"noise_scheduler.betas has shape \(\); it must be \(timesteps,\)"):
        load(file_with(tmp_path, state))


def test_a_schedule_that_is_assumed_is_said(tmp_path):
    origin = make_prior(num_timesteps=None, prior=dict(timesteps=30, beta_schedule="linear"))
    path = file_with(tmp_path, network_of(popped(origin, SCHEDULE)))
    prior, assumed = load_and_see(path, config={"net": {"rotary_emb": True}})
    assert assumed == ["beta_schedule='cosine'"] and "timesteps=1000" in prior.load_report.guesses[0]
    config = {"prior": dict(timesteps=30, beta_schedule="linear", cond_drop_prob=0.1)}
    prior, assumed = load_and_see(path, config=config)
    assert assumed == [] and "no noise schedule in the file: it is the config's" in str(prior.load_report)
    assert_same_samples(prior, origin)


def test_own_files_without_constants(tmp_path):
    origin = make_prior(prior=dict(beta_schedule="linear", timesteps=24), num_timesteps=24)
    save(origin, tmp_path / "own.safetensors")
    with safe_open(tmp_path / "own.safetensors", "pt") as file:
        metadata = file.metadata()
    by_hand(without(origin.state_dict(), "rotary", SCHEDULE), metadata)(tmp_path / "own.safetensors")
    prior, assumed = load_and_see(tmp_path / "own.safetensors")
    assert assumed == [] and len(prior.load_report.derived) == 15
    assert_same_samples(prior, origin)


def test_twins_of_another_shape_lend_nothing(tmp_path):
    other = make_prior(depth=1, prior=dict(beta_schedule="linear", timesteps=24))
    payload = {"model": other.state_dict(), "ema": trained(make_prior())}
    prior, assumed = load_and_see(file_with(tmp_path, payload))
    assert assumed == ["beta_schedule='cosine'", "rotary_emb=True"]
    assert_same_samples(prior, make_prior())


# a CLIP beside


class Positions(BaseClipAdapter):
    """A CLIP with tied weights and the numbers of positions."""

    dim_latent, image_size, image_channels, max_text_len = DIM, 8, 3, TEXT

    def __init__(self, persistent):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        model.register_buffer("position_ids", torch.arange(4), persistent=persistent)
        super().__init__(model)


@pytest.mark.parametrize("there", [True, False])
def test_positions_and_tied_weights_of_a_clip(tmp_path, there):
    origin = Positions(persistent=True)
    state = origin.state_dict() if there else without(origin.state_dict(), "position_ids", "1.weight")
    path = file_with(tmp_path, OrderedDict(make_prior().state_dict() | prefixed("clip.", state)))
    clip = load(path, clip=Positions(persistent=not there)).clip.clip
    assert torch.equal(clip[1].weight, origin.clip[0].weight) and torch.equal(clip[1].bias, origin.clip[1].bias)
    assert torch.equal(clip.position_ids, torch.arange(4))


@pytest.mark.parametrize("table", list(schedule_tables(torch.ones(1))))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_table_that_is_not_finite_is_refused(tmp_path, table, value):
    state = without(make_prior().state_dict())
    state[SCHEDULE + table][3] = value
    with pytest.raises(ValueError, match=f"NaN or infinity in {SCHEDULE}{table}"):
        load(file_with(tmp_path, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_infinite_at_the_end_of_a_schedule_is_taken(tmp_path, dtype):
    """At beta 1, and where 16 bits cannot hold a number."""
    state = without(make_prior(prior=dict(beta_schedule="jsd")).state_dict())
    infinite = [key for key, table in state.items() if table.isinf().any()]
    assert infinite
    prior = load(file_with(tmp_path, {key: value.to(dtype) for key, value in state.items()}))
    assert all(prior.state_dict()[key].isinf().any() for key in infinite)
