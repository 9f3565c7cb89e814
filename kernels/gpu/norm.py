"""LayerNorm and RMSNorm, and what is fused around them: one read and one write of each row, also in backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference import NormArgs
from . import launch
from .launch import FLOATS, MAX_DIM, as_rows, ceil_div, check, promoted, row_block, row_strides

TILE = 4096  # elements that a program holds at once
PARTS = 384  # programs in backward, each with its own sums over rows: 3 to a multiprocessor, whose registers they fill


@triton.jit
def _standardise(x, in_rows, in_dim, dim, eps, STABLE: tl.constexpr, RMS: tl.constexpr):
    """Rows of mean 0 and variance 1 (zeros outside), and the factor of their derivative."""
    inside = in_rows & in_dim
    if STABLE:
        inverse = 1.0 / tl.max(tl.where(inside, x, float("-inf")), axis=1, keep_dims=True)
        x *= inverse
    if not RMS:
        x = tl.where(inside, x - tl.sum(x, axis=1, keep_dims=True) / dim, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / dim + eps)
    rstd = tl.where(in_rows, rstd, 0.0)
    return x * rstd, rstd * inverse if STABLE else rstd


@triton.jit
def _load_vector(ptr, col, in_dim):
    return tl.load(ptr + col, mask=in_dim, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_fwd_kernel(
    x_ptr, gain_ptr, bias_ptr, residual_ptr, after_ptr, out_ptr,
    total_ptr,  # of x + residual
    rows, dim, stride_x_row, stride_residual_row, stride_after_row, eps,
    STABLE: tl.constexpr, RMS: tl.constexpr, L2: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    in_rows, in_dim = row < rows, col < dim
    inside = in_rows & in_dim
    x = tl.load(x_ptr + row * stride_x_row + col, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row * stride_residual_row + col, mask=inside, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * dim + col, total, mask=inside)
        x = total.to(tl.float32)
    y, _ = _standardise(x, in_rows, in_dim, dim, eps, STABLE, RMS)
    if gain_ptr is not None:
        y *= _load_vector(gain_ptr, col, in_dim)
    if bias_ptr is not None:
        y += _load_vector(bias_ptr, col, in_dim)
    if L2:
        y *= 1.0 / tl.maximum(tl.sqrt(tl.sum(y * y, axis=1, keep_dims=True)), 1e-12)
    if after_ptr is not None:
        y += tl.load(after_ptr + row * stride_after_row + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * dim + col, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_bwd_kernel(
    dout_ptr, dtotal_ptr, total_ptr, gain_ptr, bias_ptr, dx_ptr,
    dgain_ptr, dbias_ptr,  # (programs, dim)
    rows, dim, stride_dout_row, stride_dtotal_row, stride_total_row, eps,
    STABLE: tl.constexpr, RMS: tl.constexpr, L2: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK)
    in_vector = col < dim
    if dgain_ptr is not None:
        dgain = tl.zeros([BLOCK], tl.float32)
    if dbias_ptr is not None:
        dbias = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        in_rows, in_dim = row < rows, in_vector[None, :]
        inside = in_rows & in_dim
        x = tl.load(total_ptr + row * stride_total_row + col[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dout_ptr + row * stride_dout_row + col[None, :], mask=inside, other=0.0).to(tl.float32)
        y, scale = _standardise(x, in_rows, in_dim, dim, eps, STABLE, RMS)
        if gain_ptr is not None:
            gain = _load_vector(gain_ptr, col, in_vector)[None, :]
        if L2:
            z = y
            if gain_ptr is not None:
                z *= gain
            if bias_ptr is not None:
                z += _load_vector(bias_ptr, col, in_vector)[None, :]
            norm = tl.sqrt(tl.sum(z * z, axis=1, keep_dims=True))
            inverse = 1.0 / tl.maximum(norm, 1e-12)
            along = tl.sum(z * dy, axis=1, keep_dims=True) * inverse * inverse
            along = tl.where(norm >= 1e-12, along, 0.0)  # below the floor the divisor is constant
            dy = (dy - z * along) * inverse
        if dgain_ptr is not None:
            dgain += tl.sum(dy * y, axis=0)
        if dbias_ptr is not None:
            dbias += tl.sum(dy, axis=0)
        if dx_ptr is not None:
            if gain_ptr is not None:
                dy *= gain
            slope = tl.sum(dy * y, axis=1, keep_dims=True) / dim
            if not RMS:
                dy -= tl.sum(dy, axis=1, keep_dims=True) / dim
            dx = (dy - y * slope) * scale
            if dtotal_ptr is not None:
                dtotal = dtotal_ptr + row * stride_dtotal_row + col[None, :]
                dx += tl.load(dtotal, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * dim + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    part = tl.program_id(0) * dim + col
    if dgain_ptr is not None:
        tl.store(dgain_ptr + part, dgain, mask=in_vector)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + part, dbias, mask=in_vector)


@dataclass(frozen=True)
class NormConfig:
    """A tile of whole rows: `rows` of `block` elements."""

    rows: int
    block: int
    num_warps: int


def layer_norm_config(dim: int) -> NormConfig:
    block = row_block(dim)
    # with fewer, rows of 4096 with every option spill in backward
    num_warps = 16 if block == 4096 else 4
    return NormConfig(TILE // block, block, num_warps)


def layer_norm_fwd(args: NormArgs) -> tuple[Tensor, Tensor]:
    """The norm of rows (rows, dim), at any stride, in a dtype that is given; the sum with residual, empty without."""
    out, total = _results(args)
    launch_layer_norm(args, out, None if args.residual is None else total)
    return out, total


def launch_layer_norm(args: NormArgs, out: Tensor, total: Tensor | None = None) -> None:
    """Launch the norm of rows into out (rows, dim), and with residual the sum into total; both contiguous."""
    x, gain, bias, residual, after, eps, stable, rms, l2, _ = args
    rows, dim = x.shape
    config = layer_norm_config(dim)
    launch.launch(
        _layer_norm_fwd_kernel, (ceil_div(rows, config.rows),),
        x, gain, bias, residual, after, out, total, rows, dim, *row_strides(x, residual, after), eps,
        STABLE=stable, RMS=rms, L2=l2, ROWS=config.rows, BLOCK=config.block, num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip


def _results(args: NormArgs) -> tuple[Tensor, Tensor]:
    x, residual = args.x, args.residual
    total = x.new_empty(0) if residual is None else launch.empty(x.shape, x, promoted(x, residual))
    return launch.empty(x.shape, x, args.dtype), total


def layer_norm_bwd(
    args: NormArgs, dout: Tensor, dtotal: Tensor | None, need_dx: bool, need_dgain: bool, need_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the sum, which is x here, in its dtype, and of gain and bias, in fp32; empty if not needed."""
    total, gain, bias, _, _, eps, stable, rms, l2, _ = args
    rows, dim = total.shape
    config = layer_norm_config(dim)
    programs = min(ceil_div(rows, config.rows), PARTS)
    dx = launch.empty((rows, dim), total) if need_dx else None
    dgain, dbias = (
        launch.empty((programs, dim), total, torch.float32) if need else None for need in (need_dgain, need_dbias)
    )
    launch.launch(
        _layer_norm_bwd_kernel, (programs,),
        dout, dtotal if need_dx else None, total, gain, bias if l2 else None, dx, dgain, dbias,
        rows, dim, *row_strides(dout, dtotal, total), eps,
        STABLE=stable, RMS=rms, L2=l2, ROWS=config.rows, BLOCK=config.block, num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip
    grads = dx, *(None if parts is None else parts.sum(0) for parts in (dgain, dbias))
    return tuple(total.new_empty(0) if grad is None else grad for grad in grads)


def _gradients(
    args: NormArgs, dout: Tensor, dtotal: Tensor | None, need_dx: bool, *need_vectors: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x = args.x
    vectors = (x.new_empty(x.shape[1:] if need else 0, dtype=torch.float32 if need else None) for need in need_vectors)
    return x.new_empty(x.shape if need_dx else 0), *vectors


_layer_norm = launch.custom_op("layer_norm", layer_norm_fwd, _results)
_layer_norm_bwd = launch.custom_op("layer_norm_bwd", layer_norm_bwd, _gradients)


def _setup_context(ctx, inputs, output):
    x, gain, bias, residual, after, *options, _ = inputs
    ctx.set_materialize_grads(False)  # zeros for an unused sum would be read
    ctx.save_for_backward(x if residual is None else output[1], gain, bias)
    ctx.options = options
    ctx.dtypes = [None if t is None else t.dtype for t in (x, gain, bias, residual, after)]


def _backward(ctx, dout, dtotal):
    total, gain, bias = ctx.saved_tensors
    need_x, need_gain, need_bias, need_residual, _ = needs = ctx.needs_input_grad[:5]
    needed = need_x or need_residual, need_gain, need_bias
    dtotal = None if dtotal is None or not dtotal.numel() else as_rows(dtotal)
    dx = dgain = dbias = None
    if dout is None:  # only the sum was used
        dx = dtotal
    elif any(needed):
        args = NormArgs(total, gain, bias, None, None, *ctx.options)
        dx, dgain, dbias = _layer_norm_bwd(*args, as_rows(dout), dtotal, *needed)
    grads = zip((dx, dgain, dbias, dx, dout), ctx.dtypes, needs)
    return *(None if g is None or not need else g.to(dtype) for g, dtype, need in grads), *[None] * 5


_layer_norm.register_autograd(_backward, setup_context=_setup_context)


def layer_norm(args: NormArgs) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.layer_norm` as one kernel, and one more for all its gradients; PyTorch computes rows beyond 4096.

    All is computed in fp32, from gain and bias in the dtype that they are stored in; the sum with `residual` is rounded
    to its dtype before it is normalised. Nothing is kept for backward but `x`, or the sum. Of x, residual and after
    those whose rows are not contiguous, or not at one stride from each other, are copied.
    """
    x, gain, bias, residual, after, eps, stable, rms, l2, dtype = args
    if x.ndim == 0:
        raise ValueError("x has no dimensions; it must be (..., dim)")
    dim = x.shape[-1]
    same = dict(x=(x, x.shape), residual=(residual, x.shape), after=(after, x.shape))
    check(x, **same, gain=(gain, (dim,)), bias=(bias, (dim,)))
    if dtype is None:
        dtype = promoted(x, residual, after)
    elif dtype not in FLOATS:
        raise TypeError(f"dtype={dtype}; it must be float32, bfloat16 or float16")
    if dim > MAX_DIM:
        with reference.without_autocast(x):
            return reference.layer_norm(args._replace(dtype=dtype))
    gain, bias = [None if t is None else t.contiguous() for t in (gain, bias)]
    rows, residual_rows, after_rows = [None if t is None else as_rows(t) for t in (x, residual, after)]
    out, total = _layer_norm(rows, gain, bias, residual_rows, after_rows, eps, stable, rms, l2, dtype)
    out = out.view_as(x)
    return out if residual is None else (out, total.view_as(x))
