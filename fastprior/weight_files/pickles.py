"""Pickles of torch.save, read as tensors and plain values: nothing that they name is imported, and nothing runs."""

from __future__ import annotations

import io
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping
from struct import unpack
from typing import Any

import torch

from fastprior.reading import quoted
from fastprior.weight_files.standins import NAMES, Inert, Namespace, ordered_dict

PICKLE_BYTES = 2**25  # a longer one is no checkpoint's: tensors lie beside the pickle
KEY_BITS = 64  # of integers as keys; many longer ones may share a hash, and so may tuples
ODD_KEYS = 1000  # keys of dicts and sets in a file that are neither strings nor small
_DESCRIPTIONS = torch.dtype, torch.layout, torch.qscheme


class Refused(Exception):
    """A pickle names a class or function that is not known to be harmless; its argument is the name."""


def _allowed_by_the_process() -> dict[str, Any]:
    """What `torch.serialization.add_safe_globals` was given, by name."""
    entries = torch.serialization.get_safe_globals()
    pairs = (entry[::-1] if isinstance(entry, tuple) else (_name(entry), entry) for entry in entries)
    return dict(pairs)


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


class PickleReader:
    """Reads a pickle of protocol 2 with the instructions that torch.save writes, and no others.

    What it calls are stand-ins by name, see `standins.NAMES`, and what the process allowed besides, see
    `torch.serialization.add_safe_globals`. Memory and time are bounded by the length of the pickle.

    Args:
        data: at the beginning of the pickle; afterwards behind its end.
        storage: gives what a persistent id, a tuple, stands for.
        names: stand-ins by name that are known besides: anything with `in` and `[]`.
    """

    def __init__(self, data: io.BytesIO, storage: Callable[[tuple], Any], names: Container[str] = ()):
        self.data, self.storage, self.names = data, storage, names
        self.allowed = _allowed_by_the_process()
        self.known: set[int] = set()  # ids of what was found by name: nothing else is called
        self.odd_keys = 0

    def read(self) -> Any:
        """The value. Raises Refused for a name that is not known, and nearly any error for a damaged pickle."""
        self.stack: list = []
        self.marks: list[list] = []
        self.memo: dict[int, Any] = {}
        steps, read, stop = self.STEPS, self.data.read, pickle.STOP
        while (instruction := read(1)) != stop:
            if instruction not in steps:
                kind = f"instruction {instruction!r}, which torch.save does not write" if instruction else "no end"
                raise pickle.UnpicklingError(f"its pickle has {kind}")
            steps[instruction](self)
        return self.stack.pop()

    def take(self, count: int) -> bytes:
        data = self.data.read(count)
        if len(data) != count:
            raise EOFError("its pickle ends too early")
        return data

    def line(self) -> str:
        line = self.data.readline(1000)
        if not line.endswith(b"\n"):
            raise pickle.UnpicklingError("a name in its pickle is too long, or cut short")
        return line[:-1].decode("utf-8")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list:
        items, self.stack = self.stack, self.marks.pop()
        return items

    # what makes values by name

    def find(self) -> None:
        module, name = self.line(), self.line()
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # of Python 2
        full = f"{module}.{name}"
        if known := next((names for names in (NAMES, self.names) if full in names), None):
            found = known[full]
        elif module == "torch" and isinstance(value := getattr(torch, name, None), _DESCRIPTIONS):
            found = value
        elif full in self.allowed:
            found = self.allowed[full]
        else:
            raise Refused(full)
        self.known.add(id(found))
        self.stack.append(found)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if id(function) not in self.known or type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"a call of {quoted(function)}")
        if (function is set or function is ordered_dict) and arguments:
            arguments = (list(arguments[0]),)
            self.check_keys(arguments[0] if function is set else (key for key, _ in arguments[0]))
        self.stack.append(function(*arguments))

    def new(self) -> None:
        arguments, cls = self.stack.pop(), self.stack.pop()
        if id(cls) not in self.known or not isinstance(cls, type) or type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"an instance of {quoted(cls)}")
        self.stack.append(cls.__new__(cls, *arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is OrderedDict:  # torch notes the modules of a state dict beside it
            if isinstance(state, Mapping) and "_metadata" in state:
                target._metadata = state["_metadata"]
        elif isinstance(target, (Inert, Namespace)):
            if isinstance(state, Mapping):
                self.check_keys(state)
            target.__setstate__(state)
        elif any(type(target) is allowed for allowed in self.allowed.values()):
            if hasattr(target, "__setstate__"):
                target.__setstate__(state)
            else:
                target.__dict__.update(state)
        elif not isinstance(target, dict):
            raise pickle.UnpicklingError(f"a state of {quoted(target)}")

    # containers

    def check_keys(self, keys: Iterable) -> None:
        """Let no file make a dict slow: equal hashes are made of long integers and tuples, and deep tuples overflow."""
        for key in keys:
            if isinstance(key, (str, float, type(None))) or (isinstance(key, int) and key.bit_length() <= KEY_BITS):
                continue
            self.odd_keys += 1
            if self.odd_keys > ODD_KEYS:
                raise pickle.UnpicklingError(f"more than {ODD_KEYS} keys that are neither strings nor small")
            if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
                raise pickle.UnpicklingError("a key of nested tuples")

    def set_items(self, items: list) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise pickle.UnpicklingError(f"entries of {quoted(target)}")
        self.check_keys(items[::2])
        for key, value in zip(items[::2], items[1::2]):
            target[key] = value

    def append(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError(f"items of {quoted(self.stack[-1])}")
        self.stack[-1].extend(items)

    def last(self, count: int) -> list:
        if len(self.stack) < count:
            raise pickle.UnpicklingError("its stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def push_stored(self) -> None:
        key = self.stack.pop()
        if type(key) is not tuple:
            raise pickle.UnpicklingError(f"a persistent id {quoted(key)}")
        self.stack.append(self.storage(key))

    def text(self, count: int) -> None:
        self.stack.append(str(self.take(count), "utf-8", "surrogatepass"))

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    STEPS = {  # noqa: RUF012
        pickle.PROTO: lambda self: self.take(1),
        pickle.GLOBAL: find,
        pickle.REDUCE: call,
        pickle.NEWOBJ: new,
        pickle.BUILD: build,
        pickle.BINPERSID: push_stored,
        pickle.MARK: mark,
        pickle.APPEND: lambda self: self.append(self.last(1)),
        pickle.APPENDS: lambda self: self.append(self.since_mark()),
        pickle.SETITEM: lambda self: self.set_items(self.last(2)),
        pickle.SETITEMS: lambda self: self.set_items(self.since_mark()),
        pickle.TUPLE: lambda self: self.push(tuple(self.since_mark())),
        pickle.TUPLE1: lambda self: self.push(tuple(self.last(1))),
        pickle.TUPLE2: lambda self: self.push(tuple(self.last(2))),
        pickle.TUPLE3: lambda self: self.push(tuple(self.last(3))),
        pickle.NONE: lambda self: self.push(None),
        pickle.NEWTRUE: lambda self: self.push(True),
        pickle.NEWFALSE: lambda self: self.push(False),
        pickle.EMPTY_TUPLE: lambda self: self.push(()),
        pickle.EMPTY_LIST: lambda self: self.push([]),
        pickle.EMPTY_DICT: lambda self: self.push({}),
        pickle.EMPTY_SET: lambda self: self.push(set()),
        pickle.BININT: lambda self: self.push(unpack("<i", self.take(4))[0]),
        pickle.BININT1: lambda self: self.push(self.take(1)[0]),
        pickle.BININT2: lambda self: self.push(unpack("<H", self.take(2))[0]),
        pickle.LONG1: lambda self: self.push(pickle.decode_long(self.take(self.take(1)[0]))),
        pickle.BINFLOAT: lambda self: self.push(unpack(">d", self.take(8))[0]),
        pickle.BINUNICODE: lambda self: self.text(unpack("<I", self.take(4))[0]),
        pickle.SHORT_BINSTRING: lambda self: self.text(self.take(1)[0]),
        pickle.BINGET: lambda self: self.get(self.take(1)[0]),
        pickle.LONG_BINGET: lambda self: self.get(unpack("<I", self.take(4))[0]),
        pickle.BINPUT: lambda self: self.put(self.take(1)[0]),
        pickle.LONG_BINPUT: lambda self: self.put(unpack("<I", self.take(4))[0]),
    }
