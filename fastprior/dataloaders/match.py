"""Files of one shard number, matched and looked into before any is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
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
    finite_rows,
    list_files,
    shard_number,
)
from fastprior.dataloaders.tars import TarColumn, tar_columns

COLUMNS = {"image_embed": 2, "text": 0, "text_embed": 2, "text_encodings": 3}  # and their number of dimensions
_TITLES = dict(
    image_embed="image embeddings", text="captions", text_embed="text embeddings", text_encodings="text encodings"
)
_CONDITION_KINDS = ("scalar", "category", "vector")
_SUFFIXES = {"npy": ".npy", "parquet": ".parquet", "webdataset": ".tar"}
_HEADER_THREADS = 32
_PEEK_SHARDS, _PEEK_ROWS = 16, 64
SKIP_HINT = 'on_bad_rows="skip" leaves such rows out'
_NORM_TOLERANCE = 0.01  # normalised, then rounded to fp16


def title(column: str) -> str:
    """What reports and errors call a column."""
    return _TITLES.get(column, f"conditions.{column}")


def number_columns(conditions: Mapping[str, tuple[str, str]], has_captions: bool) -> dict[str, tuple[str, str]]:
    """The conditions that are columns of the captions' files. Raises ValueError for what cannot be."""
    for name, (kind, _) in conditions.items():
        if name in COLUMNS:
            raise ValueError(f"conditions has the name {name!r}, which is that of another column; choose another name")
        if kind not in _CONDITION_KINDS:
            known = ", ".join(map(repr, _CONDITION_KINDS))
            raise ValueError(f"conditions[{name!r}] is a {kind!r}; it must be one of {known}")
    numbers = {name: (kind, column) for name, (kind, column) in conditions.items() if kind != "vector"}
    if numbers and not has_captions:
        raise ValueError(f"meta_url=None; conditions[{next(iter(numbers))!r}] is a column of its files")
    return numbers


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
    """Euclidean norms of the rows that were looked at and are finite; `bad` ones are not."""

    low: float
    mean: float
    high: float
    rows: int
    bad: int = 0

    @property
    def normalised(self) -> bool:
        return abs(self.low - 1) <= _NORM_TOLERANCE and abs(self.high - 1) <= _NORM_TOLERANCE


@dataclass
class _Folder:
    """The files of one format below a folder, and the names of the columns in them."""

    fs: Any
    paths: list[str]
    format: str
    column: str
    names: dict[str, str]
    numbers: dict[str, tuple[str, str]]  # conditions beside the column

    @classmethod
    def find(cls, url: str, column: str, file_format: str | None, *contents: dict) -> _Folder:
        fs, paths = list_files(url)
        formats = tuple(_SUFFIXES) if column in ("image_embed", "text_embed") else ("npy",)
        if column == "text":
            formats = ("parquet", "webdataset")
        if file_format is not None:
            wanted = "npy" if file_format == "parquet_npy" else file_format
            if wanted not in formats:
                known = ", ".join((*formats, "parquet_npy"))
                raise ValueError(f"file_format={file_format!r}; it must be one of {known}")
            formats = (wanted,)
        for name in formats:
            matching = [path for path in paths if path.endswith(_SUFFIXES[name])]
            if matching:
                return cls(fs, matching, name, column, *contents)
        suffixes = " or ".join(_SUFFIXES[name] for name in formats)
        raise FileNotFoundError(f"{url} holds no {suffixes} files of {title(column)}")

    def further_columns(self, sources: Mapping[str, str]) -> list[str]:
        """Columns that the first readable file has beside the images, and that no other folder gives."""
        for path in self.paths:
            try:
                if self.format == "webdataset":
                    if there := tar_columns(self.fs, path):
                        return [column for column in there if column not in sources]
                if self.format == "parquet" and "text" not in sources:
                    if ParquetColumn(self.fs, path, self.names["text"], 0).rows:
                        return ["text"]
            except ShardError:
                continue
        return []

    def open(self, columns: list[str], problems: list[ShardError]) -> dict[int, dict[str, ShardFile] | None]:
        """The files of each number; None for one that cannot be used."""
        numbered: dict[int, list[str]] = {}
        for path in self.paths:
            number = shard_number(path)
            if number is None and len(self.paths) > 1:
                problems.append(ShardError(path, "has no number in its name, so nothing can be matched with it"))
            else:
                numbered.setdefault(number or 0, []).append(path)
        for number, (first, *others) in numbered.items():
            what = f"has the number {number} of {first} too; neither is used"
            problems += [ShardError(path, what) for path in others]
        single = {number: paths[0] for number, paths in numbered.items() if len(paths) == 1}
        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            opened = list(pool.map(lambda path: self._open(path, columns), single.values()))
        problems += [result for result in opened if isinstance(result, ShardError)]
        usable = {n: result for n, result in zip(single, opened) if not isinstance(result, ShardError)}
        return {number: usable.get(number) for number in numbered}

    def _open(self, path: str, columns: list[str]) -> dict[str, ShardFile] | ShardError:
        try:
            if self.format == "npy":
                return {self.column: NpyFile(self.fs, path, COLUMNS.get(self.column, 2))}
            if self.format == "parquet":
                files = {c: ParquetColumn(self.fs, path, self.names[c], COLUMNS[c]) for c in columns}
                return files | {name: self._open_numbers(path, name) for name in self.numbers}
            if self.numbers:
                raise ShardError(path, f"has no columns; {title(next(iter(self.numbers)))} needs parquet files")
            return self._open_tar(path, columns)
        except ShardError as error:
            return error

    def _open_numbers(self, path: str, name: str) -> ParquetNumbers:
        kind, column = self.numbers[name]
        try:
            return ParquetNumbers(self.fs, path, column, kind == "category")
        except ShardError as error:
            raise ShardError(error.path, f"{title(name)}: {error.what}") from error

    def _open_tar(self, path: str, columns: list[str]) -> dict[str, ShardFile]:
        """The columns of the samples that have all of them."""
        there = tar_columns(self.fs, path)
        if not there:
            return {column: ShardFile(self.fs, path) for column in columns}
        missing = [title(column) for column in columns if column not in there]
        if missing:
            raise ShardError(path, f"holds no {' and no '.join(missing)}")
        keys = [key for key in there[columns[0]][1] if all(key in there[column][1] for column in columns)]
        return {
            c: TarColumn(self.fs, path, there[c][0], [there[c][1][key] for key in keys], COLUMNS[c]) for c in columns
        }


@dataclass
class Matches:
    """Shards by number, what is wrong with others, and what is worth knowing; made by `match_folders`."""

    shards: dict[int, Shard] = field(default_factory=dict)
    problems: list[ShardError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    norms: dict[str, Norms] = field(default_factory=dict)
    on_bad_rows: str | None = None

    def add(self, found: dict[str, dict[int, ShardFile | None]], sources: Mapping[str, str]) -> None:
        """Take the numbers that every column has, with as many rows in each; a file that is None is of no use."""
        empty = []
        for number in sorted(set().union(*found.values())):
            there = {column: files[number] for column, files in found.items() if number in files}
            files = {column: file for column, file in there.items() if file is not None}
            for column, source in sources.items():
                if column not in there and files:
                    partner = next(iter(files.values())).name
                    what = f"no {title(column)} of its number, {number}, in {source}"
                    self.problems.append(ShardError(partner, what))
            if len(files) < len(found):
                continue
            image = files["image_embed"]
            deviants = [file for file in files.values() if file.rows != image.rows]
            self.problems += [ShardError(f.name, f"{f.rows} rows, and {image.rows} in {image.name}") for f in deviants]
            if not deviants and image.rows:
                self.shards[number] = Shard(number, files)
            elif not deviants:
                empty.append(number)
        if empty:
            more = ", ..." if len(empty) > 10 else ""
            numbers = ", ".join(map(str, empty[:10])) + more
            self.notes.append(f"{len(empty)} shards without rows are left out, of number {numbers}")

    def _drop(self, number: int, error: ShardError) -> None:
        self.problems.append(error)
        self.shards.pop(number, None)

    def drop_deviants(self) -> None:
        """Drop shards of another width than most rows have."""
        widths: dict[str, Counter] = {}
        dtypes = {}
        for shard in self.shards.values():
            for column, file in shard.files.items():
                widths.setdefault(column, Counter())[file.shape] += shard.rows
                dtypes[column, file.shape] = file.dtype
        usual = {column: max(rows, key=rows.get) for column, rows in widths.items()}
        for number, shard in list(self.shards.items()):
            for column, file in shard.files.items():
                if file.shape != usual[column]:
                    wanted = f"{dtypes[column, usual[column]]} {usual[column]}"
                    what = f"{file.dtype} {file.shape}; {title(column)} of the other shards are {wanted}"
                    self._drop(number, ShardError(file.name, what))

    def look_into(self) -> None:
        """Measure norms of a few rows of a few shards, and note what the headers say of missing captions."""
        if not self.shards:
            return
        numbers = list(self.shards)
        looked_at = [numbers[i] for i in np.unique(np.linspace(0, len(numbers) - 1, _PEEK_SHARDS).astype(int))]
        for column in self.shards[numbers[0]].files:
            nulls = sum(shard.files[column].nulls for shard in self.shards.values())
            if nulls:
                empty = "; they are read as empty" if column == "text" else ""
                self.notes.append(f"{nulls:,} {title(column)} are missing{empty}")
            wide = sum(shard.files[column].stored.name == "float64" for shard in self.shards.values())
            if wide:
                self.notes.append(f"{wide} files of {title(column)} hold float64, which is rounded to float32")
            if column in ("image_embed", "text_embed"):
                norms = self.norms[column] = self._measure(column, looked_at)
                if norms.bad:
                    looked = f"of {norms.rows + norms.bad} rows of {title(column)} that were looked at"
                    self.notes.append(f"{norms.bad} {looked} are not finite; such pairs are left out")
                if norms.rows and not norms.normalised:
                    self.notes.append(f"{title(column)} are not normalised: norms {norms.low:.4g} to "
                                      f"{norms.high:.4g}, {norms.mean:.4g} on average")  # fmt: skip

    def _measure(self, column: str, numbers: list[int]) -> Norms:
        found, bad = [np.zeros(0)], 0
        for number in [number for number in numbers if number in self.shards]:
            file = self.shards[number].files[column]
            try:
                rows = file.peek(_PEEK_ROWS).astype(np.float64)
                good = finite_rows(rows)
                if not good.all() and self.on_bad_rows != "skip":
                    row = file.peeks_at(_PEEK_ROWS) + int(np.flatnonzero(~good)[0])
                    raise ShardError(file.name, f"holds numbers that are not finite, in row {row}; {SKIP_HINT}")
                found.append(np.linalg.norm(rows[good], axis=1))
                bad += int((~good).sum())
            except ShardError as error:
                self._drop(number, error)
        norms = np.concatenate(found)
        if not len(norms):
            return Norms(0, 0, 0, 0, bad)
        return Norms(*map(float, (norms.min(), norms.mean(), norms.max())), len(norms), bad)


def match_folders(
    sources: Mapping[str, str],
    file_format: str | None,
    names: dict[str, str],
    numbers: dict[str, tuple[str, str]],
    on_bad_rows: str | None,
) -> Matches:
    """Match the files of some folders by their numbers, and check them by their headers and a few rows.

    sources: the folder of each column, of the images first. file_format: of the images.
    names: of the columns in parquet files. numbers: the conditions in the captions' files, see `number_columns`.
    on_bad_rows: "skip" counts rows that are not finite; otherwise their shards are problems.
    """
    matches = Matches(on_bad_rows=on_bad_rows)
    found: dict[str, dict[int, ShardFile | None]] = {}
    for column, url in sources.items():
        is_image = column == "image_embed"
        beside = numbers if column == "text" else {}
        folder = _Folder.find(url, column, file_format if is_image else None, names, beside)
        columns = [column, *(folder.further_columns(sources) if is_image else [])]
        for number, files in folder.open(columns, matches.problems).items():
            for each in (*columns, *beside):
                file = found.setdefault(each, {})[number] = files and files[each]
                if file is not None:
                    file.fill = on_bad_rows == "skip" and each in COLUMNS
    matches.add(found, sources)
    matches.drop_deviants()
    matches.look_into()
    return matches
