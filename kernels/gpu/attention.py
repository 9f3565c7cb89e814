"""Flash attention (Dao 2023) and what models put around it: rotary, l2-norm, null key, position bias, mask, dropout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference import Rotary
from . import launch
from .attention_kernels import (
    _attention_bwd_dbias_kernel,
    _attention_bwd_dkv_kernel,
    _attention_bwd_dq_kernel,
    _attention_fwd_kernel,
    _attention_prepare_kernel,
)

# programs that fill a large chip a few times over, however few the heads
PROGRAMS = 512


@dataclass(frozen=True)
class Config:
    block_m: int  # rows
    block_n: int  # columns
    num_warps: int
    num_stages: int


# (bytes of an element, features, plain): tiles whose kernels spill no registers from compute capability 8.0 to 10.0,
# but for `resources.SPILLS_KNOWN`. Masked features take registers too: the tiles of 64 are for dim_head 64 alone.
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


def attention_config(kernel: str, dim_head: int, element_size: int, plain: bool) -> Config:
    """Of kernel "fwd", "dq", "dkv" or "dbias"; `plain` without bias and dropout, which take many registers."""
    return Config(*TILES[element_size, 64 if dim_head == 64 else 128, plain][kernel])


def _shared(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    null_kv: tuple[Tensor | None, ...],
    cos: Tensor | None,
    sin: Tensor | None,
    bias: Tensor | None,
    relative: bool,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    causal: bool,
    causal_fill: float,
    dropout: float,
) -> tuple[Config, tuple, dict]:
    """The launch configuration, and the arguments and keyword arguments of `launch` that the kernels share.

    `null_kv` and `bias` are as the kernels take them: pointers apart, and with `relative` (distances, heads).
    """
    seq, heads, dim = q.shape[1:]
    keys, kv_heads = v.shape[1:3]
    # the gradient of bias keeps no features and takes them in turns: a line of the cache at a time
    block_d = 32 if kernel == "dbias" else max(64, launch.power_of_2(dim))
    config = attention_config(kernel, dim, q.element_size(), plain=bias is None and seed is None)
    bias_strides = (0, 0, 0) if bias is None else (*bias.stride(), 0) if relative else bias.stride()
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.int8)
    arguments = (
        *(q, k, v, *null_kv, cos, sin, bias, mask, seed),
        *(float(scale), float(causal_fill), float(dropout)),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *bias_strides),
        *(seq, keys, kv_heads, heads // kv_heads, 0 if cos is None else cos.shape[-1]),
    )
    constants = dict(
        NULL=int(null_kv[-1] is not None),
        RELATIVE=relative,
        CAUSAL=0 if not causal else 1 if causal_fill == -math.inf else 2,
        DIM=dim,
        BLOCK_D=block_d,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return config, arguments, constants


def _prepare(
    x: Tensor, null: Tensor | None, cos: Tensor | None, sin: Tensor | None, cosine: bool, shift: int
) -> tuple[Tensor, Tensor | None]:
    """Queries or keys as the dot product takes them, the null one first; with `cosine` their lengths before, fp32."""
    (batch, seq, heads, dim), block_d = x.shape, max(64, launch.power_of_2(x.shape[-1]))
    seq += null is not None
    y = launch.empty((batch, seq, heads, dim), x)
    length = launch.empty((batch, seq, heads), x, torch.float32) if cosine else None
    width = 0 if cos is None else cos.shape[-1]
    arguments = x, null, cos, sin, *x.stride()[:3], seq * heads, heads, shift, width, y, length
    constants = dict(NULL=int(null is not None), DIM=dim, BLOCK_D=block_d, BLOCK_M=64, num_warps=4, num_stages=1)
    launch.launch(_attention_prepare_kernel, (batch, launch.ceil_div(seq * heads, 64)), *arguments, **constants)
    return y, length


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    null_kv: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    bias: Tensor | None,
    buckets: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    cosine: bool,
    causal: bool,
    causal_fill: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """The result; and (2, batch, kv_heads, rows) fp32, the maximum and the inverse of the sum of each row."""
    nulls = (None, None) if null_kv is None else null_kv.unbind()
    relative = buckets is not None
    by_distance = bias.index_select(0, buckets) if relative else bias
    options = nulls, cos, sin, by_distance, relative, mask, seed, scale, causal, causal_fill, dropout
    config, arguments, constants = _shared("fwd", q, k, v, *options)
    (batch, seq, heads, dim), kv_heads = q.shape, k.shape[2]
    rows = seq * (heads // kv_heads)
    out = launch.empty((batch, seq, heads * dim), q)
    stats = launch.empty((2, batch, kv_heads, rows), q, torch.float32)
    grid = batch * kv_heads, launch.ceil_div(rows, config.block_m)
    launch.launch(_attention_fwd_kernel, grid, *arguments, out, *stats.unbind(), COSINE=cosine, **constants)
    return out, stats


def attention_bwd(
    grad: Tensor,
    out: Tensor,
    stats: Tensor,
    bias_grad: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    null_kv: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    bias: Tensor | None,
    buckets: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    cosine: bool,
    causal: bool,
    causal_fill: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, null_kv and bias, each empty where there is none; that of bias where `bias_grad`."""
    (batch, seq, heads, dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    rows, columns = seq * (heads // kv_heads), keys + (null_kv is not None)
    grad = grad.contiguous()
    top, inverse = stats.unbind()
    delta = launch.empty(top.shape, top)
    null_k, null_v = (None, None) if null_kv is None else null_kv.unbind()
    q_length = k_length = None
    turned = cosine or cos is not None
    if turned:
        q, q_length = _prepare(q, None, cos, sin, cosine, keys - seq)
    if turned or null_kv is not None:
        k, k_length = _prepare(k, null_k, cos, sin, cosine, 0)
    relative = buckets is not None
    by_distance = bias.index_select(0, buckets) if relative else bias
    inputs = q, k, v, (null_v,), cos, sin, by_distance, relative, mask, seed, scale, causal, causal_fill, dropout

    config, arguments, constants = _shared("dq", *inputs)
    dq = launch.empty(q.shape, q)
    grid = batch * kv_heads, launch.ceil_div(rows, config.block_m)
    launch.launch(_attention_bwd_dq_kernel, grid, *arguments, top, inverse, delta, grad, out, q_length, dq, **constants)

    config, arguments, constants = _shared("dkv", *inputs)
    tiles = launch.ceil_div(columns, config.block_n)
    # few heads of keys make few programs: then the rows are split among several
    splits = max(1, min(PROGRAMS // (batch * kv_heads * tiles), launch.ceil_div(rows, config.block_m)))
    dk, dv = (launch.empty((splits, *v.shape), v, torch.float32 if splits > 1 else v.dtype) for _ in range(2))
    dnull = None if null_kv is None else launch.empty((2, splits * batch, kv_heads, dim), v, torch.float32)
    dnull_k, dnull_v = (None, None) if dnull is None else dnull.unbind()
    grid = batch * kv_heads, tiles, splits
    launch.launch(
        _attention_bwd_dkv_kernel,
        grid,
        *(*arguments, top, inverse, delta, grad, k_length, dk, dv, dnull_k, dnull_v),
        **constants,
    )
    dk, dv = (t.sum(0).to(v.dtype) if splits > 1 else t.view(v.shape) for t in (dk, dv))
    dnull = launch.empty((0,), q) if dnull is None else dnull.sum(1).to(null_kv.dtype)

    if not bias_grad:
        return dq, dk, dv, dnull, launch.empty((0,), q)
    config, arguments, constants = _shared("dbias", *inputs)
    tiles = launch.ceil_div(seq, config.block_m) * launch.ceil_div(columns, config.block_n)
    chunks = max(1, min(PROGRAMS // (heads * tiles), batch))
    num_buckets = len(bias) if relative else 0
    shape = (heads, chunks * tiles, num_buckets) if relative else (chunks, seq, heads, columns)
    parts = launch.empty(shape, q, torch.float32)
    launch.launch(
        _attention_bwd_dbias_kernel,
        (tiles, heads * chunks),
        *(*arguments, top, inverse, delta, grad, buckets, parts, batch, chunks, num_buckets),
        **constants,
    )
    dbias = parts.sum(1).t() if relative else parts.sum(0)
    return dq, dk, dv, dnull, dbias.to(bias.dtype).contiguous()


_attention = launch.custom_op("attention")(attention_fwd)
_attention_bwd = launch.custom_op("attention_bwd")(attention_bwd)


@_attention.register_fake
def _(q, k, *_):
    batch, seq, heads, dim = q.shape
    kv_heads = k.shape[2]
    stats = q.new_empty((2, batch, kv_heads, seq * (heads // kv_heads)), dtype=torch.float32)
    return q.new_empty((batch, seq, heads * dim)), stats


@_attention_bwd.register_fake
def _(grad, out, stats, bias_grad, q, k, v, null_kv, cos, sin, bias, *_):
    given = q, k, v, null_kv, bias if bias_grad else None
    return tuple(q.new_empty((0,)) if t is None else t.new_empty(t.shape) for t in given)


def _setup_context(ctx, inputs, output):
    ctx.numbers = inputs[10:]
    ctx.save_for_backward(*inputs[:10], *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    *inputs, out, stats = ctx.saved_tensors
    needed = ctx.needs_input_grad
    dq, dk, dv, dnull, dbias = _attention_bwd(grad, out, stats, needed[6], *inputs, *ctx.numbers)
    grads = dq, dk, dv, dnull, None, None, dbias, *[None] * 8
    return tuple(grad if need else None for grad, need in zip(grads, needed))


_attention.register_autograd(_backward, setup_context=_setup_context)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    rotary: Rotary | None = None,
    cosine: bool = False,
    null_kv: Tensor | None = None,
    bias: Tensor | None = None,
    buckets: Tensor | None = None,
    causal: bool = False,
    causal_fill: float = -math.inf,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention with everything around it in one kernel: see `reference.attention`.

    Raises:
        TypeError, ValueError: for an argument that the kernels cannot take. They take dim_head from 16 to 128, and give
            no gradient to rotary tables and masks.
    """
    _check(q, k, v, rotary, null_kv, bias, buckets, mask, dropout, seed)
    cos, sin = (None, None) if rotary is None else (table.float().contiguous() for table in rotary)
    null_kv = None if null_kv is None else null_kv.to(q.dtype).contiguous()
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask.float()).contiguous()
    if not dropout:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (), device=q.device)
    options = null_kv, cos, sin, bias, buckets, mask, seed, scale, cosine, causal, causal_fill, dropout
    return _attention(q, k, v, *options)[0]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Rotary | None,
    null_kv: Tensor | None,
    bias: Tensor | None,
    buckets: Tensor | None,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> None:
    launch.check_dtype("q", q)
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q and k have {q.dim()} and {k.dim()} dimensions; they must have 4")
    (batch, seq, heads, dim_head), (keys, kv_heads) = q.shape, k.shape[1:3]
    launch.check_shape("q", q, q.shape, q)
    for name, tensor in (("k", k), ("v", v)):
        launch.check_dtype(name, tensor, (q.dtype,))
        launch.check_shape(name, tensor, (batch, keys, kv_heads, dim_head), q)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        launch.check_last_contiguous(name, tensor)
    if not 16 <= dim_head <= 128:
        raise ValueError(f"q has dim_head {dim_head}; it must be from 16 to 128")
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads; they must be a multiple of the {kv_heads} heads of k")
    if seq > keys:
        raise ValueError(f"q has {seq} positions; they must be the last of the {keys} of k")
    if rotary is not None:
        width = rotary[0].shape[-1]
        for name, table in zip(("rotary cos", "rotary sin"), rotary):
            launch.check_shape(name, table, (keys, width), q)
            _check_no_gradient(name, table)
        if width % 2 or width > dim_head:
            raise ValueError(f"rotary tables have width {width}; it must be even and at most dim_head, {dim_head}")
    if null_kv is not None:
        launch.check_shape("null_kv", null_kv, (2, kv_heads, dim_head), q)
    if buckets is not None:
        if bias is None:
            raise ValueError("buckets came without bias; they are buckets of the table that bias is")
        launch.check_dtype("buckets", buckets, (torch.int64,))
        launch.check_shape("buckets", buckets, (keys,), q)
        launch.check_shape("bias", bias, (len(bias), heads), q)
    elif bias is not None:
        launch.check_shape("bias", bias, (seq, heads, keys + (null_kv is not None)), q)
    if bias is not None:
        launch.check_dtype("bias", bias)
    if mask is not None:
        launch.check_dtype("mask", mask, (torch.bool, *launch.FLOATS))
        launch.check_shape("mask", mask, (batch, keys), q)
        _check_no_gradient("mask", mask)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}; it must be at least 0 and less than 1")
    if seed is not None:
        launch.check_dtype("seed", seed, (torch.int64,))
        launch.check_shape("seed", seed, (), q)


def _check_no_gradient(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name} requires a gradient, which these kernels do not give; use reference.attention")
