"""Run the stages of the proof: items side by side, each with its own time, one log and one archive of each stage.

Called by `benchmarks/gpu_proof.sh`, which says how. Needs nothing but Python, so that it begins at once.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
import stages  # noqa: E402
from stages import Item, Stage  # noqa: E402

GRACE = 5  # seconds between the signal that asks an item to end, and the one that ends it
WRONG = re.compile(r"^(E   +\S.*|\S*(Error|Exception|Failed)\b.*|FAILED .*|.*\bFATAL\b.*|.*no kernel image.*)$")
MARKS = re.compile(r"^@(kernels|filled) (\{.*\})$")


@dataclass
class Verdict:
    """How an item ended.

    Attributes:
        text: "passed", "FAILED (…)" or "skipped: …".
        kernels: of Triton's cache, found and not found.
        why: the first line of what went wrong.
    """

    item: str
    text: str
    seconds: float = 0.0
    kernels: str = ""
    why: str = ""

    @property
    def failed(self) -> bool:
        return self.text.startswith("FAILED")


class Log:
    """A file and the terminal, line by line, as they come: what stops this process takes nothing along."""

    def __init__(self, path: Path):
        self.file = path.open("a", buffering=1)
        self.lock = threading.Lock()

    def __call__(self, line: str, name: str = "", shown: bool = True) -> None:
        with self.lock:
            self.file.write(f"{name + '| ' if name else ''}{line}\n")
            if shown:
                print(line, flush=True)


@dataclass
class Runner:
    """Runs stages.

    Attributes:
        out: where logs, archives and records go.
        patience: factor of all times.
        running: processes by item.
        stopped: why no more items begin.
    """

    out: Path
    patience: float
    environment: dict[str, str]
    running: dict[str, subprocess.Popen] = field(default_factory=dict)
    stopped: str = ""
    guard: threading.Lock = field(default_factory=threading.Lock)

    def stage(self, number: int, stage: Stage) -> list[Verdict]:
        """Run all items; the log is written as they run, the archive at the end, whatever ends it."""
        log = Log(self.out / f"stage{number}.log")
        work = Path(tempfile.mkdtemp(prefix=f"stage{number}-"))
        start, verdicts = time.monotonic(), []
        end = start + stage.seconds * self.patience
        log(f"== stage {number}: {stage.title} (at most {stage.seconds * self.patience:.0f} s)")
        try:
            for group in stage.groups:
                with ThreadPoolExecutor(max(1, min(stages.WORKERS, len(group)))) as pool:
                    verdicts += pool.map(lambda item: self.item(item, log, work, end), group)
        finally:
            log(f"== verdicts of stage {number}, after {time.monotonic() - start:.0f} s")
            for line in table(verdicts):
                log(line)
            self.archive(number, work)
        return verdicts

    def item(self, item: Item, log: Log, work: Path, end: float) -> Verdict:
        if self.stopped:
            return Verdict(item.name, f"FAILED (not begun: {self.stopped})")
        if reason := absent(item, self.out):
            log(f"-- {item.name}: skipped: {reason}")
            return Verdict(item.name, f"skipped: {reason}")
        start = time.monotonic()
        seconds = min(item.seconds * self.patience, end - start)
        if seconds <= 0:
            return Verdict(item.name, "FAILED (not begun: the time of the stage was over)")
        environment = self.environment | item.environment | dict(PROOF_WORK=str(work), PROOF_OUT=str(self.out))
        command = [word.replace("{work}", str(work)).replace("{out}", str(self.out)) for word in item.command]
        with self.guard:
            if self.stopped:
                return Verdict(item.name, f"FAILED (not begun: {self.stopped})")
            process = self.running[item.name] = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, start_new_session=True, text=True, errors="replace",
            )  # fmt: skip
        overran = threading.Event()
        timer = threading.Timer(seconds, lambda: (overran.set(), end_group(process)))
        timer.start()
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            log(lines[-1], item.name, shown=False)
        code = process.wait()
        timer.cancel()
        end_group(process, now=True)  # children that it left
        with self.guard:
            self.running.pop(item.name)
        taken = time.monotonic() - start
        if overran.is_set():
            text = f"FAILED (stopped after {seconds:.0f} s)"
        else:
            text = f"FAILED ({code})" if code else judge(lines)
        if self.stopped and code:
            text = f"FAILED ({self.stopped})"
        verdict = Verdict(item.name, text, taken, kernels(lines), wrong(lines) if text.startswith("FAILED") else "")
        log(f"-- {item.name}: {text} in {taken:.1f} s {verdict.kernels}" + (f": {verdict.why}" if verdict.why else ""))
        for line in lines:
            if line.startswith("! "):  # what an item wants to be seen at once
                log(f"   {line[2:]}")
        return verdict

    def archive(self, number: int, work: Path) -> None:
        """What the items of a stage left, its log and all records so far, as one file."""
        path = self.out / f"stage{number}.tar.gz"
        part = path.with_suffix(".part")
        with tarfile.open(part, "w:gz") as tar:
            tar.add(self.out / f"stage{number}.log", f"stage{number}/log")
            for file in sorted(work.rglob("*")):
                if file.is_file():
                    tar.add(file, f"stage{number}/{file.relative_to(work)}")
            if (self.out / "records.jsonl").exists():
                tar.add(self.out / "records.jsonl", f"stage{number}/records.jsonl")
        part.replace(path)
        shutil.rmtree(work, ignore_errors=True)

    def stop(self, reason: str) -> None:
        """Begin nothing more, and end what runs."""
        with self.guard:
            self.stopped = reason
            running = list(self.running.values())
        for process in running:
            end_group(process)


def end_group(process: subprocess.Popen, now: bool = False) -> None:
    """Interrupt a process and its children; after a while, or `now`, kill them."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if not now:
            os.killpg(process.pid, signal.SIGINT)
            later = threading.Timer(GRACE, end_group, (process, True))
            later.daemon = True  # the stage waits for the process, and nobody for this
            later.start()
        else:
            os.killpg(process.pid, signal.SIGKILL)


def absent(item: Item, out: Path) -> str:
    """What an item needs and this machine does not have, or ""."""
    for need in item.needs:
        kind, _, name = need.partition(":")
        if kind == "module" and importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
        if kind == "program" and shutil.which(name) is None:
            return f"{name} is not installed"
        if kind == "record" and f'"{name}"' not in _text(out / "records.jsonl"):
            return f"no {name} in {out / 'records.jsonl'}"
        if kind == "not":
            return name
    return ""


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def judge(lines: list[str]) -> str:
    """The verdict of what ended well: pytest also does where every test was skipped."""
    last = next((line for line in reversed(lines) if re.search(r"\b\d+ (passed|skipped)\b", line)), "")
    if "skipped" in last and "passed" not in last:
        reasons = [line.partition(": ")[2] for line in lines if line.startswith("SKIPPED [")]
        return f"skipped: {reasons[0] if reasons else last.strip()}"
    own = [line for line in lines if line.startswith("skipped: ")]
    return own[-1] if own else "passed"


def kernels(lines: list[str]) -> str:
    for line in lines:
        if (found := MARKS.match(line)) and found[1] == "kernels":
            counts = json.loads(found[2])
            if counts["hits"] or counts["misses"]:
                return f"{counts['hits']} of {counts['hits'] + counts['misses']} kernels in the cache"
    return ""


def wrong(lines: list[str]) -> str:
    """The first line of what went wrong, else the last line there is."""
    found = next((line for line in lines if WRONG.match(line)), None)
    last = next((line for line in reversed(lines) if line.strip() and not MARKS.match(line)), "")
    return (last if found is None else found).strip()[:160]


def table(verdicts: list[Verdict]) -> list[str]:
    width = max([len(v.item) for v in verdicts], default=0)
    return [
        f"{v.item:{width}} {v.seconds:6.1f} s  {v.text}{'; ' if v.kernels else ''}{v.kernels}" + f"  {v.why}".rstrip()
        for v in verdicts
    ]


def prepare(cache: Path, site: Path, prepared: Path) -> tuple[dict[str, str], bool]:
    """Take what `gpu_prepare.sh` made, where it is there: variables for all items, and whether its kernels fit."""
    found, fits = {}, False
    wheels = sorted((prepared / "wheels").glob("*.whl"))
    if wheels:
        start = time.monotonic()
        options = (
            "--no-index --no-deps --no-compile --no-cache-dir --upgrade --quiet --disable-pip-version-check".split()
        )
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *map(str, wheels)]
        done = subprocess.run(command, capture_output=True, text=True)
        what = f"prepared: {len(wheels)} wheels, installed in {time.monotonic() - start:.1f} s"
        print(what if done.returncode == 0 else f"the prepared wheels cannot be installed: {done.stderr[-500:]}")
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(site)]))
        sys.path.append(str(site))  # where `absent` looks
        importlib.invalidate_caches()
    archive = prepared / "triton.tar.xz"
    if archive.exists():
        command = [sys.executable, str(HERE / "kernel_cache.py"), str(cache), str(archive)]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout.strip() or done.stderr[-500:])
        fits = done.returncode == 0
    return found, fits


def capability() -> str:
    """Of the GPU at hand, such as "90" for 9.0; "" without one."""
    ask = "import torch; print('%d%d' % torch.cuda.get_device_capability() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    return done.stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_proof.sh", description="Prove all that claims a GPU on one.")
    parser.add_argument("stages", nargs="*", type=int, metavar="STAGE", help="1, 2, 3; all by default")
    parser.add_argument("--plan", action="store_true", help="print the items and their planned times, and run nothing")
    options = parser.parse_args(arguments)
    device = os.environ.get("DEVICE", "cuda")
    known = stages.stages(device)
    numbers = options.stages or [*known]
    if unknown := set(numbers) - set(known):
        parser.error(f"unknown stage: {', '.join(map(str, sorted(unknown)))}; there are {', '.join(map(str, known))}")
    if options.plan:
        print(stages.plan(known))
        return 0
    found = capability() if device == "cuda" else ""
    if device == "cuda" and not found:
        print("PyTorch sees no GPU; DEVICE=cpu tries all without one", file=sys.stderr)
        return 2
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = Path(os.environ.get("OUT") or ROOT / "gpu-proof" / stamp).resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"logs, archives and records: {out}", flush=True)
    folder = Path(os.environ.get("PROOF_FOLDER") or Path(tempfile.gettempdir()) / f"fastprior-proof-{os.getuid()}")
    environment = dict(os.environ) | dict(PYTHONUNBUFFERED="1", PROOF_DEVICE=device)
    environment["TRITON_CACHE_DIR"] = str(folder / "triton")
    fits = device == "cpu"
    if device == "cpu":
        environment |= dict(TRITON_INTERPRET="1")
    else:
        variables, fits = prepare(folder / "triton", folder / "site", ROOT / ".gpu")
        environment |= variables
    sys.stdout.flush()
    runner = Runner(out, float(os.environ.get("PATIENCE", 1)), environment)

    def interrupted(number, frame):
        # in a thread, for this one may hold what `stop` waits for
        threading.Thread(target=runner.stop, args=(signal.Signals(number).name,)).start()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, interrupted)
    verdicts = []
    if not fits:
        verdicts += runner.stage(0, stages.compilation(known, numbers, found))
    for number in numbers:
        verdicts += runner.stage(number, known[number])
    records = out / "records.jsonl"
    if records.exists():
        subprocess.run([sys.executable, str(HERE.parent / "report.py"), "--summary", str(records)])
    print("== verdicts")
    print(*table(verdicts), sep="\n")
    print(f"logs, archives and records: {out}", flush=True)
    return int(any(v.failed for v in verdicts) or bool(runner.stopped))


if __name__ == "__main__":
    sys.exit(main())
