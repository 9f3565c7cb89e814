"""Linears of few rows on the CPU: calls of `c/linear.c`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import LinearArgs, flat
from . import calls, library, structs
from .calls import FLOATS
from .library import KINDS


def takes_linear(args: LinearArgs) -> bool:
    """Whether `linear` computes these numbers, of those that `library.take` gives: fp32, bf16, or int8 weights."""
    x, weight, _, beside, scale, stream, _, norm_gain, _, _, _, _, dtype = args
    if x.dtype not in FLOATS or dtype not in (None, *FLOATS) or x.ndim < 1 or weight.ndim != 2:
        return False
    if beside is not None and (beside.dtype != weight.dtype or beside.ndim != 2 or beside.stride()[1] != 1):
        return False
    if not x.numel() or x.shape[-1] != weight.shape[1] or weight.stride()[1] != 1:
        return False
    if (weight.dtype == torch.int8) != (scale is not None):
        return False
    return scale is not None or x.dtype == weight.dtype or stream is not None or norm_gain is not None


def _results(args: LinearArgs) -> tuple[Tensor, Tensor]:
    out = _result(args)
    return out, out.new_empty(0 if args.stream is None else args.x.shape, dtype=torch.float32)


def _result(args: LinearArgs) -> Tensor:
    shape, dtype = args.result
    return args.x.new_empty(shape, dtype=dtype)


def _run(args: LinearArgs) -> Tensor | tuple[Tensor, Tensor]:
    x, weight, bias, beside, scale, stream, stream_gain, norm_gain, norm_bias, eps, activation, residual, _ = args
    out, total = (_result(args), None) if stream is None else _results(args)
    columns, dim, first, more = out.shape[-1], x.shape[-1], weight.shape[0], 0 if beside is None else beside.shape[0]
    outputs = first + more
    if activation == "swiglu" and (more or outputs % 2):
        raise ValueError(f"weight has {first} rows, beside {more}; 'swiglu' needs one weight of an even number")
    if (stream is None) != (stream_gain is None):
        raise ValueError("stream and stream_gain must be given together")
    of_x = x if x.ndim == 2 else x.reshape(-1, dim)
    of_x = of_x if of_x.stride()[1] == 1 else of_x.contiguous()
    rows = of_x.shape[0]
    vectors = [
        ("scale", scale, (outputs,)), ("bias", bias, (outputs,)), ("norm_gain", norm_gain, (dim,)),
        ("norm_bias", norm_bias, (dim,)), ("stream_gain", stream_gain, (dim,)),
    ]  # fmt: skip
    if more:
        vectors += ((f"beside_{name}", t if t is None else t[first:], (more,)) for name, t, _ in vectors[:2])
    vectors, fields, kept = [array for array in vectors if array[1] is not None], {}, []
    matrices = ("weight", weight, (first, dim)), ("beside", beside, (more, dim))
    for (name, *_), (data, kind) in zip(vectors, calls.vectors_of(vectors, kept, matrices)):
        fields[name], fields[f"{name}_kind"] = data, kind
    if stream is not None or residual is not None:
        arrays = ("stream", stream, x.shape), ("residual", residual, out.shape)
        fields["stream"], fields["residual"] = calls.addresses_of(arrays, kept)
    call = structs.Linear(
        x=of_x.data_ptr(), x_kind=KINDS[x.dtype], x_stride=of_x.stride()[0],
        out=out.data_ptr(), out_kind=KINDS[out.dtype], out_stride=columns,
        weight=weight.data_ptr(), weight_kind=KINDS[weight.dtype], weight_stride=weight.stride()[0],
        columns=columns - more, rows=rows, dim=dim, activation=calls.ACTIVATIONS[activation], eps=eps, **fields,
    )  # fmt: skip
    if total is not None:
        call.total = total.data_ptr()
    if more:
        call.beside, call.beside_kind, call.beside_stride = beside.data_ptr(), call.weight_kind, beside.stride()[0]
        call.beside_columns = more
    library.run("linear", call, x=x, rows=rows)
    return out if total is None else (out, total)


def _run_always(args: LinearArgs) -> tuple[Tensor, Tensor]:
    found = _run(args)
    return (found, found.new_empty(0, dtype=torch.float32)) if args.stream is None else found


def _takes_op(*args) -> bool:
    return takes_linear(LinearArgs(*args))


_run_op, _schema = flat(_run_always)
calls.define_operation(f"cpu_linear{_schema}", _run_op, _takes_op, flat(_results)[0])


def linear(args: LinearArgs) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.linear` of what `takes_linear` says, for arguments that it fits. All of it is computed in fp32.

    The sum of a stream is fp32.
    """
    if not torch.compiler.is_compiling():
        return _run(args)
    out, total = torch.ops.fastprior.cpu_linear.default(*args)
    return out if args.stream is None else (out, total)


def linear_where_taken(args: LinearArgs) -> Tensor | tuple[Tensor, Tensor] | None:
    """`linear` of what `library.take` gives and `takes_linear` says, and None of everything else."""
    x, weight, bias, beside, scale, stream, stream_gain, norm_gain, norm_bias, eps, activation, residual, dtype = args
    if not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return None
    tensors = x, weight, bias, beside, scale, stream, stream_gain, norm_gain, norm_bias, residual
    found = library.take(tensors, weight.dtype, x.shape[:-1].numel())
    if found is None:
        return None
    *tensors, residual = found
    args = LinearArgs(*tensors, eps, activation, residual, dtype)
    return linear(args) if takes_linear(args) else None
