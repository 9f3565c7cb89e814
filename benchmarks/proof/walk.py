"""A walk through machine code that knows integers: what the first program of a launch runs, in order.

It knows the launch's integers and all that follows from them, so that loops turn as often as they do on a device, and
masked threads read nothing. All threads are taken to go the way of the first. What cannot be known, such as what an
atomic returns or a comparison of floats, is taken as false where it decides a branch: the code goes on below, as in the
last program of a split sum. Calls, which are the rare ways of divisions, are passed over.
"""

from __future__ import annotations

import operator
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from machine_code import ATOMICS, LOADS, STORES, Instruction

Word = int | np.ndarray  # unsigned words of 32 bits, of all threads or of each
Flag = bool | np.ndarray
WORD = 0xFFFFFFFF
PARAMETERS = 0x210  # where they begin in the bank of constants, on 9.0
COMPARISONS = "ISETP", "PLOP3", "FSETP", "HSETP2", "DSETP", "FCHK"
CARRY = "IADD3", "LEA", "IMAD"  # they may write predicates behind their register
MOST = 1_000_000  # instructions of a walk
REGISTER = re.compile(r"\b(U?R\d+)\b")
PREDICATE = re.compile(r"!?U?P(\d|T)")
PLAIN = re.compile(r"([-~|]?)(U?R\d+|U?RZ)(?:\.reuse)?\|?(?:\.reuse)?")
CONSTANT = re.compile(r"(-?)c\[0x0\]\[(?:(U?R\d+|U?RZ)\+?)?(?:0x([0-9a-f]+))?\]")
JOIN = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}
COMPARE = dict(LT=operator.lt, LE=operator.le, GT=operator.gt, GE=operator.ge, EQ=operator.eq, NE=operator.ne)


@dataclass
class State:
    """What the threads of the first program know: registers, predicates, and which pointers made an address.

    Attributes:
        threads: of the program.
        values: of registers and predicates; those that are missing are not known.
        made_of: names of the pointers among the arguments that a register was computed from.
        constants: words of the bank of constants, by offset.
        pointers: names, by the offset of either of their words.
        guessed: addresses of the branches that were taken as false since nothing was known.
    """

    threads: int
    constants: dict[int, int] = field(default_factory=dict)
    pointers: dict[int, str] = field(default_factory=dict)
    values: dict[str, Word | Flag] = field(default_factory=dict)
    made_of: dict[str, frozenset[str]] = field(default_factory=dict)
    guessed: set[int] = field(default_factory=set)

    def predicate(self, text: str) -> Flag | None:
        value = True if text.endswith("T") else self.values.get(text.lstrip("!"))
        return value if value is None else np.logical_xor(value, text.startswith("!"))

    def value(self, text: str, high: bool = False) -> Word | None:
        """The word of an operand, or that of the register or constant above it."""
        if match := PLAIN.fullmatch(text):
            sign, name = match.groups()
            if name.endswith("RZ"):
                found = 0
            else:
                found = self.values.get(_next(name) if high else name)
            return found if found is None else {"": found, "-": -found & WORD, "~": ~found & WORD}.get(sign)
        if match := CONSTANT.fullmatch(text):
            offset = self.offset(match[2], match[3])
            found = None if offset is None else self.constants.get(offset + 4 * high)
            return -found & WORD if found is not None and match[1] else found
        try:
            number = int(text, 16)
        except ValueError:  # a float
            return None
        return (number >> 32 if high else number) & WORD

    def offset(self, index: str | None, number: str | None) -> int | None:
        """Where a constant lies in its bank: at a number, or at a register's value and a number."""
        begin = self.value(index) if index else 0
        return None if begin is None else int(_first(begin)) + int(number or "0", 16)

    def origins(self, operands: tuple[str, ...]) -> frozenset[str]:
        """The pointers that some operands were made of."""
        found: set[str] = set()
        for text in operands:
            for name in REGISTER.findall(text):
                found |= self.made_of.get(name, frozenset())
            for _, index, number in CONSTANT.findall(text):
                offset = self.offset(index, number)
                found |= {self.pointers[offset]} if offset in self.pointers else set()
        return frozenset(found)

    def address(self, instruction: Instruction) -> frozenset[str]:
        """The pointers that the address of an access of global memory was made of."""
        text = next(text for text in reversed(instruction.operands) if "[" in text)
        registers = REGISTER.findall(text.rpartition("[")[2])
        above = [_next(name) for name in registers if ".64" in text]
        return frozenset().union(*(self.made_of.get(name, frozenset()) for name in (*registers, *above)))

    def write(self, name: str, value: Word | Flag | None, guard: Flag | None = True) -> None:
        """Keep what threads write whose guard is true; what is not known of one of them is of none."""
        if name in ("RZ", "URZ", "PT", "UPT"):
            return
        before = self.values.get(name)
        if guard is None or (before is None and not np.all(guard)):
            value = None
        elif value is not None and not np.all(guard):
            value = np.where(guard, value, before)
        if value is None:
            self.values.pop(name, None)
        else:
            self.values[name] = value


def _first(values: Word | Flag) -> int | bool:
    """Those of the first thread, whose way all are taken to go."""
    return values if isinstance(values, int) else values.flat[0] if values.ndim else values.item()


def _next(name: str) -> str:
    letters = name.rstrip("0123456789")
    return f"{letters}{int(name[len(letters) :]) + 1}"


def begin(signature: tuple[tuple[str, str], ...], values: dict[str, int], threads: int) -> State:
    """The state in which the first program of a launch begins.

    Args:
        signature: names and Triton's types of all arguments, see `launch.Variant`.
        values: of those that are integers.
    """
    state, offset = State(threads), PARAMETERS
    for name, kind in signature:
        if kind == "constexpr":
            continue
        size = 8 if kind.startswith("*") or kind in ("i64", "fp64") else 4
        offset += -offset % size
        for word in range(size // 4):
            if kind.startswith("*"):
                state.pointers[offset + 4 * word] = name
            elif kind.startswith("i"):
                state.constants[offset + 4 * word] = int(values[name]) >> 32 * word & WORD
        offset += size
    return state


def walk(code: list[Instruction], state: State) -> Iterator[tuple[Instruction, frozenset[str], int]]:
    """The instructions that the first program runs, in order, all its threads the way of the first.

    Yields:
        each; where it reads or writes global memory the names of the arguments that its address was made of; and how
        many threads its predicates let take part: all, where that is not known.
    """
    at = {instruction.address: number for number, instruction in enumerate(code)}
    number = steps = 0
    while number < len(code):
        instruction, steps = code[number], steps + 1
        if steps > MOST:
            raise RuntimeError(f"a walk of more than {MOST} instructions: a loop whose end was not understood")
        guard = state.predicate(instruction.guard) if instruction.guard else True
        taken = guard is not None and bool(_first(guard))
        memory = instruction.name in LOADS + ATOMICS + STORES
        made_of = state.address(instruction) if memory else frozenset()
        yield instruction, made_of, _count(instruction, guard, state)
        if guard is None and instruction.name in ("BRA", "EXIT"):
            state.guessed.add(instruction.address)
        number += 1
        if instruction.name == "EXIT" and taken:
            return
        if instruction.name == "BRA" and "DIV" not in instruction.opcode.split("."):  # for threads that part
            others = [state.predicate(text) for text in instruction.operands[:-1]]  # `BRA P0, there`
            if taken and all(other is not None and _first(other) for other in others):
                number = at[int(re.search(r"0x[0-9a-f]+", instruction.operands[-1])[0], 16)]
        elif guard is None or np.any(guard):
            _run(instruction, state, guard)


def _count(instruction: Instruction, guard: Flag | None, state: State) -> int:
    """How many threads take part in an instruction; `LDGSTS` has a predicate for it behind its operands, too."""
    if guard is None or (guard is True and instruction.name != "LDGSTS"):
        return state.threads
    flags = [guard]
    if instruction.name == "LDGSTS" and PREDICATE.fullmatch(instruction.operands[-1]):
        flags.append(state.predicate(instruction.operands[-1]))
    every = np.ones(state.threads, dtype=bool)
    for flag in flags:
        every &= True if flag is None else flag
    return int(every.sum())


def _run(instruction: Instruction, state: State, guard: Flag | None) -> None:
    """Write what an instruction writes; where it is not known, or its guard is not, that is not known any more."""
    operands, count = instruction.operands, 0
    if instruction.name == "R2P":  # which predicates, a mask says
        for number in range(7):
            state.write(f"P{number}", None)
    if instruction.name in (*STORES, "LDGSTS", "R2P") or not operands:
        return
    while count < min(len(operands), 2) and PREDICATE.fullmatch(operands[count]):
        count += 1  # of the predicates that it writes first
    compares, carries = (instruction.name.lstrip("U") in names for names in (COMPARISONS, CARRY))
    target = "" if compares or count == len(operands) or not PLAIN.fullmatch(operands[count]) else operands[count]
    after, written = count + bool(target), list(operands[:count])
    while carries and len(operands) - after > 3 and PREDICATE.fullmatch(operands[after]):
        written.append(operands[after])
        after += 1
    sources = operands[after:]
    results = [] if guard is None else _results(instruction, sources, state)
    predicates = results[1:] if target else results
    for position, name in enumerate(written):
        state.write(name, predicates[position] if position < len(predicates) else None, guard)
    if not target or target.endswith("RZ"):
        return
    made_of = frozenset() if instruction.name in (*LOADS, *ATOMICS, "LDS", "LDSM") else state.origins(sources)
    first = results[0] if results else None
    for word in first if isinstance(first, tuple) else [first] + [None] * (_words(instruction) - 1):
        state.write(target, word, guard)
        keeps = guard is None or not np.all(guard)
        state.made_of[target] = made_of | (state.made_of.get(target, frozenset()) if keeps else frozenset())
        target = _next(target)


def _words(instruction: Instruction) -> int:
    """How many registers an instruction of unknown result writes."""
    modifiers = instruction.opcode.split(".")[1:]
    if instruction.name == "LDSM":
        return int(modifiers[-1]) if modifiers[-1].isdigit() else 1
    if instruction.name == "HMMA" or "128" in modifiers:
        return 4
    return 2 if {"64", "WIDE"} & set(modifiers) or instruction.name == "CS2R" else 1


def _signed(word: Word) -> Word:
    return word - (word >> 31 << 32)


def _results(instruction: Instruction, sources: tuple[str, ...], state: State) -> list:
    """What an instruction of integers writes: the register (a tuple for two), then predicates; [] if not known."""
    name = instruction.name
    name = name[1:] if name.startswith("U") and name[1:] in ALU else name
    if name not in ALU:
        return []
    modifiers = instruction.opcode.split(".")[1:]
    numbers = [text for text in sources if not PREDICATE.fullmatch(text)]
    flags = [state.predicate(text) for text in sources if PREDICATE.fullmatch(text)]
    if name in ("S2R", "S2UR", "CS2R"):
        return _special(numbers[0], modifiers, state.threads)
    if name == "HFMA2":
        return _halves(numbers)
    if name == "LDC" and "64" in modifiers:
        return [(state.value(numbers[0]), state.value(numbers[0], high=True))]
    if name == "IMAD" and {"WIDE", "HI"} & set(modifiers):
        words = _wide(numbers, modifiers, state)
        return [words if "WIDE" in modifiers else words[1]]
    values = [state.value(text) for text in numbers]
    if any(value is None for value in values + flags):
        return []
    if name == "IADD3":  # what is taken away is added as its complement and 1, which may carry
        values = [
            np.where(value == 0, 1 << 32, value) if text[0] == "-" else value for text, value in zip(numbers, values)
        ]
    return ALU[name](values, flags, modifiers)


def _special(name: str, modifiers: list[str], threads: int) -> list:
    """The first program of a launch: its threads have numbers along one axis."""
    if name == "SRZ":
        return [0 if "32" in modifiers else (0, 0)]
    known = {"SR_TID.X": np.arange(threads), "SR_LANEID": np.arange(threads) % 32}
    return [known.get(name, 0)] if name in known or name.startswith(("SR_TID", "SR_CTAID")) else []


def _halves(numbers: list[str]) -> list:
    """Two constants of 16 bits, which is how the assembler likes to write a word."""
    if [text.lstrip("-") for text in numbers[:2]] != ["RZ", "RZ"]:
        return []
    high, low = struct.unpack("<2H", struct.pack("<2e", *map(float, numbers[2:])))
    return [high << 16 | low]


def _wide(numbers: list[str], modifiers: list[str], state: State) -> tuple[Word | None, Word | None]:
    words = [*(state.value(text) for text in numbers), state.value(numbers[2], high=True)]
    if any(word is None for word in words):
        return None, None
    a, b, c, above = (np.asarray(word, dtype=np.int64) for word in words)
    a, b = (a, b) if "U32" in modifiers else (_signed(a), _signed(b))
    with np.errstate(over="ignore"):
        total = a * b + ((above << 32) + c)
    return total & WORD, total >> 32 & WORD


def _multiply(values, flags, modifiers) -> list:
    a, b, c = (np.asarray(word, dtype=np.int64) for word in values)
    with np.errstate(over="ignore"):
        return [a * b + c + (sum(flags) if "X" in modifiers else 0) & WORD]


def _to_float(values, flags, modifiers) -> list:
    """A number of 32 bits as a float's bits, rounded up where that is asked for: how divisions begin."""
    number = np.asarray(values[0] if "U32" in modifiers else _signed(values[0]), dtype=np.int64)
    found = number.astype(np.float32)
    above = np.nextafter(found, np.float32(np.inf))
    return [_word(np.where(("RP" in modifiers) & (found < number), above, found))]


def _to_integer(values, flags, modifiers) -> list:
    if "TRUNC" not in modifiers:
        return []
    return [np.trunc(_float(values[0])).astype(np.int64) & WORD]


def _special_function(values, flags, modifiers) -> list:
    if modifiers != ["RCP"]:
        return []
    with np.errstate(divide="ignore"):
        return [_word(np.float32(1) / _float(values[0]))]


def _float(word: Word) -> np.ndarray:
    return np.asarray(word, dtype=np.int64).astype(np.uint32).view(np.float32)


def _word(number: np.ndarray) -> np.ndarray:
    return np.asarray(number, dtype=np.float32).view(np.uint32).astype(np.int64)


def _add(values, flags, modifiers) -> list:
    total = sum(values) + (sum(flags) if "X" in modifiers else 0)
    return [total & WORD, total >> 32 > 0]


def _lea(values, flags, modifiers) -> list:
    if "HI" in modifiers:
        if "X" in modifiers or "SX32" in modifiers or len(values) < 4:
            return []
        a, b, c, shift = values
        return [(c << shift | a >> 32 - shift) + b & WORD]
    a, b, shift = values
    total = ((a & (1 << 32 - shift) - 1) << shift) + b
    return [total & WORD, total >> 32 > 0]


def _shift(values, flags, modifiers) -> list:
    low, by, high = values
    if modifiers[:2] == ["L", "U32"] and "HI" not in modifiers:
        few = np.minimum(by, 31)
        return [np.where(by < 32, (low & (1 << 32 - few) - 1) << few, 0)]
    if modifiers[0] == "R" and "HI" in modifiers and modifiers[1] in ("U32", "S32"):
        return [(_signed(high) if modifiers[1] == "S32" else high) >> np.minimum(by, 62) & WORD]
    return []


def _bits(values, flags, modifiers) -> list:
    a, b, c, table = values[:4]
    found = 0
    for number in range(8):
        if table >> number & 1:
            found |= (a if number & 4 else ~a) & (b if number & 2 else ~b) & (c if number & 1 else ~c)
    found &= WORD
    return [found, found != 0]


def _compare(values, flags, modifiers) -> list:
    a, b = values
    if "U32" not in modifiers:
        a, b = _signed(a), _signed(b)
    found = COMPARE[modifiers[0]](a, b)
    if "EX" in modifiers:  # these are the upper words; the lower ones were compared before
        found = np.where(a == b, flags[1], found)
    join = JOIN[next(word for word in modifiers if word in JOIN)]
    return [join(found, flags[0]), join(np.logical_not(found), flags[0])]


def _logic(values, flags, modifiers) -> list:
    number = sum(np.asarray(flag, dtype=np.int64) << place for flag, place in zip(flags, (2, 1, 0)))
    return [table >> number & 1 != 0 for table in values]


def _minimum(values, flags, modifiers) -> list:
    a, b = values if len(values) == 2 else (values[0] + values[1] & WORD, values[2])
    a, b = (a, b) if "U32" in modifiers else (_signed(a), _signed(b))
    return [np.where(flags[0], np.minimum(a, b), np.maximum(a, b)) & WORD]


def _extend(values, flags, modifiers) -> list:
    word, bits = values[0] & (1 << values[1]) - 1, values[1]
    return [word if "U32" in modifiers else word - (word >> bits - 1 << bits) & WORD]


ALU: dict[str, Callable[[list, list, list], list]] = {
    "MOV": lambda values, *_: values[:1],
    "R2UR": lambda values, *_: values[:1],
    "LDC": lambda values, *_: values[:1],
    **dict.fromkeys(("S2R", "S2UR", "CS2R", "HFMA2"), None),  # they have no numbers to compute with
    "IMAD": _multiply,
    "I2F": _to_float,
    "I2FP": _to_float,
    "F2I": _to_integer,
    "MUFU": _special_function,
    "IADD3": _add,
    "VIADD": _add,
    "LEA": _lea,
    "SHF": _shift,
    "LOP3": _bits,
    "SEL": lambda values, flags, _: [np.where(flags[0], *values)],
    "ISETP": _compare,
    "PLOP3": _logic,
    "IMNMX": _minimum,
    "VIMNMX": _minimum,
    "VIADDMNMX": _minimum,
    "SGXT": _extend,
    "IABS": lambda values, *_: [abs(_signed(values[0]))],
}
