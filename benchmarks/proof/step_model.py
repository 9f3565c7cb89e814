"""Judge a step of a prior on a GPU of compute capability 9.0 by its compiled code, and say how long it should take.

    python benchmarks/proof/step_model.py [--model D2-small] [--follow LINE] [--record]

For every launch of a step, from its machine code, its grid and its arguments: what it takes of a multiprocessor, what
it asks for before it waits for the launch before, and what it does after that (`program.Program`). The time of a step
is made of these by `timeline`, whose constants stand below; those of a program are in `program.py`. Nothing runs, and
no constant was fitted to anything that ran: it is a model. A launch that begins early must keep rules, see `broken`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import ptx
from compilations import compile_variant, key, measure
from machine_code import RELEASE, WAIT, Instruction, disassemble
from program import CLOCK, DRAM_CLOCKS, FENCE_CLOCKS, H200, L2_BYTES, L2_CLOCKS, Program, run
from resources import VERSION, identify
from step_trace import MODELS, STEPS, Launch, Operation, storage, trace, written
from walk import begin, walk

from fastprior.engine.step_cost import LAUNCH_SECONDS
from fastprior.kernels.gpu.barrier import resident_programs
from fastprior.kernels.gpu.launch import ceil_div

RECORDS = Path(__file__).resolve().parents[1] / "records"
DEFAULT_RECORD = RECORDS / f"step-model-triton-{VERSION}.json"
ARCH = 90
BANDWIDTH = 4.3e12  # bytes a second, of a copy on an H200: measured
# from the end of a launch to the first instruction of the next in a graph; a measured decoder's whole phase, see there
ORDINARY_SECONDS = LAUNCH_SECONDS
# from what lets a dependent launch begin, or go on behind its wait, until it does: a review's estimate, not measured
DEPENDENT_SECONDS = 0.8e-6
GOALS = {"D2-small": 100e-6, "PT-1B": 620e-6}  # of a modelled step
MATRIX = 64  # a fixed argument with two dimensions of at least this is a matrix: a weight, keys or values


@dataclasses.dataclass(frozen=True)
class Judged:
    """A launch: what it takes, what it does, and the bytes that it reads of what nothing writes in a step.

    Attributes:
        measured: see `compilations.measure`.
        program: what one does.
        programs: of the launch.
        dependent: whether it begins early.
        resident: programs of it that fit on a multiprocessor.
        before, after: bytes of all programs, asked for before the wait and after. Those of an argument are what all
            threads ask for that are not masked, as in the first program, and no more than the tensor has.
        narrow: matrices that are not read by 16 bytes at once.
        asked: loads of matrices of a thread before the wait.
        guessed: branches of the program whose way was not known.
        broken: the rules that it breaks.
    """

    measured: dict
    program: Program
    programs: int
    num_warps: int
    dependent: bool
    resident: int
    before: float
    after: float
    narrow: tuple[str, ...]
    asked: int
    guessed: int
    broken: tuple[str, ...]

    @property
    def busiest(self) -> int:
        """Programs of the multiprocessor that has most, at once."""
        return min(self.resident, ceil_div(self.programs, H200.multi_processor_count))

    @property
    def waves(self) -> int:
        return ceil_div(self.programs, self.resident * H200.multi_processor_count)

    @property
    def in_flight(self) -> float:
        """Bytes that a multiprocessor asks for before the wait."""
        return self.before / self.programs * self.busiest

    @property
    def bandwidth(self) -> float:
        """Bytes a second that its multiprocessors can take from memory."""
        used = min(self.programs, H200.multi_processor_count)
        return min(BANDWIDTH, used * L2_BYTES * CLOCK)

    @property
    def takes(self) -> tuple[int, ...]:
        """Registers, bytes of shared memory and threads that its programs take of the busiest multiprocessor."""
        warp_registers = ceil_div(self.measured["registers"] * 32, 256) * 256
        each = warp_registers * self.num_warps, self.measured["shared"] + 1024, 32 * self.num_warps
        return tuple(self.busiest * one for one in each)

    def beside(self, other: Judged) -> bool:
        """Whether the programs of both fit on a multiprocessor at once."""
        limits = (
            H200.regs_per_multiprocessor, H200.shared_memory_per_multiprocessor, H200.max_threads_per_multi_processor
        )  # fmt: skip
        return all(mine + others <= limit for mine, others, limit in zip(self.takes, other.takes, limits))


@functools.cache
def compiled(variant) -> tuple[dict, list, str]:
    made = compile_variant(variant, ARCH)
    return measure(made), disassemble(made.asm["cubin"]), made.asm["ptx"]


def broken(launched: Launch, text: str, written_by_step: frozenset[int]) -> tuple[str, ...]:
    """The rules that a dependent launch breaks: what it does before its wait, while the launches before still run.

    Args:
        text: its PTX.
        written_by_step: storages that a node of the step writes.
    """
    if not launched.dependent:
        return ()
    found = [] if ptx.waits(text) else ["it can end without a wait"]
    found += [f"writes before its wait: {store}" for store in ptx.stores_before_wait(text)]
    for name in sorted(ptx.loads_before_wait(text, launched.pointers)):
        if name == ptx.UNKNOWN or storage(launched.tensors[name]) in written_by_step:
            found.append(f"reads before its wait what the step writes: {name}")
    return tuple(found)


def judge(launched: Launch, written_by_step: frozenset[int], watch: Callable | None = None) -> Judged:
    """What a launch does, compiled for 9.0; see `Judged`, and `program.run` for `watch`."""
    variant, tensors = launched.variant, launched.tensors
    measured, code, text = compiled(variant)
    fixed = {name for name, tensor in tensors.items() if storage(tensor) not in written_by_step}
    resident = resident_programs(measured["registers"], measured["shared"], variant.num_warps, H200)
    resident //= H200.multi_processor_count
    busiest = min(resident, ceil_div(launched.programs, H200.multi_processor_count))
    state = begin(variant.signature, launched.integers, 32 * variant.num_warps)
    program = run(walk(code, state), frozenset(fixed), variant.num_warps, busiest, watch)
    matrices = {name for name in fixed if sum(size >= MATRIX for size in tensors[name].shape) >= 2}
    # what other programs read in the place of what the first one does
    unseen = matrices & ptx.reads(text, launched.pointers) - set().union(*program.loads)
    before, after, narrow, asked = 0.0, 0.0, set(), 0
    for names, (early, late) in program.loads.items():
        if not names or not names <= fixed or not early + late:
            continue
        whole = sum(tensors[name].numel() * tensors[name].itemsize for name in names)
        if names & matrices:
            whole += sum(tensors[name].numel() * tensors[name].itemsize for name in unseen)
            asked += program.asked[names]
            narrow |= set(names) if program.widths[names] != {16} else set()
        share = min(1.0, whole / ((early + late) * launched.programs))
        before += share * early * launched.programs
        after += share * late * launched.programs
    return Judged(
        *(measured, program, launched.programs, variant.num_warps, launched.dependent, resident, before, after),
        *(tuple(sorted(narrow)), asked, len(state.guessed), broken(launched, text, written_by_step)),
    )


def timeline(nodes: Sequence[Judged | Operation]) -> list[float]:
    """When each node of a step ends, in seconds, where such steps follow each other.

    Memory serves what is asked for in order, at `BANDWIDTH`. A launch begins `ORDINARY_SECONDS` after the one before
    has ended. A dependent one begins `DEPENDENT_SECONDS` after that one lets it, but not before that one's end if both
    do not fit on a multiprocessor, and never before the end of the one before that: no more than two run at once. It
    goes on behind its wait `DEPENDENT_SECONDS` after the end of the one before. It ends when its program has, which may
    wait for memory, or when the last bytes have come and what follows them is done.
    """
    ends: list[float] = []
    last_start = wait = end = before_last = memory = 0.0
    last: Judged | Operation | None = None
    for node in [*nodes] * 2:
        if isinstance(node, Operation):
            last_start = wait = end + ORDINARY_SECONDS
            finished = max(wait, memory) + node.nbytes / BANDWIDTH
            memory = finished if node.nbytes else memory
        else:
            program, early = node.program, node.dependent
            start = end + (DEPENDENT_SECONDS if early else ORDINARY_SECONDS)
            if early and isinstance(last, Judged) and last.program.release is not None:
                release, prologue = last.program.release / CLOCK, last.program.prologue / CLOCK
                released = wait + release if release >= 0 else last_start + prologue + release
                start = max(released + DEPENDENT_SECONDS, before_last if last.beside(node) else end)
            wait = max(start + program.prologue / CLOCK, end + DEPENDENT_SECONDS if early else start)
            finished, memory = _run(node, start, wait, memory)
            last_start = start
        before_last, end, last = end, finished, node
        ends.append(end)
    first = ends[len(nodes) - 1]
    return [one - first for one in ends[len(nodes) :]]


def _run(node: Judged, start: float, wait: float, memory: float) -> tuple[float, float]:
    """When a launch ends that begins and waits then, and when memory has served it."""
    program, latency = node.program, DRAM_CLOCKS / CLOCK
    clocks, first, last = (value / CLOCK * node.waves for value in (program.clocks, program.first, program.last))
    needed = wait + first
    if node.before:
        memory = max(memory, start + latency) + node.before / node.bandwidth
        needed = max(needed, memory)
    finished = needed + clocks - first
    if node.after:
        memory = max(memory, wait + latency) + node.after / node.bandwidth
        finished = max(finished, memory + clocks - last)
    return finished, memory


def judge_step(run: Callable[[], object], steps: int = 1, follow: int | None = None) -> dict:
    """What the record says of what launches steps: nodes of one by kind, the time that the model gives, its launches.

    Launches that do the same are one line, whose `exposed_us` is the mean time from the end of the node before to its
    own. That of a line which is to be followed is printed, see `_watch`.
    """
    nodes = trace(run)
    alike: dict[tuple, Launch] = {}
    for node in nodes:
        if isinstance(node, Launch):
            alike.setdefault(node.alike, node)
    by_step = written(nodes, lambda node: ptx.writes(compiled(node.variant)[2], node.pointers) - {ptx.UNKNOWN})
    judged = {
        kind: judge(node, by_step, _watch if number == follow else None)
        for number, (kind, node) in enumerate(alike.items(), 1)
    }
    done = [judged[node.alike] if isinstance(node, Launch) else node for node in nodes]
    ends = timeline(done)
    took = [end - before for end, before in zip(ends, [0.0, *ends])]
    lines = []
    for kind, node in alike.items():
        own = [seconds for one, seconds in zip(nodes, took) if isinstance(one, Launch) and one.alike == kind]
        line = identify(node.variant, ARCH) | dict(key=key(node.variant, ARCH), dependent=node.dependent)
        exposed = dict(count=len(own) / steps, exposed_us=_round(sum(own) / len(own) * 1e6))
        lines.append(line | columns(judged[kind]) | exposed)
    nbytes = sum(one.before + one.after for one in done if isinstance(one, Judged)) / steps
    return dict(
        nodes=len(nodes) / steps, dependent=sum(isinstance(node, Launch) and node.dependent for node in nodes) / steps,
        operations=dict(Counter(node.name for node in nodes if isinstance(node, Operation))), bytes=round(nbytes),
        floor_us=_round(nbytes / BANDWIDTH * 1e6), step_us=_round(ends[-1] / steps * 1e6), launches=lines,
    )  # fmt: skip


def _watch(clock: float, instruction: Instruction, made_of: frozenset[str], threads: int) -> None:
    """Print what a program asks for, writes and waits for, with the clock, which the wait sets to 0."""
    if made_of or instruction.name in ("BAR", "DEPBAR", "MEMBAR", WAIT, RELEASE, "EXIT"):
        print(f"{clock:8.0f}  {instruction.opcode:32} {threads:5} threads  {', '.join(sorted(made_of))}")


def columns(judged: Judged) -> dict:
    """What the table and the record say of a launch."""
    program = judged.program
    return dict(
        programs=judged.programs, registers=judged.measured["registers"], spilled=judged.measured["spilled"],
        shared=judged.measured["shared"], resident=judged.resident, waves=judged.waves,
        early_bytes=round(judged.in_flight), late_bytes=round(judged.after / judged.programs * judged.busiest),
        early_loads=judged.asked, early_trips=program.early_trips, narrow=list(judged.narrow), trips=program.trips,
        barriers=program.barriers, tensor=program.tensor, products=program.products, guessed=judged.guessed,
        prologue_us=_round(program.prologue / CLOCK * 1e6), after_us=_round(program.clocks / CLOCK * 1e6),
        broken=list(judged.broken),
    )  # fmt: skip


def write_record(path: Path, found: list[dict]) -> None:
    """Write steps as JSON, a line a launch."""
    text = json.dumps(dict(constants=constants(), steps=found))
    path.write_text(re.sub(r' ?(?={"(?:model|kernel)")', "\n", text) + "\n")


def _round(number: float) -> float:
    return float(f"{number:.3g}")


def constants() -> dict:
    """What the model rests on, for the record."""
    return dict(
        bandwidth=BANDWIDTH, clock=CLOCK,
        ordinary_us=_round(ORDINARY_SECONDS * 1e6), dependent_us=_round(DEPENDENT_SECONDS * 1e6),
        l2_clocks=L2_CLOCKS, dram_clocks=DRAM_CLOCKS, fence_clocks=FENCE_CLOCKS,
    )  # fmt: skip


TABLE = (
    "count", "kernel", "programs", "num_warps", "registers", "spilled", "shared", "resident", "waves", "early_bytes",
    "late_bytes", "early_loads", "early_trips", "trips", "barriers", "tensor", "products", "prologue_us", "after_us",
    "exposed_us",
)  # fmt: skip


def show(found: dict) -> str:
    """One step as a table: a line a kind of launch, and the totals."""
    rows = [
        TABLE,
        *([f"{line[name]:g}" if name == "count" else str(line[name]) for name in TABLE] for line in found["launches"]),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(TABLE))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    for line, shown in zip(found["launches"], lines[1:].copy()):
        notes = [f"reads {', '.join(line['narrow'])} by less than 16 bytes"] if line["narrow"] else []
        notes += line["broken"]
        lines[lines.index(shown)] = shown + "".join(f"\n    {note}" for note in notes)
    operations = ", ".join(f"{count} {name}" for name, count in found["operations"].items()) or "none"
    head = f"{found['model']}, {found['step']}: {found['step_us']:.0f} us, floor {found['floor_us']:.0f} us"
    return "\n".join(
        [f"{head}; {found['nodes']:g} nodes, {found['dependent']:g} dependent; PyTorch's: {operations}", *lines]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/proof/step_model.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, nargs="+", default=MODELS)
    parser.add_argument("--record", action="store_true", help=f"write {DEFAULT_RECORD.name}, of all models")
    parser.add_argument("--follow", type=int, metavar="LINE", help="print what a program of that line does, by clocks")
    options = parser.parse_args(arguments)
    if options.record and set(options.model) != set(MODELS):
        parser.error("--record takes all models: without --model")
    found = [
        dict(model=model, step=name) | judge_step(*make(model), options.follow)
        for model in options.model
        for name, make in STEPS.items()
    ]
    print("\n\n".join(map(show, found)))
    print(f"\n{'':12}" + "".join(f"{name:>24}" for name in STEPS))
    for model in options.model:
        times = {one["step"]: one["step_us"] for one in found if one["model"] == model}
        goal = f"   goal {GOALS[model] * 1e6:.0f} us" if model in GOALS else ""
        print(f"{model:12}" + "".join(f"{times[name]:21.0f} us" for name in STEPS) + goal)
    if options.record:
        write_record(DEFAULT_RECORD, found)
    return int(any(line["broken"] for one in found for line in one["launches"]))


if __name__ == "__main__":
    sys.exit(main())
