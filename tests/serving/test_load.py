"""Load: requests come when they come, and what they took counts from then."""

import threading
import time
from concurrent.futures import Future

import pytest
import torch

from fastprior.serving.load import Ask, Batches, asks, offer, one_by_one
from fastprior.serving.prior_sampler import PriorSampler
from helpers.priors import make_prior, make_text, relative_error


def answered(result=None, error=None) -> Future:
    future: Future = Future()
    future.set_exception(error) if error else future.set_result(result)
    return future


def test_requests_come_at_their_rate_whatever_the_server_is_at():
    """A server that answers nothing before the last request came does not slow the others."""
    came, futures = [], []

    def submit(ask):
        came.append(time.perf_counter())
        futures.append(Future())
        if len(futures) == 100:
            for future in futures:
                future.set_result(None)
        return futures[-1]

    measured = offer(submit, asks(100, [1]), rate=500.0)
    assert len(measured.latencies) == 100 and not measured.refused and measured.rate == 500
    assert 0.08 < came[-1] - came[0] < 0.6, "100 requests at 500 per second"
    gaps = [b - a for a, b in zip(came, came[1:])]
    assert max(gaps) > 3 * sorted(gaps)[50], "they come evenly, which users do not"
    waited = measured.latencies
    assert waited[0] > waited[50] > waited[99] >= 0 and waited[0] >= came[-1] - came[0]
    assert measured.percentile(50) <= measured.percentile(95) <= measured.percentile(99) <= waited[0]


def test_a_late_sender_counts_as_waiting():
    def submit(ask):
        time.sleep(0.02)  # a server whose door is slow
        return answered()

    measured = offer(submit, asks(10, [1]), rate=1e6)
    assert measured.latencies[-1] > 0.15 and measured.throughput < 60


def test_what_is_refused_is_counted():
    def submit(ask):
        if ask.number % 4 == 0:
            raise BufferError
        return Future() if ask.number == 7 else answered(error=KeyError() if ask.number % 4 == 1 else None)

    measured = offer(submit, asks(8, [1]), rate=1e4, patience=0.05)
    assert measured.refused == {"BufferError": 2, "KeyError": 2, "TimeoutError": 1} and len(measured.latencies) == 3


def test_requests_are_the_same_ones_each_time():
    first = asks(200, [16, 63], [0.7, 0.3], texts=8)
    assert first == asks(200, [16, 63], [0.7, 0.3], texts=8) and first[9].text == 1
    assert 0.6 < sum(ask.timesteps == 16 for ask in first) / 200 < 0.8


def test_one_by_one():
    running = threading.Semaphore(1)

    def submit(ask):
        assert running.acquire(blocking=False)
        future: Future = Future()
        future.add_done_callback(lambda _: running.release())
        threading.Timer(0.01, future.set_result, (None,)).start()
        return future

    times = one_by_one(submit, asks(3, [1]))
    assert len(times) == 3 and min(times) >= 0.009


@pytest.mark.parametrize("most", [1, 4])
def test_batches(most, monkeypatch):
    """The answers of a sampler, of those that wait together and have equally many steps."""
    prior, text, ran = make_prior(), make_text(4, 32), []
    call = PriorSampler.__call__

    def noticed(self, **given):
        ran.append((len(given["text_embed"]), self._run_options["timesteps"]))
        return call(self, **given)

    monkeypatch.setattr(PriorSampler, "__call__", noticed)
    batches = Batches(prior, text, 2.0, most, window=0.2, solver="ddim")
    futures = [batches.submit(Ask(n, steps, n)) for n, steps in enumerate((5, 9, 5, 5))]
    batches.close()
    assert ran == ([(3, 5), (1, 9)] if most == 4 else [(1, 5), (1, 9), (1, 5), (1, 5)])
    for number, (future, steps) in enumerate(zip(futures, (5, 9, 5, 5))):
        sampler = PriorSampler(prior, timesteps=steps, solver="ddim", compile=False)
        one = {name: t[number : number + 1] for name, t in text.items()}
        assert relative_error(future.result(0)[None], sampler(**one, cond_scale=2.0, generator=[number])) < 1e-5
    failing = Batches(prior, {"text_embed": torch.zeros(1, 3)}, 1.0, most)
    future = failing.submit(Ask(0, 5, 0))
    with pytest.raises(ValueError):
        future.result(30)
    failing.close()
