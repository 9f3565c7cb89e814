"""`fastprior info`: versions, devices, and which fast paths are active."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path

from fastprior.cli.common import add_command
from fastprior.version import __version__

PACKAGES = ("torch", "triton", "numpy", "safetensors")
OPTIONAL = ("open-clip-torch", "embedding-reader", "accelerate", "diffusers", "xformers", "dalle2-pytorch")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    add_command(subparsers, "info", run, "print versions, devices, and which fast paths work here")


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _devices() -> list[tuple[str, str]]:
    import torch

    rows = [("cpu", f"{_cpu_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        rows.append((f"cuda:{index}", f"{device.name}, capability {device.major}.{device.minor}, {memory:.0f} GiB"))
    return rows if len(rows) > 1 else [*rows, ("cuda", "none available")]


def _fast_paths() -> list[tuple[str, str]]:
    """Each fast path, and whether it works here: found out, where that takes no time, by trying."""
    import torch

    from fastprior import DiffusionPrior, DiffusionPriorNetwork
    from fastprior.engine.shapes import cpp_compiler
    from fastprior.kernels import ops
    from fastprior.kernels.cpu import blocks, library

    net = DiffusionPriorNetwork(dim=8, depth=1, dim_head=8, heads=1, max_text_len=2)
    plan = DiffusionPrior(net, image_embed_dim=8, timesteps=8, cond_drop_prob=0.1).eval().sampling_plan(8, 2.0)
    reasons = f" ({'; '.join(plan.reasons)})" if plan.reasons else ""
    rows = [
        ("prefix cache", f"{'on' if plan.path == 'cached' else 'off'}, for fastprior's own networks{reasons}"),
        ("null table", f"{'on' if plan.guidance == 'null table' else 'off'}, for guidance without self-conditioning"),
    ]

    compiler, where = cpp_compiler()
    found = f"available on the CPU, C++ compiler {where}" if where else f"not on the CPU, no C++ compiler {compiler}"
    rows.append(("torch.compile", f"{found}; PriorSampler compiles steps that are no calls of C"))

    forced = f"off, FASTPRIOR_KERNELS={ops.forced()}" if ops.forced() else None
    why = forced or (library.unavailable() and f"off, {library.unavailable()}")
    most = (f"{blocks.most_tokens(d)} in {str(d).removeprefix('torch.')}" for d in library.KINDS)
    if not why:
        paid = "" if library.quota() is None else f" (a control group pays for {library.quota():g} cores)"
        why = f"on, threads: {library.thread_count()}{paid}, for as many tokens at once: {', '.join(most)}"
    rows.append(("CPU kernels", why))

    cuda = torch.cuda.is_available()
    if ops.forced() == "reference":
        triton = "off, FASTPRIOR_KERNELS=reference: plain PyTorch runs"
    elif not ops.HAS_TRITON:
        triton = "off, triton is not installed: plain PyTorch runs"
    elif cuda:
        triton = f"on, for CUDA tensors: {', '.join(ops.OPERATIONS)}"
    elif ops.forced() == "triton":
        triton = "on, FASTPRIOR_KERNELS=triton; without a CUDA device they need TRITON_INTERPRET=1"
    else:
        triton = "off, no CUDA device: plain PyTorch runs"
    rows.append(("Triton kernels", triton))
    rows.append(("CUDA graphs", "on, in PriorSampler" if cuda else "off, no CUDA device"))

    # what torch itself asks, by names that are not public: absent means unknown
    checks = {"AMX": "_is_amx_tile_supported", "AVX-512 BF16": "_is_avx512_bf16_supported"}
    probes = {name: getattr(torch.cpu, check) for name, check in checks.items() if hasattr(torch.cpu, check)}
    have = " and ".join(name for name, probe in probes.items() if probe())
    rows.append(("bf16 on the CPU", f"{have or ('no' if probes else 'unknown')} instructions"))
    return rows


def run(args: argparse.Namespace) -> int:
    versions = [("fastprior", __version__), ("python", platform.python_version())]
    versions += [(package, _version_of(package)) for package in (*PACKAGES, *OPTIONAL)]
    for title, rows in (("versions", versions), ("devices", _devices()), ("fast paths", _fast_paths())):
        print(title)
        for name, value in rows:
            print(f"  {name:<17} {value}")
    return 0
