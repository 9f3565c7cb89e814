"""SwiGLU and the norm behind it, of many rows: between the linears of a block nothing is kept but their operands."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from . import norm
from .launch import MAX_DIM, as_rows, check

OPTIONS = False, False, False  # of `layer_norm`: stable, rms, l2


class _SwigluNorm(torch.autograd.Function):
    """Backward computes the gate again, which takes one pass, and writes both gradients where they are read."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        a, gate = x.chunk(2, dim=-1)
        y, stats = F.silu(gate).mul_(a), ()
        if gain is not None and y.shape[-1] > MAX_DIM:
            y, *stats = torch.native_layer_norm(y, y.shape[-1:], gain.to(x.dtype), None, eps)
        elif gain is not None:
            y = norm._layer_norm(y, gain, None, None, None, eps, *OPTIONS, x.dtype)[0]
        ctx.save_for_backward(x, gain, *stats)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, gain, *stats = ctx.saved_tensors
        (a, gate), dgain, (need_x, need_gain, _) = x.chunk(2, dim=-1), None, ctx.needs_input_grad
        silu = F.silu(gate)
        if stats:
            needed, dim = (need_x, need_gain, False), grad.shape[-1:]
            grad, dgain, _ = torch.ops.aten.native_layer_norm_backward(
                grad, silu * a, dim, *stats, gain.to(x.dtype), None, needed
            )
        elif gain is not None:
            options = gain, None, None, None, ctx.eps, *OPTIONS, x.dtype
            grad, dgain, _ = norm._layer_norm_bwd(silu * a, *options, as_rows(grad), None, need_x, need_gain, False)
        dgain = dgain.to(gain.dtype) if need_gain else None
        if not need_x:
            return None, dgain, None
        dx = torch.empty_like(x)
        of_a, of_gate = dx.chunk(2, dim=-1)
        torch.mul(grad, silu, out=of_a)
        torch.ops.aten.silu_backward.grad_input(torch.mul(grad, a, out=silu), gate, grad_input=of_gate)
        return dx, dgain, None


def swiglu_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """`ops.swiglu_norm`; the gate, and norms of rows beyond 4096, are PyTorch's. It has no second derivative."""
    dim = x.shape[-1] // 2
    check(x, x=(x, x.shape), gain=(gain, (dim,)))
    with reference.without_autocast(x):
        return _SwigluNorm.apply(as_rows(x), gain, eps).view(*x.shape[:-1], dim)
