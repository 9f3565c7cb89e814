"""PriorSampler: the same results as the prior, compiled once, whatever the batch."""

import copy
import math
import pickle

import pytest
import torch

from fastprior.engine import clock, graphs
from fastprior.kernels import ops
from fastprior.kernels.cpu import library as cpu_library
from fastprior.serving import prior_sampler as serving
from fastprior.serving.prior_sampler import EVALUATIONS, PriorSampler
from helpers import captures
from helpers.at_once import at_once
from helpers.pairwise import pairwise
from helpers.priors import make_prior, make_text, relative_error, sample
from helpers.soak import BATCH_SIZES, OPTIONS, soak

TOLERANCE = 1e-4  # of scale, what a whole fp32 run may differ by: two orders of summation, amplified by the solver


def call(sampler, text, rows=slice(None), seed=1, **kwargs):
    return sampler(
        text["text_embed"][rows],
        text["text_encodings"][rows],
        generator=torch.Generator().manual_seed(seed),
        **kwargs,
    )


@pytest.mark.parametrize("self_cond", [False, True])
@pytest.mark.parametrize(
    "solver, steps, spaced",
    [
        ("ddpm", None, {}), ("ddim", 9, {}), ("dpm++", 9, {}), ("dpm++", 9, dict(spacing="logsnr")),
        ("sde-dpm++", 9, dict(spacing="logsnr")),
    ],
)  # fmt: skip
def test_results_do_not_depend_on_batch_sizes(self_cond, solver, steps, spaced):
    prior, text = make_prior(dict(self_cond=self_cond)), make_text(11, 32)
    sampler = PriorSampler(prior, batch_sizes=(2, 4), timesteps=steps, solver=solver, compile=False, **spaced)
    for prompts in (1, 2, 3, 11):
        rows = slice(prompts)
        given = {name: t[rows] for name, t in text.items()}
        for cond_scale in (1.0, 3.0):
            generator = torch.Generator().manual_seed(1)
            kwargs = dict(cond_scale=cond_scale, timesteps=steps, solver=solver, generator=generator, **spaced)
            wanted = sample(prior, given, **kwargs)
            assert relative_error(call(sampler, text, rows, cond_scale=cond_scale), wanted) < TOLERANCE


@pytest.mark.parametrize("timesteps, sample_timesteps", [(20, None), (20, 9), (5, None)])
def test_the_default_run_is_of_the_sde_with_few_evaluations(timesteps, sample_timesteps):
    prior, text = make_prior(timesteps=timesteps, sample_timesteps=sample_timesteps), make_text(2, 32)
    sampler = PriorSampler(prior, batch_sizes=(2,), compile=False)
    table, run = sampler.plan.table, dict(timesteps=min(EVALUATIONS, timesteps), solver="sde-dpm++", spacing="logsnr")
    assert (len(table), table.solver, table.spacing) == tuple(run.values())
    wanted = sample(prior, text, cond_scale=3.0, generator=torch.Generator().manual_seed(1), **run)
    assert relative_error(call(sampler, text, cond_scale=3.0), wanted) < TOLERANCE


@pytest.mark.parametrize("given, evaluations, solver, spacing", [
    (dict(timesteps=4), 3, "ddim", None), (dict(timesteps=20), 20, "ddpm", None),
    (dict(solver="dpm++"), 9, "dpm++", "trailing"), (dict(solver="ddim"), 8, "ddim", None),
    (dict(eta=0.5), 8, "ddim", None),
    (dict(solver="sde-dpm++", spacing="karras"), 9, "sde-dpm++", "karras"),
    (dict(solver="sde-dpm++", timesteps=7), 7, "sde-dpm++", "trailing"),
])  # fmt: skip
def test_what_is_given_has_the_defaults_of_the_prior_beside_it(given, evaluations, solver, spacing):
    prior = make_prior(sample_timesteps=9)
    sampler = PriorSampler(prior, compile=False, **given)
    table = sampler.plan.table
    assert (len(table), table.solver, table.spacing) == (evaluations, solver, spacing)
    text, draw = make_text(1, 32), torch.Generator().manual_seed(1)
    wanted = prior.sample(**text, num_samples_per_batch=1, progress=False, generator=draw, **given)
    assert relative_error(call(sampler, text), wanted) < TOLERANCE


def test_best_of_n_as_the_prior_takes_it():
    prior, text = make_prior(), make_text(5, 32)
    sampler = PriorSampler(prior, batch_sizes=(2,), timesteps=6, samples_per_prompt=3, compile=False)
    generator = torch.Generator().manual_seed(1)
    wanted = prior.sample(**text, num_samples_per_batch=3, timesteps=6, generator=generator, progress=False)
    assert relative_error(call(sampler, text), wanted) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("self_cond", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_once_for_all_scales_prompts_and_seeds(dtype, self_cond):
    """Or never, where steps are calls of C."""
    from torch._dynamo.utils import counters

    prior, text = make_prior(dict(dim=64, depth=1, self_cond=self_cond)), make_text(4, 64)
    counters.clear()
    sampler = PriorSampler(prior, batch_sizes=(2, 4), timesteps=8, dtype=dtype)
    assert list(sampler.warmup()) == [2, 4]
    assert bool(counters["stats"].get("unique_graphs")) == (self_cond or cpu_library.unavailable() is not None)
    counters.clear()
    for prompts, scale, seed in ((1, 1.0, 1), (2, 3.0, 2), (3, 1.5, 3), (4, 7.0, 4)):
        got = call(sampler, text, slice(prompts), cond_scale=scale, seed=seed)
        given = {name: t[:prompts] for name, t in text.items()}
        generator = torch.Generator().manual_seed(seed)
        wanted = sample(prior, given, cond_scale=scale, timesteps=8, generator=generator)
        if dtype == torch.float32:
            assert relative_error(got, wanted) < TOLERANCE
        assert torch.cosine_similarity(got, wanted).median() > (0.999 if dtype == torch.bfloat16 else 1 - 1e-6)
    assert not counters["stats"].get("unique_graphs"), "a call after warmup compiled something"
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, self_cond", [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_a_change_of_weights_or_modules_is_served(dtype, self_cond):
    """Guards are not checked at every step, and a 16-bit sampler runs on a copy: both must still notice."""
    prior, text = make_prior(dict(depth=1, self_cond=self_cond)), make_text(2, 32)
    feed_forward = prior.net.causal_transformer.layers[0][1]
    sampler = PriorSampler(prior, batch_sizes=(2,), timesteps=4, dtype=dtype)

    def scale_behind_autograd():
        feed_forward[1].weight.data.mul_(3)

    def replace_a_parameter():
        feed_forward[5].weight = torch.nn.Parameter(feed_forward[5].weight * -2)

    def hook_a_linear():
        feed_forward[1].register_forward_hook(lambda module, args, out: out * 0.1)

    for change in (scale_behind_autograd, replace_a_parameter, hook_a_linear):
        before = call(sampler, text, cond_scale=2.0)
        assert torch.equal(call(sampler, text, cond_scale=2.0), before)
        change()
        after = call(sampler, text, cond_scale=2.0)
        plain = PriorSampler(prior, batch_sizes=(2,), timesteps=4, dtype=dtype, compile=False)
        fresh = call(plain, text, cond_scale=2.0)
        assert relative_error(before, fresh) > 0.02, change
        assert torch.cosine_similarity(after, fresh).min() > 0.995, change
    feed_forward.register_forward_hook(lambda module, args, out: out)
    with pytest.raises(ValueError, match="cannot be served: FeedForward has a forward hook"):
        call(sampler, text)


def test_threads_get_their_own_results():
    prior, text = make_prior(), make_text(8, 32)
    sampler = PriorSampler(prior, batch_sizes=(4,), timesteps=6, compile=False)
    alone = [call(sampler, text, slice(i, i + 1), seed=i, cond_scale=1 + i) for i in range(8)]
    together = at_once(lambda i: call(sampler, text, slice(i, i + 1), seed=i, cond_scale=1 + i), range(8))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


def test_without_a_cpp_compiler_steps_run_eagerly(monkeypatch):
    """What torch.compile would raise at the first call is said once; asked for by name, it is raised."""
    prior, text = make_prior(dict(self_cond=True)), make_text(2, 32)
    options = dict(batch_sizes=(2,), timesteps=4)
    wanted = call(PriorSampler(prior, compile=False, **options), text)
    monkeypatch.setenv("CXX", "no-such-compiler")
    sampler = PriorSampler(prior, **options)
    with pytest.warns(RuntimeWarning, match="run eagerly.*no-such-compiler") as said:
        got = [call(sampler, text) for _ in range(2)]
    assert len(said) == 1 and all(torch.equal(each, wanted) for each in got)


def test_warmup_leaves_the_global_generator_alone():
    sampler = PriorSampler(make_prior(), batch_sizes=(1,), timesteps=4, compile=False)
    before = torch.get_rng_state()
    sampler.warmup()
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_arguments():
    prior, text = make_prior(), make_text(1, 32)
    for kwargs, message in (
        (dict(batch_sizes=()), "batch_sizes=()"),
        (dict(batch_sizes=(0, 2)), "each at least 1"),
        (dict(samples_per_prompt=0), "samples_per_prompt=0; it must be at least 1"),
        (dict(dtype=torch.int8), "dtype=torch.int8; it must be a floating point dtype"),
        (dict(graph_memory=0), "graph_memory=0; it must be None or at least 1 byte"),
        (dict(timesteps=30), "timesteps=30; the schedule has 20"),
        (dict(spacing="logsnr"), "spacing='logsnr'; the ddpm solver has times of its own"),
    ):
        with pytest.raises(ValueError) as error:
            PriorSampler(prior, **kwargs)
        assert message in str(error.value)
    with pytest.raises(ValueError, match="cannot be served by PriorSampler: dropout is active"):
        PriorSampler(make_prior(dict(ff_dropout=0.1)).train())
    with pytest.raises(ValueError, match="cond_scale=2.0; this sampler was built with guidance=False"):
        call(PriorSampler(prior, guidance=False, timesteps=4, compile=False), text, cond_scale=2.0)
    with pytest.raises(ValueError, match="text_encodings=None; this prior is conditioned"):
        PriorSampler(prior, timesteps=4, compile=False)(text["text_embed"])


COPIES = {"deep": copy.deepcopy, "pickled": lambda sampler: pickle.loads(pickle.dumps(sampler))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(dtype=torch.bfloat16),
        dict(quantise="int8"),
        pytest.param(dict(compile=True, self_cond=True), marks=pytest.mark.slow),
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_a_copy_is_of_its_own_prior(options, how):
    """It takes no lock, no compiled step and no address along, and keeps the weights that it was copied with."""
    options = dict(compile=False) | options
    prior, text = make_prior(dict(self_cond=options.pop("self_cond", False))), make_text(2, 32)
    sampler = PriorSampler(prior, batch_sizes=(2,), timesteps=4, **options)
    before = call(sampler, text, cond_scale=2.0)
    copied, quality = COPIES[how](sampler), sampler.quality
    change(prior)
    assert relative_error(call(sampler, text, cond_scale=2.0), before) > 0.02
    for other in (copied, COPIES[how](copied)):  # of one that never ran, too
        assert relative_error(call(other, text, cond_scale=2.0), before) < 1e-6
        assert other.stats()["calls"] == 1 and other.quality == quality
    change(copied.prior)
    assert torch.equal(call(copied, text, cond_scale=2.0), call(sampler, text, cond_scale=2.0))


def change(prior):
    with torch.no_grad():
        for layer in prior.net.causal_transformer.layers:
            layer[0].to_q.weight.mul_(-1)
            layer[1][5].weight.mul_(2)


def test_a_shallow_copy_follows_the_same_prior():
    prior, text = make_prior(), make_text(2, 32)
    sampler = PriorSampler(prior, batch_sizes=(2,), timesteps=4, compile=False, dtype=torch.bfloat16)
    call(sampler, text)
    other = copy.copy(sampler)
    change(prior)
    assert torch.equal(call(sampler, text), call(other, text))


def test_a_copy_captures_its_own_graphs(captured):
    prior, text = make_prior(), make_text(2, 32)
    sampler = with_graphs(prior, batch_sizes=(2,), timesteps=4, compile=False)
    before = call(sampler, text)
    copied = copy.deepcopy(sampler)
    change(prior)
    assert copied.graphs and copied.stats()["graphs"] == 0 and len(captured) == 2
    assert torch.equal(call(copied, text), before) and len(captured) == 4


@pytest.fixture
def captured(monkeypatch):
    """The captures that were made, two for each batch size, and each of 1000 bytes.

    Records are of steps that are not compiled: those of a compiled one would be of what compiling does. What is
    recorded are the reference's operations, so all that they are compared with is the reference's, too.
    """
    made = []
    monkeypatch.setattr(graphs, "capture", lambda *args: made.append(args) or captures.capture(*args))
    with ops.using("reference"):
        yield made


def with_graphs(prior, **kwargs) -> PriorSampler:
    sampler = PriorSampler(prior, **kwargs)
    sampler.graphs = True  # which a CPU has not
    return sampler


class Always(set):
    """Batch sizes that are never forgotten."""

    def clear(self):
        pass


def padding(prior, **kwargs) -> PriorSampler:
    """A sampler that pads as those with graphs do."""
    sampler = PriorSampler(prior, **kwargs)
    sampler._fixed = Always(sampler.batch_sizes)
    return sampler


@pytest.mark.parametrize(
    "options, solver",
    [
        ({}, dict(solver="dpm++")), (dict(self_cond=True), dict(solver="dpm++")),
        (dict(max_text_len=3), dict(solver="sde-dpm++", spacing="logsnr")),
    ],
)  # fmt: skip
def test_graphs_give_the_same_bits(captured, options, solver):
    """Whatever was in the buffers before: other prompts, lengths, scales, seeds, and batches in parts."""
    prior, text = make_prior(options), make_text(11, 32)
    kwargs = dict(batch_sizes=(2, 4), timesteps=6, compile=False, **solver)
    plain, ours = padding(prior, **kwargs), with_graphs(prior, **kwargs)
    for prompts, scale, seed in ((1, 1.0, 1), (4, 3.0, 2), (11, 1.5, 3), (2, 3.0, 4), (1, 1.0, 1)):
        rows, length = slice(11 - prompts, 11), 5 - seed
        given = {"text_embed": text["text_embed"], "text_encodings": text["text_encodings"][:, :length]}
        got, wanted = (call(s, given, rows, seed=seed, cond_scale=scale) for s in (ours, plain))
        assert torch.equal(got, wanted)
    kept = got.clone()
    call(ours, text, slice(1), seed=9)
    assert torch.equal(got, kept), "a result was a buffer, which the next call wrote to"
    assert ours.stats()["graphs"] == 2


def test_rows_of_a_batch_have_scales_of_their_own_in_graphs(captured):
    prior, text, scales = make_prior(), make_text(3, 32), [1.0, 3.0, 1.5]
    sampler = with_graphs(prior, batch_sizes=(4,), timesteps=4, compile=False)
    got = call(sampler, text, cond_scale=scales)
    for row, scale in enumerate(scales):
        assert torch.equal(got[row], call(sampler, text, cond_scale=scale)[row])
    assert len(captured) == 2


def test_graphs_with_conditions(captured):
    specs = dict(score=dict(kind="scalar"), people=dict(kind="category", size=4), style=dict(kind="vector", size=3))
    prior, text = make_prior(dict(conditions=specs)), make_text(3, 32)
    kwargs = dict(batch_sizes=(4,), timesteps=4, compile=False)
    plain, ours = PriorSampler(prior, **kwargs), with_graphs(prior, **kwargs)
    values = dict(score=torch.tensor([1.0, torch.nan, 2]), people=torch.tensor([3, -1, 0]), style=torch.randn(3, 3))
    for names in ((), ("score", "people", "style"), ("people",), ()):
        conditions = {name: values[name] for name in names}
        got, wanted = (call(s, text, conditions=conditions) for s in (ours, plain))
        assert torch.equal(got, wanted), names


def test_graphs_are_captured_again_for_other_weights(captured):
    """Once for the prefill and once for the step; a graph would go on reading the addresses of the weights it saw."""
    prior, text = make_prior(), make_text(2, 32)
    sampler = with_graphs(prior, batch_sizes=(2,), timesteps=4, compile=False)
    before = call(sampler, text, cond_scale=2.0)
    call(sampler, text, seed=2)
    assert len(captured) == 2
    prior.load_state_dict(make_prior(seed=1).state_dict(), assign=True)
    wanted = call(PriorSampler(prior, batch_sizes=(2,), timesteps=4, compile=False), text, cond_scale=2.0)
    got = call(sampler, text, cond_scale=2.0)
    assert torch.equal(got, wanted) and not torch.equal(got, before) and len(captured) == 4


@pytest.mark.slow
def test_other_settings_have_graphs_of_their_own(captured):
    """A forced backend and autocast decide which kernels were recorded."""
    prior, text = make_prior(), make_text(2, 32)
    kwargs = dict(batch_sizes=(2,), timesteps=4, compile=False)
    sampler, plain = with_graphs(prior, **kwargs), PriorSampler(prior, **kwargs)
    call(sampler, text)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(sampler, text), call(plain, text)) and len(captured) == 4
    with ops.using(None):
        call(sampler, text)
    assert torch.equal(call(sampler, text), call(plain, text)) and len(captured) == 6


def test_a_capture_that_fails_is_told_and_done_without(monkeypatch):
    def fail(run, device, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", fail)
    prior, text = make_prior(), make_text(2, 32)
    sampler = with_graphs(prior, batch_sizes=(2,), timesteps=4, compile=False)
    with pytest.warns(UserWarning, match="batch size 2 was not captured as a CUDA graph, .* not permitted"):
        got = call(sampler, text)
    wanted = call(PriorSampler(prior, batch_sizes=(2,), timesteps=4, compile=False), text)
    assert torch.equal(got, wanted) and not sampler.graphs


def test_graphs_need_cuda():
    with pytest.raises(ValueError, match="graphs=True; the prior is on cpu, and CUDA graphs need CUDA"):
        PriorSampler(make_prior(), batch_sizes=(2,), timesteps=4, graphs=True)


def test_stats():
    prior, text = make_prior(), make_text(2, 32)
    sampler = PriorSampler(prior, batch_sizes=(2,), timesteps=4, compile=False, dtype=torch.bfloat16)
    sampler.warmup()
    stats = sampler.stats(bandwidth=1e9)
    assert stats["calls"] == 0 and math.isnan(stats["p50_ms"]) and math.isnan(stats["floor_share"])
    for _ in range(3):
        call(sampler, text)
    stats = sampler.stats()
    transformer = prior.net.causal_transformer
    assert stats["weight_bytes"] == 2 * sum(p.numel() for p in transformer.parameters() if p.ndim == 2)
    assert stats["calls"] == 3 and 0 < stats["p50_ms"] <= stats["p99_ms"] and stats["graph_bytes"] == 0


def test_what_a_step_reads():
    """Keys and values of the prefix, the null ones with them, in fp32; twice as many where guidance needs a branch."""
    text, steps = make_text(3, 32), 7
    for options, dtype, branches in (({}, torch.float32, 1), (dict(self_cond=True), torch.bfloat16, 2)):
        prior = make_prior(options)
        kwargs = dict(timesteps=steps, solver="dpm++", compile=False)
        sampler = PriorSampler(prior, batch_sizes=(1, 4, 16), dtype=dtype, **kwargs)
        assert sampler.stats()["prefix_bytes"] == 0
        call(sampler, text, slice(1))
        call(sampler, text)
        stats = sampler.stats(bandwidth=1e9)
        depth, prefix, dim_head, heads = 2, 7 + 1 + 1, 16, 4
        assert stats["prefix_bytes"] == 2 * depth * 3 * branches * prefix * dim_head * 4
        suffix = prior.net.suffix_tokens
        tables = suffix * heads * (prefix + suffix) + 2 * suffix * dim_head + 32 + 32 + 6
        vectors = depth * 3 * 32 + 32 + 16 // 2  # gains, and the frequencies of the rotary table
        assert stats["table_bytes"] == 4 * tables + dtype.itemsize * vectors, "bias, rotary; time, null prediction, row"
        read = stats["weight_bytes"] + stats["prefix_bytes"] + stats["table_bytes"]
        assert stats["modelled_step_ms"] == pytest.approx(read / 1e6)
        assert stats["launches"] == stats["run_launches"] == 0, "the CPU launches none"
        less = read - stats["prefix_bytes"] * 2 // 3  # of one prompt
        seconds = sum(sampler._engine.clock.calls()[0]) / 1e3
        assert stats["floor_share"] == pytest.approx(steps * (read + less) / 1e9 / seconds)


def test_memory_of_graphs_has_a_limit(captured):
    """The graphs that were not used for longest go, never those in use."""
    prior, text = make_prior(), make_text(4, 32)
    kwargs = dict(batch_sizes=BATCH_SIZES, timesteps=4, compile=False)
    free = with_graphs(prior, **kwargs)
    free.warmup()
    # two texts, three states and a scale of each row, and an index
    buffers = {batch: batch * (32 * (1 + 7 + 3) + 1) * 4 + 8 for batch in BATCH_SIZES}
    assert free.stats()["graph_bytes"] == 3 * 2000 + sum(buffers.values()) and free.stats()["evictions"] == 0
    captured.clear()
    sampler = with_graphs(prior, graph_memory=2 * 2000 + buffers[2] + buffers[4], **kwargs)
    captures = 0
    for prompts, is_new, kept in (
        (1, True, 1), (2, True, 2), (1, False, 2), (4, True, 2), (1, False, 2), (4, False, 2), (2, True, 2),
        (4, False, 2), (1, True, 2),
    ):  # fmt: skip
        got = call(sampler, text, slice(prompts), seed=prompts)
        assert torch.equal(got, call(free, text, slice(prompts), seed=prompts))
        captures += 2 * is_new
        assert len(captured) == captures and sampler.stats()["graphs"] == kept
    assert sampler.stats()["evictions"] == 3 and sampler.stats()["graph_bytes"] <= sampler.graph_memory


def test_graphs_that_are_larger_than_the_limit(captured):
    prior, text = make_prior(), make_text(4, 32)
    kwargs = dict(batch_sizes=BATCH_SIZES, timesteps=4, compile=False)
    sampler, plain = with_graphs(prior, graph_memory=2012 + 11 * 32 * 4, **kwargs), PriorSampler(prior, **kwargs)
    call(sampler, text, slice(1))
    with pytest.warns(
        UserWarning, match=r"batch size 2 runs without graphs: its CUDA graphs take 4832 bytes, and .*=3420"
    ):
        got = call(sampler, text, slice(2))
    assert torch.equal(got, call(plain, text, slice(2)))
    for number in range(3):
        if number == 2:
            prior.load_state_dict(make_prior(seed=1).state_dict())
        for prompts in (1, 2):  # neither another capture nor another warning
            assert torch.equal(call(sampler, text, slice(prompts)), call(plain, text, slice(prompts)))
    assert len(captured) == 6 and sampler.stats()["graphs"] == 1 and sampler.graphs


def test_rows_do_not_depend_on_their_batch():
    """With one draw of noise: whatever is in the other rows, and whatever they are padded to."""
    prior, text = make_prior(), make_text(5, 32)
    others = {name: t.clone() for name, t in text.items()}
    for t in others.values():
        t[1:] = t[1:].flip(0) * 2
    kwargs = dict(timesteps=5, solver="dpm++", compile=False)
    wanted = call(PriorSampler(prior, batch_sizes=(5,), **kwargs), text, cond_scale=2.0)
    assert relative_error(wanted[:1], wanted[1:2]) > 0.1
    for batch_sizes in ((1,), (2, 8), (16,)):
        sampler = PriorSampler(prior, batch_sizes=batch_sizes, **kwargs)
        for prompts in range(1, 6):
            got = call(sampler, text, slice(prompts), cond_scale=2.0)
            assert relative_error(got, wanted[:prompts]) < TOLERANCE
        assert relative_error(call(sampler, others, cond_scale=2.0)[:1], wanted[:1]) < TOLERANCE


@pytest.mark.slow
def test_soak(monkeypatch):
    """With memory for the graphs of two batch sizes of three; functions run again, as records would take a minute."""
    monkeypatch.setattr(graphs, "capture", lambda run, device, pool: (run, None, 1000))
    prior = make_prior(timesteps=20)
    sampler = with_graphs(prior, graph_memory=2 * 2008 + 6 * (11 * 32 + 1) * 4, **OPTIONS)
    soak(prior, sampler, 300)
    stats = sampler.stats()
    assert sampler.graphs and stats["evictions"] > 20 and stats["graphs"] == 2 and stats["calls"] == 300


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
DEVICE_LOST = torch.AcceleratorError("CUDA error: unspecified launch failure")


@pytest.mark.parametrize(
    "error, where, with_graph",
    pairwise(
        error=[OUT_OF_MEMORY, DEVICE_LOST, RuntimeError("device lost")],
        where=["prefill", "first step", "last step", "tables"],
        with_graph=[False, True],
    ),
    ids=lambda value: value if isinstance(value, str) else repr(value),
)
def test_a_run_that_fails_is_told_and_the_next_is_right(error, where, with_graph, monkeypatch):
    """Nothing is left half done: neither in the buffers nor in the tables of new weights."""
    if with_graph:  # functions that run again on the same buffers: in a record no Python would be left to fail
        monkeypatch.setattr(graphs, "capture", lambda run, device, pool: (run, None, 0))
    net = dict(self_cond=where != "tables")  # a state more, or a table
    prior, text = make_prior(net), make_text(3, 32)
    kwargs = dict(batch_sizes=(2,), timesteps=4, compile=False)
    sampler = with_graphs(prior, **kwargs) if with_graph else PriorSampler(prior, **kwargs)
    call(sampler, text)
    prior.load_state_dict(make_prior(net, seed=1).state_dict())
    owner, name = {"prefill": (serving.CachedSteps, "prefill"), "tables": (serving, "CachedSteps")}.get(
        where, (ops, "diffusion_step")
    )
    right, calls = getattr(owner, name), []
    # of two parts with three evaluations each; a prefill that fails while it is captured is done without
    fails_at = {"last step": 6, "prefill": 1 + with_graph}.get(where, 1)

    def fail(*args, **kwargs):
        calls.append(name)
        if len(calls) == fails_at:
            raise error
        return right(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(type(error), match=str(error)):
        call(sampler, text, cond_scale=2.0)
    assert len(calls) == fails_at and not sampler._engine.lock.locked()
    got = call(sampler, text, cond_scale=2.0)
    monkeypatch.undo()
    wanted = call(PriorSampler(prior, **kwargs), text, cond_scale=2.0)
    assert torch.equal(got, wanted) and sampler.graphs == with_graph


def test_a_lost_device_is_told_at_each_call(monkeypatch):
    """By its own error, though no time can be taken of it either."""
    prior, text = make_prior(), make_text(1, 32)
    sampler = PriorSampler(prior, batch_sizes=(1,), timesteps=4, compile=False)
    call(sampler, text)

    def lost(*args):
        monkeypatch.setattr(clock.Clock, "now", lambda clock: (_ for _ in ()).throw(RuntimeError("no event")))
        raise DEVICE_LOST

    monkeypatch.setattr(serving, "run_prior", lost)
    with pytest.raises(torch.AcceleratorError, match="unspecified launch failure"):
        call(sampler, text)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no event"):
            call(sampler, text)
    assert not sampler._engine.lock.locked() and sampler.stats()["calls"] == 1


def test_too_little_memory_for_a_capture(monkeypatch):
    def fail(run, device, pool):
        raise OUT_OF_MEMORY

    monkeypatch.setattr(graphs, "capture", fail)
    prior, text = make_prior(), make_text(2, 32)
    sampler = with_graphs(prior, batch_sizes=(2,), timesteps=4, compile=False)
    with pytest.warns(UserWarning, match="batch size 2 was not captured as a CUDA graph, .* out of memory"):
        got = call(sampler, text)
    wanted = call(PriorSampler(prior, batch_sizes=(2,), timesteps=4, compile=False), text)
    assert torch.equal(got, wanted) and torch.equal(call(sampler, text), wanted)


def test_the_prior_moves():
    """Another dtype is served in the sampler's own; another device is not."""
    prior, text = make_prior(), make_text(2, 32)
    sampler = PriorSampler(prior, batch_sizes=(2,), timesteps=4, compile=False)
    before = call(sampler, text)
    prior.to(torch.bfloat16)
    got = call(sampler, text)
    rounded = prior.to(torch.float32)
    wanted = call(PriorSampler(rounded, batch_sizes=(2,), timesteps=4, compile=False), text)
    assert torch.equal(got, wanted) and not torch.equal(got, before)
    assert torch.equal(call(sampler, text), wanted)
    prior.to("meta")
    with pytest.raises(ValueError, match="the prior is on meta; it must be where it was, on cpu"):
        call(sampler, text)


def test_a_call_under_autocast_rounds_no_other():
    text, options = make_text(1, 32), dict(batch_sizes=(1,), timesteps=4, solver="dpm++", compile=False)
    samplers = [PriorSampler(make_prior(), **options) for _ in range(2)]

    def call(sampler):
        return sampler(**text, cond_scale=2.0, generator=torch.Generator().manual_seed(0))

    with torch.autocast("cpu", torch.bfloat16):
        rounded = call(samplers[0])
    assert torch.equal(call(samplers[0]), call(samplers[1])) and not torch.equal(rounded, call(samplers[1]))
