"""Rows of several samples, which share time tokens: the same predictions as where each sample has its own."""

from collections.abc import Sequence

import pytest
import torch

from fastprior import DiffusionPrior, DiffusionPriorNetwork, PriorSampler, PriorTransformer
from fastprior.engine import graphs
from fastprior.kernels import ops
from fastprior.kernels.gpu import decode
from fastprior.models import shared_rows
from fastprior.models.prior_transformer.as_network import PriorTransformerNet
from helpers import captures

NETWORKS = {
    "plain": {},
    "two-time-tokens": dict(num_time_embeds=2, num_image_embeds=2),
    "self-cond": dict(self_cond=True),
    "continuous": dict(num_timesteps=None),
    "no-rotary": dict(rotary_emb=False, cosine_sim=False, norm_in=True),
}
TRANSFORMERS = {
    "prd": {},
    "no-prd": dict(added_emb_type=None, additional_embeddings=3),
    "norm-in": dict(norm_in_type="layer"),
}
STEPS = 5
TIMES = torch.tensor([900, 600, 300, 100, 0])  # of a transformer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def network(dtype=torch.float64, **kwargs) -> DiffusionPriorNetwork:
    options = dict(dim=32, depth=3, heads=2, dim_head=16, num_timesteps=STEPS, max_text_len=6, normformer=True)
    return DiffusionPriorNetwork(**options | kwargs).to(dtype).eval()


def transformer(dtype=torch.float64, **kwargs) -> PriorTransformer:
    options = dict(num_attention_heads=2, attention_head_dim=16, num_layers=3, embedding_dim=32, num_embeddings=6)
    prior = PriorTransformer(**options | kwargs).to(dtype).eval()
    torch.nn.init.normal_(prior.positional_embedding)
    return prior


def check_steps(
    model, cond, x, samples: int, tolerance: float, others: tuple = (), steps: Sequence[int] = range(STEPS)
) -> None:
    """Steps with and without `share`."""
    shared = model.share(cond, samples)
    for number in steps:
        index = torch.tensor(number)
        wanted = model.step(x, index, cond, *others)
        got = model.step(x, index, shared, *others)
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max(), number
        other = model.step(x, (index + 1) % STEPS, shared, *others)
        assert (other - wanted).abs().max() > 100 * tolerance * wanted.abs().max(), number


@pytest.mark.parametrize(
    "samples, suffix, shared, in_a_row",
    [
        (1, 3, 1, 1),
        (2, 3, 1, 2),
        (4, 3, 1, 4),
        (7, 3, 1, 7),  # 15 tokens
        (8, 3, 1, 4),  # 17 would be too many
        (11, 3, 1, 1),
        (4, 4, 1, 4),
        (4, 6, 2, 2),
        (15, 2, 1, 15),
        (3, 12, 1, 1),  # one sample may be of any length
        (3, 20, 1, 1),
    ],
)
def test_layout(samples, suffix, shared, in_a_row):
    assert shared_rows.MAX_TOKENS <= decode.MAX_SUFFIX
    found = shared_rows.row_layout(samples, suffix, shared, torch.device("cpu"))
    if in_a_row == 1:
        assert found is None
        return
    own = suffix - shared
    assert found.samples == in_a_row and len(found.tokens) == shared + in_a_row * own <= shared_rows.MAX_TOKENS
    middle = [(sample, shared + at) for sample in range(in_a_row) for at in range(own - 1)]
    last = [(sample, suffix - 1) for sample in range(in_a_row)]
    tokens = [(None, at) for at in range(shared)] + middle + last
    assert found.tokens.tolist() == [at for _, at in tokens]
    for row, (sample, at) in zip(found.hidden.tolist(), tokens):
        assert row == [other > at or of not in (None, sample) for of, other in tokens]


@pytest.mark.parametrize("samples", [2, 3, 4, 6])
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
@torch.no_grad()
def test_steps_of_a_network(options, samples):
    net = network(**options)
    times = torch.arange(STEPS) if net.num_timesteps else torch.rand(STEPS)
    prompts, x = torch.randn(2, 32).double(), torch.randn(2 * samples, 32).double()
    encodings = torch.randn(2, 4, 32).double()
    others = (torch.randn(2 * samples, 32).double(),) if net.self_cond else ()
    check_steps(net, net.prefill(prompts, encodings, times), x, samples, 1e-12, others)
    null = net.prefill(prompts, encodings, times, null_rows=2)
    twice = tuple(t.repeat(2, 1) for t in (x, *others))
    check_steps(net, null, twice[0], samples, 1e-12, twice[1:])


@pytest.mark.parametrize("samples", [2, 4])
@pytest.mark.parametrize("texts", [(0, 1), (1, 0, 1, 1), (1, 1, 0, 0)], ids=str)
@pytest.mark.parametrize("options", TRANSFORMERS.values(), ids=TRANSFORMERS)
@torch.no_grad()
def test_steps_of_a_transformer(options, texts, samples):
    prior, texts = transformer(**options), torch.tensor(texts)
    embeds, encodings = torch.randn(2, 32).double(), torch.randn(2, 6, 32).double()
    mask = torch.ones(2, 6).double()
    mask[1, 3:] = 0
    cond = prior.prefill(embeds[texts], encodings[texts], mask[texts], TIMES)
    check_steps(prior, cond, torch.randn(samples * len(texts), 32).double(), samples, 1e-12)


@torch.no_grad()
def test_steps_of_a_transformer_in_a_prior():
    net = PriorTransformerNet(transformer())
    text = torch.randn(2, 32).double(), torch.randn(2, 6, 32).double()
    for null_rows in (0, 2):
        cond = net.prefill(*text, TIMES, null_rows)
        check_steps(net, cond, torch.randn(3 * (2 + null_rows), 32).double(), 3, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "reference", "triton"])
@pytest.mark.parametrize("make", [network, transformer])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
@torch.no_grad()
def test_steps_in_fp32(make, backend):
    """Also by kernels."""
    model, x = make(torch.float32), torch.randn(6, 32)
    times = torch.arange(STEPS) if make is network else TIMES
    text = torch.randn(2, 32), torch.randn(2, 6, 32)
    with ops.using(backend):
        given = (*text, times) if make is network else (*text, torch.tensor([[1.0] * 6, [1.0] * 2 + [0.0] * 4]), times)
        check_steps(model, model.prefill(*given), x, 3, 2e-6, steps=[2])


@pytest.fixture
def shared(monkeypatch) -> list[int]:
    """Samples of a row, one entry for each run in which it holds several."""
    runs, share = [], DiffusionPriorNetwork.share

    def watch(net, cond, samples):
        cond = share(net, cond, samples)
        runs.extend([cond.cache.samples] * (cond.cache.samples > 1))
        return cond

    monkeypatch.setattr(DiffusionPriorNetwork, "share", watch)
    return runs


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++", "sde-dpm++"])
@pytest.mark.parametrize("self_cond", [False, True], ids=["", "self-cond"])
def test_runs(solver, self_cond, shared, monkeypatch):
    """Several samples of a prompt: the embeddings of runs where each has its own time tokens, guided ones too."""
    prior = DiffusionPrior(
        net=network(torch.float32, self_cond=self_cond), image_embed_dim=32, timesteps=STEPS, cond_drop_prob=0.1,
        condition_on_text_encodings=False,
    ).eval()  # fmt: skip
    text = dict(text_embed=torch.nn.functional.normalize(torch.randn(2, 32), dim=-1))
    timesteps = STEPS if solver == "ddpm" else STEPS - 1

    def run(rows: int, scale: float) -> torch.Tensor:
        options = dict(timesteps=timesteps, solver=solver, generator=torch.Generator().manual_seed(0), progress=False)
        return prior.p_sample_loop((rows, 32), text, scale, **options)

    for scale in (1.0, 3.0):
        got = run(6, scale)
        assert shared == [3]
        with monkeypatch.context() as without:
            without.setattr(shared_rows, "MAX_TOKENS", 0)
            wanted = run(6, scale)
        assert shared == [3]
        shared.clear()
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    run(2, 1.0)
    assert not shared


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_best_of_4_by_a_sampler(compile, shared):
    net = network(torch.float32)
    prior = DiffusionPrior(net=net, image_embed_dim=32, timesteps=STEPS, condition_on_text_encodings=False).eval()
    text = torch.nn.functional.normalize(torch.randn(3, 32), dim=-1)
    options = dict(timesteps=STEPS - 1, solver="ddim")
    fast = PriorSampler(prior, batch_sizes=(1, 4), samples_per_prompt=4, compile=compile, **options)
    got = fast(text, generator=torch.Generator().manual_seed(0))
    assert shared == [4]
    noise = torch.Generator().manual_seed(0)
    rows = prior.p_sample_loop((12, 32), dict(text_embed=text), generator=noise, progress=False, **options)
    wanted = prior.best_of(rows.view(3, 4, 32), text)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert torch.equal(got, fast(text, generator=torch.Generator().manual_seed(0)))


def test_by_graphs(shared, monkeypatch):
    """What is recorded of a prefill lays rows out, too."""
    monkeypatch.setattr(graphs, "capture", captures.capture)
    prior = DiffusionPrior(
        net=network(torch.float32), image_embed_dim=32, timesteps=STEPS, condition_on_text_encodings=False
    ).eval()
    options = dict(batch_sizes=(2,), samples_per_prompt=3, timesteps=STEPS - 1, solver="ddim", compile=False)
    plain, ours = PriorSampler(prior, **options), PriorSampler(prior, **options)
    ours.graphs = True
    with ops.using("reference"):  # which is what is recorded, too
        for seed in range(3):
            text = torch.nn.functional.normalize(torch.randn(2, 32), dim=-1)
            got, wanted = (s(text, generator=torch.Generator().manual_seed(seed)) for s in (ours, plain))
            assert torch.equal(got, wanted)
    assert ours.graphs and ours.stats()["graphs"] == 1 and len(shared) > 3
