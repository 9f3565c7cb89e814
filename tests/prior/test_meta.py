"""Priors made on the meta device, which get their numbers later: a file's, or room and then a file's."""

import random

import pytest
import torch

from fastprior.diffusion.schedule import NoiseScheduler
from helpers.priors import make_prior, make_text, relative_error, sample
from helpers.pt_cases import TOLERANCE, make_inputs, make_stock, within_diffusers, without_diffusers


def fill(model, state, how):
    if "room" in how:
        model.to_empty(device="cpu")
        with torch.no_grad():
            for weight in model.parameters():  # what is there is anything
                weight.fill_(float("nan"))
    model.load_state_dict(state, assign="assign" in how, strict="schedule" not in how)
    return model.eval().to(torch.float32)  # a tensor that is left on the meta device would refuse to move


pytest.importorskip("diffusers")
HOW = pytest.mark.parametrize("how", ["assign", "room", "room, assign", "assign, no schedule", "room, no schedule"])


@HOW
@pytest.mark.parametrize("net", [{}, dict(self_cond=True, num_timesteps=20)], ids=["plain", "self_cond"])
def test_dalle2(net, how):
    """Tables of the schedule are known without a file; nothing else is derived."""
    prior, text = make_prior(net), make_text(3, 32)
    with torch.device("meta"):
        empty = make_prior(net)
    assert all(weight.is_meta for weight in empty.parameters())
    state = prior.state_dict()
    if "no schedule" in how:
        state = {name: t for name, t in state.items() if not name.startswith("noise_scheduler.")}
    filled = fill(empty, state, how)
    assert filled.device == prior.device
    assert not [name for name, t in (*filled.named_parameters(), *filled.named_buffers()) if t.is_meta]
    for kwargs in (dict(timesteps=5), dict(cond_scale=2.0)):
        assert torch.equal(sample(filled, text, **kwargs), sample(prior, text, **kwargs))
    image = torch.ones(3, 32)
    losses = []
    for each in (filled, prior):
        torch.manual_seed(0)
        random.seed(0)  # whether there is a self-condition
        losses.append(each.p_losses(image, torch.tensor([0, 7, 19]), text))
    assert torch.equal(*losses)


@pytest.mark.parametrize("how", ["assign", "room", "room, assign"])
@pytest.mark.parametrize("make", ["within", "without"])
def test_prior_transformer(make, how):
    stock = make_stock()
    kind = dict(within=within_diffusers, without=without_diffusers)[make](stock).__class__
    with torch.device("meta"):
        empty = kind(**{name: value for name, value in stock.config.items() if name[0] != "_"})
    filled, given = fill(empty, stock.state_dict(), how), make_inputs(stock.config)
    with torch.no_grad():
        assert relative_error(filled(**given)[0], stock(**given)[0]) < TOLERANCE


def test_a_schedule_on_the_meta_device_still_refuses_what_cannot_be():
    with torch.device("meta"), pytest.raises(ValueError, match="timesteps=3 has betas up to"):
        NoiseScheduler(beta_schedule="linear", timesteps=3, loss_type="l2")
