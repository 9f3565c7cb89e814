"""Linears of few rows on the CPU: calls of `c/linear.c`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import calls, structs
from .calls import FLOATS
from .library import KINDS, library, most_rows
from .threads import thread_count


def takes_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    beside: Tensor | None = None,
    scale: Tensor | None = None,
    stream: Tensor | None = None,
    stream_gain: Tensor | None = None,
    norm_gain: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    **_,
) -> bool:
    """Whether `linear` computes this: few rows on the CPU, in fp32 or bf16 or of int8 weights, without gradient."""
    if not x.is_cpu or x.dtype not in FLOATS or dtype not in (None, *FLOATS) or x.ndim < 1 or weight.ndim != 2:
        return False
    if not calls.are_plain(x, weight, bias, beside, scale, stream, stream_gain, norm_gain, norm_bias, residual):
        return False
    if beside is not None and (beside.dtype != weight.dtype or beside.ndim != 2 or beside.stride(1) != 1):
        return False
    if not 0 < x.numel() <= most_rows(weight.dtype) * x.shape[-1] or x.shape[-1] != weight.shape[1]:
        return False
    if weight.stride(1) != 1 or (weight.dtype == torch.int8) != (scale is not None):
        return False
    if scale is None and x.dtype != weight.dtype and stream is None and norm_gain is None:
        return False
    return not torch.is_autocast_enabled("cpu") and not calls.is_watched()


def _results(x, weight, beside, stream, activation, residual, dtype) -> tuple[Tensor, Tensor]:
    columns = len(weight) // 2 if activation == "swiglu" else len(weight) + (0 if beside is None else len(beside))
    dtype = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    out = torch.empty((*x.shape[:-1], columns), dtype=dtype, device=x.device)
    return out, torch.empty(0 if stream is None else x.shape, dtype=torch.float32, device=x.device)


def _fake(
    x, weight, bias, beside, scale, stream, stream_gain, norm_gain, norm_bias, eps, activation, residual, dtype
):  # fmt: skip
    return _results(x, weight, beside, stream, activation, residual, dtype)


def _rows(t: Tensor) -> Tensor:
    t = t if t.ndim == 2 else t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _run(
    x, weight, bias, beside, scale, stream, stream_gain, norm_gain, norm_bias, eps, activation, residual, dtype
):  # fmt: skip
    out, total = _results(x, weight, beside, stream, activation, residual, dtype)
    kept, columns, of_x, dim = [], out.shape[-1], _rows(x), x.shape[-1]
    more = 0 if beside is None else len(beside)
    outputs = len(weight) + more
    if activation == "swiglu" and (more or outputs % 2):
        raise ValueError(f"weight has {len(weight)} rows, beside {more}; 'swiglu' needs one weight of an even number")
    if (stream is None) != (stream_gain is None):
        raise ValueError("stream and stream_gain must be given together")
    run = library().linear
    calls.check_rows(len(of_x))
    calls.check_shape("weight", weight, len(weight), dim)
    calls.check_shape("beside", beside, more, dim)
    fields, vectors = {}, (("scale", scale, outputs), ("bias", bias, outputs), ("norm_gain", norm_gain, dim))
    for name, t, length in (*vectors, ("norm_bias", norm_bias, dim), ("stream_gain", stream_gain, dim)):
        if t is not None:
            calls.check_shape(name, t, length)
            fields[name], fields[f"{name}_kind"] = calls.vector_of(t, kept)
    for name, t, rows in ("stream", stream, x), ("residual", residual, out):
        if t is not None:
            calls.check_shape(name, t, *rows.shape)
            fields[name] = calls.address_of(t, kept)
    call = structs.Linear(
        x=of_x.data_ptr(), x_kind=KINDS[x.dtype], x_stride=of_x.stride(0),
        out=out.data_ptr(), out_kind=KINDS[out.dtype], out_stride=columns,
        weight=weight.data_ptr(), weight_kind=KINDS[weight.dtype], weight_stride=weight.stride(0),
        total=total.data_ptr(), columns=columns - more, rows=len(of_x), dim=dim,
        activation=calls.ACTIVATIONS[activation], eps=eps, **fields,
    )  # fmt: skip
    if more:
        call.beside, call.beside_kind, call.beside_stride = beside.data_ptr(), call.weight_kind, beside.stride(0)
        call.beside_columns = more
        call.beside_scale, call.beside_scale_kind = calls.vector_of(scale, kept, len(weight))
        call.beside_bias, call.beside_bias_kind = calls.vector_of(bias, kept, len(weight))
    calls.check_memory(run(call, thread_count()), x)
    return out, total


calls.define_operation(
    "cpu_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? beside, Tensor? scale, Tensor? stream, "
    "Tensor? stream_gain, Tensor? norm_gain, Tensor? norm_bias, float eps, str? activation, Tensor? residual, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    _run,
    _fake,
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    beside: Tensor | None = None,
    scale: Tensor | None = None,
    stream: Tensor | None = None,
    stream_gain: Tensor | None = None,
    norm_gain: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.linear` of what `takes_linear` says, for arguments that it fits. All of it is computed in fp32.

    The sum of a stream is fp32.
    """
    run = torch.ops.fastprior.cpu_linear.default if torch.compiler.is_compiling() else _run
    if stream is None and norm_gain is None:
        dtype = x.dtype
    elif dtype is None:
        dtype = x.dtype if scale is not None else weight.dtype
    out, total = run(
        x, weight, bias, beside, scale, stream, stream_gain, norm_gain, norm_bias, eps, activation, residual, dtype
    )
    return out if stream is None else (out, total)
