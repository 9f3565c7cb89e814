"""Whole models with the Triton kernels on, against the same models on the reference."""

import contextlib
import copy
import random

import pytest
import torch

pytest.importorskip("triton")

from fastprior.kernels import ops
from fastprior.kernels.gpu import attend_project, launch, skinny_linear
from fastprior.models.dalle2.layers import Attention, Linear, RelPosBias, RotaryEmbedding
from fastprior.serving.prior_sampler import PriorSampler
from helpers.kernel_checks import DEVICE
from helpers.priors import make_prior, make_text, relative_error, sample


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one after the other."""
    for module in skinny_linear, attend_project:
        monkeypatch.setattr(module, "MULTIPROCESSORS", 4)


NETS = [
    dict(),
    dict(normformer=True, norm_in=True, rotary_emb=False, num_time_embeds=2),
    dict(self_cond=True, cosine_sim=False, final_proj=False, num_image_embeds=2),
    dict(norm_out=False, ff_mult=2, heads=1, dim_head=32, num_timesteps=20),
]


@contextlib.contextmanager
def counting(*names):
    """Which of these operations ran as kernels, in order."""
    ran, plain = [], launch.launch

    def note(kernel, *args, **kwargs):
        ran.extend(name or kernel.__name__ for name in names if name in kernel.__name__)
        return plain(kernel, *args, **kwargs)

    launch.launch = note
    try:
        yield ran
    finally:
        launch.launch = plain


def both(run):
    """What `run` gives on the reference and on the kernels."""
    with ops.using("reference"):
        wanted = run()
    with ops.using("triton"), counting("norm", "attention", "decode", "linear", "step") as ran:
        got = run()
    return got, wanted, ran


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    """Gradients of parts that are not used are zero, or None, on both sides."""
    if wanted is None or not wanted.abs().max() > 0:
        return got is None or not got.abs().max() > 0
    return relative_error(got.cpu(), wanted.cpu()) <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_loss_and_gradients(net):
    prior = make_prior(net).to(DEVICE)
    text = {name: t.to(DEVICE) for name, t in make_text(3, 32).items()}
    image = torch.randn(3, 32, device=DEVICE)

    def run():
        model = copy.deepcopy(prior).train()
        torch.manual_seed(3)
        random.seed(3)  # decides on self-conditioning
        loss = model(**text, image_embed=image)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    (loss, grads), (wanted_loss, wanted_grads), ran = both(run)
    assert {"norm", "attention"} <= set(ran)
    assert relative_error(loss, wanted_loss) <= 1e-5
    for name, wanted in wanted_grads.items():
        assert close(grads[name], wanted, 1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
def test_sampling(net, cond_scale):
    prior = make_prior(net).to(DEVICE)
    text = {name: t.to(DEVICE) for name, t in make_text(2, 32).items()}
    got, wanted, ran = both(lambda: sample(prior, text, rows=4, cond_scale=cond_scale, timesteps=4))
    assert set(ran) == {"norm", "attention", "decode", "linear", "step"}
    assert relative_error(got.cpu(), wanted.cpu()) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 8], ids="{}-rows".format)
def test_launches_of_a_step(rows, dtype):
    """Five a layer: norm and projections; attention; its output; sum, norm and first linear; norm and second linear."""
    depth = 3
    net = make_prior(dict(depth=depth, normformer=True)).net.to(DEVICE, dtype)
    text, times = make_text(rows, 32)["text_embed"].to(DEVICE), torch.arange(4, device=DEVICE)

    def run():
        with torch.no_grad():
            cond = net.prefill(text, None, times)
            with counting("") as ran:
                return net.step(text, times[1], cond), ran

    (got, ran), (wanted, _), _ = both(run)
    names = [name.strip("_").removesuffix("_fwd_kernel") for name in ran]
    own = "linear" if dtype == torch.float32 else "skinny_linear"  # of up to 16 tokens
    few = [own, "decode_attention", own, own, own]
    many = ["layer_norm", "linear", "decode_attention", "linear", *["layer_norm"] * 2, "linear", "layer_norm", "linear"]
    if rows * net.suffix_tokens <= 16:
        layers = few * depth
    else:  # norms of many rows are kernels of their own; in the last layer one token a row is left
        layers = [*many * (depth - 1), "layer_norm", "linear", *few[1:]]
    assert names == [*layers, "layer_norm", own]
    assert relative_error(got.cpu(), wanted.cpu()) <= (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_a_sampler_knows_its_launches(net):
    """Traced, not run, for as many rows as the batch size has; a branch of its own for guidance doubles them."""
    prior, text = make_prior(net).to(DEVICE), {name: t.to(DEVICE) for name, t in make_text(2, 32).items()}
    sampler = PriorSampler(prior, batch_sizes=(4,), timesteps=2, solver="dpm++", compile=False)
    with ops.using("triton"):
        with counting("") as ran:
            sampler(**text)
        stats = sampler.stats(bandwidth=1e12)
    last = [at for at, name in enumerate(ran) if "diffusion_step" in name]
    # PyTorch's: the time token, and tokens side by side; and what the second branch is made of
    by_pytorch = 6 if net.get("self_cond") else 2
    assert len(last) == 2 and last[-1] - last[-2] + by_pytorch == stats["launches"] == stats["run_launches"] / 2
    read = stats["weight_bytes"] + stats["prefix_bytes"] + stats["table_bytes"]
    assert stats["modelled_step_ms"] == pytest.approx(read / 1e9 + stats["launches"] * 1.7e-3)


@pytest.mark.slow
def test_a_linear_that_was_replaced_is_called():
    """An adapter, or a hook, stands in the way of a kernel that reads the weights alone."""

    class Adapted(Linear):
        def forward(self, x):
            return super().forward(x) * 2

    prior = make_prior().to(DEVICE)
    text = {name: t.to(DEVICE) for name, t in make_text(2, 32).items()}
    attn, ff = prior.net.causal_transformer.layers[0]
    adapted = Adapted(*reversed(attn.to_q.weight.shape), bias=False).to(DEVICE)
    adapted.load_state_dict(attn.to_q.state_dict())
    attn.to_q = adapted
    ff[1].register_forward_hook(lambda module, inputs, output: output * 3)
    got, wanted, _ = both(lambda: sample(prior, text, timesteps=3))
    assert relative_error(got.cpu(), wanted.cpu()) <= 1e-4


@pytest.mark.slow
def test_sampling_in_16_bits():
    prior = make_prior().to(DEVICE, torch.float16)
    text = {name: t.to(DEVICE) for name, t in make_text(2, 32).items()}
    got, wanted, _ = both(lambda: sample(prior, text, timesteps=4))
    assert torch.cosine_similarity(got.float(), wanted.float()).min() > 0.9999


@pytest.mark.slow
def test_compiled_sampler():
    """The kernels are custom ops: they take their place in a graph that allows no break."""
    prior = make_prior().to(DEVICE)
    text = {name: t.to(DEVICE) for name, t in make_text(2, 32).items()}

    def run(compiled):
        sampler = PriorSampler(prior, batch_sizes=(2,), timesteps=3, guidance=False, compile=compiled)
        return sampler(**text, generator=torch.Generator(DEVICE).manual_seed(1))

    with ops.using("reference"):
        wanted = run(compiled=False)
    with ops.using("triton"), counting("norm", "decode", "linear", "step") as ran:
        got = run(compiled=True)
    assert {"norm", "decode", "linear", "step"} <= set(ran) and relative_error(got.cpu(), wanted.cpu()) <= 1e-4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_block_alone(causal, masked):
    """Non-causal attention with null keys and a dense relative bias is somebody's main workload."""
    torch.manual_seed(0)
    block = Attention(32, dim_head=16, heads=2, causal=causal, rotary_emb=RotaryEmbedding(16)).to(DEVICE)
    bias = RelPosBias(heads=2).to(DEVICE)
    x = torch.randn(2, 9, 32, device=DEVICE)
    mask = torch.rand(2, 9, device=DEVICE) > 0.4 if masked else None
    cotangent = torch.randn(2, 9, 32, device=DEVICE)

    def run():
        leaf = x.clone().requires_grad_()
        out = block(leaf, mask=mask, attn_bias=bias(9, 10))
        inputs = leaf, bias.relative_attention_bias.weight, block.null_kv, block.to_kv.weight
        return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]

    got, wanted, ran = both(run)
    assert "attention" in ran
    for ours, reference, tolerance in zip(got, wanted, (1e-4, 1e-3, 1e-3, 1e-3, 1e-3)):
        assert close(ours, reference, tolerance)


@pytest.mark.slow
def test_learned_rotary_frequencies_keep_their_gradient():
    torch.manual_seed(0)
    rotary = RotaryEmbedding(16, learned_freq=True)
    block = Attention(32, dim_head=16, heads=2, causal=True, rotary_emb=rotary).to(DEVICE)
    x, cotangent = torch.randn(2, 1, 2, 7, 32, device=DEVICE)[:, 0]

    def run():
        return torch.autograd.grad(block(x), rotary.freqs, cotangent)[0]

    got, wanted, _ = both(run)
    assert close(got, wanted, 1e-3)
