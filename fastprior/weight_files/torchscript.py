"""TorchScript archives, such as OpenAI's CLIPs: their tensors by name, with nothing in them run.

torch.jit.load compiles an archive's code and runs what its classes do when they are restored, which may write any file.
Here its pickle is read as any other, with stand-ins for its classes that hold a state, and which of an object's tensors
are parameters and buffers is read off the text of its class.
"""

from __future__ import annotations

import os
import re
import zipfile
from typing import Any

from torch import Tensor

from fastprior.reading import open_regular, quoted
from fastprior.weight_files.archives import Archive, Damaged, read_pickle
from fastprior.weight_files.pickles import Refused
from fastprior.weight_files.standins import Inert
from fastprior.weight_files.tensors import Unreadable

CODE_BYTES = 2**24  # of all classes together, unpacked
KEY_CHARACTERS = 2**24  # of all names together: modules may share parts, which each of them names
_TAGS = "restore_type_tag", "build_intlist", "build_tensorlist", "build_doublelist", "build_boollist"


class _Object(Inert):
    """Stands in for an object of a class of the archive."""

    kind: str


def _untagged(value: Any, *_) -> Any:
    """Stands in for what says the type of a list or dict."""
    return value


class _Names(dict):
    """Stand-ins for the classes of an archive, each made when it is first named, and for the tags of types."""

    def __init__(self):
        super().__init__({f"torch.jit._pickle.{name}": _untagged for name in _TAGS})

    def __contains__(self, name: str) -> bool:
        return name.startswith("__torch__.") or super().__contains__(name)

    def __missing__(self, name: str) -> type[_Object]:
        self[name] = type("_Object", (_Object,), {"kind": name})
        return self[name]


def is_torchscript(path: str | os.PathLike) -> bool:
    """Whether a file is a zip archive with the constants that TorchScript keeps; errors as `open_regular` has."""
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return any(name.endswith("/constants.pkl") for name in archive.namelist())
        except Exception:  # damaged archives raise nearly any type
            return False


def read_torchscript(path: str | os.PathLike) -> dict[str, Tensor | Unreadable]:
    """The state dict of an archive, as `torch.jit.load(path).state_dict()` has it, on the CPU.

    Raises FileNotFoundError, and ValueError for what is damaged, refers to foreign classes, or restores modules by code
    of its own.
    """
    with open_regular(path) as file:
        try:
            archive = Archive(file)
            state = _state_dict(read_pickle(archive, names=_Names()), _Classes(archive))
            archive.fill([tensor for tensor in state.values() if isinstance(tensor, Tensor)])
            return state
        except Exception as error:  # damaged files raise nearly any type
            detail = f"{type(error).__name__}: {quoted(str(error))[1:-1]}"
            if type(error) in (Damaged, ValueError):
                detail = str(error)
            if isinstance(error, Refused):
                detail = f"it refers to {quoted(str(error))[1:-1]}, and nothing in it was run"
            raise ValueError(f"{os.fspath(path)} cannot be read as a TorchScript archive: {detail}") from error


class _Classes:
    """The classes of modules that an archive's code has: which names hold parameters and buffers."""

    _NAMES = re.compile(r'"([^"\\]*)"')
    _TENSORS = re.compile(r'^  (?:__annotations__\["([^"\\]*)"\] =|(\S+) :) Tensor$', re.MULTILINE)

    def __init__(self, archive: Archive):
        self.archive, self.left = archive, CODE_BYTES
        self.files: dict[str, dict[str, list[str] | None]] = {}

    def tensors(self, value: Any) -> list[str] | None:
        """The names of a module's parameters, then of its buffers; None for what is no module."""
        if not isinstance(value, _Object):
            return None
        path, _, name = value.kind.rpartition(".")
        if path not in self.files:
            record = f"code/{path.replace('.', '/')}.py"
            code = self.archive.read(record, self.left).decode() if record in self.archive.records else ""
            self.left -= len(code)
            self.files[path] = dict(map(self._module, re.split(r"^class ", code, flags=re.MULTILINE)[1:]))
        return self.files[path].get(name)

    def _module(self, code: str) -> tuple[str, list[str] | None]:
        head, body = code.partition("\n  def ")[0].split("\n", 1)
        name, is_module, _ = head.partition("(Module):")
        if not is_module:
            return name.rstrip(":"), None
        kinds = "__parameters__", "__buffers__"
        listed = [re.search(rf"^  {kind} = \[(.*)\]$", body, re.MULTILINE) for kind in kinds]
        tensors = {one or other for one, other in self._TENSORS.findall(body)}  # an Optional[Tensor] is none of them
        names = (name for found in listed if found for name in self._NAMES.findall(found[1]))
        return name, [name for name in names if name in tensors]


def _state_dict(module: Any, classes: _Classes) -> dict[str, Tensor | Unreadable]:
    """The tensors of a module and of those in it, in the order of a state dict."""
    state, left, waiting = {}, KEY_CHARACTERS, [("", module)]
    if classes.tensors(module) is None:
        raise ValueError("it holds no module")
    while waiting:
        prefix, module = waiting.pop()
        if not isinstance(module.state, dict):
            raise ValueError(f"a {module.kind[:80]} restores itself by code (__setstate__), which is not run")
        own = {name: module.state.get(name) for name in classes.tensors(module)}
        inner = {name: value for name, value in module.state.items() if classes.tensors(value) is not None}
        left -= sum(len(prefix) + len(name) for name in own) + sum(len(prefix) + len(name) + 1 for name in inner)
        if left < 0:
            raise ValueError(f"the names of its tensors have more than {KEY_CHARACTERS:,} characters")
        state |= {prefix + name: value for name, value in own.items() if isinstance(value, (Tensor, Unreadable))}
        waiting += [(f"{prefix}{name}.", value) for name, value in reversed(inner.items())]
    return state
