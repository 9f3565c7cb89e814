"""Every shape of checkpoint file: a prior is saved by hand as such a file was, and must sample as before."""

import collections
import copy
import json
import os
import sys
import types

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from fastprior.checkpoints.conversion import convert
from fastprior.checkpoints.dalle2 import load, save, save_peer
from fastprior.clip import BaseClipAdapter
from helpers.checkpoint_cases import (
    DIM,
    NETS,
    NULLS,
    STEPS,
    TEXT,
    UNSEEN,
    assert_same_samples,
    file_with,
    make_prior,
    make_prior_like,
    network_of,
    prefixed,
    sample,
)

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
    with pytest.warns(UserWarning, match="assumed beta_schedule='cosine', the default: there is no noise schedule"):
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


@pytest.mark.parametrize("name", ["model_ema", "state_dict_ema", "ema_state_dict", "ema"])
def test_names_of_averages(tmp_path, name):
    model, average = make_prior(0), make_prior(1)
    path = file_with(tmp_path, {"model": model.state_dict(), name: average.state_dict(), "schema": {"a": 1}})
    assert_same_samples(load(path), average)
    assert_same_samples(load(path, weights="model"), model)


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
    for line in ("predict_v=False", "predict_x_start=True", "image_embed_scale=√dim", "cond_drop_prob=0.1"):
        assert f"assumed: {line}\n" in f"{text}\n"
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
        (tmp_path / "given.json").write_text(json.dumps(config))
        config = str(tmp_path / "given.json")
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
    with pytest.raises(ValueError, match=r"fastprior\.prior\.diffusion_prior\.DiffusionPrior.*state_dict\(\) alone"):
        load(file_with(tmp_path, {"model": make_prior()}))


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
@pytest.mark.parametrize("name", ["own.safetensors", "peer.pth"])
def test_truncated_file(tmp_path, name, keep):
    path = tmp_path / name
    (save if name.endswith("safetensors") else save_peer)(make_prior(), path)
    contents = path.read_bytes()
    path.write_bytes(contents[: int(keep * len(contents)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=rf"{name} cannot be read: it is (damaged|empty)") as caught:
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
