"""Linears of few rows on the CPU: calls of `c/linear.c`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import LinearArgs, flat
from . import calls, structs
from .calls import FLOATS
from .library import KINDS, library, most_rows, thread_count


def takes_linear(args: LinearArgs) -> bool:
    """Whether `linear` computes this: few rows on the CPU, in fp32 or bf16 or of int8 weights, without gradient."""
    x, weight, bias, beside, scale, stream, stream_gain, norm_gain, norm_bias, _, _, residual, dtype = args
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


def _results(args: LinearArgs) -> tuple[Tensor, Tensor]:
    x, of_sum = args.x, 0 if args.stream is None else args.x.shape
    out = torch.empty((*x.shape[:-1], args.columns), dtype=args.result_dtype, device=x.device)
    return out, torch.empty(of_sum, dtype=torch.float32, device=x.device)


def _rows(t: Tensor) -> Tensor:
    t = t if t.ndim == 2 else t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _run(args: LinearArgs) -> tuple[Tensor, Tensor]:
    x, weight, bias, beside, scale, stream, stream_gain, norm_gain, norm_bias, eps, activation, residual, _ = args
    out, total = _results(args)
    kept, columns, of_x, dim = [], out.shape[-1], _rows(x), x.shape[-1]
    outputs = args.outputs
    more = outputs - weight.shape[0]
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


_run_op, _schema = flat(_run)
calls.define_operation(f"cpu_linear{_schema}", _run_op, flat(_results)[0])


def linear(args: LinearArgs) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.linear` of what `takes_linear` says, for arguments that it fits. All of it is computed in fp32.

    The sum of a stream is fp32.
    """
    out, total = torch.ops.fastprior.cpu_linear.default(*args) if torch.compiler.is_compiling() else _run(args)
    return out if args.stream is None else (out, total)
