"""Compile every kernel ahead of time, on a machine that needs no GPU, and say what each takes of the chip.

    python -m fastprior.kernels.resources [--arch 80 90 100] [--record FILE] [--only NAME]

prints a table of registers, shared memory, spills and tensor-core use, and fails where a kernel does not compile, does
not fit, spills, or leaves out the tensor cores that it should use. `cases` reach every launch configuration that the
launchers can choose; `tests/test_resources.py` holds them to that.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .cases import cases
from .launch import Variant, interpreted, recording

ARCHITECTURES = 80, 90, 100
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block can have
TENSOR_CORES = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
UNTRIED = "no tile that was tried is clean on all chips"
UNALIGNED = "heads of 65 to 127 features that are no multiple of 16: every element takes an address of its own"
OWN_ACCORD = 16  # bytes that the assembler puts on the stack with registers to spare: all may
# (kernel, type of its first input, words of its description): (bytes that it may spill, why)
SPILLS_ALLOWED = {
    ("_attention_bwd_dbias_kernel", "fp32", "DIM=128"): (16, UNTRIED),
    ("_attention_bwd_dbias_kernel", "fp32", "DIM=100"): (272, UNALIGNED),
    ("_attention_bwd_dbias_kernel", "bf16", "DIM=100"): (40, UNALIGNED),
    ("_attention_bwd_dbias_kernel", "fp16", "DIM=100"): (40, UNALIGNED),
    ("_attention_bwd_dq_kernel", "fp32", "DIM=100"): (16, UNALIGNED),
    ("_decode_attention_fwd_kernel", "fp32", "unaligned BLOCK_D=128"): (176, UNALIGNED),
    ("_decode_attention_fwd_kernel", "bf16", "unaligned BLOCK_D=128"): (192, UNALIGNED + "; over a cache of fp32"),
}


def variants(arch: int) -> list[Variant]:
    """Every variant that the cases reach, once."""
    with recording() as recorded:
        for case in cases(arch):
            case()
    return list(dict.fromkeys(recorded))


def compile_variant(variant: Variant, arch: int) -> dict:
    """What one variant takes on one architecture: a record, with `problem` set where it breaks a rule."""
    names = list(variant.kernel.arg_names)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible}
    source = ASTSource(variant.kernel, dict(variant.signature), dict(variant.constants), attributes)
    options = dict(num_warps=variant.num_warps, num_stages=variant.num_stages)
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    ptx = compiled.asm["ptx"]
    instruction = TENSOR_CORES.search(ptx)
    record = dict(
        kernel=variant.kernel.__name__,
        arch=arch,
        dtypes="/".join(dict.fromkeys(kind[1:] for _, kind in variant.signature if kind.startswith("*"))),
        constants=describe(variant),
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        registers=registers,
        shared=compiled.metadata.shared,
        spilled=stack + local,
        tensor_cores=instruction[1] if instruction else "",
        seconds=round(time.perf_counter() - start, 1),
        problem="",
    )
    allowed = OWN_ACCORD if registers < 240 else 0
    for (kernel, dtype, words), (limit, _) in SPILLS_ALLOWED.items():
        if (kernel, dtype) == (record["kernel"], record["dtypes"].split("/")[0]) and words in record["constants"]:
            allowed = limit
    if record["shared"] > SHARED_LIMIT[arch]:
        record["problem"] = f"shared memory beyond {SHARED_LIMIT[arch]}"
    elif record["spilled"] > allowed:
        record["problem"] = "spills registers"
    elif not instruction and "tt.dot" in compiled.asm["ttir"]:
        record["problem"] = "has a dot product and does not use the tensor cores"
    return record


def describe(variant: Variant) -> str:
    """The constants in short: `BLOCK_M=64 CAUSAL`; flags that are off and absent arguments are left out.

    `unaligned` where `dim_head` is given at run time and is no multiple of 16.
    """
    given = {name for name, kind in variant.signature if kind != "constexpr"}
    words = ["unaligned"] if "dim_head" in given - set(variant.divisible) else []
    for name, value in variant.constants:
        if value is True:
            words.append(name)
        elif value is not False and value is not None:
            words.append(f"{name}={value}")
    return " ".join(words)


_jobs: list[tuple[Variant, int]] = []


def _compile_job(number: int) -> dict:
    variant, arch = _jobs[number]
    try:
        return compile_variant(variant, arch)
    except Exception as error:  # reported in the table; the others are still compiled
        text = str(error).strip().splitlines()
        return dict(
            kernel=variant.kernel.__name__,
            arch=arch,
            constants=describe(variant),
            problem=f"does not compile: {type(error).__name__}: {text[-1] if text else ''}",
        )


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES, only: str = "") -> Iterator[dict]:
    """Records of all variants, compiled on all cores, in order."""
    if interpreted():
        raise RuntimeError("kernels cannot be compiled in a process that interprets them: unset TRITON_INTERPRET")
    _jobs[:] = [(v, arch) for arch in architectures for v in variants(arch) if only in v.kernel.__name__]
    context = multiprocessing.get_context("fork")  # the jobs are handed over by memory
    with context.Pool(os.cpu_count()) as pool:
        yield from pool.imap(_compile_job, range(len(_jobs)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastprior.kernels.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--only", default="", metavar="NAME", help="kernels with this in their name")
    parser.add_argument("--record", metavar="FILE", help="write the records as JSON lines")
    options = parser.parse_args(arguments)
    columns = "kernel", "arch", "dtypes", "num_warps", "num_stages", "registers", "shared", "spilled", "tensor_cores"
    print(*columns, "constants", sep="\t")
    records = []
    for record in compile_all(tuple(options.arch), options.only):
        records.append(record)
        print(*(record.get(name, "") for name in columns), record["constants"], sep="\t", flush=True)
        if record["problem"]:
            print(f"  PROBLEM: {record['problem']}", flush=True)
    if options.record:
        versions = dict(triton=triton.__version__, torch=torch.__version__)
        lines = [json.dumps(record | versions) + "\n" for record in records]
        Path(options.record).write_text("".join(lines))
    problems = sum(bool(record["problem"]) for record in records)
    print(f"{len(records)} compilations, {problems} problems")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
