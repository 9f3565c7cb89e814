"""What stands for classes and functions that a pickle names: plain values, or nothing that does anything."""

from __future__ import annotations

import collections
import datetime
import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np

from fastprior.weight_files import tensors


class Inert:
    """Stands in for an object of a foreign class: holds its state, and does nothing."""

    state = None

    def __new__(cls, *args):
        self = super().__new__(cls)
        self.args = args
        return self

    def __setstate__(self, state):
        self.state = state


class PlainDict:
    """Stands in for a subclass of dict: an empty one, of a type that torch's restricted unpickler fills."""

    def __new__(cls, *args):
        return collections.OrderedDict()


class Namespace(dict):
    """Stands in for a namespace: its attributes, as a dict."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        self.update(state if isinstance(state, Mapping) else {})


class NumpyType(Inert):
    """Stands in for a numpy dtype, such as NumpyType("f8", False, True), whose state has its byte order."""

    def value(self, data: bytes):
        """The number or string in the bytes of a scalar; ValueError or TypeError for what is neither."""
        code = self.args[0]
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16|[US]\d{1,9}", code):
            raise ValueError("another dtype")
        dtype = np.dtype((">" if isinstance(self.state, tuple) and self.state[1] in (">", b">") else "<") + code)
        (value,) = np.frombuffer(data, dtype)
        return value.item()


def numpy_scalar(dtype=None, data=b""):
    """Stands in for what makes numpy's scalars: Python's, which compute the same."""
    try:
        return dtype.value(data)
    except (AttributeError, IndexError, TypeError, ValueError):
        return Inert(dtype, data)


def plain_list(*args) -> list:
    """Stands in for what makes a deque: a list, which is filled after."""
    return []


class PlainString:
    """Stands in for a subclass of str: a string; the text of a container might be endless."""

    def __new__(cls, value=""):
        if not isinstance(value, str):
            raise TypeError(f"a string of a {type(value).__name__}")
        return str(value)


def encoded(text: str, encoding: str) -> bytes:
    """Stands in for what makes bytes under protocol 2."""
    if encoding != "latin1" or not isinstance(text, str):
        raise ValueError("an encoding that pickles of bytes do not have")
    return text.encode(encoding)


def ordered_dict(pairs=()) -> collections.OrderedDict:
    return collections.OrderedDict(pairs)


def counter(counts=()) -> collections.Counter:
    if not isinstance(counts, Mapping):
        raise TypeError("counts that are no dict")
    return collections.Counter(counts)


def posix_path(*parts) -> str:
    return str(PurePosixPath(*parts))


def windows_path(*parts) -> str:
    return str(PureWindowsPath(*parts))


# what DALLE2-pytorch's trainer pickles besides plain types, with any release of packaging and torch, and what scripts
# keep beside weights: arguments, configurations, numbers of numpy, paths and times
_NAMES = {
    Inert: """
        packaging.version.Version packaging.version._Version packaging._structures.InfinityType
        packaging._structures.NegativeInfinityType pytorch_warmup.base.LinearWarmup torch.optim.adam.Adam
        torch.optim.adamw.AdamW numpy.ndarray numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
        omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig omegaconf.base.ContainerMetadata
        omegaconf.base.Metadata omegaconf.base.UnionNode omegaconf.nodes.ValueNode omegaconf.nodes.AnyNode
        omegaconf.nodes.StringNode omegaconf.nodes.IntegerNode omegaconf.nodes.FloatNode omegaconf.nodes.BooleanNode
        omegaconf.nodes.BytesNode omegaconf.nodes.PathNode typing.Any builtins.bool builtins.bytes builtins.float
        builtins.frozenset builtins.int builtins.list builtins.object builtins.range builtins.slice builtins.str
        builtins.tuple
    """,
    PlainDict: """
        collections.defaultdict easydict.EasyDict pytorch_lightning.utilities.parsing.AttributeDict
        lightning.pytorch.utilities.parsing.AttributeDict lightning_fabric.utilities.data.AttributeDict
        lightning.fabric.utilities.data.AttributeDict builtins.dict
    """,
    plain_list: "collections.deque",
    Namespace: "argparse.Namespace types.SimpleNamespace",
    NumpyType: "numpy.dtype",
    numpy_scalar: "numpy.core.multiarray.scalar numpy._core.multiarray.scalar",
    posix_path: """
        pathlib.PosixPath pathlib.PurePosixPath pathlib._local.PosixPath pathlib._local.PurePosixPath
    """,
    windows_path: """
        pathlib.WindowsPath pathlib.PureWindowsPath pathlib._local.WindowsPath pathlib._local.PureWindowsPath
    """,
    PlainString: "torch.torch_version.TorchVersion",
    ordered_dict: "collections.OrderedDict",
    counter: "collections.Counter",
    encoded: "_codecs.encode",
    set: "builtins.set",
    complex: "builtins.complex",
    datetime.date: "datetime.date",
    datetime.datetime: "datetime.datetime",
    datetime.time: "datetime.time",
    datetime.timedelta: "datetime.timedelta",
    datetime.timezone: "datetime.timezone",
}
NAMES = {name: stand_in for stand_in, names in _NAMES.items() for name in names.split()} | tensors.NAMES
