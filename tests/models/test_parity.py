"""Same constructors, same state dicts, same seeds: the same numbers as dalle2-pytorch 1.15.6."""

import random

import pytest
import torch

import fastprior
from fastprior.models.dalle2.layers import Attention, FeedForward, LayerNorm, RelPosBias, RotaryEmbedding, l2norm
from helpers.pairwise import pairwise
from helpers.priors import make_prior, make_text, relative_error, sample

FORWARD_TOLERANCE = 1e-5  # of the output's scale
RUN_TOLERANCE = 1e-4


def test_comparison_rejects_wrong_results():
    right = torch.randn(3, 4)
    assert relative_error(right, right) == 0
    for wrong in (torch.zeros(3, 4), -right, right * float("nan"), right[:2], right * 1.001):
        assert relative_error(wrong, right) > RUN_TOLERANCE


def random_config(seed: int) -> tuple[dict, dict]:
    """Constructor arguments of a network and of a prior, over everything that can be set."""
    pick = random.Random(seed).choice
    net = dict(
        dim=pick([16, 32, 48]), depth=pick([1, 2, 3]), dim_head=pick([8, 16, 52]), heads=pick([1, 3, 4]),
        ff_mult=pick([2, 4]), max_text_len=pick([1, 5, 9]), num_timesteps=pick([None, 30]),
        num_time_embeds=pick([1, 2]), num_image_embeds=pick([1, 3]), num_text_embeds=pick([1, 2]),
        self_cond=pick([False, False, True]), normformer=pick([False, True]), norm_in=pick([False, True]),
        norm_out=pick([True, True, False]), final_proj=pick([True, True, False]), rotary_emb=pick([True, True, False]),
    )  # fmt: skip
    prior = dict(
        timesteps=30, loss_type=pick(["l2", "l1", "huber"]), condition_on_text_encodings=pick([True, True, False]),
        beta_schedule=pick(["cosine", "linear", "quadratic", "jsd", "sigmoid"]),
        predict_x_start=pick([True, True, False]), predict_v=pick([False, False, True]),
        sampling_clamp_l2norm=pick([False, True]), sampling_final_clamp_l2norm=pick([False, True]),
        training_clamp_l2norm=pick([False, True]), init_image_embed_l2norm=pick([False, True]),
        image_embed_scale=pick([None, 1.0, 7.5]), text_cond_drop_prob=pick([0.1, 0.5]),
        image_cond_drop_prob=pick([0.3, 1.0]),
    )  # fmt: skip
    if prior["beta_schedule"] == "jsd":  # ends at alphas_cumprod = 0, where x0 of a noise prediction is 0 / 0
        prior["predict_x_start"] = True
    return net, prior


SEEDS = pytest.mark.parametrize("seed", range(24))


def pair(peer, seed: int):
    """The same prior in the peer and here: built from the same seed, without copying weights."""
    net, prior = random_config(seed)
    ours, theirs = make_prior(net, seed=seed, **prior), make_prior(net, seed=seed, module=peer, **prior)
    text = make_text(4, net["dim"], length=random.Random(seed).choice([3, 5, 11]), seed=seed)
    if not prior["condition_on_text_encodings"]:
        del text["text_encodings"]
    return ours, theirs, text


@SEEDS
def test_state_dicts_are_exchanged_and_initial_weights_agree(peer, seed):
    ours, theirs, _ = pair(peer, seed)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    other, _, _ = pair(peer, seed + 100)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    if other.net.dim == ours.net.dim and list(other.state_dict()) == list(ours.state_dict()):
        assert not torch.equal(other.net.learned_query, ours.net.learned_query)


@SEEDS
@pytest.mark.parametrize("drop", [0.0, 0.4, 1.0])
def test_forward(peer, seed, drop):
    ours, theirs, text = pair(peer, seed)
    dim = ours.net.dim
    x, t = torch.randn(4, dim), torch.tensor([0, 3, 17, 29])
    kwargs = dict(text_cond_drop_prob=drop, image_cond_drop_prob=drop / 2, **text)
    if ours.net.self_cond and drop:
        kwargs["self_cond"] = torch.randn(4, dim)
    results = []
    for net in (ours.net, theirs.net):
        torch.manual_seed(5)
        results.append(net(x, t, **kwargs))
    assert relative_error(*results) < FORWARD_TOLERANCE
    guided = [net.forward_with_cond_scale(x, t, cond_scale=2.5, **text) for net in (ours.net, theirs.net)]
    assert relative_error(*guided) < FORWARD_TOLERANCE


@SEEDS
def test_loss_and_gradients(peer, seed):
    ours, theirs, text = pair(peer, seed)
    image = l2norm(torch.randn(4, ours.net.dim))
    kept = image.clone()
    losses = []
    for prior, embed in ((ours, image), (theirs, image.clone())):
        torch.manual_seed(6)
        random.seed(6)
        losses.append(prior(image_embed=embed, **text))
        losses[-1].backward()
    assert torch.equal(image, kept), "the caller's embedding was modified"
    assert relative_error(*losses) < FORWARD_TOLERANCE
    largest = max(p.grad.abs().max() for p in theirs.parameters() if p.grad is not None)
    for (name, mine), other in zip(ours.net.named_parameters(), theirs.net.parameters()):
        if not other.requires_grad:
            continue
        given = torch.zeros_like(mine) if mine.grad is None else mine.grad
        wanted = torch.zeros_like(other) if other.grad is None else other.grad
        # 1e-4 of this gradient's scale, and for gradients that are zero up to cancellation 1e-6 of the largest one
        assert (given - wanted).abs().max() < 1e-4 * wanted.abs().max() + 1e-6 * largest, name


@pytest.mark.parametrize(
    "seed, timesteps, cond_scale", pairwise(seed=range(24), timesteps=[None, 8, 29, 2], cond_scale=[1.0, 3.0])
)
def test_sampling(peer, seed, cond_scale, timesteps):
    ours, theirs, text = pair(peer, seed)
    kwargs = dict(cond_scale=cond_scale, timesteps=timesteps)
    plan = ours.sampling_plan(timesteps, cond_scale)
    assert plan.path == "cached", plan
    wanted = sample(theirs, text, **kwargs)
    # Predicting noise, x0 is a difference of large numbers, and the peer itself amplifies rounding to 1e-4 or more. So
    # besides that we grant 3 times what changing its weights by 1e-6 does to it.
    with torch.no_grad():
        for index, weight in enumerate(theirs.parameters()):
            draw = torch.Generator().manual_seed(index)
            weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=draw))
    sensitivity = relative_error(sample(theirs, text, **kwargs), wanted)
    tolerance = max(RUN_TOLERANCE, 3 * sensitivity)
    if tolerance > 0.05:
        pytest.skip(f"the peer is chaotic here: a change of 1e-6 moves it by {sensitivity:.1e}")
    assert relative_error(sample(ours, text, **kwargs), wanted) < tolerance


@SEEDS
@pytest.mark.parametrize("step", [29, 5, 0])
def test_one_step(peer, seed, step):
    """Strict where whole runs cannot be: p_sample and p_mean_variance at one time."""
    ours, theirs, text = pair(peer, seed)
    x, t = torch.randn(4, ours.net.dim), torch.full((4,), step)
    for cond_scale in (1.0, 3.0):
        results = []
        for prior in (ours, theirs):
            torch.manual_seed(8)
            sampled, x_start = prior.p_sample(x, t, text_cond=text, cond_scale=cond_scale)
            mean, variance, log_variance, _ = prior.p_mean_variance(x, t, text, cond_scale=cond_scale)
            results.append((sampled, mean, x_start, log_variance.exp() + variance))
        for mine, other in zip(*results):
            # v and noise at the noisiest times multiply the network's error by 1/sqrt(alphas_cumprod)
            gain = max(1.0, ours.noise_scheduler.sqrt_recip_alphas_cumprod[step].item())
            assert relative_error(mine, other) < FORWARD_TOLERANCE * min(gain, 100)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_eta(peer, eta):
    results = []
    for module in (fastprior, peer):
        prior, text = make_prior(module=module, timesteps=50), make_text(3, 32)
        torch.manual_seed(1)
        results.append(prior.p_sample_loop_ddim((3, 32), text, timesteps=12, eta=eta, cond_scale=2.0))
    assert relative_error(*results) < RUN_TOLERANCE


@pytest.mark.slow
def test_full_size_forward_and_64_steps(peer):
    """D2-small: dim 768, depth 12, heads 12, 77 text tokens."""
    net = dict(dim=768, depth=12, dim_head=64, heads=12, max_text_len=77, normformer=True, num_timesteps=1000)
    ours, theirs = (make_prior(net, module=module, timesteps=1000) for module in (fastprior, peer))
    text = make_text(1, 768, length=77)
    x, t = torch.randn(1, 768), torch.tensor([500])
    assert relative_error(ours.net(x, t, **text), theirs.net(x, t, **text)) < FORWARD_TOLERANCE
    run = dict(timesteps=64, cond_scale=1.0)
    assert relative_error(sample(ours, text, **run), sample(theirs, text, **run)) < RUN_TOLERANCE


def test_text_encodings_of_any_length_or_none(peer):
    ours, theirs = make_prior(), make_prior(module=peer)
    x, t = torch.randn(3, 32), torch.tensor([1, 2, 3])
    for length in (0, 1, 7, 20):
        text = make_text(3, 32, length=length)
        assert relative_error(ours.net(x, t, **text), theirs.net(x, t, **text)) < FORWARD_TOLERANCE
    embed = make_text(3, 32)["text_embed"]
    assert relative_error(ours.net(x, t, text_embed=embed), theirs.net(x, t, text_embed=embed)) < FORWARD_TOLERANCE


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cosine_sim", [True, False])
@pytest.mark.parametrize("rotary", ["none", "ours", "foreign"])
def test_attention_block(peer, causal, masked, cosine_sim, rotary):
    from dalle2_pytorch.dalle2_pytorch import Attention as PeerAttention
    from dalle2_pytorch.dalle2_pytorch import RelPosBias as PeerBias
    from dalle2_pytorch.dalle2_pytorch import RotaryEmbedding as PeerRotary

    seq, kwargs = 40, dict(dim=24, dim_head=20, heads=3, causal=causal, cosine_sim=cosine_sim)
    embeddings = {"none": (None, None), "ours": (RotaryEmbedding(16), PeerRotary(16)), "foreign": (PeerRotary(16),) * 2}
    ours, theirs = (
        cls(**kwargs, rotary_emb=emb) for cls, emb in zip((Attention, PeerAttention), embeddings[rotary])
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    bias, peer_bias = RelPosBias(heads=3), PeerBias(heads=3)
    bias.load_state_dict(peer_bias.state_dict())
    assert torch.equal(bias(seq, seq + 1), peer_bias(seq, seq + 1, device="cpu"))
    x = torch.randn(2, seq, 24)
    mask = torch.rand(2, seq) > 0.4 if masked else None
    cotangent = torch.randn(2, seq, 24)
    results = []
    for attn, table in ((ours, bias), (theirs, peer_bias)):
        given = x.clone().requires_grad_()
        out = attn(given, mask=mask, attn_bias=table(seq, seq + 1, device="cpu"))
        inputs = [given, table.relative_attention_bias.weight, attn.null_kv]
        results.append((out, *torch.autograd.grad(out, inputs, cotangent)))
    for mine, other in zip(*results):
        assert relative_error(mine, other) < 5e-5


@pytest.mark.parametrize("norm", [False, True])
def test_feed_forward_and_norm_blocks(peer, norm):
    from dalle2_pytorch.dalle2_pytorch import FeedForward as PeerFeedForward
    from dalle2_pytorch.dalle2_pytorch import LayerNorm as PeerNorm

    ours, theirs = (cls(24, mult=3, post_activation_norm=norm) for cls in (FeedForward, PeerFeedForward))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 24)
    assert relative_error(ours(x), theirs(x)) < FORWARD_TOLERANCE
    assert relative_error(LayerNorm(24, stable=norm)(x), PeerNorm(24, stable=norm)(x)) < FORWARD_TOLERANCE
    half = x.half()  # fp32 module, 16-bit input: what autocast does, with the larger eps
    assert relative_error(LayerNorm(24)(half * 0.01), PeerNorm(24)(half * 0.01)) < 2e-3
    assert relative_error(LayerNorm(24)(half * 0.01), LayerNorm(24)(x * 0.01)) > 0.1


def test_dropout_in_training_draws_the_same_masks(peer):
    ours, theirs = (make_prior(dict(attn_dropout=0.3, ff_dropout=0.2), module=m) for m in (fastprior, peer))
    text, image = make_text(4, 32), l2norm(torch.randn(4, 32))
    losses = []
    for prior in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        losses.append(prior(image_embed=image.clone(), **text).item())
    assert losses[0] != make_prior().train()(image_embed=image, **text).item()
    # the last layer computes only the query here, so its masks differ; the loss is another draw of the same thing
    assert abs(losses[0] - losses[1]) < 0.2 * losses[1]


def test_noise_schedule_methods(peer):
    from dalle2_pytorch.dalle2_pytorch import NoiseScheduler as PeerSchedule

    for name in ("cosine", "linear", "quadratic", "jsd", "sigmoid"):
        kwargs = dict(beta_schedule=name, timesteps=40, loss_type="l2", p2_loss_weight_gamma=0.5)
        ours, theirs = fastprior.NoiseScheduler(**kwargs), PeerSchedule(**kwargs)
        for key, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value), (name, key)
        x, other, t, to = torch.randn(3, 5, 8), torch.randn(3, 5, 8), torch.tensor([0, 7, 38]), torch.tensor([1, 3, 30])
        for method, args in {
            "q_sample": (x, t, other), "calculate_v": (x, t, other), "q_sample_from_to": (x, t, to, other),
            "predict_start_from_v": (x, t, other), "predict_start_from_noise": (x, t, other),
            "predict_noise_from_start": (x, t, other), "p2_reweigh_loss": (x, t),
        }.items():  # fmt: skip
            assert relative_error(getattr(ours, method)(*args), getattr(theirs, method)(*args)) < 1e-6, (name, method)
        for mine, wanted in zip(ours.q_posterior(x, other, t), theirs.q_posterior(x, other, t)):
            assert relative_error(mine, wanted) < 1e-6
