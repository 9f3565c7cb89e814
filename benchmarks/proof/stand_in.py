"""A driver of a GPU that is not there: launches on CPU tensors compile, under the keys of that GPU, and run nothing.

What a launch compiles depends on its arguments: which of them are 1, which are multiples of 16, which are None. Under
the driver of a real GPU and under this one that is the same, and so are the keys of Triton's cache, where the build of
Triton, another for each version of Python, and the lines of the kernels are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from fastprior.kernels.gpu import launch


class Driver:
    """The driver that `triton.runtime.driver.active` is for a launch that ends when its kernel is compiled."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return -self.capability  # each kernel keeps its target by device: no real one has this number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def standing_in(
    capability: int = 90, compiled: Callable[[object, CompiledKernel], None] = lambda kernel, compiled: None
) -> Iterator[None]:
    """Compile launches for a GPU of a compute capability, such as 90 for 9.0, instead of running them.

    Args:
        compiled: is called with each launched kernel, and what it was compiled to.

    Results are what was in their memory. A process that interprets kernels cannot compile them: RuntimeError.
    """
    if launch.interpreted():
        raise RuntimeError("kernels cannot be compiled in a process that interprets them: unset TRITON_INTERPRET")

    def warm_up(kernel, grid: tuple[int, ...], args: tuple, options: dict, constants: dict) -> None:
        compiled(kernel, kernel.warmup(*args, grid=grid, **options, **constants))

    driver = triton.runtime.driver
    outer = driver._active
    driver.set_active(Driver(capability))
    try:
        with launch.instead(warm_up), mock.patch.object(launch, "can_depend", lambda device: capability >= 90):
            yield
    finally:
        driver._active = outer
