"""Shards: what is matched, what is wrong with it, and the formats and places that it may have."""

import argparse
import io
import json
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastprior.cli.inspect import add_parser
from fastprior.dataloaders import (
    EmbeddingShards,
    PairStream,
)
from fastprior.dataloaders.files import shard_number
from helpers.shard_cases import (
    DIM,
    EXPECTED,
    IN_ORDER,
    SIZES,
    captions_of,
    check_pairs,
    image,
    metadata,
    open_captions,
    rows_of,
    truncate,
    write,
    write_captions,
)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data")


# what is there and what is wrong


@pytest.mark.parametrize("name, number", [
    ("img_emb_0.npy", 0), ("a2/metadata_00012.parquet", 12), ("shard7.tar", 7), ("embeddings.npy", None),
    ("part-00003-1234abcd-c000.snappy.parquet", 3), ("v2_img_0005_fp16x.npy", 5),
])  # fmt: skip
def test_shard_number(name, number):
    assert shard_number(name) == number


def spoil(path, value):
    rows = np.load(path)
    rows[len(rows) // 2] = value
    np.save(path, rows)


PROBLEMS = {
    "missing captions": (lambda f: metadata(f, 2).unlink(), "img_emb_2.npy: no captions of its number, 2", (0, 10)),
    "missing images": (lambda f: image(f, 2).unlink(), "metadata_2.parquet: no image embeddings of its", (0, 10)),
    "extra": (lambda f: np.save(image(f, 3), rows_of(3, 5)), "img_emb_3.npy: no captions", (0, 2, 10)),
    "corrupt": (lambda f: image(f, 2).write_bytes(b"junk" * 99), "img_emb_2.npy: cannot be read", (0, 10)),
    "empty": (lambda f: image(f, 2).write_bytes(b""), "img_emb_2.npy: cannot be read", (0, 10)),
    "truncated": (lambda f: truncate(image(f, 2)), r"img_emb_2.npy: truncated: 923 bytes, and 928", (0, 10)),
    "too long": (lambda f: image(f, 0).open("ab").write(b"12"), "img_emb_0.npy: too long", (2, 10)),
    "mixed width": (lambda f: np.save(image(f, 10), rows_of(10, 23, 6)), r"img_emb_10.npy: float16 \(6,\)", (0, 2)),
    "integers": (lambda f: np.save(image(f, 0), np.ones((37, DIM), int)), "holds int64; it must be float16", (2, 10)),
    "flat": (lambda f: np.save(image(f, 0), rows_of(0, 37)[:, 0]), r"has shape \(37,\)", (2, 10)),
    "corrupt captions": (lambda f: truncate(metadata(f, 2)), "metadata_2.parquet: cannot be read", (0, 10)),
    "no such column": (lambda f: pq.write_table(pa.table({"url": ["a"] * 50}), metadata(f, 2)),
                       "metadata_2.parquet: has no column 'caption'; its columns are url", (0, 10)),
    "captions of numbers": (lambda f: pq.write_table(pa.table({"caption": range(50)}), metadata(f, 2)),
                            "column 'caption' holds int64; it must hold strings", (0, 10)),
    "counts": (lambda f: write_captions(metadata(f, 2), captions_of(2, 49)),
               "metadata_2.parquet: 49 rows, and 50 in .*img_emb_2.npy", (0, 10)),
    "not finite": (lambda f: spoil(image(f, 10), np.nan), "img_emb_10.npy: holds numbers that are not finite", (0, 2)),
    "same number": (lambda f: np.save(f / "img_emb/img_02.npy", rows_of(2, 50)), "number 2 of .*neither", (0, 10)),
    "no number": (lambda f: np.save(f / "img_emb/all.npy", rows_of(2, 50)), "all.npy: has no number", (0, 2, 10)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_named(folder, name):
    damage, message, left = PROBLEMS[name]
    damage(folder)
    with pytest.raises(ValueError, match=message):
        open_captions(folder)
    shards = open_captions(folder, on_problem="skip")
    assert [shard.number for shard in shards.shards] == list(left)
    assert len(shards.problems) == 1 and "problem" in shards.report()
    batch = next(iter(PairStream(shards, batch_size=shards.pairs)))
    check_pairs(batch["text"], batch["image_embed"].numpy())


def test_report(folder):
    shards = open_captions(folder)
    assert (shards.pairs, shards.dim, shards.dtype, shards.columns) == (110, DIM, "float16", ("image_embed", "text"))
    for line in ("float16, 8, norms", "shards            3", "pairs             110", "problems          none"):
        assert line in shards.report()
    assert not shards.notes
    for number in SIZES:
        np.save(image(folder, number), rows_of(number, SIZES[number]) * np.float16(3))
    write_captions(metadata(folder, 0), [None, "", *captions_of(0, 35)])
    notes = open_captions(folder).notes
    assert "image embeddings are not normalised: norms 3" in notes[0] or "norms 2.99" in notes[0]
    assert notes[1] == "1 captions are missing; they are read as empty"
    assert next(iter(PairStream(open_captions(folder), batch_size=3)))["text"] == ["", "", "caption 0 of shard 0"]


def test_what_cannot_be_opened(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        EmbeddingShards.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"metadata holds no .npy files of image embeddings"):
        EmbeddingShards.open(folder / "metadata", file_format="npy")
    with pytest.raises(ValueError, match="on_problem='ignore'"):
        open_captions(folder, on_problem="ignore")
    with pytest.raises(ValueError, match="file_format='zarr'"):
        open_captions(folder, file_format="zarr")
    with pytest.raises(TypeError, match="meta_url=3"):
        EmbeddingShards.open(folder, 3)
    for number in SIZES:
        truncate(image(folder, number))
    with pytest.raises(ValueError, match="no shard can be used:\n.*img_emb_0.npy: truncated"):
        open_captions(folder, on_problem="skip")


@pytest.mark.parametrize("damage", [False, True])
def test_inspect(folder, capsys, damage):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    if damage:
        truncate(image(folder, 10))
    for argv in ([folder], [folder / "img_emb", "--meta", folder / "metadata", "--text", folder / "text_emb"]):
        args = parser.parse_args(["inspect", *map(str, argv)])
        assert args.run(args) == int(damage)
        out = capsys.readouterr().out
        assert f"pairs             {87 if damage else 110}" in out and "captions" in out and "text embeddings" in out
        assert ("img_emb_10.npy: truncated" in out) == damage


# other formats and places


def check_stream(shards, expected=IN_ORDER):
    (batch,) = PairStream(shards, batch_size=len(expected))
    assert batch["text"] == expected
    check_pairs(batch["text"], batch["image_embed"].numpy())
    return batch


def test_remote(folder):
    remote = fsspec.filesystem("memory")
    remote.put(str(folder), "/remote/data", recursive=True)
    try:
        root = next(path for path in remote.find("/remote") if path.endswith("img_emb_0.npy")).rsplit("/", 2)[0]
        shards = EmbeddingShards.open(f"memory:/{root}/img_emb", f"memory:/{root}/metadata")
        check_stream(shards)
        assert not shards.shards[0].files["text"].local
    finally:
        remote.rm("/remote", recursive=True)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float16(), DIM), pa.large_list(pa.float16())],
                         ids=str)  # fmt: skip
def test_parquet(tmp_path, kind):
    for number, count in SIZES.items():
        rows = pa.array(list(rows_of(number, count)), kind)
        table = pa.table(dict(embedding=rows, caption=pa.array(captions_of(number, count)).dictionary_encode()))
        pq.write_table(table, tmp_path / f"data_{number}.parquet", row_group_size=11)
    check_stream(EmbeddingShards.open(tmp_path))


def test_webdataset(tmp_path):
    def add(tar, name, data):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))

    def npy(row):
        file = io.BytesIO()
        np.save(file, row)
        return file.getvalue()

    for number, count in SIZES.items():
        with tarfile.open(tmp_path / f"{number:05}.tar", "w") as tar:
            for row, (caption, image, text) in enumerate(
                zip(captions_of(number, count), rows_of(number, count), rows_of(number, count, salt=1))
            ):
                add(tar, f"{number:05}{row:04}.img_emb.npy", npy(image))
                add(tar, f"{number:05}{row:04}.text_emb.npy", npy(text[None]))
                add(tar, f"{number:05}{row:04}.json", json.dumps(dict(caption=caption)).encode())
            add(tar, "lonely.json", b"{}")
    batch = check_stream(EmbeddingShards.open(tmp_path))
    np.testing.assert_array_equal(batch["text_embed"].numpy(), [EXPECTED[caption][1] for caption in IN_ORDER])
    tar = tmp_path / "00002.tar"
    tar.write_bytes(tar.read_bytes()[:20000])
    with pytest.raises(ValueError, match="00002.tar: cannot be read"):
        EmbeddingShards.open(tmp_path)


def test_text_embeddings_and_encodings(folder):
    (folder / "encodings").mkdir()
    for number, count in SIZES.items():
        np.save(folder / f"encodings/{number}.npy", np.full((count, 3, 5), number, np.float16))
    shards = EmbeddingShards.open(folder / "img_emb", None, folder / "text_emb", folder / "encodings")
    batch = next(iter(PairStream(shards, batch_size=110, seed=0)))
    by_row = {EXPECTED[caption][0].tobytes(): caption for caption in IN_ORDER}
    captions = [by_row[row.tobytes()] for row in batch["image_embed"].numpy()]
    assert sorted(captions) == sorted(IN_ORDER) and captions != IN_ORDER
    np.testing.assert_array_equal(batch["text_embed"].numpy(), [EXPECTED[caption][1] for caption in captions])
    assert batch["text_encodings"].shape == (110, 3, 5)
    assert batch["text_encodings"][:, 0, 0].tolist() == [int(caption.split()[-1]) for caption in captions]
