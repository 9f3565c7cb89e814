"""Small folders of texts to embed in bulk, a prior for them, and what a run leaves."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import fastprior
from fastprior.cli import command_line as cli
from helpers.priors import make_prior
from helpers.shard_cases import captions_of, rows_of, write_captions

DIM = 32
SIZES = {0: 37, 2: 50, 10: 23}


def write_prior(path, **options):
    """A random prior's checkpoint, by default without text encodings."""
    prior = make_prior(**dict(condition_on_text_encodings=False) | options)
    fastprior.save(prior, path)
    return path


def write_npy(folder, sizes=SIZES, metadata=True):
    """As clip-retrieval writes text embeddings, with metadata."""
    for name in ("text_emb", "metadata") if metadata else ("text_emb",):
        (folder / name).mkdir(parents=True)
    for number, count in sizes.items():
        np.save(folder / f"text_emb/text_emb_{number:02}.npy", rows_of(number, count, DIM, salt=1))
        if metadata:
            captions = captions_of(number, count)
            write_captions(folder / f"metadata/metadata_{number:02}.parquet", captions, row_group_size=13)
    return folder


def write_parquet(folder, sizes=SIZES):
    """The same embeddings in the column of parquet files, with captions beside them."""
    folder.mkdir(parents=True)
    for number, count in sizes.items():
        rows = pa.array(list(rows_of(number, count, DIM, salt=1)), pa.list_(pa.float16()))
        table = pa.table(dict(caption=captions_of(number, count), embedding=rows))
        pq.write_table(table, folder / f"part_{number:02}.parquet", row_group_size=11)
    return folder


def write_caption_files(folder, sizes=SIZES):
    folder.mkdir(parents=True)
    for number, count in sizes.items():
        write_captions(folder / f"captions_{number:02}.parquet", captions_of(number, count), row_group_size=13)
    return folder


def embed(source, out, checkpoint, *options) -> int:
    """Run the command, in this process."""
    return cli.main(["embed", str(source), str(out), "--checkpoint", str(checkpoint), *map(str, options)])


def images(out) -> dict[str, np.ndarray]:
    return {path.name: np.load(path) for path in sorted((out / "img_emb").glob("*"))}


def written(out) -> dict[str, str]:
    """The hash of every file, by its path."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def entry(out, number=2) -> dict:
    return json.loads((out / f"manifest/shard_{number:02}.json").read_text())
