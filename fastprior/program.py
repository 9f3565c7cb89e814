"""What a program that people start says of itself: lines on stderr, and errors of its users without a traceback."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from pathlib import Path

USER_ERRORS = ValueError, ImportError, OSError  # what a user can do something about


def brief(text: str, width: int = 1000) -> str:
    """A text on one line, of at most so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 2]} …"


def say(kind: str, message: object) -> None:
    """Print one line on stderr, whatever the message looks like."""
    if isinstance(message, OSError) and message.strerror and message.filename is not None:
        message = f"{message.filename}: {message.strerror}"  # without a number that means nothing to a user
    print(": ".join(filter(None, ("fastprior", kind, brief(str(message))))), file=sys.stderr)


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
