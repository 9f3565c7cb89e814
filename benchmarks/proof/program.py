"""What a program of a kernel does on an H200, from its machine code: what it asks for, before it waits and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace

from machine_code import ATOMICS, LOADS, RELEASE, WAIT, Instruction

# of an H200 and an H100 SXM, by NVIDIA's data sheet and the CUDA programming guide for compute capability 9.0
H200 = SimpleNamespace(
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_multiprocessor=228 * 1024,
)
CLOCK = 1.755e9  # clocks a second under load; 1.98e9 at most
SCHEDULERS = 4  # of a multiprocessor: each gives one instruction of a warp a clock
SHARED_BYTES = 128  # a clock, from the shared memory of a multiprocessor
L2_BYTES = 39  # a clock and multiprocessor, from the second cache to all of them: 4472 for 114 (Luo et al. 2024)

# Clocks until a result is there, with nothing else under way. Memory as Luo et al. measured it on an H100 (2024,
# Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, arXiv 2402.13499); the others are of the size that Jia
# et al. found on a V100 (2018, arXiv 1804.06826), for want of newer ones.
L2_CLOCKS, DRAM_CLOCKS, SHARED_CLOCKS = 263, 479, 29
RESULT_CLOCKS = dict(LDS=SHARED_CLOCKS, LDSM=33, SHFL=23, MUFU=23, S2R=25, S2UR=25, LDC=40, ULDC=40, POPC=14, FLO=14)
OTHER_CLOCKS = 14  # conversions and what else has no line above
READ_CLOCKS = 12  # until the operands of an access are read
BARRIER_CLOCKS = 22  # of a block, for the last warp that arrives
# a fence, an atomic and what it invalidates take about 2 us (a review of these kernels): all but the atomic's trip
FENCE_CLOCKS = round(2e-6 * CLOCK) - L2_CLOCKS

# Clocks for which an instruction of a warp holds a unit of its scheduler, of which a multiprocessor has four, by the
# programming guide's table of throughputs for 9.0. A product of 16 x 8 x 16 by `mma.sync` comes at 62 % of the peak,
# 4 clocks (Luo et al. 2024).
UNITS = {
    "fma": dict(FFMA=1, FADD=1, FMUL=1, HFMA2=1, IMAD=2),
    "alu": dict(LOP3=2, SHF=2, SEL=2, ISETP=2, IADD3=2, VIADD=2, LEA=2, PRMT=2, FSETP=2, FSEL=2, FMNMX=2, MOV=2,
                PLOP3=2, IMNMX=2, VIMNMX=2, F2FP=2),
    "special": dict(MUFU=8, F2F=8, I2F=8, F2I=8, POPC=8, FLO=8, I2FP=2),
    "tensor": {"HMMA.16816": 6.5, "HMMA.1688": 6.5, "IMMA.16832": 6.5},
}  # fmt: skip
FLOAT_PRODUCTS = "FFMA", "FMUL", "FADD"


@dataclass
class Program:
    """What one program does; clocks are counted from the wait, or from the start where it has none.

    Attributes:
        waits: whether it waits for the launch before.
        prologue: clocks before the wait.
        early_trips: see `trips`, before the wait: 1 where nothing is waited for there.
        loads: bytes of all threads by the pointers that their addresses are made of, before the wait and after.
        asked: loads of a thread before the wait, by those pointers.
        widths: bytes of an access, by those pointers.
        trips: to the second cache, one after the other, after the wait: a load comes one trip after the last one that
            the thread had waited for when it asked; a fence is a trip too.
        barriers: of the block, after the wait.
        tensor: products of the tensor cores of a warp, after the wait.
        products: FFMA, FADD and FMUL of a thread, after the wait.
        stores: accesses that write, before the wait.
        clocks: until it ends.
        first: when it first waits for a load of what is fixed; `clocks` if it never does.
        last: when it does for the last time.
        release: when it lets the next launch begin; None where its end does, and negative before the wait.
        instructions: of a warp, all of them.
    """

    waits: bool = False
    prologue: float = 0.0
    early_trips: int = 0
    loads: dict[frozenset, list[int]] = field(default_factory=dict)
    asked: Counter = field(default_factory=Counter)
    widths: dict[frozenset, set[int]] = field(default_factory=dict)
    trips: int = 0
    barriers: int = 0
    tensor: int = 0
    products: int = 0
    stores: int = 0
    clocks: float = 0.0
    first: float = 0.0
    last: float = 0.0
    release: float | None = None
    instructions: int = 0


@dataclass
class _Counter:
    """One of the counters that instructions wait for: when all that it counts is there, and what that was."""

    ready: float = 0.0
    trip: int = 0
    fixed: bool = False

    def join(self, ready: float, trip: int = 0, fixed: bool = False) -> None:
        self.ready, self.trip, self.fixed = max(self.ready, ready), max(self.trip, trip), self.fixed or fixed


class _Walker:
    """Follows a warp: an instruction begins when the one before lets it and all that it waits for is there.

    Between two barriers of the block no less time goes by than the busiest unit needs for all warps of the
    multiprocessor. What is read of fixed arguments is left to `step_model.timeline`, which has memory's bandwidth.
    """

    def __init__(self, fixed: frozenset[str], warps: int, programs: int):
        self.fixed, self.warps, self.programs, self.program = fixed, warps * programs, programs, Program()
        self.now = self.start = self.since = 0.0
        self.first = self.last = None
        self.waited, self.counters = 0, [_Counter() for _ in range(6)]
        self.group, self.groups = _Counter(), []  # of copies to shared memory
        self.busy: Counter = Counter()

    def wait_for(self, *counters: _Counter) -> None:
        for counter in counters:
            self.now, self.waited = max(self.now, counter.ready), max(self.waited, counter.trip)
        if any(counter.fixed for counter in counters):
            self.first, self.last = self.now if self.first is None else self.first, self.now

    def end_segment(self) -> None:
        each = -(-self.warps // SCHEDULERS)
        units = [self.busy[name] * each for name in ("issue", *UNITS)]
        shared = self.busy["shared"] * self.warps / SHARED_BYTES
        memory = self.busy["memory"] * self.programs / L2_BYTES
        self.now = max(self.now, self.since + max(*units, shared, memory))
        self.since = self.now
        self.busy.clear()

    def step(self, instruction: Instruction, made_of: frozenset[str], threads: int) -> None:
        name, program = instruction.name, self.program
        self.wait_for(*(self.counters[number] for number in instruction.waits))
        for number in instruction.waits:
            self.counters[number] = _Counter()
        if name == "DEPBAR" and len(instruction.operands) > 1:
            left = int(instruction.operands[1], 16)
            done = self.groups[: max(0, len(self.groups) - left)]
            self.wait_for(*done)
            del self.groups[: len(done)]
        began, result = self.now, _Counter()
        if name in LOADS + ATOMICS and threads:
            fixed = bool(made_of) and made_of <= self.fixed
            self.load(instruction, made_of, threads)
            self.busy["memory"] += 0 if fixed else threads * instruction.nbytes
            clocks = DRAM_CLOCKS if fixed else L2_CLOCKS
            result = _Counter(began + clocks, self.waited + 1, fixed)
            program.trips = max(program.trips, result.trip)
            if name == "LDGSTS":
                self.group.join(result.ready, result.trip, result.fixed)
                result = _Counter()
        elif name == "LDGDEPBAR":
            result, self.group = self.group, _Counter()
            self.groups.append(result)
        elif name == "MEMBAR" and "GPU" in instruction.opcode and threads:
            self.now += FENCE_CLOCKS
            self.waited += 1
            program.trips = max(program.trips, self.waited)
        else:
            result.ready = began + RESULT_CLOCKS.get(name, OTHER_CLOCKS)
        self.now += max(instruction.stall, 1)
        if instruction.sets is not None:
            self.counters[instruction.sets].join(result.ready, result.trip, result.fixed)
        if instruction.frees is not None:
            self.counters[instruction.frees].join(began + READ_CLOCKS)
        self.note(instruction, threads > 0)

    def load(self, instruction: Instruction, made_of: frozenset[str], threads: int) -> None:
        read = self.program.loads.setdefault(made_of, [0, 0])
        read[1] += threads * instruction.nbytes
        self.program.asked[made_of] += not self.program.waits
        self.program.widths.setdefault(made_of, set()).add(instruction.nbytes)

    def note(self, instruction: Instruction, taken: bool) -> None:
        """Count an instruction, and what it keeps busy; one that no thread takes part in only has its turn."""
        name, program = instruction.name, self.program
        program.instructions += 1
        self.busy["issue"] += 1
        if not taken:
            return
        kinds = name, name.lstrip("U"), ".".join(instruction.opcode.split(".")[:2])
        for unit, clocks in UNITS.items():
            self.busy[unit] += next((clocks[kind] for kind in kinds if kind in clocks), 0)
        if name in ("LDS", "STS", "LDSM", "STSM", "LDGSTS"):
            self.busy["shared"] += 32 * _shared_bytes(instruction)
        elif name == "SHFL":
            self.busy["shared"] += 32 * 4
        program.tensor += name in ("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA")
        program.products += name in FLOAT_PRODUCTS
        program.stores += name in ("STG", "ST", "RED", "REDG", *ATOMICS) and not program.waits
        if name == "HGMMA":
            self.busy["tensor"] += _wide_product(instruction)
        elif name == "BAR":
            self.end_segment()
            self.now += BARRIER_CLOCKS
            self.since = self.now
            program.barriers += 1
        elif name == RELEASE:
            program.release = self.now
        elif name == WAIT:
            self.pass_wait()

    def pass_wait(self) -> None:
        """Begin to count anew; what was asked for is there, for when memory brings it others know."""
        program = self.program
        self.end_segment()
        self.start = self.since = self.now
        program.waits, program.prologue, program.early_trips = True, self.now, program.trips
        program.loads = {made_of: [before + after, 0] for made_of, (before, after) in program.loads.items()}
        program.trips = program.barriers = program.tensor = program.products = self.waited = 0
        self.first = self.last = None
        for counter in (*self.counters, *self.groups, self.group):
            counter.ready, counter.trip = min(counter.ready, self.now), 0

    def end(self) -> Program:
        self.end_segment()
        program = self.program
        if not program.waits:
            program.asked.clear()
            program.stores = 0
        program.clocks = self.now - self.start
        program.first = program.clocks if self.first is None else self.first - self.start
        program.last = program.first if self.last is None else self.last - self.start
        program.release = None if program.release is None else program.release - self.start
        return program


def _shared_bytes(instruction: Instruction) -> int:
    if instruction.name in ("LDSM", "STSM"):
        last = instruction.opcode.rpartition(".")[2]
        return 4 * (int(last) if last.isdigit() else 1)
    return instruction.nbytes


def _wide_product(instruction: Instruction) -> float:
    """Clocks of a `wgmma` of 64 rows: 512 products a clock and tensor core, of which four warps have one each."""
    rows, columns, inner = map(int, instruction.opcode.split(".")[1].split("x"))
    return rows * columns * inner / (4 * 512)


def run(
    walked: Iterable[tuple[Instruction, frozenset[str], int]],
    fixed: frozenset[str],
    warps: int,
    programs: int,
    watch: Callable[[float, Instruction, frozenset[str], int], None] | None = None,
) -> Program:
    """Follow a program.

    Args:
        walked: its instructions, see `walk.walk`.
        fixed: names of the arguments that nothing writes in a step: they come from memory, the others from the cache.
        warps: of a program.
        programs: at once on a multiprocessor.
        watch: called with the clock behind each instruction, and what was walked.
    """
    walker = _Walker(fixed, warps, programs)
    for one in walked:
        walker.step(*one)
        if watch is not None:
            watch(walker.now - walker.start, *one)
    return walker.end()
