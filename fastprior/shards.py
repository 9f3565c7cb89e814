"""What folders of embeddings and captions hold: shards matched by number and checked before anything is trained."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fastprior.shard_files import (
    NpyFile,
    ParquetColumn,
    ShardError,
    ShardFile,
    TarColumn,
    list_files,
    shard_number,
    tar_columns,
)

COLUMNS = {"image_embed": 2, "text": 0, "text_embed": 2, "text_encodings": 3}  # and their number of dimensions
_TITLES = {
    "image_embed": "image embeddings",
    "text": "captions",
    "text_embed": "text embeddings",
    "text_encodings": "text encodings",
}
_SUFFIXES = {"npy": ".npy", "parquet": ".parquet", "webdataset": ".tar"}
_HEADER_THREADS = 32
_PEEK_SHARDS, _PEEK_ROWS = 16, 64
_NORM_TOLERANCE = 0.01  # normalised, then rounded to fp16


@dataclass(frozen=True)
class Shard:
    """The files of one number, one for each column, and their common number of rows."""

    number: int
    files: dict[str, ShardFile]

    @property
    def rows(self) -> int:
        return self.files["image_embed"].rows


@dataclass(frozen=True)
class Norms:
    """Euclidean norms of the rows that were looked at."""

    low: float
    mean: float
    high: float
    rows: int

    @property
    def normalised(self) -> bool:
        return abs(self.low - 1) <= _NORM_TOLERANCE and abs(self.high - 1) <= _NORM_TOLERANCE


@dataclass(frozen=True)
class EmbeddingShards:
    """Pairs of image embeddings and texts, in shards; made by `EmbeddingShards.open`.

    Attributes:
        shards: those that can be used, by rising number.
        problems: what is wrong with the others, and with files that belong to none; each begins with a file's name.
        notes: what may be meant, but is worth knowing: embeddings that are not normalised, captions that are missing.
        norms: of each column of embeddings, over a small sample.
        on_problem: "error" or "skip", also for what only shows when rows are read.
    """

    shards: list[Shard]
    problems: list[ShardError]
    on_problem: str
    sources: dict[str, str]
    notes: list[str] = field(default_factory=list)
    norms: dict[str, Norms] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        image_url: str | os.PathLike,
        meta_url: str | os.PathLike | None = None,
        text_url: str | os.PathLike | None = None,
        encodings_url: str | os.PathLike | None = None,
        *,
        file_format: str | None = None,
        on_problem: str = "error",
        caption_column: str = "caption",
        embedding_column: str = "embedding",
    ) -> EmbeddingShards:
        """Match the files of all folders by the number in their names, and check them by their headers.

        image_url: folder (or anything fsspec opens: s3://, hdfs://, http://) of .npy files (rows, dim), fp16 or fp32;
            of parquet files with a column of embeddings; or of a webdataset's tars. Captions and further embeddings in
            those parquet files or tars are used where no folder is given for them.
        meta_url: folder of parquet files with captions. text_url: of text embeddings, .npy or parquet.
        encodings_url: of text encodings, .npy (rows, length, dim).
        file_format: of the images, "npy", "parquet_npy" (which is npy), "parquet" or "webdataset"; by default that of
            the files that are there.
        on_problem: "error" raises ValueError that names every file that is missing, left over, corrupt, of another
            length than its partner, or of another dtype or width than most; "skip" leaves their shards out.

        Raises FileNotFoundError where a folder holds no such files, ValueError where no shard can be used.
        """
        if on_problem not in ("error", "skip"):
            raise ValueError(f'on_problem={on_problem!r}; it must be "error" or "skip"')
        sources = dict(image_embed=image_url, text=meta_url, text_embed=text_url, text_encodings=encodings_url)
        for name, url in zip(("image_url", "meta_url", "text_url", "encodings_url"), sources.values()):
            if not isinstance(url, (str, os.PathLike)) and (url is not None or name == "image_url"):
                raise TypeError(f"{name}={url!r}; it must be a path or an url")
        sources = {column: os.fspath(url) for column, url in sources.items() if url is not None}
        names = dict(text=caption_column) | {column: embedding_column for column in ("image_embed", "text_embed")}

        problems: list[ShardError] = []
        found: dict[str, dict[int, ShardFile | None]] = {}  # None: the file is there, but of no use
        for column, url in sources.items():
            of_image = column == "image_embed"
            folder = _Folder.find(url, column, file_format if of_image else None)
            extra = folder.further_columns(names, sources) if of_image else []
            for number, files in folder.open(problems, names, [column, *extra]).items():
                for each in (column, *extra):
                    found.setdefault(each, {})[number] = files and files[each]
        shards = _match(found, sources, problems)
        _drop_deviants(shards, problems)
        notes, norms = [], {}
        _look_into(shards, problems, notes, norms)
        if problems and on_problem == "error":
            raise ValueError(f"{len(problems)} problems with the data:\n" + "\n".join(f"  {p}" for p in problems))
        shards = [shards[number] for number in sorted(shards)]
        if not shards:
            why = "\n".join(f"  {p}" for p in problems) or "  all files are empty"
            raise ValueError(f"{sources['image_embed']}: no shard can be used:\n{why}")
        return cls(shards, problems, on_problem, sources, notes, norms)

    @property
    def pairs(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys of the batches: "image_embed", and of "text", "text_embed", "text_encodings" what is there."""
        return tuple(self.shards[0].files)

    @property
    def dim(self) -> int:
        return self.shards[0].files["image_embed"].shape[0]

    @property
    def dtype(self) -> str:
        return self.shards[0].files["image_embed"].dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a pair, with captions as estimated."""
        return sum(file.row_bytes for file in self.shards[0].files.values())

    @cached_property
    def digest(self) -> str:
        """Equal for the same shards in the same order, wherever they lie."""
        lines = [
            (shard.number, [(c, f.rows, f.dtype, f.shape) for c, f in shard.files.items()]) for shard in self.shards
        ]
        return hashlib.sha256(repr(lines).encode()).hexdigest()[:16]

    def report(self) -> str:
        """What is there and what is wrong, as text of several lines."""
        rows = []
        for column in self.columns:
            file, norms = self.shards[0].files[column], self.norms.get(column)
            kind = "text" if column == "text" else f"{file.dtype}, {' x '.join(map(str, file.shape))}"
            if norms:
                kind += f", norms {norms.low:.4g} to {norms.high:.4g} in a sample of {norms.rows}"
            rows.append((_TITLES[column], f"{self.sources.get(column, self.sources['image_embed'])}: {kind}"))
        rows.append(("shards", str(len(self.shards))))
        rows.append(("pairs", f"{self.pairs:,}"))
        rows += [("note", note) for note in self.notes]
        rows += [("problem", str(problem)) for problem in self.problems] or [("problems", "none")]
        return "\n".join(f"{title:<17} {text}" for title, text in rows)


@dataclass
class _Folder:
    """The files of one format below a folder."""

    fs: Any
    paths: list[str]
    format: str
    column: str

    @classmethod
    def find(cls, url: str, column: str, file_format: str | None) -> _Folder:
        fs, paths = list_files(url)
        allowed = {"text": ("parquet", "webdataset"), "text_encodings": ("npy",)}.get(column, tuple(_SUFFIXES))
        wanted = "npy" if file_format == "parquet_npy" else file_format
        if wanted is not None and wanted not in allowed:
            raise ValueError(f"file_format={file_format!r}; it must be one of {', '.join((*allowed, 'parquet_npy'))}")
        for name in allowed if wanted is None else (wanted,):
            matching = [path for path in paths if path.endswith(_SUFFIXES[name])]
            if matching:
                return cls(fs, matching, name, column)
        suffixes = " or ".join(_SUFFIXES[name] for name in (allowed if wanted is None else (wanted,)))
        raise FileNotFoundError(f"{url} holds no {suffixes} files of {_TITLES[column]}")

    def further_columns(self, names: dict[str, str], sources: dict[str, str]) -> list[str]:
        """Columns that the first readable file has beside the images, and that no other folder gives."""
        for path in self.paths:
            try:
                if self.format == "webdataset":
                    return [column for column in tar_columns(self.fs, path) if column not in sources]
                if self.format == "parquet" and "text" not in sources:
                    ParquetColumn(self.fs, path, names["text"], 0)
                    return ["text"]
            except ShardError:
                continue
        return []

    def open(
        self, problems: list[ShardError], names: dict[str, str], columns: list[str]
    ) -> dict[int, dict[str, ShardFile] | None]:
        """The files of each number; None for one that cannot be used."""
        numbered: dict[int, list[str]] = {}
        for path in self.paths:
            number = shard_number(path)
            if number is None and len(self.paths) > 1:
                problems.append(ShardError(path, "has no number in its name, so nothing can be matched with it"))
            else:
                numbered.setdefault(number or 0, []).append(path)
        for number, (first, *others) in numbered.items():
            problems += [
                ShardError(path, f"has the number {number} of {first} too; neither is used") for path in others
            ]
        single = {number: paths[0] for number, paths in numbered.items() if len(paths) == 1}
        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            opened = list(pool.map(lambda path: self._open(path, names, columns), single.values()))
        problems += [result for result in opened if isinstance(result, ShardError)]
        usable = {n: result for n, result in zip(single, opened) if not isinstance(result, ShardError)}
        return {number: usable.get(number) for number in numbered}

    def _open(self, path: str, names: dict[str, str], columns: list[str]) -> dict[str, ShardFile] | ShardError:
        try:
            if self.format == "npy":
                return {self.column: NpyFile(self.fs, path, COLUMNS[self.column])}
            if self.format == "parquet":
                return {c: ParquetColumn(self.fs, path, names[c], COLUMNS[c]) for c in columns}
            return _open_tar(self.fs, path, columns)
        except ShardError as error:
            return error


def _open_tar(fs: Any, path: str, columns: list[str]) -> dict[str, ShardFile]:
    """The columns of the samples that have all of them."""
    there = tar_columns(fs, path)
    missing = [_TITLES[column] for column in columns if column not in there]
    if missing:
        raise ShardError(path, f"holds no {' and no '.join(missing)}")
    keys = [key for key in there[columns[0]][1] if all(key in there[column][1] for column in columns)]
    return {c: TarColumn(fs, path, there[c][0], [there[c][1][key] for key in keys], COLUMNS[c]) for c in columns}


def _match(
    found: dict[str, dict[int, ShardFile | None]], sources: dict[str, str], problems: list[ShardError]
) -> dict[int, Shard]:
    """Shards whose number every column has, with as many rows in each."""
    shards = {}
    for number in sorted(set().union(*found.values())):
        there = {column: files[number] for column, files in found.items() if number in files}
        files = {column: file for column, file in there.items() if file is not None}
        for column in found:
            if column not in there and files:
                source = sources.get(column, sources["image_embed"])
                partner = next(iter(files.values())).name
                problems.append(ShardError(partner, f"no {_TITLES[column]} of its number, {number}, in {source}"))
        if len(files) < len(found):
            continue
        image = files["image_embed"]
        other = [file for file in files.values() if file.rows != image.rows]
        problems += [ShardError(f.name, f"{f.rows} rows, and {image.rows} in {image.name}") for f in other]
        if image.rows and not other:
            shards[number] = Shard(number, files)
    return shards


def _drop(shards: dict[int, Shard], problems: list[ShardError], number: int, error: ShardError) -> None:
    problems.append(error)
    shards.pop(number, None)


def _drop_deviants(shards: dict[int, Shard], problems: list[ShardError]) -> None:
    """Shards of another dtype or width than most rows have; read as if they had it they would be garbage."""
    if not shards:
        return
    usual = {}
    for column in next(iter(shards.values())).files:
        rows: Counter = Counter()
        for shard in shards.values():
            rows[shard.files[column].dtype, shard.files[column].shape] += shard.rows
        usual[column] = max(rows, key=rows.get)
    for number, shard in list(shards.items()):
        for column, (dtype, shape) in usual.items():
            file = shard.files[column]
            if (file.dtype, file.shape) != (dtype, shape):
                what = f"{file.dtype} {file.shape}; {_TITLES[column]} of the other shards are {dtype} {shape}"
                _drop(shards, problems, number, ShardError(file.name, what))


def _look_into(shards: dict[int, Shard], problems: list[ShardError], notes: list[str], norms: dict[str, Norms]) -> None:
    """Norms of a few rows of a few shards, and what the headers say of missing captions."""
    if not shards:
        return
    some = np.unique(np.linspace(0, len(shards) - 1, _PEEK_SHARDS).astype(int))
    some = [list(shards)[index] for index in some]
    for column in next(iter(shards.values())).files:
        files = [shard.files[column] for shard in shards.values()]
        if column == "text":
            nulls = sum(file.nulls for file in files)
            if nulls:
                notes.append(f"{nulls:,} captions are missing; they are read as empty")
        elif column != "text_encodings":
            norms[column] = _norms(shards, problems, some, lambda shard, column=column: shard.files[column])
            if norms[column].rows and not norms[column].normalised:
                notes.append(f"{_TITLES[column]} are not normalised: norms {norms[column].low:.4g} to "
                             f"{norms[column].high:.4g}, {norms[column].mean:.4g} on average")  # fmt: skip


def _norms(
    shards: dict[int, Shard], problems: list[ShardError], numbers: list[int], file_of: Callable[[Shard], ShardFile]
) -> Norms:
    found = [np.zeros(0)]
    for number in [number for number in numbers if number in shards]:
        file = file_of(shards[number])
        try:
            rows = np.linalg.norm(file.peek(_PEEK_ROWS).astype(np.float64), axis=1)
            if not np.isfinite(rows).all():
                raise ShardError(file.name, "holds numbers that are not finite")
        except ShardError as error:
            _drop(shards, problems, number, error)
            continue
        found.append(rows)
    rows = np.concatenate(found)
    return Norms(*map(float, (rows.min(), rows.mean(), rows.max())), len(rows)) if len(rows) else Norms(0, 0, 0, 0)
