"""Files as people have them: other dtypes and orders, shards without rows, and rows that are not finite."""

import argparse
import io
import json
import tarfile
import warnings

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastprior.cli.inspect import add_parser
from fastprior.dataloaders import EmbeddingShards, PairStream, ShardError, get_reader, make_splits
from fastprior.dataloaders.files import RowGroups
from helpers.shard_cases import (
    DIM,
    EXPECTED,
    IN_ORDER,
    SIZES,
    captions_of,
    image,
    metadata,
    open_captions,
    rows_of,
    write,
    write_captions,
)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data")


def text(folder, number):
    return folder / f"text_emb/text_emb_{number}.npy"


def one_batch(shards, **options):
    (batch,) = PairStream(shards, **(dict(batch_size=shards.pairs) | options))
    return batch


def wide(count, salt=7):
    """Rows that no fp16 holds."""
    return np.random.default_rng(salt).standard_normal((count, DIM))


# dtypes and orders

KINDS = {
    "fp32 beside fp16": lambda rows: rows.astype("f4"),
    "fp64": lambda rows: rows,
    "big endian": lambda rows: rows.astype(">f4"),
    "columns first": lambda rows: np.asfortranarray(rows.astype("f4")),
    "columns first, big endian, fp64": lambda rows: np.asfortranarray(rows.astype(">f8")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_rows_are_taken_exactly(folder, kind, remote):
    rows, texts = wide(SIZES[2]), wide(SIZES[2], salt=8)
    np.save(image(folder, 2), KINDS[kind](rows))
    np.save(text(folder, 2), KINDS[kind](texts))
    root = str(folder)
    memory = fsspec.filesystem("memory")
    if remote:
        memory.put(root, "/rows", recursive=True)
        root = "memory:/" + next(p for p in memory.find("/rows") if p.endswith("img_emb_2.npy")).rsplit("/", 2)[0]
    try:
        shards = EmbeddingShards.open(f"{root}/img_emb", f"{root}/metadata", f"{root}/text_emb")
        assert shards.dtype == "float32" and shards.row_bytes == 2 * 4 * DIM + 100
        batch = one_batch(shards)
        shuffled = one_batch(shards, seed=3, buffer_bytes=shards.row_bytes * 9)
    finally:
        if remote:
            memory.rm("/rows", recursive=True)
    wanted = {caption: pair for caption, pair in EXPECTED.items() if "shard 2" not in caption}
    wanted |= dict(zip(captions_of(2, SIZES[2]), zip(rows.astype("f4"), texts.astype("f4"))))
    assert batch["text"] == IN_ORDER and sorted(shuffled["text"]) == sorted(IN_ORDER)
    for found in (batch, shuffled):
        for caption, *pair in zip(found["text"], found["image_embed"].numpy(), found["text_embed"].numpy()):
            np.testing.assert_array_equal(pair, wanted[caption])
    assert ("rounded to float32" in shards.report()) == ("fp64" in kind)


def test_fp16_stays_fp16_in_memory(folder):
    np.save(image(folder, 2), np.asfortranarray(rows_of(2, SIZES[2]).astype(">f2")))
    shards = open_captions(folder)
    assert shards.dtype == "float16"
    np.testing.assert_array_equal(one_batch(shards)["image_embed"], [EXPECTED[caption][0] for caption in IN_ORDER])


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_encodings_of_columns_first(tmp_path, remote):
    for name in ("images", "encodings"):
        (tmp_path / name).mkdir()
    rows = np.random.default_rng(0).standard_normal((11, 3, 5)).astype("f4")
    np.save(tmp_path / "images/0.npy", rows_of(0, 11))
    np.save(tmp_path / "encodings/0.npy", np.asfortranarray(rows))
    shards = EmbeddingShards.open(tmp_path / "images", encodings_url=tmp_path / "encodings")
    file = shards.shards[0].files["text_encodings"]
    file.local = not remote
    np.testing.assert_array_equal(file.read(2, 9, RowGroups(0)), rows[2:9])
    assert sorted(one_batch(shards, seed=1)["text_encodings"][:, 0, 0].tolist()) == sorted(rows[:, 0, 0].tolist())


def test_parquet_of_fp64(tmp_path):
    """What pandas writes of a column of numpy's arrays."""
    rows = wide(20)
    pd.DataFrame(dict(embedding=list(rows), caption=captions_of(0, 20))).to_parquet(tmp_path / "0.parquet")
    batch = one_batch(EmbeddingShards.open(tmp_path))
    np.testing.assert_array_equal(batch["image_embed"], rows.astype("f4"))


def test_readers_take_them_too(folder):
    rows = wide(SIZES[2])
    np.save(image(folder, 2), np.asfortranarray(rows))
    for captions in (True, False):
        urls = [str(folder / name) for name in ("img_emb", "metadata", "text_emb")]
        reader = get_reader(captions, urls[0], urls[1], urls[2])
        reader = reader if captions else reader[0]
        found = np.concatenate([images for images, _ in reader(batch_size=16, start=0, end=110, show_progress=False)])
        wanted = [EXPECTED[caption][0] for caption in IN_ORDER]
        wanted[37:87] = rows.astype("f4")
        np.testing.assert_array_equal(found, wanted)


# without rows


def empty_parquet(path):
    pd.DataFrame(dict(image_path=[], caption=[])).to_parquet(path)
    assert pq.read_schema(path).field("caption").type in (pa.float64(), pa.null())  # as pandas' release will have it


@pytest.mark.parametrize("rows", [np.zeros((0, DIM)), np.array([]), np.zeros((0, 0), "f2"), np.zeros((0, 3), int)],
                         ids=lambda rows: f"{rows.shape}-{rows.dtype}")  # fmt: skip
@pytest.mark.parametrize("write_empty", [empty_parquet, lambda p: pd.DataFrame().to_parquet(p),
                                         lambda p: write_captions(p, pa.array([], pa.string()))],
                         ids=["pandas", "no columns", "strings"])  # fmt: skip
def test_shards_without_rows_are_left_out_and_noted(folder, rows, write_empty):
    for number in (1, 11):
        np.save(image(folder, number), rows)
        write_empty(metadata(folder, number))
    shards = open_captions(folder)
    assert one_batch(shards)["text"] == IN_ORDER and [shard.number for shard in shards.shards] == [0, 2, 10]
    assert "2 shards without rows are left out, of number 1, 11" in shards.report()
    assert shards.digest == open_captions(write(folder / "again")).digest


def test_one_side_without_rows_is_a_problem(folder):
    empty_parquet(metadata(folder, 2))
    with pytest.raises(ValueError, match="metadata_2.parquet: 0 rows, and 50 in .*img_emb_2.npy"):
        open_captions(folder)


def test_first_shards_of_other_formats_without_rows(tmp_path):
    """Which columns there are is known of those that have rows."""
    (tmp_path / "parquet").mkdir(), (tmp_path / "tars").mkdir()
    pd.DataFrame(dict(embedding=[], caption=[])).to_parquet(tmp_path / "parquet/0.parquet")
    rows = pa.array(list(rows_of(1, 9)), pa.list_(pa.float16()))
    pq.write_table(pa.table(dict(embedding=rows, caption=captions_of(1, 9))), tmp_path / "parquet/1.parquet")
    tarfile.open(tmp_path / "tars/0.tar", "w").close()
    write_tar(tmp_path / "tars/1.tar", rows_of(1, 9))
    for name in ("parquet", "tars"):
        shards = EmbeddingShards.open(tmp_path / name)
        assert shards.pairs == 9 and one_batch(shards)["text"] == captions_of(1, 9)
        assert "1 shards without rows are left out, of number 0" in shards.notes


@pytest.mark.parametrize("missing", [None, np.nan])
def test_captions_that_are_all_missing(folder, missing):
    pd.DataFrame(dict(caption=[missing] * 50)).to_parquet(metadata(folder, 2))
    shards = open_captions(folder)
    assert one_batch(shards)["text"][37:87] == [""] * 50 and "50 captions are missing" in shards.report()


# rows that are not finite

BAD = {0: 5, 2: 30, 10: 3}  # by shard
BAD_CAPTIONS = {captions_of(number, 60)[row] for number, row in BAD.items()}


def spoil(path, row, value=np.nan):
    rows = np.load(path)
    rows[row, 3] = value
    np.save(path, rows)


def write_tar(path, rows):
    def add(name, data):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))

    with tarfile.open(path, "w") as tar:
        for row, values in enumerate(rows):
            file = io.BytesIO()
            np.save(file, values)
            add(f"{row:04}.img_emb.npy", file.getvalue())
            add(f"{row:04}.json", json.dumps(dict(caption=captions_of(1, 9)[row])).encode())


@pytest.fixture
def spoiled(folder):
    """An image is NaN, an image infinite, a text embedding NaN."""
    spoil(image(folder, 0), BAD[0])
    spoil(image(folder, 2), BAD[2], -np.inf)
    spoil(text(folder, 10), BAD[10])
    return folder


def open_all(folder, **options):
    return EmbeddingShards.open(folder / "img_emb", folder / "metadata", folder / "text_emb", **options)


def check(batches):
    """Whole pairs, none of them bad."""
    for batch in batches:
        for caption, *pair in zip(
            batch["text"], batch["image_embed"].numpy(), batch["text_embed"].numpy(), strict=True
        ):
            assert caption not in BAD_CAPTIONS
            np.testing.assert_array_equal(pair, EXPECTED[caption])


SMALL = dict(batch_size=7, buffer_bytes=12 * 132)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("world_size", [1, 2])
def test_bad_rows_are_left_out_and_counted(spoiled, seed, world_size):
    shards = open_all(spoiled, on_bad_rows="skip")
    assert shards.pairs == 110 and not shards.problems
    streams = [PairStream(shards, seed=seed, rank=r, world_size=world_size, **SMALL) for r in range(world_size)]
    with pytest.warns(UserWarning, match="row .* holds numbers that are not finite, .*takes its place") as warned:
        found = [list(stream) for stream in streams]
    assert {str(w.message).split(":")[0].rsplit("/")[-1] for w in warned} == {
        "img_emb_0.npy", "img_emb_2.npy", "text_emb_10.npy"
    }  # fmt: skip
    assert [len(batches) for batches in found] == [len(stream) for stream in streams]
    assert all(len(batch["text"]) == 7 for batches in found for batch in batches)
    check(batch for batches in found for batch in batches)
    assert set.union(*(stream.bad_rows for stream in streams)) == {5, 37 + 30, 87 + 3}
    seen = {caption for batches in found for batch in batches for caption in batch["text"]}
    assert len(seen) >= 110 - 3 - 7 * world_size - 1 and not seen & BAD_CAPTIONS


def test_resume_at_the_exact_sample_with_bad_rows(spoiled):
    shards = open_all(spoiled, on_bad_rows="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [batch["text"] for batch in PairStream(shards, seed=5, **SMALL)]
        for taken in range(0, len(expected), 2):
            left = PairStream(shards, seed=5, **SMALL)
            batches = iter(left)
            for _ in range(taken):
                next(batches)
            state = json.loads(json.dumps(left.state_dict()))
            batches.close()
            resumed = PairStream(shards, seed=5, workers=2, prefetch=1, **SMALL)
            resumed.load_state_dict(state)
            assert [batch["text"] for batch in resumed] == expected[taken:]


def test_without_bad_rows_nothing_changes(folder):
    plain, skipping = (PairStream(open_all(folder, on_bad_rows=mode), seed=5, **SMALL) for mode in (None, "skip"))
    assert [batch["text"] for batch in plain] == [batch["text"] for batch in skipping]
    assert plain.state_dict() == skipping.state_dict() and not skipping.bad_rows


@pytest.mark.parametrize("mode", [None, "error"])
def test_bad_rows_that_were_not_asked_to_be_skipped(spoiled, mode, monkeypatch):
    with pytest.raises(ValueError, match="img_emb_0.npy: holds numbers that are not finite, in row 5; on_bad_rows="):
        open_all(spoiled, on_bad_rows=mode)
    monkeypatch.setattr("fastprior.dataloaders.match._PEEK_ROWS", 2)  # none of which is bad
    shards = open_all(spoiled, on_bad_rows=mode)
    stream = PairStream(shards, batch_size=110)
    if mode == "error":
        with pytest.raises(ShardError, match='row 5 holds numbers that are not finite; on_bad_rows="skip" leaves'):
            list(stream)
        return
    with pytest.warns(UserWarning, match="text_emb_10.npy: row 3 .* it is given out as it is"):
        (batch,) = stream
    bad = [index for index, row in enumerate(batch["image_embed"]) if not row.isfinite().all()]
    assert bad == [5, 67] and batch["text"] == IN_ORDER and len(stream.bad_rows) == 3
    with pytest.warns(UserWarning, match="other pairs take the places"):
        check(PairStream(open_all(spoiled, on_bad_rows="error", on_problem="skip"), **SMALL))


def test_arguments(folder):
    with pytest.raises(ValueError, match="on_bad_rows='drop'; it must be"):
        open_all(folder, on_bad_rows="drop")


def test_fp64_beyond_fp32_is_a_bad_row(folder):
    rows = rows_of(2, 50).astype("f8")
    rows[25] *= 1e300
    np.save(image(folder, 2), rows)
    with pytest.raises(ValueError, match="in row 25"):
        open_captions(folder)
    with pytest.warns(UserWarning, match="img_emb_2.npy: row 25"):
        assert captions_of(2, 50)[25] not in one_batch(open_captions(folder, on_bad_rows="skip"))["text"]


@pytest.mark.parametrize("kind", [pa.list_(pa.float16()), pa.list_(pa.float32(), DIM)], ids=str)
def test_rows_that_parquet_files_lack(tmp_path, kind):
    """A row without an embedding, with one that is too short, and one with a number missing."""
    rows = [row.tolist() for row in rows_of(1, 20)]
    bad = {0, 4} if pa.types.is_fixed_size_list(kind) else {0, 4, 7}
    rows[0], rows[4] = None, [None, *rows[4][1:]]
    if 7 in bad:
        rows[7] = rows[7][:3]
    table = pa.table(dict(embedding=pa.array(rows, kind), caption=captions_of(1, 20)))
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=6)
    with pytest.raises(ValueError, match="rows that are not 8 wide"):
        EmbeddingShards.open(tmp_path)
    with pytest.warns(UserWarning, match="0.parquet: row 0 holds"):
        batch = one_batch(shards := EmbeddingShards.open(tmp_path, on_bad_rows="skip"))
    assert set(batch["text"]) == {c for row, c in enumerate(captions_of(1, 20)) if row not in bad}
    for caption, row in zip(batch["text"], batch["image_embed"].numpy()):
        np.testing.assert_array_equal(row, EXPECTED[caption][0])
    assert list(shards.count_bad_rows().values()) == [len(bad)]


def test_tars(tmp_path):
    rows = [*rows_of(1, 9)]
    rows[4], rows[6] = np.full(DIM, np.inf, "f2"), rows[6][:3]
    write_tar(tmp_path / "1.tar", rows)
    with pytest.raises(ValueError, match="differ in dtype or shape"):
        EmbeddingShards.open(tmp_path)
    with pytest.warns(UserWarning, match="1.tar: row 4"):
        batch = one_batch(EmbeddingShards.open(tmp_path, on_bad_rows="skip"))
    assert set(batch["text"]) == {c for row, c in enumerate(captions_of(1, 9)) if row not in (4, 6)}


@pytest.mark.parametrize("captions", [True, False])
def test_readers_leave_out_pairs(spoiled, captions):
    urls = [str(spoiled / name) for name in ("img_emb", "metadata", "text_emb")]
    readers = get_reader(captions, *urls, on_bad_rows="skip")
    loader, _, _ = make_splits(captions, 16, 110, 1.0, 0.0, *([readers] if captions else readers))
    batches = list(loader)
    bad = {5, 67} if captions else {5, 67, 90}
    assert loader.dataset.bad_rows == bad and sum(len(images) for images, _ in batches) == 110 - len(bad)
    left = [caption for index, caption in enumerate(IN_ORDER) if index not in bad]
    for column, values in enumerate(zip(*batches)):
        if not (captions and column):  # tokens
            found = np.concatenate([value.numpy() for value in values])
            np.testing.assert_array_equal(found, [EXPECTED[caption][column] for caption in left])
    with pytest.raises(ValueError, match="img_emb_0.npy: holds numbers"):
        get_reader(captions, *urls, on_bad_rows="error")


def test_readers_name_what_they_meet(spoiled, monkeypatch):
    monkeypatch.setattr("fastprior.dataloaders.match._PEEK_ROWS", 2)
    readers = get_reader(False, str(spoiled / "img_emb"), txt_url=str(spoiled / "text_emb"), on_bad_rows="error")
    loader, _, _ = make_splits(False, 16, 110, 1.0, 0.0, *readers)
    with pytest.raises(ShardError, match='pair 5 holds numbers that are not finite; on_bad_rows="skip"'):
        list(loader)


def test_inspect_counts(spoiled, capsys):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())

    def inspect(*options):
        args = parser.parse_args(["inspect", str(spoiled), *options])
        return args.run(args), capsys.readouterr().out

    status, out = inspect()
    assert status == 1 and "pairs             110" in out
    assert "2 of 110 rows of image embeddings that were looked at are not finite" in out
    status, out = inspect("--every-row")
    assert status == 1
    for number in BAD:
        assert f"img_emb_{number}.npy: 1 pair is not finite" in out
    for number, row in BAD.items():
        for path in (image(spoiled, number), text(spoiled, number)):
            spoil(path, row, 0.5)
    status, out = inspect("--every-row")
    assert status == 0 and "bad rows          none of all" in out
