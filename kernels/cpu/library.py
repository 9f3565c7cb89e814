"""The sources of `c/` as a library: compiled at first use and kept; what it takes, and on how many threads it runs.

It takes a C compiler, as torch.compile and Triton do. Where there is none PyTorch computes: a warning says so, and
`unavailable` why.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from ctypes import POINTER, c_long, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import cache, structs

SOURCES = Path(__file__).parent / "c"  # of which library.c includes all
FLAGS = "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"
PLAIN = Tensor, nn.Parameter
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # of numbers, as the source counts them
OMP_PAUSE_SOFT = 1
CONTROL_GROUPS = Path("/sys/fs/cgroup")
OF_PROCESS = Path("/proc/self/cgroup")
LITTLE = 2**19  # numbers, on which an operation takes one thread a tenth of a millisecond


def _machine() -> str:
    """What native code depends on: a home directory may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _kept_in(folder: AbstractContextManager[tuple[Path, int]], name: str, command: list[str]) -> tuple[int, Path]:
    """The library of that name in a folder, opened, and where it lies; it is compiled unless it is there and whole."""
    with folder as (place, handle):
        path = place / name
        library = cache.open_library(handle, name, path)
        if library is None:
            with cache.alone_in(handle):
                library = cache.open_library(handle, name, path)  # as another process left it
                if library is None:
                    cache.compile_into(path, command)
                    library = cache.open_library(handle, name, path)
    if library is None:
        raise OSError(f"{path} is not what was written there")
    return library, path


def build() -> tuple[int, Path]:
    """Compile the sources unless they were: a descriptor of the library, and where it lies.

    That is in `$FASTPRIOR_CACHE` or ~/.cache/fastprior. Its hash stands behind it in the file, so that what a crash or
    a full disk left of one is made again. Where that folder takes no files, or others may write there, a warning says
    so, and a folder among temporary files takes its place.

    Raises:
        OSError, RuntimeError: there is no compiler, or no place to write to.
        subprocess.CalledProcessError: the compiler refuses.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True).stdout
    sources = (source.read_bytes() for source in sorted(SOURCES.glob("*.[ch]")))
    parts = *sources, version, " ".join(FLAGS).encode(), _machine().encode()
    name = f"cpu-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"
    command = [*compiler, *FLAGS, str(SOURCES / "library.c")]
    try:
        return _kept_in(cache.cache_folder(), name, command)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # without a home: RuntimeError
        if isinstance(error, subprocess.CalledProcessError) and not _is_full(error):
            raise
        handle, path = _kept_in(cache.fallback_folder(), name, command)
        _warn(f"the compiled CPU kernels are kept in {path.parent}, since their folder cannot be used: {error}. "
              "Set FASTPRIOR_CACHE to one that takes files, and of you alone")  # fmt: skip
        return handle, path


def _is_full(error: subprocess.CalledProcessError) -> bool:
    """Whether a compiler had no room for what it wrote."""
    return any(word in error.stderr for word in (b"No space left", b"quota exceeded"))


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _check_structs(loaded: ctypes.CDLL) -> None:
    """Raise TypeError where a struct of C has another size than its mirror, which calls would fill wrongly."""
    for mirror in structs.ALL:
        name, size = mirror.__name__.lower(), ctypes.sizeof(mirror)
        if ctypes.c_long.in_dll(loaded, f"size_of_{name}").value != size:
            raise TypeError(f"struct {name} of C has not the {size} bytes of its mirror in structs.py")


forced: str | None = None  # the backend that `ops.using` forces: another one
_loaded: ctypes.CDLL | str | None = None
_most_rows: dict[torch.dtype, int] = {}
_outer = threading.local()


def _load() -> None:
    """Make the library, or why there is none, and how many rows it takes, known."""
    global _loaded
    try:
        # the descriptor stays open: the loader knows the library by its number, which no other may have then
        _loaded = ctypes.CDLL(cache.name_of(*build()))
        _check_structs(_loaded)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        said = said[max(0, said.find("error")) :].partition("\n")[0]  # behind the files that lead there
        _loaded = f"{error.cmd[0]} failed: {said[:300]}"
    except (OSError, RuntimeError) as error:  # a user without a home directory is a RuntimeError
        _loaded = f"no C compiler, or no place for what it makes: {error}"
    except TypeError as error:  # of `_check_structs`
        _loaded = str(error)
    else:
        _loaded.linear.argtypes = POINTER(structs.Linear), c_long
        _loaded.decode_attention.argtypes = POINTER(structs.Decode), c_long
        _loaded.run_blocks.argtypes = POINTER(structs.Blocks), c_long
        _loaded.run_steps.argtypes = POINTER(structs.Run), POINTER(c_void_p), c_long, c_long, c_long
        _loaded.run_rows.argtypes = POINTER(structs.Blocks), POINTER(structs.Row), POINTER(structs.Vector), c_long
        _loaded.most_rows.restype = c_long
        _loaded.set_threads.argtypes = (c_long,)
        _loaded.sum_rows.argtypes = c_void_p, c_long, c_uint64, c_uint64, c_void_p
        _loaded.sum_rows.restype = c_long
        # a forked child has no threads of a team, and would wait for them: the next call of either starts new ones
        os.register_at_fork(before=functools.partial(_loaded.omp_pause_resource_all, OMP_PAUSE_SOFT))
        _most_rows.update((dtype, _loaded.most_rows(kind)) for dtype, kind in KINDS.items())
    if isinstance(_loaded, str):
        _warn(f"no CPU kernels: {_loaded}. PyTorch computes, several times slower on the CPU. They need a C compiler "
              "(CC names it, by default cc) and a folder to keep what it makes (FASTPRIOR_CACHE)")  # fmt: skip


def unavailable() -> str | None:
    """Why PyTorch computes in place of these kernels; None where it does not."""
    if _loaded is None:
        _load()
    return _loaded if isinstance(_loaded, str) else None


def is_at_hand() -> bool:
    """Whether the library is there, or can be made; not made for a program that may run on a GPU alone."""
    return isinstance(_loaded, ctypes.CDLL) or (not torch.cuda.is_available() and unavailable() is None)


def library() -> ctypes.CDLL:
    """The library, whose functions are those of C without `static`.

    Raises:
        RuntimeError: it cannot be compiled.
    """
    if _loaded is None:
        _load()
    if isinstance(_loaded, str):
        raise RuntimeError(f"the CPU kernels cannot be compiled: {_loaded}")
    return _loaded


def most_rows(dtype: torch.dtype) -> int:
    """The most rows that are computed with weights of this dtype here; 0 for none."""
    if _loaded is None and dtype in KINDS:
        _load()
    return _most_rows.get(dtype, 0)


# what torch.compiler.assume_constant_result marks; it would import all of torch.compile, which takes 1.5 s
most_rows._dynamo_marked_constant = True


def is_watched() -> bool:
    """Whether a mode, a transform, forward-mode gradients or a trace follow operations: C would pass them by."""
    if torch.compiler.is_compiling():  # which sees an operation of its own, that other runtimes have not
        return torch.compiler.is_exporting()
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    return transformed or is_in_torch_dispatch_mode() or torch.jit.is_tracing()


def aliases(values: Iterable[object]) -> list:
    """Values, whose tensors are aliases: as they are now, whatever another thread puts in their place.

    It may at any moment (`weight.data = …`, as Module.to does). An alias has a shape, strides, a dtype and numbers that
    belong together, and these live while it does: what C reads is checked in it, and its address is taken of it.
    `t.data` keeps Python's lock meanwhile; `t.detach()`, as other operations, would read what is being replaced.
    """
    return [t.data if type(t) in PLAIN else t for t in values]


def take(
    tensors: Iterable[Tensor | None], dtype: torch.dtype = torch.float32, rows: int = 1, *, gradients: bool = False
) -> list[Tensor | None] | None:
    """`aliases` of plain tensors without gradient, that nothing follows; None where C may not have them.

    They lie on the CPU, in no fp64. In a trace they are as they are: the operation that it keeps makes aliases of what
    it gets.

    Args:
        tensors: of no subclass that keeps its numbers elsewhere; None where one is not given.
        dtype: of the weights.
        rows: how many meet them: beyond some PyTorch is as fast.
        gradients: also tensors that require one.
    """
    gradients = gradients or not torch.is_grad_enabled()
    if forced is not None or is_watched():
        return None
    found, traced = [], torch.compiler.is_compiling()
    for t in tensors:
        if t is not None:
            if type(t) not in PLAIN or (not gradients and t.requires_grad):
                return None
            t = t if traced else t.data
            if not t.is_cpu or t.dtype == torch.float64:
                return None
        found.append(t)
    return found if 0 < rows <= most_rows(dtype) else None  # last: it may compile the library


def run(name: str, call: structs.Structure, *others: object, x: Tensor, rows: int = 1) -> None:
    """Call a function of C on as many threads as `thread_count` says.

    Args:
        name, call, others: of the function, its struct, and what it takes between this and the threads.
        x: what it may have to lay out anew.
        rows: how many x has, where their number is limited.
    Raises:
        ValueError: x has more rows than C takes, or none.
        MemoryError: there is no memory to lay out x.
    """
    function = getattr(library(), name)
    if not 0 < rows <= (most := most_rows(torch.float32)):
        raise ValueError(f"x has {rows} rows; they must be 1 to {most}")
    if function(call, *others, thread_count()):
        raise MemoryError(f"no memory to lay out x of shape {tuple(x.shape)}")


def _read_quota(group: Path) -> float | None:
    """Cores that a control group of either version pays for; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return None if quota < 0 else quota / period
    return None


@functools.cache
def quota() -> float | None:
    """Cores that the control groups of this process pay for, as a container's limit says; None without a limit.

    Read once. A group may be limited by any that it lies in.
    """
    found = []
    with contextlib.suppress(OSError):
        for line in OF_PROCESS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                group = (CONTROL_GROUPS / "cpu" if controllers else CONTROL_GROUPS) / path.lstrip("/")
                found += map(_read_quota, (group, *group.parents))
    return min((cores for cores in found if cores), default=None)


def thread_count() -> int:
    """Threads of a kernel: `torch.get_num_threads()`, but not more than the process has cores, or is paid for.

    More would take turns on the same cores, and be waited for at each of several meetings a layer.
    """
    wanted = getattr(_outer, "threads", None) or torch.get_num_threads()
    if wanted == 1:
        return 1
    paid = quota()
    cores = max(1, library().omp_get_num_procs())
    return min(wanted, cores if paid is None else min(cores, max(1, -int(-paid // 1))))


@contextlib.contextmanager
def one_thread(x: Tensor) -> Iterator[None]:
    """Within the block PyTorch computes on this thread alone, where x lies on the CPU and is little; kernels do not.

    A second thread gains nothing there, and where another process has its core it is waited for.
    """
    alone = torch.compiler.is_compiling() or (threads := torch.get_num_threads()) == 1  # a trace keeps no number
    if alone or not x.is_cpu or x.numel() > LITTLE or unavailable():
        yield
        return
    _outer.threads = threads
    library().set_threads(1)  # of this thread alone
    try:
        yield
    finally:
        library().set_threads(threads)
        _outer.threads = None
