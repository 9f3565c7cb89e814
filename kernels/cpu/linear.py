"""Linears of few rows and their attention on the CPU: calls of `c/linear.c`."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..arguments import LinearArgs, flat
from .library import KINDS, library, most_rows
from .threads import thread_count

ACTIVATIONS = {None: 0, "gelu": 1, "swiglu": 2}
FLOATS = torch.float32, torch.bfloat16
LINEAR, DECODE = struct.Struct("=42qd"), struct.Struct("=36qd")  # of the source
MAX_DIM_HEAD, MAX_KEYS, MAX_OWN = 256, 4096, 2**16  # of attention: its threads keep keys, own ones in full, on stacks


def _is_watched() -> bool:
    """Whether a mode, a transform, forward-mode gradients or a trace follow operations: C would pass them by."""
    if torch.compiler.is_compiling():  # which sees an operation of its own
        return False
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    return transformed or is_in_torch_dispatch_mode() or torch.jit.is_tracing()


def _are_numbers(given: Sequence[Tensor]) -> bool:
    """Whether these are on the CPU, not of a subclass that keeps others."""
    return all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype != torch.float64 for t in given)


def _are_plain(*given: Tensor | None) -> bool:
    """Whether these are numbers without gradient."""
    given = [t for t in given if t is not None]
    return _are_numbers(given) and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))


def takes_linear(args: LinearArgs) -> bool:
    """Whether `linear` computes this: few rows on the CPU, in fp32 or bf16 or of int8 weights, without gradient."""
    x, weight, bias, beside, scale, stream, stream_gain, norm_gain, norm_bias, _, _, residual, dtype = args
    if not x.is_cpu or x.dtype not in FLOATS or dtype not in (None, *FLOATS) or x.ndim < 1 or weight.ndim != 2:
        return False
    if not _are_plain(x, weight, bias, beside, scale, stream, stream_gain, norm_gain, norm_bias, residual):
        return False
    if beside is not None and (beside.dtype != weight.dtype or beside.ndim != 2 or beside.stride(1) != 1):
        return False
    if not 0 < x.numel() <= most_rows(weight.dtype) * x.shape[-1] or x.shape[-1] != weight.shape[1]:
        return False
    if weight.stride(1) != 1 or (weight.dtype == torch.int8) != (scale is not None):
        return False
    if scale is None and x.dtype != weight.dtype and stream is None and norm_gain is None:
        return False
    return not torch.is_autocast_enabled("cpu") and not _is_watched()


def takes_decode(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, rotary=None, bias=None, mask=None,
    dropout: float = 0.0, **_,
) -> bool:  # fmt: skip
    """Whether `decode_attention` computes this: on the CPU, in fp32 or bf16 over a prefix in fp32, without gradient."""
    if not q.is_cpu or dropout or q.dtype not in FLOATS or not most_rows(torch.float32):
        return False
    if not q.dtype == k.dtype == v.dtype or not prefix_k.dtype == prefix_v.dtype == torch.float32:
        return False
    if q.shape[-1] > MAX_DIM_HEAD or prefix_k.shape[1] + k.shape[1] > MAX_KEYS or not q.numel():
        return False
    if k.shape[1] * q.shape[-1] > MAX_OWN:
        return False
    return _are_plain(q, k, v, prefix_k, prefix_v, bias, mask, *(rotary or ())) and not _is_watched()


_operations = torch.library.Library("fastprior", "FRAGMENT")


def _results(args: LinearArgs) -> tuple[Tensor, Tensor]:
    x, of_sum = args.x, 0 if args.stream is None else args.x.shape
    out = torch.empty((*x.shape[:-1], args.columns), dtype=args.result_dtype, device=x.device)
    return out, torch.empty(of_sum, dtype=torch.float32, device=x.device)


def _rows(t: Tensor) -> Tensor:
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _vector(t: Tensor | None, kept: list, first: int = 0) -> tuple[int, int]:
    """`struct vector`, from an element on; what has to be copied for it is kept."""
    if t is None:
        return 0, 0
    if t.dtype not in FLOATS or not t.is_contiguous():
        t = t.float().contiguous()
        kept.append(t)
    return t.data_ptr() + first * t.element_size(), KINDS[t.dtype]


def _weight(t: Tensor | None, scale: Tensor | None, kept: list, first: int = 0) -> tuple[int, int, int, int, int]:
    if t is None:
        return 0, 0, 0, 0, 0
    return t.data_ptr(), KINDS[t.dtype], t.stride(0), *_vector(scale, kept, first)


def _address(t: Tensor | None, kept: list) -> int:
    """Where contiguous numbers in fp32 lie; what has to be copied for that is kept."""
    if t is None:
        return 0
    if t.dtype != torch.float32 or not t.is_contiguous():
        t = t.float().contiguous()
        kept.append(t)
    return t.data_ptr()


def _check(failed: int, x: Tensor) -> None:
    if failed:
        raise MemoryError(f"no memory to lay out x of shape {tuple(x.shape)}")


def _fit(name: str, t: Tensor | None, *shape: int) -> None:
    """The source trusts its numbers."""
    if t is not None and t.shape != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be {shape}")


def _fit_rows(rows: int) -> None:
    most = most_rows(torch.float32)
    if not 0 < rows <= most:
        raise ValueError(f"x has {rows} rows; they must be 1 to {most}")


def _fit_attention(rows, heads, seq, suffix, dim_head, prefix_k, cos, sin, bias, mask) -> None:
    prompts, prefix, kv_heads, _ = prefix_k.shape
    if not prompts or rows % prompts or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{rows} rows of {heads} heads; they must be multiples of {prompts} prompts, {kv_heads} kv_heads"
        )
    if not 0 < seq <= suffix:
        raise ValueError(f"{seq} tokens of queries; they must be 1 to {suffix}, as many as those of keys")
    _fit("prefix_k", prefix_k, prompts, prefix, kv_heads, dim_head)
    _fit("mask", mask, prompts, prefix)
    _fit("bias", bias, suffix, heads if bias is None or bias.shape[1] != 1 else 1, prefix + suffix)
    if cos is not None:
        _fit("cos", cos, suffix, min(dim_head, cos.shape[-1]) // 2 * 2)
        _fit("sin", sin, *cos.shape)


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
    _fit_rows(len(of_x))
    _fit("weight", weight, len(weight), dim)
    _fit("beside", beside, more, dim)
    _fit("bias", bias, outputs)
    _fit("scale", scale, outputs)
    _fit("norm_gain", norm_gain, dim)
    _fit("norm_bias", norm_bias, dim)
    _fit("stream_gain", stream_gain, dim)
    _fit("stream", stream, *x.shape)
    _fit("residual", residual, *out.shape)
    call = LINEAR.pack(
        of_x.data_ptr(), KINDS[x.dtype], of_x.stride(0), out.data_ptr(), KINDS[out.dtype], columns,
        *_weight(weight, scale, kept), *_weight(beside, scale, kept, len(weight)), 0, 0, 0, 0, 0,
        *_vector(bias, kept), *(_vector(bias, kept, len(weight)) if more else (0, 0)), 0, 0,
        *_vector(stream_gain, kept), *_vector(norm_gain, kept), *_vector(norm_bias, kept),
        _address(stream, kept), _address(residual, kept), total.data_ptr(),
        columns - more, more, 0, *of_x.shape, ACTIVATIONS[activation], eps,
    )  # fmt: skip
    _check(run(call, thread_count()), x)
    return out, total


_run_op, _schema = flat(_run)
_operations.define(f"cpu_linear{_schema}")
_operations.impl("cpu_linear", _run_op, "CPU")
torch.library.register_fake("fastprior::cpu_linear", flat(_results)[0], lib=_operations)


def linear(args: LinearArgs) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.linear` of what `takes_linear` says, for arguments that it fits. All of it is computed in fp32.

    The sum of a stream is fp32.
    """
    out, total = torch.ops.fastprior.cpu_linear.default(*args) if torch.compiler.is_compiling() else _run(args)
    return out if args.stream is None else (out, total)


_operations.define(
    "cpu_decode(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, float scale, Tensor? cos, Tensor? sin, "
    "bool cosine, Tensor? bias, Tensor? mask) -> Tensor"
)


def _fake_decode(q, k, v, prefix_k, prefix_v, scale, cos, sin, cosine, bias, mask) -> Tensor:
    return torch.empty((*q.shape[:2], q.shape[2] * q.shape[3]), dtype=q.dtype, device=q.device)


def _heads(t: Tensor) -> Tensor:
    """Heads (…, tokens, heads, dim_head) that lie side by side in each token."""
    return t if t.stride(-1) == 1 and t.stride(-2) == t.shape[-1] else t.contiguous()


def _cache(t: Tensor, kept: list) -> tuple[int, ...]:
    """Where keys or values (…, dim_head) lie, and their strides but the last, which is 1."""
    if t.stride(-1) != 1:
        t = t.contiguous()
        kept.append(t)
    return t.data_ptr(), *t.stride()[:-1]


def _run_decode(q, k, v, prefix_k, prefix_v, scale, cos, sin, cosine, bias, mask) -> Tensor:
    out = _fake_decode(q, k, v, prefix_k, prefix_v, scale, cos, sin, cosine, bias, mask)
    rows, seq, heads, dim_head = q.shape
    prompts, prefix, kv_heads, _ = prefix_k.shape
    kept, kind = [], KINDS[q.dtype]
    q, k, v = map(_heads, (q, k, v))
    if k.stride()[:2] != v.stride()[:2]:
        k, v = k.contiguous(), v.contiguous()
    _fit("k", k, rows, k.shape[1], kv_heads, dim_head)
    _fit("v", v, *k.shape)
    _fit("prefix_v", prefix_v, *prefix_k.shape)
    _fit_attention(rows, heads, seq, k.shape[1], dim_head, prefix_k, cos, sin, bias, mask)
    bias = None if bias is None else bias.expand(-1, heads, -1)
    library().decode_attention(
        DECODE.pack(
            q.data_ptr(), kind, q.stride(1), k.data_ptr(), kind, k.stride(1), v.data_ptr(), kind, v.stride(1),
            out.data_ptr(), kind, out.shape[-1], *_cache(prefix_k, kept), *_cache(prefix_v, kept),
            _address(bias, kept), _address(mask, kept), _address(cos, kept), _address(sin, kept),
            q.stride(0), k.stride(0), rows, seq, k.shape[1], heads, kv_heads, dim_head, prompts, prefix,
            0 if cos is None else cos.shape[-1], cosine, scale,
        ),
        thread_count(),
    )  # fmt: skip
    return out


_operations.impl("cpu_decode", _run_decode, "CPU")
torch.library.register_fake("fastprior::cpu_decode", _fake_decode, lib=_operations)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    scale: float,
    rotary: tuple[Tensor, Tensor] | None = None,
    cosine: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`reference.decode_attention` of what `takes_decode` says."""
    run = torch.ops.fastprior.cpu_decode.default if torch.compiler.is_compiling() else _run_decode
    return run(q, k, v, prefix_k, prefix_v, scale, *(rotary or (None, None)), cosine, bias, mask)
