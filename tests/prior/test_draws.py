"""Several times and noises per pair, for which the text runs once."""

import pytest
import torch
from torch import nn

from fastprior import DiffusionPrior
from fastprior.batches import repeat_rows
from helpers.priors import Foreign, make_prior, make_text, relative_error, sample

NETS = [dict(), dict(self_cond=True, num_time_embeds=2, normformer=True), dict(num_timesteps=20, heads=1, norm_in=True)]


@pytest.mark.parametrize("net", NETS)
def test_equals_the_text_repeated(net):
    prior, text, rows = make_prior(net), make_text(3, 32), 12
    x, times = torch.randn(rows, 32), torch.arange(rows) % 20
    self_cond = torch.randn(rows, 32)
    cotangent = torch.randn(rows, 32)
    parameters = {name: p for name, p in prior.net.named_parameters() if p.requires_grad}
    shared, repeated = (prior.net(x, times, self_cond=self_cond, **given) for given in (text, repeat_rows(text, rows)))
    assert relative_error(shared, repeated) < 1e-5
    for name, ours, wanted in zip(
        parameters,
        *(torch.autograd.grad(out, parameters.values(), cotangent, allow_unused=True) for out in (shared, repeated)),
    ):
        assert (ours is None) == (wanted is None), name
        assert ours is None or not wanted.any() or relative_error(ours, wanted) < 1e-4, name


@pytest.mark.slow
def test_the_loss_has_the_same_mean():
    prior, text = make_prior(cond_drop_prob=0.0), make_text(4, 32)
    image = torch.randn(4, 32)
    torch.manual_seed(0)
    with torch.no_grad():
        one = torch.stack([prior(**text, image_embed=image) for _ in range(400)])
        eight = torch.stack([prior(**text, image_embed=image, draws=8) for _ in range(50)])
    spread = one.std() / 20
    assert (one.mean() - eight.mean()).abs() < 4 * spread
    assert eight.std() < one.std() * 0.6


def test_text_is_dropped_per_pair_and_the_image_per_draw():
    prior, text = make_prior(), make_text(6, 32)
    x, times = torch.randn(1, 32).expand(48, -1), torch.full((48,), 3)
    torch.manual_seed(0)
    with torch.no_grad():
        whole = prior.net(x, times, **text)
        dropped = prior.net(x, times, **text, text_cond_drop_prob=0.5)
        torch.manual_seed(0)
        images = prior.net(x, times, **text, image_cond_drop_prob=0.5)
    changed = (dropped - whole).abs().amax(dim=1).view(6, 8) > 1e-6
    assert (changed.all(1) | ~changed.any(1)).all() and changed.any() and not changed.all()
    changed = (images - whole).abs().amax(dim=1).view(6, 8) > 1e-6
    assert (changed.any(1) & ~changed.all(1)).any()


def test_dropout_reaches_the_draws():
    prior, text = make_prior(dict(attn_dropout=0.5)).train(), make_text(2, 32)
    x, times = torch.randn(1, 32).expand(8, -1), torch.full((8,), 3)
    with torch.no_grad():
        out = prior.net(x, times, **text).view(2, 4, 32)
    assert (out[:, 0] - out[:, 1]).abs().max() > 1e-4, "the draws of a prompt have masks of their own"


def test_a_foreign_network_gets_the_text_repeated():
    class Net(nn.Module):
        dim, self_cond, max_text_len = 8, False, 4

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.learned_query = self.weight

        def forward(self, x, times, *, text_embed, self_cond=None, **_):
            assert x.shape == text_embed.shape
            return x * self.weight

        forward_with_cond_scale = forward

    prior = DiffusionPrior(Net(), image_embed_dim=8, timesteps=20, condition_on_text_encodings=False)
    assert prior(text_embed=torch.randn(3, 8), image_embed=torch.randn(3, 8), draws=4).isfinite()


def test_bad_draws():
    prior, text = make_prior(), make_text(2, 32)
    with pytest.raises(ValueError, match="draws=0; it must be at least 1"):
        prior(**text, image_embed=torch.randn(2, 32), draws=0)
    with pytest.raises(ValueError, match="image_embed has 3 rows; they must be a multiple of the 2 of text_embed"):
        prior.net(torch.randn(3, 32), torch.zeros(3).long(), **text)


class Drawing(Foreign):
    """A network that draws random numbers itself, as one with active dropout does."""

    def forward_with_cond_scale(self, image_embed, *args, **kwargs):
        return super().forward_with_cond_scale(image_embed * torch.rand(len(image_embed), 1), *args, **kwargs)


@pytest.mark.parametrize("timesteps", [20, 7])
def test_a_step_draws_its_noise_behind_what_the_network_draws(peer, timesteps):
    text = make_text(3, 32)
    ours, theirs = make_prior(), make_prior(module=peer)
    theirs.load_state_dict(ours.state_dict())
    for prior in (ours, theirs):
        prior.net = Drawing(prior.net)
    assert relative_error(*(sample(prior, text, timesteps=timesteps) for prior in (ours, theirs))) < 1e-4
