"""Learned step tables in the file of the prior that they were learned for, of which all else stays as it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastprior.diffusion.learned_tables import MOST_TABLES, LearnedTable
from fastprior.prior.record import TABLES
from fastprior.reading import open_regular, parse_json, quoted
from fastprior.utils import atomic
from fastprior.weight_files.safe import HEADER, read_any_file
from fastprior.weight_files.standins import Inert

MOST_HEADER = 10**8  # bytes, as safetensors has it
PLAIN = torch.Tensor, str, bytes, bool, int, float, torch.dtype, torch.Size, type(None)


def check_keeps_tables(path: str | os.PathLike) -> None:
    """Raise ValueError for a file that `add_table` cannot write tables into, before anybody learns one."""
    with open_regular(path) as file:
        _read(Path(path), file)


def add_table(path: str | os.PathLike, table: LearnedTable) -> None:
    """Write a learned table into a file of a prior, in the place of one of as many evaluations. Atomic.

    Args:
        path: what `fastprior.save`, a trainer or a tracker wrote: a safetensors file, or a pickle of torch.
    Raises:
        ValueError: the file does not record how to build the prior, or cannot be written again as it is.
    """
    path = Path(path)
    with open_regular(path) as file:
        whole, record = _read(path, file)
        found = record.get(TABLES, [])
        if not isinstance(found, list) or not all(isinstance(entry, Mapping) for entry in found):
            raise ValueError(f"{path}: its {TABLES} are {quoted(found)}; it must be a list of tables")
        others = [entry for entry in found if entry.get("evaluations") != len(table)]
        if len(others) >= MOST_TABLES:
            raise ValueError(f"{path} has {len(others)} learned tables; a file has at most {MOST_TABLES}")
        record = {**record, TABLES: [*others, table.to_json()]}
        with atomic(path) as temporary:
            if isinstance(whole, _Header):
                _copy_behind(whole, record, file, temporary)
            else:
                torch.save({**whole, HEADER: record}, temporary)


class _Header(dict):
    """The header of a safetensors file."""


def _copy_behind(header: _Header, record: dict, file: BinaryIO, target: Path) -> None:
    """Write a header with another record of ours, and the same bytes of tensors, which come next in the file."""
    metadata = {**header["__metadata__"], HEADER: json.dumps(record)}
    text = json.dumps({**header, "__metadata__": metadata}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    with target.open("wb") as copy:
        copy.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(file, copy, 2**22)


def _read(path: Path, file: BinaryIO) -> tuple[dict, Mapping]:
    """What a pickle holds, or the header of a safetensors file, behind which the file stands then; and our record."""
    start = file.read(9)
    if start[8:] == b"{":
        file.seek(8)
        size = min(int.from_bytes(start[:8], "little"), MOST_HEADER)
        whole = _Header(parse_json(file.read(size), f"{path}: its header", kind=dict))
        metadata = whole.get("__metadata__")
        record = metadata.get(HEADER) if isinstance(metadata, dict) else None
        record = parse_json(record, f"{path}: its {HEADER} entry", constants=True) if isinstance(record, str) else None
    else:
        whole = read_any_file(path).payload
        record = whole.get(HEADER) if isinstance(whole, Mapping) else None
        _check_plain(path, whole)
    if not isinstance(record, Mapping):
        rule = "only a file of fastprior.save, or of a trainer, can keep tables; another can be written as one"
        raise ValueError(f"{path} does not record how to build its prior: {rule}")
    return whole, record


def _check_plain(path: Path, payload: Any) -> None:
    """Raise ValueError for what stands for another object, which would be written in its place."""
    stack, seen = [payload], set()
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping) or type(value) in (list, tuple):
            if id(value) not in seen:
                seen.add(id(value))
                stack += [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        elif not isinstance(value, PLAIN):
            kind = "foreign object" if isinstance(value, Inert) else type(value).__name__
            raise ValueError(f"{path} holds a {kind}, with which it cannot be written again")
