"""Runs of launches alone, as `run_table` and graphs of several steps take them: the bits of plain steps."""

import gc
import itertools
import random
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fastprior.diffusion import solvers
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.diffusion.schedule import NoiseScheduler
from fastprior.diffusion.solvers import StepTable
from fastprior.engine import graphs, runs
from fastprior.engine.steps import Noise, StepInputs, bind, run_table, solver_step
from fastprior.kernels import ops
from helpers import captures
from helpers.device_runs import FakeRun

ROWS, DIM = 3, 8
REPLAYS = {1: [1], 4: [4], 16: [16], 25: [16, 4, 4, 1], 63: [16] * 3 + [4] * 3 + [1] * 3}


def make_table(count: int, seed: int = 0, draws: bool = True) -> StepTable:
    """Any coefficients; about a third of the steps draw no noise, and have none."""
    choose = random.Random(seed)
    rows = torch.rand(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    draws = tuple(draws and choose.random() < 0.7 for _ in range(count))
    rows[:, 5] *= torch.tensor(draws)
    return StepTable("any", tuple(range(count)), rows, draws)


def predict(cond, x, x0, index):
    """Depends on all that a step has: the condition, the state, the step before, and the number of the step."""
    pred = torch.tanh(x * cond["text"] + x0 + cond["times"].index_select(0, index))
    return pred, pred - 1


STEP = solver_step(predict, "range", 3.0)


def make_sources(table: StepTable, seed: int = 0, rows: int = ROWS, length: int | None = None) -> dict:
    """A text, and the padded tables of a run, as a prefill takes them."""
    draw = torch.Generator().manual_seed(seed)
    tables = dict(times=torch.tensor(table.times).float()[:, None] / 9, rows=table.rows.float())
    tables = {name: graphs.padded_table(t) if length is None else t for name, t in tables.items()}
    return dict(text=torch.randn(rows, DIM, generator=draw)) | tables


def prefill(sources: dict) -> StepInputs:
    return StepInputs(dict(text=sources["text"] * 2, times=sources["times"] + 1), sources["rows"])


def plain(table: StepTable, seed: int = 0, scale: float = 2.0, rows: int = ROWS) -> torch.Tensor:
    """The run without graphs, and without a run that keeps its state."""
    inputs, noise = prefill(make_sources(table, seed, rows)), Noise((rows, DIM), torch.device("cpu"), generator(seed))
    return run_table(table, bind(STEP, inputs, torch.tensor(scale)), next(noise), noise)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_graph(table: StepTable, made: list, rows: int = ROWS, seed: int = 9, **kwargs) -> graphs.StepGraph:
    """Graphs of a run, captured behind another text than any that is asked for."""

    def run(inputs: StepInputs) -> FakeRun:
        assert all(t.isfinite().all() for t in (*inputs.cond.values(), inputs.rows)), "the prefill has not run"
        made.append(FakeRun(STEP, inputs, rows, DIM))
        return made[-1]

    sources = make_sources(table, seed, rows, **kwargs)
    return graphs.StepGraph(prefill, STEP, sources, (rows, DIM), len(sources["rows"]), run=run)


def replayed(graph: graphs.StepGraph, table: StepTable, seed: int = 0, scale=2.0, rows: int = ROWS, **kwargs):
    noise = Noise((rows, DIM), torch.device("cpu"), generator(seed))
    bound = graph.begin(make_sources(table, seed, rows, **kwargs), scale)
    return run_table(table, bound, next(noise), noise).clone()


@pytest.fixture
def captured(monkeypatch):
    """What was captured, and what was replayed: "prefill", "step", or so many steps of a run."""
    made, replays = [], []

    def capture(run, device, pool, *warmups):
        what = run.args[0] if isinstance(run, partial) else run.__name__.removeprefix("run_")
        made.append(what)
        replay, pool, grown = captures.capture(run, device, pool, *warmups)
        return lambda: replays.append(what) or replay(), pool, grown

    monkeypatch.setattr(graphs, "capture", capture)
    return made, replays


@pytest.mark.parametrize("count", REPLAYS)
def test_a_run_is_replays_of_few_graphs(count, captured):
    """Whatever the padded table, which the graph is captured for, holds behind the steps of the run."""
    table, made, (caught, replays) = make_table(count), [], captured
    graph = make_graph(table, made)
    assert caught == ["prefill", 1, 4, 16] and [*reversed(caught[1:])] == [*runs.GRAPH_STEPS]
    replays.clear()
    assert torch.equal(replayed(graph, table), plain(table))
    assert replays == ["prefill", *REPLAYS[count]] and len(made) == 1
    assert made[0].asked[-1] == "start", "steps are replays alone"


@pytest.mark.parametrize("count, sizes", [(1, [1]), (3, [1]), (5, [1, 4]), (16, [1, 4, 16])])
def test_no_graph_holds_more_steps_than_the_run(count, sizes, captured):
    table = make_table(count)
    graph = make_graph(table, [], length=count)
    assert captured[0] == ["prefill", *sizes]
    for _ in range(2):  # the counter of a run that was whole is 0 again
        assert torch.equal(replayed(graph, table, length=count), plain(table))


def test_graphs_serve_runs_of_other_lengths(captured):
    """Also those that one before it left in the middle of its table, with its noise, its text and its guidance."""
    made, choose = [], random.Random(0)
    graph = make_graph(make_table(63, 5), made)
    for number in range(12):
        count = choose.choice((1, 4, 5, 16, 25, 63, 64))
        table, scale = make_table(count, number, draws=number % 3 > 0), choose.choice((1.0, 2.5))
        assert torch.equal(replayed(graph, table, number, scale), plain(table, number, scale)), (count, number)
    assert len(captured[0]) == 4


def test_a_run_that_was_given_up_leaves_no_trace(captured):
    graph, table = make_graph(make_table(40), []), make_table(40, 1)

    def failing():
        yield from itertools.islice(Noise((ROWS, DIM), torch.device("cpu"), generator(3)), 14)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_table(table, graph.begin(make_sources(table, 7), 9.0), torch.full((ROWS, DIM), torch.nan), failing())
    assert torch.equal(replayed(graph, table, 2), plain(table, 2))


def test_several_shapes_take_turns(captured):
    table = make_table(21)
    shapes = {rows: make_graph(table, [], rows) for rows in (1, 2, 5)}
    for number, rows in enumerate((5, 1, 2, 1, 5)):
        assert torch.equal(replayed(shapes[rows], table, number, rows=rows), plain(table, number, rows=rows))


def test_guidance_of_each_row(captured):
    """A number and a 0-d tensor are of all rows; graphs do not hold it."""
    table, scales = make_table(9), (1.0, 2.5, 0.0)
    graph = make_graph(table, [])
    wanted = torch.stack([plain(table, scale=scale)[row] for row, scale in enumerate(scales)])
    assert torch.equal(replayed(graph, table, scale=torch.tensor(scales)), wanted)
    for scale in (2.5, torch.tensor(2.5)):
        assert torch.equal(replayed(graph, table, scale=scale), plain(table, scale=2.5))


def test_seeds_of_each_row(captured):
    table, cpu = make_table(19), torch.device("cpu")
    graph, draws = make_graph(table, []), lambda seeds: Noise((len(seeds), DIM), cpu, [*map(generator, seeds)])
    noise = draws([4, 5, 6])
    got = run_table(table, graph.begin(make_sources(table), 2.0), next(noise), noise)
    inputs = prefill(make_sources(table))
    for row, seed in enumerate((4, 5, 6)):
        own, alone = inputs._replace(cond=inputs.cond | dict(text=inputs.cond["text"][row : row + 1])), draws([seed])
        assert torch.equal(got[row], run_table(table, bind(STEP, own, torch.tensor(2.0)), next(alone), alone)[0])


@pytest.mark.parametrize("of_a_run", [True, False], ids=["run", "step"])
def test_memory(of_a_run, captured):
    """All buffers count, are kept from other streams, and go with the graphs, at once."""
    made, table = [], make_table(9)
    sources = make_sources(table)
    graph = graphs.StepGraph(prefill, STEP, sources, (ROWS, DIM), 64) if not of_a_run else make_graph(table, made)
    bytes, kept = sum(t.nbytes for t in sources.values()), [weakref.ref(graph), *map(weakref.ref, made)]
    if of_a_run:
        assert graph.bytes == 4 * 1000 + bytes + 4 * ROWS * DIM * (64 + 2) + ROWS * (4 + 8)
        assert {id(t) for t in graph._buffers} >= {id(t) for t in made[0].buffers}
    else:
        assert graph.bytes == 2 * 1000 + bytes + 4 * ROWS * DIM * 3 + 4 + 8
    cache = graphs.GraphCache(None)
    cache.kept[1] = graph
    run_table(table, graph.begin(sources, 2.0), torch.zeros(ROWS, DIM), Noise((ROWS, DIM), torch.device("cpu")))
    del graph
    made.clear()
    gc.disable()  # what is in a cycle would hold its memory until it runs
    try:
        cache.limit(1)
        assert not any(ref() for ref in kept) and cache.evictions == 1
    finally:
        gc.enable()


@pytest.mark.parametrize("fails", ["prepare", 1, 4, 16])
def test_captures_that_fail(fails, captured):
    """A warning, nothing that stays, and no other capture: runs go on without."""

    class Refused(FakeRun):
        def advance(self, count):
            super().advance(count)
            if count == fails:
                self.index.nonzero()

    def run(inputs):
        if fails == "prepare":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Refused(STEP, inputs, ROWS, DIM)

    cache, table = graphs.GraphCache(None), make_table(5)
    sources = make_sources(table)
    what = partial(graphs.StepGraph, prefill, STEP, sources, (ROWS, DIM), len(sources["rows"]), run=run)
    with pytest.warns(UserWarning, match="three rows was not captured as a CUDA graph, all runs go on without"):
        assert cache.get(1, "three rows", what) is None
    assert cache.failed and not cache.kept and cache.get(2, "two", lambda: pytest.fail("another capture")) is None


@pytest.mark.parametrize("made", [None, SimpleNamespace(x=None, steps=9, start=print)], ids=["none", "in C"])
def test_without_such_a_run_a_graph_is_one_step(made, captured):
    table, (caught, replays) = make_table(9), captured
    sources = make_sources(table)
    graph = graphs.StepGraph(prefill, STEP, sources, (ROWS, DIM), len(sources["rows"]), run=lambda inputs: made)
    assert caught == ["prefill", "step"]
    replays.clear()
    assert torch.equal(replayed(graph, table), plain(table)) and replays == ["prefill", *["step"] * 9]


def test_captured_in_inference_mode(captured):
    table = make_table(6)
    with torch.inference_mode():
        graph = make_graph(table, [])
    assert torch.equal(replayed(graph, table), plain(table))


@pytest.mark.parametrize("count", [1, 16, 25])
def test_run_table_without_graphs(count):
    """In as few calls, each behind the noise of its steps and of no others, which is drawn in their order."""
    table, drawn = make_table(count), []
    run = FakeRun(STEP, prefill(make_sources(table)), ROWS, DIM, 2.0)
    noise = Noise((ROWS, DIM), torch.device("cpu"), generator(0))
    x = next(noise)
    assert torch.equal(run_table(table, run, x, map(lambda t: drawn.append(t) or t, noise)), plain(table))
    assert run.asked == ["start", *[16] * (count // 16), *[count % 16] * (count % 16 > 0)]
    at = [index for index, draws in enumerate(table.draws_noise) if draws]
    assert len(drawn) == len(at) and all(map(torch.equal, drawn, run.noise[at]))


def test_progress_is_shown_where_asked(capsys):
    table = make_table(25)
    for progress in (False, True):
        run = FakeRun(STEP, prefill(make_sources(table)), ROWS, DIM)
        run_table(table, run, torch.zeros(ROWS, DIM), Noise((ROWS, DIM), torch.device("cpu")), progress)
        shown = capsys.readouterr().err
        assert (" 25/25 " in shown) == progress and (shown != "") == progress


def test_steps_that_there_are_not():
    run = FakeRun(STEP, prefill(make_sources(make_table(4))), ROWS, DIM)
    replay = runs.ReplayedRun(run, {4: print, 1: print})
    for first, count in ((-1, 1), (63, 2), (64, 1), (0, 65)):
        with pytest.raises(IndexError, match=f"steps {first} to {first + count - 1}; there are 64"):
            replay(first, [None] * count)


def test_which_runs_there_are():
    """What keeps its state is no step, and what graphs take is more; replays are no more than a run."""
    run = FakeRun(STEP, prefill(make_sources(make_table(4))), ROWS, DIM)
    assert isinstance(run, runs.DeviceRun) and isinstance(run, runs.Run)
    replay = runs.ReplayedRun(run, {})
    assert isinstance(replay, runs.Run) and not isinstance(replay, runs.DeviceRun) and replay.launches == run.launches
    assert isinstance(ops.Run(None, torch.zeros(1), torch.zeros(1), None, 4), runs.Run)
    for step in (STEP, bind(STEP, prefill(make_sources(make_table(4))), torch.tensor(1.0)), print):
        assert not isinstance(step, runs.Run)
    assert sorted(runs.GRAPH_STEPS, reverse=True) == [*runs.GRAPH_STEPS] and runs.GRAPH_STEPS[-1] == 1


def test_steps_that_draw_no_noise_have_none():
    """A run leaves there what it holds, and multiplies it."""
    schedule = NoiseScheduler(beta_schedule="cosine", timesteps=50, loss_type="l2")
    tables = [
        solvers.step_table(schedule, solver, 50 if solver == "ddpm" else steps, eta=eta)
        for solver in solvers.SOLVERS
        for steps in (1, 7, 50)
        for eta in ((0.0, 0.4, 1.0) if solver in solvers.STOCHASTIC else (None,))
    ]
    for kind in ("UnCLIPScheduler", "DDPMScheduler", "DDIMScheduler", "HeunDiscreteScheduler"):
        tables.append(DiffusersSchedule(kind, prediction_type="sample").table(9))
    for table in tables:
        assert not table.rows[~torch.tensor(table.draws_noise, dtype=torch.bool), 5].any(), table
