"""The lock of a network's weights: who waits for whom, and that nobody waits for ever."""

import copy
import os
import pickle
import threading
import time
import warnings

import pytest
import torch

import fastprior
from fastprior.models.prior_transformer.as_network import PriorTransformerNet
from fastprior.models.weight_lock import WeightLock, lock_of, weights_locked
from fastprior.serving.prior_sampler import PriorSampler
from helpers.priors import make_prior, make_text
from helpers.storm import make_transformer

LONG, SHORT = 20.0, 0.05  # seconds: of a deadlock, and in which another thread would have got through


class Other(threading.Thread):
    """A thread that does something, notes that it is done, and must end."""

    def __init__(self, work):
        self.error = None
        super().__init__(target=self._run, args=(work,), daemon=True)
        self.start()

    def _run(self, work):
        try:
            work()
        except BaseException as error:
            self.error = error

    def waits(self) -> bool:
        self.join(SHORT)
        return self.is_alive()

    def ends(self) -> bool:
        self.join(LONG)
        return not self.is_alive() and self.error is None


def read(lock):
    with lock:
        pass


def write(lock):
    with lock.writing():
        pass


def wait_until(condition):
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_readers_share_and_a_writer_is_alone():
    lock = WeightLock()
    with lock:
        assert Other(lambda: read(lock)).ends()
        writer = Other(lambda: write(lock))
        assert writer.waits()
    assert writer.ends()
    with lock.writing():
        reader, writer = Other(lambda: read(lock)), Other(lambda: write(lock))
        assert reader.waits() and writer.waits()
    assert reader.ends() and writer.ends()


def test_a_thread_takes_it_again_while_a_writer_waits():
    lock = WeightLock()
    with lock:
        writer = Other(lambda: write(lock))
        assert writer.waits()
        with lock:
            assert Other(lambda: read(lock)).waits()  # behind the writer
        assert writer.waits()
    assert writer.ends()
    with lock.writing(), lock.writing(), lock:
        pass
    assert Other(lambda: write(lock)).ends()


def test_a_writer_among_readers_is_not_starved():
    lock, over = WeightLock(), threading.Event()

    def readers():
        while not over.is_set():
            with lock:
                time.sleep(0.002)

    threads = [Other(readers) for _ in range(4)]
    writers = [Other(lambda: write(lock)) for _ in range(5)]
    ended = [writer.ends() for writer in writers]
    over.set()
    assert all(ended) and all(thread.ends() for thread in threads)


def test_readers_among_writers_are_not_starved():
    lock, over = WeightLock(), threading.Event()

    def writers():
        while not over.is_set():
            with lock.writing():
                time.sleep(0.002)

    threads = [Other(writers) for _ in range(4)]
    ended = [Other(lambda: read(lock)).ends() for _ in range(5)]
    over.set()
    assert all(ended) and all(thread.ends() for thread in threads)


def test_readers_that_write_do_not_wait_for_each_other():
    """As hooks that load weights do it: each waits for the readers that do not."""
    lock, order, inside = WeightLock(), [], threading.Barrier(3)

    def upgrade():
        with lock:
            inside.wait(LONG)
            with lock.writing():
                order.append("written")

    threads = [Other(upgrade), Other(upgrade)]
    with lock:
        inside.wait(LONG)
        assert all(thread.waits() for thread in threads)
        order.append("read")
    assert all(thread.ends() for thread in threads) and order == ["read", "written", "written"]
    assert Other(lambda: write(lock)).ends()


def test_errors_let_it_go():
    lock = WeightLock()
    for side in (lock, lock.writing()):
        with pytest.raises(KeyboardInterrupt), side:
            raise KeyboardInterrupt
    assert Other(lambda: write(lock)).ends()


def test_one_lock_for_all_that_hold_a_network():
    prior, transformer = make_prior(), make_transformer(0)
    assert lock_of(prior) is lock_of(prior.net) is lock_of(fastprior.DiffusionPrior(prior.net, image_embed_dim=32))
    compiled = torch.nn.Module()  # what torch.compile gives holds it by this name
    compiled._orig_mod = prior.net
    assert lock_of(prior) is lock_of(compiled) and lock_of(prior) is not lock_of(transformer)
    net = PriorTransformerNet(transformer)
    assert lock_of(fastprior.DiffusionPrior(net, image_embed_dim=32)) is lock_of(net) is lock_of(transformer)


def test_copies_have_their_own():
    prior = make_prior()
    with weights_locked(prior):
        for other in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
            assert Other(lambda other=other: write(lock_of(other))).ends()


@pytest.mark.parametrize("change", ["load_state_dict", "to", "net.load_state_dict", "net.half"])
def test_changes_wait_for_readers(change):
    prior = make_prior()
    state, owner = prior.state_dict(), prior.net if change.startswith("net.") else prior
    if change.startswith("net."):
        state = prior.net.state_dict()
    given = dict(load_state_dict=(state,), to=(torch.float64,), half=())[change.split(".")[-1]]
    with weights_locked(prior, shared=True):
        thread = Other(lambda: getattr(owner, change.split(".")[-1])(*given))
        assert thread.waits() and prior.net.learned_query.dtype == torch.float32
    assert thread.ends()


def test_a_hook_may_load_weights():
    """In its own call, whose rest has them."""
    prior, other = make_prior(), make_prior(seed=1)
    done = []

    def load(*_):
        if not done:
            done.append(prior.load_state_dict(other.state_dict()))

    prior.net.causal_transformer.layers[0][0].register_forward_hook(load)
    run = dict(text_cond=make_text(2, 32), timesteps=3, progress=False)
    assert Other(lambda: prior.p_sample_loop((2, 32), **run)).ends() and done
    assert torch.equal(prior.net.learned_query, other.net.learned_query)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_of_a_fork_finds_it_free():
    """Another thread held the lock of the weights, or that of a sampler, at that moment: there is none in the child."""
    prior = make_prior()
    sampler, text = PriorSampler(prior, timesteps=3), make_text(1, 32)
    ready, over = threading.Event(), threading.Event()
    wanted = sampler(**text, generator=torch.Generator().manual_seed(0))

    def hold():
        with lock_of(prior).writing(), sampler._engine.lock:
            ready.set()
            over.wait(LONG)

    holder = Other(hold)
    assert ready.wait(LONG)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # python warns of forks among threads
        child = os.fork()
    if child == 0:
        got = sampler(**text, generator=torch.Generator().manual_seed(0))
        os._exit(0 if torch.equal(got, wanted) else 1)
    end, status = time.monotonic() + LONG, (0, 0)
    while status[0] == 0 and time.monotonic() < end:
        status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    over.set()
    if status[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert holder.ends() and status == (child, 0)
