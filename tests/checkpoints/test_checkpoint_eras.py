"""Every era of checkpoint file: a prior is saved by hand as a release did, and must sample as before."""

import re
import warnings

import pytest
import torch

from fastprior.checkpoints.dalle2 import load
from helpers.checkpoint_cases import (
    BIAS,
    DIM,
    NULLS,
    STEPS,
    TEXT,
    assert_same_samples,
    dot_product,
    file_with,
    make_prior,
    make_prior_like,
    old_norms,
    sample,
    single_null,
)


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
