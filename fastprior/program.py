"""What a program that people start says of itself: lines on stderr, and errors of its users without a traceback."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

USER_ERRORS = ValueError, ImportError, OSError  # what a user can do something about


def printable(text: str) -> str:
    """A text without what steers a terminal or cannot be written: such characters are spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def brief(text: str, width: int = 1000) -> str:
    """A text on one line, of at most so many characters, all of them printable."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= width else f"{text[: width - 2]} …"


def say(kind: str, message: object) -> None:
    """Print one line on stderr, whatever the message looks like; nothing, where nobody takes it."""
    if isinstance(message, OSError) and message.strerror and message.filename is not None:
        message = f"{message.filename}: {message.strerror}"  # without a number that means nothing to a user
    with contextlib.suppress(OSError):
        print(": ".join(filter(None, ("fastprior", kind, brief(str(message))))), file=sys.stderr)


def open_standard_streams() -> None:
    """Open those that the process was started without: the next files would get their numbers, and what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def settle_output() -> None:
    """Write out what was printed, or drop it where nobody takes it: the interpreter would complain when it exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Heedless:
    """A stream that takes everything, and loses what the one behind it does not take."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def heedless_output() -> Iterator[None]:
    """A block that goes on where its output is lost, as a pipe's reader left or the disk of a log is full."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Heedless, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        settle_output()


def this_program() -> str:
    """How a user of this environment starts the command line: for commands that are printed to be copied."""
    script = Path(sys.executable).with_name("fastprior")
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m fastprior.cli"
    on_path = shutil.which("fastprior")
    if on_path and os.path.samefile(on_path, script):
        return "fastprior"
    relative = os.path.relpath(script)
    return shlex.quote(str(script) if relative.startswith(os.pardir) else relative)


def explain_errors() -> None:
    """Let the process end with one line where its user erred (status 2), or interrupted it (130)."""
    plain = sys.excepthook

    def explain(kind, error, traceback):
        is_interrupt = issubclass(kind, KeyboardInterrupt)
        if not (is_interrupt or issubclass(kind, USER_ERRORS)):
            plain(kind, error, traceback)
            return
        if int(os.environ.get("LOCAL_RANK", 0)):
            time.sleep(10)  # the first process mostly says the same, and its launcher ends the others then
        say("interrupted" if is_interrupt else "error", error)
        raise SystemExit(130 if is_interrupt else 2)

    sys.excepthook = explain
