"""Shards of texts: captions, text embeddings and encodings, their metadata, and what tells one file from another."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from fastprior.dataloaders.files import (
    NpyFile,
    ParquetColumn,
    ShardError,
    ShardFile,
    list_files,
    naming,
    shard_number,
)

DIMENSIONS = {"text": 0, "text_embed": 2, "text_encodings": 3}
_HEADER_THREADS = 32
_SUFFIXES = {"text": (".parquet",), "text_embed": (".npy", ".parquet"), "text_encodings": (".npy",)}
_SUFFIXES["metadata"] = _SUFFIXES["text"]
_TITLES = {"text": "captions", "text_embed": "text embeddings", "text_encodings": "text encodings"}
_TITLES["metadata"] = "metadata"


class MetadataFile(ShardFile):
    """A parquet file that is carried along with the embeddings of its rows.

    Attributes:
        left_out: a column that is not carried along, None for none.
        columns: those that are.
    """

    def __init__(self, fs: Any, path: str, left_out: str | None = None):
        super().__init__(fs, path)
        self.left_out = left_out
        with naming(self.name), self._open() as opened, pq.ParquetFile(opened) as file:
            self.rows, names = file.metadata.num_rows, file.schema_arrow.names
        self.columns = [name for name in names if name != left_out]

    def copy_to(self, path: Path) -> None:
        """Write it: byte for byte, or without the column. Raises ShardError where it cannot be read, and OSError."""
        if self.left_out is None:
            with self._open() as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 2**22)
            return
        with self._open() as opened:
            with naming(self.name):
                file = pq.ParquetFile(opened)
            with path.open("wb") as target, pq.ParquetWriter(target, self._schema(file)) as writer:
                for group in range(file.num_row_groups):
                    with naming(self.name):
                        table = file.read_row_group(group, columns=self.columns)
                    writer.write_table(table.select(self.columns).replace_schema_metadata(None))

    def _schema(self, file: pq.ParquetFile) -> pa.Schema:
        return pa.schema([file.schema_arrow.field(name) for name in self.columns])


def _identity(column: str, file: ShardFile, within: str) -> dict:
    """What a file is, but for its hash: name, size in bytes, and time of its last change, None where nobody tells."""
    with naming(file.name):
        if file.local:
            found = os.stat(file.path)
            size, changed = found.st_size, found.st_mtime_ns
        else:
            size, changed = file.fs.size(file.path), None
    return dict(column=column, name=within, size=size, mtime_ns=changed)


def sha256(file: ShardFile) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises ShardError where it cannot be read."""
    digest = hashlib.sha256()
    with naming(file.name), file.fs.open(file.path, "rb") as opened:
        while block := opened.read(2**22):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class InputShard:
    """Texts of some rows, in the files of one number.

    Attributes:
        name: path of the first file within its folder; it seeds the noise of the rows.
        digits: the number as that name has it; it names what is written.
        files: "text" (captions) or "text_embed", and "text_encodings" where there are some.
        names: paths of all files within their folders, by column.
        metadata: what is carried along, None for nothing.
    """

    name: str
    digits: str
    files: dict[str, ShardFile]
    names: dict[str, str]
    metadata: MetadataFile | None = None

    @property
    def rows(self) -> int:
        return next(iter(self.files.values())).rows

    @property
    def every_file(self) -> dict[str, ShardFile]:
        return self.files | ({"metadata": self.metadata} if self.metadata else {})

    def identities(self) -> list[dict]:
        """What its files are now, without their hashes: column, name, size, mtime_ns."""
        return [_identity(column, file, self.names[column]) for column, file in self.every_file.items()]

    def hashes(self) -> list[str]:
        """SHA-256 of each file, in the order of `identities`; every byte is read."""
        return [sha256(file) for file in self.every_file.values()]


@dataclass
class _Source:
    """The files of a column below a folder, by number, with their paths within it."""

    column: str
    url: str
    fs: Any
    paths: dict[int, tuple[str, str]]

    @classmethod
    def find(cls, column: str, url: str) -> _Source:
        """Raises FileNotFoundError without such files, ValueError for names that do not tell them apart."""
        fs, paths = list_files(url)
        root = fsspec.core.url_to_fs(url)[1].rstrip("/")
        for suffix in _SUFFIXES[column]:
            if chosen := [path for path in paths if path.endswith(suffix)]:
                break
        else:
            raise FileNotFoundError(f"{url} holds no {' or '.join(_SUFFIXES[column])} files of {_TITLES[column]}")
        found: dict[int, tuple[str, str]] = {}
        for path in chosen:
            number = shard_number(path)
            if number is None and len(chosen) > 1:
                raise ShardError(path, f"has no number in its name, which must tell the {_TITLES[column]} apart")
            if number in found:
                raise ShardError(path, f"has the number {number} of {found[number][0]} too")
            within = path[len(root) :].lstrip("/") if path.startswith(root) else path
            found[number or 0] = path, within or path.rsplit("/", 1)[-1]
        return cls(column, url, fs, found)


def _open(source: _Source, number: int, columns: dict[str, str], only: ShardFile | None) -> ShardFile:
    """The file of a number, with as many rows as another. Raises ShardError."""
    if number not in source.paths:
        what = f"no {_TITLES[source.column]} of its number, {number}, in {source.url}"
        raise ShardError(only.name if only else source.url, what)
    path = source.paths[number][0]
    if source.column == "metadata":
        file = MetadataFile(source.fs, path)
    elif path.endswith(".npy"):
        file = NpyFile(source.fs, path, DIMENSIONS[source.column])
    else:
        file = ParquetColumn(source.fs, path, columns[source.column], DIMENSIONS[source.column])
    file.fill, file.absent = True, None  # rows that are missing are NaN or null, which is met when they are read
    if only is not None and file.rows != only.rows:
        raise ShardError(file.name, f"{file.rows} rows, and {only.rows} in {only.name}")
    return file


def _shard(number: int, sources: list[_Source], columns: dict[str, str]) -> InputShard | ShardError:
    try:
        files: dict[str, ShardFile] = {}
        for source in sources:
            first = next(iter(files.values()), None)
            files[source.column] = _open(source, number, columns, first)
        metadata = files.pop("metadata", None)
        main = sources[0]
        path, name = main.paths[number]
        if metadata is None and path.endswith(".parquet"):
            left_out = None if main.column == "text" else columns[main.column]
            beside = MetadataFile(main.fs, path, left_out)
            metadata = beside if beside.columns else None
    except ShardError as error:
        return error
    names = {source.column: source.paths[number][1] for source in sources}
    stem = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    digits = [run for run in re.findall(r"\d+", stem) if int(run) == number]
    return InputShard(name, max(digits, key=len, default="0"), files, {"metadata": name} | names, metadata)


def _folders(url: str) -> dict[str, str]:
    """Folders that clip-retrieval makes in its output folder, by column."""
    fs, root = fsspec.core.url_to_fs(url)
    folders = {"text_embed": "text_emb", "metadata": "metadata"}
    return {c: f"{url.rstrip('/')}/{name}" for c, name in folders.items() if fs.isdir(f"{root.rstrip('/')}/{name}")}


def _main_column(url: str, captions: bool, embedding_column: str) -> str:
    """Whether a folder holds captions, or text embeddings: .npy files, or parquet files that have such a column."""
    if captions:
        return "text"
    fs, paths = list_files(url)
    parquet = [path for path in paths if path.endswith(".parquet")]
    if not parquet or any(path.endswith(".npy") for path in paths):
        return "text_embed"
    first = MetadataFile(fs, parquet[0])
    return "text_embed" if embedding_column in first.columns else "text"


def find_shards(
    url: str | os.PathLike,
    *,
    encodings: str | os.PathLike | None = None,
    metadata: str | os.PathLike | None = None,
    captions: bool = False,
    caption_column: str = "caption",
    embedding_column: str = "embedding",
) -> list[InputShard]:
    """Find shards of texts by the number in their names, and check all of them by their headers.

    Args:
        url: a folder (or anything that fsspec opens) of .npy files of text embeddings (rows, dim), of parquet files
            with a column of text embeddings or captions, or what clip-retrieval wrote, with text_emb/ or metadata/.
        encodings: folder of text encodings, .npy (rows, length, dim), matched by number.
        metadata: folder of parquet files that are carried along, matched by number. By default those that
            clip-retrieval wrote beside the embeddings, or the other columns of the parquet files.
        captions: take captions also where there are text embeddings.
        caption_column, embedding_column: of parquet files.
    Returns:
        shards by rising number.
    Raises:
        ValueError: both captions and text encodings are asked for.
        FileNotFoundError: a folder does not exist, or holds no such files.
        ShardError: a file is corrupt, lacks its partner, or has another number of rows; further ones are counted.
    """
    url = os.fspath(url)
    beside = _folders(url)
    text = beside.get("metadata", url)
    if not captions:
        text = beside.get("text_embed", text)
    column = _main_column(text, captions, embedding_column)
    if column == "text" and encodings is not None:
        raise ValueError(f"encodings={os.fspath(encodings)!r}; {text} holds captions, which are encoded themselves")
    sources = [_Source.find(column, text)]
    carried = metadata or (beside.get("metadata") if text != beside.get("metadata") else None)
    for name, folder in (("text_encodings", encodings), ("metadata", carried)):
        if folder is not None:
            sources.append(_Source.find(name, os.fspath(folder)))
    columns = dict(text=caption_column, text_embed=embedding_column)
    numbers = sorted(sources[0].paths)
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        found = list(pool.map(lambda number: _shard(number, sources, columns), numbers))
    if problems := [shard for shard in found if isinstance(shard, ShardError)]:
        more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
        raise ShardError(problems[0].path, f"{problems[0].what}{more}")
    return found
