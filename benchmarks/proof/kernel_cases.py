"""Calls of every kernel that reach each launch configuration, as `cases.py` does, with numbers and references.

On the CPU the shapes are small, for Triton's interpreter, and the dtypes those that it computes rightly.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from unittest import mock

import kernel_cache
import torch
from torch import Tensor

from fastprior.kernels import reference
from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.gpu import attend_project, launch, skinny_linear
from fastprior.kernels.gpu.attend_project import launch_attend_project
from fastprior.kernels.gpu.attention import attention
from fastprior.kernels.gpu.barrier import MODES, MODES_FROM_90, matvec_chain_fwd
from fastprior.kernels.gpu.decode import decode_attention
from fastprior.kernels.gpu.linear import MAX_NORM_ROWS, linear
from fastprior.kernels.gpu.norm import layer_norm
from fastprior.kernels.gpu.skinny_linear import Weight, launch_skinny_linear
from fastprior.kernels.gpu.step import RunState, RunTables, diffusion_step, launch_advance
from fastprior.kernels.reference import AttentionArgs, NormArgs, StepArgs
from helpers.kernel_checks import DEVICE, random

SMALL = DEVICE == "cpu" and not kernel_cache.filling()
WIDE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
DTYPES = (WIDE, HALF) if SMALL else (WIDE, HALF, BRAIN)
CAPABILITY = torch.cuda.get_device_capability() if DEVICE == "cuda" else (9, 0)
STORED = [None, torch.int8, *([torch.float8_e4m3fn] if CAPABILITY >= (8, 9) else [])]
PHASES, DIM, PROGRAMS = (3, 48, 1) if SMALL else (36, 1664, 132)  # of the barrier; see benchmarks/test_barrier.py
NAMES = {WIDE: "fp32", HALF: "fp16", BRAIN: "bf16", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        make: the tensors by name; those that require gradients are differentiated.
        run, reference: the kernel's function of them, and the reference's.
        strided: tensors that are given with other strides too, which must not change a bit.
    """

    name: str
    make: Callable[[], dict[str, Tensor | None]]
    run: Callable
    reference: Callable
    strided: tuple[str, ...] = ()


def norm_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for dim in (48, 96) if SMALL else (256, 512, 768, 2048, 4096):
            for everything in (True, False):

                def make(dtype=dtype, dim=dim, everything=everything):
                    names = ("x", "residual", "after") if everything else ("x",)
                    given = {name: random(67, dim, dtype=dtype, seed=i, grad=True) for i, name in enumerate(names)}
                    given["gain"] = (random(dim, seed=3) + 1).detach().requires_grad_()
                    return given | (dict(bias=random(dim, seed=4, grad=True)) if everything else {})

                options = dict(stable=True, l2=True) if everything else {}
                yield Case(
                    f"{NAMES[dtype]}-{dim}-{'everything' if everything else 'bare'}",
                    make,
                    partial(_call, layer_norm, NormArgs, **options),
                    partial(_call, reference.layer_norm, NormArgs, **options),
                    ("x", "residual", "after") if everything else ("x",),
                )


def step_cases() -> Iterator[Case]:
    rows, steps = 5, 7
    for dtype in DTYPES:
        for dim in (100, 257) if SMALL else (256, 512, 768, 2048, 4096):
            for everything in (True, False):

                def make(dtype=dtype, dim=dim, everything=everything):
                    given = {name: random(rows, dim, seed=i) for i, name in enumerate(("x", "x0_prev", "noise"))}
                    given |= dict(pred=random(rows, dim, seed=3, dtype=dtype), null_pred=None, null_table=None)
                    given |= dict(table=random(steps, 6, seed=4), cond_scale=random(seed=5), seed=None)
                    given["index"] = torch.tensor(4, device=DEVICE)
                    if everything:
                        given["null_table"] = random(steps, dim, seed=6, dtype=dtype)
                        given |= dict(noise=None, seed=torch.tensor(12345, device=DEVICE))
                    return given

                options = dict(clamp="l2", radius=0.7) if everything else {}
                yield Case(
                    f"{NAMES[dtype]}-{dim}-{'everything' if everything else 'bare'}",
                    make,
                    partial(_call, diffusion_step, StepArgs, **options),
                    partial(_call, reference.diffusion_step, StepArgs, **options),
                    ("x", "x0_prev", "pred") if everything else ("x", "noise"),
                )


def _call(function, arguments, **given):
    return function(arguments(**given))


def linear_cases() -> Iterator[Case]:
    dim, widths = (96, (48, 96)) if SMALL else (768, (768, 6144))  # split, and not
    for dtype in DTYPES:
        for kept in STORED if dtype == DTYPES[-1] else [None]:
            for rows in (3, 16, 32, 64):
                for outputs in widths:
                    for options in ("bare", "gelu", "swiglu", "stream"):
                        if options == "stream" and rows > MAX_NORM_ROWS:
                            continue
                        yield _linear_case(dtype, kept, rows, outputs, dim, options)


def _linear_case(dtype, kept, rows, outputs, dim, options) -> Case:
    activation = options if options in ("gelu", "swiglu") else None
    normed = rows <= MAX_NORM_ROWS and options in ("gelu", "swiglu")

    def make() -> dict[str, Tensor]:
        both = outputs * 2 if options == "gelu" else outputs
        given = _matrix(both, dim, dtype, kept)
        weight = given.pop("weight")
        # the stream of a model of 16 bits is fp32
        given |= dict(x=random(rows, dim, dtype=WIDE if options == "stream" else dtype), weight=weight[:outputs])
        if options == "gelu":
            given["beside"] = weight[outputs:]
        if options == "stream" or normed:
            given["norm_gain"] = random(dim, dtype=dtype, seed=2)
        if normed:
            given |= dict(stream=random(rows, dim, seed=3), stream_gain=random(dim, dtype=dtype, seed=4))
            given["norm_bias"] = random(dim, dtype=dtype, seed=5)
        if activation:
            given["bias"] = random(both, dtype=dtype, seed=6)
            columns = both // 2 if options == "swiglu" else both
            given["residual"] = random(rows, columns, dtype=dtype, seed=7)
        return given

    def exact_or_plain(**given):
        precise = given["x"].dtype == torch.float64
        return reference.linear(LinearArgs(**given, activation=activation, dtype=torch.float64 if precise else dtype))

    def run(**given):
        with few_programs():
            return linear(LinearArgs(**given, activation=activation, dtype=dtype))

    name = f"{NAMES[dtype]}{f'-{NAMES[kept]}' if kept else ''}-{rows}x{outputs}-{options}"
    rows_of = ("x", "residual", "stream")
    return Case(name, make, run, exact_or_plain, rows_of)


def _matrix(outputs: int, dim: int, dtype: torch.dtype, kept: torch.dtype | None) -> dict[str, Tensor]:
    """A weight, and the scale of one of 8 bits."""
    weight = random(outputs, dim, seed=1, scale=dim**-0.5)
    if kept is None:
        return dict(weight=weight.to(dtype))
    scale = weight.abs().amax(dim=1) / (127 if kept == torch.int8 else 448)
    weight = weight / scale[:, None]
    return dict(weight=(weight.round() if kept == torch.int8 else weight).to(kept), scale=scale)


# rows, outputs of each weight, dim, and options, as in runs of the models at batch 1 and 2
SKINNY = {
    "D2-small-qkv": (3, (768, 128), 768, "norm_gain"),
    "D2-small-qkv-6": (6, (768, 128), 768, "norm_gain"),
    "D2-small-out-6": (6, (768,), 768, ""),
    "D2-small-expand": (3, (6144,), 768, "swiglu stream norm_gain"),
    "D2-small-expand-6": (6, (6144,), 768, "swiglu stream norm_gain"),
    "D2-small-contract": (3, (768,), 3072, "norm_gain residual"),
    "D2-small-contract-6": (6, (768,), 3072, "norm_gain residual"),
    "D2-small-contract-6-alone": (6, (768,), 3072, "residual"),
    "D2-small-head": (1, (768,), 768, "stable norm_gain"),
    "D2-large-qkv": (3, (2048, 128), 768, "norm_gain"),
    "D2-large-out": (3, (768,), 2048, ""),
    "PT-1B-entry": (2, (2048,), 768, "state bias residual"),
    "PT-1B-qkv": (6, (2048, 2048, 2048), 2048, "bias norm_gain norm_bias"),
    "PT-1B-out": (6, (2048,), 2048, "bias residual"),
    "PT-1B-expand": (6, (8192,), 2048, "gelu bias norm_gain norm_bias"),
    "PT-1B-expand-2": (2, (8192,), 2048, "gelu bias norm_gain norm_bias"),
    "PT-1B-contract": (6, (2048,), 8192, "bias residual"),
    "PT-1B-contract-2": (2, (2048,), 8192, "bias residual"),
    "PT-1B-head": (2, (768,), 2048, "bias norm_gain norm_bias"),
}
OF_16_BITS = [dtype for dtype in DTYPES if SMALL or dtype.itemsize == 2]  # fp32 is for the interpreter alone


def skinny_cases() -> Iterator[Case]:
    for dtype in OF_16_BITS:
        for name, sizes in SKINNY.items():
            for kept in STORED if dtype == DTYPES[-1] and name.startswith("D2-small") else [None]:
                yield _skinny_case(f"{NAMES[dtype]}{f'-{NAMES[kept]}' if kept else ''}-{name}", dtype, kept, *sizes)


def _skinny_case(name, dtype, kept, rows, outputs, dim, options) -> Case:
    options, less = options.split(), 16 if SMALL else 1
    outputs, dim = [count // less for count in outputs], dim // less
    activation = next((option for option in options if option in ("gelu", "swiglu")), None)

    def make() -> dict[str, Tensor]:
        given = _matrix(sum(outputs), dim, dtype, kept)
        # what comes from the stream or is the state is fp32
        wide = "norm_gain" in options and "stream" not in options and "residual" not in options
        given["x"] = random(rows, dim, dtype=WIDE if wide or "state" in options else dtype)
        shapes = dict(bias=(sum(outputs),), norm_gain=(dim,), norm_bias=(dim,), stream=(rows, dim))
        shapes["residual"] = rows, sum(outputs)
        for seed, (option, shape) in enumerate(shapes.items(), 2):
            if option in options:
                wide = option in ("stream", "residual")
                given[option] = random(*shape, dtype=WIDE if wide else dtype, seed=seed)
        return given | (dict(stream_gain=random(dim, dtype=dtype, seed=9)) if "stream" in options else {})

    def run(x, weight, bias=None, scale=None, stream=None, residual=None, **norms):
        split = ([None] * 3 if t is None else t.split(outputs) for t in (weight, bias, scale))
        columns = sum(outputs) // (2 if activation == "swiglu" else 1)
        out = launch.empty((rows, columns), x, dtype if residual is None else WIDE)
        total = None if stream is None else launch.empty((rows, dim), x, WIDE)
        further = dict(stream=stream, total=total, residual=residual, stable="stable" in options, **norms)
        _twice(
            launch_skinny_linear, x, [Weight(*parts) for parts in zip(*split)], out, operand=dtype,
            activation=activation, **further,
        )  # fmt: skip
        return out if total is None else (out, total)

    def exact_or_plain(x, norm_gain=None, norm_bias=None, stream=None, stream_gain=None, **given):
        total, precise = None, given["weight" if kept is None else "scale"].dtype == torch.float64
        if stream is not None:
            x = total = reference.layer_norm(NormArgs(x, stream_gain, after=stream))
        if norm_gain is not None:
            x = reference.layer_norm(NormArgs(x, norm_gain, norm_bias, stable="stable" in options))
        out = reference.linear(LinearArgs(x.to(torch.float64 if precise else dtype), **given, activation=activation))
        return out if total is None else (out, total)

    return Case(name, make, run, exact_or_plain, ("x", "residual", "stream"))


def _twice(launcher: Callable, *args, **options) -> None:
    """The second launch depends on the first where launches can."""
    device = next(t.device for t in args if torch.is_tensor(t))
    with launch.chain(device), few_programs():
        for _ in range(2):
            launcher(*args, **options)


@contextlib.contextmanager
def few_programs() -> Iterator[None]:
    """The interpreter runs them one after the other."""
    if not SMALL:
        yield
        return
    with (
        mock.patch.object(skinny_linear, "MULTIPROCESSORS", 3),
        mock.patch.object(attend_project, "MULTIPROCESSORS", 3),
    ):
        yield


def attend_project_cases() -> Iterator[Case]:
    for dtype in OF_16_BITS:
        for kept in STORED if dtype == DTYPES[-1] else [None]:
            name = f"{NAMES[dtype]}{f'-{NAMES[kept]}' if kept else ''}"
            for model, seq, heads, prefix in (
                ("D2-small", 3, 12, 79),
                ("D2-small", 1, 12, 79),
                ("D2-large", 1, 32, 258),
            ):
                heads, prefix = (heads // 4, prefix // 2) if SMALL else (heads, prefix)
                yield _attend_project_case(f"{name}-attend-project-{model}-{seq}", dtype, kept, seq, heads, prefix)


def _attend_project_case(name, dtype, kept, seq, heads, prefix) -> Case:
    suffix, dim_head, outputs = 3, *((16, 24) if SMALL else (64, 768))

    def make():
        q, k, v = random(suffix, (heads + 2) * dim_head, dtype=dtype).split([heads * dim_head, dim_head, dim_head], 1)
        given = dict(q=q[suffix - seq :].unflatten(1, (heads, dim_head)), k=k, v=v)
        given |= dict(zip(("prefix_k", "prefix_v"), random(2, prefix, dim_head, dtype=dtype, seed=1)))
        given |= _matrix(outputs, heads * dim_head, dtype, kept)
        angle = random(suffix, dim_head // 4).repeat_interleave(2, dim=-1)
        given |= dict(cos=angle.cos(), sin=angle.sin() * torch.tensor([-1.0, 1.0], device=DEVICE).repeat(dim_head // 4))
        return given | dict(bias=random(suffix, heads, prefix + suffix, seed=2))

    def run(q, k, v, prefix_k, prefix_v, weight, cos, sin, bias, scale=None):
        out = launch.empty((seq, outputs), q, dtype)
        given = q, k, v, prefix_k, prefix_v, Weight(weight, None, scale), out
        _twice(launch_attend_project, *given, scale=16.0, cosine=True, rotary=(cos, sin), bias=bias)
        return out

    def exact_or_plain(q, k, v, prefix_k, prefix_v, weight, cos, sin, bias, scale=None):
        many = q[None], *(t[None, :, None] for t in (k, v, prefix_k, prefix_v))
        attended = reference.decode_attention(*many, scale=16.0, cosine=True, rotary=(cos, sin), bias=bias)
        return reference.linear(LinearArgs(attended[0], weight, scale=scale))

    return Case(name, make, run, exact_or_plain, ("prefix_k", "prefix_v"))


def advance_cases() -> Iterator[Case]:
    for dtype in OF_16_BITS:
        for dim, width, guided in ((48, 48, 0), (48, 96, 2)) if SMALL else ((768, 768, 0), (768, 2048, 2)):
            yield _advance_case(dtype, dim, width, guided)


def _advance_case(dtype, dim, width, guided) -> Case:
    """The step of D2 with a null table and l2, and that of PT-1B with guidance and a linear that makes tokens."""
    samples, steps = 2, 7
    pointed = dict(dtype=torch.int64, device=DEVICE)
    limits = dict(clamp="range" if guided else "l2", radius=0.7)

    def make():
        given = dict(zip(("x", "x0"), random(2, samples, dim)), index=torch.tensor([steps - 1, 2], **pointed))
        given |= dict(scale=random(samples, seed=1), noise=random(steps, samples, dim, seed=2))
        given |= dict(pred=random(samples + guided, dim, dtype=dtype, seed=3), table=random(steps, 6, seed=4))
        given |= dict(time=random(steps, 1, width, dtype=dtype, seed=5), query=random(width, dtype=dtype, seed=6))
        return given | dict(null=None if guided else random(steps, dim, dtype=dtype, seed=7))

    def run(x, x0, index, scale, noise, pred, table, time, query, null):
        state = RunState(x.clone(), x0.clone(), index.clone(), scale, noise)
        clamps = torch.tensor([0.7, 0.0] if guided else [math.inf, 0.7], device=x.device).repeat(steps, 1)
        tokens = torch.zeros(samples + guided, 3, width, device=x.device)
        entry = launch.empty((samples + guided, dim), x) if guided else None
        tables = RunTables(table, clamps, null, time, query)
        with launch.chain(x.device):
            launch_advance(state, pred[:, None], tables, tokens, entry, updates=False)
            launch_advance(state, pred[:, None], tables, tokens, entry, updates=True)
        return state.x, state.x0, tokens, *([entry] if guided else [])

    def exact(x, x0, index, scale, noise, pred, table, time, query, null):
        unconditional = pred[samples:] if guided else None
        drawn = noise[index, torch.arange(samples, device=x.device)]
        args = StepArgs(x, pred[:samples], unconditional, scale, x0, drawn, table, index, null_table=null, **limits)
        x, x0 = reference.diffusion_step(args)
        tokens = torch.zeros(samples, 3, width, dtype=x.dtype, device=x.device)
        tokens[:, 0], tokens[:, 2] = time[(index + 1) % steps, 0], query
        if guided:
            return x, x0, tokens.repeat(2, 1, 1), x.repeat(2, 1)
        tokens[:, 1] = x
        return x, x0, tokens

    return Case(f"{NAMES[dtype]}-advance-{dim}-{width}", make, run, exact)


def decode_cases() -> Iterator[Case]:
    heads, suffix = (4, 3) if SMALL else (12, 3)
    widths = (16, 20) if SMALL else (20, 32, 52, 64, 100, 128)
    pairs = [(dtype, dtype) for dtype in DTYPES] + [(DTYPES[-1], WIDE), (WIDE, DTYPES[-1])]
    for dtype, cached in pairs:
        for dim_head in widths:
            for prefix in (9, 512) if SMALL else (78, 256, 512):  # whole and split
                for everything in (True, False):
                    name = f"{NAMES[dtype]}-over-{NAMES[cached]}-{dim_head}-{prefix}"
                    yield _decode_case(name, dtype, cached, heads, suffix, dim_head, prefix, everything)


def _decode_case(name, dtype, cached, heads, suffix, dim_head, prefix, everything) -> Case:
    def make():
        k, v = random(1, suffix, 1, 2 * dim_head, dtype=dtype).chunk(2, dim=-1)
        prefix_k, prefix_v = random(2, 1, prefix, 1, dim_head, dtype=cached)
        given = dict(q=random(1, suffix, heads, dim_head, dtype=dtype), k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v)
        if everything:
            angle = random(suffix, dim_head // 2).repeat_interleave(2, dim=-1)
            given["cos"] = angle.cos()
            given["sin"] = angle.sin() * torch.tensor([-1.0, 1.0], device=DEVICE).repeat(dim_head // 2)
            given |= dict(bias=random(suffix, heads, prefix + suffix), mask=random(1, prefix, seed=3))
        return given

    def call(function, q, k, v, prefix_k, prefix_v, cos=None, sin=None, bias=None, mask=None):
        rotary = None if cos is None else (cos, sin)
        options = dict(scale=0.3, cosine=everything, rotary=rotary, bias=bias, mask=mask)
        return function(q, k, v, prefix_k, prefix_v, **options)

    name += "-everything" if everything else "-bare"
    return Case(name, make, partial(call, decode_attention), partial(call, reference.decode_attention), ("prefix_k",))


def attention_cases(grad: bool) -> Iterator[Case]:
    """Results alone, or with all gradients."""
    prepared = ("rotary", "cosine", "null", "keep", "causal")
    for dtype in DTYPES:
        for dim_head in (16, 20) if SMALL else (52, 64, 100, 128):
            for options in (prepared + ("relative", "dropout"), prepared, ()):
                yield _attention_case(dtype, dim_head, options, grad)
        yield _attention_case(dtype, 16 if SMALL else 64, (*prepared, "dense", "finite", "dropout"), grad)
        yield _attention_case(dtype, 16 if SMALL else 64, ("dense",), grad)


def _attention_case(dtype, dim_head, options, grad) -> Case:
    batch, seq, heads = (2, 9, 4) if SMALL else (2, 260, 12)
    kv_heads = 1 if "null" in options else heads
    width = min(dim_head, 32) - 4

    def make():
        given = dict(q=random(batch, seq, heads, dim_head, dtype=dtype, grad=grad, seed=1))
        for number, name in enumerate("kv", 2):
            given[name] = random(batch, seq, kv_heads, dim_head, dtype=dtype, grad=grad, seed=number)
        if "null" in options:
            given["null_kv"] = random(2, kv_heads, dim_head, dtype=dtype, grad=grad, seed=4)
        if "relative" in options:
            given["bias"] = random(32, heads, dtype=dtype, grad=grad, seed=5)
        if "dense" in options:
            given["bias"] = random(seq, heads, seq + ("null" in options), dtype=dtype, grad=grad, seed=5)
        return given

    def call(function, **given):
        others = dict(scale=5.0 if "cosine" in options else dim_head**-0.5, cosine="cosine" in options)
        if "relative" in options:
            others["buckets"] = torch.arange(seq, device=DEVICE).clamp(max=31)
        if "rotary" in options:
            angle = random(seq, width // 2, seed=6, scale=3.0).repeat_interleave(2, dim=-1)
            signs = torch.tensor([-1.0, 1.0], device=DEVICE).repeat(width // 2)
            others |= dict(cos=angle.cos(), sin=angle.sin() * signs)
        if "causal" in options:
            others |= dict(causal=True, causal_fill=-1e4 if "finite" in options else -math.inf)
        if "keep" in options:
            others["mask"] = random(batch, seq, seed=7) > -0.3
            others["mask"][:, 0] = True
        if "dropout" in options:
            others |= dict(dropout=0.3, seed=torch.tensor(2**61 + 12345, device=DEVICE))
        return function(AttentionArgs(**given, **others))

    name = f"{NAMES[dtype]}-{dim_head}-{'-'.join(options) or 'bare'}"
    return Case(name, make, partial(call, attention), partial(call, reference.attention), ("q", "k", "v"))


def barrier_cases() -> Iterator[Case]:
    for mode in MODES:
        if (SMALL and mode == "dependent launches") or (CAPABILITY < (9, 0) and mode in MODES_FROM_90):
            continue

        def make():
            weights = random(PHASES, DIM, DIM, dtype=DTYPES[-1], scale=DIM**-0.5)
            return dict(x=random(DIM), weights=weights)

        def run(x, weights, mode=mode):
            out = torch.full((PHASES, DIM), math.nan, device=x.device)
            arrived = torch.zeros((), dtype=torch.int32, device=x.device)
            programs = PROGRAMS if DEVICE == "cpu" else torch.cuda.get_device_properties(0).multi_processor_count
            matvec_chain_fwd(x, weights, out, arrived, programs * 2 if mode == "independent" else programs, mode)
            return out

        exact = partial(reference.matvec_chain, chained=mode != "independent")
        yield Case(mode.replace(" ", "-").replace(",", ""), make, run, exact)


def one_after_the_other(*families: Callable[[], Iterator[Case]]) -> Iterator[Case]:
    return itertools.chain.from_iterable(family() for family in families)


FAMILIES = {
    "norm": norm_cases,
    "step": partial(one_after_the_other, step_cases, advance_cases),
    "linear": partial(one_after_the_other, linear_cases, skinny_cases),
    "decode": partial(one_after_the_other, decode_cases, attend_project_cases),
    "attention_forward": partial(attention_cases, False),
    "attention_backward": partial(attention_cases, True),
    "barrier": barrier_cases,
}
