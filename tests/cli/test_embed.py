"""`fastprior embed`: what it says, writes and refuses; and the commands of its guide, as they are written."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import fastprior
from fastprior.cli import command_line as cli
from helpers import ROOT
from helpers.bulk_cases import DIM, embed, entry, images, write_caption_files, write_npy, write_prior, written
from helpers.command_line import error_of, run
from helpers.priors import WordClip
from helpers.shard_cases import rows_of

GUIDE = ROOT / "docs" / "bulk.md"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_prior(tmp_path_factory.mktemp("prior") / "prior.safetensors")


@pytest.fixture
def folders(tmp_path):
    return write_npy(tmp_path / "in"), tmp_path / "out"


def test_what_it_says(capsys, folders, checkpoint):
    source, out = folders
    assert embed(source, out, checkpoint) == 0
    assert capsys.readouterr().out == f"wrote {out}: 110 rows of 3 shards\n"
    assert embed(source, out, checkpoint) == 0
    assert capsys.readouterr().out == f"wrote {out}: 0 rows of 0 shards; 3 shards were there\n"
    assert {name: array.dtype for name, array in images(out).items()} == {
        f"img_emb_{number}.npy": np.dtype("float16") for number in ("00", "02", "10")
    }
    status, said, _ = run(capsys, "inspect", out)
    assert status == 0 and "pairs             110" in said and "problems          none" in said


def test_readers_of_clip_retrieval_read_it(folders, checkpoint, capfd):
    reader = pytest.importorskip("embedding_reader")
    source, out = folders
    embed(source, out, checkpoint)
    where = dict(embeddings_folder=str(out / "img_emb"), metadata_folder=str(out / "metadata"))
    opened = reader.EmbeddingReader(**where, file_format="parquet_npy", meta_columns=["caption"])
    assert opened.count == 110 and opened.dimension == DIM
    for rows, meta in opened(batch_size=40, show_progress=False):
        for row, caption in zip(rows, meta["caption"]):
            index, number = map(int, re.findall(r"\d+", caption))
            np.testing.assert_array_equal(row, images(out)[f"img_emb_{number:02}.npy"][index])


def test_bad_rows(capsys, folders, checkpoint):
    source, out = folders
    rows = rows_of(2, 50, DIM)
    rows[7] = np.nan
    np.save(source / "text_emb/text_emb_02.npy", rows)
    said = error_of(capsys, "embed", source, out, "--checkpoint", checkpoint)
    assert "text_emb_02.npy: row 7 is not finite; --on-bad skip writes NaN in its place" in said
    assert run(capsys, "embed", source, out, "--checkpoint", checkpoint, "--on-bad", "skip") == (
        0, f"wrote {out}: 73 rows of 2 shards, 1 of them bad, which are NaN; 1 shards were there\n", "",
    )  # fmt: skip
    assert entry(out)["bad_rows"] == 1


def test_parts_make_the_whole(capsys, folders, checkpoint, tmp_path):
    source, out = folders
    embed(source, tmp_path / "whole", checkpoint)
    for part in ("2/2", "1/2"):
        assert embed(source, out, checkpoint, "--part", part) == 0
    assert written(out) == written(tmp_path / "whole")
    for part in ("0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"):
        status, _, said = run(capsys, "embed", source, out, "--checkpoint", checkpoint, f"--part={part}")
        assert status == 2 and "argument --part" in said


def test_what_is_refused(capsys, folders, checkpoint, tmp_path):
    source, out = folders
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    write_caption_files(tmp_path / "captions")
    cases = [
        ((tmp_path / "missing", out), "missing does not exist, or holds no files"),
        ((tmp_path / "empty", out), "empty does not exist, or holds no files"),
        ((source, tmp_path / "file"), "file is a file; it must be a folder"),
        ((source, source / "out"), "is within IN"),
        ((source, source), "is within IN"),
        ((source, "s3://bucket/out"), "is an url; it must be a folder of this machine"),
        ((source, out, "--meta", tmp_path, "--encodings", tmp_path / "empty"), "is within --meta"),
        ((source, out, "--steps", "0"), "--steps 0: it must be at least 1"),
        ((source, out, "--batch-size", "0"), "--batch-size 0: it must be at least 1"),
        ((source, out, "--cond-scale", "nan"), "--cond-scale nan: it must be finite"),
        ((source, out, "--solver", "euler"), "euler"),
        ((source, out, "--captions", "--encodings", "x"), "it does not go with --captions"),
        ((source, out, "--clip-model", "ViT-B-32"), "--clip-model and --clip-pretrained go together"),
        ((source, out, "--clip-model", "ViT-B-32", "--clip-pretrained", "x"), "IN holds text embeddings"),
        ((tmp_path / "captions", out), "does not say how to encode captions: give --clip-model"),
    ]
    for argv, error in cases:
        said = error_of(capsys, "embed", *argv, "--checkpoint", checkpoint)
        assert error in said, said
    assert not out.exists()
    assert "nothing" in error_of(capsys, "embed", source, out, "--checkpoint", tmp_path / "nothing")


def test_other_weights_and_options_are_refused(capsys, folders, checkpoint, tmp_path):
    source, out = folders
    embed(source, out, checkpoint, "--steps", 4)
    before = written(out)
    said = error_of(capsys, "embed", source, out, "--checkpoint", checkpoint, "--steps", 5, "--seed", 3)
    assert "out was made with seed 0, not 3; timesteps 4, not 5; choose another folder" in said
    other = write_prior(tmp_path / "other.safetensors", seed=1)
    assert "out was made with weights '" in error_of(capsys, "embed", source, out, "--checkpoint", other, "--steps", 4)
    assert written(out) == before
    assert embed(source, out, checkpoint, "--steps", 4, "--batch-size", 3) == 0  # on which nothing depends
    assert written(out) == before


def test_embeddings_of_shards_that_are_gone_are_noted(capsys, folders, checkpoint):
    source, out = folders
    embed(source, out, checkpoint)
    for name in ("text_emb/text_emb_02.npy", "metadata/metadata_02.parquet"):
        (source / name).unlink()
    _, _, said = run(capsys, "embed", source, out, "--checkpoint", checkpoint)
    assert "warning: " in said and "holds embeddings of other shards, which IN does not have: img_emb_02.npy" in said


def test_captions(capsys, tmp_path, monkeypatch):
    given = write_prior(tmp_path / "prior.safetensors", condition_on_text_encodings=True)
    monkeypatch.setattr(fastprior, "OpenClipAdapter", lambda *_, **__: WordClip())
    source, out = write_caption_files(tmp_path / "in", {1: 5}), tmp_path / "out"
    assert embed(source, out, given, "--clip-model", "letters", "--clip-pretrained", "letters.pt") == 0
    assert images(out)["img_emb_01.npy"].shape == (5, DIM)
    made = json.loads((out / "manifest/run.json").read_text())
    assert made["columns"] == ["text"] and made["text_encoder"]["model"] == "WordClip"


@pytest.mark.slow
def test_ctrl_c_ends_with_one_line(tmp_path, checkpoint):
    source, out = write_npy(tmp_path / "in", {0: 3, 1: 20_000}), tmp_path / "out"
    line = [sys.executable, "-m", "fastprior.cli", "embed", source, out, "--checkpoint", checkpoint]
    running = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + 120
    while not (out / "manifest/shard_00.json").exists() and time.monotonic() < give_up:
        time.sleep(0.01)
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    printed, said = running.communicate(timeout=60)
    expected = "fastprior: interrupted: 1 of 2 shards are whole; the same command goes on from there\n"
    assert (running.returncode, printed, said) == (130, "", expected)
    assert not [name for name in written(out) if "tmp" in name] and list(images(out)) == ["img_emb_00.npy"]


def commands() -> list[list[str]]:
    """The commands of the guide, as a shell reads them."""
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fastprior ")]


def test_commands_of_the_guide_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastprior, "OpenClipAdapter", lambda *_, **__: WordClip())
    write_prior(tmp_path / "prior.safetensors")
    sizes = {0: 5, 1: 3}
    write_npy(tmp_path / "texts", sizes)
    write_caption_files(tmp_path / "captions", sizes)
    found = commands()
    assert len(found) == 7 and all(cli.make_parser().parse_args(argv).command for argv in found)
    for argv in found:
        if "--ray" in argv:  # as tests/serving/test_bulk_ray.py does, where there is one
            continue
        status, said, complaints = run(capsys, *argv)
        assert status == 0, (argv, said, complaints)
    assert len(images(tmp_path / "embeddings")) == 2
