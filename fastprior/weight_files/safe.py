"""Files of weights of any kind, read without unpickling anything but tensors and plain values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from safetensors import safe_open
from torch import Tensor

from fastprior.reading import brief, open_regular, parse_json
from fastprior.weight_files.archives import UNCHECKED, ZIP, Archive, Damaged, read_old_file, read_pickle
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
    """What a file holds.

    Attributes:
        payload: tensors and plain values.
        header: our header, where it has one.
        notes: for the report of a load.
        archive: what reads the numbers of tensors, where that waits for `fill`.
        file: the open file then, and its path.
    """

    payload: Any
    header: dict | None
    notes: list[str]
    archive: Archive | None = None
    file: BinaryIO | None = None
    path: Path | None = None

    def fill(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Read the numbers of these tensors, or of all, and check them; raises ValueError for a damaged file."""
        if self.archive is not None:
            with _one_error(self.path):
                self.archive.fill(tensors)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


@contextmanager
def _one_error(path: Path) -> Iterator[None]:
    """Make one ValueError of what a file is refused for."""
    try:
        yield
    except Refused as refused:
        raise ValueError(
            f"{path} is refused, and nothing in it was run: it refers to {brief(str(refused))}, and a "
            "checkpoint must hold tensors and plain values only. Save its state_dict() alone where it was made"
        ) from None
    except Damaged as damage:
        raise ValueError(f"{path} is damaged: {damage}") from None
    except Exception as error:  # damaged files raise nearly any type, OSError too
        kind = f"damaged, cut short, or no checkpoint ({type(error).__name__}: {brief(str(error))})"
        raise ValueError(f"{path} cannot be read: it is {describe(path) or kind}") from error


def read_any_file(path: Path, later: bool = False) -> FileContents:
    """The contents of a file, on the CPU.

    Args:
        later: leave numbers of tensors unread where that can be, for `fill`, after which `close` must be called.
    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, is something else, or holds more than tensors and plain values.
    """
    file = open_regular(path)
    try:
        with _one_error(path):
            start = file.read(9)
            file.seek(0)
            if start[8:] == b"{" or (path.suffix == ".safetensors" and not start.startswith((b"PK", b"\x80"))):
                return FileContents(*_read_safetensors(path), [])
            if not start.startswith(ZIP):
                return FileContents(read_old_file(file), None, [])
            archive = Archive(file)
            if "constants.pkl" in archive.records:
                raise ValueError("a TorchScript archive")
            notes = [] if archive.has_checksums else [UNCHECKED]
            contents = FileContents(read_pickle(archive), None, notes, archive, file, path)
        if later:
            file = None  # which the caller closes
        else:
            contents.fill()
        return contents
    finally:
        if file is not None:
            file.close()


def read_file(path: Path, later: bool = False) -> FileContents:
    """The contents of a file that holds a dict: see `read_any_file`."""
    contents = read_any_file(path, later)
    if not isinstance(contents.payload, Mapping):
        contents.close()
        raise ValueError(f"{path} holds a {type(contents.payload).__name__}; it must hold a dict")
    return contents


def version_string(value) -> str | None:
    """The version in a string or in any pickled form of packaging's Version; None where there is none."""
    if not isinstance(value, Inert):
        text = str(value) if isinstance(value, str) or type(value).__name__ == "Version" else ""
        return text if 0 < len(text) < 100 and text.isprintable() else None
    try:
        if isinstance(value.state, Mapping):  # packaging up to 25
            release = value.state["_version"].args[1]
        else:  # (None, slots) in 26.0 and 26.1, (epoch, release, …) since
            release = value.state[1]
            release = release["_release"] if isinstance(release, Mapping) else release
        numbers = [number for number in release if type(number) is int and 0 <= number < 10**9]
        return ".".join(map(str, numbers)) if 0 < len(numbers) == len(release) < 10 else None
    except (TypeError, LookupError, AttributeError):
        return None
