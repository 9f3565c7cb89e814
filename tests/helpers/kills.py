"""Processes that die at a moment that is chosen: at an event of their files, within a write, or any time."""

import functools
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import fastprior
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


def _work(job, folder, kind, value, sender, output):
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
    events = count_events(folder, value if kind == "event" else None)
    if kind == "byte":
        die_within_a_write(value)
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (value, value))
    sender.send("begun")
    try:
        status = job()
    except BaseException:
        traceback.print_exc()
        status = 1
    sender.send(len(events))
    sys.stdout.flush()
    os._exit(status or 0)


class Ended(NamedTuple):
    """How a job ended: its status, the number of events of files if it lived to its end, and what it printed."""

    code: int
    events: int | None
    said: str


def run_job(job, folder: Path, kind: str | None = None, value: float | None = None) -> Ended:
    """Run a function in a process of its own.

    Args:
        job: a function of a module, or a partial of one; it writes to the folder, and returns a status or None.
        kind, value: "event": die at the one of this number; "byte": in the write that reaches this size of a file;
            "time": so many seconds after the begin; "limit": it lives, but its files cannot grow beyond this size. By
            default it is left alone.
    """
    (receiver, sender), (output, writer) = CONTEXT.Pipe(duplex=False), CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_work, args=(job, folder, kind, value, sender, writer))
    process.start()
    sender.close(), writer.close()
    events, said = None, []
    reading = threading.Thread(target=lambda: said.extend(iter(lambda: os.read(output.fileno(), 2**16), b"")))
    reading.start()
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
    reading.join(10)
    return Ended(process.exitcode, events, b"".join(said).decode())


def leftovers(folder: Path) -> list[str]:
    """Names that no user asked for."""
    return [str(path) for path in sorted(Path(folder).rglob("*")) if path.name.startswith(".") or ".tmp" in path.name]


def same(one, other) -> bool:
    if torch.is_tensor(one):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def train(path, prepare=None):
    """As `fastprior train` does, with its status, after a function has prepared the process."""
    from fastprior import train_diffusion_prior
    from fastprior.cli import command_line

    train_diffusion_prior.plot_curves = lambda *_: None  # seconds of matplotlib, for a file that is written as others
    if prepare is not None:
        prepare()
    return command_line.main(["train", "--config_file", str(path)])


class Training:
    """Of a few steps, which saves after each."""

    def __init__(self, given):
        draw = np.random.default_rng(0)
        for name in ("images", "texts"):
            (given / name).mkdir()
            np.save(given / name / f"{name[:-1]}_0.npy", draw.normal(size=(60, 16)).astype(np.float32))
        self.given = given

    def job(self, out, prepare=None, eval_every_seconds=0, **options):
        """One that trains with further options of `train`, in a process that a function of a module has prepared."""
        saver = dict(save_to="local", save_latest_to=f"{out}/latest.pth", save_best_to=f"{out}/best.pth", save_every=3)
        config = dict(
            prior=dict(net=dict(dim=16, depth=1, heads=1, dim_head=8, max_text_len=2, num_timesteps=9, ff_dropout=0.1),
                       image_embed_dim=16, timesteps=9, cond_drop_prob=0.1, condition_on_text_encodings=False),
            data=dict(image_url=str(self.given / "images"), text_url=str(self.given / "texts"), batch_size=8,
                      splits=dict(train=0.8, val=0.2, test=0), eval_every_seconds=eval_every_seconds, max_eval_pairs=8),
            train=dict(epochs=1, ema_beta=0.9, ema_update_after_step=1, ema_update_every=1, eval_timesteps=[2],
                       log_every_steps=1, save_every_seconds=0) | options,
            tracker=dict(data_path=str(out), overwrite_data_path=True, log=dict(log_type="console", auto_resume=True),
                         load=dict(load_from="local", file_path=f"{out}/latest.pth", only_auto_resume=True),
                         save=[saver]),
        )  # fmt: skip
        path = self.given / "config.json"
        path.write_text(json.dumps(config))
        return functools.partial(train, path, prepare)

    def read(self, out):
        for path in out.glob("*.pth"):
            assert torch.load(path, weights_only=True)["step"] > 0
            fastprior.load(path)
        for path in out.glob("*.json"):
            json.loads(path.read_text())

    def result(self, out):
        assert len((out / "metrics.jsonl").read_text()) > 100
        return {
            name: torch.load(out / name, weights_only=True) for name in ("latest.pth", "best.pth", "checkpoint.pth")
        }
