"""Shards as a webdataset's tars: what their members are, and rows read from them; nothing is unpacked."""

from __future__ import annotations

import json
import math
import os
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from fastprior.dataloaders.files import RowGroups, ShardError, ShardFile, converted, naming, npy_header
from fastprior.reading import open_regular

# the members of a webdataset's sample that hold each column
MEMBERS = {
    "image_embed": ("img_emb.npy", "npy"),
    "text": ("txt", "json"),
    "text_embed": ("text_emb.npy",),
    "text_encodings": ("text_encodings.npy",),
}


def tar_columns(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, tuple[str, dict[str, tuple[int, int]]]]:
    """A webdataset's tar, by column: the ending of its members, and of each sample's key the (offset, bytes).

    Nothing is unpacked: what is no regular file in it is passed over, wherever its name would lead.
    """
    local = isinstance(fs, LocalFileSystem)
    name = path if local else fs.unstrip_protocol(path)
    found: dict[str, dict[str, tuple[int, int]]] = {}
    with naming(name), open_regular(path) if local else fs.open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                folder, _, base = member.name.rpartition("/")
                key, _, ending = base.partition(".")
                if member.issparse() or member.offset_data + max(0, member.size) > size:
                    raise ValueError(f"{member.name!r} is truncated, or sparse")
                if member.isfile():
                    found.setdefault(ending, {})[f"{folder}/{key}"] = (member.offset_data, member.size)
                tar.members.clear()  # of millions
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
        with naming(self.name):
            first = self._members(0, 1)[0]
            shape, self.columns_first, self.stored, offset = npy_header(first)
        self.head, self.size = first[:offset], len(first)
        self.shape = shape[1:] if len(shape) == ndim and shape[0] == 1 else shape  # (1, dim), as some write it
        self._check_floats(ndim)

    def _members(self, start: int, stop: int) -> list[bytes]:
        places = self.places[start:stop]
        begin, end = int(places[:, 0].min()), int(places.sum(axis=1).max())
        data = self._bytes(begin, end)
        if len(data) != end - begin:
            raise ValueError("truncated")
        return [data[at - begin : at - begin + size] for at, size in places]

    def _read(self, start: int, stop: int, groups: RowGroups, into: np.ndarray | None = None) -> np.ndarray | pa.Array:
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
            return converted(rows.transpose(0, *range(rows.ndim - 1, 0, -1)), self.dtype)
        return converted(np.frombuffer(data, self.stored).reshape(stop - start, *self.shape), self.dtype)

    def _caption(self, text: str) -> str:
        return (json.loads(text).get("caption") or "") if self.ending == "json" else text.strip()
