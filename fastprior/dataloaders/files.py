"""The files that shards are made of: what their headers say, and rows read from them, local or by fsspec.

Opening a file reads its header only (a parquet file's footer and, for embeddings, its first row; a tar's member
headers), and raises ShardError where it is not what it should be.
"""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np

try:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq
    from fsspec.implementations.local import LocalFileSystem
except ImportError as error:
    raise ImportError(f'{error.name} is not installed: pip install "fastprior[train]"') from error

DTYPES = ("float16", "float32")
CAPTION_BYTES = 100  # what a caption is taken to need, where memory is planned
_NPY_HEAD = 4096
_RETRIES = (0.5, 1.0, 2.0)  # seconds to wait before reading a remote file again


class ShardError(ValueError):
    """A file of a shard cannot be read, or is not what it should be; the message begins with its name."""

    def __init__(self, path: str, what: object):
        super().__init__(f"{path}: {what}")
        self.path, self.what = path, str(what)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Readers raise whatever they like on a corrupt file: make it a ShardError."""
    try:
        yield
    except ShardError:
        raise
    except Exception as error:
        raise ShardError(path, f"cannot be read ({type(error).__name__}: {error})") from error


def shard_number(path: str) -> int | None:
    """The number in a file's name: `img_emb_0012.npy` and `metadata_12.parquet` are both 12; None without one."""
    stem = path.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    found = re.match(r"part-(\d+)", stem) or re.search(r"(\d+)$", stem) or re.search(r"(?<![a-zA-Z\d])(\d+)", stem)
    return int(found[1]) if found else None


def list_files(url: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    """The file system of `url`, and all files below it, but hidden ones. Raises FileNotFoundError without any."""
    fs, root = fsspec.core.url_to_fs(url)
    paths = [path for path in fs.find(root) if path.rsplit("/", 1)[-1][0] not in "._"]
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

    Attributes:
        edges: row numbers between which rows are decoded together, from 0 to `rows`; None where any row is as near.
        nulls: captions that are missing, as far as the header says.
    """

    dtype: str
    rows: int
    shape: tuple[int, ...] = ()
    edges: np.ndarray | None = None
    nulls = 0

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str):
        self.fs, self.path, self.name = fs, path, path
        self.local = isinstance(fs, LocalFileSystem)
        if not self.local:
            self.name = fs.unstrip_protocol(path)

    @property
    def row_bytes(self) -> int:
        return CAPTION_BYTES if self.dtype == "str" else int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def read(self, start: int, stop: int, groups: RowGroups) -> np.ndarray | pa.Array:
        """Rows start to stop: an array (stop - start, *shape), possibly mapped from the file, or strings.

        Raises ShardError; a remote file is tried several times.
        """
        for pause in () if self.local else _RETRIES:
            try:
                return self._read(start, stop, groups)
            except Exception:
                time.sleep(pause)
        with _naming(self.name):
            return self._read(start, stop, groups)

    def peek(self, rows: int) -> np.ndarray:
        """Some rows, for a look at them. Raises ShardError."""
        first = max(0, (self.rows - rows) // 2)
        return self.read(first, min(first + rows, self.rows), RowGroups(0))

    def _read(self, start: int, stop: int, groups: RowGroups) -> np.ndarray | pa.Array:
        raise NotImplementedError

    def _check_floats(self, ndim: int) -> None:
        if self.dtype not in DTYPES:
            raise ShardError(self.name, f"holds {self.dtype}; it must be {' or '.join(DTYPES)}")
        if len(self.shape) != ndim - 1 or 0 in self.shape:
            raise ShardError(self.name, f"has shape {(self.rows, *self.shape)}; it must have {ndim} dimensions")


def _npy_header(data: bytes) -> tuple[tuple[int, ...], str, int]:
    """Shape, dtype and length of the header that `data` begins with. Raises ValueError."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if fortran_order and len(shape) > 1:
        raise ValueError("columns are stored first; rows must be")
    return shape, dtype.name if dtype.isnative else dtype.str, file.tell()


class NpyFile(ShardFile):
    """A .npy file of floats: (rows, dim), or (rows, length, dim)."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, ndim: int):
        super().__init__(fs, path)
        with _naming(self.name):
            shape, self.dtype, self.offset = _npy_header(fs.cat_file(path, start=0, end=_NPY_HEAD))
            size = fs.size(path)
        self.rows, self.shape = (shape[0], shape[1:]) if shape else (0, ())
        self._check_floats(ndim)
        wanted = self.offset + self.rows * self.row_bytes
        if size is not None and size != wanted:
            what = "truncated" if size < wanted else "too long"
            raise ShardError(self.name, f"{what}: {size} bytes, and {wanted} by its header")

    def _read(self, start: int, stop: int, groups: RowGroups) -> np.ndarray:
        begin, shape = self.offset + start * self.row_bytes, (stop - start, *self.shape)
        if self.local:
            return np.memmap(self.path, self.dtype, "r", begin, shape)
        data = self.fs.cat_file(self.path, start=begin, end=begin + shape[0] * self.row_bytes)
        return np.frombuffer(data, self.dtype).reshape(shape)


class ParquetColumn(ShardFile):
    """A column of a parquet file: captions, or embeddings as lists of floats. Whole row groups are decoded."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, column: str, ndim: int):
        super().__init__(fs, path)
        self.column = column
        with _naming(self.name), self._open() as file:
            kind = self._kind(file)
            if ndim == 0:
                text = kind.value_type if pa.types.is_dictionary(kind) else kind
                if not (pa.types.is_string(text) or pa.types.is_large_string(text)):
                    raise ShardError(self.name, f"column {column!r} holds {kind}; it must hold strings")
                self.dtype, self.nulls = "str", self._count_nulls(file.metadata)
                return
            if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
                raise ShardError(self.name, f"column {column!r} holds {kind}; it must hold lists of floats")
            self.dtype = kind.value_type.to_pandas_dtype().__name__
            first = next(file.iter_batches(batch_size=1, columns=[column]), None)
            self.shape = (0 if first is None else len(first.column(0)[0].as_py() or ()),)
        self._check_floats(ndim)

    def _open(self) -> pq.ParquetFile:
        if self.local:
            return pq.ParquetFile(self.path, memory_map=True)
        return pq.ParquetFile(self.fs.open(self.path, "rb"), pre_buffer=True)

    def _kind(self, file: pq.ParquetFile) -> pa.DataType:
        """The type of the column; the file's rows are noted. Raises ShardError without such a column."""
        meta, fields = file.metadata, file.schema_arrow
        if self.column not in fields.names:
            raise ShardError(self.name, f"has no column {self.column!r}; its columns are {', '.join(fields.names)}")
        sizes = [meta.row_group(index).num_rows for index in range(meta.num_row_groups)]
        self.rows, self.edges = meta.num_rows, np.cumsum([0, *sizes])
        return fields.field(self.column).type

    def _statistics(self, meta: pq.FileMetaData) -> list[pq.Statistics]:
        index = next(i for i in range(meta.num_columns) if meta.schema.column(i).path == self.column)
        found = [meta.row_group(group).column(index).statistics for group in range(meta.num_row_groups)]
        return [statistics for statistics in found if statistics is not None]

    def _count_nulls(self, meta: pq.FileMetaData) -> int:
        return sum(s.null_count for s in self._statistics(meta) if s.has_null_count)

    def peek(self, rows: int) -> np.ndarray:
        with _naming(self.name), self._open() as file:
            return self._floats(next(file.iter_batches(batch_size=rows, columns=[self.column])).column(0))

    def _read(self, start: int, stop: int, groups: RowGroups) -> np.ndarray | pa.Array:
        first, last = np.searchsorted(self.edges, [start, stop - 1], side="right") - 1
        parts = []
        for group in range(first, last + 1):
            array = groups.get((self.path, self.column, group), lambda group=group: self._decode(group))
            before, after = int(self.edges[group]), int(self.edges[group + 1])
            parts.append(array[max(start, before) - before : min(stop, after) - before])
        array = pa.concat_arrays(parts) if len(parts) > 1 else parts[0]
        return array if self.dtype == "str" else self._floats(array)

    def _decode(self, group: int) -> pa.Array:
        with self._open() as file:
            column = file.read_row_group(group, columns=[self.column], use_threads=False).column(0)
        if self.dtype != "str":
            return column.combine_chunks()
        return column.cast(pa.large_string()).combine_chunks().fill_null("")

    def _floats(self, array: pa.Array) -> np.ndarray:
        values = array.flatten().to_numpy(zero_copy_only=False)
        if len(values) != len(array) * self.shape[0]:
            raise ShardError(self.name, f"column {self.column!r} has rows that are not {self.shape[0]} wide")
        return values.reshape(len(array), *self.shape)


class ParquetNumbers(ParquetColumn):
    """A column of a parquet file with a number in each row: fp32, NaN where it is missing; `whole` ones int64, and -1.

    Attributes:
        bounds: the lowest and the highest number, as far as the header says; None where it does not.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, column: str, whole: bool):
        ShardFile.__init__(self, fs, path)
        self.column, self.whole = column, whole
        self.dtype, self.missing = ("int64", -1) if whole else ("float32", math.nan)
        with _naming(self.name), self._open() as file:
            kind, types = self._kind(file), pa.types
            fractions = () if whole else (types.is_floating, types.is_decimal)
            if not any(fits(kind) for fits in (types.is_integer, types.is_boolean, *fractions)):
                rule = "integers" if whole else "numbers"
                raise ShardError(self.name, f"column {column!r} holds {kind}; it must hold {rule}")
            self.nulls = self._count_nulls(file.metadata)
            known = [s for s in self._statistics(file.metadata) if s.has_min_max]
            self.bounds = (min(s.min for s in known), max(s.max for s in known)) if known else None

    def _decode(self, group: int) -> pa.Array:
        return super()._decode(group).cast(self.dtype, safe=self.whole).fill_null(self.missing)

    def _floats(self, array: pa.Array) -> np.ndarray:
        return array.to_numpy(zero_copy_only=False)


# the members of a webdataset's sample that hold each column
MEMBERS = {
    "image_embed": ("img_emb.npy", "npy"),
    "text": ("txt", "json"),
    "text_embed": ("text_emb.npy",),
    "text_encodings": ("text_encodings.npy",),
}


def tar_columns(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, tuple[str, dict[str, tuple[int, int]]]]:
    """A webdataset's tar, by column: the ending of its members, and of each sample's key the (offset, bytes)."""
    name = path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)
    found: dict[str, dict[str, tuple[int, int]]] = {}
    with _naming(name), fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            key, _, ending = base.partition(".")
            if member.isfile():
                found.setdefault(ending, {})[f"{folder}/{key}"] = (member.offset_data, member.size)
        file.seek(tar.offset)  # tarfile takes a header that makes no sense for the end
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise ValueError(f"no tar header at byte {tar.offset}")
    endings = {column: next((e for e in names if e in found), None) for column, names in MEMBERS.items()}
    return {column: (ending, found[ending]) for column, ending in endings.items() if ending}


class TarColumn(ShardFile):
    """A column of a webdataset's tar: an .npy file, or a text, to each sample; `places` are their (offset, bytes)."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, ending: str, places: list[tuple[int, int]], ndim: int):
        super().__init__(fs, path)
        self.ending, self.rows = ending, len(places)
        self.places = np.array(places, dtype=np.int64).reshape(-1, 2)
        self.dtype = "str"
        if ndim == 0:
            return
        if not places:
            raise ShardError(self.name, f"no sample has all that is wanted, .{ending} among it")
        with _naming(self.name):
            first = self._members(0, 1)[0]
            shape, self.dtype, offset = _npy_header(first)
        self.head = first[:offset]
        self.shape = shape[1:] if len(shape) == ndim and shape[0] == 1 else shape  # (1, dim), as some write it
        self._check_floats(ndim)

    def _members(self, start: int, stop: int) -> list[bytes]:
        begin, end = int(self.places[start, 0]), int(self.places[start:stop].sum(axis=1).max())
        data = self.fs.cat_file(self.path, start=begin, end=end)
        if len(data) != end - begin:
            raise ValueError("truncated")
        return [data[at - begin : at - begin + size] for at, size in self.places[start:stop]]

    def _read(self, start: int, stop: int, groups: RowGroups) -> np.ndarray | pa.Array:
        members = self._members(start, stop)
        if self.dtype == "str":
            return pa.array([self._caption(member.decode("utf-8")) for member in members], pa.large_string())
        if not all(member.startswith(self.head) for member in members):
            raise ValueError("the embeddings of its samples differ in dtype or shape")
        rows = np.frombuffer(b"".join(member[len(self.head) :] for member in members), self.dtype)
        return rows.reshape(stop - start, *self.shape)

    def _caption(self, text: str) -> str:
        return (json.loads(text).get("caption") or "") if self.ending == "json" else text.strip()
