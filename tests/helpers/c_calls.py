"""Calls of all that C computes, drawn from a seed: shapes, strides, dtypes, options; each against fp64.

    python -m helpers.c_calls [--seconds 60] [--seed 0] [--calls 1000] [--sanitizer thread]

Arrays begin or end at a page that nobody may touch, so that one number too many ends the process. What is allowed is an
error for each number: a share of what it would be if nothing in its sums had cancelled.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import math
import mmap
import random
import time
from collections import defaultdict

import torch
from torch import Tensor

from fastprior.kernels import ops, reference
from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.cpu import attention as cpu_attention
from fastprior.kernels.cpu import blocks as cpu_blocks
from fastprior.kernels.cpu import library as cpu_library
from fastprior.kernels.cpu import linear as cpu_linear
from fastprior.kernels.cpu import sums as cpu_sums
from helpers.cpu_cases import BF16, EPS, FP32, ROUNDED, cast, error, form

PAGE = mmap.PAGESIZE
EDGES = (*range(1, 14), 15, 16, 17, 24, 25, 31, 32, 33, 48, 49, 63, 64, 65, 80, 81, 127, 128, 129)
ROUNDED_TO = {FP32: 2.0**-24, BF16: 2.0**-8}  # half a unit in the last place, of a number's own size
# shares of what is summed that a linear may be off: a few roundings of fp32; x of 16 bits with weights of bf16, and of
# 15 of its largest number with int8
ALLOWED = {FP32: 4 * EPS, BF16: 2.0**-16, torch.int8: 2.0**-14}
ALLOWED_OF_ROUNDED = 2.0**-8  # where x is rounded to bf16


class Draw:
    """Numbers and tensors from a seed."""

    def __init__(self, seed: int):
        self.choose, self.numbers = random.Random(seed), torch.Generator().manual_seed(seed)
        self.protect = ctypes.CDLL(None).mprotect
        self.protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

    def chance(self, share: float = 0.5) -> bool:
        return self.choose.random() < share

    def size(self, most: int) -> int:
        """1 to `most`, often at the edge of a vector or a tile."""
        edges = [edge for edge in EDGES if edge <= most]
        return self.choose.choice(edges) if self.chance(0.6) else self.choose.randint(1, most)

    def tensor(self, *shape: int, dtype: torch.dtype = FP32, scale: float = 1.0, strided: bool = False) -> Tensor:
        """Normal numbers between two pages that nobody may touch, at the first or the last of them.

        Args:
            strided: rows may be further apart than they are long.
        """
        last = shape[-1] + (self.choose.choice((1, 3, 32)) if strided and self.chance(0.4) else 0)
        rows = math.prod(shape[:-1])
        numbers = (rows - 1) * last + shape[-1]
        values = torch.randn(numbers, generator=self.numbers) * scale
        size = numbers * torch.empty((), dtype=dtype).element_size()
        pages = -(-size // PAGE)
        memory = mmap.mmap(-1, (pages + 2) * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        offset = PAGE + (pages * PAGE - size if self.chance(0.7) else 0)
        flat = torch.frombuffer(memory, dtype=dtype, count=numbers, offset=offset)
        flat.copy_(values.clamp(-128, 127) if dtype == torch.int8 else values)
        for page in (0, pages + 1):
            assert self.protect(start + page * PAGE, PAGE, 0) == 0
        strides = [last * math.prod(shape[place + 1 : -1]) for place in range(len(shape) - 1)]
        return flat.as_strided(shape, (*strides, 1))

    def other_dtype(self) -> torch.dtype:
        return self.choose.choice((FP32, FP32, BF16))


def allowed_of(of_weight: torch.dtype, rows: int) -> float:
    return ALLOWED_OF_ROUNDED if form(of_weight, rows) == ROUNDED else ALLOWED[of_weight]


def _quantised(draw: Draw, rows: int, dim: int) -> tuple[Tensor, Tensor]:
    scale = draw.tensor(rows).abs_().add_(0.1).div_(127 * dim**0.5)
    return draw.tensor(rows, dim, dtype=torch.int8, scale=50.0, strided=True), scale


# linears


def draw_linear(draw: Draw) -> dict:
    of_weight = draw.choose.choice((FP32, BF16, torch.int8))
    dtype = draw.other_dtype() if of_weight == torch.int8 else of_weight
    most = min(cpu_library.most_rows(of_weight), 300)
    rows, dim = draw.size(most), draw.size(700) if draw.chance(0.95) else draw.choose.randint(3000, 4000)
    outputs, activation = draw.size(200), draw.choose.choice((None, None, "gelu", "swiglu"))
    outputs += outputs % 2 if activation == "swiglu" else 0
    more = draw.size(60) if activation != "swiglu" and draw.chance(0.3) else 0
    columns = (outputs + more) // 2 if activation == "swiglu" else outputs + more
    ahead = draw.choose.choice([count for count in range(1, 9) if rows % count == 0])
    size = draw.choose.choice((1e-3, 1.0, 1.0, 1.0, 30.0))
    given = dict(x=draw.tensor(rows, dim, dtype=dtype, scale=size, strided=True), activation=activation)
    if of_weight == torch.int8:
        (given["weight"], scale), other = _quantised(draw, outputs, dim), _quantised(draw, more, dim) if more else None
        given["scale"] = torch.cat((scale, other[1])) if more else scale
        given |= dict(beside=other[0]) if more else {}
    else:
        given["weight"] = draw.tensor(outputs, dim, dtype=dtype, scale=dim**-0.5, strided=True)
        given |= dict(beside=draw.tensor(more, dim, dtype=dtype, scale=dim**-0.5, strided=True)) if more else {}
    for name, shape in dict(bias=(outputs + more,), norm_gain=(dim,), norm_bias=(dim,)).items():
        if draw.chance(0.4) and (name != "norm_bias" or "norm_gain" in given):
            given[name] = draw.tensor(*shape, dtype=draw.other_dtype())
    if draw.chance(0.3):
        given["stream"] = draw.tensor(rows, dim, dtype=draw.other_dtype(), strided=True)
        given["stream_gain"] = draw.tensor(dim, dtype=draw.other_dtype())
    if draw.chance(0.4):
        given["residual"] = draw.tensor(rows, columns, dtype=draw.other_dtype(), strided=True)
    for name in ("x", "stream", "residual"):
        if name in given and ahead > 1:
            given[name] = given[name].unflatten(0, (ahead, -1))
    return given


def _spread_of_norm(x: Tensor, spread: Tensor, gain: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A norm of numbers with such errors, and its errors: the mean, the variance and their own rounding have theirs."""
    mean = x.mean(-1, keepdim=True)
    rstd = (x.var(-1, keepdim=True, correction=0) + 1e-5).rsqrt()
    normed = (x - mean) * rstd
    centred = spread + x.abs() + (spread + x.abs()).mean(-1, keepdim=True)
    of_rstd = (centred * normed.abs()).mean(-1, keepdim=True) * rstd
    out, errors = normed * gain, (centred * rstd + normed.abs() * (1 + of_rstd)) * gain.abs()
    return (out, errors) if bias is None else (out + bias, errors + bias.abs())


def spread_of_linear(given: dict) -> tuple[Tensor, Tensor, Tensor | None]:
    """A linear in fp64, and for each number of it the sizes of what is summed up to it; those of the stream's sum."""
    args = LinearArgs(**cast(given, torch.float64))
    x, stream = args.x, None
    spread, weight = x.abs(), torch.cat((args.weight, args.beside)) if args.beside is not None else args.weight
    weight = weight.double()
    if args.stream is not None:
        x, spread = _spread_of_norm(x, spread, args.stream_gain, None)
        x, spread = x + args.stream, spread + args.stream.abs()
        stream = spread
    if args.norm_gain is not None:
        x, spread = _spread_of_norm(x, spread, args.norm_gain, args.norm_bias)
    if given["weight"].dtype != FP32:  # rows are rounded to words, of the largest number
        spread = spread + x.abs().amax(-1, keepdim=True)
    y, sizes = x @ weight.t(), (spread + x.abs()) @ weight.abs().t()
    if args.scale is not None:
        y, sizes = y * args.scale, sizes * args.scale
    if args.bias is not None:
        y, sizes = y + args.bias, sizes + args.bias.abs()
    if args.activation == "swiglu":
        (y, gate), (sizes, of_gate) = y.chunk(2, -1), sizes.chunk(2, -1)
        silu = torch.nn.functional.silu(gate)
        y, sizes = y * silu, sizes * (silu.abs() + of_gate * 1e-3) + (y.abs() + sizes) * 1.1 * of_gate
    elif args.activation == "gelu":
        y, sizes = torch.nn.functional.gelu(y), sizes * 1.13 + y.abs()
    if args.residual is not None:
        y, sizes = y + args.residual, sizes + args.residual.abs()
    return y, sizes, stream


def call_linear(draw: Draw) -> tuple[str, float]:
    given = draw_linear(draw)
    assert cpu_linear.takes_linear(LinearArgs(**given)), "drawn for it"
    got, total = ops.linear(**given), None
    y, sizes, of_stream = spread_of_linear(given)
    exact = reference.linear(LinearArgs(**cast(given, torch.float64)))
    if of_stream is not None:
        (got, total), (exact, exact_total) = got, exact
    near = 1e-9 if "scale" not in given else 1e-5  # the reference rounds products of int8 to fp32
    assert ((exact - y).abs() <= near * sizes).all(), "the sizes are those of another linear"
    exact, rows, of_weight = y, given["x"].numel() // given["x"].shape[-1], given["weight"].dtype
    worst = _share(got, exact, sizes, allowed_of(of_weight, rows))
    if total is not None:
        worst = max(worst, _share(total, exact_total, of_stream, ALLOWED[FP32]))
    return f"linear {str(of_weight).removeprefix('torch.')}", worst


def _share(got: Tensor, exact: Tensor, sizes: Tensor, allowed: float) -> float:
    """The largest error as a share of what is allowed; infinite where there is NaN."""
    limit = allowed * sizes + ROUNDED_TO[got.dtype] * exact.abs() + 1e-37
    found = ((got.double() - exact).abs() / limit).max()
    return found.item() if got.shape == exact.shape and not found.isnan() else math.inf


# attention


def draw_decode(draw: Draw) -> dict:
    kv_heads, group, prompts = draw.size(4), draw.size(5), draw.size(3)
    rows, suffix, prefix, dim_head = prompts * draw.size(3), draw.size(7), draw.size(90), draw.size(80)
    seq, heads, dtype = draw.choose.randint(1, suffix), kv_heads * group, draw.other_dtype()
    k, v = draw.tensor(rows, suffix, kv_heads, dim_head, dtype=dtype), None
    if draw.chance(0.3):
        k, v = draw.tensor(rows, suffix, kv_heads, 2 * dim_head, dtype=dtype).chunk(2, dim=-1)
    v = draw.tensor(rows, suffix, kv_heads, dim_head, dtype=dtype) if v is None else v
    given = dict(
        q=draw.tensor(rows, seq, heads, dim_head, dtype=dtype),
        k=k,
        v=v,
        **draw_prefix(draw, (), prompts, prefix, kv_heads, dim_head),
    )
    given |= draw_options(draw, prompts, prefix, suffix, heads, dim_head)
    return given | dict(cosine=draw.chance(0.4), scale=draw.choose.choice((1.0, dim_head**-0.5, 4.0)))


def draw_prefix(draw: Draw, depth: tuple, prompts: int, prefix: int, kv_heads: int, dim_head: int) -> dict:
    """Keys and values with the same strides, sometimes by heads first."""
    shape = (*depth, prompts, prefix, kv_heads, dim_head)
    if draw.chance(0.3):
        shape = (*depth, prompts, kv_heads, prefix, dim_head)
        return {name: draw.tensor(*shape).transpose(-2, -3) for name in ("prefix_k", "prefix_v")}
    return {name: draw.tensor(*shape) for name in ("prefix_k", "prefix_v")}


def draw_options(draw: Draw, prompts: int, prefix: int, suffix: int, heads: int, dim_head: int) -> dict:
    given = dict(rotary=None, bias=None, mask=None)
    if draw.chance(0.5):
        width = draw.choose.randint(0, dim_head // 2) * 2
        angle = torch.randn(suffix, width // 2, generator=draw.numbers).repeat_interleave(2, dim=-1)
        given["rotary"] = angle.cos(), angle.sin() * torch.tensor([-1.0, 1.0]).repeat(width // 2)
    if draw.chance(0.5):
        given["bias"] = draw.tensor(suffix, 1 if draw.chance(0.2) else heads, prefix + suffix)
        if draw.chance(0.5):
            given["bias"][
                ..., torch.rand(prefix + suffix, generator=draw.numbers)[1:].lt(0.4).nonzero()[:, 0] + 1
            ] = -math.inf
    if draw.chance(0.5):
        given["mask"] = draw.tensor(prompts, prefix)
        given["mask"][torch.rand(prompts, prefix, generator=draw.numbers) < 0.4] = -10000.0
    return given


def _of_floats(function, given: dict, dtype: torch.dtype) -> Tensor:
    rotary = given["rotary"] and tuple(table.to(dtype) for table in given["rotary"])
    bias = given["bias"] if given["bias"] is None else given["bias"].to(dtype)
    return function(**cast(given, dtype) | dict(rotary=rotary, bias=bias))


def call_decode(draw: Draw) -> tuple[str, float]:
    given = draw_decode(draw)
    got = cpu_attention.decode_where_taken(**given)
    assert got is not None, "drawn for it"
    exact, plain = (_of_floats(reference.decode_attention, given, dtype) for dtype in (torch.float64, FP32))
    allowed = 4 * error(plain.to(got.dtype), exact) + 64 * ROUNDED_TO[FP32] + ROUNDED_TO[got.dtype]
    return f"decode {str(got.dtype).removeprefix('torch.')}", error(got, exact) / allowed


# blocks


def draw_blocks(draw: Draw) -> tuple[list[ops.Block], ops.Block | None, dict]:
    of_weight, depth = draw.choose.choice((FP32, BF16, torch.int8)), draw.size(3)
    kv_heads, group, dim_head, dim, inner = draw.size(3), draw.size(3), draw.size(24), draw.size(90), draw.size(120)
    dim = 3 if dim == 2 else dim  # a norm of two numbers is their order alone, which may turn on any rounding
    activation, heads, has_v = draw.choose.choice(("gelu", "swiglu")), kv_heads * group, draw.chance()
    own, shared, wide = heads * dim_head, kv_heads * dim_head, inner * 2 if activation == "swiglu" else inner
    shapes = dict(
        q=(own, dim),
        k=(shared if has_v else 2 * shared, dim),
        v=(shared, dim),
        out=(dim, own),
        expand=(wide, dim),
        contract=(dim, inner),
    )
    options = {
        name for name in (*cpu_blocks.BIASES, "norm_bias", "out_gain", "ff_bias", "inner_gain") if draw.chance(0.4)
    }

    def block(shapes: dict, vectors: dict) -> ops.Block:
        fields = {}
        for name, (rows, columns) in shapes.items():
            if of_weight == torch.int8:
                fields[name], fields[f"{name}_scale"] = _quantised(draw, rows, columns)
            else:
                fields[name] = draw.tensor(rows, columns, dtype=of_weight, scale=columns**-0.5, strided=True)
            if f"{name}_bias" in options:
                fields[f"{name}_bias"] = draw.tensor(rows, dtype=draw.other_dtype(), scale=0.3)
        for name, size in vectors.items():
            if name.endswith("norm_gain") or name == "ff_gain" or name in options:
                fields[name] = draw.tensor(size, dtype=draw.other_dtype(), scale=0.2).add_(0 if "bias" in name else 1)
        return ops.Block(**fields)

    if not has_v:
        del shapes["v"]
        options.discard("v_bias")
    vectors = dict(norm_gain=dim, norm_bias=dim, out_gain=dim, ff_gain=dim, ff_bias=dim, inner_gain=inner)
    blocks = [block(shapes, vectors) for _ in range(depth)]
    head = (
        block(dict(q=(dim if draw.chance(0.7) else draw.size(90), dim)), dict(norm_gain=dim, norm_bias=dim))
        if draw.chance()
        else None
    )
    sizes = dict(heads=heads, kv_heads=kv_heads, dim_head=dim_head)
    return blocks, head, dict(**sizes, scale=dim_head**-0.5, cosine=draw.chance(0.3), activation=activation, eps=1e-5)


def by_layers(
    x,
    blocks,
    head,
    prefix_k,
    prefix_v,
    *,
    outputs,
    heads,
    kv_heads,
    dim_head,
    scale,
    cosine,
    activation,
    eps,
    rotary,
    bias,
    mask,
) -> Tensor:
    """`ops.run_blocks` by the reference of each operation, in the dtype of x."""
    dtype, kept = x.dtype, []
    blocks = [ops.Block(*(t if t is None else t.to(dtype) for t in block)) for block in blocks]

    def linear(x, weight, name, block, **options):
        given = dict(bias=getattr(block, f"{name}_bias", None), **options)
        scales = getattr(block, f"{name}_scale")
        return reference.linear(LinearArgs(x, weight if scales is None else weight * scales[:, None], eps=eps, **given))

    for layer, b in enumerate(blocks):
        norm = dict(norm_gain=b.norm_gain, norm_bias=b.norm_bias)
        q, k = (linear(x, getattr(b, name), name, b, **norm) for name in ("q", "k"))
        k, v = k.chunk(2, -1) if b.v is None else (k, linear(x, b.v, "v", b, **norm))
        q, k, v = (t.unflatten(-1, (-1, dim_head)) for t in (q, k, v))
        kept.append(torch.stack((k, v), dim=2))
        seq = outputs if layer == len(blocks) - 1 else x.shape[1]
        if not seq:
            break
        how = dict(scale=scale, cosine=cosine, rotary=rotary, bias=bias, mask=mask)
        mixed = reference.decode_attention(q[:, -seq:], k, v, prefix_k[layer], prefix_v[layer], **how)
        merged, stream = linear(mixed, b.out, "out", b), x[:, -seq:]
        if b.out_gain is not None:
            merged = torch.nn.functional.layer_norm(merged, merged.shape[-1:], b.out_gain, None, eps)
        total = stream + merged
        hidden = linear(total, b.expand, "expand", b, norm_gain=b.ff_gain, norm_bias=b.ff_bias, activation=activation)
        x = total + linear(hidden, b.contract, "contract", b, norm_gain=b.inner_gain)
    if not outputs:
        return torch.stack(kept)
    if head is None:
        return x
    head = ops.Block(*(t if t is None else t.to(dtype) for t in head))
    x = x / x.amax(-1, keepdim=True)
    return linear(x, head.q, "q", head, norm_gain=head.norm_gain, norm_bias=head.norm_bias)


def _allowed(run, x: Tensor, exact: Tensor, plain: Tensor, allowed: float, draw: Draw) -> float:
    """What errors of this share of each number become at the end, and four times those of PyTorch."""
    moved = run(x.double() * (1 + 1e-4 * torch.randn(x.shape, generator=draw.numbers).double()))
    return 4 * error(plain, exact) + 4 * allowed * (1 + error(moved, exact) / 1e-4)


def call_blocks(draw: Draw) -> tuple[str, float]:
    blocks, head, how = draw_blocks(draw)
    prompts, suffix, prefix = draw.size(3), draw.size(6), draw.size(40)
    of_weight, outputs = blocks[0].q.dtype, draw.choose.randint(0, suffix)
    found = ops.prepare_blocks(blocks, owner=torch.nn.Identity(), head=head, **how)
    rows = prompts * max(1, min(draw.size(4), found.most_tokens // (prompts * suffix)))
    x = draw.tensor(rows, suffix, blocks[0].q.shape[1])
    caches = draw_prefix(draw, (len(blocks),), prompts, prefix, how["kv_heads"], how["dim_head"])
    options = draw_options(draw, prompts, prefix, suffix, how["heads"], how["dim_head"])
    got = cpu_blocks.run_blocks_where_taken(x, found, **caches, outputs=outputs, **options)
    assert got is not None, "drawn for it"

    def run(x):
        given = dict(caches, **options)
        return _of_floats(lambda **given: by_layers(x, blocks, head, outputs=outputs, **how, **given), given, x.dtype)

    exact, plain = run(x.double()), run(x)
    allowed = _allowed(run, x, exact, plain, allowed_of(of_weight, rows * suffix), draw)
    return f"blocks {str(of_weight).removeprefix('torch.')}", error(got, exact) / allowed


def _embedding_head(draw: Draw, blocks: list, head: ops.Block | None) -> ops.Block:
    """A head whose results are embeddings again, in the dtype of the blocks."""
    dim = blocks[0].q.shape[1]
    head = (
        ops.Block(q=draw.tensor(dim, dim, scale=dim**-0.5), norm_gain=draw.tensor(dim))
        if head is None or len(head.q) != dim
        else head
    )
    if head.q.dtype != blocks[0].q.dtype:
        head = (
            head._replace(q=head.q.to(blocks[0].q.dtype))
            if blocks[0].q.dtype != torch.int8
            else head._replace(**dict(zip(("q", "q_scale"), _quantised(draw, dim, dim))))
        )
    return head


def call_run(draw: Draw) -> tuple[str, float]:
    """Some steps of a run, of which the next sees what the last has made."""
    blocks, head, how = draw_blocks(draw)
    dim, prompts, samples, times, prefix, steps = (
        blocks[0].q.shape[1],
        draw.size(2),
        draw.size(2),
        draw.size(2),
        draw.size(20),
        draw.size(3),
    )
    head = _embedding_head(draw, blocks, head)
    rows, suffix = prompts * draw.size(2), times + 2 * samples
    found = ops.prepare_blocks(blocks, owner=torch.nn.Identity(), head=head, **how)
    caches = draw_prefix(draw, (len(blocks),), prompts, prefix, how["kv_heads"], how["dim_head"])
    options = draw_options(draw, prompts, prefix, suffix, how["heads"], how["dim_head"]) | dict(mask=None)
    time_tokens, query, null = (
        draw.tensor(steps, times, dim),
        draw.tensor(dim, dtype=draw.other_dtype()),
        draw.tensor(steps, dim),
    )
    coefficients, start = draw.tensor(steps, 6), draw.tensor(rows * samples, dim)
    noise = [draw.tensor(rows * samples, dim) if draw.chance() else None for _ in range(steps)]
    solver = dict(
        cond_scale=draw.choose.choice((1.0, 2.5)), clamp=draw.choose.choice((None, "range", "l2")), radius=1.5
    )
    run = ops.prepare_run(
        found, **caches, rows=rows, samples=samples, time_tokens=time_tokens, query=query, coefficients=coefficients,
        null_table=null, rotary=options["rotary"], bias=options["bias"], **solver,
    )  # fmt: skip
    if run is None:
        return "no run", 0.0
    run.start(start)
    first = draw.choose.randint(0, steps)
    run(0, noise[:first])
    run(first, noise[first:])

    def predictions(x, step):
        parts = (time_tokens[step], x.view(rows, samples, dim), query.expand(samples, dim))
        tokens = torch.cat([part.to(x.dtype).expand(rows, -1, -1) for part in parts], dim=1)
        run = functools.partial(by_layers, tokens, blocks, head, outputs=samples, **how)
        return _of_floats(run, dict(caches, **options), x.dtype).reshape(-1, dim)

    def by_steps(x):
        x0, scale = torch.zeros_like(x), torch.tensor(solver["cond_scale"], dtype=x.dtype)
        for step in range(steps):
            drawn = torch.zeros_like(x) if noise[step] is None else noise[step].to(x.dtype)
            tables = dict(table=coefficients.to(x.dtype), index=torch.tensor(step), null_table=null.to(x.dtype))
            limits = dict(clamp=solver["clamp"], radius=solver["radius"], null_pred=None, seed=None)
            given = dict(x=x, pred=predictions(x, step), cond_scale=scale, x0_prev=x0, noise=drawn)
            x, x0 = reference.diffusion_step(reference.StepArgs(**given, **tables, **limits))
        return x

    exact, plain = by_steps(start.double()), by_steps(start)
    allowed = _allowed(by_steps, start, exact, plain, allowed_of(blocks[0].q.dtype, rows * suffix), draw)
    return f"run {str(blocks[0].q.dtype).removeprefix('torch.')}", error(run.x, exact) / allowed


def call_rows(draw: Draw) -> tuple[str, float]:
    """A step of rows that are each at a step of their own, and with `alike` the bits of each alone."""
    blocks, head, how = draw_blocks(draw)
    head, alike = _embedding_head(draw, blocks, head), draw.chance()
    dim, prompts, times, prefix, steps = blocks[0].q.shape[1], draw.size(3), draw.size(2), draw.size(20), draw.size(3)
    places = draw.size(6)
    found = ops.prepare_blocks(blocks, owner=torch.nn.Identity(), head=head, **how)
    caches = draw_prefix(draw, (len(blocks),), prompts, prefix, how["kv_heads"], how["dim_head"])
    options = draw_options(draw, prompts, prefix, times + 2, how["heads"], how["dim_head"]) | dict(mask=None)
    query = draw.tensor(dim, dtype=draw.other_dtype())
    sizes = dict(prompts=prompts, places=places, times=times, alike=alike)
    rows = ops.prepare_rows(found, **caches, query=query, rotary=options["rotary"], bias=options["bias"], **sizes)
    if rows is None:
        return "no rows", 0.0
    for prompt in range(prompts):
        rows.keep(prompt, *(cache[:, prompt : prompt + 1] for cache in caches.values()))
    solvers = [(draw.tensor(steps, times, dim), draw.tensor(steps, 6), draw.tensor(steps, dim)) for _ in range(2)]
    clamps = [draw.choose.choice((None, "range", "l2")) for _ in solvers]
    tables = [rows.table(*solver, clamp, 1.5) for solver, clamp in zip(solvers, clamps)]
    count, start = min(rows.most, draw.choose.randint(1, places)), draw.tensor(places, dim)
    asked = []
    for place in draw.choose.sample(range(places), count):
        solver = draw.choose.randrange(2)
        where = place, draw.choose.randrange(prompts), tables[solver], draw.choose.randrange(steps)
        noise = draw.tensor(dim) if draw.chance() else None
        asked.append((solver, ops.RowStep(*where, draw.choose.choice((1.0, 2.5)), noise)))
        rows.start(place, start[place])
    rows.step([row for _, row in asked])
    got = rows.x.clone()

    def steps_of(x):
        out = []
        for solver, row in asked:
            time_tokens, coefficients, null = (t.to(x.dtype) for t in solvers[solver])
            own = {name: t[:, row.prompt : row.prompt + 1] for name, t in caches.items()}
            one = x[row.place]
            tokens = torch.cat((time_tokens[row.index], one[None], query[None].to(x.dtype)))[None]
            run = functools.partial(by_layers, tokens, blocks, head, outputs=1, **how)
            pred, noise = _of_floats(run, dict(own, **options), x.dtype).reshape(1, dim), row.noise
            given = dict(x=one[None], pred=pred, x0_prev=torch.zeros_like(one)[None], null_pred=None, seed=None)
            given |= dict(cond_scale=torch.tensor(row.cond_scale, dtype=x.dtype), index=torch.tensor(row.index))
            given["noise"] = torch.zeros_like(one)[None] if noise is None else noise[None].to(x.dtype)
            limits = dict(table=coefficients, null_table=null, clamp=clamps[solver], radius=1.5)
            out.append(reference.diffusion_step(reference.StepArgs(**given, **limits))[0])
        return torch.cat(out)

    places_of = [row.place for _, row in asked]
    exact, plain = steps_of(start.double()), steps_of(start)
    allowed = _allowed(steps_of, start, exact, plain, allowed_of(blocks[0].q.dtype, count * (times + 2)), draw)
    worst = error(got[places_of], exact) / (2 * allowed)  # of which there are few numbers to tell
    for _, row in asked if alike else ():
        rows.start(row.place, start[row.place])
        rows.step([row])
        worst = worst if torch.equal(rows.x[row.place], got[row.place]) else math.inf
    return f"rows {str(blocks[0].q.dtype).removeprefix('torch.')}", worst


def call_sums(draw: Draw) -> tuple[str, float]:
    dtype = draw.choose.choice((FP32, BF16, torch.float64, torch.int8))
    numbers = reference.ROW // torch.empty((), dtype=dtype).itemsize
    values = draw.tensor(draw.size(40) * numbers, dtype=dtype)
    if dtype != torch.int8 and draw.chance():
        values[draw.choose.randrange(len(values))] = draw.choose.choice((math.inf, -math.inf, math.nan))
    (got, finite), ((plain, is_finite),) = cpu_sums.sum_rows(values), reference.sum_rows([values])
    return f"sums {str(dtype).removeprefix('torch.')}", 0.0 if torch.equal(
        got, plain
    ) and finite == is_finite else math.inf


CALLS = (call_linear,) * 6 + (call_decode,) * 3 + (call_blocks,) * 2 + (call_run, call_rows, call_sums)


@contextlib.contextmanager
def team_of(count: int, crowded: bool):
    """So many threads whatever the cores are; where it is crowded they are C's own."""
    library, before = cpu_library.library(), cpu_library.thread_count
    cpu_library.thread_count = lambda: count
    library.set_crowded(int(crowded))
    try:
        yield
    finally:
        cpu_library.thread_count = before
        library.set_crowded(0)


@torch.no_grad()
def fuzz(seed: int, calls: int | None = None, seconds: float = math.inf, threads: int | None = None) -> dict[str, list]:
    """Calls until there were so many, or so many seconds are over: how many of each kind, and the worst error.

    Args:
        threads: all calls have so many, which the caller has seen to; by default 1 to 3, OpenMP's or C's own.
    Raises:
        AssertionError: an error over what is allowed; it names the seed of the call.
    """
    found, end, number = defaultdict(lambda: [0, 0.0]), time.monotonic() + seconds, 0
    while number != calls and time.monotonic() < end:
        draw = Draw(seed * 10**6 + number)
        count, crowded = draw.choose.choice((1, 1, 2, 3)), draw.chance()
        with contextlib.nullcontext() if threads else team_of(count, crowded):
            kind, worst = draw.choose.choice(CALLS)(draw)
        assert worst <= 1, f"{kind} of seed {seed * 10**6 + number}: {worst:.2f} times the error that is allowed"
        found[kind][0] += 1
        found[kind][1] = max(found[kind][1], worst)
        number += 1
    return dict(found)


def report(found: dict[str, list]) -> str:
    lines = [
        f"{kind:16} {count:7} calls, worst {worst:.3f} of what is allowed"
        for kind, (count, worst) in sorted(found.items())
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int)
    parser.add_argument("--seconds", type=float, default=math.inf)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(report(fuzz(given.seed, given.calls, given.seconds)))
