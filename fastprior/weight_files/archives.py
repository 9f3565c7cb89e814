"""Files that torch.save writes, zip archives and those from before 1.6, with the CRC-32 of all that is read checked."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from struct import unpack
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastprior.reading import quoted
from fastprior.utils import first_few
from fastprior.weight_files.pickles import PICKLE_BYTES, PickleReader
from fastprior.weight_files.tensors import Storage

ZIP = b"PK\x03\x04"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # with which files from before 1.6 begin
_LOCAL_HEADER = 30  # bytes, before a name and extra fields
UNCHECKED = "it has no CRC-32 checksums, so that damage cannot be seen"


class Damaged(Exception):
    """The bytes are not those that were written; the message says where."""


class Archive:
    """A zip archive of torch.save or of torch.jit.save: its records, with their checksums.

    Attributes:
        records: their entries by name, without the folder that all lie in.
        has_checksums: False in those of a process with `torch.serialization.set_crc32_options(False)`.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        size = os.fstat(file.fileno()).st_size
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        self.has_checksums = any(entry.CRC for entry in entries)
        self.records: dict[str, zipfile.ZipInfo] = {}
        for entry in entries:
            name = entry.filename.partition("/")[2]
            if name in self.records:
                raise Damaged(f"it has {quoted(name)} twice")
            self.records[name] = entry
        if sum(entry.compress_size for entry in entries) > size:
            raise Damaged("its records lie over each other")
        self._unread: dict[int, tuple[zipfile.ZipInfo, memoryview]] = {}  # by addresses of storages

    def _start(self, entry: zipfile.ZipInfo) -> None:
        """Go to the bytes of a record."""
        if entry.flag_bits & 1:
            raise Damaged(f"{quoted(entry.filename)} is encrypted: torch.save writes no such records")
        self.file.seek(entry.header_offset)
        header = self.file.read(_LOCAL_HEADER)
        if len(header) != _LOCAL_HEADER or not header.startswith(ZIP):
            raise Damaged(f"{quoted(entry.filename)} is not where the archive says")
        self.file.seek(sum(unpack("<HH", header[26:])), os.SEEK_CUR)

    def _check(self, differing: list[zipfile.ZipInfo]) -> None:
        if differing and self.has_checksums:
            names = first_few(entry.filename for entry in differing)
            raise Damaged(f"the CRC-32 of {names} is not what was written")

    def read(self, name: str, most: int) -> bytes:
        """A record of at most so many bytes, checked; one of TorchScript's code may be deflated."""
        entry = self.records[name]
        if entry.file_size > most:
            raise Damaged(f"{quoted(name)} has {entry.file_size:,} bytes; at most {most:,} are read")
        self._start(entry)
        data = self.file.read(entry.compress_size)
        if entry.compress_type == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, entry.file_size)
        if len(data) != entry.file_size:
            raise EOFError(f"{quoted(name)} is cut short")
        self._check([entry] if zlib.crc32(data) != entry.CRC else [])
        return data

    def storage(self, name: str) -> torch.UntypedStorage:
        """Memory for a record that holds the bytes of tensors, which `fill` reads."""
        entry = self.records[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise Damaged(f"{quoted(entry.filename)} is compressed: torch.save writes no such records")
        storage, buffer = _storage(entry.file_size)
        if entry.file_size:
            self._unread[storage.data_ptr()] = entry, buffer
        return storage

    def fill(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Read the storages of these tensors, or all, and check them. Raises Damaged."""
        wanted = self._unread if tensors is None else {tensor.untyped_storage().data_ptr() for tensor in tensors}
        parts = [self._unread.pop(address) for address in list(self._unread) if address in wanted]
        checks = []
        with ThreadPoolExecutor(1) as checking:  # one reads, one checks
            for entry, buffer in sorted(parts, key=lambda part: part[0].header_offset):
                self._start(entry)
                _fill(self.file, buffer)
                checks.append((entry, checking.submit(zlib.crc32, buffer)))
        self._check([entry for entry, check in checks if check.result() != entry.CRC])


def _storage(size: int) -> tuple[torch.UntypedStorage, memoryview]:
    data = torch.empty(size, dtype=torch.uint8, device="cpu")
    return data.untyped_storage(), memoryview(data.numpy())


def _fill(file: BinaryIO, buffer: memoryview) -> None:
    if file.readinto(buffer) != len(buffer):
        raise EOFError("it ends within a tensor")


def read_pickle(archive: Archive, name: str = "data.pkl", folder: str = "data", names: Container[str] = ()) -> Any:
    """What a pickle of an archive holds; its tensors have their numbers after `archive.fill`.

    Args:
        name: the pickle's record.
        folder: that of the records with the bytes of its tensors.
        names: stand-ins for what it names besides those of `standins.NAMES`: anything with `in` and `[]`.
    """
    if "byteorder" in archive.records and archive.read("byteorder", 100) != b"little":
        raise Damaged("its numbers are not little-endian")
    stored: dict[str, Storage] = {}

    def storage(key: tuple) -> Storage:
        kind, storage_type, record, *_ = key
        if kind != "storage" or not isinstance(record, str):
            raise pickle.UnpicklingError("a persistent id that is no storage")
        if record not in stored:
            stored[record] = Storage(archive.storage(f"{folder}/{record}"), storage_type.dtype)
        return stored[record]

    return PickleReader(io.BytesIO(archive.read(name, PICKLE_BYTES)), storage, names).read()


class _OldStorages:
    """Storages of a file from before torch 1.6, whose bytes follow the pickle that refers to them."""

    def __init__(self, size: int):
        self.left = size
        self.buffers: dict[str, tuple[memoryview, int]] = {}
        self.stored: dict[tuple, Storage] = {}

    def __call__(self, key: tuple) -> Storage:
        kind, storage_type, name, _, numel, view = key
        dtype = storage_type.dtype
        if kind != "storage" or not isinstance(name, str) or type(numel) is not int or numel < 0 or dtype is None:
            raise pickle.UnpicklingError("a persistent id that is no storage")
        if name not in self.buffers:
            self.left -= numel * dtype.itemsize
            if self.left < 0:
                raise EOFError("its tensors are larger than the file")
            data, buffer = _storage(numel * dtype.itemsize)
            self.buffers[name], self.stored[name, None] = (buffer, dtype.itemsize), Storage(data, dtype)
        if view is None:
            return self.stored[name, None]
        _, offset, length = view
        begin, end = offset * dtype.itemsize, (offset + length) * dtype.itemsize
        if not 0 <= begin <= end <= len(self.buffers[name][0]):
            raise pickle.UnpicklingError("a view beyond its storage")
        return Storage(self.stored[name, None].data[begin:end], dtype)


def read_old_file(file: BinaryIO) -> Any:
    """What a file from before torch 1.6 holds, which has no checksums."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    data = io.BytesIO(file.read(PICKLE_BYTES))
    storages = _OldStorages(size)

    def value(storage: Callable[[tuple], Any] = _no_storage) -> Any:
        return PickleReader(data, storage).read()

    if value() != _MAGIC or value() != _PROTOCOL:
        raise pickle.UnpicklingError("no file of torch.save")
    system = value()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise pickle.UnpicklingError("its numbers are not little-endian")
    payload, order = value(storages), value()
    if not isinstance(order, list) or sorted(order) != sorted(storages.buffers):
        raise pickle.UnpicklingError("it lists other storages than it has")
    file.seek(data.tell())
    for name in order:
        buffer, itemsize = storages.buffers[name]
        head = file.read(8)
        if len(head) != 8 or unpack("<q", head)[0] * itemsize != len(buffer):
            raise EOFError(f"storage {quoted(name)} has another length, or the file ends before it")
        _fill(file, buffer)
    return payload


def _no_storage(_: tuple) -> None:
    raise pickle.UnpicklingError("tensors where there are none")
