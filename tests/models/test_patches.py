"""Patches of PyTorch, of diffusers and of this package are found, and do what they do to the peers."""

import contextlib
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as all_modules
from torch.overrides import TorchFunctionMode

import fastprior
from fastprior import PriorPipeline, PriorSampler
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.models import patches, snapshot
from fastprior.models.dalle2 import layers, transformer
from fastprior.pipelines.text_encoding import TextEncoding
from helpers.priors import make_prior, make_text, relative_error, sample
from helpers.pt_cases import MAKES, make_inputs, make_stock, within_diffusers

TOLERANCE = 2e-5


def louder(original):
    return lambda *args, **kwargs: original(*args, **kwargs) * 0.7


@contextlib.contextmanager
def patched(*places, by=louder):
    """Owners and names of functions."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in places:
            patch.setattr(owner, name, by(getattr(owner, name)))
        yield


class Following(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out * 0.7 if function is F.linear else out


def of_linears(original):
    return lambda module, *args, **kwargs: original(module, *args, **kwargs) * (0.7 if type(module) is nn.Linear else 1)


@contextlib.contextmanager
def hooked(register=all_modules.register_module_forward_hook):
    handle = register(lambda module, given, out: out * 0.7 if type(module).__name__ == "Attention" else None)
    try:
        yield
    finally:
        handle.remove()


FUNCTIONS = {
    "F.linear": ((F, "linear"), "torch.nn.functional.linear is patched"),
    "F.silu": ((F, "silu"), "torch.nn.functional.silu is patched"),
    "F.embedding": ((F, "embedding"), "torch.nn.functional.embedding is patched"),
    "Linear": ((nn.Linear, "forward"), "Linear.forward is patched"),
    "Embedding": ((nn.Embedding, "forward"), "Embedding.forward is patched"),
    "SiLU": ((nn.SiLU, "forward"), "SiLU.forward is patched"),
    "Dropout": ((nn.Dropout, "forward"), "Dropout.forward is patched"),
}
CLASSES = "LayerNorm SwiGLU MLP RelPosBias Attention CausalTransformer DiffusionPriorNetwork".split()


def of_peer(name):
    from dalle2_pytorch import dalle2_pytorch

    return getattr(dalle2_pytorch, name)


def of_ours(name):
    homes = layers, transformer, fastprior
    return next(getattr(home, name) for home in homes if hasattr(home, name))


def case(name):
    """A context in which something is patched, and a part of what the plan says of it."""
    if name in FUNCTIONS:
        place, reason = FUNCTIONS[name]
        return lambda: patched(place), reason
    if name == "calls":
        return lambda: patched((nn.Module, "__call__"), by=of_linears), "Module.__call__ is patched"
    if name == "global hook":
        return hooked, "all modules have a forward hook"
    if name == "function mode":
        return Following, "a Following follows functions of torch"
    reason = f"{name}.forward is {'overridden' if name.endswith('Network') else 'patched'}"
    return lambda: patched((of_ours(name), "forward"), (of_peer(name), "forward")), reason


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES, "calls", "global hook", "function mode"])
def test_of_dalle2(peer, name):
    around, reason = case(name)
    ours, theirs = (
        make_prior(dict(num_timesteps=20 if "mbedding" in name else None), module=m) for m in (fastprior, peer)
    )
    text, x, times, run = (
        make_text(3, 32),
        torch.randn(3, 32),
        torch.tensor([3, 7, 11]),
        dict(timesteps=5, cond_scale=3.0),
    )
    before = sample(ours, text, **run)
    assert ours.sampling_plan(5).path == "cached" and not ours.sampling_plan(5).patched
    with around():
        assert reason in str(ours.sampling_plan(5))
        got, wanted = sample(ours, text, **run), sample(theirs, text, **run)
        with torch.no_grad():
            forwards = [prior.net(x, times, **text) for prior in (ours, theirs)]
    assert relative_error(got, wanted) < TOLERANCE and relative_error(*forwards) < TOLERANCE
    assert relative_error(before, wanted) > 1e-4, "the patch must matter"
    assert torch.equal(sample(ours, text, **run), before), "as before without it"


METHODS = {
    "p_mean_variance": (lambda prior: type(prior), {}),
    "p_sample_loop_ddim": (lambda prior: type(prior), dict(timesteps=5)),
    "p_sample_loop_ddpm": (lambda prior: type(prior), {}),
    "q_posterior": (lambda prior: type(prior.noise_scheduler), {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_are_patched_on_their_class_are_called(name):
    prior, text, (owner, run), calls = make_prior(), make_text(2, 32), METHODS[name], []

    def counting(original):
        return lambda *args, **kwargs: calls.append(name) or original(*args, **kwargs)

    with patched((owner(prior), name), by=counting):
        sample(prior, text, **run)
    assert len(calls) == (1 if "loop" in name else 20)


def test_what_a_prior_does_not_use_costs_it_nothing():
    """Other code patches attention for its image models."""
    prior = make_prior()
    with patched((F, "scaled_dot_product_attention")):
        plan = prior.sampling_plan(5)
        assert plan.path == "cached" and not plan.patched
        assert prior.net.causal_transformer._is_plain()
    with torch.device("cpu"):  # a mode, too
        assert prior.sampling_plan(5).path == "cached"


@pytest.mark.parametrize("name", ["F.linear", "LayerNorm"])
def test_a_sampler_follows(peer, name):
    (around, _), prior, text = case(name), make_prior(), make_text(2, 32)
    sampler = PriorSampler(prior, batch_sizes=(2,), timesteps=5, compile=False)

    def serve():
        return sampler(**text, cond_scale=2.0, generator=torch.Generator().manual_seed(1))

    before, theirs = serve(), make_prior(module=peer)
    with around():
        assert relative_error(serve(), sample(theirs, text, timesteps=5, cond_scale=2.0)) < TOLERANCE
    assert torch.equal(serve(), before)


# diffusers' family


def prior_transformer_places(name):
    from diffusers import PriorTransformer
    from diffusers.models import activations, attention, attention_processor

    from fastprior.models.prior_transformer import blocks

    stock = dict(
        Attention=attention.Attention, FeedForward=attention.FeedForward, GELU=activations.GELU,
        Block=attention.BasicTransformerBlock,
    )  # fmt: skip
    if name in stock:
        return (stock[name], "forward"), (getattr(blocks, name), "forward")
    if name == "processor":
        return [(attention_processor.AttnProcessor2_0, "__call__")]
    if name == "PriorTransformer":
        return [(PriorTransformer, "forward")]
    return [((F, name), (nn.LayerNorm, "forward"))[name == "LayerNorm"]]


class Halved:
    """A module's result, or what a model gives, by half."""

    def __init__(self, original):
        self.original = original

    def __get__(self, instance, owner=None):
        return self if instance is None else lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        out = self.original(*args, **kwargs)
        return (out[0] * 0.7,) if isinstance(out, tuple) else out * 0.7 if torch.is_tensor(out) else out


PLACES = "linear scaled_dot_product_attention layer_norm gelu LayerNorm Attention FeedForward GELU Block".split()


@pytest.mark.parametrize("make, name", [(make, name) for make in MAKES for name in PLACES] + [("within", "processor")])
def test_of_prior_transformers(make, name):
    pytest.importorskip("diffusers")
    stock = make_stock()
    ours, given = MAKES[make](stock), make_inputs(stock.config)

    def run(model):
        with torch.no_grad():
            return model(**given)[0]

    before = run(ours)
    with patched(*prior_transformer_places(name), by=Halved):
        got, wanted = run(ours), run(stock)
        assert "is patched" in str(fastprior.models.prior_transformer.prompt_memory.prefix_obstacles(ours, 3))
    assert relative_error(got, wanted) < TOLERANCE < relative_error(before, wanted)
    assert torch.equal(run(ours), before)


def test_a_patched_forward_of_diffusers_is_called():
    pytest.importorskip("diffusers")
    stock = make_stock()
    ours, given = within_diffusers(stock), make_inputs(stock.config) | dict(return_dict=False)
    with torch.no_grad():
        before = ours(**given)[0]
        with patched(*prior_transformer_places("PriorTransformer"), by=Halved):
            assert (
                relative_error(ours(**given)[0], stock(**given)[0])
                < TOLERANCE
                < relative_error(before, stock(**given)[0])
            )


@pytest.mark.parametrize("graphs", [False, True])
def test_pipelines_run_whole_and_say_so(graphs):
    """Also behind hooks, which they refused."""
    pytest.importorskip("diffusers")
    prior = MAKES["without"](make_stock())
    schedule = DiffusersSchedule("UnCLIPScheduler", prediction_type="sample")
    pipeline = PriorPipeline(prior, schedule)
    pipeline.graphs = graphs or None
    draw = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < torch.tensor([[7], [3]])

    def texts(count):
        embeds, encodings = (torch.randn(count, *shape, generator=draw) for shape in ((20,), (7, 20)))
        return TextEncoding(embeds, encodings, mask[:count])

    given = texts(2), texts(1)

    def run():
        options = dict(num_inference_steps=4, num_images_per_prompt=2, generator=torch.Generator().manual_seed(1))
        return pipeline(*given, zero_embed=torch.zeros(1, 20), **options).image_embeds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are no graphs on the CPU
        before = run()
    handle = prior.transformer_blocks[0].register_forward_hook(lambda module, given, out: out)
    with pytest.warns(UserWarning, match="every step of the prior runs all tokens, which is slow: a Block has a hook"):
        assert relative_error(run(), before) < TOLERANCE
    handle.remove()
    with patched((F, "scaled_dot_product_attention"), by=louder):
        with pytest.warns(UserWarning, match="functional.scaled_dot_product_attention is patched"):
            assert relative_error(run(), before) > 1e-3
    assert torch.equal(run(), before)


# what is remembered


def swapped(linear):
    linear.__class__ = type(
        "Swapped", (nn.Linear,), dict(forward=lambda self, x: nn.Linear.forward(self, x) * 3.0 - 1.0)
    )


def test_a_class_that_is_swapped_is_seen(peer):
    ours, theirs, text, run = make_prior(), make_prior(module=peer), make_text(3, 32), dict(timesteps=5, cond_scale=3.0)
    sampler = PriorSampler(ours, batch_sizes=(3,), timesteps=5, compile=False)
    for _ in range(2):
        wanted = sample(theirs, text, **run)
        assert relative_error(sample(ours, text, **run), wanted) < TOLERANCE
        got = sampler(**text, cond_scale=3.0, generator=torch.Generator().manual_seed(1))
        assert relative_error(got, wanted) < TOLERANCE
        for prior in (ours, theirs):
            swapped(prior.net.causal_transformer.layers[0][0].to_kv)
            swapped(prior.net.causal_transformer.layers[1][0].to_q)


@pytest.mark.parametrize("make", MAKES)
def test_a_class_that_is_swapped_is_seen_in_a_prior_transformer(make):
    pytest.importorskip("diffusers")
    stock = make_stock()
    ours, given = MAKES[make](stock), make_inputs(stock.config)
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(ours(**given)[0], stock(**given)[0]) < TOLERANCE
            for model in (ours, stock):
                swapped(model.transformer_blocks[0].attn1.to_k)


class Adding(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.register_buffer("more", torch.zeros(()))

    def forward(self, x):
        return self.base(x) + self.more


@pytest.mark.parametrize("edit", [lambda t: t.add_(1), lambda t: t.data.add_(1)], ids=["counted", "data"])
def test_buffers_are_watched(edit):
    net = make_prior().net
    attn = net.causal_transformer.layers[0][0]
    attn.to_q = Adding(attn.to_q)
    state = snapshot.state(net)
    assert snapshot.state(net) is state
    edit(attn.to_q.more)
    assert snapshot.state(net) is not state


def test_a_snapshot_keeps_no_model_alive():
    import gc
    import weakref

    net = make_prior().net
    state, gone = snapshot.Snapshot(net), weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None and not state.same_modules()


def test_nothing_is_patched_here():
    """What torch and diffusers define is found in their own files: else everybody would take the slow path."""
    assert patches.found() == patches.NOTHING
    assert all(function is not None for _, _, _, function in patches._WATCHED)


BEFORE = """
import torch
import torch.nn.functional as F
torch.nn.Linear.forward, original = lambda self, x: original(self, x) * 0.5, torch.nn.Linear.forward
F.linear, linear = lambda *args: linear(*args) * 0.5, F.linear
import fastprior
net = fastprior.DiffusionPriorNetwork(dim=8, depth=1, dim_head=8, heads=1, max_text_len=2)
print(fastprior.DiffusionPrior(net, image_embed_dim=8, timesteps=5).sampling_plan(3))
"""


def test_only_a_functions_own_package_defines_it():
    for owner, name in ((nn.Linear, "forward"), (F, "linear"), (F, "silu"), (layers.Attention, "forward")):
        assert patches._is_of(owner, name, vars(owner)[name])
        assert not patches._is_of(owner, name, louder(vars(owner)[name]))


@pytest.mark.slow
def test_patches_from_before_the_import_are_found():
    said = subprocess.run([sys.executable, "-c", BEFORE], capture_output=True, text=True, check=True).stdout
    assert "functional.linear is patched" in said and "Linear.forward is patched" in said


@pytest.mark.parametrize(
    "name, options",
    [
        ("Attention", dict(dim=32, dim_head=16, heads=2)),
        ("FeedForward", dict(dim=32)),
        ("CausalTransformer", dict(dim=32, depth=2, dim_head=16, heads=2)),
    ],
    ids=["Attention", "FeedForward", "CausalTransformer"],
)
@torch.no_grad()
def test_blocks_without_their_network_see_patches(name, options):
    """Right after a call without the patch, and after it was undone."""
    pytest.importorskip("dalle2_pytorch")
    torch.manual_seed(0)
    peer, ours = of_peer(name)(**options).eval(), of_ours(name)(**options).eval()
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(2, 5, 32)
    plain = peer(x)
    for place in ((F, "linear"), (nn.Linear, "forward")):
        assert relative_error(ours(x), plain) < TOLERANCE
        with patched(place):
            expected, got = peer(x), ours(x)
        assert relative_error(expected, plain) > 0.01 and relative_error(got, expected) < TOLERANCE
    assert relative_error(ours(x), plain) < TOLERANCE
