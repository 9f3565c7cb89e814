"""The quickstart: its data on disk, its tiny CLIP, and a shortened run."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fastprior
from fastprior import DiffusionPrior
from fastprior.demos import digits

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("embedding_reader")
pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState

from fastprior.demos import quickstart
from fastprior.utils import atomic

STEPS, BATCH = 20, 32


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs with one seed, under different thread counts and global random states: (folder, summary)."""
    found = []
    patch = pytest.MonkeyPatch()
    patch.setattr(quickstart, "TIMED_ROUNDS", 1)
    patch.setattr(quickstart, "TIMED_CAPTIONS", 8)
    threads = torch.get_num_threads()
    for index in range(2):
        out = tmp_path_factory.mktemp(f"quickstart{index}") / "out"
        torch.set_num_threads(index + 1)
        torch.manual_seed(index)
        before = torch.get_rng_state()
        found.append((out, quickstart.run(out, steps=STEPS, batch=BATCH, seed=3, progress=False)))
        assert torch.equal(torch.get_rng_state(), before), "the run moved the global random state"
        assert torch.get_num_threads() == index + 1
    torch.set_num_threads(threads)
    patch.undo()
    return found


@pytest.fixture(scope="module")
def pairs(runs):
    return digits.load_pairs(runs[0][0] / "data")


# the tiny CLIP


@pytest.mark.slow
def test_text_encoding_is_the_same_in_every_process():
    code = (
        "from fastprior.demos.digits import DigitsClip as C, PHRASINGS, NUMBERS; import hashlib; c = C();"
        "e = c.embed_text(c.tokenize([p.format(n) for p in PHRASINGS for n in NUMBERS]));"
        "print(*(hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in e))"
    )
    environment = os.environ | dict(PYTHONHASHSEED="0" if os.environ.get("PYTHONHASHSEED") == "12345" else "12345")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True)
    clip = digits.DigitsClip()
    captions = [phrase.format(number) for phrase in digits.PHRASINGS for number in digits.NUMBERS]
    here = clip.embed_text(clip.tokenize(captions))
    assert done.stdout.split() == [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in here]


def test_text_encoding_values_do_not_drift():
    """Trained checkpoints depend on these numbers."""
    clip = digits.DigitsClip()
    embed, encodings = clip.embed_text(clip.tokenize(["a handwritten seven"]))
    assert embed[0, :3].tolist() == pytest.approx([-0.0681677, -0.1171815, -0.0615149], abs=1e-6)
    assert encodings[0, 2, :3].tolist() == pytest.approx([1.1622669, -1.1021026, 0.1187831], abs=1e-6)


def test_text_encoding_pads_with_zeros():
    clip = digits.DigitsClip()
    captions = ["seven", "the digit seven, written by hand"]
    embed, encodings = clip.embed_text(clip.tokenize(captions))
    assert embed.shape == (2, 64) and encodings.shape == (2, 8, 64)
    assert torch.allclose(embed.norm(dim=-1), torch.ones(2))
    real = encodings.ne(0).any(dim=-1)
    assert real.sum(dim=-1).tolist() == [1, 6]
    assert not encodings[~real].any()
    assert 0.7 < encodings[real].std() < 1.3  # the scale that a layer norm would leave
    # the same word at another place differs, and so do digits
    assert not torch.allclose(encodings[0, 0], encodings[1, 2])
    other, _ = clip.embed_text(clip.tokenize(["eight"]))
    assert F.cosine_similarity(embed[:1], other).abs() < 0.5


@pytest.mark.parametrize(
    "first, second", [("A handwritten THREE!", "a handwritten three"), ("the digit 3", "the digit three")]
)
def test_equal_words_have_equal_tokens(first, second):
    clip = digits.DigitsClip()
    assert torch.equal(clip.tokenize([first]), clip.tokenize([second]))


@pytest.mark.parametrize("caption, count", [("", 0), ("?!", 0), ("one two three four five six seven eight nine", 9)])
def test_captions_of_no_or_too_many_words_are_refused(caption, count):
    with pytest.raises(ValueError, match=f"has {count} words; it must have 1 to 8"):
        digits.DigitsClip().tokenize([caption])


def test_digit_of_a_caption():
    for digit, number in enumerate(digits.NUMBERS):
        assert {digits.digit_of(phrase.format(number)) for phrase in digits.PHRASINGS} == {digit}
    for caption in ("a handwritten letter", "one or two"):
        with pytest.raises(ValueError, match="must name exactly one digit"):
            digits.digit_of(caption)


@pytest.mark.slow
def test_prior_takes_captions_through_the_clip(runs):
    prior = fastprior.load(runs[0][0] / "prior.safetensors")
    clip = digits.DigitsClip()
    captions = ["a handwritten two", "handwriting of the number nine"]
    options = dict(num_samples_per_batch=2, timesteps=4, progress=False)
    embed, encodings = clip.embed_text(clip.tokenize(captions))
    expected = prior.sample(
        text_embed=embed, text_encodings=encodings, generator=torch.Generator().manual_seed(0), **options
    )
    prior.clip = clip
    torch.testing.assert_close(
        prior.sample(captions, generator=torch.Generator().manual_seed(0), **options), expected, rtol=0, atol=0
    )


# the data on disk


def test_data_pairs_captions_with_their_images(runs):
    from embedding_reader import EmbeddingReader
    from sklearn.datasets import load_digits

    bundle = load_digits()
    expected = F.normalize(torch.from_numpy(bundle.data).float(), dim=-1)
    folder = runs[0][0] / "data"
    reader = EmbeddingReader(
        embeddings_folder=str(folder / "img_emb"),
        metadata_folder=str(folder / "metadata"),
        file_format="parquet_npy",
        meta_columns=["caption", "image_path"],
    )
    seen = []
    for embeds, meta in reader(batch_size=100, show_progress=False):
        for embed, caption, path in zip(embeds, meta["caption"], meta["image_path"]):
            index = int(path.rpartition("/")[2])
            seen.append(index)
            torch.testing.assert_close(torch.from_numpy(embed), expected[index], rtol=0, atol=1e-6)
            assert digits.NUMBERS[bundle.target[index]] in caption.split(",")[0].split()
    assert sorted(seen) == list(range(1797))
    assert seen != sorted(seen)
    assert len(list((folder / "img_emb").iterdir())) == digits.SHARDS


def test_load_pairs_gives_every_row_its_own(pairs):
    assert len(pairs) == 1797 and pairs.image_embed.dtype == torch.float32
    clip = digits.DigitsClip()
    for digit in range(10):
        captions = [phrase.format(digits.NUMBERS[digit]) for phrase in digits.PHRASINGS]
        known, _ = clip.embed_text(clip.tokenize(captions))
        rows = pairs.text_embed[pairs.digits == digit]
        assert ((rows @ known.T).amax(dim=-1) > 0.999).all()
        assert ((rows @ known.T) > 0.999).any(dim=0).all(), "a phrasing is never used"


@pytest.mark.parametrize("stray", ["img_emb/img_emb_00.npy", "metadata/more/metadata_9.parquet"])
def test_stray_shards_are_refused(tmp_path, stray):
    digits.write_digits(tmp_path, seed=0)
    (tmp_path / stray).parent.mkdir(exist_ok=True)
    (tmp_path / stray).write_bytes(b"")
    with pytest.raises(ValueError, match=Path(stray).name):
        digits.read_digits(tmp_path)
    (tmp_path / stray).unlink()
    (tmp_path / "metadata" / "metadata_1.parquet").unlink()
    with pytest.raises(ValueError, match="it must hold"):
        digits.read_digits(tmp_path)


def test_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with atomic(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["file"]


# a run


def test_run_leaves_whole_files(runs):
    out, summary = runs[0]
    assert {path.name for path in out.iterdir()} == {"data", "digits.png", "metrics.json", "prior.safetensors"}
    assert not list(out.rglob("*.tmp"))
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(summary))
    report = quickstart.report(summary)
    for name, value in summary["metrics"].items():
        assert f"{name} " in report and f"{value:.3f}" in report
    prior = fastprior.load(out / "prior.safetensors")
    assert prior.load_report.metadata["text_encoder"] == "digits"
    assert prior.load_report.metadata["metrics"] == summary["metrics"]
    assert prior.sampling_plan(64).path == "cached" and prior.can_classifier_guidance


def test_run_measures_what_it_says(runs, pairs):
    """Recomputes a few of the metrics from the files alone."""
    out, summary = runs[0]
    metrics = summary["metrics"]
    assert list(metrics) == list(quickstart.METRICS)
    assert all(isinstance(value, float) and value == value and abs(value) < 10 for value in metrics.values())
    prior = fastprior.load(out / "prior.safetensors")
    held_out = pairs[-summary["images"]["held_out"] :]
    assert summary["images"] == dict(training=1438, held_out=359)
    sampled = quickstart.sample(prior, held_out.text_cond, seed=3)
    similarity = F.cosine_similarity(sampled, held_out.image_embed).mean().item()
    assert metrics["similarity with original image"] == pytest.approx(similarity, abs=1e-4)
    unrelated = F.cosine_similarity(sampled[:-1], held_out.text_embed[1:]).mean().item()
    assert metrics["similarity with unrelated caption"] == pytest.approx(unrelated, abs=2e-3)  # leaves the last row out
    assert 0.8 < metrics["similarity of real images of one digit"] < 0.86
    assert metrics["right digit, real"] > 0.95
    assert summary["goal"]["judged"] is False
    loss = summary["curves"]["loss"]
    assert len(loss) == STEPS and sum(loss[-5:]) < 0.8 * sum(loss[:5])
    assert summary["curves"]["similarity"][-1][0] == STEPS


def test_run_compares_the_samplers_honestly(runs, pairs):
    out, summary = runs[0]
    assert [row["cond_scale"] for row in summary["samplers"]["rows"]] == [1.0, 2.0]
    assert summary["samplers"]["agree"]
    for row in summary["samplers"]["rows"]:
        assert row["largest_difference"] <= quickstart.TOLERANCE
        assert row["speedup"] == pytest.approx(row["uncached_s"] / row["cached_s"])
    prior = fastprior.load(out / "prior.safetensors")
    uncached = DiffusionPrior(quickstart.Uncached(prior.net), **prior.config).eval()
    plan = uncached.sampling_plan(64, 2.0)
    assert plan.path == "plain" and plan.guidance == "two passes"
    # the comparison can fail: other weights give other embeddings
    few = pairs[-8:].text_cond
    other = quickstart.make_prior().eval()
    assert (quickstart.sample(prior, few, 0, 8) - quickstart.sample(other, few, 0, 8)).abs().max() > 1e-2


def test_comparison_reports_what_the_clock_and_the_samplers_say(monkeypatch, pairs):
    """With a clock of our own: the fastest of each, and the largest difference between the two."""
    now = [0.0]
    cost = {"cached": iter([5.0, 2.0, 3.0, 1.0, 1.0, 1.0]), "plain": iter([9.0, 8.0, 6.0, 4.0, 5.0, 6.0])}

    def timed_sample(prior, text_cond, seed, cond_scale):
        path = "plain" if isinstance(prior.net, quickstart.Uncached) else "cached"
        now[0] += next(cost[path])
        return torch.full((2, 64), 0.25 if path == "plain" else 0.0)

    monkeypatch.setattr(quickstart, "sample", timed_sample)
    monkeypatch.setattr(quickstart, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    rows = quickstart.compare_samplers(quickstart.make_prior().eval(), pairs[:2], seed=0)
    assert rows == [
        dict(cond_scale=1.0, cached_s=2.0, uncached_s=6.0, speedup=3.0, largest_difference=0.25),
        dict(cond_scale=2.0, cached_s=1.0, uncached_s=4.0, speedup=4.0, largest_difference=0.25),
    ]


def test_run_repeats_itself(runs):
    (first, one), (second, two) = runs
    for key in ("arguments", "images", "metrics", "curves", "goal"):
        assert one[key] == two[key], key
    assert (first / "prior.safetensors").read_bytes() == (second / "prior.safetensors").read_bytes()


def test_figure_shows_different_digits(runs):
    from matplotlib.image import imread

    image = imread(runs[0][0] / "digits.png")
    height, width = image.shape[:2]
    assert height > 500 and width > 1000
    grey = torch.from_numpy(image[..., :3].mean(axis=-1))
    left, right = grey[:, : width // 2], grey[:, width // 2 :]
    assert left.std() > 0.1 and right.std() > 0.05
    assert len(grey.unique()) > 50  # grey pixels of digits, not only lines and text


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(steps=0), "steps=0; it must be at least 1"),
        (dict(batch=-1), "batch=-1; it must be at least 1"),
        (dict(seed=-1), "seed=-1; it must be between"),
    ],
)
def test_run_refuses_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        quickstart.run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_interrupted_run_leaves_no_checkpoint(tmp_path, monkeypatch):
    calls = []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return DiffusionPrior.forward(self, *args, **kwargs)

    make = quickstart.make_prior

    def make_interrupted():
        prior = make()
        prior.__class__ = type("Interrupted", (DiffusionPrior,), {"forward": interrupted})
        return prior

    monkeypatch.setattr(quickstart, "make_prior", make_interrupted)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt, match="no checkpoint was written"):
        quickstart.run(tmp_path, steps=5, batch=4, progress=False)
    assert len(calls) == 3 and torch.get_num_threads() == threads
    assert [path.name for path in tmp_path.iterdir()] == ["data"] and not list(tmp_path.rglob("*.tmp"))


# pictures


def test_terminal_picture_shades(monkeypatch):
    embed = torch.zeros(2, 64)
    embed[0, 0], embed[0, 63], embed[1, 1] = 1.0, 0.5, -1.0
    lines = digits.terminal_picture(embed).split("\n")
    assert len(lines) == 8
    if (sys.stdout.encoding or "").lower().startswith("utf"):
        assert lines[0] == "██" and lines[7] == " " * 14 + "▒▒"
    assert lines[1:7] == [""] * 6

    class Ascii:
        encoding = "ascii"

    monkeypatch.setattr(sys, "stdout", Ascii())
    lines = digits.terminal_picture(embed).split("\n")
    assert lines[0] == "@@" and lines[7] == " " * 14 + "++"
