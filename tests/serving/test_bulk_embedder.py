"""Rows of a bulk run: each depends on its text and its name alone, bad ones are named or NaN, and files are whole."""

import errno

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import fastprior
from fastprior.dataloaders.files import ShardError
from fastprior.serving.bulk import Embedder, Manifest, Options, embed_shards, find_shards, row_seed, share_of
from helpers.bulk_cases import DIM, SIZES, entry, images, write_caption_files, write_npy, written
from helpers.priors import WordClip, make_prior
from helpers.shard_cases import captions_of, rows_of, write_captions


@pytest.fixture(scope="module")
def prior():
    return make_prior(condition_on_text_encodings=False)


@pytest.fixture
def source(tmp_path):
    return write_npy(tmp_path / "in")


def run(prior, source, out, part=(1, 1), batch_size=64, on_bad="error", shards=None, **options):
    """Embed a folder's shards: what was done."""
    shards = find_shards(source) if shards is None else shards
    embedder = Embedder(prior, Options(**dict(saved="float32") | options), batch_size=batch_size, on_bad=on_bad)
    embedder.check(shards)  # before the folder is bound to options
    manifest = Manifest(out, embedder.run(shards))
    return embed_shards(embedder, share_of(shards, *part), manifest)


def test_rows_are_those_of_the_sampler_with_the_seed_of_their_names(prior, source, tmp_path):
    assert run(prior, source, tmp_path / "out", seed=5) == (3, 110, 0, 0)
    found = images(tmp_path / "out")
    assert {name: array.shape for name, array in found.items()} == {
        f"img_emb_{number:02}.npy": (count, DIM) for number, count in SIZES.items()
    }
    sampler = fastprior.PriorSampler(prior)
    for number, row in ((0, 0), (2, 49), (10, 7)):
        text = torch.from_numpy(rows_of(number, SIZES[number], DIM, salt=1)[row : row + 1]).float()
        wanted = sampler(text, generator=[row_seed(5, f"text_emb_{number:02}.npy", row)])[0].numpy()
        got = found[f"img_emb_{number:02}.npy"][row]
        assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()  # another batch: rounding of fp32


def test_batch_sizes_and_parts_change_nothing(prior, source, tmp_path):
    run(prior, source, tmp_path / "whole", timesteps=4)
    whole = images(tmp_path / "whole")
    for number, batch_size in enumerate((5, 50)):
        out = tmp_path / f"out-{number}"
        shards = [run(prior, source, out, (part, 2), batch_size, timesteps=4).shards for part in (2, 1)]
        assert shards == [1, 2]
        found = images(out)
        assert found.keys() == whole.keys()
        for name, rows in found.items():
            np.testing.assert_allclose(rows, whole[name], rtol=0, atol=1e-6 * np.abs(whole[name]).max())


def test_other_seeds_names_and_options_give_other_rows(prior, source, tmp_path):
    run(prior, source, tmp_path / "one", timesteps=4)
    run(prior, source, tmp_path / "other", seed=1, timesteps=4)
    (source / "text_emb/text_emb_02.npy").rename(source / "text_emb/other_02.npy")
    run(prior, source, tmp_path / "renamed", timesteps=4)
    one, other, renamed = (images(tmp_path / name)["img_emb_02.npy"] for name in ("one", "other", "renamed"))
    assert not np.isclose(one, other).any(axis=1).all() and not np.isclose(one, renamed).any(axis=1).all()
    run(prior, source, tmp_path / "half", saved="float16", timesteps=4)
    np.testing.assert_array_equal(images(tmp_path / "half")["img_emb_02.npy"], renamed.astype(np.float16))


def test_seeds_tell_rows_apart_and_stay_as_they_are():
    seeds = {row_seed(*name) for name in ((0, "a", 1), (0, "a", 11), (1, "a", 1), (0, "a1", 1), (0, "a", 1, 1))}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(0, "text_emb_0.npy", 0) == 7643617802700818316  # results of earlier releases


def test_best_of_several(prior, source, tmp_path):
    run(prior, source, tmp_path / "one")
    run(prior, source, tmp_path / "best", samples_per_prompt=3)
    text = rows_of(2, SIZES[2], DIM, salt=1).astype(np.float32)
    likeness = {}
    for name in ("one", "best"):
        rows = images(tmp_path / name)["img_emb_02.npy"]
        likeness[name] = (rows * text).sum(axis=1) / np.linalg.norm(rows, axis=1)
    assert likeness["best"].mean() > likeness["one"].mean() and (likeness["best"] >= likeness["one"] - 1e-3).all()


def test_captions_by_the_clip_of_the_prior(tmp_path):
    prior = make_prior(clip=WordClip(), image_embed_dim=None)
    source = write_caption_files(tmp_path / "in", {3: 9})
    assert run(prior, source, tmp_path / "out", batch_size=4) == (1, 9, 0, 0)
    embed = prior.clip.embed_text(prior.clip.tokenize(captions_of(3, 9)))
    seeds = [row_seed(0, "captions_03.parquet", row) for row in range(9)]
    wanted = fastprior.PriorSampler(prior)(embed.text_embed, embed.text_encodings, generator=seeds).numpy()
    np.testing.assert_allclose(images(tmp_path / "out")["img_emb_03.npy"], wanted, rtol=0, atol=1e-5)


def test_text_encodings(tmp_path):
    prior, source = make_prior(), write_npy(tmp_path / "in", {4: 6}, metadata=False)
    encodings = np.random.default_rng(0).standard_normal((6, 5, DIM)).astype(np.float32)
    (tmp_path / "enc").mkdir()
    np.save(tmp_path / "enc/enc_4.npy", encodings)
    with pytest.raises(ShardError, match="text_emb_04.npy: has no text encodings"):
        run(prior, source, tmp_path / "out")
    shards = find_shards(source, encodings=tmp_path / "enc")
    run(prior, source, tmp_path / "out", shards=shards)
    text = torch.from_numpy(rows_of(4, 6, DIM, salt=1)).float()
    seeds = [row_seed(0, "text_emb_04.npy", row) for row in range(6)]
    wanted = fastprior.PriorSampler(prior)(text, torch.from_numpy(encodings), generator=seeds).numpy()
    np.testing.assert_allclose(images(tmp_path / "out")["img_emb_04.npy"], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value, fault", [(np.nan, "not finite"), (np.inf, "not finite"), (0, "of norm 0")])
def test_bad_rows_are_named_or_skipped(prior, source, tmp_path, value, fault):
    run(prior, source, tmp_path / "good", batch_size=8)
    path = source / "text_emb/text_emb_02.npy"
    rows = np.load(path)
    rows[17] = value
    rows[49, 3] = value or rows[49, 3]
    np.save(path, rows)
    with pytest.raises(ShardError, match=rf"text_emb_02.npy: row 17 is {fault}"):
        run(prior, source, tmp_path / "out", batch_size=8)
    assert not (tmp_path / "out/img_emb/img_emb_02.npy").exists() and (tmp_path / "out/img_emb/img_emb_00.npy").exists()
    bad = [17] + [49] * (value != 0)
    assert run(prior, source, tmp_path / "out", batch_size=8, on_bad="skip") == (2, 73, len(bad), 1)
    found, wanted = (images(tmp_path / name)["img_emb_02.npy"] for name in ("out", "good"))
    assert np.flatnonzero(np.isnan(found).all(axis=1)).tolist() == bad
    kept = np.isfinite(found).all(axis=1)
    np.testing.assert_allclose(found[kept], wanted[kept], rtol=0, atol=1e-5)
    assert entry(tmp_path / "out")["bad_rows"] == len(bad) and entry(tmp_path / "out")["first_bad_rows"] == bad
    with pytest.raises(ShardError, match="row 17"):  # NaN is not what is wanted now
        run(prior, source, tmp_path / "out", batch_size=8)


def test_rows_that_are_missing_and_pages_that_are_corrupt(prior, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    rows = list(rows_of(2, 50, DIM).astype(np.float32))
    table = pa.table(dict(embedding=pa.array([*rows[:20], None, *rows[21:]])))
    pq.write_table(table, source / "part_02.parquet", use_dictionary=False, compression="none")
    with pytest.raises(ShardError, match="part_02.parquet: row 20 is missing, of another width, or not finite"):
        run(prior, source, tmp_path / "out")
    assert run(prior, source, tmp_path / "out", on_bad="skip") == (1, 50, 1, 0)
    data = bytearray((source / "part_02.parquet").read_bytes())
    data[4:60] = bytes(56)  # of the first page's header
    (source / "part_02.parquet").write_bytes(data)
    with pytest.raises(ShardError, match="part_02.parquet: cannot be read"):
        run(prior, source, tmp_path / "other", on_bad="skip")


class SpoilingClip(WordClip):
    """It encodes captions that begin with "bad" as NaN, those that begin with "zero" as 0."""

    def tokenize(self, texts):
        self.values = [dict(bad=torch.nan, zero=0.0).get(text.partition(" ")[0]) for text in texts]
        return super().tokenize(texts)

    def embed_text(self, text):
        embedded = super().embed_text(text)
        for row, value in enumerate(self.values):
            if value is not None:
                embedded.text_embed[row] = value
        return embedded


@pytest.mark.parametrize(
    "spoilt, fault",
    [
        (None, "is missing"),
        ("bad caption", "is encoded by the CLIP as what is not finite, or of norm 0"),
        ("zero caption", "is encoded by the CLIP as what is not finite, or of norm 0"),
    ],
)
def test_captions_that_are_missing_or_that_the_clip_spoils(tmp_path, spoilt, fault):
    prior, source = make_prior(clip=SpoilingClip(), image_embed_dim=None), tmp_path / "in"
    captions = captions_of(3, 9)
    source.mkdir()
    write_captions(source / "captions_03.parquet", captions)
    run(prior, source, tmp_path / "good", batch_size=4)
    write_captions(source / "captions_03.parquet", [*captions[:5], spoilt, *captions[6:8], spoilt])
    with pytest.raises(ShardError, match=f"captions_03.parquet: row 5 {fault}; --on-bad skip writes NaN"):
        run(prior, source, tmp_path / "out", batch_size=4)
    assert run(prior, source, tmp_path / "out", batch_size=4, on_bad="skip") == (1, 9, 2, 0)
    found, wanted = (images(tmp_path / name)["img_emb_03.npy"] for name in ("out", "good"))
    kept = np.isfinite(found).all(axis=1)
    assert np.flatnonzero(~kept).tolist() == [5, 8] and np.isnan(found[~kept]).all()
    np.testing.assert_allclose(found[kept], wanted[kept], rtol=0, atol=1e-5)


def test_results_that_are_not_finite_are_bad(source, tmp_path):
    broken = make_prior(condition_on_text_encodings=False)
    embedder = Embedder(broken, Options(), on_bad="error")
    embedder.sampler = lambda text_embed, **_: torch.full((len(text_embed), DIM), torch.nan)
    shards, manifest = find_shards(source), Manifest(tmp_path / "out", {})
    with pytest.raises(ShardError, match="row 0 is embedded as what is not finite"):
        embedder.embed(shards[0], manifest)
    embedder.sampler = lambda text_embed, **_: torch.linalg.inv(torch.zeros(2, 2))
    with pytest.raises(ShardError, match="text_emb_00.npy: rows 0 to 36 cannot be embedded"):
        embedder.embed(shards[0], manifest)


@pytest.mark.parametrize("saved, value", [("float32", np.inf), ("float16", 1e5)], ids=["inf", "beyond-fp16"])
def test_results_that_are_partly_not_finite_are_wholly_nan(prior, source, tmp_path, saved, value):
    embedder = Embedder(prior, Options(saved=saved), on_bad="skip")
    shards = find_shards(source)
    manifest = Manifest(tmp_path / "out", embedder.run(shards))

    def sampler(text_embed, **_):
        rows = torch.ones(len(text_embed), DIM)
        rows[4, 3] = value
        return rows

    embedder.sampler = sampler
    assert embedder.embed(shards[0], manifest)["first_bad_rows"] == [4]
    rows = images(tmp_path / "out")["img_emb_00.npy"]
    assert np.isnan(rows[4]).all() and (np.delete(rows, 4, axis=0) == 1).all()


def test_shards_of_other_widths_are_refused(prior, source, tmp_path):
    np.save(source / "text_emb/text_emb_10.npy", np.ones((23, 16), np.float32))
    with pytest.raises(ShardError, match="text_emb_10.npy: rows are 16 wide; this prior takes text_embed of 32"):
        run(prior, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_empty_shards_stay_empty(prior, tmp_path):
    source = write_npy(tmp_path / "in", {1: 0, 2: 3})
    assert run(prior, source, tmp_path / "out") == (2, 3, 0, 0)
    assert images(tmp_path / "out")["img_emb_01.npy"].shape == (0, DIM)


def test_a_file_that_changes_meanwhile(prior, source, tmp_path):
    embedder, shards = Embedder(prior), find_shards(source)
    path = source / "text_emb/text_emb_00.npy"

    def change(rows):
        rows = np.load(path)
        np.save(path, rows[::-1])

    with pytest.raises(ShardError, match="changed while it was embedded|bytes, and had"):
        embedder.embed(shards[0], Manifest(tmp_path / "out", embedder.run(shards)), change)
    assert not list((tmp_path / "out/manifest").glob("shard*"))


def test_a_shard_that_is_done_again_is_not_done_meanwhile(prior, source, tmp_path):
    run(prior, source, tmp_path / "out")
    before, noted = images(tmp_path / "out"), tmp_path / "out/manifest/shard_02.json"
    np.save(source / "text_emb/text_emb_02.npy", rows_of(2, 50, DIM, salt=9))
    shards, embedder, seen = find_shards(source), Embedder(prior, Options(saved="float32")), []
    manifest = Manifest(tmp_path / "out", embedder.run(shards))

    def begin(rows):
        return lambda done: seen.append((rows, done, noted.exists()))

    assert embed_shards(embedder, shards, manifest, begin=begin) == (1, 50, 0, 2)
    assert seen == [(50, 50, False)] and noted.exists()
    same = {name: np.array_equal(rows, before[name]) for name, rows in images(tmp_path / "out").items()}
    assert same == {"img_emb_00.npy": True, "img_emb_02.npy": False, "img_emb_10.npy": True}


@pytest.mark.parametrize("which", ["img_emb", "metadata", "manifest"])
def test_a_full_disk(prior, source, tmp_path, monkeypatch, which):
    """One line that says which file and why, nothing half, and the rest when there is room."""
    import os
    from pathlib import Path

    out, real = tmp_path / "out", os.fsync
    shards = find_shards(source)
    embedder = Embedder(prior)
    manifest = Manifest(out, embedder.run(shards))

    def full(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if Path(name).parent.parent.name == which and "_02" in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="_02.* could not be written: No space left on device"):
            embed_shards(embedder, shards, manifest)
    assert not [name for name in written(out) if ".tmp" in name] and not (out / "manifest/shard_02.json").exists()
    assert embed_shards(embedder, shards, manifest) == (2, 73, 0, 1)


def test_interrupts_say_what_is_whole(prior, source, tmp_path):
    embedder, shards = Embedder(prior), find_shards(source)
    manifest = Manifest(tmp_path / "out", embedder.run(shards))

    def begin(rows):
        assert rows == 110

        def progress(done):
            if done == 50:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt, match="^1 of 3 shards are whole; the same command goes on from there$"):
        embed_shards(embedder, shards, manifest, begin=begin)
    assert list(images(tmp_path / "out")) == ["img_emb_00.npy"]
    assert not [name for name in written(tmp_path / "out") if ".tmp" in name]


def test_options_and_parts_are_checked(prior, tmp_path):
    for options, error in (
        (dict(seed=-1), "seed=-1; it must be at least 0"),
        (dict(saved="int8"), "saved='int8'; it must be"),
        (dict(cond_scale=float("nan")), "cond_scale=nan; it must be a finite number"),
    ):
        with pytest.raises(ValueError, match=error):
            Options(**options)
    with pytest.raises(ValueError, match="on_bad='stop'"):
        Embedder(prior, on_bad="stop")
    with pytest.raises(ValueError, match="batch_size=0"):
        Embedder(prior, batch_size=0)
    with pytest.raises(ValueError, match="part=3; it must be at most 2"):
        share_of([1, 2, 3], 3, 2)
    shares = [share_of(list(range(7)), part, 3) for part in (1, 2, 3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
