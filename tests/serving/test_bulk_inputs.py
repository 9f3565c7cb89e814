"""Shards of texts as they are found: what is taken, what is carried along, and what is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastprior.dataloaders.files import RowGroups, ShardError
from fastprior.serving.bulk import find_shards
from helpers.bulk_cases import DIM, SIZES, write_caption_files, write_npy, write_parquet
from helpers.shard_cases import captions_of, rows_of, write_captions


def read(shard, column):
    return shard.files[column].read(0, shard.rows, RowGroups(0))


def test_what_clip_retrieval_wrote(tmp_path):
    shards = find_shards(write_npy(tmp_path / "in"))
    assert [(shard.name, shard.digits, shard.rows) for shard in shards] == [
        (f"text_emb_{number:02}.npy", f"{number:02}", count) for number, count in sorted(SIZES.items())
    ]
    for shard in shards:
        np.testing.assert_array_equal(read(shard, "text_embed"), rows_of(int(shard.digits), shard.rows, DIM, salt=1))
        shard.metadata.copy_to(tmp_path / "copy.parquet")
        assert (tmp_path / "copy.parquet").read_bytes() == open(shard.metadata.path, "rb").read()
    captions = find_shards(tmp_path / "in", captions=True)
    assert [shard.name for shard in captions] == [f"metadata_{number:02}.parquet" for number in sorted(SIZES)]
    assert read(captions[1], "text").to_pylist() == captions_of(2, 50)


@pytest.mark.parametrize("as_url", [False, True], ids=["path", "url"])
def test_npy_files_alone(tmp_path, as_url):
    folder = write_npy(tmp_path / "in", metadata=False) / "text_emb"
    shards = find_shards(f"file://{folder}/" if as_url else folder)
    assert [shard.metadata for shard in shards] == [None] * 3 and shards[0].name == "text_emb_00.npy"


def test_columns_of_parquet_files(tmp_path):
    shards = find_shards(write_parquet(tmp_path / "in"))
    assert [list(shard.files) for shard in shards] == [["text_embed"]] * 3
    np.testing.assert_array_equal(read(shards[1], "text_embed"), rows_of(2, 50, DIM, salt=1))
    shards[1].metadata.copy_to(tmp_path / "copy.parquet")
    assert pq.read_table(tmp_path / "copy.parquet").to_pydict() == dict(caption=captions_of(2, 50))
    assert read(find_shards(tmp_path / "in", captions=True)[1], "text").to_pylist() == captions_of(2, 50)
    pq.write_table(pa.table(dict(other=pa.array([[1.0, 2.0]]))), tmp_path / "in/part_99.parquet")
    with pytest.raises(ShardError, match="has no column 'embedding'; its columns are other"):
        find_shards(tmp_path / "in")


def test_captions_alone(tmp_path):
    shards = find_shards(write_caption_files(tmp_path / "in"))
    assert [list(shard.files) for shard in shards] == [["text"]] * 3
    assert read(shards[0], "text").to_pylist() == captions_of(0, 37)
    shards[0].metadata.copy_to(tmp_path / "copy.parquet")
    assert "caption" in pq.read_schema(tmp_path / "copy.parquet").names
    with pytest.raises(ValueError, match="holds captions, which are encoded themselves"):
        find_shards(tmp_path / "in", encodings=tmp_path)


@pytest.mark.parametrize(
    "name, digits", [("part-00003-4f3a-c000.snappy.parquet", "00003"), ("a_3.parquet", "3"), ("a.parquet", "0")]
)
def test_numbers_in_names(tmp_path, name, digits):
    write_captions(tmp_path / name, captions_of(0, 2))
    assert [shard.digits for shard in find_shards(tmp_path)] == [digits]


def test_rows_that_are_missing_are_nan(tmp_path):
    rows = pa.array([[1.0, 2.0], None, [1.0], [3.0, 4.0]])
    pq.write_table(pa.table(dict(embedding=rows)), tmp_path / "x_0.parquet")
    (shard,) = find_shards(tmp_path)
    assert np.isfinite(read(shard, "text_embed")).all(axis=1).tolist() == [True, False, False, True]
    assert shard.metadata is None  # no other column


def test_identities_tell_files_apart(tmp_path):
    folder = write_npy(tmp_path / "in")
    before = [(shard.identities(), shard.hashes()) for shard in find_shards(folder)]
    assert [(shard.identities(), shard.hashes()) for shard in find_shards(folder)] == before
    path = folder / "text_emb/text_emb_02.npy"
    rows = np.load(path)
    np.save(path, rows[::-1])
    after = [(shard.identities(), shard.hashes()) for shard in find_shards(folder)]
    assert after[0] == before[0] and after[1] != before[1] and after[1][1][0] != before[1][1][0]


def corrupt(folder):
    (folder / "metadata/metadata_02.parquet").write_bytes(b"PAR1 and nothing else PAR1")


def cut(folder):
    path = folder / "text_emb/text_emb_02.npy"
    path.write_bytes(path.read_bytes()[:-5])


def lose(folder):
    (folder / "metadata/metadata_02.parquet").unlink()


def shorten(folder):
    write_captions(folder / "metadata/metadata_02.parquet", captions_of(2, 49))


def repeat(folder):
    np.save(folder / "text_emb/again_2.npy", rows_of(2, 50, DIM))


def unnumber(folder):
    np.save(folder / "text_emb/more.npy", rows_of(2, 50, DIM))


def integers(folder):
    np.save(folder / "text_emb/text_emb_02.npy", np.ones((50, DIM), np.int64))


def two(folder):
    corrupt(folder), cut(folder.parent / "in")
    (folder / "metadata/metadata_00.parquet").unlink()


@pytest.mark.parametrize(
    "harm, error",
    [
        (corrupt, "metadata_02.parquet: cannot be read"),
        (cut, "text_emb_02.npy: truncated"),
        (lose, "text_emb_02.npy: no metadata of its number, 2"),
        (shorten, "metadata_02.parquet: 49 rows, and 50 in .*text_emb_02.npy"),
        (repeat, "_0?2.npy: has the number 2 of"),
        (unnumber, "more.npy: has no number in its name"),
        (integers, "text_emb_02.npy: holds int64"),
        (two, r"text_emb_00.npy: no metadata .* \(and 1 more files\)"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, harm, error):
    folder = write_npy(tmp_path / "in")
    harm(folder)
    with pytest.raises(ShardError, match=error):
        find_shards(folder)


def test_nothing_there(tmp_path):
    for name in ("missing", ""):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="does not exist, or holds no files"):
            find_shards(tmp_path / (name or "empty"))
    (tmp_path / "empty/x.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="holds no .npy or .parquet files of text embeddings"):
        find_shards(tmp_path / "empty")
