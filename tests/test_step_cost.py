"""The model of a step's time, its reads and its launches, at the sizes of priors that people have."""

import pytest
import torch

from fastprior import PriorPipeline
from fastprior.diffusers_schedules import DiffusersSchedule
from fastprior.kernels import launch, ops
from fastprior.network import DiffusionPriorNetwork
from fastprior.pipeline_parts import TextEncoding
from fastprior.step_cost import CountLaunches, step_reads, step_seconds
from helpers.pt_cases import make_stock, without_diffusers

BANDWIDTH = 4.3e12  # bytes per second, of an H200
# options, parameters that a step reads in millions, and the microseconds that reading them takes in 16 bits
D2 = {
    "small": (dict(depth=12, heads=12), 100.9, 47),
    "large": (dict(depth=24, heads=32), 248.4, 116),
    "normformer": (dict(depth=12, heads=12, normformer=True), 100.9, 47),
}


@pytest.fixture(params=D2)
def network(request):
    options, *wanted = D2[request.param]
    with torch.device("meta"):
        net = DiffusionPriorNetwork(dim=768, dim_head=64, num_timesteps=1000, max_text_len=77, **options)
    # memory that is never touched: nothing below runs a kernel
    return net.to(torch.bfloat16).to_empty(device="cpu").eval(), *wanted


@torch.no_grad()
def traced(net, rows: int):
    """The condition of a few steps and the variants that one step launches, by launchers that only note them."""
    with ops.using("triton"), launch.recording() as launched:
        cond = net.prefill(torch.zeros(rows, 768), None, torch.arange(4))
        launched.clear()
        x, index, tables = torch.zeros(rows, 768), torch.zeros(1, dtype=torch.int64), torch.zeros(4, 774)
        null_table, coefficients = tables.split((768, 6), dim=1)
        fixed = coefficients, index, None, 1.0
        ops.diffusion_step(x, net.step(x, index, cond), None, torch.ones(()), x, x, *fixed, null_table=null_table)
    return cond, launched


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 5], ids="{}-rows".format)
def test_launches_and_reads_of_a_step(network, rows):
    """At most five launches a layer, two of the head and the step of the solver: 63 for 12 layers."""
    net, millions, microseconds = network
    cond, launched = traced(net, rows)
    depth = len(net.causal_transformer.layers)
    assert len(launched) <= 5 * depth + 3
    reads = step_reads(net, cond, torch.zeros(4, 768), torch.zeros(4, 6))
    assert (reads.weights + reads.tables) / 2e6 == pytest.approx(millions, abs=0.06)
    assert reads.prefix == 2 * depth * rows * (77 + 1 + 1) * 64 * 4
    assert reads.tables < 0.002 * reads.weights
    assert step_seconds(reads.weights + reads.tables, BANDWIDTH, 0) * 1e6 == pytest.approx(microseconds, abs=0.6)
    modelled = step_seconds(sum(reads), BANDWIDTH, len(launched)) * 1e6
    assert modelled == pytest.approx(microseconds + 1.7 * (5 * depth + 3), rel=0.02 if rows == 1 else 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 5, 8], ids="{}-rows".format)
def test_a_trace_counts_what_is_launched(network, rows):
    """Operations are counted without a launcher, so that other threads' launches go on."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    net, _, _ = network
    _, launched = traced(net, rows)
    with torch.no_grad(), ops.using("triton"), FakeTensorMode(allow_non_fake_inputs=True):
        cond, x = net.prefill(torch.zeros(rows, 768), None, torch.arange(4)), torch.zeros(rows, 768)
        with CountLaunches() as counted:
            net.step(x, torch.zeros(1, dtype=torch.int64), cond)
    assert counted.count == len(launched) - 1  # the step of the solver


def test_products_by_pytorch_are_counted():
    x = torch.zeros(2, 3, 3)
    with CountLaunches() as counted:
        _ = torch.nn.functional.linear(x[0], x[1]), x @ x, torch.addmm(x[0, 0], x[0], x[1])
        _ = x + x, x.exp(), torch.cat((x, x))
    assert counted.count == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("quantise", [None, "int8"])
def test_stats_of_a_prior_pipeline(guidance, quantise, monkeypatch):
    """What it says of a step is what two runs of different length differ in, by launchers that only note them."""
    monkeypatch.setattr("fastprior.quantise.judge", lambda *args: None)
    prior = without_diffusers(make_stock(num_attention_heads=2, attention_head_dim=16))
    config = prior.config
    draw = torch.Generator().manual_seed(1)
    embeds, encodings = (torch.randn(*shape, config["embedding_dim"], generator=draw) for shape in ((2,), (2, 7)))
    text = TextEncoding(embeds, encodings, torch.arange(7) < torch.tensor([[3], [7]]))
    pipeline = PriorPipeline(prior, DiffusersSchedule("UnCLIPScheduler", prediction_type="sample"), quantise=quantise)
    assert pipeline.stats()["calls"] == pipeline.stats()["weight_bytes"] == 0
    counts = {}
    with ops.using("triton"):
        for steps in (2, 2, 5):  # the first one judges what is quantised
            with launch.recording() as launched:
                zero = torch.zeros(1, config["embedding_dim"])
                null = TextEncoding(*(t[:1] for t in text))
                pipeline(text, null, num_inference_steps=steps, guidance_scale=guidance, zero_embed=zero)
            counts[steps] = len(launched)
        stats = pipeline.stats(1e9)
    own = (counts[5] - counts[2]) / 3
    assert stats["launches"] == own + 1  # the projection of the noisy embedding is PyTorch's
    assert stats["run_launches"] == 5 * stats["launches"] and stats["calls"] == 3
    blocks = prior.transformer_blocks
    matrices = [
        p for m in (blocks, prior.proj_in, prior.proj_to_clip_embeddings) for p in m.parameters() if p.ndim == 2
    ]
    if quantise:
        kept = prior.proj_in.weight.nbytes + prior.proj_to_clip_embeddings.weight.nbytes
        assert stats["weight_bytes"] == kept + sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    else:
        assert stats["weight_bytes"] == sum(p.nbytes for p in matrices)
    prompts = 2 * (1 + (guidance > 1))
    assert stats["prefix_bytes"] == 2 * len(blocks) * prompts * 8 * 32 * 4  # 7 tokens and the embedding
    assert 0 < stats["table_bytes"] < 0.2 * stats["weight_bytes"] * (4 if quantise else 1)
    read = stats["weight_bytes"] + stats["prefix_bytes"] + stats["table_bytes"]
    assert stats["modelled_step_ms"] == pytest.approx((read / 1e9 + stats["launches"] * 1.7e-6) * 1e3)
    assert 0 < stats["floor_share"] < 1 and stats["p50_ms"] > 0
