"""Flash attention (Dao 2023) and what models put around it: rotary, l2-norm, null key, position bias, mask, dropout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference import AttentionArgs
from . import launch
from .attention_kernels import (
    _attention_bwd_dbias_kernel,
    _attention_bwd_dkv_kernel,
    _attention_bwd_dq_kernel,
    _attention_fwd_kernel,
    _attention_prepare_kernel,
)
from .launch import FLOATS, ceil_div, check, power_of_2

# programs that fill a large chip a few times over, however few the heads
PROGRAMS = 512


@dataclass(frozen=True)
class AttentionConfig:
    """The tile of a program."""

    block_m: int  # rows
    block_n: int  # columns
    num_warps: int
    num_stages: int


# (bytes of an element, features, plain): tiles whose kernels spill no registers from compute capability 8.0 to 10.0,
# but for what `SPILLS_KNOWN` (benchmarks/proof/resources.py) says. Masked features take registers too: the tiles of 64
# are for dim_head 64 alone.
TILES = {
    (2, 64, True): dict(fwd=(128, 64, 8, 2), dq=(64, 32, 4, 2), dkv=(32, 128, 8, 2)),
    (2, 64, False): dict(fwd=(64, 64, 8, 1), dq=(64, 32, 8, 1), dkv=(32, 64, 8, 1), dbias=(32, 32, 4, 1)),
    (2, 128, True): dict(fwd=(64, 64, 8, 2), dq=(64, 64, 8, 2), dkv=(32, 64, 8, 2)),
    (2, 128, False): dict(fwd=(64, 32, 8, 1), dq=(32, 32, 8, 1), dkv=(32, 32, 8, 1), dbias=(32, 16, 4, 1)),
    (4, 64, True): dict(fwd=(32, 32, 8, 1), dq=(32, 16, 8, 1), dkv=(32, 16, 4, 1)),
    (4, 64, False): dict(fwd=(32, 32, 4, 1), dq=(32, 32, 8, 1), dkv=(16, 32, 8, 1), dbias=(16, 32, 4, 1)),
    (4, 128, True): dict(fwd=(16, 32, 8, 1), dq=(16, 32, 8, 1), dkv=(32, 16, 8, 1)),
    (4, 128, False): dict(fwd=(16, 32, 8, 1), dq=(16, 32, 8, 1), dkv=(16, 16, 8, 1), dbias=(32, 8, 4, 1)),
}


def attention_config(kernel: str, dim_head: int, element_size: int, plain: bool) -> AttentionConfig:
    """The tile of kernel "fwd", "dq", "dkv" or "dbias"; `plain` without bias and dropout, which take many registers."""
    return AttentionConfig(*TILES[element_size, 64 if dim_head == 64 else 128, plain][kernel])


def _bias_by_distance(args: AttentionArgs) -> Tensor | None:
    """The bias as the kernels take it: with buckets (distances, heads)."""
    return args.bias if args.buckets is None else args.bias.index_select(0, args.buckets)


def _shared(
    kernel: str, args: AttentionArgs, nulls: tuple[Tensor | None, ...], bias: Tensor | None
) -> tuple[AttentionConfig, tuple, dict]:
    """The launch configuration, and the arguments and keyword arguments of `launch` that the kernels share.

    Args:
        nulls: the null keys, where the kernel takes them apart, and the null values.
        bias: by distance, where there are buckets.
    """
    q, k, v, relative, mask = args.q, args.k, args.v, args.buckets is not None, args.mask
    seq, heads, dim = q.shape[1:]
    keys, kv_heads = v.shape[1:3]
    # the gradient of bias keeps no features and takes them in turns: a line of the cache at a time
    block_d = 32 if kernel == "dbias" else max(64, power_of_2(dim))
    config = attention_config(kernel, dim, q.element_size(), plain=bias is None and args.seed is None)
    bias_strides = (0, 0, 0) if bias is None else (*bias.stride(), 0) if relative else bias.stride()
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.int8)
    arguments = (
        *(q, k, v, *nulls, args.cos, args.sin, bias, mask, args.seed),
        *(float(args.scale), float(args.causal_fill), float(args.dropout)),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *bias_strides),
        *(seq, keys, kv_heads, heads // kv_heads, 0 if args.cos is None else args.cos.shape[-1]),
    )
    constants = dict(
        NULL=int(nulls[-1] is not None), RELATIVE=relative,
        CAUSAL=0 if not args.causal else 1 if args.causal_fill == -math.inf else 2,
        DIM=dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return config, arguments, constants


def _prepare(
    x: Tensor, null: Tensor | None, cos: Tensor | None, sin: Tensor | None, cosine: bool, shift: int
) -> tuple[Tensor, Tensor | None]:
    """Queries or keys as the dot product takes them, the null one first; with `cosine` their lengths before, fp32."""
    (batch, seq, heads, dim), block_d = x.shape, max(64, power_of_2(x.shape[-1]))
    seq += null is not None
    y = launch.empty((batch, seq, heads, dim), x)
    length = launch.empty((batch, seq, heads), x, torch.float32) if cosine else None
    width = 0 if cos is None else cos.shape[-1]
    arguments = x, null, cos, sin, *x.stride()[:3], seq * heads, heads, shift, width, y, length
    constants = dict(NULL=int(null is not None), DIM=dim, BLOCK_D=block_d, BLOCK_M=64, num_warps=4, num_stages=1)
    launch.launch(_attention_prepare_kernel, (batch, ceil_div(seq * heads, 64)), *arguments, **constants)
    return y, length


def attention_fwd(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """The result; and (2, batch, kv_heads, rows) fp32, the maximum and the inverse of the sum of each row."""
    nulls = (None, None) if args.null_kv is None else args.null_kv.unbind()
    config, arguments, constants = _shared("fwd", args, nulls, _bias_by_distance(args))
    out, stats = _results(args)
    _, batch, kv_heads, rows = stats.shape
    grid = batch * kv_heads, ceil_div(rows, config.block_m)
    launch.launch(_attention_fwd_kernel, grid, *arguments, out, *stats.unbind(), COSINE=args.cosine, **constants)
    return out, stats


def _results(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    (batch, seq, heads, dim), kv_heads = args.q.shape, args.k.shape[2]
    stats = launch.empty((2, batch, kv_heads, seq * (heads // kv_heads)), args.q, torch.float32)
    return launch.empty((batch, seq, heads * dim), args.q), stats


def attention_bwd(
    args: AttentionArgs, grad: Tensor, out: Tensor, stats: Tensor, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, null_kv and bias, each empty where there is none; that of bias where `bias_grad`."""
    q, k, null_kv, cos, sin = args.q, args.k, args.null_kv, args.cos, args.sin
    null_k, null_v = (None, None) if null_kv is None else null_kv.unbind()
    q_length = k_length = None
    turned = args.cosine or cos is not None
    if turned:
        q, q_length = _prepare(q, None, cos, sin, args.cosine, k.shape[1] - q.shape[1])
    if turned or null_kv is not None:
        k, k_length = _prepare(k, null_k, cos, sin, args.cosine, 0)
    shared = args._replace(q=q, k=k), (null_v,), _bias_by_distance(args)
    by_row = *stats.unbind(), launch.empty(stats.shape[1:], stats), grad.contiguous()  # the third is made with dq
    dq = _dq(shared, by_row, out, q_length)
    dk, dv, dnull = _dkv(shared, by_row, k_length)
    return dq, dk, dv, dnull, _dbias(shared, by_row) if bias_grad else q.new_empty(0)


def _dq(shared: tuple, by_row: tuple[Tensor, ...], out: Tensor, length: Tensor | None) -> Tensor:
    (q, *_), (batch, kv_heads, rows) = shared[0], by_row[0].shape
    config, arguments, constants = _shared("dq", *shared)
    dq, grid = launch.empty(q.shape, q), (batch * kv_heads, ceil_div(rows, config.block_m))
    launch.launch(_attention_bwd_dq_kernel, grid, *arguments, *by_row, out, length, dq, **constants)
    return dq


def _dkv(shared: tuple, by_row: tuple[Tensor, ...], length: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    (_, _, v, null_kv, *_), (batch, kv_heads, rows) = shared[0], by_row[0].shape
    config, arguments, constants = _shared("dkv", *shared)
    tiles = ceil_div(v.shape[1] + (null_kv is not None), config.block_n)
    # few heads of keys make few programs: then the rows are split among several
    splits = max(1, min(PROGRAMS // (batch * kv_heads * tiles), ceil_div(rows, config.block_m)))
    dk, dv = (launch.empty((splits, *v.shape), v, torch.float32 if splits > 1 else v.dtype) for _ in range(2))
    shape = 2, splits * batch, kv_heads, v.shape[-1]
    dnull = None if null_kv is None else launch.empty(shape, v, torch.float32)
    results = length, dk, dv, *((None, None) if dnull is None else dnull.unbind())
    grid = batch * kv_heads, tiles, splits
    launch.launch(_attention_bwd_dkv_kernel, grid, *arguments, *by_row, *results, **constants)
    dk, dv = (t.sum(0).to(v.dtype) if splits > 1 else t.view(v.shape) for t in (dk, dv))
    return dk, dv, v.new_empty(0) if dnull is None else dnull.sum(1).to(null_kv.dtype)


def _dbias(shared: tuple, by_row: tuple[Tensor, ...]) -> Tensor:
    args = shared[0]
    (batch, seq, heads, _), columns = args.q.shape, args.v.shape[1] + (args.null_kv is not None)
    config, arguments, constants = _shared("dbias", *shared)
    tiles = ceil_div(seq, config.block_m) * ceil_div(columns, config.block_n)
    chunks = max(1, min(PROGRAMS // (heads * tiles), batch))
    relative = args.buckets is not None
    num_buckets = len(args.bias) if relative else 0
    shape = (heads, chunks * tiles, num_buckets) if relative else (chunks, seq, heads, columns)
    parts = launch.empty(shape, args.q, torch.float32)
    results, grid = (args.buckets, parts, batch, chunks, num_buckets), (tiles, heads * chunks)
    launch.launch(_attention_bwd_dbias_kernel, grid, *arguments, *by_row, *results, **constants)
    if relative:
        dbias = parts.sum(1).t()
    else:
        dbias = parts[0] if chunks == 1 else parts.sum(0)
    return dbias.to(args.bias.dtype).contiguous()


def _gradients(args: AttentionArgs, grad: Tensor, out: Tensor, stats: Tensor, bias_grad: bool) -> tuple[Tensor, ...]:
    given = args.q, args.k, args.v, args.null_kv, args.bias if bias_grad else None
    return tuple(args.q.new_empty(0) if t is None else t.new_empty(t.shape) for t in given)


_attention = launch.custom_op("attention", attention_fwd, _results)
_attention_bwd = launch.custom_op("attention_bwd", attention_bwd, _gradients)


def _setup_context(ctx, inputs, output):
    ctx.numbers = inputs[10:]
    ctx.set_materialize_grads(False)  # zeros for what has no gradient
    ctx.save_for_backward(*inputs[:10], *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    *tensors, out, stats = ctx.saved_tensors
    needed = ctx.needs_input_grad
    dq, dk, dv, dnull, dbias = _attention_bwd(*tensors, *ctx.numbers, grad, out, stats, needed[6])
    grads = AttentionArgs(dq, dk, dv, dnull, None, None, dbias, *[None] * 8)
    return tuple(grad if need else None for grad, need in zip(grads, needed))


_attention.register_autograd(_backward, setup_context=_setup_context)


def attention(args: AttentionArgs) -> Tensor:
    """`ops.attention` with everything around it in one kernel.

    It takes dim_head from 16 to 128, and gives no gradient to rotary tables and masks. In the operation that it calls a
    seed means dropout.
    """
    _check(args)
    q, k, v, null_kv, cos, sin, bias, buckets, mask, seed, *numbers = args
    if cos is not None:
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
    null_kv = None if null_kv is None else null_kv.to(q.dtype).contiguous()
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask.float()).contiguous()
    if not args.dropout:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (), device=q.device)
    return _attention(q, k, v, null_kv, cos, sin, bias, buckets, mask, seed, *numbers)[0]


def _check(args: AttentionArgs) -> None:
    q, k, cos, bias, mask, dropout = args.q, args.k, args.cos, args.bias, args.mask, args.dropout
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q and k have {q.dim()} and {k.dim()} dimensions; they must have 4")
    (batch, seq, heads, dim_head), (keys, kv_heads) = q.shape, k.shape[1:3]
    check(q, contiguous=True, q=(q, q.shape))
    own = batch, keys, kv_heads, dim_head
    check(q, (q.dtype,), contiguous=True, k=(k, own), v=(args.v, own))
    if not 16 <= dim_head <= 128:
        raise ValueError(f"q has dim_head {dim_head}; it must be from 16 to 128")
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads; they must be a multiple of the {kv_heads} heads of k")
    if seq > keys:
        raise ValueError(f"q has {seq} positions; they must be the last of the {keys} of k")
    if cos is not None:
        width = cos.shape[-1]
        check(q, None, **{"rotary cos": (cos, (keys, width)), "rotary sin": (args.sin, (keys, width))})
        if width % 2 or width > dim_head:
            raise ValueError(f"rotary tables have width {width}; it must be even and at most dim_head, {dim_head}")
    if args.buckets is not None or args.seed is not None:
        check(q, (torch.int64,), buckets=(args.buckets, (keys,)), seed=(args.seed, ()))
    if args.buckets is not None and bias is None:
        raise ValueError("buckets came without bias; they are buckets of the table that bias is")
    if bias is not None:
        dense = seq, heads, keys + (args.null_kv is not None)
        check(q, bias=(bias, dense if args.buckets is None else (len(bias), heads)))
    if args.null_kv is not None:
        check(q, None, null_kv=(args.null_kv, (2, kv_heads, dim_head)))
    if mask is not None:
        check(q, (torch.bool, *FLOATS), mask=(mask, (batch, keys)))
    for name, tensor in ("rotary cos", cos), ("rotary sin", args.sin), ("mask", mask):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, which these kernels do not give; use reference.attention")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}; it must be at least 0 and less than 1")
