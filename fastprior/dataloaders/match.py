"""Files of one shard number, matched and looked into before any is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastprior.dataloaders.files import (
    NpyFile,
    ParquetColumn,
    ParquetNumbers,
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


_KINDS = ("scalar", "category", "vector")  # of extra conditions


_SUFFIXES = {"npy": ".npy", "parquet": ".parquet", "webdataset": ".tar"}


_HEADER_THREADS = 32


_PEEK_SHARDS, _PEEK_ROWS = 16, 64


_NORM_TOLERANCE = 0.01  # normalised, then rounded to fp16


def _title(column: str) -> str:
    return _TITLES.get(column, f"conditions.{column}")


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


def _numbers(conditions: Mapping[str, tuple[str, str]], sources: dict[str, str]) -> dict[str, tuple[str, str]]:
    """The conditions that are columns of numbers. Raises ValueError for what cannot be."""
    for name, (kind, _) in conditions.items():
        if name in COLUMNS:
            raise ValueError(f"conditions has the name {name!r}, which is that of another column; choose another name")
        if kind not in _KINDS:
            raise ValueError(f"conditions[{name!r}] is a {kind!r}; it must be one of {', '.join(map(repr, _KINDS))}")
    numbers = {name: (kind, column) for name, (kind, column) in conditions.items() if kind != "vector"}
    if numbers and "text" not in sources:
        raise ValueError(f"meta_url=None; conditions[{next(iter(numbers))!r}] is a column of its files")
    return numbers


@dataclass
class _Folder:
    """The files of one format below a folder."""

    fs: Any
    paths: list[str]
    format: str
    column: str
    numbers: dict[str, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def find(cls, url: str, column: str, file_format: str | None) -> _Folder:
        fs, paths = list_files(url)
        embedded = tuple(_SUFFIXES) if column in ("image_embed", "text_embed") else ("npy",)
        allowed = ("parquet", "webdataset") if column == "text" else embedded
        wanted = "npy" if file_format == "parquet_npy" else file_format
        if wanted is not None and wanted not in allowed:
            raise ValueError(f"file_format={file_format!r}; it must be one of {', '.join((*allowed, 'parquet_npy'))}")
        for name in allowed if wanted is None else (wanted,):
            matching = [path for path in paths if path.endswith(_SUFFIXES[name])]
            if matching:
                return cls(fs, matching, name, column)
        suffixes = " or ".join(_SUFFIXES[name] for name in (allowed if wanted is None else (wanted,)))
        raise FileNotFoundError(f"{url} holds no {suffixes} files of {_title(column)}")

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
                return {self.column: NpyFile(self.fs, path, COLUMNS.get(self.column, 2))}
            if self.format == "parquet":
                files = {c: ParquetColumn(self.fs, path, names[c], COLUMNS[c]) for c in columns}
                return files | {name: self._open_numbers(path, name) for name in self.numbers}
            if self.numbers:
                raise ShardError(path, f"has no columns; {_title(next(iter(self.numbers)))} needs parquet files")
            return _open_tar(self.fs, path, columns)
        except ShardError as error:
            return error

    def _open_numbers(self, path: str, name: str) -> ParquetNumbers:
        kind, column = self.numbers[name]
        try:
            return ParquetNumbers(self.fs, path, column, kind == "category")
        except ShardError as error:
            raise ShardError(error.path, f"{_title(name)}: {error.what}") from error


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
        for column, source in sources.items():
            if column not in there and files:
                partner = next(iter(files.values())).name
                problems.append(ShardError(partner, f"no {_title(column)} of its number, {number}, in {source}"))
        if len(files) < len(found):
            continue
        image = files["image_embed"]
        other = {file.name: file.rows for file in files.values() if file.rows != image.rows}
        problems += [ShardError(name, f"{rows} rows, and {image.rows} in {image.name}") for name, rows in other.items()]
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
                what = f"{file.dtype} {file.shape}; {_title(column)} of the other shards are {dtype} {shape}"
                _drop(shards, problems, number, ShardError(file.name, what))


def _look_into(shards: dict[int, Shard], problems: list[ShardError], notes: list[str], norms: dict[str, Norms]) -> None:
    """Norms of a few rows of a few shards, and what the headers say of missing captions."""
    if not shards:
        return
    some = np.unique(np.linspace(0, len(shards) - 1, _PEEK_SHARDS).astype(int))
    some = [list(shards)[index] for index in some]
    for column in next(iter(shards.values())).files:
        files = [shard.files[column] for shard in shards.values()]
        nulls = sum(file.nulls for file in files)
        if nulls:
            notes.append(f"{nulls:,} {_title(column)} are missing" + "; they are read as empty" * (column == "text"))
        if column in ("image_embed", "text_embed"):
            norms[column] = _norms(shards, problems, some, lambda shard, column=column: shard.files[column])
            if norms[column].rows and not norms[column].normalised:
                notes.append(f"{_title(column)} are not normalised: norms {norms[column].low:.4g} to "
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
