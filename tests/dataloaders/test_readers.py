"""Readers and splits with dalle2-pytorch's signatures, which match files by their numbers."""

import numpy as np
import pandas as pd
import pytest
import torch
from embedding_reader import EmbeddingReader

from fastprior.dataloaders import (
    PriorEmbeddingDataset,
    distribute_to_rank,
    get_reader,
    make_splits,
)
from helpers.shard_cases import EXPECTED, IN_ORDER, captions_of, check_pairs, metadata, write


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data")


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


def test_captions_of_embedding_reader_are_ours(folder):
    """The parquet files are what embedding_reader reads too: pandas reads the same."""
    table = pd.read_parquet(metadata(folder, 2))
    assert table["caption"].tolist() == captions_of(2, 50)
