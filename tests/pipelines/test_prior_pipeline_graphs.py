"""PriorPipeline with CUDA graphs, recorded operations in their place: the same results, whatever ran before."""

import copy
import random
from functools import partial

import pytest
import torch

import fastprior
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.engine import graphs
from fastprior.kernels import ops
from fastprior.models import snapshot
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.pipelines.prior_pipeline import PriorPipeline
from fastprior.pipelines.text_encoding import TextEncoding
from helpers import captures, device_runs
from helpers.at_once import at_once
from helpers.priors import make_prior, make_text, relative_error

DIM, LENGTH, DEPTH = 16, 40, 2
TOLERANCE = 1e-4  # of scale, what a whole fp32 run may differ by: hidden tokens run too, so sums have other orders
SCHEDULES = {
    "unclip": DiffusersSchedule("UnCLIPScheduler", prediction_type="sample", clip_sample_range=5.0),
    "ddpm": DiffusersSchedule("DDPMScheduler", prediction_type="v_prediction"),
    "ddim": DiffusersSchedule("DDIMScheduler", prediction_type="sample"),
    "heun": DiffusersSchedule("HeunDiscreteScheduler", prediction_type="sample", clip_sample=True),
}


def make_transformer(seed: int = 0, dtype: torch.dtype = torch.float32) -> PriorTransformer:
    torch.manual_seed(seed)
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=DEPTH, embedding_dim=DIM, num_embeddings=LENGTH
    ).eval()
    for name, weights in prior.named_parameters():
        torch.nn.init.normal_(weights, mean=float("norm" in name and "weight" in name), std=0.2)
    return prior.to(dtype)


def texts(lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> TextEncoding:
    draw, count = torch.Generator().manual_seed(seed), len(lengths)
    embeds, encodings = (torch.randn(*shape, DIM, generator=draw, dtype=dtype) for shape in ((count,), (count, LENGTH)))
    return TextEncoding(embeds, encodings, torch.arange(LENGTH) < torch.tensor(lengths)[:, None])


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_plain(prior, schedule="unclip", **kwargs) -> PriorPipeline:
    return PriorPipeline(prior, SCHEDULES[schedule], **kwargs)


def with_graphs(prior, schedule="unclip", **kwargs) -> PriorPipeline:
    pipeline = with_plain(prior, schedule, **kwargs)
    pipeline.graphs = True  # which a CPU has not
    return pipeline


def sample(pipeline: PriorPipeline, lengths=(9,), seed: int = 1, **kwargs) -> torch.Tensor:
    kwargs = dict(num_inference_steps=4, zero_embed=torch.zeros(1, DIM), generator=seeded(seed)) | kwargs
    return pipeline(texts(list(lengths), seed), texts([2]), **kwargs).image_embeds


@pytest.fixture
def captured(monkeypatch):
    """The captures that were made, two for each shape."""
    made = []
    monkeypatch.setattr(graphs, "capture", lambda *args: made.append(args) or captures.capture(*args))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
def test_padded_prefill(backend):
    """Hidden tokens at the end, within and of a whole text are as if they were not there."""
    prior, times = make_transformer(), torch.arange(3.0)
    text = texts([7, 3, 0, 5])
    text.mask[0, 2:4] = False
    prompts = torch.tensor([1, 0, 3, 2, 2, 0])
    x = torch.randn(12, DIM, generator=seeded())
    with torch.no_grad(), ops.using(backend):
        cond = prior.padded_prefill(text.embeds, text.encodings[:, :8], text.mask[:, :8].float(), times, prompts)
        got = prior.step(x, torch.tensor(1), cond)
        wanted = prior.step(x, torch.tensor(1), prior.prefill(*(t[prompts] for t in text), times))
    assert cond.prefix.k.shape == (DEPTH, 6, 2, 9, 16)
    assert relative_error(got, wanted) < 1e-5


def options(choose: random.Random, schedule: str) -> tuple[tuple, dict]:
    """Arguments of a call; a generator is a seed."""
    prompts, images = choose.randint(1, 7), choose.choice((1, 1, 2, 3))
    lengths = [choose.choice((0, 1, 9, 14, 15, 16, 31, 39, 40)) for _ in range(prompts)]
    given = texts(lengths, prompts, torch.float64)
    if prompts > 1 and choose.random() < 0.3:
        given = TextEncoding(*(t[[0] * prompts] for t in given))
    negatives = texts([choose.randint(0, LENGTH)] * choose.choice((1, prompts)), 3, torch.float64)
    kwargs = dict(num_images_per_prompt=images, num_inference_steps=choose.randint(2, 9))
    kwargs["guidance_scale"] = choose.choice((0.5, 1.0, 1.5, 4.0))
    if choose.random() < 0.5:
        kwargs["zero_embed"] = torch.zeros(1, DIM, dtype=torch.float64)
    rows = prompts * images * (1 if "zero_embed" in kwargs else 2)
    start = choose.choice(("noise", "noise", "latents", "image"))
    if start == "latents":
        kwargs["latents"] = torch.randn(rows, DIM, generator=seeded(4), dtype=torch.float64)
    elif start == "image" and schedule != "heun":
        kwargs |= dict(image=torch.randn(1, DIM, generator=seeded(5), dtype=torch.float64), strength=0.7)
    if schedule == "ddim":
        kwargs["eta"] = choose.choice((0.0, 0.6))
    elif choose.random() < 0.3:
        kwargs |= dict(solver=choose.choice(("dpm++", "sde-dpm++")), spacing=choose.choice((None, "logsnr", "karras")))
    kwargs["generator"] = choose.choice((7, list(range(rows))))
    return (given, negatives), kwargs


def run(pipeline, args, kwargs):
    """Both results in one, and the states that generators are left in."""
    seeds = kwargs["generator"]
    generator = [seeded(seed) for seed in seeds] if isinstance(seeds, list) else seeded(seeds)
    result = pipeline(*args, **kwargs | dict(generator=generator))
    states = [one.get_state() for one in (generator if isinstance(seeds, list) else [generator])]
    return torch.cat([t for t in result if t is not None]), torch.stack(states)


@pytest.mark.slow
@pytest.mark.parametrize("batch_sizes", [(1, 4), (2,), (8,)], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_results_are_those_without_graphs(schedule, batch_sizes, captured):
    """In fp64, where only rounding at 1e-16 differs: any options, one after the other, by the same graphs."""
    choose, prior = random.Random(f"{schedule} {batch_sizes}"), make_transformer(dtype=torch.float64)
    plain, ours = with_plain(prior, schedule), with_graphs(prior, schedule, batch_sizes=batch_sizes)
    for number in range(16):
        args, kwargs = options(choose, schedule)
        (got, state), (wanted, wanted_state) = run(ours, args, kwargs), run(plain, args, kwargs)
        assert relative_error(got, wanted) < 1e-10, (number, kwargs)
        assert torch.equal(state, wanted_state)
    assert ours.graphs and len(captured) == 2 * ours.stats()["graphs"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_other_dtypes(dtype, guidance_scale, captured):
    prior = make_transformer(dtype=dtype)
    ours, plain = with_graphs(prior), with_plain(prior)
    for lengths in ([9], [40, 3, 20], [40]):
        got, wanted = (sample(p, lengths, guidance_scale=guidance_scale) for p in (ours, plain))
        if dtype == torch.float32:
            assert relative_error(got, wanted) < TOLERANCE
        assert torch.cosine_similarity(got, wanted).min() > (0.999 if dtype == torch.bfloat16 else 1 - 1e-6)


def test_the_same_bits_where_shapes_are_the_same(captured):
    """Texts of full length, as many as the batch size, and as many steps as the tables of graphs have."""
    prior = make_transformer()
    ours, plain = with_graphs(prior, batch_sizes=(1, 3)), with_plain(prior)
    for count in (1, 3):
        for images in (1, 3):
            kwargs = dict(num_images_per_prompt=images, num_inference_steps=64, guidance_scale=1.0)
            with ops.using("reference"):  # which is what is recorded, too
                got, wanted = (sample(p, [LENGTH] * count, **kwargs) for p in (ours, plain))
            assert torch.equal(got, wanted)


def test_nothing_is_left_of_other_calls(captured):
    """Bits do not depend on what was in the buffers, and results are none of them."""
    prior = make_transformer()
    ours = with_graphs(prior, batch_sizes=(2,))
    cases = [
        dict(lengths=lengths, seed=seed, guidance_scale=scale, num_inference_steps=steps)
        for seed, (lengths, scale, steps) in enumerate(
            [([9], 4.0, 4), ([3, 12], 2.0, 7), ([5, 1, 14, 2, 7], 4.0, 3), ([9], 4.0, 4), ([15] * 4, 7.0, 12)]
        )
    ]
    got = [sample(ours, **case) for case in cases]
    kept = [t.clone() for t in got]
    sample(ours, seed=99)
    for case, one, copied in zip(cases, got, kept):
        assert torch.equal(one, copied), "a result was a buffer, which another call wrote to"
        assert torch.equal(one, sample(with_graphs(prior, batch_sizes=(2,)), **case)), case
    assert ours.stats()["graphs"] == 1 and ours.stats()["calls"] == 6 and ours.stats()["p50_ms"] > 0


def test_a_graph_serves_all_solvers_and_steps(captured):
    """Of one text length, number of images and kind of guidance: the step tables are inputs."""
    prior = make_transformer()
    ours = with_graphs(prior, batch_sizes=(1,))
    for number, kwargs in enumerate(
        (
            dict(num_inference_steps=25), dict(num_inference_steps=7, guidance_scale=2.0), dict(num_inference_steps=64),
            dict(image=torch.zeros(1, DIM), strength=0.5), dict(latents=torch.ones(1, DIM)),
            dict(num_inference_steps=8, solver="sde-dpm++", spacing="logsnr"),
        )
    ):  # fmt: skip
        ours.schedule = (SCHEDULES["unclip"], copy.deepcopy(SCHEDULES["unclip"]))[number % 2]
        sample(ours, **kwargs)
        assert len(captured) == 2
    for kwargs in (
        dict(num_inference_steps=65), dict(num_images_per_prompt=2), dict(guidance_scale=1.0), dict(lengths=[17]),
        dict(zero_embed=None),
    ):  # fmt: skip
        captured.clear()
        sample(ours, **kwargs)
        assert len(captured) == 2


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["unclip", "ddim", "heun"])
def test_runs_of_launches_alone(schedule, captured, monkeypatch):
    """With graphs, of several steps, and without: the bits of single steps, and what a step launches is known.

    There are none for fp64, and here none for a solver that uses the prediction of the same step.
    """
    prior = make_transformer()
    cases = [
        dict(lengths=[9], num_inference_steps=21), dict(lengths=[3, 12, 5], guidance_scale=1.0, generator=[*range(3)]),
        dict(num_images_per_prompt=2, num_inference_steps=25), dict(lengths=[9], guidance_scale=2.0),
        dict(zero_embed=None), dict(latents=torch.ones(1, DIM, dtype=torch.float64)),
    ]  # fmt: skip

    def results(pipeline) -> list[torch.Tensor]:
        found = []
        for case in cases:
            seeds = case.get("generator", 1)
            generator = [seeded(seed) for seed in seeds] if isinstance(seeds, list) else seeded(seeds)
            found.append(sample(pipeline, **case | dict(generator=generator)))
        return found

    with ops.using("reference"):
        wanted = [results(make(prior, schedule, batch_sizes=(1, 2))) for make in (with_graphs, with_plain)]
        made = device_runs.of_networks(monkeypatch)
        for make, alone in zip((with_graphs, with_plain), wanted):
            ours = make(prior, schedule, batch_sizes=(1, 2))
            for case, got, before in zip(cases, results(ours), alone):
                assert torch.equal(got, before), case
            sample(ours)
            assert ours.stats()["launches"] == (schedule != "ddim") * device_runs.FakeRun.launches
    counts = {run.args[0] for run, *_ in captured if isinstance(run, partial)}
    assert counts == ({1, 4, 16} if made else set()) and bool(made) == (schedule != "ddim")


@pytest.mark.parametrize("change", ["load", "assign", "data", "item", "move", "replace", "adapter", "prior"])
def test_changed_weights_and_modules_are_captured_again(change, captured):
    """Records go on reading the tensors that they saw, as graphs do: what goes unnoticed gives what was before."""
    prior = make_transformer()
    ours = with_graphs(prior)
    before = sample(ours)
    sample(ours, seed=2)
    assert len(captured) == 2
    linear, other = prior.transformer_blocks[0].ff.net[2], make_transformer(seed=1)
    if change in ("load", "assign"):
        prior.load_state_dict(other.state_dict(), assign=change == "assign")
    elif change == "data":
        linear.weight.data.mul_(3)
    elif change == "item":
        with torch.no_grad():
            linear.weight[0, 0] += 100
    elif change == "move":
        prior.to(torch.bfloat16)
    elif change == "replace":
        linear.weight = torch.nn.Parameter(linear.weight * 3)
    elif change == "adapter":
        peft = pytest.importorskip("peft")
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False), prior)
    else:
        prior = ours.prior = other
    got, wanted = sample(ours), sample(with_plain(prior))
    assert torch.cosine_similarity(got, wanted) > 0.9999 and not torch.equal(got, before)
    assert len(captured) == 4 and ours.graphs
    sample(ours)
    assert len(captured) == 4
    if change == "adapter":
        for block in prior.transformer_blocks:
            block.attn1.to_q.enable_adapters(False)
        torch.testing.assert_close(sample(ours), before, atol=1e-5, rtol=1e-5)  # layers of adapters run one by one
        assert len(captured) == 6


def test_weights_that_moved_are_not_kept():
    prior = make_transformer()
    state = snapshot.state(prior)
    assert snapshot.state(prior) is state
    prior.to(torch.bfloat16)
    assert state.snapshot is None and snapshot.state(prior) is not state


def test_what_cannot_be_captured_runs_without(captured):
    """An adapter around a linear that looks at a value: that waits for the device, which ends a capture."""

    class Looking(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1.0 if float(x.abs().max()) > 0 else 2.0)

    peft, prior = pytest.importorskip("peft"), make_transformer()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False), prior)
    prior.transformer_blocks[0].attn1.to_q.base_layer.__class__ = Looking
    ours, wanted = with_graphs(prior), sample(with_plain(prior))
    with pytest.warns(UserWarning, match="batch size 1 was not captured as a CUDA graph, .* not permitted"):
        got = sample(ours)
    assert torch.equal(got, wanted) and ours.graphs is False
    assert torch.equal(sample(ours), wanted) and len(captured) == 1 and ours.stats()["graphs"] == 0


@pytest.mark.parametrize("compile", [False, True])
def test_a_capture_that_fails_is_told(compile, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    counter, right = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: right(*args, **kwargs, backend=counter))
    monkeypatch.setattr(graphs, "capture", fail)
    prior = make_transformer()
    ours = with_graphs(prior, batch_sizes=(2,), compile=compile)
    with pytest.warns(UserWarning, match="batch size 2 was not captured as a CUDA graph, .* out of memory"):
        got = sample(ours, [9, 3, 20])
    plain = with_plain(prior, batch_sizes=(2,), compile=compile)
    assert relative_error(got, sample(plain, [9, 3, 20])) < TOLERANCE and not ours.graphs


@pytest.mark.slow
def test_compiled_steps_in_graphs(monkeypatch):
    """Compiled once for each shape; the stand-in runs them again, for records would be of what compiling does."""
    from torch._dynamo.testing import CompileCounter

    counter, right = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: right(*args, **kwargs, backend=counter))
    monkeypatch.setattr(graphs, "capture", lambda run, device, pool: (run, None, 0))
    prior = make_transformer()
    ours, plain = with_graphs(prior, batch_sizes=(1, 4), compile=True), with_plain(prior)
    for lengths, steps in (([9], 3), ([3], 12), ([12, 7, 9], 5), ([40], 3), ([35, 3, 3, 2, 5], 3)):
        got, wanted = (sample(p, lengths, num_inference_steps=steps) for p in (ours, plain))
        assert relative_error(got, wanted) < TOLERANCE, lengths
    assert counter.frame_count == ours.stats()["graphs"] == 4


@pytest.mark.filterwarnings("error")
def test_memory_of_graphs_has_a_limit(captured):
    """The graphs that were not used for longest go."""
    prior = make_transformer()
    free = with_graphs(prior, batch_sizes=(1, 2, 4))
    sizes = {}
    for prompts in (1, 2, 4):
        before = free.stats()["graph_bytes"]
        sample(free, [9] * prompts)
        sizes[prompts] = free.stats()["graph_bytes"] - before
    assert sizes[1] < sizes[2] < sizes[4]
    captured.clear()
    sampler, captures_made = with_graphs(prior, batch_sizes=(1, 2, 4), graph_memory=sizes[2] + sizes[4]), 0
    for prompts, is_new, kept in (
        (1, True, 1), (2, True, 2), (1, False, 2), (4, True, 2), (1, False, 2), (4, False, 2), (2, True, 2),
        (4, False, 2), (1, True, 2),
    ):  # fmt: skip
        assert torch.equal(sample(sampler, [9] * prompts), sample(free, [9] * prompts))
        captures_made += 2 * is_new
        assert len(captured) == captures_made and sampler.stats()["graphs"] == kept
    assert sampler.stats()["evictions"] == 3 and sampler.stats()["graph_bytes"] <= sizes[2] + sizes[4]


def test_graphs_that_are_larger_than_the_limit(captured):
    """Parts of one call run with and without."""
    prior = make_transformer()
    free = with_graphs(prior, batch_sizes=(1, 4))
    sample(free, num_images_per_prompt=2)
    ours = with_graphs(prior, batch_sizes=(1, 4), graph_memory=free.stats()["graph_bytes"])
    kwargs = dict(num_images_per_prompt=2, lengths=[9, 3, 14, 2, 7])
    wanted = sample(with_plain(prior), **kwargs)
    with pytest.warns(UserWarning, match=r"batch size 4 runs without graphs: its CUDA graphs take .*graph_memory="):
        got = sample(ours, **kwargs)
    assert relative_error(got, wanted) < TOLERANCE
    for _ in range(2):
        assert torch.equal(sample(ours, **kwargs), got)
    assert ours.graphs and ours.stats()["graphs"] == 1 and ours.stats()["evictions"] == 0


def test_threads_get_their_own_results(captured):
    ours = with_graphs(make_transformer(), batch_sizes=(1, 2))
    cases = [dict(lengths=[9] * (1 + seed % 3), seed=seed, guidance_scale=1.5 + seed % 2) for seed in range(6)]
    alone = [sample(ours, **case) for case in cases]
    wrong = []

    def work(first: int):
        for number in range(20):
            at = (first + number * 5) % len(cases)
            if not torch.equal(sample(ours, **cases[at]), alone[at]):
                wrong.append(at)

    at_once(work, range(2))
    assert not wrong and ours.stats()["calls"] == 46 and len(captured) == 2 * ours.stats()["graphs"]


def test_quantised_steps(captured):
    """The same graphs while weights stay; those of the new quantised weights where they change."""
    prior = make_transformer()
    ours, plain = (make(prior, quantise="int8") for make in (with_graphs, with_plain))
    for seed in (0, 1):
        got, wanted = sample(ours), sample(plain)
        assert relative_error(got, wanted) < 1e-3  # products of 16 bits round to 3e-5 in each
        assert len(captured) == 2 * (seed + 1) and ours.quality.median < 1
        prior.load_state_dict(make_transformer(seed=seed + 1).state_dict())
    with torch.no_grad():
        prior.transformer_blocks[0].attn1.to_k.weight[0, 0] = float("nan")
    for _ in range(2):
        with pytest.raises(ValueError, match="loses too much"):
            sample(ours)


@pytest.mark.parametrize("where", ["prefill", "step"])
def test_a_run_that_fails_is_told_and_the_next_is_right(where, monkeypatch):
    monkeypatch.setattr(graphs, "capture", captures.capture)
    ours = with_graphs(make_transformer(), batch_sizes=(2,))
    wanted = sample(ours, [9, 3, 7])
    (graph,) = ours._engine.cache.kept.values()
    name, calls = f"_{where}", []
    right = getattr(graph, name)

    def fail():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("device lost")
        right()

    monkeypatch.setattr(graph, name, fail)
    with pytest.raises(RuntimeError, match="device lost"):
        sample(ours, [2, 2, 2])
    assert not ours._engine.lock.locked() and torch.equal(sample(ours, [9, 3, 7]), wanted) and ours.graphs


def test_buffers_that_inference_mode_made(captured):
    """Are written to outside of it too; of both samplers."""
    ours, text = with_graphs(make_transformer()), make_text(2, 32)
    sampler = fastprior.PriorSampler(make_prior(), batch_sizes=(2,), timesteps=4, compile=False)
    sampler.graphs = True

    def both():
        return sample(ours), sampler(**text, generator=seeded())

    with torch.inference_mode():
        wanted = both()
    for got in (both(), both()):
        assert all(map(torch.equal, got, wanted))
    with torch.inference_mode():
        assert all(map(torch.equal, both(), wanted))


def test_what_is_refused(captured):
    prior = make_transformer()
    with pytest.raises(ValueError, match="graphs=True; the prior is on cpu, and CUDA graphs need CUDA"):
        with_plain(prior, graphs=True)
    with pytest.raises(ValueError, match="graph_memory=0; it must be None or at least 1 byte"):
        with_plain(prior, graph_memory=0)
    assert not with_plain(prior).graphs
    ours, text = with_graphs(prior), texts([9])
    sample(ours)
    with pytest.raises(ValueError, match="mask has values beyond 0 and 1"):
        ours(text._replace(mask=text.mask * 2.0), texts([2]), num_inference_steps=2)


def test_a_prior_that_moved_off_the_device_runs_without():
    prior = make_transformer()
    with pytest.warns(UserWarning, match="batch size 1 was not captured .* tensors are on cpu, and CUDA graphs need"):
        got = sample(with_graphs(prior))
    assert torch.equal(got, sample(with_plain(prior)))


def test_a_backend_that_is_forced_has_graphs_of_its_own(captured):
    ours = with_graphs(make_transformer())
    wanted = sample(ours)
    with ops.using("reference"):
        assert relative_error(sample(ours), wanted) < TOLERANCE
    assert len(captured) == 4
