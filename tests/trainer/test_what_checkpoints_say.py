"""Checkpoints of trainers say how to build their prior and what encodes its text; what does not is found or told."""

import json
import shutil

import numpy as np
import pytest
import torch

import fastprior
from fastprior import PriorTransformer
from fastprior.models.prior_transformer.as_network import PriorTransformerNet
from fastprior.trackers.tracker import Tracker
from helpers.priors import make_prior, sample

pytest.importorskip("accelerate")

from helpers import tracker_cases
from helpers.trainer_cases import NET, batch, make_trainer, run, small_prior

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
OBJECTIVES = {
    "v": dict(predict_v=True),
    "noise": dict(predict_x_start=False, clamp=None),
    "scale": dict(image_embed_scale=2.0, sampling_clamp_l2norm=True),
    "numpy": dict(image_embed_scale=np.float64(3), timesteps=np.int64(10)),
}
TEXT = {"text_embed": batch(3)["text_embed"]}


def trained(folder, name="best.pth", **prior):
    trainer = make_trainer(small_prior(**prior))
    run(trainer, 2)
    trainer.save(folder / name)
    return trainer


def assert_samples_as(prior, trainer):
    wanted = sample(trainer.sampling_prior.eval(), TEXT, timesteps=5)
    assert torch.equal(sample(prior, TEXT, timesteps=5), wanted)


def strip(path) -> None:
    """Leave what releases before wrote."""
    payload = torch.load(path, weights_only=True)
    del payload["fastprior"]
    torch.save(payload, path)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_checkpoint_samples_as_it_was_trained(tmp_path, objective):
    trainer = trained(tmp_path, **OBJECTIVES[objective])
    prior = fastprior.load(tmp_path / "best.pth")
    assert_samples_as(prior, trainer)
    report = prior.load_report
    assert (report.kind, report.architecture, report.assumed) == ("trainer checkpoint", "recorded", [])
    assert prior.condition_on_text_encodings is False
    trainer.export_for_peer(tmp_path / "peer.pth")
    assert_samples_as(fastprior.load(tmp_path / "peer.pth"), trainer)
    fastprior.convert(tmp_path / "best.pth", tmp_path / "one.safetensors")
    assert_samples_as(fastprior.load(tmp_path / "one.safetensors"), trainer)


def test_the_model_that_a_tracker_saves_samples_as_it_was_trained(tmp_path):
    trainer = make_trainer(small_prior(predict_v=True))
    tracker: Tracker = tracker_cases.tracker(tmp_path, [dict(save_type="model", save_latest_to=f"{tmp_path}/m.pth")])
    tracker.save(trainer, is_best=False, is_latest=True)
    assert_samples_as(fastprior.load(tmp_path / "m.pth"), trainer)


def test_a_prior_transformer_is_loaded_from_its_checkpoint(tmp_path):
    torch.manual_seed(0)
    shape = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=16, num_embeddings=4)
    net = PriorTransformerNet(PriorTransformer(**shape, additional_embeddings=4))
    net.set_statistics(torch.randn(50, 16))
    prior = fastprior.DiffusionPrior(net, image_embed_dim=16, timesteps=10)
    trainer = make_trainer(prior)
    trainer.save(tmp_path / "best.pth")
    text = {**TEXT, "text_encodings": torch.randn(len(TEXT["text_embed"]), 4, 16)}
    found, wanted = (sample(p.eval(), text, timesteps=5) for p in (fastprior.load(tmp_path / "best.pth"), prior))
    assert torch.equal(found, wanted)
    fastprior.convert(tmp_path / "best.pth", tmp_path / "folder")
    again = PriorTransformer.from_pretrained(tmp_path / "folder")
    assert torch.equal(again.clip_mean, net.prior.clip_mean) and torch.equal(
        again.proj_in.weight, net.prior.proj_in.weight
    )
    strip(shutil.copy(tmp_path / "best.pth", tmp_path / "old.pth"))
    config = {"prior": {"net": {"make": "prior_transformer", **shape}, "image_embed_dim": 16}}
    fastprior.convert(tmp_path / "old.pth", tmp_path / "older", config=config)
    assert torch.equal(PriorTransformer.from_pretrained(tmp_path / "older").proj_in.weight, again.proj_in.weight)
    fastprior.save(fastprior.load(tmp_path / "best.pth"), tmp_path / "one.safetensors")
    assert torch.equal(sample(fastprior.load(tmp_path / "one.safetensors"), text, timesteps=5), wanted)


def test_a_network_of_ones_own_is_saved_without_a_record(tmp_path):
    prior = small_prior()
    prior.net.extra = torch.nn.Linear(2, 2)  # its config does not say so
    make_trainer(prior, use_ema=False).save(tmp_path / "own.pth")
    payload = torch.load(tmp_path / "own.pth", weights_only=True)
    assert "fastprior" not in payload and "net.extra.weight" in payload["model"]
    assert fastprior.load(tmp_path / "own.pth", strict=False).load_report.unexpected == [
        "net.extra.weight",
        "net.extra.bias",
    ]


def test_going_on_with_another_objective_is_warned_of(tmp_path):
    trained(tmp_path, predict_v=True)
    with pytest.warns(UserWarning, match=r"best\.pth was trained with predict_v=True; this prior has False"):
        make_trainer(small_prior()).load(tmp_path / "best.pth")


# files that do not say


def config_of(trainer, **net) -> dict:
    """As a training's config says it."""
    prior = {name: value for name, value in trainer.prior.config.items() if name != "clamp"}
    return dict(prior=prior | dict(net=NET | net), data=dict(text_url="texts"), train={}, tracker={})


@pytest.mark.parametrize("where", ["beside", "given", "in the file"])
def test_the_config_of_a_file_that_does_not_say(tmp_path, where):
    trainer = trained(tmp_path, predict_v=True)
    strip(tmp_path / "best.pth")
    assert "predict_v=False" in fastprior.load(tmp_path / "best.pth").load_report.assumed
    path, config = tmp_path / "config.json", config_of(trainer)
    path.write_text(json.dumps(config))
    if where == "in the file":  # where scripts of others put it
        torch.save(torch.load(tmp_path / "best.pth", weights_only=True) | dict(config=config), tmp_path / "best.pth")
    if where != "beside":
        path = shutil.move(path, tmp_path / "other.json")
    prior = fastprior.load(tmp_path / "best.pth", config=path if where == "given" else None)
    assert_samples_as(prior, trainer)
    assert prior.text_encoder == {"make": "embeddings"}
    named = {"beside": "config.json", "in the file": "best.pth"}.get(where)
    assert [line for line in prior.load_report.assumed if named in line] if named else not prior.load_report.assumed


@pytest.mark.parametrize("content", ["{", "[1]", '{"_class_name": "Other"}', '{"net": {"dim": "wide"}}', "another's"])
def test_a_config_beside_that_is_not_of_the_file_stops_nothing(tmp_path, content):
    trainer = trained(tmp_path)
    strip(tmp_path / "best.pth")
    before = fastprior.load(tmp_path / "best.pth")
    is_of_another = content == "another's"
    text = json.dumps(config_of(trainer, depth=3)) if is_of_another else content
    (tmp_path / "config.json").write_text(text)
    if is_of_another:
        with pytest.warns(UserWarning, match=r"config\.json is not used: .*best\.pth have depth=2.* says depth=3"):
            prior = fastprior.load(tmp_path / "best.pth")
    else:
        prior = fastprior.load(tmp_path / "best.pth")
    assert torch.equal(sample(prior, TEXT), sample(before, TEXT))


@pytest.mark.parametrize("where", ["in the file", "given"])
def test_weights_that_contradict_a_config_are_named_with_it(tmp_path, where):
    trainer = trained(tmp_path)
    config = tmp_path / "other.json"
    config.write_text(json.dumps(config_of(trainer, depth=3, dim_head=4, heads=4)))
    if where == "in the file":
        payload = torch.load(tmp_path / "best.pth", weights_only=True)
        payload["fastprior"]["net"] |= dict(depth=3, dim_head=4, heads=4)
        torch.save(payload, tmp_path / "best.pth")
    said = "other.json" if where == "given" else "recorded config"
    shown = r"best\.pth have depth=2 and dim_head=8 and heads=2, .*"
    with pytest.raises(ValueError, match=f"{shown}{said} says depth=3 and dim_head=4 and heads=4"):
        fastprior.load(tmp_path / "best.pth", config=config if where == "given" else None)


def test_a_config_that_says_otherwise_than_the_file_is_warned_of(tmp_path):
    trainer = trained(tmp_path, predict_v=True)
    config = config_of(trainer)
    config["prior"]["predict_v"] = False
    with pytest.warns(UserWarning, match="predict_v=False, as the config says; True was recorded in training"):
        assert not fastprior.load(tmp_path / "best.pth", config=config).predict_v


# the text encoder


def test_the_text_encoder_is_kept(tmp_path):
    described = dict(make="open_clip", model="ViT-B-32", base_model_kwargs=dict(pretrained="a tag"))
    prior = small_prior()
    prior.text_encoder = described
    trainer = make_trainer(prior)
    trainer.save(tmp_path / "first.pth")
    loaded = fastprior.load(tmp_path / "first.pth")
    assert loaded.text_encoder == loaded.load_report.metadata["text_encoder"] == described
    make_trainer(loaded.train()).save(tmp_path / "second.pth")  # trained further, elsewhere
    fastprior.convert(tmp_path / "second.pth", tmp_path / "third.safetensors")
    assert fastprior.load(tmp_path / "third.safetensors").text_encoder == described
    assert fastprior.load(tmp_path / "first.pth", weights="model").text_encoder == described
    assert make_prior().clip is None and getattr(make_prior(), "text_encoder", None) is None
