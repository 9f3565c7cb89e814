"""Shards, readers and streams, on small files as clip-retrieval writes them."""

import argparse
import io
import json
import tarfile
import threading

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from embedding_reader import EmbeddingReader

from fastprior.cli.inspect import add_inspect_parser
from fastprior.dataloaders import (
    EmbeddingShards,
    PairStream,
    PriorEmbeddingDataset,
    ShardError,
    distribute_to_rank,
    get_reader,
    make_splits,
)
from fastprior.dataloaders.files import ParquetColumn, RowGroups, shard_number
from helpers.at_once import at_once

DIM = 8
SIZES = {0: 37, 2: 50, 10: 23}  # rows by shard number; sorted by name they are 0, 10, 2


def rows_of(number, count, dim=DIM, salt=0):
    rows = np.random.default_rng([number, salt]).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def captions_of(number, count):
    return [f"caption {row} of shard {number}" for row in range(count)]


def write_captions(path, captions, **options):
    pq.write_table(pa.table(dict(image_path=[str(i) for i in range(len(captions))], caption=captions)), path, **options)


def write(folder, sizes=SIZES):
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, count in sizes.items():
        np.save(folder / f"img_emb/img_emb_{number}.npy", rows_of(number, count))
        np.save(folder / f"text_emb/text_emb_{number}.npy", rows_of(number, count, salt=1))
        # several row groups, whose edges are not those of any block
        write_captions(folder / f"metadata/metadata_{number}.parquet", captions_of(number, count), row_group_size=13)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("data") / "data")
    return EmbeddingShards.open(folder / "img_emb", folder / "metadata", folder / "text_emb")


def open_captions(folder, **options):
    return EmbeddingShards.open(folder / "img_emb", folder / "metadata", **options)


EXPECTED = {
    caption: (image, text)
    for number in range(11)
    for caption, image, text in zip(
        captions_of(number, 60), rows_of(number, 60).astype(np.float32), rows_of(number, 60, salt=1).astype(np.float32)
    )
}
IN_ORDER = [caption for number in sorted(SIZES) for caption in captions_of(number, SIZES[number])]


def check_pairs(captions, images):
    """Each image belongs to its caption. A shard's first rows do not depend on how many it has."""
    for caption, image in zip(captions, images, strict=True):
        np.testing.assert_array_equal(image, EXPECTED[caption][0], err_msg=caption)


# readers and splits


def read_all(reader, batch_size=16):
    batches = list(reader(batch_size=batch_size, start=0, end=reader.count, show_progress=False))
    return np.concatenate([images for images, _ in batches]), [c for _, table in batches for c in table["caption"]]


@pytest.mark.parametrize("ours", [True, False], ids=["fastprior", "peer"])
def test_a_missing_metadata_shard_does_not_move_captions(tmp_path, peer, ours):
    from dalle2_pytorch.dataloaders.prior_loader import get_reader as peer_get_reader

    folder = write(tmp_path / "data", {0: 20, 1: 20, 2: 20})
    (folder / "metadata/metadata_1.parquet").unlink()
    urls = str(folder / "img_emb"), str(folder / "metadata")
    if ours:
        with pytest.raises(ValueError, match=r"img_emb_1.npy: no captions of its number, 1"):
            get_reader(True, *urls)
        images, captions = read_all(get_reader(True, *urls, on_problem="skip"))
        assert len(images) == 40
        check_pairs(captions, images)
    else:  # images of shard 1 get captions of shard 2, without a word
        images, captions = read_all(peer_get_reader(True, *urls))
        with pytest.raises(AssertionError, match="of shard 2"):
            check_pairs(captions, images)


def test_readers_go_by_number(folder):
    images, captions = read_all(get_reader(True, str(folder / "img_emb"), str(folder / "metadata")))
    assert captions == IN_ORDER
    check_pairs(captions, images)
    by_name = EmbeddingReader(str(folder / "img_emb"), "parquet_npy", meta_columns=["caption"],
                              metadata_folder=str(folder / "metadata"))  # fmt: skip
    assert read_all(by_name)[1] != IN_ORDER


@pytest.mark.parametrize("text_conditioned", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_splits_are_the_peers(tmp_path, peer, text_conditioned, world_size):
    from dalle2_pytorch.dataloaders import prior_loader as theirs

    import fastprior.dataloaders as ours

    folder = write(tmp_path / "data", {0: 40, 1: 60})
    found = []
    for module in (ours, theirs):
        readers = module.get_reader(text_conditioned, str(folder / "img_emb"), str(folder / "metadata"),
                                    str(folder / "text_emb"))  # fmt: skip
        readers = (readers,) if text_conditioned else readers
        splits = module.make_splits(text_conditioned, 7, 1000, 0.5, 0.3, *readers, rank=world_size - 1,
                                    world_size=world_size, start=4)  # fmt: skip
        assert [str(loader.dataset) for loader in splits]
        found.append([(len(loader), list(loader)) for loader in splits])
    for (our_length, our_batches), (length, batches) in zip(*found):
        assert our_length == length > 0
        assert len(our_batches) == len(batches) > 0
        for our_batch, batch in zip(our_batches, batches):
            torch.testing.assert_close(list(our_batch), list(batch), rtol=0, atol=0)


@pytest.mark.parametrize("train, evaluation, sizes", [(0.9, 0.1, (90, 10, 0)), (0.7, 0.3, (70, 30, 0)),
                                                      (1.0, 0.0, (100, 0, 0)), (0.57, 0.29, (57, 29, 14))])  # fmt: skip
def test_splits_may_be_empty(folder, train, evaluation, sizes):
    reader = get_reader(True, str(folder / "img_emb"), str(folder / "metadata"))
    loaders = make_splits(True, 8, 100, train, evaluation, reader)
    assert tuple(len(loader) for loader in loaders) == sizes
    assert tuple(sum(len(images) for images, _ in loader) for loader in loaders) == sizes


def test_ranks_get_equal_parts():
    for length in (0, 4, 5, 7, 1001):
        parts = [distribute_to_rank(10, 10 + length, rank, 4) for rank in range(4)]
        assert len({stop - start for start, stop in parts}) == 1
        assert parts[0][0] == 10 and all(a[1] == b[0] for a, b in zip(parts, parts[1:]))
        assert 10 + length - 4 < parts[-1][1] <= 10 + length
    with pytest.raises(ValueError, match="start=0, stop=3; 4 ranks need at least as many"):
        distribute_to_rank(0, 3, 0, 4)


def test_dataset_resumes_and_checks(folder):
    images, texts = get_reader(False, str(folder / "img_emb"), txt_url=str(folder / "text_emb"))
    loader, _, _ = make_splits(False, 10, 100, 0.6, 0.2, images, texts)
    loader.dataset.set_start(20)
    assert loader.dataset.get_start() == 20 and len(loader) == 40
    captions = iter(IN_ORDER[20:60])
    for image, text in loader:
        for row, caption in zip(range(len(image)), captions):
            assert (image[row].numpy() == EXPECTED[caption][0]).all()
            assert (text[row].numpy() == EXPECTED[caption][1]).all()
    with pytest.raises(ValueError, match="train_split=0.8, eval_split=0.3"):
        make_splits(False, 10, 100, 0.8, 0.3, images, texts)
    with pytest.raises(ValueError, match="start=61"):
        make_splits(False, 10, 100, 0.6, 0.2, images, texts, start=61)
    with pytest.raises(ValueError, match="meta_url=None"):
        get_reader(True, "somewhere")
    with pytest.raises(ValueError, match="text_reader=None"):
        PriorEmbeddingDataset(False, 1, 0, 1, images)


# what is there and what is wrong


@pytest.mark.parametrize("name, number", [
    ("img_emb_0.npy", 0), ("a2/metadata_00012.parquet", 12), ("shard7.tar", 7), ("embeddings.npy", None),
    ("part-00003-1234abcd-c000.snappy.parquet", 3), ("v2_img_0005_fp16x.npy", 5),
])  # fmt: skip
def test_shard_number(name, number):
    assert shard_number(name) == number


def truncate(path, by=5):
    path.write_bytes(path.read_bytes()[:-by])


def image(folder, number):
    return folder / f"img_emb/img_emb_{number}.npy"


def metadata(folder, number):
    return folder / f"metadata/metadata_{number}.parquet"


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
    "mixed dtype": (lambda f: np.save(image(f, 0), rows_of(0, 37).astype("f4")),
                    r"img_emb_0.npy: float32 \(8,\); image embeddings of the other shards are float16", (2, 10)),
    "mixed width": (lambda f: np.save(image(f, 10), rows_of(10, 23, 6)), r"img_emb_10.npy: float16 \(6,\)", (0, 2)),
    "integers": (lambda f: np.save(image(f, 0), np.ones((37, DIM), int)), "holds int64; it must be float16", (2, 10)),
    "big endian": (lambda f: np.save(image(f, 0), rows_of(0, 37).astype(">f2")), "holds >f2", (2, 10)),
    "flat": (lambda f: np.save(image(f, 0), rows_of(0, 37)[:, 0]), r"has shape \(37,\)", (2, 10)),
    "columns first": (lambda f: np.save(image(f, 0), np.asfortranarray(rows_of(0, 37))), "columns are stored", (2, 10)),
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
    add_inspect_parser(parser.add_subparsers())
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


# streams

SMALL = dict(buffer_bytes=12 * 132)  # 12 pairs, and blocks of one: many buffers even here


def stream(shards, **options):
    return PairStream(shards, **(dict(batch_size=7, seed=5) | SMALL | options))


def texts(batches):
    return [batch["text"] for batch in batches]


def flat(batches):
    return [caption for batch in batches for caption in batch["text"]]


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world_size, buffer_rows", [(1, 12), (3, 12), (4, 100)])  # the last with blocks of 3
def test_every_pair_once(shards, seed, drop_last, world_size, buffer_rows):
    options = dict(seed=seed, drop_last=drop_last, world_size=world_size, buffer_bytes=buffer_rows * 132)
    ranks = [stream(shards, start=4, stop=106, rank=rank, **options) for rank in range(world_size)]
    epochs = []
    for _ in range(2):
        batches = [list(rank) for rank in ranks]
        sizes = [[len(batch["text"]) for batch in each] for each in batches]
        assert all(each == sizes[0] and len(each) == len(ranks[0]) for each in sizes)
        assert all(size == 7 for size in sizes[0][: -1 if not drop_last else None])
        for each in batches:
            for batch in each:
                check_pairs(batch["text"], batch["image_embed"].numpy())
                assert batch["image_embed"].dtype == torch.float32
        seen = [caption for each in batches for caption in flat(each)]
        assert len(seen) == len(set(seen)) and set(seen) <= set(IN_ORDER[4:106])
        assert len(seen) >= 102 - world_size * (7 if drop_last else 1) + 1
        epochs.append(seen)
    assert (epochs[0] == epochs[1]) == (seed is None)
    assert seed is not None or epochs[0][:20] == IN_ORDER[4:24]


def test_order_does_not_depend_on_workers(shards):
    expected = texts(stream(shards, prefetch=0))
    for options in (dict(workers=3), dict(prefetch=1, workers=2), dict(prefetch=9)):
        assert texts(stream(shards, **options)) == expected
    assert texts(stream(shards, seed=6)) != expected
    assert flat(stream(shards, batch_size=10, drop_last=False))[:100] == flat(stream(shards, drop_last=False))[:100]


def test_shuffling_mixes_shards(shards):
    first = flat([next(iter(stream(shards, batch_size=12)))])
    assert len({caption.split()[-1] for caption in first}) == 3
    rows = np.array([IN_ORDER.index(caption) for caption in flat(stream(shards, batch_size=1))])
    assert abs(np.corrcoef(rows, np.arange(110))[0, 1]) < 0.3


def test_epochs_shuffle_blocks_and_rows(shards):
    both = stream(shards, batch_size=12)
    first = set(next(iter(both))["text"])
    both.set_epoch(1)
    assert first != set(next(iter(both))["text"])
    one_block = stream(shards, stop=3, batch_size=3, buffer_bytes=100 * 132)
    orders = [flat(one_block) for _ in range(6)]
    assert all(sorted(order) == IN_ORDER[:3] for order in orders) and len(set(map(tuple, orders))) > 2


def test_row_groups_are_shuffled_in_windows(shards, monkeypatch):
    """Windows of two row groups: whatever the order, each group is decoded once."""
    decoded = []
    decode = ParquetColumn._decode
    monkeypatch.setattr("fastprior.dataloaders.stream._WINDOW_BYTES", 26 * 100)
    monkeypatch.setattr(
        ParquetColumn, "_decode", lambda file, group: decoded.append((file, group)) or decode(file, group)
    )
    captions = flat(stream(shards, batch_size=1))
    assert sorted(captions) == sorted(IN_ORDER)
    assert len(decoded) == len(set(decoded)) == 9
    first = [IN_ORDER.index(caption) for caption in captions[:24]]
    assert max(first) > 36  # the first window is not made of the first groups


def test_rows_of_several_row_groups(folder):
    file = open_captions(folder).shards[1].files["text"]
    assert file.read(5, 45, RowGroups(0)).to_pylist() == captions_of(2, 50)[5:45]


@pytest.mark.parametrize("rank", [0, 1])
def test_resume_at_the_exact_sample(shards, rank):
    options = dict(world_size=2, drop_last=False)
    whole = stream(shards, rank=rank, **options)
    expected = [texts(whole), texts(whole)]
    for taken in range(len(whole) + 1):
        left = stream(shards, rank=0, **options)  # the state of one rank serves all
        batches = iter(left)
        for _ in range(taken):
            next(batches)
        state = json.loads(json.dumps(left.state_dict()))
        batches.close()
        resumed = stream(shards, rank=rank, workers=2, prefetch=1, **options)
        resumed.load_state_dict(state)
        assert texts(resumed) == expected[0][taken:]
        assert texts(resumed) == expected[1]
    resumed = stream(shards, rank=rank, batch_size=3, **options)
    resumed.load_state_dict(dict(state, sample=14))
    assert flat(resumed) == [caption for batch in expected[0] for caption in batch][14:]


def test_an_iteration_left_early_is_continued(shards):
    expected = texts(stream(shards))
    left = stream(shards)
    assert texts(batch for _, batch in zip(range(3), left)) == expected[:3] and left.sample == 21
    assert texts(left) == expected[3:] and left.epoch == 1
    left.set_epoch(0)
    assert texts(left) == expected


def test_state_of_something_else(shards, folder):
    state = stream(shards, world_size=2).state_dict()
    stream(shards, world_size=4).load_state_dict(state)  # between epochs the ranks may change
    state["sample"] = 7
    for name, value in dict(world_size=4, seed=6, stop=100, buffer_bytes=132).items():
        other = stream(shards, **dict(world_size=2) | {name: value})
        with pytest.raises(ValueError, match=f"was taken with {name.replace('bytes', 'rows')}="):
            other.load_state_dict(state)
    image(folder, 10).unlink()
    with pytest.raises(ValueError, match="with digest="):
        stream(open_captions(folder, on_problem="skip"), stop=80).load_state_dict(stream(shards, stop=80).state_dict())
    with pytest.raises(ValueError, match="has no epoch and no sample; it has step"):
        stream(shards).load_state_dict(dict(step=3))


def test_padding_gives_every_pair_out(shards):
    ranks = [list(stream(shards, start=0, stop=10, world_size=4, rank=r, pad=True, drop_last=False)) for r in range(4)]
    seen = [flat(batches) for batches in ranks]
    assert [len(each) for each in seen] == [3] * 4
    assert set().union(*seen) == set(IN_ORDER[:10])
    alone = [flat(stream(shards, stop=1, world_size=4, rank=rank, pad=True, batch_size=1)) for rank in range(4)]
    assert alone == [[IN_ORDER[0]]] * 4


def test_nothing_to_give(shards):
    for options in (dict(start=5, stop=5), dict(stop=3, world_size=4), dict(stop=6)):
        empty = stream(shards, **options)
        assert len(empty) == 0 and list(empty) == [] and empty.epoch == 1


@pytest.mark.parametrize("options, message", [
    (dict(start=3, stop=2), "start=3, stop=2"), (dict(stop=111), "<= 110 pairs"), (dict(rank=2), "rank=2, world"),
    (dict(batch_size=0), "batch_size=0"), (dict(workers=0), "workers=0"), (dict(prefetch=-1), "prefetch=-1"),
    (dict(seed=-1), "seed=-1"), (dict(batch_size=2.0), "batch_size=2.0"),
])  # fmt: skip
def test_arguments(shards, options, message):
    with pytest.raises(ValueError, match=message):
        stream(shards, **options)


def test_prefetching_is_bounded_and_ends(shards):
    made = []

    class Counting(PairStream):
        def _batch(self, parts):
            made.append(1)
            return super()._batch(parts)

    batches = iter(Counting(shards, batch_size=2, prefetch=3))
    next(batches)
    for _ in range(1000):  # until it waits
        threading.Event().wait(0.03)
        if len(made) >= 5:
            break
    threading.Event().wait(0.03)
    assert len(made) == 5  # one given out, three ready, one waiting for room
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastprior-pairs")]


def overwrite_data(path):
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = b"\xff" * (len(data) // 2 - 4)
    path.write_bytes(data)


MID_RUN = {
    "truncated images": lambda folder: truncate(image(folder, 2), 50 * DIM * 2),
    "missing images": lambda folder: image(folder, 2).unlink(),
    "corrupt captions": lambda folder: overwrite_data(metadata(folder, 2)),
}


@pytest.mark.parametrize("name", MID_RUN)
@pytest.mark.parametrize("seed", [None, 5])
def test_corrupt_in_mid_run(folder, name, seed):
    strict, lenient = open_captions(folder), open_captions(folder, on_problem="skip")
    MID_RUN[name](folder)
    with pytest.raises(ShardError, match="img_emb_2.npy|metadata_2.parquet"):
        list(stream(strict, seed=seed))
    damaged = stream(lenient, seed=seed, world_size=2, rank=1)
    with pytest.warns(UserWarning, match="img_emb_2.npy.*other pairs take the places"
                      if "captions" not in name else "metadata_2.parquet"):  # fmt: skip
        batches = list(damaged)
    assert [len(batch["text"]) for batch in batches] == [7] * len(damaged)
    assert len(damaged.problems) == 1
    for batch in batches:
        check_pairs(batch["text"], batch["image_embed"].numpy())
    good, good_shards = set(flat(batches)), {"10"} if seed is None else {"0", "10"}  # unshuffled, 0 is rank 0's
    assert {caption.split()[-1] for caption in good} - ({"2"} if "captions" in name else set()) == good_shards
    again = stream(lenient, seed=seed, world_size=2, rank=1, workers=3)
    with pytest.warns(UserWarning):
        assert texts(again) == texts(batches)


def test_nothing_left_in_mid_run(folder):
    lenient = open_captions(folder, on_problem="skip")
    for number in SIZES:
        image(folder, number).unlink()
    with pytest.warns(UserWarning), pytest.raises(ShardError, match="no pair of this rank's part can be read"):
        list(stream(lenient))


def test_ranks_must_see_the_same(shards, monkeypatch):
    def gather(into, own):
        into[:] = [own, "another"]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(ValueError, match="the ranks see different shards"):
        stream(shards, world_size=2)
    stream(shards)  # a stream of one rank asks nobody


def test_row_groups_are_decoded_once_and_given_up():
    loads, groups = [], RowGroups(limit=100)

    def load(key):
        return groups.get(key, lambda: loads.append(key) or pa.array(np.zeros(8)))  # 64 bytes

    at_once(load, "a" * 8)
    assert loads == ["a"]
    load("b")
    load("b")
    assert loads == ["a", "b"]
    load("a")
    assert loads == ["a", "b", "a"]


def test_captions_of_embedding_reader_are_ours(folder):
    """The parquet files are what embedding_reader reads too: pandas reads the same."""
    table = pd.read_parquet(metadata(folder, 2))
    assert table["caption"].tolist() == captions_of(2, 50)
