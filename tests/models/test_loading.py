"""`load_state_dict(strict=False)` that loads nothing says so, and does what torch does."""

import warnings

import pytest
import torch
from torch import nn

import fastprior
from fastprior.models.prior_transformer.model import PriorTransformer
from helpers.priors import make_prior

SMALL = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=16, num_embeddings=5)


def of_diffusers():
    pytest.importorskip("diffusers")
    return fastprior.PriorTransformer(**SMALL)


MODELS = {
    "prior": (make_prior, "fastprior.load reads files of trainers"),
    "network": (lambda: make_prior().net, "fastprior.load reads files of trainers"),
    "PriorTransformer": (lambda: PriorTransformer(**SMALL), "from_pretrained reads folders"),
    "diffusers' PriorTransformer": (of_diffusers, "from_pretrained reads folders"),
}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_loaded(name):
    make, hint = MODELS[name]
    model = make()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    trainers = {"model": state, "optimizer": {}, "step": torch.tensor(1), "version": "1", "ema_model": state}
    wrapped = {f"module.{key}": value for key, value in state.items()}
    for foreign, keys in (
        (trainers, "model, optimizer, step, version, ema_model;"),
        (wrapped, f"module.{next(iter(state))}, "),
    ):
        with pytest.warns(UserWarning, match=f"loaded nothing into this {type(model).__name__}.* {keys}.*{hint}"):
            result = model.load_state_dict(foreign, strict=False)
        assert result == nn.Module.load_state_dict(model, foreign, strict=False)
        assert result.unexpected_keys == list(foreign) and result.missing_keys == list(state)
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(foreign)


@pytest.mark.parametrize("name", MODELS)
def test_no_warning_where_something_fits(name):
    model = MODELS[name][0]()
    key, value = next((key, value) for key, value in model.state_dict().items() if value.is_floating_point())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = model.load_state_dict({key: value + 1, "foreign": value}, strict=False, assign=True)
        assert result.unexpected_keys == ["foreign"] and torch.equal(model.state_dict()[key], value + 1)
        assert model.load_state_dict({}, strict=False).unexpected_keys == []
        assert str(model.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
