"""Huge pages for weights on the CPU, which a step reads from end to end: a tenth of its time is to find small ones."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .library import aliases

SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
COLLAPSE = 25  # MADV_COLLAPSE, Linux 6.1
LARGEST = 2**22  # bytes; where pages are of 64 KiB huge ones are of 512 MiB, which no weights fill
GAP = 2**16  # bytes between weights that may belong to others


@functools.cache
def _system() -> tuple[Callable[[int, int, int], int], int] | None:
    """`madvise` and the size of a huge page; None where the system has none for us, or shall not use any."""
    try:
        enabled, size = (SYSTEM / "enabled").read_text(), int((SYSTEM / "hpage_pmd_size").read_text())
        madvise = ctypes.CDLL(None).madvise
    except (OSError, ValueError, AttributeError):
        return None
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return None if "[never]" in enabled or size > LARGEST else (madvise, size)


def collapse(tensors: Iterable[Tensor]) -> int:
    """Move the memory of tensors on the CPU to huge pages, where whole ones fit; addresses and values stay.

    It took up to a second for 400 MB on a virtual machine; where it was done it takes a millisecond.

    Returns:
        bytes that lie in huge pages now; 0 where the system has none, or is older than Linux 6.1.
    """
    if _system() is None:
        return 0
    madvise, size = _system()
    tensors = aliases([t for t in tensors if not is_traceable_wrapper_subclass(t)])
    storages = [t.untyped_storage() for t in tensors if t.is_cpu]
    spans: list[list[int]] = []
    for start, end in sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages):
        if spans and start <= spans[-1][1] + GAP:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
    pages = [page for start, end in spans for page in range(-(-start // size) * size, end - size + 1, size)]
    return sum(size for page in pages if madvise(page, size, COLLAPSE) == 0)


_seen: weakref.WeakKeyDictionary[nn.Module, tuple[set[int], int]] = weakref.WeakKeyDictionary()


def settle(owner: nn.Module, tensors: list[Tensor]) -> None:
    """`collapse` the weights of a module at the second call with the same ones: they are used more than once, then."""
    places = {t.data_ptr() for t in tensors}
    before, times = _seen.get(owner, (None, 0))
    times = times + 1 if places == before else 1
    _seen[owner] = places, times
    if times == 2:
        collapse(tensors)
