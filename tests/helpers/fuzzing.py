"""Files changed at random, each read in a process of its own, and a verdict on each.

    PYTHONPATH=tests python -m helpers.fuzzing --cases 10000 --readers npy tar --seed 1
    PYTHONPATH=tests python -m helpers.fuzzing --case npy:1:4711 --keep folder

A case is a reader, a seed and a number, and nothing else decides what is read. Verdicts: "read" and "error" are what
should be; an error is one that `clear` calls so. "raw" is any other exception, "signal" the end of the process, "hang"
more than SECONDS of computing or waiting, "growth" more memory than 3 times the files and GROWTH bytes, "wrong" what a
reader's own check says.

Children are forked from a server that has read a valid file of each kind. One reads BATCH cases, and the first of those
that are not as they should be, and alike, is read again by a child that has read nothing else.
"""

import argparse
import faulthandler
import gc
import importlib
import json
import math
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random

from helpers.mutations import mutate

COMMAND = 'FUZZ="--case READER:SEED:NUMBER --keep folder" pytest -m fuzz'
SECONDS = 8.0
GROWTH = 2**25
ADDRESS_SPACE = 4 * 2**30  # beyond what the server has, so that the machine stays in use
BATCH = 256
MESSAGE = 2**16  # characters
GOOD = "read", "error"
VERDICTS = *GOOD, "raw", "wrong", "growth", "hang", "signal"
PLACES = "missing", "folder", "loop", "fifo", "empty"


def clear(error: BaseException, folder: Path, names: tuple[str, ...]) -> str:
    """What is wrong with an error; empty for one that programs expect, and that says what file or argument it means."""
    kinds = ValueError, TypeError, FileNotFoundError, IsADirectoryError, NotADirectoryError
    module = type(error).__module__
    if not (type(error) in kinds or (isinstance(error, kinds) and module.startswith("fastprior"))):
        if not (type(error) is OSError and error.filename):
            return "is of no kind that programs expect"
    message = str(error)
    known = [str(folder), *names, *(path.name for path in folder.rglob("*"))]
    if not any(name in message for name in known):
        return "names no file and no argument"
    if len(message) > MESSAGE:
        return f"has {len(message)} characters"
    return ""


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_files(files: dict[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def write_case(reader: str, number: int, seed: int, valid: list[dict[str, bytes]], folder: Path) -> int:
    """The files of a case, in a new folder; their bytes."""
    draw = Random(f"{reader}/{seed}/{number}")
    files, placed = dict(draw.choice(valid)), {}
    for _ in range(draw.choice((1, 1, 1, 1, 1, 2))):
        name = draw.choice(list(files))
        if draw.random() < 0.01:
            placed[name] = draw.choice(PLACES)
            continue
        suffix = os.path.splitext(name)[1]
        others = [data for other in valid for path, data in other.items() if os.path.splitext(path)[1] == suffix]
        files[name] = mutate(draw, name, files[name], others)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        place = placed.get(name)
        if place is None:
            path.write_bytes(data)
        elif place == "folder":
            path.mkdir()
        elif place == "loop":
            path.symlink_to(path.name)
        elif place == "fifo":
            os.mkfifo(path)
        elif place == "empty":
            path.touch()
    return sum(map(len, files.values()))


def _memory(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def _where(frames) -> str:
    """The last place of the product in a traceback, and the last of all."""

    def named(frame):
        return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"

    own = [frame for frame in frames if "/fastprior/" in frame.filename or "/kernels/" in frame.filename]
    own = [frame for frame in own if "/tests/" not in frame.filename] or frames[-1:]
    return named(own[-1]) + ("" if own[-1] is frames[-1] else f" < {named(frames[-1])}")


def _read_case(reader, size: int, folder: Path) -> dict:
    """Read what lies in a folder: the verdict, and what led to it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, started, found = _memory("VmRSS"), time.perf_counter(), dict(verdict="read", detail="", where="")
    try:
        reader.read(folder)
    except BaseException as error:
        kind = type(error).__name__
        fault = "" if kind == "Wrong" else clear(error, folder, reader.names)
        verdict = "wrong" if kind == "Wrong" else "raw" if fault else "error"
        detail = f"{kind}: {str(error)[:300]!r}" + (f" {fault}" if fault else "")
        frames = traceback.extract_tb((error.__cause__ if kind == "Wrong" and error.__cause__ else error).__traceback__)
        found = dict(verdict=verdict, detail=detail, where=_where(frames), kind=kind, fault=fault)
        del error
    grown = _memory("VmHWM") - before
    if grown > 3 * size + GROWTH:
        found.update(verdict="growth", detail=f"{grown >> 20} MiB for {size} bytes; {found['detail']}")
    return found | dict(seconds=time.perf_counter() - started, grown=grown)


def _child(name: str, reader, numbers: list[int], options, valid, work: Path, pipe: int, end: float) -> None:
    space = _memory("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_RDWR)
    for stream in 0, 1, 2:
        os.dup2(null, stream)
    faulthandler.enable(open(work / "fault", "w"))
    warnings.simplefilter("ignore")
    os.environ["TMPDIR"] = tempfile.tempdir = str(work)
    folder = work / "files"
    for number in (None, *numbers):  # first a valid one: what is mapped when it is first read is no growth
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if number is None:
            write_files(valid[0], folder)
            with suppress(() if reader.valid else Exception):
                reader.read(folder)
            continue
        if time.monotonic() > end:
            return
        os.write(pipe, b'{"begin": %d}\n' % number)
        size = write_case(name, number, options.seed, valid, folder)
        os.write(pipe, json.dumps(dict(number=number, **_read_case(reader, size, folder))).encode() + b"\n")
        gc.collect() if number % 16 == 0 else None


def _processor(pid: int) -> tuple[bool, float]:
    """Whether a process has something to do, and the seconds that it has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0] == "R", (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _fault(work: Path) -> str:
    """The place in the traceback that a dying process left."""
    lines = (work / "fault").read_text(errors="replace").splitlines()
    found = [line.strip() for line in lines if line.startswith("  File ")]
    own = [line for line in found if "/fastprior/" in line or "/kernels/" in line] or found
    return (
        own[0].replace('File "', "").replace('", line ', ":").split(" in ")[0].split("/fastprior/")[-1] if own else ""
    )


def _batch(name: str, reader, numbers: list[int], options, valid, work: Path, end: float = math.inf) -> list[dict]:
    """Verdicts of some cases by one child: of all, of those before a time, or up to the first with which it ended."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            _child(name, reader, numbers, options, valid, work, write, end)
        except BaseException:
            os.write(write, json.dumps(dict(broken=traceback.format_exc())).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(write)
    found, begun, rest, ended, late = [], None, b"", False, False
    deadline, computed = time.monotonic() + 60, 60.0  # to begin
    while not ended:
        ready, _, _ = select.select([read], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            runs, seconds = _processor(pid)
            if runs and seconds - computed < options.limit:  # others have its core
                deadline = time.monotonic() + 0.5
                continue
            late = True
            os.kill(pid, signal.SIGABRT)  # faulthandler says where it is
            time.sleep(0.2)
            os.kill(pid, signal.SIGKILL)
            break
        data = os.read(read, 2**16)
        ended, rest = not data, rest + data
        *lines, rest = rest.split(b"\n")
        for message in map(json.loads, lines):
            if "broken" in message:
                raise RuntimeError(f"{name}: a valid file or the fuzzer itself failed:\n{message['broken']}")
            begun = message.get("begin")
            found += [message] if begun is None else []
            deadline, computed = time.monotonic() + options.limit, _processor(pid)[1]
    os.close(read)
    status = os.waitpid(pid, 0)[1]
    if late or begun is not None or os.WIFSIGNALED(status):
        end = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status >> 8}"
        number = begun if begun is not None else numbers[len(found)] if len(found) < len(numbers) else numbers[-1]
        detail = f"over {options.limit:g} s" if late else end
        found.append(
            dict(number=number, verdict="hang" if late else "signal", detail=detail, where=_fault(work), kind=end)
        )
    return found


def _confirmed(name: str, reader, found: dict, options, valid, work: Path) -> dict:
    """What a child says that reads nothing else; growth is that of a second time: the first maps libraries."""
    numbers = [found["number"]] * (2 if found["verdict"] == "growth" else 1)
    again = _batch(name, reader, numbers, options, valid, work)[-1]
    if found["verdict"] in ("signal", "hang") and again["verdict"] in GOOD:
        return dict(found, detail=f"{found['detail']}, after others before it; alone: {again['verdict']}")
    if options.keep and again["verdict"] not in GOOD:
        kept = Path(options.keep) / f"{name}-{options.seed}-{found['number']}"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        write_case(name, found["number"], options.seed, valid, kept)
    return again


def alike(case: dict) -> tuple:
    """What verdicts that need one mending have in common."""
    return tuple(case.get(field, "") for field in ("reader", "verdict", "kind", "where", "fault"))


def _worker(share: int, readers: dict, options, valid: dict, root: Path, out) -> None:
    """Every n-th case of each reader; verdicts go to `out`, a line each."""
    work = root / f"work-{share}"
    work.mkdir()
    known: set[tuple] = set()
    for place, (name, reader) in enumerate(readers.items()):
        number, stop, end = share, options.cases, math.inf
        if stop is None:  # what is left of the time, in equal parts
            stop = sys.maxsize
            end = time.monotonic() + max(0.0, options.until - time.monotonic()) / (len(readers) - place)
        while number < stop and time.monotonic() < end:
            numbers = range(number, stop, options.processes)[:BATCH]
            for found in _batch(name, reader, numbers, options, valid[name], work, end):
                number = found["number"] + options.processes
                if found["verdict"] not in GOOD and (key := alike(dict(found, reader=name))) not in known:
                    known.add(key)
                    found = _confirmed(name, reader, found, options, valid[name], work)
                out.write(json.dumps(dict(found, reader=name)) + "\n")
                out.flush()


def serve(options) -> None:
    """Make valid files, read them, and fork who reads the changed ones."""
    module, _, attribute = options.registry.partition(":")
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known = getattr(importlib.import_module(module), attribute)
    names = [options.case.split(":")[0]] if options.case else options.readers or known
    readers = {name: known[name] for name in names}
    root, valid = Path(options.folder), {}
    for name, reader in readers.items():
        (root / "valid" / name).mkdir(parents=True)
        folders = reader.make(root / "valid" / name)
        valid[name] = [files_of(folder) for folder in folders]
        for place, folder in enumerate(folders):
            copy = root / "warm" / name / str(place)
            shutil.copytree(folder, copy)
            with suppress(() if reader.valid else Exception):
                reader.read(copy)
    if options.case:
        name, seed, number = options.case.split(":")
        options.seed, options.readers = int(seed), [name]
        if options.keep:
            Path(options.keep).mkdir(parents=True, exist_ok=True)
            write_case(name, int(number), int(seed), valid[name], Path(options.keep))
        found = _batch(name, readers[name], [int(number)] * 2, options, valid[name], root)[-1]
        print(json.dumps(dict(found, reader=name)), flush=True)
        return
    options.until = time.monotonic() + options.seconds
    gc.collect()
    gc.freeze()
    children = []
    for share in range(options.processes):
        pid = os.fork()
        if pid == 0:
            try:
                with open(root / f"found-{share}", "w") as out:
                    _worker(share, readers, options, valid, root, out)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(pid)
    failed = [pid for pid in children if os.waitpid(pid, 0)[1]]
    for share in range(options.processes):
        sys.stdout.write((root / f"found-{share}").read_text())
    sys.stdout.flush()
    if failed:
        sys.exit(1)


# reports


def table(found: list[dict]) -> str:
    """Readers by verdicts, and cases a second."""
    counts = {}
    for case in found:
        counts.setdefault(case["reader"], Counter())[case["verdict"]] += 1
    lines = [f"{'reader':<14}" + "".join(f"{verdict:>8}" for verdict in ("cases", "ms", *VERDICTS))]
    for reader, count in counts.items():
        times = sorted(case.get("seconds", SECONDS) for case in found if case["reader"] == reader)
        numbers = count.total(), round(1000 * times[len(times) // 2]), *(count[v] for v in VERDICTS)
        lines.append(f"{reader:<14}" + "".join(f"{number:>8}" for number in numbers))
    return "\n".join(lines)


def faults(found: list[dict], seed: int) -> str:
    """What is not as it should be, alike ones together, each with a case that shows it."""
    groups: dict[tuple, list[dict]] = {}
    for case in found:
        if case["verdict"] not in GOOD:
            groups.setdefault(alike(case), []).append(case)
    return "\n".join(
        f"{reader}:{seed}:{cases[0]['number']} and {len(cases) - 1} more, {verdict} at {where}: {cases[0]['detail']}"
        for (reader, verdict, _, where, _), cases in sorted(groups.items())
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Read files that were changed at random.")
    add = parser.add_argument
    add("--readers", nargs="+", metavar="NAME", help="by default all")
    add("--seconds", type=float, default=60.0, help="for all readers together (%(default)s)")
    add("--cases", type=int, help="of each reader, instead of seconds")
    add("--seed", type=int, default=0)
    add("--processes", type=int, default=len(os.sched_getaffinity(0)))
    add("--limit", type=float, default=SECONDS, help="seconds of a case (%(default)s)")
    add("--case", metavar="READER:SEED:NUMBER", help="one case; its files go to --keep")
    add("--keep", metavar="DIR", help="where files go that are not read as they should be")
    add("--registry", default="helpers.fuzz_readers:READERS", help=argparse.SUPPRESS)
    add("--folder", help=argparse.SUPPRESS)
    return parser


def run(*arguments: str) -> list[dict]:
    """The verdicts of a server in a process of its own, with threads of nobody else."""
    import subprocess

    quiet = dict(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1")
    environment = (
        os.environ | quiet | dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
    )
    paths = Path(__file__).parents[1], Path(__file__).parents[2], os.environ.get("PYTHONPATH", "")
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=base, prefix="fuzz-") as folder:
        command = [sys.executable, "-m", "helpers.fuzzing", *arguments, "--folder", folder]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"the fuzzer itself failed, status {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    options = parser().parse_args()
    if options.folder:
        serve(options)
    else:
        started = time.monotonic()
        found = run(*sys.argv[1:])
        print(table(found))
        print(f"seed {options.seed}, {len(found) / (time.monotonic() - started):.0f} cases/s with the start\n")
        print(faults(found, options.seed))
        sys.exit(any(case["verdict"] not in GOOD for case in found))
