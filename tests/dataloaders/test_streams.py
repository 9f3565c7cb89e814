"""Streams of pairs: order, ranks, resumption, prefetching, and files that go bad in mid-run."""

import json
import threading

import numpy as np
import pyarrow as pa
import pytest
import torch

from fastprior.dataloaders import EmbeddingShards, PairStream, ShardError
from fastprior.dataloaders.files import ParquetColumn, RowGroups
from helpers.at_once import at_once
from helpers.shard_cases import (
    DIM,
    IN_ORDER,
    SIZES,
    captions_of,
    check_pairs,
    image,
    metadata,
    open_captions,
    truncate,
    write,
)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("data") / "data")
    return EmbeddingShards.open(folder / "img_emb", folder / "metadata", folder / "text_emb")


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
