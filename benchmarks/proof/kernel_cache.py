"""Triton's cache, filled where there is no GPU for a machine that has one, and what of it is found there.

A checkout's kernels are compiled for a capability under the keys of real launches, see `stand_in.py`.
The path of the checkout is no part of them; the lines of its kernels are, and Triton's library, which is another one
for each version of Python.
"""

import atexit
import contextlib
import functools
import hashlib
import importlib
import io
import json
import lzma
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path

FILL = "PROOF_FILL"  # "CAPABILITY WORKERS" in the environment: compile what a process would launch, and launch nothing
MODULES = "attention_kernels", "barrier", "decode", "linear", "norm", "philox", "step"
KEPT = ".cubin", ".json", ".so"  # of what compilers leave


def filling() -> bool:
    """Whether this process compiles kernels instead of launching them: nothing that it computes is right."""
    return FILL in os.environ


class Collector(Executor):
    """Takes compilations, and leaves them undone."""

    def __init__(self):
        self.jobs = []

    def submit(self, job):
        self.jobs.append((job, Future()))
        return self.jobs[-1][1]


@contextlib.contextmanager
def filled() -> Iterator[None]:
    """Within it launches are collected; at its end they are compiled, each once, by several processes."""
    import stand_in
    import triton

    capability, workers = map(int, os.environ[FILL].split())
    collector = Collector()
    with triton.AsyncCompileMode(collector):
        try:
            with stand_in.standing_in(capability):
                yield
        finally:
            start = time.perf_counter()
            found = _compile_all([job for job, _ in collector.jobs], workers)
            for _, future in collector.jobs:
                future.set_result(None)
            seconds = time.perf_counter() - start
            print(f"@filled {json.dumps(found | dict(kernels=len(collector.jobs), seconds=round(seconds, 1)))}")


_jobs = []


def _compile_all(jobs: list, workers: int) -> dict:
    """How many were compiled and how many were there, the seconds of each, launchers, and what failed."""
    found = dict(compiled=[], hits=0, launchers=0, failed=[])
    if not jobs:
        return found
    if _launchers():
        _stub()  # once, for all workers
    _jobs[:] = jobs
    context = multiprocessing.get_context("fork")  # the jobs are handed over by memory
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _begin) as pool:
        for name, seconds, hit, launcher, error in pool.map(_compile, range(len(jobs))):
            found["launchers"] += launcher
            if error:
                found["failed"].append(f"{name}: {error}")
            elif hit:
                found["hits"] += 1
            else:
                found["compiled"].append((name, round(seconds, 2)))
    return found


def _begin() -> None:
    """A worker compiles; it neither collects nor stands in."""
    from triton import knobs
    from triton.runtime._async_compile import active_mode

    active_mode.set(None)
    knobs.compilation.listener = lambda **given: _seen.append(given["cache_hit"])


_seen: list[bool] = []


def _compile(number: int) -> tuple:
    from triton.runtime.cache import get_cache_manager

    _seen.clear()
    start, name, launcher, error = time.perf_counter(), f"job {number}", False, ""
    try:
        compiled = _jobs[number]()
        name = compiled.src.fn.__name__
        os.utime(get_cache_manager(compiled.hash).cache_dir)  # it is used: see `pack`
        launcher = build_launcher(compiled)
    except Exception as failure:  # reported; the others are compiled all the same
        error = f"{type(failure).__name__}: {failure}".splitlines()[0]
    return name, time.perf_counter() - start, _seen == [True], launcher, error


def build_launcher(compiled) -> bool:
    """Compile the C that launches a kernel, without loading it, which takes a driver; False where that is not known."""
    if not _launchers():
        return False
    from triton.backends.nvidia import driver
    from triton.runtime import build

    folder = _stub()
    loaded, found = build._load_module_from_path, driver.library_dirs
    build._load_module_from_path = lambda name, path: _Loaded()
    driver.library_dirs = lambda: [driver.libdevice_dir, folder]
    try:
        driver.CudaUtils()
        driver.CudaLauncher(compiled.src, compiled.metadata)
    finally:
        build._load_module_from_path, driver.library_dirs = loaded, found
    return True


def _launchers() -> bool:
    """Whether this Triton's are known: they are insides."""
    import triton

    return triton.__version__.startswith("3.6.") and shutil.which(os.environ.get("CC", "gcc")) is not None


class _Loaded:
    """A module that was not loaded: it has every name."""

    def __getattr__(self, name):
        return None


@functools.cache
def _stub() -> str:
    """A folder with a libcuda.so.1 to link with; the real one is found where the program runs.

    It has the names that Triton's C calls: linkers leave out a library of which nothing is needed.
    """
    from triton.backends.nvidia import driver

    sources = Path(driver.__file__), Path(driver.dirname) / "driver.c"
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", "".join(path.read_text() for path in sources))))
    folder = Path(tempfile.mkdtemp(prefix="libcuda-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = "".join(f"void {name}(void) {{}}\n" for name in names)
    command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-"]
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1")], input=source, text=True, check=True)
    return str(folder)


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """Say at the end how many kernels were in the cache, how many were not, and how long these took to compile."""
    try:
        from triton import knobs
    except ImportError:
        yield
        return
    counts, spent = Counter(), []

    def note(*, times, cache_hit, **_):
        counts["hits" if cache_hit else "misses"] += 1
        if not cache_hit:
            spent.append(times.total)

    knobs.compilation.listener = note
    try:
        yield
    finally:
        seconds = round(sum(spent) / 1e6, 1)
        print(f"@kernels {json.dumps(dict(hits=counts['hits'], misses=counts['misses'], seconds=seconds))}", flush=True)


def identity() -> dict[str, str]:
    """What decides whether kernels that were compiled elsewhere are found: the compiler, and each kernel's sources."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.cache import triton_key

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    backend = make_backend(GPUTarget("cuda", 90, 32))
    found = {
        "triton": f"{triton.__version__} {digest(triton_key())}",
        "ptxas": digest(backend.hash()),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "environment": digest(str(sorted(get_cache_invalidating_env_vars().items()))),
    }
    for module in MODULES:
        members = vars(importlib.import_module(f"fastprior.kernels.gpu.{module}"))
        own = {name: value for name, value in members.items() if isinstance(value, triton.runtime.JITFunction)}
        found |= {f"{module}.{name}": digest(function.cache_key) for name, function in own.items()}
    return found


def differences(made: dict) -> list[str]:
    """In what this machine and checkout differ from those that a cache was made with."""
    here = identity()
    return [f"{name}: here {here.get(name)}, there {value}" for name, value in made.items() if here.get(name) != value]


def pack(cache: Path, archive: Path, since: float = 0.0, **facts) -> dict:
    """Write what is needed of a cache, and a manifest, to a .tar.xz; the manifest is returned.

    Args:
        since: leave out kernels that were not asked for since that time.
        facts: of the manifest.
    """
    kernels = sorted(path for path in cache.glob("*/*.cubin") if path.parent.stat().st_mtime >= since)
    launchers = sorted(cache.glob("*/*.so"))
    folders = {path.parent for path in (*kernels, *launchers)}
    manifest = dict(identity=identity(), kernels=len(kernels), launchers=len(launchers), **facts)
    names = Counter(path.stem for path in kernels)
    manifest["by_kernel"] = dict(sorted(names.items()))
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_suffix(".part")
    with lzma.open(part, "wb", preset=6) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        _add(tar, "manifest.json", json.dumps(manifest, indent=1).encode())
        for path in sorted(cache.glob("*/*")):
            if path.suffix not in KEPT or path.parent not in folders:
                continue
            data = path.read_bytes()
            if path.name.startswith("__grp__"):
                data = _with_paths(data, lambda name: name)
            _add(tar, f"cache/{path.parent.name}/{path.name}", data)
    part.replace(archive)
    return manifest


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o755
    tar.addfile(member, io.BytesIO(data))


def _with_paths(group: bytes, path_of) -> bytes:
    """A kernel's list of files with other paths, without those that are left out."""
    paths = json.loads(group)["child_paths"]
    kept = {name: path_of(name) for name in paths if Path(name).suffix in KEPT}
    return json.dumps(dict(child_paths=kept)).encode()


def unpack(archive: Path, cache: Path) -> dict:
    """Put what `pack` wrote into a cache, wherever that is; the manifest is returned."""
    manifest = {}
    with tarfile.open(archive, "r:xz") as tar:
        for member in tar:
            data = tar.extractfile(member).read()
            folder, _, inner = member.name.partition("/")
            if folder == "manifest.json":
                manifest = json.loads(data)
                continue
            path = cache / inner
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.name.startswith("__grp__"):
                data = _with_paths(data, lambda name, parent=path.parent: str(parent / name))
            part = path.with_name(f"tmp.{os.getpid()}.{path.name}")
            part.write_bytes(data)
            part.replace(path)
    return manifest


def main(cache: str, archive: str) -> int:
    """Unpack, and say whether the kernels fit this machine and checkout."""
    start = time.perf_counter()
    manifest = unpack(Path(archive), Path(cache))
    seconds = time.perf_counter() - start
    print(f"prepared: {manifest['kernels']} kernels, {manifest['launchers']} launchers, unpacked in {seconds:.1f} s")
    found = differences(manifest["identity"])
    print(*([f"they are not found here: {line}" for line in found] or ["they fit"]), sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(main(*sys.argv[1:]))
