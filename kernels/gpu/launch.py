"""How kernels are launched and checked, and how their launches are recorded for compilation without a device."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from ..arguments import flat

TYPE_NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
FLOATS = torch.float32, torch.bfloat16, torch.float16
MAX_DIM = 4096  # longer rows do not fit the registers of a program, in backward of a norm

LAUNCHERS: dict[str, Callable] = {}  # what custom operations run, by their names
_local = threading.local()


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel: what Triton's compiler is given besides the target."""

    kernel: object
    signature: tuple[tuple[str, str], ...]  # the Triton type of every argument, "constexpr" for the constants
    constants: tuple[tuple[str, object], ...]  # constexprs, arguments that are None, and integers that are 1
    num_warps: int
    num_stages: int
    flags: tuple[tuple[str, int], ...]  # other options of the launch, such as ("launch_pdl", True)
    divisible: tuple[str, ...] = field(compare=False)  # arguments that are multiples of 16: any call may differ


def launch(
    kernel,
    grid: tuple[int, ...],
    *args,
    num_warps: int,
    num_stages: int,
    cooperative: bool = False,
    dependent: bool = False,
    chained: bool = False,
    registers: int | None = None,
    **constants,
) -> None:
    """Run `kernel[grid]` on the device of its tensors; within `instead`, hand it over instead.

    Args:
        kernel: a `triton.jit` function whose run-time arguments come first and whose constexprs come last.
        grid: programs along up to three axes.
        *args: the run-time arguments, in order: tensors, ints or floats. None is passed as a constant.
        cooperative: all programs run at once, or the launch fails.
        dependent: it may begin before the launch before it has ended (compute capability 9.0).
        chained: the same within `chain`, but for the first launch there.
        registers: of a thread, at most; None for as many as the compiler likes.
        **constants: the constexprs, by name.
    """
    options = dict(num_warps=num_warps, num_stages=num_stages)
    if cooperative:
        options["launch_cooperative_grid"] = True
    if registers is not None:
        options["maxnreg"] = registers
    links = getattr(_local, "links", None)
    if chained and links is not None:
        dependent, _local.links = links > 0, links + 1
    if dependent:
        options["launch_pdl"] = True
    if (other := getattr(_local, "instead", None)) is not None:
        other(kernel, grid, args, options, constants)
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "cuda":
        with on(device):
            kernel[grid](*args, **options, **constants)
    elif interpreted():
        if reason := interpreter_fault():
            raise InterpreterFault(reason)
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
    else:
        raise RuntimeError(f"Triton kernels need CUDA tensors, not {device}; or the interpreter, TRITON_INTERPRET=1")


@contextlib.contextmanager
def chain(device: torch.device) -> Iterator[None]:
    """Let launches that can depend on the one before: they begin while it runs, and wait for it behind their weights.

    Within it nothing may write weights, tables or what else kernels read before they wait; the first launch waits for
    all that was launched before. Without compute capability 9.0 nothing changes.
    """
    outer, _local.links = getattr(_local, "links", None), 0 if can_depend(device) else None
    try:
        yield
    finally:
        _local.links = outer


def in_chain() -> bool:
    """Whether kernels are launched in a `chain`, and so must wait."""
    return getattr(_local, "links", None) is not None


def can_depend(device: torch.device) -> bool:
    """Whether launches there may begin before the one before them has ended; "meta" stands for any device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (9, 0)
    return device.type == "meta"


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make a CUDA device the current one, on which Triton launches; it takes time, so only where it is another."""
    return contextlib.nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device)


@contextlib.contextmanager
def instead(call: Callable[..., None] | None) -> Iterator[None]:
    """Hand launches of this thread to `call(kernel, grid, args, options, constants)`, and run none; None for all."""
    outer, _local.instead = getattr(_local, "instead", None), call
    try:
        yield
    finally:
        _local.instead = outer


@contextlib.contextmanager
def recording() -> Iterator[list[Variant]]:
    """Collect the variants that launchers choose, and launch nothing: they may be called with meta tensors."""
    recorded: list[Variant] = []
    with instead(functools.partial(_record, recorded)):
        yield recorded


def _record(recorded: list[Variant], kernel, grid, args: tuple, options: dict, constants: dict) -> None:
    """Note a variant as Triton specialises a launch: by None, by integers that are 1, and by multiples of 16."""
    # the interpreter's functions keep what `triton.jit` was given
    general = getattr(kernel, "do_not_specialize", None) or getattr(kernel, "kwargs", {}).get("do_not_specialize") or ()
    signature, divisible, constants = {}, [], dict(constants)
    for name, value in zip(kernel.arg_names, args):
        special = name not in general
        if value is None or (special and type(value) is int and value == 1):
            constants[name] = value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPE_NAMES[value.dtype]
            if special and value.storage_offset() * value.element_size() % 16 == 0:  # storages are aligned
                divisible.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                divisible.append(name)
    ordered = tuple((name, "constexpr" if name in constants else signature[name]) for name in kernel.arg_names)
    flags = {name: value for name, value in options.items() if name not in ("num_warps", "num_stages")}
    launched = options["num_warps"], options["num_stages"], tuple(flags.items()), tuple(divisible)
    recorded.append(Variant(kernel, ordered, tuple(sorted(constants.items())), *launched))


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (`TRITON_INTERPRET=1` when the process started)."""
    return not isinstance(_probe, triton.runtime.JITFunction)


class InterpreterFault(RuntimeError):
    """Triton's interpreter cannot run here."""


@functools.cache
def interpreter_fault() -> str:
    """Why the interpreter cannot run here, or "": Triton 3.6 makes numbers of arrays as numpy allowed before 2.4."""
    import numpy

    try:
        _probe[(1,)](1)
    except triton.runtime.errors.InterpreterError as error:
        found = f"Triton {triton.__version__} and numpy {numpy.__version__}"
        return f"{found}: the interpreter fails ({error}); Triton 3.6 needs numpy < 2.4 to interpret kernels"
    return ""


@triton.jit
def _probe(count):
    for _ in range(count):
        pass


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result, on the device of `like` and in its dtype by default. All launchers allocate here."""
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)  # torch reads its own Size slower


def custom_op(name: str, launcher: Callable, results: Callable, *, flatten: bool = True) -> torch.library.CustomOpDef:
    """Make a launcher an operation `fastprior::name` of PyTorch, which changes none of its arguments.

    Args:
        results: takes what the launcher takes, and makes the results without their values.
        flatten: both begin with a tuple, whose fields are arguments of the operation: see `arguments.flat`.
    """
    schema = None
    if flatten:
        (launcher, schema), (results, _) = flat(launcher), flat(results)
    LAUNCHERS[f"fastprior::{name}"] = launcher
    operation = torch.library.custom_op(f"fastprior::{name}", launcher, mutates_args=(), schema=schema)
    operation.register_fake(results)
    return operation


def by_reference(op, reference: Callable) -> None:
    """Give a custom op the gradient of its reference, of the same arguments and results, run again in backward."""

    def setup_context(ctx, inputs, output):
        ctx.others = [None if isinstance(i, Tensor) else i for i in inputs]
        ctx.save_for_backward(*(i if isinstance(i, Tensor) else None for i in inputs))

    def backward(ctx, *grads):
        with torch.enable_grad():
            inputs = [other if t is None else t.detach() for t, other in zip(ctx.saved_tensors, ctx.others)]
            wanted = [i for i, need in zip(inputs, ctx.needs_input_grad) if need]
            for tensor in wanted:
                tensor.requires_grad_()
            outputs = reference(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [(o, g) for o, g in zip(outputs, grads) if g is not None and o.requires_grad]
            found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        return tuple(next(found) if need else None for need in ctx.needs_input_grad)

    op.register_autograd(backward, setup_context=setup_context)


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...] = FLOATS) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be one of {names}")


def check(
    like: Tensor,
    dtypes: tuple[torch.dtype, ...] | None = FLOATS,
    *,
    contiguous: bool = False,
    **tensors: tuple[Tensor | None, tuple[int, ...]],
) -> None:
    """Raise TypeError or ValueError unless tensors fit a kernel.

    Args:
        like: they must be on its device.
        dtypes: those allowed; None for any.
        contiguous: in the last dimension.
        **tensors: each with the shape that it must have, without zeros; None is let pass.
    """
    device = like.device
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            continue
        if dtypes is not None:
            check_dtype(name, tensor, dtypes)
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}")
        if tensor.numel() == 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; no dimension may be zero")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on {device}, as the other tensors are")
        if contiguous and tensor.ndim and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            stride = tensor.stride(-1)
            raise ValueError(f"{name} has stride {stride} in its last dimension; it must be contiguous there")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def row_block(dim: int) -> int:
    """The block of a program that holds rows whole; short ones need no variants of their own."""
    if dim > MAX_DIM:
        raise ValueError(f"dim={dim}; it must be at most {MAX_DIM}")
    return max(power_of_2(dim), 256)


def row_strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """The stride of each in its first dimension; 0 where there is none."""
    return tuple([0 if t is None else t.stride(0) for t in tensors])


def promoted(t: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype that holds all of these."""
    dtype = t.dtype
    for other in others:
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    return dtype


def as_rows(t: Tensor) -> Tensor:
    """(rows, dim), contiguous in the last dimension: a view where it can be one."""
    t = t if t.ndim == 2 else t.reshape(-1, t.shape[-1])
    return t if t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous()
