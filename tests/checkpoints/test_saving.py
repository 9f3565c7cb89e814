"""Files that are written: whole or not at all, and loaded again as they were, by the peer too."""

import copy
import json
import os

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from fastprior import __version__
from fastprior.checkpoints.conversion import convert
from fastprior.checkpoints.dalle2 import load, save, save_peer
from helpers.checkpoint_cases import (
    BIAS,
    DIM,
    NETS,
    STEPS,
    TEXT,
    assert_same_samples,
    dot_product,
    file_with,
    make_prior,
    sample,
    single_null,
)


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
    assert report.notes == [] and report.version == __version__
    assert_same_samples(prior, origin, cond_scale=2.0)


def test_file_records_its_configuration(tmp_path):
    origin = make_prior()
    save(origin, tmp_path / "own.safetensors")
    with safe_open(tmp_path / "own.safetensors", "pt") as file:
        header = json.loads(file.metadata()["fastprior"])
    assert header["format"] == 1 and header["version"] == __version__
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


def changed_file(path, change):
    """Write a file of ours again, as another program would, with its tensors changed and its header kept."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = safetensors.torch.load_file(path)
    change(state)
    safetensors.torch.save_file(state, path, metadata=metadata)


def test_checksums_name_the_tensors_that_differ(tmp_path):
    path, key = tmp_path / "own.safetensors", "net.causal_transformer.layers.1.1.5.weight"
    save(make_prior(), path)
    data = bytearray(path.read_bytes())
    with safe_open(path, "pt") as file:
        at = data.index(file.get_tensor(key).numpy().tobytes())
    data[at + 500] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{key} differ from what fastprior wrote: the file is damaged"):
        load(path)
    with pytest.warns(UserWarning, match=f"another program changed the file on purpose: {key} differ"):
        assert load(path, strict=False).load_report.guesses


def test_checksums_of_types_that_others_changed_say_nothing(tmp_path):
    save(make_prior(), tmp_path / "own.safetensors")
    changed_file(tmp_path / "own.safetensors", lambda state: state.update({BIAS: state[BIAS].half()}))
    assert "changed the type of 1 tensors" in str(load(tmp_path / "own.safetensors").load_report)


def test_files_without_checksums_load(tmp_path):
    path = tmp_path / "own.safetensors"
    save(make_prior(), path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["fastprior"])
    state = {key: value.double().float() for key, value in safetensors.torch.load_file(path).items()}
    assert header.pop("checksums").keys() == state.keys()
    safetensors.torch.save_file(state, path, metadata={"fastprior": json.dumps(header)})
    prior = load(path)
    assert prior.load_report.notes == [] and prior.load_report.kind == "fastprior file"


def test_weights_of_8_bit_floats_are_widened(tmp_path):
    state = make_prior().state_dict()
    narrow = {key: value.to(torch.float8_e4m3fn) if key.startswith("net.") else value for key, value in state.items()}
    safetensors.torch.save_file(narrow, tmp_path / "narrow.safetensors")
    for dtype in (torch.float32, None):
        prior = load(tmp_path / "narrow.safetensors", dtype=dtype)
        assert "float8_e4m3fn in the file, and were widened" in str(prior.load_report)
        assert torch.equal(prior.net.learned_query, narrow["net.learned_query"].float())


def test_only_the_prior_of_a_trainers_file_is_read(tmp_path):
    state = make_prior().state_dict()
    path = file_with(tmp_path, {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.full((5000,), 7.0)}}}})
    data = path.read_bytes()
    moments = torch.full((5000,), 7.0).numpy().tobytes()
    path.write_bytes(data.replace(moments, bytes(len(moments))))
    assert_same_samples(load(path), make_prior())
