"""On a GPU, where there is one: the same network as on the CPU, and every path equal on the device."""

import copy
import gc
import threading
import time

import pytest
import torch

from fastprior import draws
from fastprior.engine import graphs
from fastprior.prior import graphs as prior_graphs
from fastprior.serving.prior_sampler import PriorSampler
from helpers.at_once import at_once
from helpers.priors import make_prior, make_text, plain, relative_error, sample
from helpers.soak import BATCH_SIZES, OPTIONS, soak

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda"


def on_device(text: dict, device: str = DEVICE) -> dict:
    return {name: t.to(device) for name, t in text.items()}


def bytes_held() -> tuple[int, int]:
    """Of tensors, and of the device, without what is free, or made at first use: cuBLAS's workspace of each stream."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


@pytest.mark.parametrize("net", [{}, dict(self_cond=True), dict(num_timesteps=20, normformer=True)])
def test_forward_equals_the_cpu(net):
    prior, text = make_prior(net), make_text(3, 32)
    x, t = torch.randn(3, 32), torch.tensor([1, 7, 19])
    wanted = prior.net(x, t, **text)
    got = prior.to(DEVICE).net(x.to(DEVICE), t.to(DEVICE), **on_device(text))
    assert relative_error(got.cpu(), wanted) < 1e-5


@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    "run",
    [{}, dict(timesteps=9), dict(timesteps=9, solver="dpm++"), dict(timesteps=9, solver="sde-dpm++", spacing="logsnr")],
)
def test_cached_equals_plain(run, cond_scale):
    prior, text = make_prior().to(DEVICE), on_device(make_text(3, 32))
    got, wanted = (sample(p, text, cond_scale=cond_scale, **run) for p in (prior, plain(prior)))
    assert relative_error(got.cpu(), wanted.cpu()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_sampler(dtype):
    prior, text = make_prior(dict(dim=64)).to(DEVICE), on_device(make_text(3, 64))
    sampler = PriorSampler(prior, batch_sizes=(4,), timesteps=8, dtype=dtype)
    sampler.warmup()
    generators = [torch.Generator(DEVICE).manual_seed(1) for _ in range(2)]
    wanted = sample(copy.deepcopy(prior), text, timesteps=8, cond_scale=2.0, generator=generators[0])
    got = sampler(**text, cond_scale=2.0, generator=generators[1])
    assert torch.cosine_similarity(got, wanted).median() > (1 - 1e-6 if dtype == torch.float32 else 0.999)


def test_graphs_soak():
    """A thousand runs of two threads, each with a stream of its own: the bits of runs without graphs, and no growth."""
    prior, text = make_prior(dict(dim=64)).to(DEVICE), on_device(make_text(6, 64))
    kwargs = dict(batch_sizes=(2, 4), timesteps=6, compile=False)
    plain_sampler, sampler = PriorSampler(prior, graphs=False, **kwargs), PriorSampler(prior, **kwargs)
    assert sampler.graphs and not plain_sampler.graphs

    def run(which, prompts, scale, seed):
        given = {name: t[:prompts] for name, t in text.items()}
        return which(**given, cond_scale=scale, generator=torch.Generator(DEVICE).manual_seed(seed))

    cases = [(prompts, scale, seed) for prompts in (1, 3, 6) for scale in (1.0, 2.5) for seed in (1, 2)]
    wanted = [run(plain_sampler, *case) for case in cases]
    wrong = []

    def work(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            for number in range(500):
                at = number * 7 % len(cases)
                if not torch.equal(run(sampler, *cases[at]), wanted[at]):
                    wrong.append(cases[at])

    run(sampler, *cases[-1])
    before, _ = bytes_held()
    at_once(work, range(2))
    assert sampler.graphs and not wrong and bytes_held()[0] - before < 2**20
    assert sampler.stats()["graphs"] == 2 and sampler.stats()["calls"] == 1000


@pytest.mark.parametrize("runs", [10_000])
def test_soak(runs):
    prior = make_prior(dict(dim=64)).to(DEVICE)
    sampler = PriorSampler(prior, **OPTIONS)
    soak(prior, sampler, runs)
    assert sampler.graphs and sampler.stats()["graphs"] == len(BATCH_SIZES) and sampler.stats()["evictions"] == 0


def test_dropped_graphs_give_their_memory_back():
    """With room for one of two batch sizes: as much is held after many captures as after the first two."""
    prior, text = make_prior(dict(dim=64)).to(DEVICE), on_device(make_text(64, 64))
    kwargs = dict(batch_sizes=(32, 64), timesteps=4, compile=False)
    plain_sampler, free = PriorSampler(prior, graphs=False, **kwargs), PriorSampler(prior, **kwargs)
    free.warmup()
    limit = free.stats()["graph_bytes"] - 1
    del free
    sampler = PriorSampler(prior, graph_memory=limit, **kwargs)

    def run(which, prompts):
        given = {name: t[:prompts] for name, t in text.items()}
        return which(**given, generator=torch.Generator(DEVICE).manual_seed(1))

    held = []
    for number in range(12):
        prompts = (32, 64)[number % 2]
        assert torch.equal(run(sampler, prompts), run(plain_sampler, prompts))
        assert sampler.stats()["graphs"] == 1 and 0 < sampler.stats()["graph_bytes"] <= limit
        held.append(bytes_held()[1])
    assert sampler.stats()["evictions"] == 11 and held[-1] <= held[1] and held[-2] <= held[2], held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("net", [{}, dict(self_cond=True)])
def test_a_prior_with_graphs_gives_the_same_bits(net, dtype):
    """Twice each, and it leaves the generator as a run without does; other weights are captured again."""
    prior, text = make_prior(dict(dim=64) | net).to(DEVICE, dtype), on_device(make_text(2, 64))
    ours, other = copy.deepcopy(prior), copy.deepcopy(prior)
    ours.graphs, other.graphs = True, False
    runs = {}, dict(timesteps=9), dict(timesteps=9, cond_scale=2.0), dict(timesteps=9, solver="dpm++", rows=6)
    for scale in (1.0, 0.5):
        for number, kwargs in enumerate(runs * 2):
            found = []
            for which in (ours, other):
                found.append((sample(which, text, seed=number, **kwargs), torch.cuda.get_rng_state()))
            assert all(map(torch.equal, *found)), (scale, kwargs)
        cache = prior_graphs.graphs_of(ours).cache
        assert not cache.failed and cache.stats()["graphs"] == (3 if net else 2)
        with torch.no_grad():
            for which in (ours, other):
                which.net.causal_transformer.layers[0][1][1].weight.mul_(0.5)


def test_a_prior_captures_what_comes_again():
    """By default; other threads and streams get the same, and a dropped prior gives its memory back."""
    text, held = on_device(make_text(2, 64)), []
    for _ in range(3):
        prior = make_prior(dict(dim=64)).to(DEVICE)
        assert prior.sampling_plan(9, rows=2).graphs
        draws = [torch.Generator(DEVICE).manual_seed(1) for _ in range(4)]
        wanted = sample(prior, text, timesteps=9, generator=draws[0])
        assert prior_graphs.graphs_of(prior).cache.stats()["graphs"] == 0
        assert torch.equal(sample(prior, text, timesteps=9, generator=draws[1]), wanted)
        assert prior_graphs.graphs_of(prior).cache.stats()["graphs"] == 1
        torch.cuda.synchronize()

        def work(generator, prior=prior):
            with torch.cuda.stream(torch.cuda.Stream()):
                return sample(prior, text, timesteps=9, generator=generator).cpu()

        assert all(torch.equal(got, wanted.cpu()) for got in at_once(work, draws[2:]))
        del prior, work, wanted
        held.append(bytes_held()[1])
    assert held[2] <= held[1], held


def test_samplers_that_replay_at_once():
    """Each by its own graphs, on a stream of its own: cuBLAS's workspaces are not shared."""
    prior, text = make_prior(dict(dim=64)).to(DEVICE), on_device(make_text(64, 64))
    kwargs = dict(batch_sizes=(64,), timesteps=6, compile=False)
    samplers = [PriorSampler(prior, **kwargs) for _ in range(2)]

    def run(number):
        return samplers[number](**text, generator=torch.Generator(DEVICE).manual_seed(number))

    wanted = [run(number) for number in range(2)]
    torch.cuda.synchronize()

    def work(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            return [torch.equal(run(number), wanted[number]) for _ in range(40)]

    assert at_once(work, range(2)) == [[True] * 40] * 2 and all(sampler.graphs for sampler in samplers)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_second_device():
    """Which is not the current one; the first captured before."""
    for device in ("cuda:0", "cuda:1"):
        prior, text = make_prior(dict(dim=64)).to(device), on_device(make_text(2, 64), device)
        other = copy.deepcopy(prior)
        prior.graphs, other.graphs = True, False
        for _ in range(2):
            assert torch.equal(sample(prior, text, timesteps=9), sample(other, text, timesteps=9))
        sampler = PriorSampler(prior, batch_sizes=(2,), timesteps=9, compile=False)
        got = sampler(**text, generator=torch.Generator(device).manual_seed(1))
        wanted = sample(other, text, timesteps=9, generator=torch.Generator(device).manual_seed(1))
        assert torch.cosine_similarity(got, wanted).min() > 1 - 1e-6
        assert sampler.stats()["graphs"] == prior_graphs.graphs_of(prior).cache.stats()["graphs"] == 1
        assert torch.cuda.current_device() == 0


def test_a_capture_that_fails_leaves_the_device_as_it_was():
    """The generator, the allocator and the stream; what waits for the device makes a capture invalid."""
    x, runs, stream = torch.ones(3, device=DEVICE), [], torch.cuda.current_stream()

    def run():
        runs.append((x * 2).sum())
        if len(runs) > graphs.WARMUPS:
            runs[-1].item()

    with pytest.raises(RuntimeError):
        graphs.capture(run, x.device, None)
    assert len(runs) == graphs.WARMUPS + 1 and torch.cuda.current_stream() == stream
    runs.clear()
    assert torch.randn(3, device=DEVICE).isfinite().all()
    replay, *_ = graphs.capture(lambda: x.mul_(2), x.device, None)
    assert (x == 2**graphs.WARMUPS).all(), "a capture computes nothing"
    replay()
    assert (x == 2 ** (graphs.WARMUPS + 1)).all()


def test_draws_wait_for_a_capture():
    """In another thread, of the default generator: they neither fail nor end it, and are those of their seed."""
    x, begun, runs = torch.ones(3, device=DEVICE), threading.Event(), []

    def run():
        x.mul_(2)
        runs.append(1)
        if len(runs) > graphs.WARMUPS:
            begun.set()
            time.sleep(0.2)

    def work(number):
        if number:
            return graphs.capture(run, x.device, None)[0]
        assert begun.wait(60)
        return draws.randn_like(x)

    torch.cuda.manual_seed(1)
    wanted = torch.randn_like(x)
    torch.cuda.manual_seed(1)
    drawn, replay = at_once(work, range(2))
    replay()
    torch.cuda.synchronize()
    assert torch.equal(drawn, wanted) and (x == 2 ** (graphs.WARMUPS + 1)).all()


def make_pipelines(dtype: torch.dtype, *options: dict) -> list:
    """Pipelines of one prior."""
    from fastprior import PriorPipeline
    from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
    from fastprior.models.prior_transformer.model import PriorTransformer

    torch.manual_seed(0)
    prior = PriorTransformer(num_attention_heads=4, num_layers=3, embedding_dim=64, num_embeddings=77).eval()
    for weight in (prior.positional_embedding, prior.prd_embedding, prior.clip_std):
        torch.nn.init.normal_(weight, std=0.3)
    schedule = DiffusersSchedule("UnCLIPScheduler", clip_sample_range=5.0, prediction_type="sample")
    return [PriorPipeline(prior.to(DEVICE, dtype), schedule, **kwargs) for kwargs in options]


def run_pipeline(pipeline, lengths: list[int], seed: int = 1, generators: str = DEVICE, **kwargs) -> torch.Tensor:
    from fastprior.pipelines.text_encoding import TextEncoding

    draw = torch.Generator().manual_seed(seed)

    def text(lengths):
        mask = torch.arange(77) < torch.tensor(lengths)[:, None]
        tensors = (torch.randn(len(lengths), *shape, generator=draw) for shape in ((64,), (77, 64)))
        return TextEncoding(*(t.to(DEVICE) for t in (*tensors, mask)))

    kwargs = dict(num_inference_steps=4, zero_embed=torch.zeros(1, 64, device=DEVICE)) | kwargs
    generator = torch.Generator(generators).manual_seed(seed)
    return pipeline(text(lengths), text([2]), generator=generator, **kwargs).image_embeds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pipelines(dtype):
    """Texts of any length and batches of any size by few graphs, compiled or not: as eagerly."""
    options = dict(graphs=False), {}, dict(compile=True), dict(compile=True, graphs=False)
    plain_pipeline, *pipelines = make_pipelines(dtype, *options)
    for number, lengths in enumerate(([77], [20], [21], [2, 30, 77], [5] * 8)):
        kwargs = dict(lengths=lengths, generators=("cpu", DEVICE)[number % 2])
        wanted = run_pipeline(plain_pipeline, **kwargs)
        for pipeline in pipelines:
            got = run_pipeline(pipeline, **kwargs)
            assert torch.cosine_similarity(got, wanted).min() > (1 - 1e-6 if dtype == torch.float32 else 0.999), lengths
    assert [pipeline.graphs for pipeline in pipelines] == [None, None, False], "a capture failed"
    assert [pipeline.stats()["graphs"] for pipeline in pipelines] == [4, 4, 0]


def test_pipeline_graphs_soak():
    """Captures and runs of two threads, each with a stream of its own: the bits of runs one by one, and no growth."""
    options = dict(batch_sizes=(2, 4))
    plain_pipeline, alone, pipeline = make_pipelines(torch.float32, dict(graphs=False), options, options)
    cases = [
        dict(lengths=[15] * prompts, num_images_per_prompt=images, seed=seed, num_inference_steps=3 + seed)
        for prompts in (1, 3, 6)
        for images in (1, 2)
        for seed in (1, 2)
    ]
    held = []
    for scale in (1.0, 0.5, -1.0):
        with torch.no_grad():
            pipeline.prior.transformer_blocks[0].ff.net[2].weight.mul_(scale)
        wanted, wrong = [run_pipeline(alone, **case) for case in cases], []
        for got, case in zip(wanted, cases):
            assert torch.cosine_similarity(got, run_pipeline(plain_pipeline, **case)).min() > 1 - 1e-6

        def work(_, cases=cases, wanted=wanted, wrong=wrong):
            with torch.cuda.stream(torch.cuda.Stream()):
                for number in range(250):
                    at = number * 7 % len(cases)
                    if not torch.equal(run_pipeline(pipeline, **cases[at]), wanted[at]):
                        wrong.append(cases[at])

        at_once(work, range(2))
        held.append(bytes_held()[0])
        assert not wrong and pipeline.graphs is None and pipeline.stats()["graphs"] == 4
    assert held[-1] - held[1] < 2**20, held


def test_split_sums_are_the_same_whichever_program_comes_last():
    """The order of arrival changes from run to run; that of the sum must not. Eagerly, and in a graph."""
    from fastprior.kernels.arguments import LinearArgs
    from fastprior.kernels.gpu import linear, workspace

    x, weight = (torch.randn(rows, 3072, device=DEVICE, dtype=torch.bfloat16) for rows in (3, 768))
    wanted, _ = linear.linear_fwd(LinearArgs(x, weight))
    assert torch.cosine_similarity(wanted.float().flatten(), (x @ weight.t()).float().flatten(), dim=0) > 0.9999
    with workspace.sharing() as shared:
        for _ in range(500):
            assert torch.equal(linear.linear_fwd(LinearArgs(x, weight))[0], wanted)
        assert shared._sums is not None, "this shape is to be split"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = linear.linear_fwd(LinearArgs(x, weight))
    for _ in range(500):
        out.zero_()
        graph.replay()
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_gives_equal_bits_at_the_sizes_of_models(dtype):
    from fastprior.kernels import ops

    q, k, v = (torch.randn(16, 260, h, 64, device=DEVICE, dtype=dtype, requires_grad=True) for h in (12, 1, 1))
    table, buckets = torch.randn(32, 12, device=DEVICE, requires_grad=True), torch.arange(260, device=DEVICE) // 9
    cotangent = torch.randn(16, 260, 12 * 64, device=DEVICE, dtype=dtype)

    def run():
        out = ops.attention(q, k, v, scale=16.0, cosine=True, bias=table, buckets=buckets, causal=True)
        return out, *torch.autograd.grad(out, (q, k, v, table), cotangent)

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prior_transformer(dtype):
    """Behind the prefix, by kernels, against whole passes on the CPU; captions of several lengths, one empty."""
    from fastprior.models.prior_transformer.model import PriorTransformer

    torch.manual_seed(0)
    prior = PriorTransformer(num_attention_heads=4, num_layers=3, embedding_dim=64, num_embeddings=77).eval()
    torch.nn.init.normal_(prior.positional_embedding, std=0.3)
    mask = torch.arange(77) < torch.tensor([77, 20, 2, 0])[:, None]
    text = torch.randn(4, 64), torch.randn(4, 77, 64), mask
    x, times = torch.randn(8, 64), torch.tensor([900, 20])
    repeated = (t.repeat_interleave(2, dim=0) for t in text)
    with torch.no_grad():
        wanted = prior.predict_whole(x, times[1].expand(8), *repeated)
        prior = prior.to(DEVICE, dtype)
        embed, encodings, mask = (t.to(DEVICE) for t in text)
        cond = prior.prefill(embed.to(dtype), encodings.to(dtype), mask, times.to(DEVICE))
        got = prior.step(x.to(DEVICE, dtype), torch.tensor(1, device=DEVICE), cond).cpu()
    if dtype == torch.float32:
        assert relative_error(got, wanted) <= 1e-3  # products of tf32x3
    assert torch.cosine_similarity(got.float(), wanted).min() > 0.999
