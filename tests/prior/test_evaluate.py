"""Evaluation: metrics that are known in closed form, equal weights for all pairs, and nothing else touched."""

import argparse
import json
import random
import re

import pytest
import torch
from accelerate import Accelerator

import fastprior
from fastprior import DiffusionPrior
from fastprior.checkpoints import dalle2 as checkpoint
from fastprior.cli.evaluate import add_parser
from fastprior.demos import digits
from fastprior.models.dalle2.layers import l2norm
from fastprior.prior import evaluate as module
from fastprior.prior.evaluate import METRICS, RECALL_AT, evaluate, retrieval_ranks
from helpers.priors import make_prior, make_text
from helpers.processes import run_ranks

DIM = 32
STEPS = "[steps=4]"


class Known(DiffusionPrior):
    """Samples what `answer` makes of the text, and has a loss that is the mean of the images' first element."""

    answer = staticmethod(lambda text: text)

    def p_sample_loop(self, shape, text_cond, cond_scale=1.0, timesteps=None):
        return self.answer(text_cond["text_embed"])

    def forward(self, image_embed, text_embed):
        return image_embed[:, 0].mean()


def known(answer=lambda text: text) -> Known:
    net = fastprior.DiffusionPriorNetwork(dim=DIM, depth=1, dim_head=16, heads=2, max_text_len=4)
    prior = Known(net, image_embed_dim=DIM, timesteps=8, condition_on_text_encodings=False)
    prior.answer = answer
    return prior


def pairs(count: int, seed: int = 0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    text, other = (l2norm(torch.randn(count, DIM, generator=draw)) for _ in range(2))
    return dict(text_embed=text, image_embed=l2norm(text + 0.5 * other))


def split(batch: dict, *sizes: int) -> list[dict]:
    return [dict(zip(batch, parts)) for parts in zip(*(value.split(sizes) for value in batch.values()))]


# the metrics


def test_metrics_of_known_embeddings():
    """Text e_i, image e_i turned by 60 degrees into a dimension of its own, sampled: turned by 90 degrees."""
    count = DIM // 2
    text = torch.eye(DIM)[:count]
    away = torch.eye(DIM)[count:]
    image = 0.5 * text + 0.75**0.5 * away
    turned = known(lambda text: 7 * text.roll(count, dims=1))  # the length of an embedding does not matter
    metrics = evaluate(turned, [dict(text_embed=text, image_embed=3 * image)], timesteps=[4])
    expected = {
        "l2-loss": (3 * 0.5) / count,
        f"baseline similarity {STEPS}": 0.5,
        f"similarity with original image {STEPS}": 0.75**0.5,
        f"similarity with text {STEPS}": 0.0,
        f"similarity with unrelated caption {STEPS}": 0.0,
        f"difference from baseline similarity {STEPS}": -0.5,
        f"median rank {STEPS}": 1.0,
        **{f"recall@{k} {STEPS}": 1.0 for k in RECALL_AT},
    }
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert {name.partition(" [")[0] for name in metrics} - {"l2-loss"} == set(METRICS) - {"loss"}


def test_unrelated_caption_is_another_of_the_batch():
    text = torch.eye(DIM)[:4]
    to_next = known(lambda text: text.roll(1, 0))  # each row gets what its neighbour asked for
    metrics = evaluate(to_next, [dict(text_embed=text, image_embed=text)], timesteps=[4])
    assert metrics[f"similarity with text {STEPS}"] == 0
    assert metrics[f"similarity with unrelated caption {STEPS}"] == 0
    back = known(lambda text: text.roll(-1, 0))
    metrics = evaluate(back, [dict(text_embed=text, image_embed=text)], timesteps=[4])
    assert metrics[f"similarity with unrelated caption {STEPS}"] == pytest.approx(1)


@pytest.mark.parametrize("sizes", [(10, 6), (15, 1), (1, 2, 13)], ids=str)
def test_every_pair_weighs_the_same(sizes):
    batch = pairs(16)
    prior = known(lambda text: l2norm(text + 0.3 * text.flip(-1)))
    whole = evaluate(prior, [batch], timesteps=[4, 2])
    parts = evaluate(prior, split(batch, *sizes), timesteps=[4, 2])
    for name in whole:
        if "unrelated" not in name:
            assert parts[name] == pytest.approx(whole[name], abs=1e-6), name
    # of the rows of batches of more than one
    want = [(prior.answer(t).roll(1, 0) * t).sum(dim=1) for t in batch["text_embed"].split(sizes) if len(t) > 1]
    got = parts[f"similarity with unrelated caption {STEPS}"]
    assert got == pytest.approx(torch.cat(want).mean().item(), abs=1e-6)


def test_zeros_count():
    """Half of the similarities are exactly 0, and so is the loss: averages that leave zeros out would be 1 and None."""
    text = torch.eye(DIM)[2:6]
    image = torch.cat([text[:2], torch.eye(DIM)[8:10]])
    metrics = evaluate(known(), [dict(text_embed=text, image_embed=image)], timesteps=[4])
    assert metrics["l2-loss"] == 0
    assert metrics[f"baseline similarity {STEPS}"] == pytest.approx(0.5)


def test_single_pair_has_no_unrelated_caption():
    metrics = evaluate(known(), [pairs(1)], timesteps=[4])
    assert f"similarity with unrelated caption {STEPS}" not in metrics
    assert metrics[f"similarity with text {STEPS}"] == pytest.approx(1)


def test_loss_alone():
    assert list(evaluate(known(), [pairs(3)], timesteps=())) == ["l2-loss"]


# retrieval


@pytest.mark.parametrize("chunk", [2, 100])
def test_ranks(chunk):
    images = torch.eye(6)
    # row i is most similar to image 0, then 1, ...: its own has the rank i + 1
    sampled = torch.arange(6, 0, -1.0).expand(6, 6)
    assert retrieval_ranks(sampled, images, chunk).tolist() == [1, 2, 3, 4, 5, 6]


def test_ties_share_the_mean_rank():
    assert retrieval_ranks(torch.ones(5, 3), torch.ones(5, 3)).tolist() == [3.0] * 5


def test_retrieval_metrics():
    image = torch.eye(DIM)[:10]
    fall = torch.zeros(10, DIM)
    fall[:, :10] = torch.arange(10, 0, -1.0)
    metrics = evaluate(known(lambda text: fall), [dict(text_embed=image, image_embed=image)], timesteps=[4])
    assert [metrics[f"{name} {STEPS}"] for name in ("median rank", "recall@1", "recall@5")] == [5.5, 0.1, 0.5]


def test_gallery_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "RETRIEVAL_PAIRS", 6)
    seen = []
    ranks = module.retrieval_ranks
    monkeypatch.setattr(module, "retrieval_ranks", lambda a, b: seen.append((a, b)) or ranks(a, b))
    batch = pairs(16)
    evaluate(known(), split(batch, 5, 5, 6), timesteps=[4])
    ((sampled, images),) = seen
    assert torch.equal(sampled, batch["text_embed"][:6]) and torch.equal(images, batch["image_embed"][:6])


# several processes


class Rank:
    """An accelerator's view from one of two ranks; the other's tensors were recorded in a run of its own."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, index: int, other: list | None = None):
        self.process_index, self.other, self.sent = index, other, []

    def _exchange(self, tensor):
        self.sent.append(tensor)
        return tensor if self.other is None else self.other[len(self.sent) - 1]

    def unwrap_model(self, model):
        return model

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        theirs = self._exchange(tensor)
        return tensor if self.other is None else tensor + theirs

    def pad_across_processes(self, tensor, dim):
        theirs = self._exchange(tensor)
        return torch.cat([tensor, tensor.new_zeros(max(0, len(theirs) - len(tensor)), *tensor.shape[1:])])

    def gather(self, tensor):
        theirs = self._exchange(tensor)
        if self.other is None:
            return tensor
        if len(theirs) < len(tensor):  # it was recorded without padding
            theirs = torch.cat([theirs, theirs.new_zeros(len(tensor) - len(theirs), *theirs.shape[1:])])
        assert theirs.shape == tensor.shape
        return torch.cat([tensor, theirs] if self.process_index == 0 else [theirs, tensor])


@pytest.mark.parametrize("sizes", [(8, 8), (13, 3), (15, 1), (1, 15)], ids=str)
def test_two_ranks_give_what_one_process_gives(sizes):
    batch = pairs(16)
    prior = known(lambda text: l2norm(text + 0.3 * text.flip(-1)))
    shares = split(batch, *sizes)
    single = evaluate(prior, shares, timesteps=[4, 2])
    alone = [Rank(index) for index in range(2)]
    for rank, share in zip(alone, shares):
        evaluate(prior, [share], timesteps=[4, 2], accelerator=rank)
    for index in range(2):
        rank = Rank(index, alone[1 - index].sent)
        assert evaluate(prior, [shares[index]], timesteps=[4, 2], accelerator=rank) == pytest.approx(single, abs=1e-6)


def measure(folder):
    """Uneven shares, a rank without any pairs among them."""
    prior, accelerator = known(lambda text: l2norm(text + 0.3 * text.flip(-1))), Accelerator(cpu=True)
    results = []
    for shares in ([[0, 1], [2]], [[0, 1, 2], []]):
        batches = split(pairs(16), 5, 4, 7)
        mine = [batches[i] for i in shares[accelerator.process_index]]
        results.append(evaluate(prior, mine, timesteps=[4], accelerator=accelerator))
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(results))


@pytest.mark.slow
def test_two_real_processes(tmp_path):
    """Both get one process's result, under gloo."""
    run_ranks(2, measure, (tmp_path,), tmp_path)
    prior = known(lambda text: l2norm(text + 0.3 * text.flip(-1)))
    single = evaluate(prior, split(pairs(16), 5, 4, 7), timesteps=[4])
    for index in range(2):
        for result in json.loads((tmp_path / f"{index}.json").read_text()):
            assert result == pytest.approx(single, abs=1e-6)


# randomness, modes and paths


def real_batches(prior, sizes=(4, 3)) -> list[dict]:
    text = make_text(sum(sizes), DIM)
    image = l2norm(torch.randn(sum(sizes), DIM, generator=torch.Generator().manual_seed(5)))
    return split(dict(**text, image_embed=image), *sizes)


@pytest.mark.parametrize("self_cond", [False, True])
def test_the_seed_decides_and_the_global_generators_stay(self_cond):
    prior = make_prior(dict(self_cond=self_cond))
    batches = real_batches(prior)
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    first = evaluate(prior, batches, timesteps=[4, 20])
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    torch.manual_seed(2)
    random.seed(2)
    assert evaluate(prior, batches, timesteps=[4, 20]) == first
    other = evaluate(prior, batches, timesteps=[4, 20], seed=1)
    assert other["l2-loss"] != first["l2-loss"]
    assert other[f"similarity with text {STEPS}"] != first[f"similarity with text {STEPS}"]
    # what else is measured does not change a metric
    alone = evaluate(prior, batches, timesteps=[4])
    assert all(first[name] == value for name, value in alone.items())


def test_ranks_draw_different_noise():
    prior, batches = make_prior(), real_batches(None)
    losses = [evaluate(prior, batches, timesteps=(), accelerator=Rank(index))["l2-loss"] for index in range(2)]
    assert losses[0] != losses[1]


def test_the_batches_noise_differs():
    prior = make_prior()
    (batch,) = real_batches(prior, (4,))
    torch.manual_seed(0)
    once, twice = (evaluate(prior, [batch] * times, timesteps=())["l2-loss"] for times in (1, 2))
    assert once != twice


@pytest.mark.parametrize("training", [True, False])
def test_runs_in_eval_mode_and_puts_the_mode_back(training):
    prior = make_prior(dict(attn_dropout=0.5, ff_dropout=0.5)).train(training)
    batches = real_batches(prior)
    metrics = evaluate(prior, batches, timesteps=[4])
    assert prior.training is training
    assert metrics == evaluate(prior.eval(), batches, timesteps=[4])
    prior.train(training)
    with pytest.raises(ValueError):
        evaluate(prior, [{}], timesteps=())
    assert prior.training is training


def test_samples_by_the_cached_path_and_without_gradients(monkeypatch):
    from fastprior.prior import loop

    monkeypatch.setattr(loop, "_plain_step", None)
    prior = make_prior()
    metrics = evaluate(prior, real_batches(prior), timesteps=[4], cond_scale=2.0)
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
    assert all(parameter.grad is None for parameter in prior.parameters())


def test_the_loss_is_that_of_training():
    prior = make_prior(cond_drop_prob=0.0)
    batch = pairs(2000)
    batch["text_encodings"] = torch.zeros(2000, 1, DIM)
    loss = evaluate(prior, [batch], timesteps=())["l2-loss"]
    torch.manual_seed(3)
    with torch.no_grad():
        assert prior(**batch).item() == pytest.approx(loss, rel=0.1)


class Clip(torch.nn.Module):
    def tokenize(self, captions):
        return torch.tensor([[len(caption)] for caption in captions])

    def embed_text(self, tokens):
        return torch.eye(DIM)[tokens[:, 0]], None


def test_captions_are_embedded_by_the_clip():
    prior = known()
    prior.clip = Clip()
    image = torch.eye(DIM)[[3, 4]]
    metrics = evaluate(prior, [dict(text=["abc", "abcd"], image_embed=image)], timesteps=[4])
    assert metrics[f"baseline similarity {STEPS}"] == 1


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches holds no pairs"),
        ([dict(text_embed=torch.ones(2, DIM))], "a batch has the keys ['text_embed']; it must have an image_embed"),
        ([dict(text_embed=torch.ones(2, DIM), image_embed=torch.ones(2, 5))], "an image_embed of shape (2, 5)"),
        ([dict(text_embed=torch.ones(2, DIM), image_embed=torch.ones(4, DIM))], "4 images and 2 texts"),
        ([dict(image_embed=torch.ones(2, DIM))], "exactly one of text and text_embed"),
    ],
    ids=["none", "no images", "width", "rows", "no text"],
)
def test_batches_that_do_not_fit(batches, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(known(), batches, timesteps=[4])


@pytest.mark.parametrize("options", [dict(timesteps=[9]), dict(cond_scale=2.0, timesteps=[4])], ids=str)
def test_arguments_are_checked_before_data_is_read(options):
    def untouched():
        raise AssertionError
        yield

    with pytest.raises(ValueError, match=next(iter(options)).removesuffix("s")):
        evaluate(known(), untouched(), **options)


# the command


def parse(*argv: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["evaluate", *map(str, argv)])


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """The digits' shards, and a prior that knows how to encode their captions."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits")
    digits.write_digits(folder, seed=0)
    net = dict(dim=digits.DIM, depth=1, dim_head=16, heads=2, max_text_len=digits.MAX_WORDS)
    prior = make_prior(net, timesteps=8)
    checkpoint.save(prior, folder / "prior.safetensors", metadata={"text_encoder": digits.NAME})
    return folder


def test_command(digits_run, tmp_path, capsys):
    folder, out = digits_run, tmp_path / "metrics.json"
    args = parse(
        "--checkpoint", folder / "prior.safetensors", "--images", folder / "img_emb", "--captions", folder / "metadata",
        "--timesteps", 4, 8, "--max-pairs", 100, "--batch-size", 64, "--out", out, "--device", "cpu",
    )  # fmt: skip
    assert args.run(args) == 0
    report = json.loads(out.read_text())
    prior = checkpoint.load(folder / "prior.safetensors")
    image, captions = digits.read_digits(folder)
    prior.clip = digits.DigitsClip()
    batches = [dict(image_embed=image[rows], text=captions[rows]) for rows in (slice(0, 64), slice(64, 100))]
    assert report["pairs"] == 100 and report["metrics"] == pytest.approx(evaluate(prior, batches, timesteps=[4, 8]))
    printed = capsys.readouterr().out
    assert printed.startswith("100 pairs, model weights of ") and "cos(sampled, original image)" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "either --captions or --texts"),
        (["--captions", "c", "--texts", "t"], "either --captions or --texts"),
        (["--captions", "c", "--encodings", "e"], "--encodings goes with --texts"),
        (["--captions", "c", "--clip-model", "m"], "--clip-model and --clip-pretrained"),
        (["--captions", "c", "--max-pairs", 0], "--max-pairs 0: it must be at least 1"),
        (["--captions", "c", "--timesteps", 4, 0], "--timesteps 0: it must be at least 1"),
        (["--captions", "c", "--cond-scale", "nan"], "--cond-scale nan: it must be finite"),
        (["--captions", "c", "--out", "/no/such/folder/x.json"], "its folder does not exist"),
        (["--texts", "t"], "is conditioned on text encodings: give --encodings"),
    ],
)
def test_command_errors(digits_run, argv, message):
    args = parse("--checkpoint", digits_run / "prior.safetensors", "--images", digits_run / "img_emb", *argv)
    with pytest.raises((ValueError, OSError), match=message):
        args.run(args)
