"""TorchScript archives, such as OpenAI's CLIPs: their tensors by name, with nothing in them run.

torch.jit.load compiles an archive's code and runs what its classes do when they are restored, which may write any file.
Here its pickle is interpreted by the few operations that torch writes: they make plain values, descriptions of tensors,
and objects that hold a state. Names are compared, never looked up. Which of an object's tensors are parameters and
buffers is read off the text of its class.
"""

from __future__ import annotations

import os
import pickletools
import re
import struct
import zipfile
import zlib
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fastprior.reading import open_regular, quoted

PICKLE_BYTES = 2**21  # of 20,000 tensors
CODE_BYTES = 2**24  # of all classes together, unpacked
KEY_CHARACTERS = 2**24  # of all names together: modules may share parts, which each of them names

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "BINSTRING", "SHORT_BINSTRING"}
_TAGS = "restore_type_tag", "build_intlist", "build_tensorlist", "build_doublelist", "build_boollist"
_FIRST_ARGUMENT = {f"torch.jit._pickle.{name}" for name in _TAGS} | {"torch.device"}
_DTYPES = {
    "torch.FloatStorage": torch.float32, "torch.DoubleStorage": torch.float64, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool, "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}  # fmt: skip


class _Name(str):
    """The name of a class or function, which is only compared."""


class _Object:
    """An object of a class of the archive: the name of the class, and what was kept of it."""

    __slots__ = "kind", "state"

    def __init__(self, kind: _Name):
        self.kind, self.state = kind, None


class _Storage(NamedTuple):
    dtype: torch.dtype
    record: str
    size: int


class _StoredTensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def is_torchscript(path: str | os.PathLike) -> bool:
    """Whether a file is a zip archive with the constants that TorchScript keeps; errors as `open_regular` has."""
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return any(name.endswith("/constants.pkl") for name in archive.namelist())
        except Exception:  # damaged archives raise nearly any type
            return False


def read_torchscript(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict of an archive, as `torch.jit.load(path).state_dict()` has it, on the CPU.

    Raises FileNotFoundError, and ValueError for what is damaged, holds tensors that are not dense or more of them than
    bytes, or restores modules by code of its own.
    """
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _read(archive, file)
        except Exception as error:  # damaged files raise nearly any type
            detail = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise ValueError(f"{os.fspath(path)} cannot be read as a TorchScript archive: {detail}") from error


def _read(archive: zipfile.ZipFile, file: BinaryIO) -> dict[str, Tensor]:
    root = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
    if root is None:
        raise ValueError("it has no data.pkl")
    records = _Records(archive, file, root.removesuffix("data.pkl"))
    if records.text("byteorder", 16, default="little") != "little":
        raise ValueError("its byte order is not little")
    module = _interpret(records.bytes("data.pkl", PICKLE_BYTES))
    return {key: records.tensor(value) for key, value in _state_dict(module, _Classes(records)).items()}


class _Records:
    """The records of an archive, of which no more is read than it has bytes."""

    def __init__(self, archive: zipfile.ZipFile, file: BinaryIO, root: str):
        self.archive, self.file, self.root = archive, file, root
        self.infos = {info.filename: info for info in archive.infolist()}
        self.left = os.fstat(file.fileno()).st_size
        self.storages: dict[str, Tensor] = {}

    def bytes(self, name: str, most: int) -> bytes:
        """A record of at most so many bytes. Raises ValueError where it is missing, longer, or damaged."""
        info = self.infos.get(self.root + name)
        if info is None:
            raise ValueError(f"it has no {quoted(name)}")
        if info.file_size > most:
            raise ValueError(f"{quoted(name)} has {info.file_size:,} bytes; it may have {most:,}")
        return self.archive.read(info)  # which checks its sum

    def text(self, name: str, most: int, default: str) -> str:
        return self.bytes(name, most).decode() if self.root + name in self.infos else default

    def _storage(self, record: str) -> Tensor:
        """The bytes of a record: (size,) uint8."""
        if record not in self.storages:
            info = self.infos.get(f"{self.root}data/{record}")
            if info is None or info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"it has no stored record data/{record[:40]!r}")
            self.left -= info.file_size
            if self.left < 0:
                raise ValueError("its records are longer than the file")
            self.file.seek(info.header_offset)
            signature, lengths = struct.unpack("<4s22x4s", self.file.read(30))
            self.file.seek(sum(struct.unpack("<HH", lengths)), os.SEEK_CUR)
            data = torch.empty(info.file_size, dtype=torch.uint8)
            found = self.file.readinto(data.numpy())
            if signature != b"PK\3\4" or found != info.file_size or zlib.crc32(data.numpy()) != info.CRC:
                raise ValueError(f"the record {info.filename[:80]!r} is damaged: it does not have its checksum")
            self.storages[record] = data
        return self.storages[record]

    def tensor(self, stored: _StoredTensor) -> Tensor:
        """A tensor that lies within its storage, and has no more bytes than that."""
        (dtype, record, size), offset, shape, stride = stored
        data = self._storage(record)
        if len(data) != size * dtype.itemsize:
            raise ValueError(f"the record data/{record[:40]} has {len(data)} bytes; {size} of {dtype} were to be there")
        elements, last = 1, offset
        for length, step in zip(shape, stride):
            elements, last = elements * length, last + (length - 1) * step
        if elements and (elements > size or last >= size):
            raise ValueError(f"a tensor of shape {quoted(shape)} and stride {quoted(stride)} leaves its {size} numbers")
        return data.view(dtype).as_strided(shape, stride, offset if elements else 0)


class _Classes:
    """The classes of modules that an archive's code has: which names hold parameters and buffers."""

    _NAMES = re.compile(r'"([^"\\]*)"')
    _TENSORS = re.compile(r'^  (?:__annotations__\["([^"\\]*)"\] =|(\S+) :) Tensor$', re.MULTILINE)

    def __init__(self, records: _Records):
        self.records, self.left = records, CODE_BYTES
        self.files: dict[str, dict[str, list[str]]] = {}

    def tensors(self, kind: _Name) -> list[str] | None:
        """The names of a module's parameters, then of its buffers; None for the class of what is no module."""
        path, _, name = kind.rpartition(".")
        if path not in self.files:
            code = self.records.text(f"code/{path.replace('.', '/')}.py", self.left, default="")
            self.left -= len(code)
            self.files[path] = dict(map(self._module, re.split(r"^class ", code, flags=re.MULTILINE)[1:]))
        return self.files[path].get(name)

    def _module(self, code: str) -> tuple[str, list[str] | None]:
        head, body = code.partition("\n  def ")[0].split("\n", 1)
        name, is_module, _ = head.partition("(Module):")
        if not is_module:
            return name.rstrip(":"), None
        listed = [
            re.search(rf"^  {kind} = \[(.*)\]$", body, re.MULTILINE) for kind in ("__parameters__", "__buffers__")
        ]
        tensors = {one or other for one, other in self._TENSORS.findall(body)}  # an Optional[Tensor] is none of them
        names = (name for found in listed if found for name in self._NAMES.findall(found[1]))
        return name, [name for name in names if name in tensors]


def _state_dict(module: Any, classes: _Classes) -> dict[str, _StoredTensor]:
    """The tensors of a module and of those in it, in the order of a state dict."""
    state, left, waiting = {}, KEY_CHARACTERS, [("", module)]
    if not isinstance(module, _Object) or classes.tensors(module.kind) is None:
        raise ValueError("it holds no module")
    while waiting:
        prefix, module = waiting.pop()
        if not isinstance(module.state, dict):
            raise ValueError(f"a {module.kind[:80]} restores itself by code (__setstate__), which is not run")
        names = classes.tensors(module.kind)
        state |= {
            prefix + name: module.state[name] for name in names if isinstance(module.state.get(name), _StoredTensor)
        }
        inner = [
            (f"{prefix}{name}.", value)
            for name, value in module.state.items()
            if isinstance(value, _Object) and classes.tensors(value.kind) is not None
        ]
        left -= sum(len(prefix) + len(name) for name in names) + sum(len(name) for name, _ in inner)
        if left < 0:
            raise ValueError(f"the names of its tensors have more than {KEY_CHARACTERS:,} characters")
        waiting += reversed(inner)
    return state


def _interpret(pickle: bytes) -> Any:
    """What a pickle of torch.jit makes: plain values, `_Object`s and `_StoredTensor`s."""
    stack, marks, memo = [], [], {}

    def marked() -> list:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    for opcode, argument, _ in pickletools.genops(pickle):
        name = opcode.name
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "GLOBAL":
            stack.append(_Name(argument.replace(" ", ".")))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(marked()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            stack[-size:] = [tuple(stack[-size:])]
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "APPENDS":
            values = marked()
            _of(list, stack[-1]).extend(values)
        elif name == "SETITEMS":
            values = marked()
            # a key that is a deeply nested tuple would overrun C's stack
            _of(dict, stack[-1]).update(zip((_of((str, int, float), key) for key in values[::2]), values[1::2]))
        elif name in ("BINPERSID", "REDUCE", "NEWOBJ"):
            _replace_top(name, stack)
        elif name == "BUILD":
            state = stack.pop()
            _of(_Object, stack[-1]).state = state
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise ValueError(f"its pickle has the operation {name}, which torch.jit does not write")
    raise ValueError("its pickle is cut short")


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"its pickle has a {type(value).__name__} where none can be")
    return value


def _replace_top(operation: str, stack: list) -> None:
    """What a reference to a storage, a call, or a new object is replaced by."""
    arguments = stack.pop()
    if operation == "BINPERSID":
        _, kind, record, _, size = _of(tuple, arguments)
        if _of(_Name, kind) not in _DTYPES:
            raise ValueError(f"it holds a {quoted(str(kind))}; its tensors must be of a plain dtype")
        stack.append(_Storage(_DTYPES[kind], _of(str, record), _of(int, size)))
        return
    name, arguments = _of(_Name, stack.pop()), _of(tuple, arguments)
    if operation == "NEWOBJ":
        made = _Object(name)
    elif name == "torch._utils._rebuild_tensor_v2":
        storage, offset, shape, stride = arguments[:4]
        numbers = offset, *_of(tuple, shape), *_of(tuple, stride)
        if any(_of(int, number) < 0 for number in numbers) or len(shape) != len(stride):
            raise ValueError("its pickle has a tensor with a negative size")
        made = _StoredTensor(_of(_Storage, storage), offset, shape, stride)
    elif name in _FIRST_ARGUMENT:
        made = arguments[0]
    elif name == "collections.OrderedDict" or name.startswith("__torch__."):  # hooks, and members of enumerations
        made = None
    else:
        raise ValueError(f"it is refused, and nothing in it was run: its pickle calls {quoted(str(name))}")
    stack.append(made)
