"""Many requests at once: each has the bits that it has alone, and none suffers from another."""

import random
import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch

from fastprior import weights_locked
from fastprior.engine.steps import Noise
from fastprior.kernels import ops
from fastprior.kernels.cpu import library as cpu_library
from fastprior.serving import row_model
from fastprior.serving.requests import EngineClosed, Events, QueueFull
from fastprior.serving.row_model import Prefixes, best_cap
from fastprior.serving.step_engine import StepEngine
from helpers.priors import make_prior, make_text, relative_error

IN_C = cpu_library.unavailable() is None
WAIT = 60  # seconds, for what should take a part of one
RUNS = (
    dict(), dict(timesteps=16, solver="ddim"), dict(timesteps=9, solver="dpm++"), dict(solver="ddpm"),
    dict(timesteps=7, eta=0.5), dict(timesteps=5, solver="sde-dpm++", spacing="karras"),
)  # fmt: skip
DEFAULT = dict(timesteps=16, solver="sde-dpm++", spacing="logsnr")
TEXT = make_text(12, 32)


def ask(engine, number, **options):
    """Request `number`: one of each text, seed and kind of run."""
    text = number % len(TEXT["text_embed"])
    given = RUNS[number % len(RUNS)] | dict(seed=number, cond_scale=(1.0, 3.0)[number % 2]) | options
    return engine.submit(TEXT["text_embed"][text], TEXT["text_encodings"][text], **given)


def by_itself(prior, number):
    text = slice(number % len(TEXT["text_embed"]), number % len(TEXT["text_embed"]) + 1)
    run, draw = RUNS[number % len(RUNS)] or DEFAULT, torch.Generator().manual_seed(number)
    given = dict(text_embed=TEXT["text_embed"][text], text_encodings=TEXT["text_encodings"][text])
    scale = (1.0, 3.0)[number % 2]
    return prior.sample(**given, num_samples_per_batch=1, progress=False, generator=draw, cond_scale=scale, **run)[0]


class Recorder(Events):
    """What an engine said; `gate` holds it before its next step."""

    def __init__(self):
        self.rows, self.ended, self.prefills, self.hits = [], [], 0, 0
        self.gate, self.reached = threading.Event(), threading.Event()
        self.gate.set()

    def step(self, rows, seconds):
        assert seconds > 0
        self.rows.append(rows)
        self.reached.set()
        assert self.gate.wait(WAIT)

    def prefill(self, prompts, seconds):
        self.prefills += prompts

    def prefix_hit(self):
        self.hits += 1

    def finished(self, outcome, waited, seconds):
        assert 0 <= waited <= seconds
        self.ended.append(outcome)

    def hold(self):
        """From its next step on it waits."""
        self.reached.clear()
        self.gate.clear()


@pytest.mark.parametrize("options", [{}, dict(dtype=torch.bfloat16, alike=True)], ids=["fp32", "bf16"])
def test_requests_have_the_bits_that_they_have_alone(options):
    """Over solvers, lengths, scales and texts, in any company; in fp32 those of a plain call of the prior, too."""
    prior, order = make_prior(), random.Random(0)
    with StepEngine(prior, rows=16, **options) as engine:
        alone = [ask(engine, number).result(WAIT) for number in range(36)]
        for _ in range(4):
            numbers = order.sample(range(36), 36)
            futures = {number: ask(engine, number) for number in numbers}
            for number, future in futures.items():
                assert torch.equal(future.result(WAIT), alone[number])
        stats = engine.stats()
    assert stats["done"] == 36 * 5 and stats["running"] == stats["waiting"] == 0
    if IN_C:
        assert stats["together"] and stats["row_steps"] > 2 * stats["steps"], "rows did not share steps"
    for number in range(len(RUNS)) if not options else ():
        wanted = by_itself(prior, number)
        assert torch.equal(alone[number], wanted) if IN_C else relative_error(alone[number], wanted) < 1e-5


@pytest.mark.parametrize("net", [dict(self_cond=True), dict(num_image_embeds=2), dict(rotary_emb=False)], ids=str)
def test_networks_that_are_not_stepped_together(net):
    prior = make_prior(net)
    with StepEngine(prior, rows=4) as engine:
        futures = [ask(engine, number) for number in range(6)]
        for number, future in enumerate(futures):
            assert relative_error(future.result(WAIT), by_itself(prior, number)) < 1e-5
        assert engine.stats()["together"] is (IN_C and "rotary_emb" in net)


def test_without_kernels():
    prior = make_prior()
    with ops.using("reference"), StepEngine(prior, rows=4) as engine:
        futures = [ask(engine, number) for number in range(3)]
        for number, future in enumerate(futures):
            assert relative_error(future.result(WAIT), by_itself(prior, number)) < 1e-5


def test_extra_conditions():
    specs = dict(score=dict(kind="scalar"), style=dict(kind="vector", size=3))
    prior = make_prior(dict(conditions=specs))
    with StepEngine(prior, rows=4) as engine:
        values = [dict(), dict(score=1.5), dict(score=-1.0, style=torch.ones(3))]
        got = [ask(engine, 0, conditions=given) for given in values]
        got = [future.result(WAIT) for future in got]
        batched = dict(score=torch.tensor([-1.0]), style=torch.ones(1, 3))
        text = {name: t[:1] for name, t in TEXT.items()}
        draw = torch.Generator().manual_seed(0)
        options = dict(num_samples_per_batch=1, progress=False, generator=draw, **DEFAULT)
        wanted = prior.sample(**text, conditions=batched, **options)[0]
        assert relative_error(got[2], wanted) < 1e-5 and not torch.equal(got[0], got[1])
        with pytest.raises(ValueError, match="other"):
            ask(engine, 0, conditions=dict(other=1.0))


def test_the_number_of_rows_is_measured():
    with StepEngine(make_prior()) as engine:
        assert engine.stats()["rows"] == 0
        ask(engine, 0).result(WAIT)
        assert 1 <= engine.stats()["rows"] <= 64 and engine.stats()["step_ms"] > 0
    assert best_cap({1: 1.0, 2: 1.1, 4: 1.3, 8: 2.6}) == 4
    assert best_cap({1: 1.0, 2: 2.1}) == 1
    assert best_cap({1: 1.0, 8: 1.0, 64: 7.7}) == 8


def test_texts_that_were_run_before_are_not_run_again():
    events = Recorder()
    with StepEngine(make_prior(), rows=2, prefixes=1, events=events) as engine:
        for number in (0, 0, 12, 1, 2, 3, 0, 3):
            ask(engine, number).result(WAIT)
        assert (events.prefills, events.hits) == ((5, 3) if IN_C else (8, 0))
        assert engine.stats()["prefix_hits"] == events.hits


def test_places_of_prefixes():
    prefixes = Prefixes(2)
    assert [prefixes.take("a"), prefixes.take("b"), prefixes.take("a")] == [(1, False), (0, False), (1, True)]
    prefixes.release(0)
    assert prefixes.take("c") == (0, False), "b was not in use"
    prefixes.forget("c")
    prefixes.release(1)
    assert prefixes.take("a") == (1, True), "a was still in use"
    assert prefixes.take("b") == (0, False)


def test_requests_join_between_steps_first_in_first_out():
    events = Recorder()
    with StepEngine(make_prior(), rows=2, events=events) as engine:
        events.hold()
        futures = [ask(engine, 0)]
        assert events.reached.wait(WAIT)
        ended = []
        for number in range(1, 4):
            futures.append(ask(engine, 0, timesteps=3, solver="ddim", seed=number))
            futures[-1].add_done_callback(lambda _, number=number: ended.append(number))
        assert engine.stats()["running"] == 1 and engine.stats()["waiting"] == 3
        events.gate.set()
        for future in futures:
            future.result(WAIT)
        assert ended == [1, 2, 3] and events.rows[0] == 1 and max(events.rows) == 2 and events.ended == ["done"] * 4


def test_the_queue_is_limited():
    events = Recorder()
    with StepEngine(make_prior(), rows=1, waiting=2, events=events) as engine:
        events.hold()
        futures = [ask(engine, 0)]
        assert events.reached.wait(WAIT)
        futures += [ask(engine, 0), ask(engine, 1)]
        with pytest.raises(QueueFull, match=r"2 requests wait, which is the limit; try again in \d+\.\d s") as error:
            ask(engine, 2)
        assert 0.1 <= error.value.retry_after < 60
        events.gate.set()
        assert all(future.result(WAIT).isfinite().all() for future in futures)


def test_deadlines_and_cancelled_requests():
    """They leave at the next step, running or waiting; the others go on with the bits that they have alone."""
    prior, events = make_prior(), Recorder()
    with StepEngine(prior, rows=2, events=events) as engine:
        alone = ask(engine, 0).result(WAIT)
        events.hold()
        kept, cancelled = ask(engine, 0), ask(engine, 1)
        assert events.reached.wait(WAIT)
        late, waiting = ask(engine, 2, timeout=0.01), ask(engine, 3)
        assert waiting.cancel() and cancelled.cancel()
        time.sleep(0.02)
        events.gate.set()
        with pytest.raises(TimeoutError, match="past its deadline"):
            late.result(WAIT)
        assert torch.equal(kept.result(WAIT), alone)
        for future in (cancelled, waiting):
            with pytest.raises(CancelledError):
                future.result(WAIT)
        assert ask(engine, 0).result(WAIT).equal(alone)
    assert sorted(events.ended) == ["cancelled"] * 2 + ["done"] * 3 + ["expired"]


def test_a_deadline_while_running():
    events = Recorder()
    with StepEngine(make_prior(), rows=2, events=events) as engine:
        events.hold()
        future = ask(engine, 0, timeout=0.05)
        assert events.reached.wait(WAIT)
        time.sleep(0.06)
        events.gate.set()
        with pytest.raises(TimeoutError):
            future.result(WAIT)
        assert len(events.rows) == 1


class _Broken(Noise):
    """Noise that fails at the second step of one generator."""

    draws = 0

    def __init__(self, *args):
        super().__init__(*args)
        self.breaks = args[-1].initial_seed() == 666

    def __next__(self):
        self.draws += 1
        if self.breaks and self.draws > 2:
            raise RuntimeError("no noise today")
        return super().__next__()


def test_a_poisoned_request_fails_alone(monkeypatch):
    monkeypatch.setattr(row_model, "Noise", _Broken)
    prior, events = make_prior(), Recorder()
    with StepEngine(prior, rows=4, events=events) as engine:
        alone = ask(engine, 2).result(WAIT)
        events.hold()
        first = ask(engine, 0)
        assert events.reached.wait(WAIT)
        wrong = ask(engine, 4, cond_scale=3e38)
        broken = ask(engine, 6, seed=666, **DEFAULT)
        good = ask(engine, 2)
        events.gate.set()
        with pytest.raises(ValueError, match="the embedding of this request is not finite"):
            wrong.result(WAIT)
        with pytest.raises(RuntimeError, match="no noise today"):
            broken.result(WAIT)
        assert first.result(WAIT).isfinite().all() and torch.equal(good.result(WAIT), alone)
    assert sorted(events.ended) == ["done"] * 3 + ["failed"] * 2


def test_what_fails_at_an_end_or_a_start_fails_alone(monkeypatch):
    """No memory for a result, or for what is built of new weights: those that wait are told, and the engine goes on."""
    finish, build = row_model.RowModel.finish, row_model.RowModel.build
    broken = dict(finish=True, build=True)

    def once(name, what):
        def call(*args):
            if broken.pop(name, False):
                raise MemoryError(f"no memory to {name}")
            return what(*args)

        return call

    monkeypatch.setattr(row_model.RowModel, "finish", once("finish", finish))
    monkeypatch.setattr(row_model.RowModel, "build", once("build", build))
    with StepEngine(make_prior(), rows=2) as engine:
        for name in ("build", "finish"):
            with pytest.raises(MemoryError, match=f"no memory to {name}"):
                ask(engine, 0).result(WAIT)
        assert ask(engine, 0).result(WAIT).isfinite().all() and engine.stats()["failed"] == 2


def test_what_listens_can_not_hurt(caplog):
    class Bad(Events):
        def step(self, rows, seconds):
            raise OSError("the disk of the metrics is full")

    with StepEngine(make_prior(), rows=1, events=Bad()) as engine:
        assert ask(engine, 0).result(WAIT).isfinite().all()
    assert "the disk of the metrics is full" in caplog.text


def test_weights_change_between_generations():
    """Rows that run end with the weights that they began with, and those behind them have the new ones."""
    prior, other, events = make_prior(), make_prior(seed=1), Recorder()
    with StepEngine(prior, rows=4, events=events) as engine:
        old = ask(engine, 0).result(WAIT)
        events.hold()
        running = ask(engine, 0)
        assert events.reached.wait(WAIT)
        thread = threading.Thread(target=engine.update, args=(other.state_dict(),))
        thread.start()
        while not _wanted(prior):
            time.sleep(0.001)
        later = [ask(engine, 0), ask(engine, 1)]
        events.gate.set()
        thread.join(WAIT)
        assert torch.equal(running.result(WAIT), old), "a row had some of both weights"
        with StepEngine(other, rows=4) as wanted:
            for number, future in enumerate(later):
                assert torch.equal(future.result(WAIT), ask(wanted, number).result(WAIT))
        assert not torch.equal(later[0].result(), old)
        with weights_locked(prior):
            prior.net.load_state_dict(make_prior().net.state_dict())
        assert torch.equal(ask(engine, 0).result(WAIT), old)
        with pytest.raises(ValueError):
            engine.update({"net.learned_query": torch.zeros(3)})
        assert torch.equal(ask(engine, 0).result(WAIT), old)


def _wanted(prior) -> bool:
    from fastprior.models.weight_lock import lock_of

    return lock_of(prior).is_wanted


def test_closing_drains_or_aborts():
    for drain, outcome in ((WAIT, "done"), (0.0, "failed")):
        events = Recorder()
        engine = StepEngine(make_prior(), rows=1, events=events)
        events.hold()
        futures = [ask(engine, 0), ask(engine, 1)]
        assert events.reached.wait(WAIT)
        closing = threading.Thread(target=engine.close, args=(drain,))
        closing.start()
        while not engine.closed:
            time.sleep(0.001)
        with pytest.raises(EngineClosed, match="the engine was closed"):
            ask(engine, 2)
        events.gate.set()
        closing.join(WAIT)
        assert not closing.is_alive() and events.ended == [outcome] * 2
        for future in futures:
            if drain:
                assert future.result(0).isfinite().all()
            else:
                with pytest.raises(EngineClosed):
                    future.result(0)
        engine.close()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(cond_scale=float("nan")), "cond_scale=nan"), (dict(timesteps=0), "timesteps=0"),
        (dict(timesteps=21), "timesteps=21; the schedule has 20"), (dict(solver="euler"), "solver='euler'"),
        (dict(seed=1.5), "seed=1.5; it must be an integer"), (dict(timeout=0), "timeout=0"),
        (dict(eta=0.5, solver="dpm++"), "eta"),
        (dict(timesteps=1, solver="ddim"), "timesteps=1; ddim makes one evaluation less, so it must be at least 2"),
    ],
)  # fmt: skip
def test_bad_requests(options, message):
    with StepEngine(make_prior(), rows=1) as engine:
        with pytest.raises(ValueError) as error:
            ask(engine, 0, **options)
        assert message in str(error.value)
        assert engine.stats()["waiting"] == engine.stats()["failed"] == 0


def test_bad_texts():
    with StepEngine(make_prior(), rows=1) as engine:
        embed, encodings = TEXT["text_embed"][0], TEXT["text_encodings"][0]
        for text, message in (
            ((embed[None], encodings), r"text_embed is \(1, 32\); it must be a tensor \(dim,\)"),
            ((embed.tolist(), encodings), "text_embed is list"), ((embed, encodings[0]), r"text_encodings is \(32,\)"),
            ((embed, None), "text_encodings=None"), ((embed * torch.nan, encodings), "NaN"),
            ((embed[:5], encodings), r"text_embed has shape \(1, 5\); it must be \(1, 32\) for this network"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                engine.submit(*text)


def test_bad_engines():
    prior = make_prior()
    for options, message in (
        (dict(rows=0), "rows=0"), (dict(rows=65), "rows=65"), (dict(waiting=0), "waiting=0"),
        (dict(prefixes=0), "prefixes=0"),
        (dict(dtype=torch.int8), "dtype=torch.int8"), (dict(timesteps=99), "timesteps=99; the schedule has 20"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            StepEngine(prior, **options)
    with pytest.raises(ValueError, match="prior is a Linear; it must be a DiffusionPrior"):
        StepEngine(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="cannot be served step by step"):
        StepEngine(make_prior(dict(attn_dropout=0.1)).train())
