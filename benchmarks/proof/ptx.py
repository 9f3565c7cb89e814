"""What a kernel does before `griddepcontrol.wait`, read from its PTX: the rules of a launch that begins early.

A dependent launch may read, before its wait, only what no kernel of the step writes, and may write nothing: the kernels
before it still run. What follows its wait comes after all of them, for each of them waited before it ended.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

WAIT = "griddepcontrol.wait"
UNKNOWN = "?"  # of an address that no argument leads to
READS, WRITES = r"ld|ldu|cp\.async|atom|prefetch", "st|red|atom"
LABEL = re.compile(r"(\$?[A-Za-z_][\w$.]*):")
REGISTER = re.compile(r"%\w+|\b[a-z_]\w*\b")


@dataclass
class Code:
    """The instructions of a kernel in PTX, and the arguments that registers were computed from.

    Attributes:
        lines: (guard, opcode, operands), in order.
        labels: the numbers of the lines behind each label; the same name may stand in several scopes.
        made_of: numbers of arguments, by register.
    """

    lines: list[tuple[str, str, str]]
    labels: dict[str, list[int]]
    made_of: dict[str, set[int]] = field(default_factory=dict)


def parse(ptx: str) -> Code:
    """Read the body of the only kernel."""
    body = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx[ptx.index(".entry") :], flags=re.S)
    body = body[body.index("{") + 1 :]
    code = Code([], {})
    for statement in re.split(r";|\n", body):
        statement = statement.strip()
        while match := LABEL.match(statement):
            code.labels.setdefault(match[1], []).append(len(code.lines))
            statement = statement[match.end() :].strip()
        statement = statement.strip("{} \t") if re.fullmatch(r"[{}\s]*", statement) else statement.lstrip("{ \t")
        match = re.match(r"(@!?[%\w]+\s+)?([a-z][\w.:]*)\s*(.*)", statement)
        if match and not statement.startswith("."):
            code.lines.append((match[1] or "", match[2], match[3]))
    _trace(code)
    return code


def _trace(code: Code) -> None:
    """Find what every register was computed from, on any way through the kernel."""
    grown = True
    while grown:
        grown = False
        for _, opcode, operands in code.lines:
            target, sources = _halves(operands)
            if target.lstrip().startswith("["):  # it writes memory
                continue
            found = {int(number) for number in re.findall(r"_param_(\d+)", sources)}  # or where an argument lies
            if opcode.startswith("ld.param") or not re.match(r"(?:ld|atom|ldmatrix)\b", opcode):  # not what lies there
                found = found.union(*(code.made_of.get(name, set()) for name in REGISTER.findall(sources)))
            for name in REGISTER.findall(target):
                known = code.made_of.setdefault(name, set())
                if not found <= known:
                    known |= found
                    grown = True


def _halves(operands: str) -> tuple[str, str]:
    """What an instruction writes, one register or a group in braces, and the rest."""
    match = re.match(r"(\{[^}]*\}|[^,]*),?(.*)", operands, re.S)
    return match[1], match[2]


def before_wait(code: Code) -> list[int]:
    """The numbers of the lines that some way from the start reaches without a wait."""
    seen: set[int] = set()
    waiting = [0]
    while waiting:
        number = waiting.pop()
        if number in seen or number >= len(code.lines):
            continue
        guard, opcode, operands = code.lines[number]
        if opcode == WAIT and not guard:
            continue
        seen.add(number)
        if opcode.split(".")[0] == "bra":
            waiting += code.labels[operands.strip()]
        if guard or opcode.split(".")[0] not in ("bra", "ret", "exit", "trap"):
            waiting.append(number + 1)
    return sorted(seen)


def _is_global(opcode: str, operation: str) -> bool:
    """Whether an access is of global memory, or of a generic address, which may be."""
    words = opcode.split(".")
    if not re.match(rf"(?:{operation})$", ".".join(words[:2]) if words[:2] == ["cp", "async"] else words[0]):
        return False
    return not {"param", "shared", "shared::cta", "local", "const"} & set(words) or words[:2] == ["cp", "async"]


def _arguments(code: Code, numbers: Sequence[int], operation: str, names: Sequence[str | None]) -> set[str]:
    found = set()
    for number in numbers:
        _, opcode, operands = code.lines[number]
        if not _is_global(opcode, operation) or opcode.startswith(("cp.async.commit", "cp.async.wait")):
            continue
        address = re.findall(r"\[([^\]]*)\]", operands)[-1]
        made_of = set().union(*(code.made_of.get(name, set()) for name in REGISTER.findall(address)))
        pointers = {names[one] for one in made_of if one < len(names) and names[one] is not None}
        found |= pointers or {UNKNOWN}
    return found


def waits(ptx: str) -> bool:
    """Whether every way through a kernel waits for the launch before."""
    code = parse(ptx)
    return not any(code.lines[number][1] in ("ret", "exit") for number in before_wait(code))


def loads_before_wait(ptx: str, names: Sequence[str | None]) -> set[str]:
    """The pointers that a kernel reads through before `griddepcontrol.wait`, on any way to it; all, if it has none.

    Args:
        names: of the arguments that it is launched with, in order; None for those that are no pointers.
    Returns:
        names; "?" among them where an address was made of no pointer.
    """
    code = parse(ptx)
    return _arguments(code, before_wait(code), READS, names)


def reads(ptx: str, names: Sequence[str | None]) -> set[str]:
    """The pointers that a kernel reads through, anywhere; see `loads_before_wait`."""
    code = parse(ptx)
    return _arguments(code, range(len(code.lines)), READS, names)


def stores_before_wait(ptx: str) -> list[str]:
    """The instructions that write to global memory before `griddepcontrol.wait`, atomics among them."""
    code = parse(ptx)
    return [
        f"{code.lines[number][1]} {code.lines[number][2]}"
        for number in before_wait(code)
        if _is_global(code.lines[number][1], WRITES)
    ]


def writes(ptx: str, names: Sequence[str | None]) -> set[str]:
    """The pointers that a kernel writes through, anywhere; see `loads_before_wait`."""
    code = parse(ptx)
    return _arguments(code, range(len(code.lines)), WRITES, names)
