"""Processes that die at a moment that is chosen: at an event of their files, within a write, or any time."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

from helpers.processes import CONTEXT

EVENTS = "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.truncate"


def count_events(folder, limit=None) -> list[str]:
    """What happens to files of a folder from now on, as it happens; with a limit, so many later the process dies."""
    folder, seen = os.fspath(folder), []

    def note(event, arguments):
        if event in EVENTS and any(
            isinstance(path, (str, os.PathLike)) and folder in os.fspath(path) for path in arguments
        ):
            seen.append(f"{event} {[str(a)[-60:] for a in arguments[:2]]}")
            if len(seen) == limit:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(note)
    return seen


def die_within_a_write(size: int) -> None:
    """Let the kernel end this process in the middle of the write that makes a file larger than so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _work(job, folder, kind, value, sender, errors):
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    output = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    events = count_events(folder, value if kind == "event" else None)
    if kind == "byte":
        die_within_a_write(value)
    sender.send("begun")
    status = job()
    sender.send(len(events))
    sys.stdout.flush()
    os._exit(status or 0)


def run_job(job, folder: Path, kind: str | None = None, value: float | None = None) -> tuple[int, int | None]:
    """Run a function in a process of its own: the exit status, and the number of events of a run to its end.

    Args:
        job: a function of a module, or a partial of one; it writes to the folder.
        kind, value: "event": die at the one of this number; "byte": in the write that reaches this size of a file;
            "time": so many seconds after the begin. By default it is left alone.
    """
    receiver, sender = CONTEXT.Pipe(duplex=False)
    errors = Path(folder).with_suffix(".log")
    process = CONTEXT.Process(target=_work, args=(job, folder, kind, value, sender, errors))
    process.start()
    sender.close()
    events = None
    try:
        receiver.recv()
        if kind == "time":
            time.sleep(value)
            process.kill()
        events = receiver.recv()
    except EOFError:  # it died before
        pass
    process.join(120)
    assert process.exitcode is not None, "the process hangs"
    assert process.exitcode <= 0, errors.read_text()
    return process.exitcode, events


def leftovers(folder: Path) -> list[str]:
    """Names that no user asked for."""
    return [str(path) for path in sorted(Path(folder).rglob("*")) if path.name.startswith(".") or ".tmp" in path.name]
