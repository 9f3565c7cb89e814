"""Machine code of compute capability 9.0 as cuobjdump prints it, with what the assembler wrote into it of its time.

Each instruction says how long the next one waits, and on which of six counters it waits for results of before (Jia et
al. 2018, Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking; the layout is still the same). So what a
warp does, and in which order, needs no guess about which instruction needs which.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

from compilations import CUOBJDUMP

WAIT, RELEASE = "ACQBULK", "PREEXIT"  # `griddepcontrol.wait` and `.launch_dependents`
LOADS, ATOMICS, STORES = ("LDG", "LD", "LDGSTS"), ("ATOMG", "ATOM"), ("STG", "ST", "RED", "REDG")
NONE = 7  # in place of a counter
WORDS = r"(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)"
LINE = re.compile(rf"\s+/\*([0-9a-f]{{4,}})\*/\s+{WORDS}\s*;?\s+/\* 0x[0-9a-f]{{16}} \*/")
SECOND = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/\s*$")


@dataclass(frozen=True)
class Instruction:
    """One instruction, and what the assembler says of its time.

    Attributes:
        address: of it, in bytes.
        guard: the predicate without which it does nothing, or "".
        opcode: with its modifiers: "LDG.E.128".
        operands: as they are printed, those that it writes first.
        stall: clocks before the next one may begin.
        sets: the counter that its result, or None.
        frees: the counter that tells that its operands were read, or None.
        waits: the counters that it waits for.
    """

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    stall: int
    sets: int | None
    frees: int | None
    waits: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def nbytes(self) -> int:
        """Bytes that a thread moves."""
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((sizes[word] for word in self.opcode.split(".")[1:] if word in sizes), 4)


def disassemble(cubin: bytes) -> list[Instruction]:
    """The instructions of a cubin's only kernel, in the order in which they lie."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> list[Instruction]:
    """Instructions of what `cuobjdump -sass` prints."""
    found, lines = [], text.splitlines()
    for line, below in zip(lines, lines[1:]):
        first, second = LINE.match(line), SECOND.match(below)
        if first is None or second is None:
            continue
        address, guard, opcode, operands = first.groups()
        control = int(second[1], 16) >> 41
        sets, frees, mask = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
        found.append(
            Instruction(
                *(int(address, 16), guard or "", opcode, tuple(re.split(r",\s*", operands)) if operands else ()),
                *(control & 15, None if sets == NONE else sets, None if frees == NONE else frees),
                tuple(number for number in range(6) if mask >> number & 1),
            )
        )
    if not found:
        raise ValueError(f"no instructions in what {CUOBJDUMP.name} printed: {text[:200]!r}")
    return found
