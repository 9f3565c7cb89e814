"""Files of weights of any kind, read without unpickling anything but tensors and plain values."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

HEADER = "fastprior"  # the entry of a safetensors file's metadata that holds our configuration


class _Inert:
    """Stands in for a foreign class in a pickle: holds its state, and does nothing."""

    state = None

    def __new__(cls, *args):
        self = super().__new__(cls)
        self.args = args
        return self

    def __setstate__(self, state):
        self.state = state


def _inert_dict(*args) -> dict:
    """Stands in for defaultdict, which the restricted unpickler would not fill."""
    return {}


# all that DALLE2-pytorch's trainer pickles besides plain types, with any release of packaging and torch
_SAFE_GLOBALS = [
    (dict, "builtins.dict"),
    (_inert_dict, "collections.defaultdict"),
    (_Inert, "packaging.version.Version"),
    (_Inert, "packaging.version._Version"),
    (_Inert, "packaging._structures.InfinityType"),
    (_Inert, "packaging._structures.NegativeInfinityType"),
    (_Inert, "pytorch_warmup.base.LinearWarmup"),
    (_Inert, "torch.optim.adam.Adam"),
    (_Inert, "torch.optim.adamw.AdamW"),
]
_READING = threading.Lock()  # safe_globals is one list for all threads


def read_any_file(path: Path) -> tuple[Any, dict | None]:
    """The contents of a file, on the CPU, and our header where it has one.

    Raises FileNotFoundError, and ValueError where the file is damaged or holds more than tensors and plain values.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory; it must be a checkpoint file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; it must be a checkpoint file")
    with path.open("rb") as file:
        is_safetensors = path.suffix == ".safetensors" or file.read(9)[8:] == b"{"
    try:
        if is_safetensors:
            with safe_open(path, "pt") as file:
                header = (file.metadata() or {}).get(HEADER)
                header = json.loads(header) if header else None
                if not isinstance(header, dict | None):
                    raise ValueError(f"its {HEADER} entry is no dict")
                return {key: file.get_tensor(key) for key in file.keys()}, header
        with _READING, torch.serialization.safe_globals(_SAFE_GLOBALS):
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise nearly any type, OSError too
        detail = str(error).rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0].strip()
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} is refused, and nothing in it was run: it refers to {forbidden[1]}, and a checkpoint must "
                "hold tensors and plain values only. Save its state_dict() alone where it was made"
            ) from None
        kind = f"{type(error).__name__}: {detail or error}"
        raise ValueError(f"{path} cannot be read: it is damaged, cut short, or no checkpoint ({kind})") from error
    return payload, None


def read_file(path: Path) -> tuple[Mapping, dict | None]:
    """The dict that a file holds, and our header where it has one: see `read_any_file`."""
    payload, header = read_any_file(path)
    if not isinstance(payload, Mapping):
        raise ValueError(f"{path} holds a {type(payload).__name__}; it must hold a dict")
    return payload, header


def version_string(value) -> str | None:
    """The version in a string or in any pickled form of packaging's Version; None where there is none."""
    if not isinstance(value, _Inert):
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
