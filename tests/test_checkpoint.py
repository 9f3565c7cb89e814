"""Every era and shape of checkpoint file: a prior is saved by hand as such a file was, and must sample as before."""

import collections
import copy
import json
import os
import re
import sys
import types
import warnings

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from fastprior import DiffusionPrior, DiffusionPriorNetwork, checkpoint
from fastprior.checkpoint import convert, load, save, save_peer
from fastprior.clip import BaseClipAdapter

DIM, STEPS, TEXT = 32, 6, 5
BIAS = "net.causal_transformer.rel_pos_bias.relative_attention_bias.weight"
UNSEEN = {"net": {}, "prior": {"cond_drop_prob": 0.2, "image_embed_scale": 3.0, "sampling_clamp_l2norm": True}}
NULLS = {"net.null_text_encodings", "net.null_text_embeds", "net.null_image_embed"}


def make_prior(seed=0, prior=None, **net):
    """A tiny prior whose every weight matters: gains are not 1."""
    net = dict(dim=DIM, depth=2, dim_head=8, heads=3, num_timesteps=STEPS, max_text_len=TEXT) | net
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = DiffusionPrior(
            DiffusionPriorNetwork(**net),
            **dict(image_embed_dim=DIM, timesteps=STEPS, cond_drop_prob=0.1) | (prior or {}),
        )
        for name, parameter in made.named_parameters():
            if name.endswith(".g"):
                nn.init.normal_(parameter.data, 1, 0.3)
    return made.eval()


def sample(prior, encodings=True, cond_scale=1.0, **kwargs):
    generator = torch.Generator().manual_seed(3)
    cond = dict(text_embed=F.normalize(torch.randn(3, DIM, generator=generator), dim=-1))
    if encodings:
        cond["text_encodings"] = torch.randn(3, TEXT, DIM, generator=generator)
        cond["text_encodings"][1, 2:] = 0
    torch.manual_seed(7)
    return prior.p_sample_loop((3, DIM), text_cond=cond, cond_scale=cond_scale, **kwargs)


def assert_same_samples(loaded, origin, tol=0.0, **kwargs):
    """Equal up to `tol` of the largest sample, and not what another prior gives."""
    ours, theirs, other = (sample(prior, **kwargs) for prior in (loaded, origin, make_prior(99)))
    scale = theirs.abs().max()
    assert scale > 1e-2
    assert (ours - theirs).abs().max() <= tol * scale
    assert (ours - other).abs().max() > 0.05 * scale


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def network_of(state):
    return {key[4:]: value for key, value in state.items() if key.startswith("net.")}


def old_norms(state):
    """As before 0.16.0: the gain of a norm is `gamma`, and it has a zero `beta`."""
    out = {}
    for key, value in state.items():
        out[re.sub(r"\.g$", ".gamma", key)] = value
        if key.endswith(".g"):
            out[re.sub(r"\.g$", ".beta", key)] = torch.zeros_like(value)
    return out


def single_null(state):
    """As from 0.23.1 to 1.8.4."""
    out = {key: value for key, value in state.items() if key not in NULLS}
    return out | {"net.null_text_embed": state["net.null_text_encodings"]}


def file_with(folder, payload, name="file.pth"):
    torch.save(payload, folder / name)
    return folder / name


# shapes of files

WRAPPINGS = {
    "flat": lambda state: state,
    "model": lambda state: {"model": state, "step": torch.tensor([4])},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "ddp": lambda state: prefixed("module.", state),
    "ddp in model": lambda state: {"model": prefixed("module.", state)},
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "compiled net": lambda state: {key.replace("net.", "net._orig_mod.", 1): value for key, value in state.items()},
    "ordered": lambda state: collections.OrderedDict(state),
    "trainer module": lambda state: prefixed("diffusion_prior.", state) | {"step": torch.tensor([1])},
    "parameters": lambda state: {key: nn.Parameter(value) for key, value in state.items()},
    "rotary caches": lambda state: state | {"net.causal_transformer.layers.0.0.rotary_emb.cached_freqs": torch.ones(3)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_state_dicts(tmp_path, wrapping):
    origin = make_prior()
    prior = load(file_with(tmp_path, WRAPPINGS[wrapping](origin.state_dict())))
    assert prior.load_report.kind == "prior state dict" and prior.load_report.weights == "model"
    assert not prior.training and prior.load_report.missing == prior.load_report.unexpected == []
    assert_same_samples(prior, origin)
    assert_same_samples(prior, origin, cond_scale=2.0)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors_of_others(tmp_path, suffix):
    origin = make_prior()
    state = {key: value.clone() for key, value in origin.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / f"file{suffix}", metadata={"format": "pt"})
    prior = load(tmp_path / f"file{suffix}")
    assert prior.load_report.architecture == "inferred"
    assert_same_samples(prior, origin)


def test_network_alone_takes_its_schedule_from_the_config(tmp_path):
    origin = make_prior(prior=dict(beta_schedule="linear", timesteps=24, **UNSEEN["prior"]), num_timesteps=24)
    path = file_with(tmp_path, network_of(origin.state_dict()))
    prior = load(path, config={"prior": {**UNSEEN["prior"], "beta_schedule": "linear"}})
    assert prior.load_report.kind == "network state dict" and "no noise schedule" in str(prior.load_report)
    assert prior.noise_scheduler.num_timesteps == 24
    assert_same_samples(prior, origin)
    assert not torch.equal(sample(load(path)), sample(origin))


@pytest.mark.parametrize("nested", ["bare", "trainer"])
@pytest.mark.parametrize("weights", ["auto", "model", "ema"])
def test_ema_or_model(tmp_path, weights, nested):
    model, ema = make_prior(0), make_prior(1)
    payload = prefixed("online_model.", model.state_dict()) | prefixed("ema_model.", ema.state_dict())
    payload |= {"initted": torch.tensor(True), "step": torch.tensor(3)}
    if nested == "trainer":  # where the two differ, `ema_model` counts
        payload |= prefixed("ema_model.", make_prior(2).state_dict())
        payload = dict(model=model.state_dict(), ema=payload, ema_model=ema.state_dict(), optimizer={"state": {}})
    prior = load(file_with(tmp_path, payload), weights=weights)
    assert prior.load_report.weights == ("model" if weights == "model" else "ema")
    assert prior.load_report.kind == ("trainer checkpoint" if nested == "trainer" else "prior state dict")
    assert_same_samples(prior, model if weights == "model" else ema)


def test_online_half_of_an_ema_is_the_model(tmp_path):
    prior = load(file_with(tmp_path, {"ema": prefixed("online_model.", make_prior().state_dict())}))
    assert prior.load_report.weights == "model"
    assert_same_samples(prior, make_prior())


def test_absent_ema_is_an_error(tmp_path):
    path = file_with(tmp_path, make_prior().state_dict())
    with pytest.raises(ValueError, match=r"weights='ema'.*model weights only"):
        load(path, weights="ema")
    with pytest.raises(ValueError, match="weights='best'; it must be 'auto', 'model' or 'ema'"):
        load(path, weights="best")


# checkpoints of DALLE2-pytorch's trainer


@pytest.fixture(scope="module")
def trainer_file(tmp_path_factory):
    """Written by DALLE2-pytorch's own trainer, with the model and the EMA as they were."""
    peer = pytest.importorskip("dalle2_pytorch")
    trainers = pytest.importorskip("dalle2_pytorch.trainer")
    net = dict(dim=DIM, depth=2, dim_head=8, heads=3, num_timesteps=STEPS, max_text_len=TEXT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = peer.DiffusionPrior(
            peer.DiffusionPriorNetwork(**net), image_embed_dim=DIM, timesteps=STEPS, cond_drop_prob=0.1
        )
        extra = dict(ema_update_after_step=0, ema_update_every=1, ema_beta=0.5, accelerator_cpu=True)
        trainer = trainers.DiffusionPriorTrainer(prior, lr=0.03, use_ema=True, warmup_steps=5, **extra)
        for _ in range(3):
            text, image, encodings = torch.randn(4, DIM), torch.randn(4, DIM), torch.randn(4, TEXT, DIM)
            trainer(text_embed=text, image_embed=image, text_encodings=encodings)
            trainer.update()
        path = tmp_path_factory.mktemp("trainer") / "prior.pth"
        trainer.save(path)
    return path, trainer.diffusion_prior.eval(), trainer.ema_diffusion_prior.ema_model.eval()


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_peer_trainer_file(trainer_file, weights):
    path, *peers = trainer_file
    allowed = torch.serialization.get_safe_globals()
    peer, other = peers if weights == "model" else peers[::-1]
    with pytest.raises(Exception, match="weights_only"):
        torch.load(path, weights_only=True)  # what torch alone makes of it
    prior = load(path, weights=weights)
    assert prior.load_report.kind == "trainer checkpoint" and prior.load_report.version == "1.15.6"
    theirs = sample(peer)
    torch.testing.assert_close(sample(prior), theirs, atol=1e-4 * theirs.abs().max().item(), rtol=0)
    assert (theirs - sample(other)).abs().max() > 1e-3 * theirs.abs().max()
    assert set(torch.serialization.get_safe_globals()) == set(allowed)  # allowed for the time of one load only


def test_peer_trainer_file_where_its_packages_are_absent(trainer_file, monkeypatch):
    for name in ("pytorch_warmup", "pytorch_warmup.base", "packaging", "packaging.version"):
        monkeypatch.setitem(sys.modules, name, None)
    assert load(trainer_file[0]).load_report.version == "1.15.6"


@pytest.mark.parametrize("packaging", ["21", "26.0", "26.2"])
def test_versions_as_releases_of_packaging_pickle_them(tmp_path, monkeypatch, packaging):
    module, structures = types.ModuleType("packaging.version"), types.ModuleType("packaging._structures")
    structures.InfinityType = type("InfinityType", (), {"__module__": structures.__name__})
    names = "epoch release dev pre post local"
    parts = module._Version = collections.namedtuple("_Version", names, module=module.__name__)
    getstate = {"__getstate__": lambda self: self.state, "__module__": module.__name__}
    module.Version = type("Version", (), getstate)
    for fake in (module, structures):
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    old = {"_version": parts(0, (1, 4, 2), None, None, None, None), "_key": (0, (1, 4, 2), structures.InfinityType())}
    slots = (None, {"_epoch": 0, "_release": (1, 4, 2), "_pre": None})
    version = module.Version()
    version.state = {"21": old, "26.0": slots, "26.2": (0, (1, 4, 2), None, None, None, None)}[packaging]
    payload = dict(model=make_prior().state_dict(), version=version, optimizer={})
    prior = load(file_with(tmp_path, payload))
    assert prior.load_report.version == "1.4.2" and prior.net.config["cosine_sim"] is False


# eras


def dot_product(**net):
    return make_prior(cosine_sim=False, dot_scale=8**-0.5, **net)


@pytest.mark.parametrize("version", ["0.6.0", "0.15.4", None])
def test_before_0_16(tmp_path, version):
    """`gamma` and `beta`, no learned padding, dot products; before 0.11 a schedule without prefix, before 0.9 no p2."""
    origin = dot_product(max_text_len=0, prior=dict(condition_on_text_encodings=False))
    state = old_norms({key: value for key, value in origin.state_dict().items() if key not in NULLS})
    if version != "0.15.4":
        state = {key.replace("noise_scheduler.", ""): value for key, value in state.items() if "p2_loss" not in key}
    with pytest.warns(UserWarning, match="without text encodings"):
        prior = load(file_with(tmp_path, {"model": state}), version=version)
    assert prior.load_report.era == "before 0.16.0" and not prior.condition_on_text_encodings
    assert torch.equal(prior.noise_scheduler.p2_loss_weight, torch.ones(STEPS))
    assert_same_samples(prior, origin, encodings=False)
    with pytest.raises(ValueError, match="without conditional dropout"):
        sample(prior, encodings=False, cond_scale=2.0)


@pytest.mark.parametrize(
    "version, factor", [("0.16.0", 1), ("0.16.1", 1024), ("0.23.0", 1024), ("0.23.2", 1024), ("0.23.3", 128)]
)
def test_position_bias_of_dot_product_eras(tmp_path, version, factor):
    """It was added before logits were multiplied by `factor`; the origin here has it multiplied."""
    padded = version > "0.23"
    origin = dot_product(max_text_len=TEXT if padded else 0, prior=dict(condition_on_text_encodings=padded))
    state = dict(origin.state_dict())
    state[BIAS] = state[BIAS] / factor
    padded = version >= "0.23.1"
    state = single_null(state) if padded else {key: value for key, value in state.items() if key not in NULLS}
    payload = {"model": state, "version": version, "optimizer": {}}
    if padded:
        prior = load(file_with(tmp_path, payload))
    else:
        prior = load(file_with(tmp_path, payload), config={"prior": {"condition_on_text_encodings": False}})
    assert torch.equal(prior.state_dict()[BIAS], origin.state_dict()[BIAS])
    assert prior.net.config["dot_scale"] == 8**-0.5
    if version != "0.23.0":
        assert_same_samples(prior, origin, encodings=padded)


def test_text_padding_that_was_masked_is_refused(tmp_path):
    origin = dot_product(max_text_len=0)
    state = {key: value for key, value in origin.state_dict().items() if key not in NULLS}
    path = file_with(tmp_path, {"model": state, "version": "0.22.0"})
    config = {"net": {"max_text_len": TEXT}, "image_embed_dim": DIM}
    with pytest.raises(ValueError, match="condition_on_text_encodings=False"):
        load(path, config=config)
    prior = load(path, config=config, strict=False)
    assert any("masked padding" in note for note in prior.load_report.notes)
    with pytest.raises(ValueError, match=r"0.16.0 to 0.23.0.*Give the dalle2-pytorch release"):
        load(file_with(tmp_path, {"model": state}))


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("version", ["1.4.2", "1.4.3", "1.8.4"])
def test_single_null(tmp_path, version, recorded):
    old = version == "1.4.2"
    origin = dot_product() if old else make_prior()
    state = dict(origin.state_dict())
    state[BIAS] = state[BIAS] / (128 if old else 1)
    payload = {"model": single_null(state), "optimizer": {}} | ({"version": version} if recorded else {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior = load(file_with(tmp_path, payload), **({} if recorded else {"version": version}))
    assert prior.load_report.version == version and prior.load_report.era == "0.23.1 to 1.8.4"
    assert_same_samples(prior, origin)
    assert prior.text_cond_drop_prob == prior.image_cond_drop_prob == 0
    with pytest.raises(ValueError, match="without conditional dropout"):
        sample(prior, cond_scale=2.0)
    assert "cond_scale must be 1" in str(prior.load_report)


def test_single_null_of_unknown_version_is_a_guess(tmp_path):
    origin = make_prior()
    with pytest.warns(UserWarning, match=r"assumed cosine similarity.*version="):
        prior = load(file_with(tmp_path, single_null(origin.state_dict())))
    assert len(prior.load_report.guesses) == 1
    assert_same_samples(prior, origin)


def test_current_keys_of_an_old_version_have_dot_products(tmp_path):
    origin = dot_product()
    state = dict(origin.state_dict())
    state[BIAS] = state[BIAS] / 128
    payload = {"model": state, "version": "1.4.2", "optimizer": {}}
    assert_same_samples(load(file_with(tmp_path, payload)), origin)
    assert_same_samples(load(file_with(tmp_path, state)), make_prior_like(state))


def test_version_of_something_else_is_ignored(tmp_path):
    payload = {"model": make_prior().state_dict(), "version": "0.1.0", "optimizer": {}}
    prior = load(file_with(tmp_path, payload))
    assert_same_samples(prior, make_prior())
    assert "version 0.1.0 is not that of a dalle2-pytorch with these keys" in str(prior.load_report)


def make_prior_like(state):
    prior = make_prior()
    prior.load_state_dict(state)
    return prior


def test_null_embeddings_that_a_release_never_trained(tmp_path):
    origin = make_prior()
    path = file_with(tmp_path, {"model": origin.state_dict()})
    assert load(path, version="1.9.0").can_classifier_guidance is False
    prior = load(path, version="1.10.4")
    assert_same_samples(prior, origin, cond_scale=3.0)


@pytest.mark.parametrize(
    "net, version, first_good, match",
    [
        (dict(self_cond=True), "1.12.0", "1.12.1", "self_cond=True"),
        (dict(num_timesteps=None), "1.10.7", "1.10.8", "num_timesteps=None"),
    ],
)
def test_releases_whose_results_cannot_be_had(tmp_path, net, version, first_good, match):
    origin = make_prior(**net)
    path = file_with(tmp_path, {"model": origin.state_dict()})
    kwargs = dict(config={"net": net, "prior": {"cond_drop_prob": 0.1}})
    with pytest.raises(ValueError, match=match):
        load(path, version=version, **kwargs)
    assert match in str(load(path, version=version, strict=False, **kwargs).load_report)
    assert_same_samples(load(path, version=first_good, **kwargs), origin)


def test_layers_of_the_earliest_releases_are_named(tmp_path):
    state = old_norms(make_prior().state_dict())
    extra = "net.causal_transformer.layers.0.0.post_norm.gamma"
    with pytest.raises(ValueError, match=re.escape(extra)):
        load(file_with(tmp_path, state | {extra: torch.ones(DIM)}))
    extra = "net.to_image_embeds.0.weight"
    with pytest.raises(ValueError, match=re.escape(extra)):
        load(file_with(tmp_path, state | {extra: torch.ones(DIM, DIM)}))
    beta = next(key for key in state if key.endswith(".beta"))
    with pytest.raises(ValueError, match=f"{re.escape(beta)} is not zero"):
        load(file_with(tmp_path, state | {beta: torch.full((DIM,), 0.1)}))


@pytest.mark.parametrize("version", ["latest", "4", ""])
def test_version_must_read_as_one(tmp_path, version):
    with pytest.raises(ValueError, match=r"it must read like '1\.4\.2'"):
        load(tmp_path / "any.pth", version=version)


# precision


def test_16_bit_file_gets_its_constants_back(tmp_path):
    origin = make_prior(prior=dict(timesteps=50), num_timesteps=50)
    state = {key: value.half() for key, value in origin.state_dict().items()}
    rounded = make_prior_of_16_bits(origin)
    prior = load(file_with(tmp_path, state))
    for key, value in origin.noise_scheduler.state_dict().items():
        assert torch.equal(prior.noise_scheduler.state_dict()[key], value), key
    assert prior.net.learned_query.dtype == torch.float32
    assert "cast to torch.float32" in str(prior.load_report) and "exact again" in str(prior.load_report)
    assert_same_samples(prior, rounded)
    kept = load(file_with(tmp_path, state), dtype=None)
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.float16}
    assert kept.noise_scheduler.betas.dtype == torch.float32


def make_prior_of_16_bits(origin):
    """The weights rounded, the constants exact."""
    prior = copy.deepcopy(origin)
    with torch.no_grad():
        for name, parameter in prior.net.named_parameters():
            if not name.endswith("rotary_emb.freqs"):
                parameter.copy_(parameter.half())
    return prior


def test_unnamed_schedule_is_kept(tmp_path):
    origin = make_prior()
    state = dict(origin.state_dict())
    for key in ("betas", "posterior_mean_coef1", "sqrt_recip_alphas_cumprod"):
        state[f"noise_scheduler.{key}"] = state[f"noise_scheduler.{key}"] * 0.7
    prior = load(file_with(tmp_path, state))
    assert "fit no named schedule" in str(prior.load_report)
    assert_same_samples(prior, make_prior_like(state))
    assert not torch.equal(sample(prior), sample(origin))


# architecture

NETS = {
    "plain": {},
    "norms": dict(norm_in=True, norm_out=False, normformer=True, final_proj=False),
    "norm in": dict(norm_in=True),
    "no rotary": dict(rotary_emb=False),
    "continuous": dict(num_timesteps=None, num_time_embeds=2),
    "embeds": dict(num_time_embeds=2, num_image_embeds=3, num_text_embeds=4),
    "heads": dict(heads=1, dim_head=12, depth=1, ff_mult=2),
    "odd ff": dict(ff_mult=1.7, max_text_len=7),
    "odder ff": dict(ff_mult=0.9),
    "no text": dict(max_text_len=0),
    "deep": dict(depth=11, dim_head=4, heads=2),
}


@pytest.mark.parametrize("net", NETS)
def test_architecture_is_inferred(tmp_path, net):
    origin = make_prior(**NETS[net])
    prior = load(file_with(tmp_path, origin.state_dict()))
    own = origin.net.config | {"ff_mult": origin.net.config.get("ff_mult", 4)}
    assert {key: prior.net.config[key] for key in own if key not in ("self_cond", "ff_mult")} == {
        key: value for key, value in own.items() if key not in ("self_cond", "ff_mult")
    }
    assert int(prior.net.config["ff_mult"] * DIM) == int(own["ff_mult"] * DIM)
    assert prior.state_dict().keys() == origin.state_dict().keys()
    assert_same_samples(prior, origin)


def test_feed_forward_width_that_a_quotient_rounds_away(tmp_path):
    inner = next(inner for inner in range(50, 500) if int(inner / 49 * 49) != inner)
    origin = make_prior(dim=49, ff_mult=(inner + 0.1) / 49, prior=dict(image_embed_dim=49))
    prior = load(file_with(tmp_path, origin.state_dict()))
    ours, theirs = prior.state_dict(), origin.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("steps", [21, 300])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "quadratic", "jsd", "sigmoid"])
def test_schedule_is_recognised(tmp_path, schedule, steps):
    origin = make_prior(prior=dict(beta_schedule=schedule, timesteps=steps), num_timesteps=steps)
    for cast in (torch.float32, torch.float16):
        state = {key: value.to(cast) for key, value in origin.state_dict().items()}
        prior = load(file_with(tmp_path, state))
        assert prior.noise_scheduler.num_timesteps == steps
        assert torch.equal(prior.noise_scheduler.betas, origin.noise_scheduler.betas)
        assert prior.config["beta_schedule"] == schedule


def test_what_weights_do_not_show_is_reported(tmp_path):
    prior = load(file_with(tmp_path, make_prior().state_dict()))
    text = str(prior.load_report)
    assert "image_embed_scale, predict_x_start, predict_v, self_cond" in text and "cond_drop_prob=0.1" in text
    assert prior.text_cond_drop_prob == prior.image_cond_drop_prob == 0.1
    assert prior.load_report.architecture == "inferred"


# configs


def configs():
    net = dict(dim=DIM, depth=2, dim_head=8, heads=3, num_timesteps=STEPS)
    prior = dict(image_embed_dim=DIM, timesteps=STEPS, **UNSEEN["prior"])
    clip = {"make": "openai", "model": "ViT-L/14"}
    peer = {"clip": clip, "net": {**net, "max_text_len": None}, "image_size": 224, **prior}
    return {
        "ours": {"net": {**net, "max_text_len": TEXT}, "prior": prior},
        "ours, in part": {"net": {}, "prior": UNSEEN["prior"]},
        "prior only": {"prior": UNSEEN["prior"]},
        "peer's prior": peer,
        "peer's training": {"prior": peer, "data": {"batch_size": 3}, "train": {}, "tracker": {}, "load": None},
    }


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("name", configs())
def test_config(tmp_path, name, as_file):
    origin = make_prior(prior=UNSEEN["prior"])
    config = configs()[name]
    if as_file:
        (tmp_path / "config.json").write_text(json.dumps(config))
        config = str(tmp_path / "config.json")
    path = file_with(tmp_path, origin.state_dict())
    prior = load(path, config=config)
    assert prior.load_report.architecture == "given" and prior.text_cond_drop_prob == 0.2
    assert_same_samples(prior, origin, cond_scale=1.5)
    assert not torch.equal(sample(load(path)), sample(origin))


@pytest.mark.parametrize(
    "config, match",
    [
        ({"net": {"dept": 2}}, "config 'net' has the unknown key 'dept'; did you mean 'depth'"),
        ({"net": {}, "prior": {"beta_shedule": "cosine"}}, "'beta_shedule'; did you mean 'beta_schedule'"),
        ({"net": {}, "image_embed_dims": 32}, "'image_embed_dims'; did you mean 'image_embed_dim'"),
        ({"prior": {"net": {}, "time_steps": 8}}, "'time_steps'; did you mean 'timesteps'"),
        ({"net": 3}, "config 'net' is a int; it must be a dict"),
        ([1], "config is a list; it must be a dict"),
        ({"net": {"dim": 64}, "prior": {"image_embed_dim": 64}}, r"has shape \(32,\).*given.*must be \(64,\)"),
        ({"net": {"heads": 4}}, r"relative_attention_bias.weight has shape \(32, 3\).*must be \(32, 4\)"),
        ({"prior": {"timesteps": 9}}, r"noise_scheduler.betas has shape \(6,\).*must be \(9,\)"),
        ({"net": {"depth": 3}}, "Missing: net.causal_transformer.layers.2"),
        ({"net": {"depth": 1}}, "unexpected: net.causal_transformer.layers.1"),
        ({"prior": {"beta_schedule": "linear"}}, "'cosine' betas; config has 'linear'"),
        ({"prior": {"image_embed_dim": 64}}, "image_embed_dim=64"),
    ],
)
def test_config_that_does_not_fit(tmp_path, config, match):
    with pytest.raises(ValueError, match=match):
        load(file_with(tmp_path, make_prior().state_dict()), config=config)


def test_config_file_that_is_not_there_or_not_json(tmp_path):
    path = file_with(tmp_path, make_prior().state_dict())
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load(path, config=tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json.*is not JSON"):
        load(path, config=tmp_path / "bad.json")


def test_missing_and_unexpected_keys(tmp_path):
    origin = make_prior()
    state = dict(origin.state_dict())
    state["net.extra"] = torch.ones(2)
    gain = "net.causal_transformer.layers.1.0.norm.g"
    del state[gain]
    path = file_with(tmp_path, state)
    with pytest.raises(ValueError, match=f"Missing: {gain}; unexpected: net.extra"):
        load(path)
    prior = load(path, strict=False)
    assert prior.load_report.missing == [gain] and prior.load_report.unexpected == ["net.extra"]
    assert torch.equal(prior.state_dict()[gain], torch.ones(DIM))  # as a new network has it
    assert torch.equal(prior.net.learned_query, origin.net.learned_query)
    assert gain in str(prior.load_report)


def test_nulls_are_not_invented_for_releases_that_had_them(tmp_path):
    state = {key: value for key, value in make_prior().state_dict().items() if key not in NULLS}
    config = {"net": {"max_text_len": TEXT}, "prior": {"condition_on_text_encodings": False}}
    with pytest.raises(
        ValueError, match="Missing: net.null_text_encodings, net.null_text_embeds, net.null_image_embed"
    ):
        load(file_with(tmp_path, state), version="1.9.0", config=config)


class TinyClip(BaseClipAdapter):
    dim_latent, image_size, image_channels, max_text_len = DIM, 8, 3, TEXT


def test_clip_weights(tmp_path):
    origin = make_prior()
    clip = TinyClip(nn.Linear(3, 3))
    path = file_with(tmp_path, origin.state_dict() | prefixed("clip.", clip.state_dict()))
    prior = load(path)
    assert prior.clip is None and "2 tensors of a CLIP were ignored" in str(prior.load_report)
    assert_same_samples(prior, origin)
    prior = load(path, clip=TinyClip(nn.Linear(3, 3)))
    assert torch.equal(prior.clip.clip.weight, clip.clip.weight)
    save(prior, tmp_path / "own.safetensors")
    with safe_open(tmp_path / "own.safetensors", "pt") as file:
        assert set(file.keys()) == set(origin.state_dict())
    with pytest.raises(ValueError, match="CLIP weights do not fit the clip given"):
        load(path, clip=TinyClip(nn.Linear(3, 4)))


# files that are refused


class Payload:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["top", "nested", "instead of a version"])
@pytest.mark.parametrize("function", ["system", "eval", "exec"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, function, place, zipped):
    marker = tmp_path / "owned"
    payload = {
        "system": Payload(os.system, f"touch {marker}"),
        "eval": Payload(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Payload(exec, f"open({str(marker)!r}, 'w')"),
    }[function]
    state = make_prior().state_dict()
    contents = {"model": state, "optimizer": {"state": [payload]}, "version": "1.15.6"}
    contents = {"top": payload, "nested": contents, "instead of a version": {"model": state, "version": payload}}[place]
    torch.save(contents, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"bad\.pth is refused, and nothing in it was run.*\b{function}\b"):
        load(tmp_path / "bad.pth")
    assert not marker.exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert marker.exists()  # it would have run


def test_pickled_module_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"fastprior\.prior\.DiffusionPrior.*state_dict\(\) alone"):
        load(file_with(tmp_path, {"model": make_prior()}))


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
@pytest.mark.parametrize("name", ["own.safetensors", "peer.pth"])
def test_truncated_file(tmp_path, name, keep):
    path = tmp_path / name
    (save if name.endswith("safetensors") else save_peer)(make_prior(), path)
    contents = path.read_bytes()
    path.write_bytes(contents[: int(keep * len(contents)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=rf"{name} cannot be read: it is damaged") as caught:
        load(path)
    assert "weights_only" not in str(caught.value)  # torch's own message advises to switch the protection off


@pytest.mark.parametrize("name", ["noise.pth", "noise.safetensors"])
def test_noise_is_no_checkpoint(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(range(256)) * 10)
    with pytest.raises(ValueError, match="it is damaged, cut short, or no checkpoint"):
        load(tmp_path / name)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth does not exist"):
        load(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="is a directory"):
        load(tmp_path)


@pytest.mark.parametrize(
    "payload, match",
    [
        ({"layer1.weight": torch.ones(2), "fc.bias": torch.ones(1)}, "no key ends in learned_query.*layer1.weight, fc"),
        ({"model": {"prd_embedding": torch.ones(1, 1, 2)}}, "PriorTransformer of diffusers"),
        ({}, "Found: nothing"),
        ({"epoch": 3}, "Found: epoch"),
        ([torch.ones(2)], "holds a list"),
        ({"net.learned_query": torch.ones(4)}, r"layers\.0\.0\.null_kv is missing"),
        ({"net.learned_query": torch.ones(())}, "learned_query is missing or damaged"),
    ],
)
def test_foreign_checkpoint(tmp_path, payload, match):
    if isinstance(payload, dict) and any(key.startswith("net.") for key in payload):
        payload["net.null_text_encodings"] = torch.ones(1, 2, 4)
    with pytest.raises(ValueError, match=match):
        load(file_with(tmp_path, payload))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    state = {key: tensor.clone() for key, tensor in make_prior().state_dict().items()}
    state["net.learned_query"][3] = value
    with pytest.raises(ValueError, match=r"NaN or infinity in net\.learned_query"):
        load(file_with(tmp_path, state))


def test_integer_weights_are_refused(tmp_path):
    state = dict(make_prior().state_dict())
    state["net.learned_query"] = torch.ones(DIM, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"net\.learned_query has dtype torch\.int8"):
        load(file_with(tmp_path, state))


# saving


@pytest.mark.parametrize("net", [*NETS, "dot product", "self-conditioned"])
def test_round_trip(tmp_path, net):
    special = {"dot product": dict(cosine_sim=False, dot_scale=0.3), "self-conditioned": dict(self_cond=True)}
    unseen = dict(predict_x_start=False, image_embed_scale=2.5, clamp=4.0, sample_timesteps=3)
    origin = make_prior(prior=unseen, **special.get(net) or NETS[net])
    metadata = {"loss": 0.25, "notes": ["é", None], "steps": 4}
    save(origin, tmp_path / "own.safetensors", metadata=metadata)
    prior = load(tmp_path / "own.safetensors")
    ours, theirs = prior.state_dict(), origin.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert prior.config == origin.config and prior.net.config == origin.net.config
    report = prior.load_report
    assert (report.kind, report.architecture, report.metadata) == ("fastprior file", "recorded", metadata)
    assert report.notes == [] and report.version == checkpoint.__version__
    assert_same_samples(prior, origin, cond_scale=2.0)


def test_file_records_its_configuration(tmp_path):
    origin = make_prior()
    save(origin, tmp_path / "own.safetensors")
    with safe_open(tmp_path / "own.safetensors", "pt") as file:
        header = json.loads(file.metadata()["fastprior"])
    assert header["format"] == 1 and header["version"] == checkpoint.__version__
    assert header["net"] == origin.net.config and header["prior"] == origin.config


def test_config_overrides_what_a_file_records(tmp_path):
    save(make_prior(), tmp_path / "own.safetensors")
    prior = load(tmp_path / "own.safetensors", config={"prior": {"image_embed_scale": 3.0}})
    assert_same_samples(prior, make_prior(prior=dict(image_embed_scale=3.0)))
    assert prior.load_report.architecture == "given"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_trip_of_16_bit_weights(tmp_path, dtype):
    origin = make_prior()
    origin.noise_scheduler.betas.mul_(0.5)  # a schedule without a name
    origin.net.to(dtype)
    save(origin, tmp_path / "own.safetensors")
    prior = load(tmp_path / "own.safetensors", dtype=None)
    ours, theirs = prior.state_dict(), origin.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
    assert load(tmp_path / "own.safetensors").net.learned_query.dtype == torch.float32


def test_file_of_a_newer_format(tmp_path):
    state = {key: value.clone() for key, value in make_prior().state_dict().items()}
    header = json.dumps({"format": 2, "net": {}, "prior": {}})
    safetensors.torch.save_file(state, tmp_path / "own.safetensors", metadata={"fastprior": header})
    with pytest.raises(ValueError, match="has format 2; this release reads format 1"):
        load(tmp_path / "own.safetensors")


def test_loading_draws_no_random_numbers(tmp_path):
    save(make_prior(), tmp_path / "own.safetensors")
    state = dict(make_prior().state_dict())
    del state["net.learned_query"], state["net.null_image_embed"]
    file_with(tmp_path, state | {"net.learned_query": torch.ones(DIM)}, "lacking.pth")
    torch.manual_seed(5)
    expected = torch.randn(3)
    for name, strict in (("own.safetensors", True), ("lacking.pth", False)):
        torch.manual_seed(5)
        load(tmp_path / name, strict=strict)
        assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("net", ["plain", "norms", "continuous", "embeds", "no rotary"])
def test_save_peer(tmp_path, net):
    peer = pytest.importorskip("dalle2_pytorch")
    origin = make_prior(prior=dict(image_embed_scale=2.0), **NETS[net])
    save_peer(origin, tmp_path / "peer.pth")
    config = dict(dim=DIM, depth=2, dim_head=8, heads=3, num_timesteps=STEPS, max_text_len=TEXT) | NETS[net]
    theirs = peer.DiffusionPrior(
        peer.DiffusionPriorNetwork(**config),
        image_embed_dim=DIM,
        timesteps=STEPS,
        cond_drop_prob=0.1,
        image_embed_scale=2.0,
    ).eval()
    theirs.load_state_dict(torch.load(tmp_path / "peer.pth", weights_only=True), strict=True)
    for cond_scale in (1.0, 2.5):
        reference = sample(theirs, cond_scale=cond_scale)
        ours = sample(load(tmp_path / "peer.pth", config={"prior": {"image_embed_scale": 2.0, "cond_drop_prob": 0.1}}),
                      cond_scale=cond_scale)  # fmt: skip
        assert reference.abs().max() > 1e-2
        torch.testing.assert_close(ours, reference, atol=1e-4 * reference.abs().max().item(), rtol=0)


def test_what_the_peer_cannot_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cosine_sim=False"):
        save_peer(dot_product(), tmp_path / "peer.pth")
    assert os.listdir(tmp_path) == []


def extended():
    prior = make_prior()
    prior.net.extra = nn.Linear(2, 2)
    return prior


def foreign():
    prior = make_prior()
    prior.net = nn.Linear(2, 2)
    return prior


@pytest.mark.parametrize("write, name", [(save, "own.safetensors"), (save_peer, "peer.pth")])
@pytest.mark.parametrize(
    "make, match", [(foreign, "net is a Linear without a `config`"), (extended, "net.extra.weight")]
)
def test_networks_that_a_file_cannot_describe_are_refused(tmp_path, make, match, write, name):
    with pytest.raises(ValueError, match=match):
        write(make(), tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_save_checks_its_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save(make_prior(), tmp_path / "own.pth")
    with pytest.raises(ValueError, match=r"must end in \.pt or \.pth"):
        save_peer(make_prior(), tmp_path / "own.safetensors")
    with pytest.raises(FileNotFoundError, match="folder that exists"):
        save(make_prior(), tmp_path / "none" / "own.safetensors")
    with pytest.raises(TypeError, match="must be JSON values"):
        save(make_prior(), tmp_path / "own.safetensors", metadata={"a": torch.ones(2)})
    assert os.listdir(tmp_path) == []


def test_compiled_network_is_saved_under_plain_keys(tmp_path):
    origin = make_prior()
    compiled = copy.deepcopy(origin)
    compiled.net = torch.compile(compiled.net, backend="eager")
    save(compiled, tmp_path / "own.safetensors")
    assert_same_samples(load(tmp_path / "own.safetensors"), origin)


@pytest.mark.parametrize("failing", ["write", "sync", "replace"])
@pytest.mark.parametrize("name", ["own.safetensors", "peer.pth"])
def test_failing_write_leaves_the_old_file(tmp_path, monkeypatch, name, failing):
    write = save if name.endswith("safetensors") else save_peer
    write(make_prior(0), tmp_path / name)
    before = (tmp_path / name).read_bytes()

    def half_written(state, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    def fail(*_):
        raise OSError("disk full")

    if failing == "write":
        module, function = (safetensors.torch, "save_file") if write is save else (torch, "save")
        monkeypatch.setattr(module, function, half_written)
    else:
        monkeypatch.setattr(os, "fsync" if failing == "sync" else "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(make_prior(1), tmp_path / name)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == before
    write(make_prior(1), tmp_path / name)
    assert_same_samples(load(tmp_path / name), make_prior(1))


def test_saving_through_a_link_writes_its_target(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real" / "file.safetensors")
    save(make_prior(), tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink()
    assert_same_samples(load(tmp_path / "real" / "file.safetensors"), make_prior())


def test_convert(tmp_path, trainer_file):
    source, model, ema = trainer_file
    report = convert(source, tmp_path / "own.safetensors")
    assert report.weights == "ema" and report.kind == "trainer checkpoint"
    reference = sample(ema)
    tolerance = dict(atol=1e-4 * reference.abs().max().item(), rtol=0)
    torch.testing.assert_close(sample(load(tmp_path / "own.safetensors")), reference, **tolerance)
    convert(tmp_path / "own.safetensors", tmp_path / "peer.pth")
    other = copy.deepcopy(model)
    other.load_state_dict(torch.load(tmp_path / "peer.pth", weights_only=True))
    torch.testing.assert_close(sample(other), reference, **tolerance)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert(source, tmp_path / "own.safetensors", weights="model")
    convert(source, tmp_path / "own.safetensors", weights="model", overwrite=True)
    torch.testing.assert_close(sample(load(tmp_path / "own.safetensors")), sample(model), **tolerance)
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pt or \.pth"):
        convert(source, tmp_path / "own.onnx")


def test_convert_keeps_an_old_era_and_metadata(tmp_path):
    origin = dot_product()
    state = dict(origin.state_dict())
    state[BIAS] = state[BIAS] / 128
    source = file_with(tmp_path, {"model": single_null(state), "version": "1.4.2", "optimizer": {}})
    convert(source, tmp_path / "own.safetensors")
    prior = load(tmp_path / "own.safetensors")
    assert_same_samples(prior, origin)
    assert not prior.can_classifier_guidance
    save(prior, tmp_path / "more.safetensors", metadata={"a": 1})
    assert convert(tmp_path / "more.safetensors", tmp_path / "copy.safetensors").metadata == {"a": 1}
    assert load(tmp_path / "copy.safetensors").load_report.metadata == {"a": 1}


def test_saved_files_have_the_usual_permissions(tmp_path):
    old = os.umask(0o022)
    try:
        save(make_prior(), tmp_path / "prior.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "prior.safetensors").stat().st_mode & 0o777 == 0o644
