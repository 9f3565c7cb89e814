"""A grid barrier, and a chain of matrix-vector products that shows what it costs: the first question of a step that is
one persistent launch.

Each phase of the chain reads its weights once, by all programs, and the vector that the phase before wrote in full:

- "independent": every phase takes the first vector, so that nothing waits: the time of reading the weights.
- "launches": one launch per phase.
- "dependent launches": the same, each begun while the one before still runs (programmatic dependent launch, compute
  capability 9.0): it reads its weights, then waits for that vector.
- "barrier": one cooperative launch of all phases, with a barrier after each.
- "barrier, 1 ahead" and "barrier, 2 ahead": the same; before a program waits it asks for the weights of the next phase
  or, so that memory is busy in the products too, of the one after (on 8.0 the registers spill). It asks after its
  arrival, whose fence could otherwise wait for them.

The poll is in PTX, since Triton's own waits do not fit. A scalar load polls from every thread and cannot acquire. An
atomic that polls goes through shared memory each time and holds up the arrivals. `tl.atomic_poll` is not in Triton 3.6,
and waits for one value, which a fast program may have changed before a slow one looked.

Nothing of this has run on a device yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import ceil_div, check, power_of_2

# tiles of weights that a program asks for ahead of the phase that takes them
MODES = {
    "independent": 1, "launches": 0, "dependent launches": 0,
    "barrier": 0, "barrier, 1 ahead": 1, "barrier, 2 ahead": 2,
}  # fmt: skip
MODES_FROM_90 = "dependent launches", "barrier, 2 ahead"
SIGN = tl.constexpr(-(2**31))
# one thread waits until the sign of the counter is not that of the epoch; what others wrote before is then visible
POLL = tl.constexpr("""{
    .reg .pred again;
    .reg .b32 seen;
    mov.u32 seen, %tid.x;
    setp.ne.u32 again, seen, 0;
    @again bra DONE;
POLL:
    ld.acquire.gpu.global.b32 seen, [$1];
    xor.b32 seen, seen, $2;
    setp.ge.s32 again, seen, 0;
    @again bra POLL;
DONE:
    mov.b32 $0, 0;
}""")


@triton.jit
def arrive(arrived_ptr, program, programs):
    """Say that this program has written its results; all must arrive before any may pass `wait`.

    The steps of a round add up to the sign bit (as in CUDA's cooperative groups): the sign turns with the last arrival,
    the other bits are then zero again, and the counter needs no reset between launches and cannot overflow.
    """
    tl.debug_barrier()  # the arrival tells of the stores of all threads
    step = tl.where(program == 0, (1 - programs) ^ SIGN, 1)
    tl.atomic_add(arrived_ptr, step, sem="release", scope="gpu")


@triton.jit
def wait(arrived_ptr, epoch, programs):
    """Wait for all programs, and give the next epoch. The first is what the counter held before the first arrival."""
    if programs > 1:  # one has nobody to wait for; so the interpreter, which has no PTX, never comes here
        tl.inline_asm_elementwise(POLL, "=r,l,r", [arrived_ptr, epoch], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()  # no thread reads before the one that polls has seen the sign turn
    return epoch ^ SIGN


@triton.jit
def _load_tile(weight_ptr, phase, phases, row, in_rows, dim, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """A program's weights of one phase, in chunks of columns, so that products are added before any lanes meet."""
    weight_ptr += tl.cast(phase, tl.int64) * dim * dim
    in_rows &= row < tl.where(phase < phases, dim, 0)
    tile = ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        cell = weight_ptr + (row[:, None] * dim + column[None, :])
        inside = in_rows[:, None] & (column < dim)[None, :]
        tile += (tl.load(cell, mask=inside, other=0.0, eviction_policy="evict_first"),)
    return tile


@triton.jit
def _matvec_chain_fwd_kernel(
    x_ptr, weight_ptr, out_ptr, arrived_ptr, phases, dim, span,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, CHAINED: tl.constexpr,
    AHEAD: tl.constexpr, BARRIER: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    row = program * span + tl.arange(0, BLOCK_ROWS)
    in_rows = tl.arange(0, BLOCK_ROWS) < span
    epoch = 0
    if BARRIER:
        epoch = tl.load(arrived_ptr, volatile=True)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    tiles = ()
    for turn in tl.static_range(AHEAD):
        tiles += (_load_tile(weight_ptr, turn, phases, row, in_rows, dim, BLOCK, CHUNKS),)
    # two tiles take turns: to move one would wait for it. After an odd number of phases comes one that is empty
    TURNS: tl.constexpr = 2 if AHEAD == 2 else 1
    for start in range(0, phases, TURNS):
        later = ()
        for turn in tl.static_range(TURNS):
            phase = start + turn
            if AHEAD == 0:
                tile = _load_tile(weight_ptr, phase, phases, row, in_rows, dim, BLOCK, CHUNKS)
            else:
                tile = tiles[turn]
            if DEPENDENT:
                tl.extra.cuda.gdc_wait()
            source = x_ptr
            if CHAINED:
                source = tl.where(phase == 0, x_ptr, out_ptr + (phase - 1) * dim)
            x = ()
            for chunk in tl.static_range(CHUNKS):  # all are asked for before any is waited for
                column = chunk * BLOCK + tl.arange(0, BLOCK)
                # past L1, since others wrote it
                x += (tl.load(source + column, mask=column < dim, other=0.0, cache_modifier=".cg"),)
            y = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
            for chunk in tl.static_range(CHUNKS):
                y += tile[chunk].to(tl.float32) * x[chunk][None, :]
            inside = in_rows & (row < tl.where(phase < phases, dim, 0))
            tl.store(out_ptr + phase * dim + row, tl.sum(y, axis=1), mask=inside)
            if BARRIER:
                arrive(arrived_ptr, program, programs)
            if AHEAD > 0:
                later += (_load_tile(weight_ptr, phase + AHEAD, phases, row, in_rows, dim, BLOCK, CHUNKS),)
            if BARRIER:
                epoch = wait(arrived_ptr, epoch, programs)
        tiles = later


@dataclass(frozen=True)
class MatvecChainConfig:
    """Each program takes `span` rows of every phase's weights, in registers: chunks of `block` columns."""

    programs: int
    span: int
    block_rows: int
    block: int
    chunks: int
    num_warps: int


def matvec_chain_config(dim: int, programs: int, itemsize: int, mode: str) -> MatvecChainConfig:
    """The launch configuration for (dim, dim) weights of `itemsize` bytes, and at most so many programs."""
    span = ceil_div(dim, programs)
    # two tiles leave no registers for columns of the last chunk that are beyond dim
    rows, block = power_of_2(span), min(128 if MODES[mode] == 2 else 512, power_of_2(dim))
    chunks = ceil_div(dim, block)
    # few threads with many registers waste least, and leave room for the next launch beside this one
    registers = 128 if mode.endswith("launches") else 32  # of a thread, for a tile
    num_warps = min(16, power_of_2(rows * block * chunks * itemsize // (4 * registers * 32)))
    return MatvecChainConfig(ceil_div(dim, span), span, rows, block, chunks, num_warps)


def resident_programs(registers: int, shared: int, num_warps: int, device) -> int:
    """How many programs run at once on a device.

    Args:
        registers: of a thread.
        shared: bytes of shared memory of a program.
        device: properties, from `torch.cuda.get_device_properties`.
    """
    warp_registers = ceil_div(registers * 32, 256) * 256  # the unit of their allocation
    each = min(
        32,
        device.max_threads_per_multi_processor // (32 * num_warps),
        device.regs_per_multiprocessor // (warp_registers * num_warps),
        device.shared_memory_per_multiprocessor // (shared + 1024),  # CUDA takes 1 KiB of each block for itself
    )
    return each * device.multi_processor_count


def check_resident(programs: int, registers: int, shared: int, num_warps: int, device) -> None:
    """Raise ValueError unless all programs run at once: those that wait would keep out those that they wait for."""
    fitting = resident_programs(registers, shared, num_warps, device)
    if programs > fitting:
        raise ValueError(
            f"programs={programs}; a barrier needs all of them at once, and {fitting} fit on "
            f"{device.multi_processor_count} multiprocessors, with {registers} registers a thread, {shared} bytes of "
            f"shared memory and {num_warps} warps each"
        )


def matvec_chain_fwd(x: Tensor, weights: Tensor, out: Tensor, arrived: Tensor, programs: int, mode: str) -> None:
    """Launch `reference.matvec_chain`, `out[i] = weights[i] @ out[i - 1]`, and `weights[i] @ x` if "independent".

    Args:
        x: (dim,), fp32.
        weights: (phases, dim, dim), contiguous.
        out: (phases, dim), fp32, written.
        arrived: 0-d int32, of the barrier; zero at first, never reset. Launches at the same time must not share it.
        programs: that share the rows of a phase, at most; with a barrier no more than fit on the device at once, in the
            interpreter one, since there they run one after the other.
        mode: see the head of this module.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}; it must be one of {', '.join(map(repr, MODES))}")
    phases, dim, _ = weights.shape
    check(x, weights=(weights, (phases, dim, dim)))
    check(x, (torch.float32,), x=(x, (dim,)), out=(out, (phases, dim)))
    check(x, (torch.int32,), arrived=(arrived, ()))
    for name, tensor in ("x", x), ("weights", weights), ("out", out), ("arrived", arrived):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
    config = matvec_chain_config(dim, programs, weights.itemsize, mode)
    barrier, dependent = mode.startswith("barrier"), mode == "dependent launches"
    if barrier and launch.interpreted() and x.device.type == "cpu" and config.programs > 1:
        raise ValueError(f"programs={config.programs}; a barrier takes one in the interpreter, which runs them in turn")
    constants = dict(
        BLOCK_ROWS=config.block_rows, BLOCK=config.block, CHUNKS=config.chunks, CHAINED=mode != "independent",
        AHEAD=MODES[mode], BARRIER=barrier, DEPENDENT=dependent, num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip
    each = 1 if mode.endswith("launches") else phases
    for first in range(0, phases, each):
        source = x if first == 0 else out[first - 1]
        args = source, weights[first], out[first], arrived, each, dim, config.span
        if barrier and x.is_cuda:
            _check_resident(config, args, constants)
        # the first waits in the usual way: who knows what writes the weights before it
        launches = dict(cooperative=barrier, dependent=dependent and first > 0)
        launch.launch(_matvec_chain_fwd_kernel, (config.programs,), *args, **launches, **constants)


def _check_resident(config: MatvecChainConfig, args: tuple, constants: dict) -> None:
    """`check_resident` of the compiled kernel; the device must be the current one."""
    device = args[0].device
    with launch.on(device):
        compiled = _matvec_chain_fwd_kernel.warmup(
            *args, grid=(config.programs,), launch_cooperative_grid=True, **constants
        )
        compiled._init_handles()  # loads it, which tells its registers
    properties = torch.cuda.get_device_properties(device)
    check_resident(config.programs, compiled.n_regs, compiled.metadata.shared, config.num_warps, properties)
