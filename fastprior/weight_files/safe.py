"""Files of weights of any kind, read without unpickling anything but tensors and plain values."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastprior.weight_files.kinds import describe
from fastprior.weight_files.standins import SAFE_GLOBALS, Inert

HEADER = "fastprior"  # the entry of a safetensors file's metadata that holds our configuration
_READING = threading.Lock()  # the list of safe globals is one for all threads


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Let pickles refer to our stand-ins, and to what the process allowed besides; theirs come back under our names."""
    before, ours = torch.serialization.get_safe_globals(), {name for _, name in SAFE_GLOBALS}
    names = [entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}" for entry in before]
    if in_our_place := [entry for entry, name in zip(before, names) if name in ours]:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([entry for entry in before if entry not in in_our_place])
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            yield
    finally:
        torch.serialization.add_safe_globals(in_our_place)


class SharedOnce(dict):
    """The tensors of a safetensors file that was written by hand, for which what layers share had to be dropped.

    Libraries keep one of those that share, and mark what they write with a format.
    """


def _read_safetensors(path: Path) -> tuple[dict, dict | None]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        header = json.loads(metadata[HEADER]) if metadata.get(HEADER) else None
        if not isinstance(header, dict | None):
            raise ValueError(f"its {HEADER} entry is no dict")
        tensors = (dict if "format" in metadata else SharedOnce)((key, file.get_tensor(key)) for key in file.keys())
    for name, kept in metadata.items():  # as safetensors.torch.save_model notes what it dropped
        if kept in tensors and name.rpartition(".")[2] == kept.rpartition(".")[2]:
            tensors.setdefault(name, tensors[kept])
    return tensors, header


def read_any_file(path: Path) -> tuple[Any, dict | None]:
    """The contents of a file, on the CPU, and our header where it has one.

    Raises FileNotFoundError, and ValueError where the file is damaged, is something else, or holds more than tensors
    and plain values.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory; it must be a checkpoint file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; it must be a checkpoint file")
    with path.open("rb") as file:
        start = file.read(9)
    try:
        if start[8:] == b"{" or (path.suffix == ".safetensors" and not start.startswith((b"PK", b"\x80"))):
            return _read_safetensors(path)
        with _READING, _stand_ins(), path.open("rb") as file:  # torch would go by the name
            payload = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise nearly any type, OSError too
        detail = str(error).rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0].strip()
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} is refused, and nothing in it was run: it refers to {forbidden[1]}, and a checkpoint must "
                "hold tensors and plain values only. Save its state_dict() alone where it was made"
            ) from None
        kind = f"damaged, cut short, or no checkpoint ({type(error).__name__}: {detail or error})"
        raise ValueError(f"{path} cannot be read: it is {describe(path) or kind}") from error
    return payload, None


def read_file(path: Path) -> tuple[Mapping, dict | None]:
    """The dict that a file holds, and our header where it has one: see `read_any_file`."""
    payload, header = read_any_file(path)
    if not isinstance(payload, Mapping):
        raise ValueError(f"{path} holds a {type(payload).__name__}; it must hold a dict")
    return payload, header


def version_string(value) -> str | None:
    """The version in a string or in any pickled form of packaging's Version; None where there is none."""
    if not isinstance(value, Inert):
        return str(value) if isinstance(value, str) or type(value).__name__ == "Version" else None
    try:
        if isinstance(value.state, Mapping):  # packaging up to 25
            release = value.state["_version"].args[1]
        else:  # (None, slots) in 26.0 and 26.1, (epoch, release, …) since
            release = value.state[1]
            release = release["_release"] if isinstance(release, Mapping) else release
        return ".".join(map(str, release))
    except (TypeError, KeyError, IndexError, AttributeError):
        return None
