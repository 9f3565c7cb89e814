"""Huge pages for weights: what is moved, when, and that nothing but its place changes."""

import gc
import mmap
import platform
import re
from pathlib import Path

import pytest
import torch

from fastprior import PriorSampler
from fastprior.kernels import ops
from fastprior.kernels.cpu import huge_pages
from helpers.cpu_cases import NEEDS_KERNELS
from helpers.priors import make_prior, make_text

SIZE = 2**21
LINUX = re.match(r"(\d+)\.(\d+)", platform.release())
HAS_THEM = huge_pages._system() is not None and LINUX is not None and (int(LINUX[1]), int(LINUX[2])) >= (6, 1)
NEEDS_THEM = pytest.mark.skipif(not HAS_THEM, reason="this system moves no memory to huge pages")


def in_huge_pages(address: int) -> int:
    """Bytes in huge pages, of the mapping at an address alone: others of this process come and go."""
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)[1:]:
        start, end = (int(place, 16) for place in mapping.split(maxsplit=1)[0].split("-"))
        if start <= address < end:
            return int(re.search(r"^AnonHugePages:\s+(\d+) kB", mapping, re.M)[1]) * 1024
    raise LookupError(f"no mapping at {address:x}")


@NEEDS_THEM
def test_memory_moves_and_nothing_else_changes():
    memory = mmap.mmap(-1, 16 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTDUMP)  # so that the system does not make it one with its neighbours
    t = torch.frombuffer(memory, dtype=torch.float32).normal_()
    view, copy, address = t[7:], t.clone(), t.data_ptr()
    moved = huge_pages.collapse([view])
    assert 0 < moved <= 16 * SIZE and in_huge_pages(address) >= moved // 2  # the system may take some back
    assert t.data_ptr() == address and torch.equal(t, copy) and torch.equal(view, copy[7:])
    t.add_(1)
    assert torch.equal(t, copy + 1)
    assert huge_pages.collapse([view]) >= moved  # where it is already


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The pages that a system is asked for, of which it has every second."""
    pages = []

    def madvise(page, size, advice):
        assert size == SIZE and page % SIZE == 0 and advice == 25
        pages.append(page)
        return len(pages) % 2 - 1

    monkeypatch.setattr(huge_pages, "_system", lambda: (madvise, SIZE))
    return pages


def test_only_whole_pages_of_weights(asked):
    big, small = torch.empty(5 * SIZE + 100, dtype=torch.uint8), torch.empty(100)
    assert huge_pages.collapse([small]) == 0 and not asked
    huge_pages.collapse([big[3:], small])
    assert len(asked) in (4, 5)
    assert all(big.data_ptr() <= page and page + SIZE <= big.data_ptr() + big.nbytes for page in asked)
    asked.clear()
    moved = huge_pages.collapse([big, big[: big.numel() // 2]])  # a view's storage is all of it
    assert moved == SIZE * ((len(asked) + 1) // 2)


def test_weights_side_by_side_share_a_page(asked):
    class Piece:
        is_cpu = True

        def __init__(self, start: int, end: int):
            self.start, self.end = start, end

        def untyped_storage(self):
            return self

        def data_ptr(self) -> int:
            return self.start

        def nbytes(self) -> int:
            return self.end - self.start

    near, far = 10 * SIZE + 100, 10 * SIZE + 100 + huge_pages.GAP + 1
    huge_pages.collapse([Piece(near, 12 * SIZE), Piece(9 * SIZE, 10 * SIZE + 90)])
    assert asked == [9 * SIZE, 10 * SIZE, 11 * SIZE]
    asked.clear()
    huge_pages.collapse([Piece(9 * SIZE, 10 * SIZE + 100), Piece(far, 12 * SIZE)])
    assert asked == [9 * SIZE, 11 * SIZE]


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"enabled": "always madvise [never]", "hpage_pmd_size": str(SIZE)},
        {"enabled": "[always] madvise never", "hpage_pmd_size": str(2**29)},
        {"enabled": "[always] madvise never", "hpage_pmd_size": "unknown"},
    ],
    ids=["another-system", "never", "too-large", "unreadable"],
)
def test_systems_without(files, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(huge_pages, "SYSTEM", tmp_path)
    monkeypatch.setattr(huge_pages, "_system", huge_pages._system.__wrapped__)
    assert huge_pages.collapse([torch.empty(4 * SIZE)]) == 0


@pytest.mark.slow
def test_when_weights_settle(monkeypatch):
    gc.collect()
    calls, known = [], len(huge_pages._seen)
    monkeypatch.setattr(huge_pages, "collapse", calls.append)
    module, weights = torch.nn.Linear(3, 3), [torch.empty(3), torch.empty(4)]
    for before in (0, 1, 1, 1):
        huge_pages.settle(module, weights)
        assert len(calls) == before
    other = [*weights[:1], torch.empty(4)]
    huge_pages.settle(module, other)
    assert len(calls) == 1
    huge_pages.settle(module, other)
    assert len(calls) == 2 and calls[1] is other
    del module
    gc.collect()
    assert len(huge_pages._seen) == known


@NEEDS_KERNELS
def test_samplers_settle(monkeypatch, lenient):
    """The drop-in in its second run, a `PriorSampler` before its first; those of 8 bits too."""
    moved = []
    for place, name in ((huge_pages, "collapse"), (ops, "to_huge_pages")):
        monkeypatch.setattr(place, name, lambda tensors: moved.append({t.data_ptr() for t in tensors}))
    prior, text = make_prior(), make_text(1, 32)
    weight = prior.net.causal_transformer.layers[0][0].to_q.weight.data_ptr()
    for runs in (0, 1, 1):
        prior.sample(**text, timesteps=3, progress=False)
        assert len(moved) == runs
    assert weight in moved.pop()
    sampler = PriorSampler(make_prior(), timesteps=3, compile=False, guidance=False)  # without null tables
    sampler(**text)
    weight = sampler._net.causal_transformer.layers[0][0].to_q.weight
    assert len(moved) == 1 and weight.data_ptr() in moved.pop()
    sampler = PriorSampler(make_prior(), timesteps=3, compile=False, quantise="int8")
    quantised = sampler._step_net.causal_transformer.layers[0][0].to_q.weight
    assert quantised.dtype == torch.int8 and quantised.data_ptr() in moved[-1]
