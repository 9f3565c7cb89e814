"""Files of anybody, read within limits: regular files only, opened without waiting, JSON of bounded size and depth."""

from __future__ import annotations

import errno
import json
import os
import reprlib
import stat
from typing import Any, BinaryIO

JSON_BYTES = 2**24  # a larger file is no configuration and no index
QUOTED = 200  # characters that a message quotes of what a file holds

_KINDS = (
    (stat.S_ISDIR, "directory"),
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


class _Quoter(reprlib.Repr):
    """Reprs of a few entries, few levels and few characters, whatever the value."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, QUOTED, QUOTED, 40

    def repr_str(self, value, level):
        return repr(str(value[:QUOTED])) + ("…" if len(value) > QUOTED else "")

    def repr_int(self, value, level):  # digits of a huge one take long, or are refused
        return repr(value) if value.bit_length() < 256 else f"an integer of {value.bit_length()} bits"

    def repr_instance(self, value, level):
        return repr(value) if isinstance(value, (bool, float, type(None))) else f"a {type(value).__name__}"[:QUOTED]


_QUOTER = _Quoter()


def quoted(value: Any) -> str:
    """What a message quotes of a value that a file holds: its repr, of at most about 200 characters and one line."""
    text = _QUOTER.repr(value)
    return text if len(text) <= QUOTED + 3 else f"{text[:QUOTED]}…"


def brief(text: str) -> str:
    """The first line of somebody's message, of at most about 200 characters, with odd ones escaped."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= QUOTED and line.isprintable() else quoted(line)[1:-1]


def _check_regular(where: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "special file")
        raise ValueError(f"{where} is a {kind}; it must be a regular file")


def open_regular(path: str | os.PathLike, where: str | None = None) -> BinaryIO:
    """Open a regular file, or a link to one, for reading bytes; nothing is waited for.

    Args:
        where: what messages begin with, the path by default.
    Raises:
        FileNotFoundError: there is none, or no file can have such a name.
        ValueError: it is a directory, a FIFO, a socket or a device.
        OSError: it may not be read.
    """
    where = os.fspath(path) if where is None else where
    try:
        _check_regular(where, os.stat(path).st_mode)
        flags = ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")
        descriptor = os.open(path, os.O_RDONLY | sum(getattr(os, name, 0) for name in flags))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{where} does not exist") from error
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeError) or getattr(error, "errno", None) == errno.ENAMETOOLONG:
            raise FileNotFoundError(f"{brief(where)} does not exist; no file has such a name") from error
        raise
    try:
        _check_regular(where, os.fstat(descriptor).st_mode)  # another may stand in its place by now
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | os.PathLike, most: int = JSON_BYTES, where: str | None = None) -> bytes:
    """The bytes of a file of at most so many; errors as `open_regular` has, and ValueError for a longer one."""
    where = os.fspath(path) if where is None else where
    with open_regular(path, where) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{where} has more than {most:,} bytes; such a file has at most {most:,}")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def parse_json(text: str | bytes, where: str, *, kind: type | None = None, constants: bool = False) -> Any:
    """The value of a JSON text, or one ValueError that begins with `where`.

    Args:
        kind: dict or list, which the value must be then.
        constants: whether NaN and Infinity are taken, as Python writes them.
    """
    try:
        value = json.loads(text, parse_constant=None if constants else _no_constant)
    except RecursionError:
        raise ValueError(f"{where} is not JSON (it is nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({brief(str(error))})") from error
    if kind is not None and not isinstance(value, kind):
        raise ValueError(f"{where} holds a JSON {type(value).__name__}; it must be a {kind.__name__}")
    return value


def read_json(
    path: str | os.PathLike,
    *,
    kind: type | None = dict,
    where: str | None = None,
    most: int = JSON_BYTES,
    constants: bool = False,
) -> Any:
    """The value of a JSON file: ValueError for what is none, too long, nested too deeply or of another kind.

    Args:
        kind: dict or list, which the value must be; None takes any.
        where: what messages begin with, the path by default.
        most: bytes that the file may have.
        constants: see `parse_json`.
    Raises:
        FileNotFoundError, OSError: as `open_regular`.
    """
    where = os.fspath(path) if where is None else where
    return parse_json(read_bytes(path, most, where), where, kind=kind, constants=constants)
