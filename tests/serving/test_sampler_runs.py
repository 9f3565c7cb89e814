"""PriorSampler by runs of launches alone, with graphs of several steps and without: the bits of its single steps."""

import pytest
import torch

from fastprior import PriorSampler
from fastprior.engine import graphs
from fastprior.kernels import ops
from helpers import captures, device_runs
from helpers.priors import make_prior, make_text

KWARGS = dict(batch_sizes=(1, 2), timesteps=22, compile=False)


@pytest.fixture
def captured(monkeypatch):
    """What was captured; the reference's operations are recorded, and so all are the reference's."""
    made = []
    monkeypatch.setattr(graphs, "capture", lambda *args: made.append(args[0]) or captures.capture(*args))
    with ops.using("reference"):
        yield made


def make_sampler(prior, with_graphs: bool = True, **kwargs) -> PriorSampler:
    sampler = PriorSampler(prior, **KWARGS | kwargs)
    sampler.graphs = with_graphs  # which a CPU has not
    return sampler


def call(sampler, text, seed: int = 1, **kwargs) -> torch.Tensor:
    return sampler(**text, generator=torch.Generator().manual_seed(seed), **kwargs)


CALLS = (1, 1.0), (2, 3.0), (5, 1.0), (1, 0.5), (3, 3.0), (1, 1.0)  # prompts, and the scale of guidance


def results(sampler) -> list[torch.Tensor]:
    texts = [make_text(prompts, 32, seed=at) for at, (prompts, _) in enumerate(CALLS)]
    return [call(sampler, text, at, cond_scale=scale) for at, (text, (_, scale)) in enumerate(zip(texts, CALLS))]


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_same_bits(repeats, captured, monkeypatch):
    """Parts of a batch, several samples of a prompt, and guidance that changes from call to call; warm before."""
    prior = make_prior(timesteps=50)
    wanted = results(make_sampler(prior, False, samples_per_prompt=repeats))
    made = device_runs.of_networks(monkeypatch)
    ours = make_sampler(prior, samples_per_prompt=repeats)
    ours.warmup()
    assert len(captured) == 2 * 4 and len(made) == 2 and {len(run.x) for run in made} == {repeats, 2 * repeats}
    for sampler in (ours, make_sampler(prior, False, samples_per_prompt=repeats)):
        assert all(map(torch.equal, results(sampler), wanted))
    assert len(captured) == 8, "of other scales and texts, too"
    assert all(run.scale.eq(run.scale[0]).all() for run in made)


def test_its_launches(captured, monkeypatch):
    device_runs.of_networks(monkeypatch)
    for with_graphs in (True, False):
        sampler = make_sampler(make_prior(timesteps=50), with_graphs)
        call(sampler, make_text(2, 32))
        stats = sampler.stats(bandwidth=1e9)
        assert stats["launches"] == device_runs.FakeRun.launches and stats["run_launches"] == 21 * stats["launches"]
        read = stats["weight_bytes"] + stats["prefix_bytes"] + stats["table_bytes"]
        assert stats["modelled_step_ms"] == pytest.approx(read / 1e6 + stats["launches"] * 1.7e-3)


@pytest.mark.slow
def test_memory_and_new_weights(captured, monkeypatch):
    """With room for one of two batch sizes: the other is captured again, with its run, as it is for other weights."""
    made, prior, texts = (
        device_runs.of_networks(monkeypatch),
        make_prior(timesteps=50),
        [make_text(1, 32), make_text(2, 32)],
    )
    free = make_sampler(prior)
    wanted = [call(free, text) for text in texts]
    memory = free.stats()["graph_bytes"]
    buffers = sum(sum(t.nbytes for t in run.buffers) for run in made)
    assert memory == 2 * 4 * 1000 + 3 * 32 * (1 + 7) * 4 + buffers
    captured.clear()
    sampler = make_sampler(prior, graph_memory=memory - 1)
    for number in (0, 1, 1, 0):
        assert torch.equal(call(sampler, texts[number]), wanted[number])
    assert sampler.stats()["evictions"] == 2 and len(captured) == 3 * 4
    prior.load_state_dict(make_prior(seed=1, timesteps=50).state_dict())
    got = call(sampler, texts[0])
    assert torch.equal(got, call(make_sampler(prior, False), texts[0])) and not torch.equal(got, wanted[0])
