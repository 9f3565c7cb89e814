"""The files that shards are made of: what their headers say, and rows read from them, local or by fsspec.

Opening a file reads its header only (a parquet file's footer and, for embeddings, its first row; a tar's member
headers), and raises ShardError where it is not what it should be. A file without rows may be anything else: pandas
writes columns without values as of no type, and numpy arrays without as fp64.
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
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from fsspec.implementations.local import LocalFileSystem
except ImportError as error:
    raise ImportError(f'{error.name} is not installed: pip install "fastprior[train]"') from error

FLOATS = ("float16", "float32", "float64")
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


def finite_rows(values: np.ndarray) -> np.ndarray:
    """Which of the rows (rows, ...) of floats have finite numbers only."""
    values = values.reshape(len(values), math.prod(values.shape[1:]))
    if values.dtype != np.float16:
        return np.isfinite(values).all(axis=1)
    return (values.view(np.uint16) & 0x7FFF).max(axis=1, initial=0) < 0x7C00  # several times as fast


def _converted(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as another dtype, rounded to nearest where they do not fit; those that are too large are infinite."""
    with np.errstate(over="ignore"):
        return values.astype(dtype, copy=False)


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
        dtype: of rows that were read: fp16 stays, fp64 is rounded to fp32, bytes come in the machine's order.
        stored: the dtype in the file.
        edges: row numbers between which rows are decoded together, from 0 to `rows`; None where any row is as near.
        nulls: captions that are missing, as far as the header says.
        fill: read rows that are missing, or of another width, as NaN; ShardError otherwise.
    """

    dtype: str = "float32"
    stored = np.dtype("float32")
    fill = False
    rows: int = 0
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
        """Some rows, for a look at them, from row `peeks_at(rows)` on. Raises ShardError."""
        first = self.peeks_at(rows)
        return self.read(first, min(first + rows, self.rows), RowGroups(0))

    def peeks_at(self, rows: int) -> int:
        return max(0, (self.rows - rows) // 2)

    def _read(self, start: int, stop: int, groups: RowGroups) -> np.ndarray | pa.Array:
        raise NotImplementedError

    def _check_floats(self, ndim: int) -> None:
        if self.stored.name not in FLOATS:
            raise ShardError(
                self.name, f"holds {self.stored.name}; it must be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}"
            )
        self.dtype = "float16" if self.stored.name == "float16" else "float32"
        if len(self.shape) != ndim - 1 or 0 in self.shape:
            raise ShardError(self.name, f"has shape {(self.rows, *self.shape)}; it must have {ndim} dimensions")


def _npy_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
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
        with _naming(self.name):
            shape, self.columns_first, self.stored, self.offset = _npy_header(fs.cat_file(path, start=0, end=_NPY_HEAD))
            size = fs.size(path)
        self.rows, self.shape = (shape[0], shape[1:]) if shape else (0, ())
        if self.rows or not shape:
            self._check_floats(ndim)
        wanted = self.offset + math.prod(shape) * self.stored.itemsize
        if size is not None and size != wanted:
            what = "truncated" if size < wanted else "too long"
            raise ShardError(self.name, f"{what}: {size} bytes, and {wanted} by its header")

    def _read(self, start: int, stop: int, groups: RowGroups) -> np.ndarray:
        rows = self._read_columns(start, stop) if self.columns_first else self._read_rows(start, stop)
        return _converted(rows, self.dtype)

    def _read_rows(self, start: int, stop: int) -> np.ndarray:
        size = math.prod(self.shape) * self.stored.itemsize
        begin, shape = self.offset + start * size, (stop - start, *self.shape)
        if self.local:
            return np.memmap(self.path, self.stored, "r", begin, shape)
        data = self.fs.cat_file(self.path, start=begin, end=begin + shape[0] * size)
        return np.frombuffer(data, self.stored).reshape(shape)

    def _read_columns(self, start: int, stop: int) -> np.ndarray:
        """A run of each column, and no more of the file than that."""
        if self.local:
            return np.memmap(self.path, self.stored, "r", self.offset, (self.rows, *self.shape), "F")[start:stop]
        columns, size = math.prod(self.shape), self.stored.itemsize
        begins = [self.offset + (column * self.rows + start) * size for column in range(columns)]
        ends = [begin + (stop - start) * size for begin in begins]
        data = b"".join(self.fs.cat_ranges([self.path] * columns, begins, ends, on_error="raise"))
        return np.frombuffer(data, self.stored).reshape(*reversed(self.shape), stop - start).T


class ParquetColumn(ShardFile):
    """A column of a parquet file: captions, or embeddings as lists of floats. Whole row groups are decoded."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, column: str, ndim: int):
        super().__init__(fs, path)
        self.column = column
        with _naming(self.name), self._open() as file:
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

    def _open(self) -> pq.ParquetFile:
        if self.local:
            return pq.ParquetFile(self.path, memory_map=True)
        return pq.ParquetFile(self.fs.open(self.path, "rb"), pre_buffer=True)

    def _kind(self, file: pq.ParquetFile) -> pa.DataType:
        """The type of the column, null without rows; rows and nulls are noted. ShardError without such a column."""
        meta, fields = file.metadata, file.schema_arrow
        sizes = [meta.row_group(index).num_rows for index in range(meta.num_row_groups)]
        self.rows, self.edges = meta.num_rows, np.cumsum([0, *sizes])
        if not self.rows:
            return pa.null()
        if self.column not in fields.names:
            raise ShardError(self.name, f"has no column {self.column!r}; its columns are {', '.join(fields.names)}")
        kind = fields.field(self.column).type
        known = [s.null_count for s in self._statistics(meta) if s.has_null_count]
        self.nulls = self.rows if pa.types.is_null(kind) else sum(known)
        return kind

    def _statistics(self, meta: pq.FileMetaData) -> list[pq.Statistics]:
        index = next((i for i in range(meta.num_columns) if meta.schema.column(i).path == self.column), None)
        groups = () if index is None else range(meta.num_row_groups)
        found = [meta.row_group(group).column(index).statistics for group in groups]
        return [statistics for statistics in found if statistics is not None]

    def peek(self, rows: int) -> np.ndarray:
        with _naming(self.name), self._open() as file:
            return self._floats(next(file.iter_batches(batch_size=rows, columns=[self.column])).column(0))

    def peeks_at(self, rows: int) -> int:
        return 0

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
        whole = pc.list_value_length(array).fill_null(-1).to_numpy(zero_copy_only=False) == self.shape[0]
        if not (whole.all() or self.fill):
            raise ShardError(self.name, f"column {self.column!r} has rows that are not {self.shape[0]} wide")
        if not whole.all():
            rows = np.full((len(array), *self.shape), math.nan, self.dtype)
            rows[whole] = self._floats(array.filter(pa.array(whole)))
            return rows
        values = array.flatten().to_numpy(zero_copy_only=False)
        return _converted(values.reshape(len(array), *self.shape), self.dtype)


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
            numbers = any(fits(kind) for fits in (types.is_integer, types.is_boolean, *fractions))
            if not numbers and self.nulls < self.rows:
                rule = "integers" if whole else "numbers"
                raise ShardError(self.name, f"column {column!r} holds {kind}; it must hold {rule}")
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
            shape, self.columns_first, self.stored, offset = _npy_header(first)
        self.head, self.size = first[:offset], len(first)
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
        alike = [member.startswith(self.head) and len(member) == self.size for member in members]
        if not (all(alike) or self.fill):
            raise ValueError("the embeddings of its samples differ in dtype or shape")
        missing = np.full(self.shape, math.nan, self.stored).tobytes()
        data = b"".join(member[len(self.head) :] if same else missing for member, same in zip(members, alike))
        if self.columns_first:
            rows = np.frombuffer(data, self.stored).reshape(-1, *reversed(self.shape))
            return _converted(rows.transpose(0, *range(rows.ndim - 1, 0, -1)), self.dtype)
        return _converted(np.frombuffer(data, self.stored).reshape(stop - start, *self.shape), self.dtype)

    def _caption(self, text: str) -> str:
        return (json.loads(text).get("caption") or "") if self.ending == "json" else text.strip()
