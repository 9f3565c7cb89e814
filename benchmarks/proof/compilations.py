"""Compilations ahead of time: what one takes of the chip, what decides it, and where results are kept."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend

from fastprior.kernels.gpu.launch import Variant

TENSOR_CORES = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)")
MISSED = "missed"  # a dot product that does not use the tensor cores
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MEASURED = "registers", "shared", "spilled", "tensor_cores"


def compile_variant(variant: Variant, arch: int) -> CompiledKernel:
    return triton.compile(source_of(variant), target=GPUTarget("cuda", arch, 32), options=options_of(variant))


def source_of(variant: Variant) -> ASTSource:
    """What Triton compiles of a variant: the kernel, and all that a launch says of its arguments."""
    names = list(variant.kernel.arg_names)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible}
    return ASTSource(variant.kernel, dict(variant.signature), dict(variant.constants), attributes)


def measure(compiled: CompiledKernel) -> dict:
    """Registers of a thread, bytes that it spills, bytes of shared memory, and the tensor cores' instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    instruction = TENSOR_CORES.search(compiled.asm["ptx"])
    without = MISSED if "tt.dot" in compiled.asm["ttir"] else ""
    return dict(
        registers=registers,
        shared=compiled.metadata.shared,
        spilled=stack + local,
        tensor_cores=instruction[1] if instruction else without,
    )


def key(variant: Variant, arch: int) -> str:
    """A hash of all that decides what `measure` says of a variant, but for folders, lines and comments of sources."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    decides = (
        *(_sources(variant.kernel), variant.signature, variant.constants, sorted(variant.divisible)),
        *(triton.__version__, backend.hash(), backend.parse_options(options_of(variant)).hash()),
        *map(inspect.getsource, (compile_variant, source_of, measure)),
    )
    return hashlib.sha256(repr(decides).encode()).hexdigest()[:16]


def options_of(variant: Variant) -> dict:
    return dict(num_warps=variant.num_warps, num_stages=variant.num_stages, **dict(variant.flags))


@functools.cache
def _sources(kernel) -> tuple[str, ...]:
    """The sources of a kernel and of all that it calls, and the values that they name; Triton's own go by its version.

    Triton's `cache_key` has line numbers and comments too: with it a record would change with every line above.
    """
    found, waiting = {}, [kernel]
    while waiting:
        function = waiting.pop()
        name = f"{function.fn.__module__.rpartition('.')[2]}.{function.fn.__qualname__}"
        if name in found:
            continue
        tree = ast.parse(function.src)
        body = tree.body[0].body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[:1]  # the docstring
            body.extend([] if body else [ast.Pass()])
        found[name] = ast.unparse(tree)
        closure = inspect.getclosurevars(function.fn)
        for node in ast.walk(tree):
            value = _value(node, closure.globals | closure.nonlocals)
            if isinstance(value, triton.runtime.JITFunction):
                if not value.fn.__module__.startswith("triton."):
                    waiting.append(value)
            elif isinstance(value, tl.constexpr | int | float | str):
                found[f"{name}: {ast.unparse(node)}"] = repr(getattr(value, "value", value))
            elif value is not None and not isinstance(value, ModuleType) and not _of_triton(value):
                raise TypeError(f"{name} names {ast.unparse(node)}, a {type(value).__name__}, which has no source here")
    return tuple(f"{name}\n{text}" for name, text in sorted(found.items()))


def _value(node: ast.AST, variables: dict) -> object:
    """The value of a name, or of an attribute of a module; None if that is not known before the kernel runs."""
    if isinstance(node, ast.Name):
        return variables.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, variables)
        return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
    return None


def _of_triton(value: object) -> bool:
    return (getattr(value, "__module__", None) or "").split(".")[0] == "triton"


class Kept:
    """Results of compilations, by key, in a file; one that is not whole is as good as none, and is made again."""

    def __init__(self, path: Path):
        self.path = path
        self.measured = self._read()

    def _read(self) -> dict[str, dict]:
        try:
            content = json.loads(self.path.read_bytes())
            return {key: dict(zip(MEASURED, values, strict=True)) for key, values in content.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def add(self, measured: dict[str, dict]) -> None:
        """Write these beside what is in the file by now; where two processes write at once, one's may be lost."""
        self.measured = self._read() | self.measured | measured
        text = json.dumps({key: [values[name] for name in MEASURED] for key, values in self.measured.items()})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            part = Path(folder, self.path.name)
            part.write_text(text)
            part.replace(self.path)
