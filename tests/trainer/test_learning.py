"""What is learned is right: against a distribution that is known, and step by step against the peer's trainer."""

import pytest
import torch
import torch.nn.functional as F

import fastprior
from fastprior.demos.synthetic import SyntheticPairs, mean_length
from helpers.priors import make_prior, relative_error

pytest.importorskip("accelerate")
pytest.importorskip("scipy")
from accelerate.state import AcceleratorState

from fastprior.trainer import DiffusionPriorTrainer

TEXTS, SAMPLES = 1024, 4


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# the known distribution


@pytest.mark.parametrize("latent, concentration", [(2, 0.5), (8, 2.75), (24, 9.0), (64, 3.0), (64, 60.0)])
def test_closed_form(latent, concentration):
    draws = 40_000
    x = torch.randn(draws, latent, dtype=torch.float64, generator=generator())
    x[:, 0] += concentration
    along = F.normalize(x, dim=-1)[:, 0]
    assert (along.mean() - mean_length(latent, concentration)).abs() < 4 * along.std() / draws**0.5


@pytest.mark.parametrize("sizes", [(32, 8, 3), (9, 9, 1)])
def test_pairs_follow_it(sizes):
    pairs = SyntheticPairs(*sizes)
    batch = pairs.batch(20_000, generator())
    text, image = batch["text_embed"], batch["image_embed"]
    assert batch["text_encodings"].shape == (20_000, sizes[2], sizes[0])
    for embeds in (text, image):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(20_000))
    # uniform in the subspace, and images around the mean that is claimed
    spread = torch.linalg.eigvalsh(text.T @ text / len(text)).flip(0)
    assert spread[: pairs.latent].sub(1 / pairs.latent).abs().max() < 0.01
    assert spread[pairs.latent :].abs().sum() < 1e-5 and text.mean(0).norm() < 0.02
    one = text[:1].expand(20_000, -1)
    images = pairs.images(one, generator(1))
    assert (images.mean(0) - pairs.mean_images(one)[0]).norm() < 4 / 20_000**0.5
    assert torch.equal(pairs.batch(5, generator(3))["image_embed"], pairs.batch(5, generator(3))["image_embed"])


def test_measure_knows_the_bayes_optimum():
    """Of the true distribution, what collapses onto its mean, and what has another caption's image."""
    pairs = SyntheticPairs()
    text = pairs.batch(4000, generator())["text_embed"]
    true = pairs.images(text.repeat_interleave(3, 0), generator(1))
    best, scale = pairs.best_similarity, torch.rand(len(true), 1, generator=generator(2)) + 0.5
    for name, value in pairs.measure(true * scale, text).items():
        assert value == pytest.approx(best, rel=0.02), name
    fresh = pairs.images(text, generator(4))  # the same with images drawn, not their mean
    assert (true.view(4000, 3, -1)[:, 0] * fresh).sum(-1).mean() == pytest.approx(best, rel=0.04)
    collapsed = pairs.measure(pairs.mean_images(text).repeat_interleave(3, 0), text)
    wanted = {"similarity": best**0.5, "self-similarity": 1.0, "score": 2 * best**0.5 - 1}
    assert collapsed == pytest.approx(wanted, rel=1e-5) and collapsed["score"] < 0.85 * best
    shifted = pairs.measure(true.roll(3, 0), text)
    assert shifted["similarity"] == pytest.approx(0, abs=0.03) and shifted["self-similarity"] > 0.9 * best


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(latent=1), "latent=1; it must be at least 2 and at most dim, 32"),
        (dict(latent=33), "latent=33; it must be at least 2 and at most dim, 32"),
        (dict(length=0), "length=0; it must be at least 1"),
        (dict(concentration=0), "concentration=0; it must be greater than 0"),
    ],
)
def test_bad_pairs(options, error):
    with pytest.raises(ValueError, match=error):
        SyntheticPairs(**options)


@pytest.mark.parametrize("shape", [(4, 32), (9, 32), (8, 16), (8,)])
def test_bad_samples(shape):
    pairs = SyntheticPairs()
    with pytest.raises(ValueError, match=r"sampled has shape \(.*\); it must be \(n \* 4, 32\) with n of at least 2"):
        pairs.measure(torch.zeros(shape), pairs.batch(4)["text_embed"])


# learning it


@pytest.mark.slow
def test_reaches_the_bayes_optimum():
    """On captions that it never saw, and without collapsing onto the mean, where self-similarity would be 2 A²."""
    pairs, steps = SyntheticPairs(length=4), 500
    torch.manual_seed(0)
    net = fastprior.DiffusionPriorNetwork(dim=pairs.dim, depth=2, dim_head=32, heads=2, max_text_len=pairs.length)
    prior = fastprior.DiffusionPrior(net, image_embed_dim=pairs.dim, timesteps=1000)
    trainer = DiffusionPriorTrainer(
        prior, lr=2e-2, warmup_steps=50, cosine_decay_max_steps=steps, max_grad_norm=1.0, draws=4,
        ema_beta=0.98, ema_update_after_step=0, ema_update_every=1, accelerator_cpu=True,
    )  # fmt: skip
    for _ in range(steps):
        trainer(**pairs.batch(128))
        trainer.update()
    text = pairs.batch(TEXTS, generator(5))
    del text["image_embed"]
    prior = trainer.sampling_prior
    assert prior.sampling_plan(32, solver="dpm++").path == "cached"
    repeated = {name: t.repeat_interleave(SAMPLES, 0) for name, t in text.items()}
    sampled = prior.sample(**repeated, num_samples_per_batch=1, timesteps=32, solver="dpm++", progress=False)
    share = {name: value / pairs.best_similarity for name, value in pairs.measure(sampled, text["text_embed"]).items()}
    assert 0.98 < share["score"] < 1.02, share
    assert 0.98 < share["similarity"] < 1.06 and 0.95 < share["self-similarity"] < 1.1, share


# the peer's trainer


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(), dict(wd=0.1, max_grad_norm=0.1, warmup_steps=20)], ids=["default", "all"])
def test_loss_curve_is_the_peers(peer, options):
    """200 steps from the same weights, on the same batches, with the same times and noises; dropout off."""
    from dalle2_pytorch.trainer import DiffusionPriorTrainer as Peers

    steps, pairs, curves, weights = 200, SyntheticPairs(16, 8, 4), [], []
    for module, cls in ((peer, Peers), (fastprior, DiffusionPriorTrainer)):
        net = dict(dim=16, dim_head=8, heads=2, max_text_len=4)
        prior = make_prior(net, module=module, timesteps=100, cond_drop_prob=0.0)
        trainer = cls(prior, accelerator_cpu=True, **options).train()
        torch.manual_seed(1)
        losses = []
        for step in range(steps):
            losses.append(trainer(**pairs.batch(32, generator(step))))
            trainer.update()
        curves.append(torch.tensor(losses))
        weights.append({name: p.detach() for name, p in prior.named_parameters()})
    theirs, ours = curves
    assert theirs[-20:].mean() < 0.8 * theirs[:20].mean()
    assert ((ours - theirs).abs() <= 1e-3 * theirs).all()  # at ten times the learning rate rounding grows to 0.1
    assert weights[0].keys() == weights[1].keys()
    for name, wanted in weights[0].items():
        assert relative_error(weights[1][name], wanted) < 1e-3, name
