"""Weights that stay as they are during a call: a lock of each network, for many readers or one who changes it."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from threading import get_ident

import torch
from torch import nn

HOLDERS = "net", "prior", "_orig_mod"  # names by which a model holds the network that others may hold, too


class WeightLock:
    """Many readers, or one writer. `with lock:` reads; `with lock.writing():` is the other side.

    A thread may take either side again within itself. Who comes while a writer waits, waits behind it; and who waits
    when a writer ends, reads before the next one writes. A reader that writes, such as a hook that loads weights, waits
    for the others and changes what its own call reads.
    """

    def __init__(self):
        self.free()

    def free(self) -> None:
        """Begin anew, held by nobody."""
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)
        self._depths: dict[int, int] = {}  # how often each thread reads
        self._writer: int | None = None  # the thread
        self._writes = 0  # how many writers are done
        self._waiting = self._upgrading = 0  # writers that wait, and those of them that read
        self._queued = self._due = 0  # readers that wait, and those of them that go before the next writer

    def __enter__(self) -> None:
        thread = get_ident()
        with self._mutex:
            depth = self._depths.get(thread, 0)
            if not depth and (self._waiting or self._writer is not None) and self._writer != thread:
                self._wait_for_writers()
            self._depths[thread] = depth + 1

    def _wait_for_writers(self) -> None:
        writes, self._queued = self._writes, self._queued + 1
        try:
            while self._writer is not None or (self._waiting and self._writes == writes):
                self._changed.wait()
        finally:
            self._queued -= 1
            if self._writes != writes:
                self._due -= 1
                self._changed.notify_all()

    def __exit__(self, *_) -> None:
        thread = get_ident()
        with self._mutex:
            depth = self._depths.get(thread, 0) - 1
            if depth > 0:
                self._depths[thread] = depth
            else:
                self._depths.pop(thread, None)  # a child of a fork holds nothing
                if self._waiting:
                    self._changed.notify_all()

    @property
    def is_wanted(self) -> bool:
        """Whether a writer waits for the readers to end."""
        return self._waiting > 0

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Alone: no call is in progress, and none begins."""
        if self._writer == get_ident():
            yield
            return
        self._begin_write()
        try:
            yield
        finally:
            with self._mutex:
                if self._writer == get_ident():
                    self._writer, self._writes, self._due = None, self._writes + 1, self._queued
                self._changed.notify_all()

    def _begin_write(self) -> None:
        thread = get_ident()
        with self._mutex:
            reads = thread in self._depths
            self._waiting, self._upgrading = self._waiting + 1, self._upgrading + reads
            if reads:
                self._changed.notify_all()  # another writer may wait for this reader alone
            try:
                while self._writer is not None or self._due or len(self._depths) > self._upgrading:
                    self._changed.wait()
                self._writer = thread
            finally:
                self._waiting, self._upgrading = self._waiting - 1, self._upgrading - reads
                if self._writer != thread:
                    self._changed.notify_all()


_LOCKS: weakref.WeakKeyDictionary[nn.Module, WeightLock] = weakref.WeakKeyDictionary()
_FREED: weakref.WeakSet = weakref.WeakSet()


def free_in_forks(owner: object) -> None:
    """Call `owner.free()` in the children of forks, where no other thread is that would."""
    _FREED.add(owner)


def _free_all() -> None:
    for owner in list(_FREED):
        owner.free()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_all)


def lock_of(model: nn.Module) -> WeightLock:
    """The lock of a network, or of that which a model holds: one for all that hold it. Copies have their own."""
    parts = model._modules
    while held := [parts[name] for name in HOLDERS if parts.get(name) is not None]:
        model = held[0]
        parts = model._modules
    lock = _LOCKS.get(model)
    if lock is None:
        lock = _LOCKS.setdefault(model, WeightLock())  # that of the thread that came first
        free_in_forks(lock)
    return lock


def reads_weights(method: Callable) -> Callable:
    """Make a method of a model run with the weights that it began with, see `weights_locked`."""

    @functools.wraps(method)
    def inner(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        with lock_of(self):
            return method(self, *args, **kwargs)

    return inner


def _wait_for_device(model: nn.Module) -> None:
    """Wait for what other threads launched: they hold no lock while it runs."""
    if torch.cuda.is_initialized():
        for device in {weight.device for weight in model.parameters() if weight.is_cuda}:
            torch.cuda.synchronize(device)


@contextlib.contextmanager
def weights_locked(model: nn.Module, *, shared: bool = False) -> Iterator[None]:
    """Hold the weights of a model while other threads sample from it: within the block none of their calls runs.

    Calls in progress end before, with the weights as they were, and later ones wait until the block ends. So nobody is
    answered by a mixture of old and new weights. `PriorSampler.update`, `load_state_dict`, `to` and the like of a
    prior or of its network do this themselves. Do it around whatever else writes into weights or replaces them: an
    optimizer's step, a moving average, `weight.data.copy_`; without it a call in progress may read some of both.

    A prior's CLIP is called before, and held by nobody. A block must not wait for another thread that calls the model,
    nor a hook for one that changes it.

    Args:
        model: a DiffusionPrior, a PriorTransformer, or a network; all that hold one network have one lock.
        shared: for reading: others may call, and who changes the weights waits. For `copy.deepcopy`, `torch.save`, or a
            loop of your own over steps, which must meet the same weights throughout.
    """
    lock = lock_of(model)
    if shared:
        with lock:
            yield
        return
    with lock.writing():
        _wait_for_device(model)
        try:
            yield
        finally:
            _wait_for_device(model)
