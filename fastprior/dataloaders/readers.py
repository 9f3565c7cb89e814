"""Pairs of embeddings for training: dalle2-pytorch's readers and splits, and fastprior's own shards and streams.

`get_reader` and `make_splits` have dalle2-pytorch's signatures and are built on `embedding_reader`, but pair files by
the number in their names. `EmbeddingShards` and `PairStream` also shuffle, resume and read further formats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

try:
    import pandas as pd
    from embedding_reader import EmbeddingReader
    from embedding_reader.numpy_reader import NumpyReader
    from embedding_reader.parquet_numpy_reader import ParquetNumpyReader
except ImportError as error:
    raise ImportError(f'{error.name} is not installed: pip install "fastprior[train]"') from error

from fastprior.dataloaders.files import NpyFile, ParquetColumn, RowGroups, ShardError, finite_rows, naming
from fastprior.dataloaders.match import SKIP_HINT
from fastprior.dataloaders.shards import EmbeddingShards

_TOLERANCE = 1e-6  # of shares that are sums of decimal fractions


class _Rows:
    """An open .npy file that is nothing but its rows, one behind the other, as one dtype."""

    def __init__(self, file: NpyFile, dtype: str, row_bytes: int):
        self.file, self.dtype, self.row_bytes = file, dtype, row_bytes

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *error) -> None: ...

    def seek(self, offset: int) -> None:
        self.row = offset // self.row_bytes

    def read(self, size: int) -> bytes:
        rows = self.file.read(self.row, self.row + size // self.row_bytes, RowGroups(0))
        return rows.astype(self.dtype, copy=False).tobytes()


class _RowFiles:
    """What the reader takes for a file system: files of any order and dtype, opened as `_Rows`."""

    def __init__(self, files: list[NpyFile], dtype: str, row_bytes: int):
        self.files, self.kind = {file.path: file for file in files}, (dtype, row_bytes)

    def open(self, path: str, mode: str = "rb") -> _Rows:
        return _Rows(self.files[path], *self.kind)


class MatchedReader(EmbeddingReader):
    """An `EmbeddingReader` over .npy files that `EmbeddingShards` matched and checked, with their captions if any.

    Called as `reader(batch_size, start, end, show_progress=False)` it yields (embeddings, table), in the order of the
    shards' numbers. embeddings: (batch, dim), fp32; table: a DataFrame of "caption", if any, and the position "i".
    """

    def __init__(self, shards: EmbeddingShards, column: str = "image_embed", captions: bool = False):
        files = [shard.files[column] for shard in shards.shards]
        rows, widest = pd.Series([file.rows for file in files]), shards.widest[column]
        texts = [shard.files["text"] for shard in shards.shards] if captions else []
        if not isinstance(files[0], NpyFile) or not all(isinstance(file, ParquetColumn) for file in texts):
            raise ValueError(f"{files[0].name}: readers need .npy embeddings, and captions in parquet files")
        # the readers' own constructors pair files by their sorted names; they need no more than this table
        kind = ParquetNumpyReader if captions else NumpyReader
        reader = kind.__new__(kind)
        reader.headers = pd.DataFrame(
            dict(
                filename=[file.path for file in files],
                count=rows,
                count_before=rows.cumsum() - rows,
                dimension=widest.shape[0],
                dtype=widest.dtype,
                header_offset=0,
                byte_per_item=widest.row_bytes,
            )
        )
        reader.fs = _RowFiles(files, widest.dtype, widest.row_bytes)
        reader.dtype, reader.dimension = widest.dtype, widest.shape[0]
        reader.nb_files, reader.count, reader.byte_per_item = len(files), int(rows.sum()), widest.row_bytes
        reader.total_size = reader.count * reader.byte_per_item
        reader.max_file_size = int(rows.max()) * reader.byte_per_item
        if captions:
            reader.headers["metadata_path"] = [file.path for file in texts]
            reader.metadata_fs, reader.metadata_column_names = texts[0].fs, [texts[0].column]
        self.reader, self.shards = reader, shards
        self.embeddings_folder = reader.embeddings_folder = shards.sources[column]
        self.dimension, self.count = reader.dimension, reader.count
        self.byte_per_item, self.total_size = reader.byte_per_item, reader.total_size

    def __call__(self, *args, **kwargs) -> Iterator[tuple[np.ndarray, pd.DataFrame]]:
        """See the class. Raises ShardError where a file turns out unreadable."""
        with naming(" or ".join(filter(None, (self.embeddings_folder, self.shards.sources.get("text"))))):
            yield from super().__call__(*args, **kwargs)


def get_reader(
    text_conditioned: bool,
    img_url: str,
    meta_url: str | None = None,
    txt_url: str | None = None,
    *,
    on_problem: str = "error",
    on_bad_rows: str | None = None,
) -> EmbeddingReader | tuple[EmbeddingReader, EmbeddingReader]:
    """Readers of .npy image embeddings: one with captions if text_conditioned, else one more, of text embeddings.

    img_url, txt_url: folders of .npy files; meta_url: of parquet files with a column "caption". Files belong together
    by the number in their names. on_problem, on_bad_rows: as for `EmbeddingShards.open`, which says what it raises.
    Rows met later are left out by `PriorEmbeddingDataset`, since one of two readers alone cannot leave out pairs.

    Raises ValueError where meta_url, or without text_conditioned txt_url, is missing.
    """
    name, url = ("meta_url", meta_url) if text_conditioned else ("txt_url", txt_url)
    if img_url is None or url is None:
        raise ValueError(
            f"img_url={img_url!r}, {name}={url!r}; with text_conditioned={text_conditioned} both are needed"
        )
    options = dict(file_format="npy", on_problem=on_problem, on_bad_rows=on_bad_rows)
    if text_conditioned:
        return MatchedReader(EmbeddingShards.open(img_url, meta_url, **options), captions=True)
    shards = EmbeddingShards.open(img_url, text_url=txt_url, **options)
    return MatchedReader(shards), MatchedReader(shards, "text_embed")


class PriorEmbeddingDataset(IterableDataset):
    """Batches (image embeddings, tokens or text embeddings) of pairs start to stop of readers, in their order.

    image embeddings, text embeddings: (batch, dim), fp32. tokens: (batch, 77), int64, of captions cut to that length.
    What the readers' on_bad_rows asks for is done here: with "skip" a batch is shorter by the pairs with numbers that
    are not finite, whose positions are in `bad_rows`; with "error" ShardError is raised.
    """

    def __init__(
        self,
        text_conditioned: bool,
        batch_size: int,
        start: int,
        stop: int,
        image_reader: EmbeddingReader,
        text_reader: EmbeddingReader | None = None,
    ):
        super().__init__()
        if not text_conditioned and text_reader is None:
            raise ValueError("text_reader=None; without text_conditioned there must be one")
        self.text_conditioned, self.batch_size = text_conditioned, batch_size
        self.start, self.stop = start, stop
        self.image_reader, self.text_reader = image_reader, text_reader
        self.on_bad_rows = image_reader.shards.on_bad_rows if isinstance(image_reader, MatchedReader) else None
        self.bad_rows: set[int] = set()

    def __len__(self) -> int:
        """Pairs, not batches."""
        return self.stop - self.start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.stop <= self.start:
            return
        options = dict(batch_size=self.batch_size, start=self.start, end=self.stop, show_progress=False)
        if self.text_conditioned:
            for images, table in self.image_reader(**options):
                captions = np.array(["" if pd.isna(caption) else caption for caption in table["caption"]], object)
                images, captions = self._good(table["i"], images, captions)
                if len(images):
                    yield torch.from_numpy(images), _tokenizer()(captions.tolist())
        else:
            for (images, table), (texts, _) in zip(self.image_reader(**options), self.text_reader(**options)):
                images, texts = self._good(table["i"], images, texts)
                if len(images):
                    yield torch.from_numpy(images), torch.from_numpy(texts)

    def _good(self, positions: pd.Series, *columns: np.ndarray) -> list[np.ndarray]:
        """The columns of a batch, without the rows that on_bad_rows="skip" leaves out."""
        if self.on_bad_rows is None:
            return [*columns]
        good = np.logical_and.reduce([finite_rows(column) for column in columns if column.dtype != object])
        if not good.all() and self.on_bad_rows == "error":
            where = f"pair {positions.iloc[np.argmin(good)]} holds numbers that are not finite"
            raise ShardError(self.image_reader.embeddings_folder, f"{where}; {SKIP_HINT}")
        self.bad_rows.update(positions[~good].tolist())
        return [column[good] for column in columns]

    def __str__(self) -> str:
        return f"<PriorEmbeddingDataset: start: {self.start}, stop: {self.stop}, len: {len(self)}>"

    def set_start(self, start: int) -> None:
        """Move the first pair, to resume within an epoch."""
        self.start = start

    def get_start(self) -> int:
        return self.start


@cache
def _tokenizer() -> Any:
    try:
        from open_clip import get_tokenizer
    except ImportError as error:
        raise ImportError('open-clip-torch is not installed: pip install "fastprior[clip]"') from error
    return get_tokenizer("ViT-L-14")  # OpenAI's vocabulary and length


def distribute_to_rank(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """Start and stop of one rank's part of [start, stop): as many pairs on every rank, so that none waits for another.

    What does not divide, fewer than world_size pairs at the end, is left out.

    Raises ValueError where the range is not empty but every part would be, and for a rank that there is not.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}, world_size={world_size}; it must be 0 <= rank < world_size")
    if stop < start or 0 < stop - start < world_size:
        raise ValueError(f"start={start}, stop={stop}; {world_size} ranks need at least as many pairs, or none at all")
    length = (stop - start) // world_size
    return start + rank * length, start + (rank + 1) * length


def make_splits(
    text_conditioned: bool,
    batch_size: int,
    num_data_points: int,
    train_split: float,
    eval_split: float,
    image_reader: EmbeddingReader,
    text_reader: EmbeddingReader | None = None,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Loaders of one rank's part of the pairs for training, validation and test, over `PriorEmbeddingDataset`.

    batch_size: of one rank. num_data_points: how many of the readers' pairs to use, from the first; at most all.
    train_split, eval_split: shares of them; the test part is the rest, which may be empty.
    start: position at which the training part begins, to resume.

    Raises ValueError for shares that are negative or sum to more than 1, a start beyond the training part, and as
    `distribute_to_rank`.
    """
    count = min(num_data_points, int(image_reader.count))
    if min(train_split, eval_split) < 0 or train_split + eval_split > 1 + _TOLERANCE:
        raise ValueError(
            f"train_split={train_split}, eval_split={eval_split}; they must be at least 0, and at most 1 together"
        )
    train_stop = _share(train_split, count)
    nothing_left = train_split + eval_split > 1 - _TOLERANCE
    eval_stop = count if nothing_left else train_stop + _share(eval_split, count)
    if not 0 <= start <= train_stop:
        raise ValueError(f"start={start}; it must be between 0 and the end of the training part, {train_stop}")
    loaders = []
    for begin, end in ((start, train_stop), (train_stop, eval_stop), (eval_stop, count)):
        begin, end = distribute_to_rank(begin, end, rank, world_size)
        dataset = PriorEmbeddingDataset(text_conditioned, batch_size, begin, end, image_reader, text_reader)
        loaders.append(DataLoader(dataset, batch_size=None))
    return tuple(loaders)


def _share(share: float, count: int) -> int:
    return min(count, math.floor(share * count + _TOLERANCE))
