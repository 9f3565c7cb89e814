"""Files of weights of any kind, read without unpickling anything but tensors and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from fastprior.reading import open_regular, parse_json, quoted
from fastprior.weight_files.archives import ZIP, Damaged, read_archive, read_old_file
from fastprior.weight_files.kinds import describe
from fastprior.weight_files.pickles import Refused
from fastprior.weight_files.standins import Inert

HEADER = "fastprior"  # the entry of a safetensors file's metadata that holds our configuration


class SharedOnce(dict):
    """The tensors of a safetensors file that was written by hand, for which what layers share had to be dropped.

    Libraries keep one of those that share, and mark what they write with a format.
    """


def _read_safetensors(path: Path) -> tuple[dict, dict | None]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        header = metadata.get(HEADER)
        header = parse_json(header, f"its {HEADER} entry", kind=dict, constants=True) if header else None
        tensors = (dict if "format" in metadata else SharedOnce)((key, file.get_tensor(key)) for key in file.keys())
    for name, kept in metadata.items():  # as safetensors.torch.save_model notes what it dropped
        if kept in tensors and name.rpartition(".")[2] == kept.rpartition(".")[2]:
            tensors.setdefault(name, tensors[kept])
    return tensors, header


class FileContents(NamedTuple):
    """What a file holds, our header where it has one, and notes for the report of a load."""

    payload: Any
    header: dict | None
    notes: list[str]


def read_any_file(path: Path) -> FileContents:
    """The contents of a file, on the CPU.

    Raises FileNotFoundError, and ValueError where the file is damaged, is something else, or holds more than tensors
    and plain values.
    """
    with open_regular(path) as file:
        start = file.read(9)
        file.seek(0)
        try:
            if start[8:] == b"{" or (path.suffix == ".safetensors" and not start.startswith((b"PK", b"\x80"))):
                return FileContents(*_read_safetensors(path), [])
            if start.startswith(ZIP):
                payload, notes = read_archive(file)
                return FileContents(payload, None, notes)
            return FileContents(read_old_file(file), None, [])
        except Refused as refused:
            raise ValueError(
                f"{path} is refused, and nothing in it was run: it refers to {refused!s:.200}, and a checkpoint "
                "must hold tensors and plain values only. Save its state_dict() alone where it was made"
            ) from None
        except Damaged as damage:
            raise ValueError(f"{path} is damaged: {damage}") from None
        except Exception as error:  # damaged files raise nearly any type, OSError too
            kind = f"damaged, cut short, or no checkpoint ({type(error).__name__}: {quoted(str(error))})"
            raise ValueError(f"{path} cannot be read: it is {describe(path) or kind}") from error


def read_file(path: Path) -> FileContents:
    """The contents of a file that holds a dict: see `read_any_file`."""
    contents = read_any_file(path)
    if not isinstance(contents.payload, Mapping):
        raise ValueError(f"{path} holds a {type(contents.payload).__name__}; it must hold a dict")
    return contents


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
