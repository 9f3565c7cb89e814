"""What users put in the place of a module is called, wherever it stands, as it is in the peer."""

import copy
import importlib
import warnings

import pytest
import torch
from torch import nn

import fastprior
from fastprior import PriorSampler
from helpers.priors import make_prior, make_text, plain, relative_error, sample

TOLERANCE = 2e-5  # of scale: two orders of summation, amplified by a few steps
NET = dict(norm_in=True, normformer=True)


class Wrapped(nn.Module):
    """A module behind another, which has no weight of its own: a LoRA made by hand, 4 bits, GPTQ."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + self.base(x).sin()  # what no norm undoes


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x) + super().forward(x).sin()


class Sharded(torch.Tensor):
    """A weight whose products are others: what subclasses of 8 bits are."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return (out + out.sin()).as_subclass(torch.Tensor) if function is torch.nn.functional.linear else out


class Rotation:
    """The peer's rotation, by other angles."""

    def rotate_queries_or_keys(self, t):
        return torch.cat((t[..., 1:], t[..., :1]), dim=-1) * torch.arange(1, t.shape[-2] + 1)[:, None]


def linears(net):
    return [(owner, n, m) for owner in net.modules() for n, m in owner.named_children() if type(m) is nn.Linear]


def wrap(*places):
    def change(net):
        for place in places:
            owner, _, name = place.rpartition(".")
            setattr(net.get_submodule(owner), name, Wrapped(net.get_submodule(place)))

    return change


def every_linear(kind):
    def change(net):
        for owner, name, linear in linears(net):
            setattr(owner, name, kind(linear))

    return change


def as_subclass(net):
    for _, _, linear in linears(net)[3:7]:
        linear.__class__ = Subclass


def as_sharded(net):
    for _, _, linear in linears(net)[3:7]:
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Sharded), requires_grad=False)


def put(place, make):
    """Something else in a place of the transformer."""

    def change(net):
        owner, _, name = place.rpartition(".")
        torch.manual_seed(3)
        setattr(net.causal_transformer.get_submodule(owner), name, make())

    return change


def narrowed(ff):
    """As pruning leaves it."""
    kept = torch.arange(40)
    ff[1].weight = nn.Parameter(ff[1].weight[torch.cat((kept, 128 + kept))].detach())
    ff[3].g = nn.Parameter(ff[3].g[kept].detach())
    ff[5].weight = nn.Parameter(ff[5].weight[:, kept].detach())


def rotated(net):
    for attn, _ in net.causal_transformer.layers:
        del attn.rotary_emb
        attn.rotary_emb = Rotation()


def replaced_forward(net):
    norm = net.causal_transformer.layers[1][0].to_out[1]
    norm.forward = lambda x, run=norm.forward: run(x) * 0.5


def scaled(net):
    net.causal_transformer.layers[1][0].scale = 3.0


def hooked(place, register="register_forward_hook"):
    def change(net):
        hook = (lambda m, given, out: out * 0.5) if register == "register_forward_hook" else lambda m, given: None
        getattr(net.get_submodule(place), register)(hook)

    return change


CHANGES = {
    "every linear": every_linear(Wrapped),
    "queries": wrap("causal_transformer.layers.0.0.to_q"),
    "keys": wrap("causal_transformer.layers.1.0.to_kv"),
    "linears of the feed-forward": wrap("causal_transformer.layers.0.1.1", "causal_transformer.layers.1.1.5"),
    "linear behind attention": wrap("causal_transformer.layers.0.0.to_out.0"),
    "all behind attention": wrap("causal_transformer.layers.0.0.to_out"),
    "norms": wrap("causal_transformer.layers.0.0.norm", "causal_transformer.layers.1.1.0", "causal_transformer.norm"),
    "first norm": wrap("causal_transformer.init_norm"),
    "inner norm": wrap("causal_transformer.layers.0.1.3"),
    "norm behind attention": wrap("causal_transformer.layers.0.0.to_out.1"),
    "activation": wrap("causal_transformer.layers.0.1.2"),
    "dropout": wrap("causal_transformer.layers.0.1.4"),
    "dropout of attention": wrap("causal_transformer.layers.0.0.dropout"),
    "last linear": wrap("causal_transformer.project_out"),
    "feed-forward": wrap("causal_transformer.layers.1.1"),
    "position bias": wrap("causal_transformer.rel_pos_bias.relative_attention_bias"),
    "embeddings": wrap("to_time_embeds.0", "to_image_embeds.0", "to_text_embeds.0"),
    "all of an embedding": wrap("to_time_embeds", "to_text_embeds"),
    "linear of the time": wrap("to_time_embeds.0.1.net.2"),
    "rotation": rotated,
    "no norm": put("layers.1.0.norm", nn.Identity),
    "queries with a bias": put("layers.1.0.to_q", lambda: nn.Linear(32, 64)),
    "a head with a bias": put("project_out", lambda: nn.Linear(32, 32)),
    "a narrow feed-forward": lambda net: narrowed(net.causal_transformer.layers[1][1]),
    "a subclass": as_subclass,
    "weights of a subclass": as_sharded,
    "a forward replaced": replaced_forward,
    "a scale": scaled,
    "hook on attention": hooked("causal_transformer.layers.0.0"),
    "hook on the transformer": hooked("causal_transformer"),
    "hook on a norm": hooked("causal_transformer.layers.0.0.to_out.1"),
    "hook on weights of attention": hooked("causal_transformer.layers.0.0.dropout"),
}


def changed(change, module, **net):
    prior = make_prior(NET | net, module=module)
    change(prior.net)
    return prior


@pytest.mark.parametrize("name", CHANGES)
def test_what_stands_there_is_called(peer, name):
    ours, theirs = (changed(CHANGES[name], module) for module in (fastprior, peer))
    text, x, times = make_text(3, 32), torch.randn(3, 32), torch.tensor([3, 7, 11])
    before = make_prior(NET).net(x, times, **text)
    wanted = theirs.net(x, times, **text)
    assert relative_error(ours.net(x, times, **text), wanted) < TOLERANCE
    assert relative_error(before, wanted) > 1e-4, "the change must matter"
    for scale in (1.0, 3.0):
        run = dict(timesteps=5, cond_scale=scale)
        assert relative_error(sample(ours, text, **run), sample(theirs, text, **run)) < TOLERANCE
    losses = []
    for prior in (ours, theirs):
        torch.manual_seed(5)
        losses.append(prior(image_embed=x.clone(), **text))
        losses[-1].backward()
    assert relative_error(*losses) < TOLERANCE
    grads = [p.net.learned_query.grad for p in (ours, theirs)]
    assert relative_error(*grads) < 10 * TOLERANCE
    rows = ours.net(x.repeat_interleave(2, dim=0), times.repeat_interleave(2), **text)
    assert relative_error(rows[::2], wanted) < TOLERANCE, "several rows of a prompt"


@pytest.mark.parametrize("name", ["every linear", "norms", "embeddings", "last linear"])
def test_in_16_bits_everything_is_given_its_weights_dtype(name):
    prior = changed(CHANGES[name], fastprior)
    text, run = make_text(3, 32), dict(timesteps=5, cond_scale=2.0)
    wanted = sample(prior, text, **run)
    prior.bfloat16()
    assert prior.sampling_plan(5).path == "cached"
    got = sample(prior, text, **run)
    assert torch.cosine_similarity(got, wanted).median() > 0.99
    assert torch.cosine_similarity(sample(plain(prior), text, **run), got).min() > 0.99


@pytest.mark.parametrize("name", ["every linear", "a subclass", "norms", "activation"])
def test_a_sampler_calls_it_too(name):
    prior, text = changed(CHANGES[name], fastprior), make_text(3, 32)
    sampler = PriorSampler(prior, batch_sizes=(4,), timesteps=5, compile=False)
    got = sampler(**text, cond_scale=2.0, generator=torch.Generator().manual_seed(1))
    assert relative_error(got, sample(prior, text, timesteps=5, cond_scale=2.0)) < TOLERANCE
    Wrapped.forward, before = lambda self, x: self.base(x), Wrapped.forward
    Subclass.forward, of_subclass = nn.Linear.forward, Subclass.forward
    try:
        again = sampler(**text, cond_scale=2.0, generator=torch.Generator().manual_seed(1))
        wanted = sample(make_prior(NET), text, timesteps=5, cond_scale=2.0)
    finally:
        Wrapped.forward, Subclass.forward = before, of_subclass
    assert relative_error(again, wanted) < TOLERANCE, "a class that was patched after the first call"


def quantised_dynamically(prior):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        from torch.ao.quantization import quantize_dynamic

        other = copy.deepcopy(prior)
        other.net = quantize_dynamic(other.net, {nn.Linear})
    return other


def test_linears_that_torch_quantises(peer):
    if not torch.backends.quantized.supported_engines[1:]:
        pytest.skip("torch was built without quantised kernels")
    ours, theirs = (make_prior(NET, module=module) for module in (fastprior, peer))
    text, run = make_text(3, 32), dict(timesteps=5, cond_scale=2.0)
    assert len(linears(ours.net)) == len(linears(theirs.net)) == 14
    exact = sample(ours, text, **run)
    ours, theirs = map(quantised_dynamically, (ours, theirs))
    assert not linears(ours.net), "all are matched, as the peer's are"
    got, wanted = sample(ours, text, **run), sample(theirs, text, **run)
    # rounded over all tokens that run together, so that results differ as those do from exact ones
    assert torch.cosine_similarity(got, wanted).min() > 0.95 and relative_error(got, exact) > 1e-4
    x, times = torch.randn(3, 32), torch.tensor([1, 2, 3])
    with torch.no_grad():
        assert relative_error(ours.net(x, times, **text), theirs.net(x, times, **text)) < 0.05
    sampler = PriorSampler(ours, batch_sizes=(4,), timesteps=5, compile=False)
    served = sampler(**text, cond_scale=2.0, generator=torch.Generator().manual_seed(1))
    assert torch.cosine_similarity(served, wanted).min() > 0.95


@pytest.mark.parametrize("kind", ["bitsandbytes.nn:Linear8bitLt", "bitsandbytes.nn:Linear4bit"])
def test_linears_of_bitsandbytes(peer, kind):
    home, _, name = kind.partition(":")
    pytest.importorskip("bitsandbytes")
    cls = getattr(importlib.import_module(home), name)

    def of_few_bits(linear):
        options = dict(has_fp16_weights=False) if "8bit" in name else dict(compute_dtype=torch.float32)
        other = cls(linear.in_features, linear.out_features, linear.bias is not None, **options)
        other.load_state_dict(linear.state_dict())
        return other.to("cpu")

    ours, theirs = (changed(every_linear(of_few_bits), m, dim=64, dim_head=64) for m in (fastprior, peer))
    text, run = make_text(3, 64), dict(timesteps=5, cond_scale=2.0)
    assert torch.cosine_similarity(sample(ours, text, **run), sample(theirs, text, **run)).min() > 0.99


def test_dropout_alone_in_training_mode(peer):
    """Monte Carlo dropout: all else stays in eval mode."""
    priors = [make_prior(dict(attn_dropout=0.9, ff_dropout=0.9), module=module) for module in (fastprior, peer)]
    text, runs = make_text(3, 32), []
    for prior in priors:
        for kind in ("dropout", "4"):
            for module in prior.net.causal_transformer.layers.modules():
                if isinstance(module._modules.get(kind), nn.Dropout):
                    module._modules[kind].train()
            runs.append([sample(prior, text, seed=seed, timesteps=5) for seed in (1, 1, 2)])
    exact = sample(make_prior(dict(attn_dropout=0.9, ff_dropout=0.9)), text, timesteps=5)
    for run in runs:
        assert torch.equal(run[0], run[1]) and relative_error(run[0], exact) > 0.05
    assert "dropout is active" in str(priors[0].sampling_plan(5))


def test_hooks_of_backward_are_called():
    prior, seen = make_prior(), []
    attn = prior.net.causal_transformer.layers[0][0]
    for module in (attn, attn.to_q, attn.norm):
        module.register_full_backward_hook(lambda module, *grads: seen.append(type(module)))
    prior(image_embed=torch.randn(3, 32), **make_text(3, 32)).backward()
    assert len(seen) == 3


def test_a_hook_sees_the_weights_of_attention():
    prior, seen = make_prior(), []
    prior.net.causal_transformer.layers[1][0].dropout.register_forward_hook(lambda m, given, out: seen.append(out))
    sample(prior, make_text(3, 32), timesteps=5)
    assert len(seen) == 4 and seen[0].shape == (3, 4, 11, 12), "heads, tokens and keys, at every step"
    assert torch.allclose(seen[0].sum(dim=-1), torch.ones(()))


def test_pickles_of_earlier_releases_find_their_linears():
    from fastprior.models.dalle2 import layers

    assert layers.Linear is nn.Linear
