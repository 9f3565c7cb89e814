"""The model of a step's time, its reads and its launches, at the sizes of priors that people have."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprior import PriorPipeline
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.engine.step_cost import CountLaunches, step_seconds
from fastprior.engine.steps import StepInputs
from fastprior.kernels import ops
from fastprior.kernels.gpu import launch, workspace
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.pipelines.text_encoding import TextEncoding
from fastprior.prior.loop import network_reads
from fastprior.serving.prior_sampler import PriorSampler
from helpers.priors import make_prior, make_text
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
    """At most five launches a layer, two of the head and the step of the solver: 63 for 12 layers.

    For five rows normformer's norm of 3,072 numbers is one more.
    """
    net, millions, microseconds = network
    cond, launched = traced(net, rows)
    depth, normformer = len(net.causal_transformer.layers), net.config.get("normformer", False)
    most = (5 + (normformer and rows > 1)) * depth + 3
    assert len(launched) <= most
    reads = network_reads(net, StepInputs(cond, torch.zeros(4, 6), torch.zeros(4, 768)))
    assert (reads.weights + reads.tables) / 2e6 == pytest.approx(millions, abs=0.06)
    assert reads.prefix == 2 * depth * rows * (77 + 1 + 1) * 64 * 2, "in 16 bits, as the weights"
    assert reads.tables < 0.002 * reads.weights
    assert step_seconds(reads.weights + reads.tables, BANDWIDTH, 0) * 1e6 == pytest.approx(microseconds, abs=0.6)
    modelled = step_seconds(sum(reads), BANDWIDTH, len(launched)) * 1e6
    assert modelled == pytest.approx(microseconds + 1.7 * most, rel=0.02 if rows == 1 else 0.05)


# what PyTorch's operations end in where they are more than a view or memory
LEAVES = (
    "copy_",
    "fill_",
    "zero_",
    "cat",
    "index_select",
    "mm",
    "addmm",
    "bmm",
    "add",
    "mul",
    "exp",
    "div",
    "masked_fill_",
)


@contextlib.contextmanager
def profiled():
    """How often operations of PyTorch ran within the block, by name: those that are kernels on a GPU by default."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        yield lambda *names: sum(
            event.count for event in profile.key_averages() if event.key.removeprefix("aten::") in (names or LEAVES)
        )


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 5, 8], ids="{}-rows".format)
def test_a_trace_counts_all_that_is_launched(network, rows):
    """Ours and PyTorch's, as the profiler sees them in a step that runs, but for the kernels themselves."""
    net, _, _ = network
    depth = len(net.causal_transformer.layers)
    x, index = torch.zeros(rows, 768), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad(), ops.using("triton"), ops.sharing(), launch.recording() as launched:
        cond = net.prefill(torch.zeros(rows, 768), None, torch.arange(4))
        net.step(x, index, cond)
        launched.clear()
        with profiled() as by_pytorch:
            net.step(x, index, cond)
    assert by_pytorch("zero_", "fill_") == 0, "a split sum cleared counters of its own"
    with torch.no_grad(), ops.using("triton"), FakeTensorMode(allow_non_fake_inputs=True), CountLaunches() as counted:
        cond = net.prefill(torch.zeros(rows, 768), None, torch.arange(4))
        x = torch.zeros(rows, 768)
        for _ in range(2):
            counted.names.clear()
            net.step(x, index, cond)
    assert counted.count == len(launched) + by_pytorch()
    assert len(launched) <= counted.count <= len(launched) + 5
    if rows == 1:
        assert counted.count <= 5 * depth + 7  # and the step of the solver


def test_operations_of_pytorch_are_counted():
    x = torch.zeros(2, 3, 3)
    with CountLaunches() as counted:
        _ = torch.nn.functional.linear(x[0], x[1]), x @ x, torch.addmm(x[0, 0], x[0], x[1])
        _ = x + x, x.exp(), torch.cat((x, x)), x.zero_(), torch.zeros(3)
        assert counted.count == 8
        _ = x[0].t().expand(2, 3, 3), x.view(18), x.unbind(), torch.empty(3), x.new_empty(0), x[:0] + 1, x.split(1)
    assert counted.count == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("quantise", [None, "int8"])
def test_stats_of_a_prior_pipeline(guidance, quantise, monkeypatch):
    """What it says of a step is what two runs of different length differ in, by launchers that only note them."""
    monkeypatch.setattr("fastprior.models.quality.judge", lambda *args: None)
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
            zero, null = torch.zeros(1, config["embedding_dim"]), TextEncoding(*(t[:1] for t in text))
            with launch.recording() as launched:
                pipeline(text, null, num_inference_steps=steps, guidance_scale=guidance, zero_embed=zero)
            counts[steps] = len(launched)
        stats = pipeline.stats(1e9)
    # PyTorch's: the time token, the projection, tokens side by side, positions; and rows with guidance twice
    by_pytorch = 4 if guidance == 1 else 6
    assert stats["launches"] == (counts[5] - counts[2]) / 3 + by_pytorch
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


@pytest.mark.slow
def test_stats_where_a_prompt_is_its_own_negative():
    """They have one prefix."""
    prior = without_diffusers(make_stock(num_attention_heads=2, attention_head_dim=16))
    dim, draw = prior.config["embedding_dim"], torch.Generator().manual_seed(1)
    text = TextEncoding(
        torch.randn(1, dim, generator=draw), torch.randn(1, 7, dim, generator=draw), torch.ones(1, 7) > 0
    )
    pipeline = PriorPipeline(prior, DiffusersSchedule("UnCLIPScheduler", prediction_type="sample"))
    launches = []
    with ops.using("triton"), launch.recording():
        for negative in (text, TextEncoding(*(t.flip(-1) for t in text[:2]), text.mask)):
            pipeline(text, negative, num_inference_steps=2, zero_embed=torch.zeros(1, dim))
            launches.append(pipeline.stats()["launches"])
    assert launches[0] == launches[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prior", "sampler", "pipeline", "call"])
def test_a_run_has_one_workspace(kind, monkeypatch):
    """Whatever makes the steps: sums of split linears share it, and its counters are cleared once."""
    made, plain = [], workspace.Workspace.__init__
    monkeypatch.setattr(workspace.Workspace, "__init__", lambda self: made.append(self) or plain(self))
    with ops.using("triton"), launch.recording() as launched:
        if kind in ("prior", "sampler"):
            prior, text = make_prior(), make_text(2, 32)
            if kind == "prior":
                prior.sample(**text, timesteps=5)
            else:
                PriorSampler(prior, batch_sizes=(2,), timesteps=5, compile=False)(**text)
        else:
            prior = without_diffusers(make_stock(num_attention_heads=2, attention_head_dim=16))
            dim = prior.config["embedding_dim"]
            text = torch.randn(1, dim), torch.randn(1, 7, dim), torch.ones(1, 7) > 0
            if kind == "pipeline":
                pipeline = PriorPipeline(prior, DiffusersSchedule("UnCLIPScheduler", prediction_type="sample"))
                pipeline(TextEncoding(*text), None, num_inference_steps=5, guidance_scale=1.0)
            else:
                with torch.no_grad():
                    prior(torch.randn(1, dim), 4, *text)
                    made.clear()  # that of the prefix, too
                    prior(torch.randn(1, dim), 3, *text)
    split = [v for v in launched if "linear" in v.kernel.__name__ and dict(v.signature)["counters_ptr"] != "constexpr"]
    assert len(split) > 4 and sum(bool(one.tensors) for one in made) == 1
