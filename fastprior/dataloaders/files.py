"""Shards as .npy and parquet files: what their headers say, and rows read from them, local or by fsspec.

Opening a file reads its header only (a parquet file's footer and, for embeddings, its first row), and raises ShardError
where it is not what it should be. A file without rows may be anything else: pandas writes columns without values as of
no type, and numpy arrays without as fp64.
"""

from __future__ import annotations

import io
import math
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

try:
    import fsspec
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from fsspec.implementations.local import LocalFileSystem
except ImportError as error:
    raise ImportError(f'{error.name} is not installed: pip install "fastprior[train]"') from error

from fastprior.program import printable
from fastprior.reading import open_regular

FLOATS = ("float16", "float32", "float64")
CAPTION_BYTES = 100  # what a caption is taken to need, where memory is planned
_GROUP_BYTES = 2**31  # of a column of a row group, decoded
_BATCH_ROWS = 2**13  # that are decoded before those bytes are counted
_NPY_HEAD = 4096
_RETRIES = (0.5, 1.0, 2.0)  # seconds to wait before reading a remote file again


class ShardError(ValueError):
    """A file of a shard cannot be read, or is not what it should be; the message begins with its name.

    Both may hold any characters, which the message spells out where they are not printable.
    """

    def __init__(self, path: str, what: object):
        super().__init__(printable(f"{path}: {what}".replace("\n", " ")))
        self.path, self.what = path, str(what)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Readers raise whatever they like on a corrupt file: make it a ShardError."""
    try:
        yield
    except ShardError:
        raise
    except Exception as error:
        raise ShardError(path, f"cannot be read ({type(error).__name__}: {error})") from error


def finite_rows(values: np.ndarray) -> np.ndarray:
    """Which of the rows (rows, ...) of floats have finite numbers only."""
    values = values.reshape(len(values), math.prod(values.shape[1:]))
    if values.dtype != np.float16:
        return np.isfinite(values).all(axis=1)
    return (values.view(np.uint16) & 0x7FFF).max(axis=1, initial=0) < 0x7C00  # several times as fast


def converted(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as another dtype, rounded to nearest where they do not fit; those that are too large are infinite."""
    with np.errstate(over="ignore"):
        return values.astype(dtype, copy=False)


def _size(path: str) -> int:
    """The bytes of a local file. Raises ValueError for a FIFO or what else has none."""
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size


def _read_at(file: BinaryIO, place: memoryview, begin: int) -> int:
    """Read some bytes of an open file from `begin` on; how many, 0 at its end or where there is no more place."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [place], begin)
    file.raw.seek(begin)
    return file.raw.readinto(place)


def shard_number(path: str) -> int | None:
    """The number in a file's name: `img_emb_0012.npy` and `metadata_12.parquet` are both 12; None without one."""
    stem = path.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    found = re.match(r"part-(\d+)", stem) or re.search(r"(\d+)$", stem) or re.search(r"(?<![a-zA-Z\d])(\d+)", stem)
    return int(found[1]) if found else None


def list_files(url: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    """The file system of `url`, and all files below it, but hidden ones. Raises FileNotFoundError without any."""
    fs, root = fsspec.core.url_to_fs(url)
    try:
        paths = [path for path in fs.find(root) if path.rsplit("/", 1)[-1][0] not in "._"]
    except RecursionError:
        raise ValueError(f"{url} is nested too deeply") from None
    if not paths:
        raise FileNotFoundError(f"{url} does not exist, or holds no files")
    return fs, sorted(paths)


class RowGroups:
    """Decoded row groups of parquet files, the least recently used given up beyond `limit` bytes. Thread-safe."""

    def __init__(self, limit: int):
        self.limit = limit
        self._entries: OrderedDict[Any, Future] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, load: Callable[[], pa.Array]) -> pa.Array:
        """The array of `key`; loaded once, also where several threads ask. A failure is remembered too."""
        with self._lock:
            first = key not in self._entries
            entry = self._entries.setdefault(key, Future())
            self._entries.move_to_end(key)
        if first:
            try:
                entry.set_result(load())
            except Exception as error:
                entry.set_exception(error)
            self._give_up()
        return entry.result()

    def _give_up(self) -> None:
        with self._lock:
            done = [k for k, e in self._entries.items() if e.done() and e.exception() is None]
            total = sum(self._entries[key].result().nbytes for key in done)
            for key in done[:-1]:
                if total <= self.limit:
                    return
                total -= self._entries.pop(key).result().nbytes


class ShardFile:
    """One column of one shard: `rows` of `shape` and `dtype`; captions have dtype "str" and shape ().

    Local files are read by calls that fail where the file was cut short since: a page that is mapped of such a file
    would end the process.

    Attributes:
        dtype: of rows that were read: fp16 stays, fp64 is rounded to fp32, bytes come in the machine's order.
        stored: the dtype in the file.
        edges: row numbers between which rows are decoded together, from 0 to `rows`; None where any row is as near.
        nulls: captions that are missing, as far as the header says.
        fill: read rows that are missing, or of another width, as NaN; ShardError otherwise.
        absent: what is read for captions that are missing; None leaves them null.
    """

    dtype: str = "float32"
    stored = np.dtype("float32")
    fill = False
    absent: str | None = ""
    rows: int = 0
    shape: tuple[int, ...] = ()
    edges: np.ndarray | None = None
    nulls = 0

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str):
        self.fs, self.path, self.name = fs, path, path
        self.local = isinstance(fs, LocalFileSystem)
        if not self.local:
            self.name = fs.unstrip_protocol(path)
        with naming(self.name):
            self.size = _size(path) if self.local else None

    def _open(self) -> BinaryIO:
        return open_regular(self.path) if self.local else self.fs.open(self.path, "rb")

    def _bytes(self, begin: int, end: int) -> bytes:
        """Bytes begin to end of the file, or up to its own end."""
        if not self.local:
            return self.fs.cat_file(self.path, start=begin, end=end)
        with self._open() as file:
            file.seek(begin)
            return file.read(end - begin)

    @property
    def row_bytes(self) -> int:
        return CAPTION_BYTES if self.dtype == "str" else int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def read(self, start: int, stop: int, groups: RowGroups, into: np.ndarray | None = None) -> np.ndarray | pa.Array:
        """Rows start to stop: an array (stop - start, *shape), or strings.

        into: an array of that shape, which is given back where the rows could be read there without a copy.
        Raises ShardError; a remote file is tried several times.
        """
        for pause in () if self.local else _RETRIES:
            try:
                return self._read(start, stop, groups, into)
            except Exception:
                time.sleep(pause)
        with naming(self.name):
            return self._read(start, stop, groups, into)

    def peek(self, rows: int) -> np.ndarray:
        """Some rows, for a look at them, from row `peeks_at(rows)` on. Raises ShardError."""
        first = self.peeks_at(rows)
        return self.read(first, min(first + rows, self.rows), RowGroups(0))

    def peeks_at(self, rows: int) -> int:
        return max(0, (self.rows - rows) // 2)

    def _read(self, start: int, stop: int, groups: RowGroups, into: np.ndarray | None = None) -> np.ndarray | pa.Array:
        raise NotImplementedError

    def _check_floats(self, ndim: int) -> None:
        if self.stored.name not in FLOATS:
            raise ShardError(
                self.name, f"holds {self.stored.name}; it must be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}"
            )
        self.dtype = "float16" if self.stored.name == "float16" else "float32"
        if len(self.shape) != ndim - 1 or 0 in self.shape:
            raise ShardError(self.name, f"has shape {(self.rows, *self.shape)}; it must have {ndim} dimensions")


def npy_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether columns are stored first, dtype and length of the header that data begins with; or ValueError."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return *read(file), file.tell()


class NpyFile(ShardFile):
    """A .npy file of floats: (rows, dim), or (rows, length, dim)."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, ndim: int):
        super().__init__(fs, path)
        with naming(self.name):
            shape, self.columns_first, self.stored, self.offset = npy_header(self._bytes(0, _NPY_HEAD))
            size = self.size if self.local else fs.size(path)
        if any(type(length) is not int or length < 0 for length in shape):
            raise ShardError(self.name, f"has the shape {shape}, which no array has")
        self.rows, self.shape = (shape[0], shape[1:]) if shape else (0, ())
        if self.rows or not shape:
            self._check_floats(ndim)
        wanted = self.offset + math.prod(shape) * self.stored.itemsize
        if size is not None and size != wanted:
            what = "truncated" if size < wanted else "too long"
            raise ShardError(self.name, f"{what}: {size} bytes, and {wanted} by its header")

    def _read(self, start: int, stop: int, groups: RowGroups, into: np.ndarray | None = None) -> np.ndarray:
        rows = self._read_columns(start, stop) if self.columns_first else self._read_rows(start, stop, into)
        return converted(rows, self.dtype)

    def _read_rows(self, start: int, stop: int, into: np.ndarray | None) -> np.ndarray:
        size = math.prod(self.shape) * self.stored.itemsize
        begin, shape = self.offset + start * size, (stop - start, *self.shape)
        if self.local:
            fits = into is not None and into.dtype == self.stored and into.flags.c_contiguous
            rows = into if fits else np.empty(shape, self.stored)
            self._fill(rows, [begin])
            return rows
        data = self.fs.cat_file(self.path, start=begin, end=begin + shape[0] * size)
        return np.frombuffer(data, self.stored).reshape(shape)

    def _read_columns(self, start: int, stop: int) -> np.ndarray:
        """A run of each column, and no more of the file than that."""
        columns, size = math.prod(self.shape), self.stored.itemsize
        begins = [self.offset + (column * self.rows + start) * size for column in range(columns)]
        if self.local:
            runs = np.empty((*reversed(self.shape), stop - start), self.stored)
            self._fill(runs, begins)
            return runs.T
        ends = [begin + (stop - start) * size for begin in begins]
        data = b"".join(self.fs.cat_ranges([self.path] * columns, begins, ends, on_error="raise"))
        return np.frombuffer(data, self.stored).reshape(*reversed(self.shape), stop - start).T

    def _fill(self, values: np.ndarray, begins: list[int]) -> None:
        """Read an array of the local file's bytes in as many parts, one after the other, as there are places."""
        whole = memoryview(values.reshape(-1).view(np.uint8))
        with self._open() as file:
            if (size := os.fstat(file.fileno()).st_size) != self.size:
                raise ShardError(self.name, f"has {size} bytes, and had {self.size} when it was opened")
            length = len(whole) // len(begins)
            for place, begin in zip(range(0, len(whole), length), begins):
                part = whole[place : place + length]
                while count := _read_at(file, part, begin):
                    part, begin = part[count:], begin + count
                if part:
                    raise ShardError(self.name, "truncated while it was read")


class ParquetColumn(ShardFile):
    """A column of a parquet file: captions, or embeddings as lists of floats. Whole row groups are decoded."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, column: str, ndim: int):
        super().__init__(fs, path)
        self.column = column
        with naming(self.name), self._parquet() as file:
            kind, types = self._kind(file), pa.types
            if ndim == 0:
                text = kind.value_type if types.is_dictionary(kind) else kind
                if not (types.is_string(text) or types.is_large_string(text) or self.nulls == self.rows):
                    raise ShardError(self.name, f"column {column!r} holds {kind}; it must hold strings")
                self.dtype = "str"
                return
            if not self.rows:
                return
            if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
                raise ShardError(self.name, f"column {column!r} holds {kind}; it must hold lists of floats")
            self.stored = np.dtype(kind.value_type.to_pandas_dtype())
            batches = file.iter_batches(batch_size=64, columns=[column])
            self.shape = (next((len(row) for batch in batches for row in batch.column(0) if row.is_valid), 0),)
        self._check_floats(ndim)

    def _parquet(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path) if self.local else pq.ParquetFile(self._open(), pre_buffer=True)

    def _kind(self, file: pq.ParquetFile) -> pa.DataType:
        """The type of the column, null without rows; rows and nulls are noted. ShardError without such a column."""
        meta, fields = file.metadata, file.schema_arrow
        sizes = [meta.row_group(index).num_rows for index in range(meta.num_row_groups)]
        self.rows, self.edges = meta.num_rows, np.cumsum([0, *sizes])
        if min(sizes, default=0) < 0 or sum(sizes) != self.rows:
            raise ShardError(self.name, f"says that it has {self.rows} rows, and row groups of {sum(sizes)}")
        if not self.rows:
            return pa.null()
        if self.column not in fields.names:
            raise ShardError(self.name, f"has no column {self.column!r}; its columns are {', '.join(fields.names)}")
        kind = fields.field(self.column).type
        known = [s.null_count for s in self._statistics(file) if s.has_null_count]
        self.nulls = self.rows if pa.types.is_null(kind) else sum(known)
        return kind

    def _statistics(self, file: pq.ParquetFile) -> list[pq.Statistics]:
        meta = file.metadata
        index = next((i for i in range(meta.num_columns) if meta.schema.column(i).path == self.column), None)
        groups = () if index is None else range(meta.num_row_groups)
        for group in groups:  # a row, since pyarrow ends the process where it is asked first for what makes no sense
            next(file.iter_batches(1, row_groups=[group], columns=[self.column], use_threads=False), None)
        chunks = [meta.row_group(group).column(index) for group in groups]
        if any(chunk.physical_type != meta.schema.column(index).physical_type for chunk in chunks):
            raise ShardError(self.name, f"column {self.column!r} has two types")
        found = [chunk.statistics for chunk in chunks]
        return [statistics for statistics in found if statistics is not None]

    def peek(self, rows: int) -> np.ndarray:
        with naming(self.name), self._parquet() as file:
            return self._floats(next(file.iter_batches(batch_size=rows, columns=[self.column])).column(0))

    def peeks_at(self, rows: int) -> int:
        return 0

    def _read(self, start: int, stop: int, groups: RowGroups, into: np.ndarray | None = None) -> np.ndarray | pa.Array:
        first, last = np.searchsorted(self.edges, [start, stop - 1], side="right") - 1
        parts = []
        for group in range(first, last + 1):
            array = groups.get((self.path, self.column, group), lambda group=group: self._decode(group))
            before, after = int(self.edges[group]), int(self.edges[group + 1])
            parts.append(array[max(start, before) - before : min(stop, after) - before])
        array = pa.concat_arrays(parts) if len(parts) > 1 else parts[0]
        return array if self.dtype == "str" else self._floats(array)

    def _decode(self, group: int) -> pa.Array:
        rows, size, parts = int(self.edges[group + 1] - self.edges[group]), 0, []
        with self._parquet() as file:
            read = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[self.column], use_threads=False)
            for batch in read:
                parts.append(batch.column(0))
                size += parts[-1].nbytes
                if size > _GROUP_BYTES:
                    rule = "write it with smaller row groups"
                    raise ShardError(self.name, f"row group {group} holds over {_GROUP_BYTES >> 30} GiB; {rule}")
        column = pa.chunked_array(parts)
        if len(column) != rows:
            raise ShardError(self.name, f"row group {group} has {len(column)} rows, and {rows} by its header")
        if self.dtype != "str":
            return column.combine_chunks()
        column = column.cast(pa.large_string()).combine_chunks()
        column.validate(full=True)  # that all of it is UTF-8
        return column if self.absent is None else column.fill_null(self.absent)

    def _floats(self, array: pa.Array) -> np.ndarray:
        whole = pc.list_value_length(array).fill_null(-1).to_numpy(zero_copy_only=False) == self.shape[0]
        if not (whole.all() or self.fill):
            raise ShardError(self.name, f"column {self.column!r} has rows that are not {self.shape[0]} wide")
        if not whole.all():
            rows = np.full((len(array), *self.shape), math.nan, self.dtype)
            rows[whole] = self._floats(array.filter(pa.array(whole)))
            return rows
        values = array.flatten().to_numpy(zero_copy_only=False)
        return converted(values.reshape(len(array), *self.shape), self.dtype)


class ParquetNumbers(ParquetColumn):
    """A column of a parquet file with a number in each row: fp32, NaN where it is missing; `whole` ones int64, and -1.

    Attributes:
        bounds: the lowest and the highest number, as far as the header says; None where it does not.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, column: str, whole: bool):
        ShardFile.__init__(self, fs, path)
        self.column, self.whole = column, whole
        self.dtype, self.missing = ("int64", -1) if whole else ("float32", math.nan)
        with naming(self.name), self._parquet() as file:
            kind, types = self._kind(file), pa.types
            fractions = () if whole else (types.is_floating, types.is_decimal)
            numbers = any(fits(kind) for fits in (types.is_integer, types.is_boolean, *fractions))
            if not numbers and self.nulls < self.rows:
                rule = "integers" if whole else "numbers"
                raise ShardError(self.name, f"column {column!r} holds {kind}; it must hold {rule}")
            known = [s for s in self._statistics(file) if s.has_min_max]
            self.bounds = (min(s.min for s in known), max(s.max for s in known)) if known else None

    def _decode(self, group: int) -> pa.Array:
        return super()._decode(group).cast(self.dtype, safe=self.whole).fill_null(self.missing)

    def _floats(self, array: pa.Array) -> np.ndarray:
        return array.to_numpy(zero_copy_only=False)
