"""Compile every kernel ahead of time, on a machine that needs no GPU, and say what each takes of the chip.

    python benchmarks/proof/resources.py [--arch 80 90 100] [--only NAME] [--full] [--limits FILE] [--record]

prints a table of registers, shared memory, spills and tensor-core use, and fails where a kernel does not compile, does
not fit, leaves out the tensor cores that it should use, or takes more than its limits. `cases` reach every launch
configuration that the launchers can choose.

Registers and spills are limited by what the record of this version of Triton says, benchmarks/records/resources/ in a
checkout, or the one that `--limits` names; without one they are not judged. A record admits no spill that
`SPILLS_KNOWN` does not name.

What was compiled before, by `compilations.key`, is not compiled again: results are kept in `$FASTPRIOR_CACHE` or
~/.cache/fastprior. Lines of the record with the same key count too, but every day some others of them, a twenty-fifth,
are compiled all the same, and have to agree. `--full` compiles everything.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from cases import cases
from compilations import MEASURED, MISSED, Kept, compile_variant, key, measure

from fastprior.kernels.cpu.cache import cache_dir
from fastprior.kernels.gpu.launch import Variant, interpreted, recording

ARCHITECTURES = 80, 90, 100
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block can have
VERSION = re.match(r"\d+(\.\d+)*", triton.__version__)[0]
RECORDS = Path(__file__).resolve().parents[1] / "records" / "resources"
DEFAULT_RECORD = RECORDS / f"triton-{VERSION}.jsonl"
IDENTITY = "kernel", "arch", "pointers", "constants", "num_warps", "num_stages"
SAMPLED = 25  # one of so many lines of a record is compiled each day
OWN_ACCORD = 32  # bytes that the assembler keeps on the stack to use fewer registers than it may: all kernels may
WIDE = "8 or 16 bytes in a loop over all columns or rows; no smaller tile was tried"
UNALIGNED = "heads of 65 to 127 features that are no multiple of 16: every element takes an address of its own"


@dataclass(frozen=True)
class Spill:
    """A spill that is known, and put up with."""

    kernel: str
    dtypes: tuple[str, ...]  # types that its first argument may have
    words: str  # of its description
    limits: dict[str, int]  # bytes, by version of Triton
    why: str  # the reason, and what it costs

    def is_of(self, line: dict) -> bool:
        first = re.split(r"[ *]", line["pointers"])[0]
        return self.kernel == line["kernel"] and first in self.dtypes and self.words in line["constants"]


SPILLS_KNOWN = (
    Spill(
        *("_decode_attention_fwd_kernel", ("fp32",), "unaligned BLOCK_D=128"),
        *({"3.6.0": 184, "3.8.0": 136, "3.9.0": 208}, UNALIGNED),
    ),
    Spill(
        *("_decode_attention_fwd_kernel", ("bf16",), "unaligned BLOCK_D=128"),
        *({"3.6.0": 176, "3.8.0": 24, "3.9.0": 224}, UNALIGNED + "; over a cache of fp32"),
    ),
    Spill("_decode_attention_fwd_kernel", ("bf16",), "BLOCK_D=64 BLOCK_M=16 BLOCK_N=64", {"3.9.0": 16}, WIDE),
    Spill(
        *("_skinny_linear_fwd_kernel", ("bf16",), "AHEAD=8 BLOCK_M=8 CHUNKS=32", {"3.6.0": 64}),
        "on 8.0, where no launch is limited to fewer registers",
    ),
    Spill(
        *("_skinny_linear_fwd_kernel", ("bf16",), "AHEAD=2 BLOCK_M=16 CHUNKS=2 HOLDS", {"3.8.0": 64, "3.9.0": 88}),
        "of 16 rows that are held beside weights of 8 bits; with fewer weights ahead the wait would show",
    ),
    Spill(
        *("_attend_project_fwd_kernel", ("bf16",), "HEADS=16 OPERAND=bf16 REST=16 TOKENS=4", {"3.6.0": 8, "3.9.0": 8}),
        "on 8.0, of more heads than the published configurations have",
    ),
    Spill("_attention_bwd_dq_kernel", ("fp32",), "DIM=100", {"3.6.0": 8, "3.8.0": 16, "3.9.0": 16}, UNALIGNED),
    Spill("_attention_bwd_dq_kernel", ("fp32",), "DIM=128", {"3.9.0": 8}, WIDE),
    Spill("_attention_bwd_dkv_kernel", ("fp32",), "DIM=128", {"3.6.0": 8}, WIDE),
    Spill("_attention_bwd_dbias_kernel", ("bf16",), "DIM=100", {"3.6.0": 8}, UNALIGNED),
    Spill("_attention_fwd_kernel", ("fp32",), "DIM=100", {"3.6.0": 8}, UNALIGNED),
    Spill(
        *("_attention_fwd_kernel", ("bf16", "fp16"), "DIM=100", {"3.6.0": 24, "3.8.0": 24}),
        UNALIGNED + "; a tile that spills none has half the columns, and would cost more",
    ),
    Spill(
        *("_attention_fwd_kernel", ("bf16", "fp16"), "BLOCK_M=128", {"3.8.0": 8, "3.9.0": 8}),
        "on 8.0, of a tile that reads keys half as often as the next",
    ),
    Spill(
        *("_matvec_chain_fwd_kernel", ("fp32",), "AHEAD=2", {"3.8.0": 40}),
        "of the 128 registers that 16 warps have the weights of two phases take 52; of a benchmark, and in no model",
    ),
)


def variants(arch: int) -> list[Variant]:
    """Every variant that the cases reach, once."""
    with recording() as recorded:
        for case in cases(arch):
            case()
    return list(dict.fromkeys(recorded))


def identify(variant: Variant, arch: int) -> dict:
    """The fields that tell a variant from the others of all kernels, whatever its compilation gives."""
    return dict(
        kernel=variant.kernel.__name__,
        arch=arch,
        pointers=pointers(variant),
        constants=describe(variant),
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
    )


def pointers(variant: Variant) -> str:
    """The types of the arguments that are pointers, in order: `fp32 bf16*3 -`; - for one that is absent."""
    kinds = (
        kind[1:] if kind.startswith("*") else "-"
        for name, kind in variant.signature
        if kind.startswith("*") or name.endswith("_ptr")
    )
    counted = ((kind, len(list(alike))) for kind, alike in itertools.groupby(kinds))
    return " ".join(kind if count == 1 else f"{kind}*{count}" for kind, count in counted)


def describe(variant: Variant) -> str:
    """The constants in short: `BLOCK_M=64 CAUSAL`; flags that are off and absent arguments are left out.

    `unaligned` where `dim_head` is given at run time and is no multiple of 16.
    """
    given = {name for name, kind in variant.signature if kind != "constexpr"}
    words = ["unaligned"] if "dim_head" in given - set(variant.divisible) else []
    words += [
        name if value is True else f"{name}={value}"
        for name, value in variant.constants
        if value is not False and value is not None
    ]
    words += [name if value is True else f"{name}={value}" for name, value in variant.flags]
    return " ".join(words)


def read_record(path: Path) -> dict[tuple, dict]:
    """The lines of a record, by what identifies a variant."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {_identity(line): line for line in lines}


def write_record(path: Path, lines: list[dict]) -> None:
    """Write one line a variant, sorted, so that two records of one state are the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = ({name: line[name] for name in (*IDENTITY, *MEASURED, "key")} for line in sorted(lines, key=_identity))
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in kept))


def _identity(line: dict) -> tuple:
    return tuple(line[name] for name in IDENTITY)


def known_spill(line: dict, version: str = VERSION) -> int:
    """Bytes that this variant may spill with a version of Triton, by `SPILLS_KNOWN`."""
    return max((spill.limits.get(version, 0) for spill in SPILLS_KNOWN if spill.is_of(line)), default=0)


def problem(line: dict, record: dict[tuple, dict] | None, judged: bool = True) -> str:
    """Which rule a variant breaks, or "".

    Args:
        line: what identifies it and what was measured.
        record: the limits of registers and spills, by what identifies a variant; None without any.
        judged: whether spills are; without a record only those of what is recorded now.
    """
    recorded = (record or {}).get(_identity(line))
    if recorded is not None and recorded["key"] == line["key"]:
        for name in MEASURED:
            if recorded[name] != line[name]:
                return f"the record is wrong: {name} {line[name]}, recorded {recorded[name]}"
    if line["shared"] > SHARED_LIMIT[line["arch"]]:
        return f"shared memory beyond {SHARED_LIMIT[line['arch']]}"
    if line["tensor_cores"] == MISSED:
        return "has a dot product and does not use the tensor cores"
    if not judged:
        return ""
    own_accord = OWN_ACCORD if line["registers"] < 240 else 0
    known = max(own_accord, known_spill(line))
    if line["spilled"] > known:
        return f"spills registers: {line['spilled']} bytes; SPILLS_KNOWN and OWN_ACCORD let it spill {known}"
    if record is None:
        return ""
    if line["spilled"] > (own_accord if recorded is None else recorded["spilled"]):
        return f"spills registers: {line['spilled']} bytes, recorded {'none' if not recorded else recorded['spilled']}"
    if recorded is not None and _programs(line) < _programs(recorded):
        return f"takes registers for {_programs(line)} programs a multiprocessor, recorded {_programs(recorded)}"
    return ""


def _programs(line: dict) -> int:
    """How many programs the registers of a multiprocessor hold: 65536, given to warps by 256."""
    return 65536 // (-(-line["registers"] * 32 // 256) * 256 * line["num_warps"])


_jobs: list[tuple[Variant, int]] = []


def _compile_all(jobs: list[tuple[Variant, int]]) -> Iterator[dict | str]:
    """Compile jobs, in order: what was measured of each, or why it does not compile."""
    if jobs:
        _jobs[:] = jobs
        context = multiprocessing.get_context("fork")  # the jobs are handed over by memory
        with ProcessPoolExecutor(min(os.cpu_count(), len(jobs)), context) as pool:
            yield from pool.map(_compile_job, range(len(jobs)))


def _compile_job(number: int) -> dict | str:
    variant, arch = _jobs[number]
    try:
        return measure(compile_variant(variant, arch))
    except Exception as error:  # reported in the table; the others are still compiled
        text = str(error).strip().splitlines()
        return f"does not compile: {type(error).__name__}: {text[-1] if text else ''}"


def check(
    jobs: list[tuple[Variant, int]],
    record: dict[tuple, dict] | None = None,
    kept: Kept | None = None,
    *,
    judged: bool | None = None,
    full: bool = False,
    day: int | None = None,
) -> Iterator[dict]:
    """Find what each variant takes, in order: compile those, on all cores, of which nothing says so already.

    Args:
        jobs: variants and the architectures to compile them for.
        record: see `problem`. A line with the key of now is taken as it stands, unless it is in the sample of the day.
        kept: results of before; those that are compiled are added.
        judged: see `problem`; by default with a record.
        full: compile everything.
        day: number of the day, 0 or more; today by default.
    Yields:
        `identify`, what was measured, `key`, `origin` ("compiled", "cache" or "record") and `problem`.
    """
    if interpreted():
        raise RuntimeError("kernels cannot be compiled in a process that interprets them: unset TRITON_INTERPRET")
    day = int(time.time() // 86400) if day is None else day
    judged = record is not None if judged is None else judged
    lines = [identify(*job) | dict(key=key(*job), origin="compiled") for job in jobs]
    for line in () if full else lines:
        recorded = (record or {}).get(_identity(line), {})
        if kept is not None and line["key"] in kept.measured:
            line |= kept.measured[line["key"]] | dict(origin="cache")
        elif recorded.get("key") == line["key"] and not sampled(line["key"], day):
            line |= {name: recorded[name] for name in MEASURED} | dict(origin="record")
    results = _compile_all([job for job, line in zip(jobs, lines) if line["origin"] == "compiled"])
    compiled = {}
    try:
        for line in lines:
            if line["origin"] == "compiled":
                measured = next(results)
                if isinstance(measured, str):
                    yield line | dict(problem=measured)
                    continue
                line |= measured
                compiled[line["key"]] = measured
            yield line | dict(problem=problem(line, record, judged))
    finally:
        if kept is not None and compiled:
            kept.add(compiled)


def sampled(key: str, day: int) -> bool:
    return hashlib.sha256(f"{day} {key}".encode()).digest()[0] * SAMPLED < 256


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/proof/resources.py", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--only", default="", metavar="NAME", help="kernels with this in their name")
    parser.add_argument("--full", action="store_true", help="compile what was compiled before too")
    parser.add_argument("--limits", metavar="FILE", type=Path, help=f"the record to judge by; {DEFAULT_RECORD}")
    parser.add_argument(
        "--record", metavar="FILE", type=Path, nargs="?", const=DEFAULT_RECORD, help="write a record, judged by none"
    )
    options = parser.parse_args(arguments)
    if options.record and (options.only or set(options.arch) != set(ARCHITECTURES)):
        parser.error("--record takes all kernels and architectures: without --only and --arch")
    path = options.limits or DEFAULT_RECORD
    if options.limits and not path.exists():
        parser.error(f"--limits {path}: no such file")
    record = read_record(path) if path.exists() and not options.record else None
    jobs = [(v, arch) for arch in options.arch for v in variants(arch) if options.only in v.kernel.__name__]
    kept = Kept(cache_dir() / f"resources-triton-{VERSION}.json")
    judged = record is not None or options.record is not None
    columns = "kernel", "arch", "pointers", "num_warps", "num_stages", *MEASURED
    print(*columns, "constants", sep="\t")
    lines = []
    for line in check(jobs, record, kept, judged=judged, full=options.full):
        lines.append(line)
        print(*(line.get(name, "") for name in columns), line["constants"], sep="\t", flush=True)
        if line["problem"]:
            print(f"  PROBLEM: {line['problem']}", flush=True)
    problems = sum(bool(line["problem"]) for line in lines)
    origins = [line["origin"] for line in lines]
    print(f"{len(lines)} variants: {origins.count('compiled')} compiled, {origins.count('cache')} from the cache,"
          f" {origins.count('record')} from the record; {problems} problems")  # fmt: skip
    if not judged:
        print(f"Registers and spills were not judged: there is no {path}.")
        print("`python benchmarks/proof/resources.py --record` makes it, in a checkout.")
    if options.record:
        write_record(options.record, [line for line in lines if "registers" in line])
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
