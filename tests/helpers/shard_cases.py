"""Small folders of shards, as clip-retrieval writes them, and what is in them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastprior.dataloaders import EmbeddingShards

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


def truncate(path, by=5):
    path.write_bytes(path.read_bytes()[:-by])


def image(folder, number):
    return folder / f"img_emb/img_emb_{number}.npy"


def metadata(folder, number):
    return folder / f"metadata/metadata_{number}.parquet"
