"""A prior's own runs with CUDA graphs, recorded operations in their place: the bits of runs without, whatever ran."""

import copy
import gc
import pickle
import random
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import fastprior
from fastprior.diffusion.solvers import SPACED, SPACINGS
from fastprior.engine import graphs
from fastprior.kernels import ops
from fastprior.prior import graphs as prior_graphs
from helpers import captures, device_runs
from helpers.at_once import at_once
from helpers.priors import make_prior, make_text, plain

CONDITIONS = dict(score=dict(kind="scalar"), people=dict(kind="category", size=4), style=dict(kind="vector", size=3))
NETWORKS = {
    "default": {},
    "self_cond": dict(self_cond=True),
    "discrete": dict(num_timesteps=20, normformer=True, norm_in=True),
    "conditions": dict(conditions=CONDITIONS, depth=1),
    "many": dict(num_time_embeds=2, num_image_embeds=3, num_text_embeds=2, rotary_emb=False),
}


@pytest.fixture
def captured(monkeypatch):
    """The captures that were made, two for each shape; recorded are the reference's operations, and so all others."""
    made = []
    monkeypatch.setattr(graphs, "capture", lambda *args: made.append(args[1]) or captures.capture(*args))
    with ops.using("reference"):
        yield made


def with_graphs(prior, graphs: bool = True, **attributes):
    """A copy of a prior that a CPU would not give graphs to."""
    prior = copy.deepcopy(prior)
    prior.graphs = graphs
    for name, value in attributes.items():
        setattr(prior, name, value)
    return prior


def without_graphs(prior):
    return with_graphs(prior, False)


def sample(prior, text, seed: int = 1, repeats: int = 1, **kwargs) -> torch.Tensor:
    kwargs = dict(timesteps=6, generator=torch.Generator().manual_seed(seed), progress=False) | kwargs
    shape = len(text["text_embed"]) * repeats, prior.image_embed_dim
    return prior.p_sample_loop(shape, text_cond=text, **kwargs)


def count(prior) -> int:
    return prior_graphs.graphs_of(prior).cache.stats()["graphs"]


def options(choose: random.Random, net: str) -> dict:
    """Arguments of `sample`."""
    prompts = choose.randint(1, 3)
    text = make_text(prompts, 32, length=choose.choice((0, 3, 7, 9)), seed=choose.randrange(99))
    if choose.random() < 0.2:
        del text["text_encodings"]
    if net == "conditions":
        values = dict(
            score=torch.randn(prompts), people=torch.randint(-1, 4, (prompts,)), style=torch.randn(prompts, 3)
        )
        text["conditions"] = {name: values[name] for name in choose.sample(sorted(values), choose.randint(0, 3))}
    solver, steps = choose.choice(
        (("ddpm", 20), ("ddim", 9), ("ddim", 5), ("ddim_trailing", 7), ("dpm++", 8), ("sde-dpm++", 7))
    )
    kwargs = dict(text=text, solver=solver, timesteps=steps, seed=choose.randrange(99), repeats=choose.randint(1, 3))
    kwargs["cond_scale"] = choose.choice((1.0, 1.0, 2.5))
    if solver.startswith("ddim"):
        kwargs["eta"] = choose.choice((0.0, 0.4, 1.0))
    if solver in SPACED:
        kwargs["spacing"] = choose.choice((None, *SPACINGS))
    return kwargs


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [True, None], ids=["at once", "when it comes again"])
@pytest.mark.parametrize("net", NETWORKS)
def test_the_same_bits_and_draws(net, graphs, captured, monkeypatch):
    """Any options, one after the other, by the same graphs; from generators of the caller, and from the global one."""
    if graphs is None:
        monkeypatch.setattr(prior_graphs, "graph_obstacles", lambda prior, *args: ("off",) * (prior.graphs is False))
    choose = random.Random(net)
    prior = make_prior(NETWORKS[net], predict_v=net == "many", clamp="l2" if net == "self_cond" else None)
    prior.init_image_embed_l2norm = prior.sampling_final_clamp_l2norm = net == "discrete"
    ours, other = with_graphs(prior, graphs), without_graphs(prior)
    cases = [options(choose, net) for _ in range(8)]
    for case in cases * 2:
        states = []
        for which in (ours, other):
            own = torch.Generator().manual_seed(case["seed"]) if case["seed"] % 2 else None
            torch.manual_seed(case["seed"])
            result = sample(which, **case | dict(generator=own))
            states.append((result, torch.get_rng_state(), torch.empty(0) if own is None else own.get_state()))
        assert all(map(torch.equal, *states)), case
    assert 2 <= count(ours) == len(captured) / 2 <= 8 and not prior_graphs.graphs_of(ours).cache.failed


@pytest.fixture
def device_runs_made(monkeypatch):
    return device_runs.of_networks(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["default", "discrete", "many", "self_cond"])
def test_runs_of_launches_alone(net, captured, device_runs_made):
    """With graphs and without, any options: the bits and draws of steps one by one, and no graph of a single step.

    Where there is no such run, with self-conditioning, each graph is of a step.
    """
    choose, prior = random.Random(f"runs {net}"), make_prior(NETWORKS[net])
    ours, other, per_shape = with_graphs(prior), without_graphs(prior), 2 if net == "self_cond" else 4
    for _ in range(10):
        case, found = options(choose, net), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fastprior.DiffusionPriorNetwork, "prepare_run", lambda *args, **kwargs: None)
            found.append(sample(other, **case))
        found += [sample(which, **case) for which in (ours, other)]
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]), case
    assert len(captured) == per_shape * count(ours) and not prior_graphs.graphs_of(ours).cache.failed
    assert bool(device_runs_made) == (net != "self_cond")


def test_a_run_serves_all_solvers_and_is_of_new_weights(captured, device_runs_made):
    ours, text = with_graphs(make_prior(timesteps=200)), make_text(2, 32)
    for kwargs in (
        dict(timesteps=64), dict(solver="dpm++"), dict(cond_scale=3.0), dict(eta=0.2), dict(seed=2, timesteps=17),
    ):  # fmt: skip
        assert torch.equal(sample(ours, text, **kwargs), sample(without_graphs(ours), text, **kwargs))
        assert len(captured) == 4
    with torch.no_grad():
        ours.net.learned_query.mul_(-1)
    assert torch.equal(sample(ours, text), sample(without_graphs(ours), text)) and len(captured) == 8
    first, *_, last = [run for run in device_runs_made if run.asked[:2] == ["start", 1]]
    assert first is not last and first.steps == last.steps == 64, "tables are padded"
    ours.graph_memory = 4000
    with pytest.warns(UserWarning, match="a run of 2 rows runs without graphs"):
        got = sample(ours, text, seed=3)
    assert torch.equal(got, sample(without_graphs(ours), text, seed=3))


def test_a_run_that_cannot_be_captured_goes_without(captured, device_runs_made, monkeypatch):
    advance = device_runs.FakeRun.advance
    monkeypatch.setattr(
        device_runs.FakeRun, "advance", lambda run, n: advance(run, n) or (n == 4 and run.index.nonzero())
    )
    ours, text = with_graphs(make_prior()), make_text(2, 32)
    with pytest.warns(UserWarning, match="a run of 2 rows was not captured as a CUDA graph"):
        got = sample(ours, text)
    assert torch.equal(got, sample(without_graphs(ours), text)) and len(captured) == 3


def test_other_methods_and_results_that_stay(captured):
    prior, text = make_prior(), make_text(2, 32)
    ours, other = with_graphs(prior), without_graphs(prior)

    def both(call):
        found = []
        for which in (ours, other):
            torch.manual_seed(3)
            found.append(call(which))
        assert torch.equal(*found)
        return found[0]

    first = both(lambda prior: prior.p_sample_loop_ddpm((2, 32), text))
    kept = first.clone()
    both(lambda prior: prior.p_sample_loop_ddim((2, 32), text, timesteps=9, eta=0.5))
    assert len(captured) == 2 and torch.equal(first, kept), "a result was a buffer, which another run wrote to"
    both(lambda prior: prior.sample(**text, timesteps=7, cond_scale=2.0, progress=False))
    both(lambda prior: prior.sample_batch_size(4, text))
    assert len(captured) == 4
    with torch.inference_mode():
        inside = both(lambda prior: prior.sample(**text, timesteps=7, progress=False))
    outside = both(lambda prior: prior.sample(**text, timesteps=7, progress=False))
    assert torch.equal(inside, outside) and inside.is_inference() and not outside.is_inference()
    with torch.enable_grad():
        assert not sample(ours, text).requires_grad
    prior.train()
    assert ours.train() and torch.equal(sample(ours, text), sample(other.train(), text)) and ours.training


@pytest.mark.slow
def test_a_graph_serves_all_solvers_and_steps(captured):
    ours, text = with_graphs(make_prior(timesteps=200)), make_text(2, 32)
    for kwargs in (
        dict(timesteps=64), dict(solver="dpm++"), dict(solver="sde-dpm++", spacing="logsnr"), dict(cond_scale=3.0),
        dict(eta=0.2), dict(seed=2),
    ):  # fmt: skip
        sample(ours, text, **kwargs)
        assert len(captured) == 2
    for kwargs in (
        dict(timesteps=66), dict(timesteps=200, solver="ddpm"), dict(repeats=2), dict(text=make_text(1, 32)),
        dict(text=make_text(2, 32, length=6)), dict(text={name: t.double() for name, t in text.items()}),
    ):  # fmt: skip
        captured.clear()
        sample(ours, **dict(text=text) | kwargs)
        assert len(captured) == 2, kwargs
    settings = ops.using(None), torch.autocast("cpu", torch.bfloat16)
    for number, setting in enumerate(settings):
        captured.clear()
        with setting:
            sample(ours, text)
        assert len(captured) == 2, number


@pytest.mark.parametrize("change", ["load", "assign", "data", "item", "dtype", "replace", "module", "clamp"])
def test_changed_weights_and_modules_are_captured_again(change, captured):
    """Records go on reading the tensors that they saw, as graphs do: what goes unnoticed gives what was before."""
    prior, text = make_prior(), make_text(2, 32)
    ours, kwargs = with_graphs(prior), dict(cond_scale=2.0)
    before = sample(ours, text, **kwargs)
    assert torch.equal(sample(ours, text, **kwargs), before) and len(captured) == 2
    feed_forward, other = ours.net.causal_transformer.layers[0][1], make_prior(seed=1)
    if change in ("load", "assign"):
        ours.load_state_dict(other.state_dict(), assign=change == "assign")
    elif change == "data":
        feed_forward[1].weight.data.mul_(3)
    elif change == "item":
        with torch.no_grad():
            feed_forward[1].weight[0, 0] += 100
    elif change == "dtype":
        ours.to(torch.bfloat16)
    elif change == "replace":
        feed_forward[5].weight = nn.Parameter(feed_forward[5].weight * 3)
    elif change == "module":
        feed_forward[3] = nn.Tanh()
    else:
        ours.clamp = 0.05
    got = sample(ours, text, **kwargs)
    assert torch.equal(got, sample(without_graphs(ours), text, **kwargs)) and not torch.equal(got, before)
    assert len(captured) == 4 and torch.equal(sample(ours, text, **kwargs), got) and len(captured) == 4
    assert count(ours) == 1 + (change == "clamp")


def test_only_shapes_that_come_again_are_captured(captured, monkeypatch):
    """Or at once, for a run that pays for it; never where weights change before each run."""
    monkeypatch.setattr(prior_graphs, "PAYS_ALONE", 15)
    monkeypatch.setattr(prior_graphs, "graph_obstacles", lambda *args: ())
    prior, one, two = make_prior(), make_text(1, 32), make_text(2, 32)
    for number, (text, kwargs) in enumerate(
        ((one, {}), (two, {}), (one, {}), (one, {}), (two, {}), (make_text(3, 32), dict(timesteps=20)))
    ):
        sample(prior, text, **kwargs)
        assert len(captured) == (0, 0, 2, 2, 4, 6)[number]
    for _ in range(3):
        with torch.no_grad():
            prior.net.learned_query.mul_(0.9)
        sample(prior, one)
    assert len(captured) == 6 and count(prior) == 0
    prior.graph_memory = 1  # nothing stays
    with pytest.warns(UserWarning, match="runs without graphs"):
        for _ in range(2):
            sample(prior, one)
    captured.clear()
    sample(prior, one)
    prior.graph_memory = 2**30
    for made in (0, 2, 2):
        sample(prior, one)
        assert len(captured) == made
    captured.clear()
    monkeypatch.setattr(prior_graphs, "MOST_SHAPES", 2)
    for length in (1, 2, 3, 4, 5, 6, 7, 7):
        sample(prior, make_text(1, 32, length=length))
    assert len(prior_graphs.graphs_of(prior)._seen) <= 2 and len(captured) == 2


def test_memory_has_a_limit(captured):
    """Shapes that were not used for longest go; another limit holds from the next run on."""
    prior, texts = make_prior(), [make_text(prompts, 32) for prompts in (1, 2, 3)]
    ours, other, sizes = with_graphs(prior), without_graphs(prior), []
    for text in texts:
        before = prior_graphs.graphs_of(ours).cache.bytes
        sample(ours, text)
        sizes.append(prior_graphs.graphs_of(ours).cache.bytes - before)
    assert sizes[0] < sizes[1] < sizes[2]
    ours.graph_memory = sizes[1] + sizes[2]
    for at, made, kept in ((2, 0, 2), (1, 0, 2), (0, 2, 2), (1, 0, 2), (2, 2, 2), (1, 0, 2)):
        captured.clear()
        assert torch.equal(sample(ours, texts[at]), sample(other, texts[at]))
        assert len(captured) == made and count(ours) == kept
        assert prior_graphs.graphs_of(ours).cache.bytes <= ours.graph_memory
    ours.graph_memory = sizes[0]
    with pytest.warns(UserWarning, match=r"a run of 3 rows runs without graphs: .* and graph_memory="):
        sample(ours, texts[2])
    captured.clear()
    assert torch.equal(sample(ours, texts[2]), sample(other, texts[2])) and not captured
    assert "those of 3 rows take more than graph_memory" in str(ours.sampling_plan(6, rows=3))
    assert ours.sampling_plan(6, rows=1).graphs
    ours.graph_memory = 0
    with pytest.raises(ValueError, match="graph_memory=0; it must be None or at least 1 byte"):
        sample(ours, texts[0])
    ours.graph_memory = None
    sample(ours, texts[2])
    assert len(captured) == 2


def test_shapes_that_take_turns(captured, monkeypatch):
    """With room for one of two: each must come twice again before it is captured in place of the other."""
    monkeypatch.setattr(prior_graphs, "graph_obstacles", lambda *args: ())
    prior, texts = make_prior(), [make_text(prompts, 32) for prompts in (1, 2)]
    free, made = with_graphs(prior), []
    sample(free, texts[1])
    prior.graph_memory = prior_graphs.graphs_of(free).cache.bytes
    for number in range(12):
        captured.clear()
        sample(prior, texts[number % 2])
        made.append(len(captured) // 2)
        assert count(prior) == min(sum(made), 1)
    assert made == [0, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0], made


@pytest.mark.slow
def test_graphs_go_with_their_prior(captured):
    """And no copy, pickle or state dict knows of them."""
    prior, text = make_prior(), make_text(1, 32)
    ours = with_graphs(prior)
    before = pickle.dumps(ours)
    wanted = sample(ours, text)
    assert len(pickle.dumps(ours)) == len(before) and ours.state_dict().keys() == prior.state_dict().keys()
    twin = copy.deepcopy(ours)
    assert twin.graphs and twin not in prior_graphs._GRAPHS and torch.equal(sample(twin, text), wanted)
    assert count(ours) == count(twin) == 1
    kept = [weakref.ref(prior_graphs.graphs_of(which)) for which in (ours, twin)]
    twin.to("meta")
    gc.collect()
    assert kept[0]() is not None and kept[1]() is None
    del ours
    gc.collect()
    assert kept[0]() is None
    again = pickle.loads(before)
    sample(again, text)
    assert count(again) == 1
    again.graphs = False
    assert torch.equal(sample(again, text), wanted) and again not in prior_graphs._GRAPHS


def test_what_cannot_be_captured_runs_without(monkeypatch):
    """A warning says so once; without a stand-in, as here, because there is no GPU."""
    prior, text = make_prior(), make_text(2, 32)
    ours, wanted = with_graphs(prior), sample(prior, text)
    assert ours.sampling_plan(6).graphs
    with pytest.warns(
        UserWarning, match="a run of 2 rows was not captured as a CUDA graph, .* and CUDA graphs need CUDA"
    ):
        got = sample(ours, text)
    assert torch.equal(got, wanted) and torch.equal(sample(ours, text), wanted)
    assert "no CUDA graphs: a capture failed before" in str(ours.sampling_plan(6))
    monkeypatch.setattr(graphs, "capture", lambda *args: pytest.fail("another capture was tried"))
    assert torch.equal(sample(ours, text, seed=2), sample(prior, text, seed=2))


def test_errors_are_those_of_runs_without(captured):
    ours, text = with_graphs(make_prior(dict(conditions=CONDITIONS))), make_text(2, 32)
    for kwargs in (
        dict(text_embed=torch.zeros(2, 16)), dict(text_encodings=torch.zeros(2, 5, 8)),
        dict(conditions=dict(style=torch.zeros(2, 4))), dict(conditions=dict(other=torch.zeros(2))),
        dict(text_embed=torch.ones(2, 32, dtype=torch.long)),
    ):  # fmt: skip
        errors = []
        for which in (ours, without_graphs(ours)):
            with pytest.raises((TypeError, ValueError)) as error:
                sample(which, text | kwargs)
            errors.append((type(error.value), str(error.value)))
        assert errors[0] == errors[1] and not prior_graphs.graphs_of(ours).cache.failed
    assert torch.equal(sample(ours, text), sample(without_graphs(ours), text))
    sources = prior_graphs.graphs_of(ours)._sources
    assert sources(ours, text | dict(conditions=dict(score=torch.ones(2)))).keys() == {*text, "conditions"}
    assert sources(ours, text | dict(conditions=dict(score=torch.ones(2, device="meta")))) is None


def test_threads_get_their_own_results(captured, monkeypatch):
    ours = with_graphs(make_prior())
    cases = [dict(text=make_text(1 + seed % 3, 32, seed=seed), seed=seed, cond_scale=1.5) for seed in range(6)]
    alone, wrong = [sample(without_graphs(ours), **case) for case in cases], []

    def work(first: int):
        for number in range(8):
            at = (first + number * 5) % len(cases)
            if not torch.equal(sample(ours, **cases[at]), alone[at]):
                wrong.append(at)

    for case in cases:
        sample(ours, **case)
    kept, replayed = list(prior_graphs.graphs_of(ours).cache.kept.values()), []
    for graph in kept:
        monkeypatch.setattr(graph, "_step", lambda right=graph._step: replayed.append(1) or right())
    at_once(work, range(2))
    assert not wrong and len(replayed) == 2 * 8 * 5, "runs wait for each other, none goes without"
    assert count(ours) == len(kept) == 3


def test_a_run_within_a_run(captured, monkeypatch):
    """Such as by what is called between steps: it does not write to the buffers of the other."""
    ours, text = with_graphs(make_prior()), make_text(2, 32)
    wanted, inner = sample(ours, text), []
    (graph,) = prior_graphs.graphs_of(ours).cache.kept.values()
    right = graph._step

    def step():
        if len(inner) < 2:
            inner.append(None)
            inner[-1] = sample(ours, text)
        right()

    monkeypatch.setattr(graph, "_step", step)
    assert torch.equal(sample(ours, text), wanted)
    assert len(inner) == 2 and all(torch.equal(t, wanted) for t in inner)


@pytest.mark.parametrize("where", ["prefill", "step"])
def test_a_run_that_fails_is_told_and_the_next_is_right(where, captured, monkeypatch):
    ours, text = with_graphs(make_prior()), make_text(2, 32)
    wanted = sample(ours, text)
    (graph,) = prior_graphs.graphs_of(ours).cache.kept.values()
    with monkeypatch.context() as patch:
        patch.setattr(graph, f"_{where}", lambda: (_ for _ in ()).throw(RuntimeError("device lost")))
        with pytest.raises(RuntimeError, match="device lost"):
            sample(ours, text, seed=2)
    assert torch.equal(sample(ours, text), wanted) and len(captured) == 2


def test_the_plan_says_so(captured, monkeypatch):
    prior = make_prior()
    ours = with_graphs(prior)
    assert prior.sampling_plan(8).graph_reasons == ("the prior is on cpu",) and not prior.sampling_plan(8).graphs
    assert str(ours.sampling_plan(8)).endswith("3 tokens per step\nreplayed as CUDA graphs")
    for change, reason in (
        (lambda prior: setattr(prior, "graphs", False), "prior.graphs=False"),
        (lambda prior: setattr(prior, "net", plain(prior).net), "the path is plain"),
        (lambda prior: prior.double(), "the state is not fp32"),
        (lambda prior: prior.net.null_text_embeds, None),
        (lambda prior: prior.net.causal_transformer.layers[0][1][1].register_forward_hook(print), "a forward hook"),
        (lambda prior: weight_norm(prior.net.causal_transformer.layers[0][0].to_q), "is not known"),
        (lambda prior: prior.net.causal_transformer.layers[0].__setitem__(1, nn.Sequential()), "the path is plain"),
        (lambda prior: setattr(prior.net, "__class__", type("Own", (fastprior.DiffusionPriorNetwork,), {})), "a Own"),
    ):  # fmt: skip
        changed = copy.deepcopy(ours)
        change(changed)
        plan = changed.sampling_plan(8)
        assert plan.graphs == (reason is None) and (reason is None or reason in " ".join(plan.graph_reasons)), plan
    assert ours.sampling_plan(4).graph_reasons == ("3 steps are too few",) and ours.sampling_plan(5).graphs
    assert "65 rows keep the device busy" in str(ours.sampling_plan(8, rows=65))
    with monkeypatch.context() as patch:
        patch.setattr(fastprior.DiffusionPrior, "device", torch.device("cuda:0"))
        assert prior.sampling_plan(8, rows=2).graphs and not without_graphs(prior).sampling_plan(8).graphs
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert "all modules have a forward hook" in str(ours.sampling_plan(8))
    finally:
        handle.remove()


def test_a_mode_that_follows_operations_sees_them(captured, monkeypatch):
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    ours, text, counted = with_graphs(make_prior()), make_text(1, 32), []
    sample(ours, text)
    (graph,) = prior_graphs.graphs_of(ours).cache.kept.values()
    monkeypatch.setattr(graph, "_step", lambda: pytest.fail("a replay shows it nothing"))
    for which in (ours, without_graphs(ours)):
        with Count() as count:
            sample(which, text)
        counted.append(count.calls)
    assert counted[0] >= counted[1] > 100
