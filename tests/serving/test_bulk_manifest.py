"""What is done of a bulk run: skipped where it fits, done again where it does not, refused where others made it."""

import json
import os
import threading

import numpy as np
import pytest

from fastprior.serving.bulk import Manifest, find_shards
from helpers.bulk_cases import DIM, write_npy
from helpers.shard_cases import captions_of, rows_of, write_captions

RUN = dict(weights="abc", timesteps=16, seed=0)


@pytest.fixture
def done(tmp_path):
    """A manifest whose shards are all done, and a function that makes it, and the shards, anew."""
    source = write_npy(tmp_path / "in")
    manifest = Manifest(tmp_path / "out", RUN)
    for shard in find_shards(source):
        manifest.image_path(shard).write_bytes(b"image")
        manifest.metadata_path(shard).write_bytes(b"metadata")
        inputs = [{**one, "sha256": digest} for one, digest in zip(shard.identities(), shard.hashes())]
        manifest.write_entry(shard, inputs, [3] if shard.digits == "10" else [])

    def again(run=RUN, **options):
        manifest = Manifest(tmp_path / "out", run)
        return [manifest.is_done(shard, **options) for shard in find_shards(source)]

    return again


def test_done_is_done(done, tmp_path):
    assert done() == [True] * 3
    assert done(bad_allowed=False) == [True, True, False]
    assert json.loads((tmp_path / "out/manifest/run.json").read_text()) == dict(RUN, format=1)


def test_other_weights_and_options_are_refused(done, tmp_path):
    for run, error in (
        (RUN | dict(weights="abd"), "weights 'abc', not 'abd'; choose"),
        (RUN | dict(timesteps=8, seed=1), "seed 0, not 1; timesteps 16, not 8; choose"),
        (RUN | dict(solver="ddim"), "solver None, not 'ddim'; choose"),
        (dict(weights="abc", seed=0), "timesteps 16, not None; choose"),
    ):
        with pytest.raises(ValueError, match=f"out was made with {error} another folder"):
            done(run)
    (tmp_path / "out/manifest/run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is not JSON"):
        done()


def touch(folder):
    os.utime(folder / "in/text_emb/text_emb_02.npy", ns=(0, 1))


def same_size(folder):
    np.save(folder / "in/text_emb/text_emb_02.npy", rows_of(2, 50, DIM, salt=7))


def other_captions(folder):
    write_captions(folder / "in/metadata/metadata_02.parquet", captions_of(3, 50), row_group_size=13)


def no_image(folder):
    (folder / "out/img_emb/img_emb_02.npy").unlink()


def cut_image(folder):
    (folder / "out/img_emb/img_emb_02.npy").write_bytes(b"imag")


def no_metadata(folder):
    (folder / "out/metadata/metadata_02.parquet").unlink()


def change(**values):
    def harm(folder):
        path = folder / "out/manifest/shard_02.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    harm.__name__ = next(iter(values))
    return harm


def broken_entry(folder):
    (folder / "out/manifest/shard_02.json").write_text("[]")


FITS = [(touch, True), (same_size, False), (other_captions, False), (no_image, False), (cut_image, False)]
FITS += [(no_metadata, False), (broken_entry, False), (change(run="x"), False), (change(rows=49), False)]
FITS += [(change(inputs=[]), False), (change(inputs=3), False), (change(outputs=[]), False), (change(note=1), True)]


@pytest.mark.parametrize("harm, fits", FITS, ids=lambda value: getattr(value, "__name__", value))
def test_what_does_not_fit_is_not_done(done, tmp_path, harm, fits):
    harm(tmp_path)
    assert done() == [True, fits, True]


def test_a_folder_of_somebody_else(tmp_path):
    for name in ("img_emb/img_emb_0.npy", "metadata/metadata_0.parquet"):
        out = tmp_path / name.replace("/", "-")
        (out / name).parent.mkdir(parents=True)
        (out / name).write_bytes(b"mine")
        with pytest.raises(ValueError, match=f"{name} was not written by a bulk run; choose another folder"):
            Manifest(out, RUN)
        assert (out / name).read_bytes() == b"mine" and not (out / "manifest").exists()
    (tmp_path / "file").mkdir()
    (tmp_path / "file/img_emb").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="img_emb is a file; it must be a folder"):
        Manifest(tmp_path / "file", RUN)


def test_what_killed_runs_left_is_removed(done, tmp_path):
    left = [f"out/{name}.0123abcd.tmp" for name in ("manifest/.shard_02.json", "img_emb/.img_emb_02.npy")]
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "in-use").touch()
    assert done() == [True] * 3 and not [name for name in left if (tmp_path / name).exists()]


def test_strangers_are_named(done, tmp_path):
    shards = find_shards(tmp_path / "in")
    assert Manifest(tmp_path / "out", RUN).strangers(shards) == []
    assert Manifest(tmp_path / "out", RUN).strangers(shards[1:]) == ["img_emb_00.npy"]


@pytest.mark.parametrize("links", [True, False])
def test_of_several_that_begin_at_once_one_wins(tmp_path, monkeypatch, links):
    """All of them either agree with what is there, or are refused."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links here")))
    ready, ended = threading.Barrier(6), []

    def begin(seed):
        ready.wait(30)
        try:
            ended.append(Manifest(tmp_path / "out", RUN | dict(seed=seed % 2)).run["seed"])
        except ValueError as error:
            ended.append(str(error))

    threads = [threading.Thread(target=begin, args=(seed,)) for seed in range(6)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert len(ended) == 6
    if links:
        won = json.loads((tmp_path / "out/manifest/run.json").read_text())["seed"]
        assert ended.count(won) == 3 and sum("was made with seed" in str(one) for one in ended) == 3
    assert [path.name for path in (tmp_path / "out/manifest").iterdir()] == ["run.json"]
