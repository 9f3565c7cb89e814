"""Linears of few rows, their attention, whole blocks of both, and whole steps of a run on the CPU: calls of `cpu.c`."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import huge_pages
from .cpu_library import KINDS, library, most_rows

ACTIVATIONS = {None: 0, "gelu": 1, "swiglu": 2}
FLOATS = torch.float32, torch.bfloat16
CLAMPS = {None: 0, "range": 1, "l2": 2}
LINEAR, DECODE, BLOCKS = struct.Struct("=42qd"), struct.Struct("=36qd"), struct.Struct("=48qdd")  # of the source
RUN = struct.Struct(f"{BLOCKS.format}8qdd")
MAX_DIM_HEAD, MAX_KEYS, MAX_OWN = 256, 4096, 2**16  # of attention: its threads keep keys, own ones in full, on stacks


def most_tokens(dtype: torch.dtype) -> int:
    """The most tokens that `run_blocks` takes with weights of this dtype: what it saves between linears counts, too."""
    return max(most_rows(dtype), min(128, most_rows(torch.float32)))


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


class Block(NamedTuple):
    """The weights of a transformer block: attention and feed-forward, each behind a norm, on a residual stream.

    Without `v`, `k` has the rows of the values behind those of the keys. `out_gain` is that of a norm of attention's
    result, `inner_gain` of a norm before `contract`. Scales are those of int8 weights. A head, the norm and the linear
    of what the last block gives, is one of `q` and what belongs to it.
    """

    q: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    out: Tensor | None = None
    expand: Tensor | None = None
    contract: Tensor | None = None
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    out_scale: Tensor | None = None
    expand_scale: Tensor | None = None
    contract_scale: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    out_bias: Tensor | None = None
    expand_bias: Tensor | None = None
    contract_bias: Tensor | None = None
    norm_gain: Tensor | None = None
    norm_bias: Tensor | None = None
    out_gain: Tensor | None = None
    ff_gain: Tensor | None = None
    ff_bias: Tensor | None = None
    inner_gain: Tensor | None = None


MATRICES = 6


class Blocks(NamedTuple):
    """The blocks of a step as C reads them, from `prepare_blocks`.

    Attributes:
        table: (depth, numbers) int64, the source's `struct block`: where the weights lie; one row more with a head.
        kept: what lies there.
        owner: whose weights they are.
        dtype: of the matrices.
        sizes: depth, dim, inner, heads, kv_heads, dim_head, whether there is a head, and columns of the result.
        scale, cosine, activation, eps: see `prepare_blocks`.
        requires_grad: whether a weight does.
    """

    table: Tensor
    kept: object
    owner: nn.Module
    dtype: torch.dtype
    sizes: tuple[int, ...]
    scale: float
    cosine: bool
    activation: str
    eps: float
    requires_grad: bool

    @property
    def has_head(self) -> bool:
        return bool(self.sizes[-2])


def prepare_blocks(
    blocks: Sequence[Block],
    *,
    owner: nn.Module,
    heads: int,
    kv_heads: int,
    dim_head: int,
    scale: float,
    cosine: bool,
    activation: str,
    eps: float,
    head: Block | None = None,
) -> Blocks | None:
    """Blocks for any number of calls of `run_blocks`, which see edits in place; None where it cannot compute them.

    Args:
        blocks: the weights.
        owner: whose weights they are, for callers to compare with.
        heads, kv_heads, dim_head, scale, cosine: see `reference.decode_attention`.
        activation: of the feed-forwards, "gelu" or "swiglu".
        eps: of all norms.
        head: after the blocks, see `Block`; its norm is `stable`, see `reference.layer_norm`.
    Raises:
        ValueError: shapes that do not fit each other.
    """
    first, everything = blocks[0], [*blocks, *([] if head is None else [head])]
    weights = [t for t in itertools.chain(*everything) if t is not None]
    matrices = [t for block in everything for t in block[:MATRICES] if t is not None]
    if not _are_numbers(weights) or any(t.dtype != first.q.dtype or t.stride(1) != 1 for t in matrices):
        return None
    if _is_watched() or first.q.dtype not in KINDS or not most_tokens(first.q.dtype):
        return None
    own, shared, dim, inner = heads * dim_head, kv_heads * dim_head, first.q.shape[1], first.contract.shape[1]
    kept, numbers = [t.untyped_storage() for t in weights], []  # those of a parameter may be replaced
    shapes = {
        "q": (own, dim), "k": (shared, dim), "v": (shared, dim), "out": (dim, own),
        "expand": (inner * 2 if activation == "swiglu" else inner, dim), "contract": (dim, inner),
    }  # fmt: skip
    columns = dim if head is None else len(head.q)
    for block in everything:
        given = {"q": (columns, dim)} if block is head else shapes
        given = given if block is head or block.v is not None else shapes | {"k": (2 * shared, dim)}
        _fit_block(block, given, dim, inner)
        for at in range(MATRICES):
            numbers += _weight(block[at], block[MATRICES + at], kept)
        for at in range(2 * MATRICES, len(block)):
            numbers += _vector(block[at], kept)
    table = torch.tensor(numbers, dtype=torch.int64, device="cpu").view(len(everything), -1)
    sizes = len(blocks), dim, inner, heads, kv_heads, dim_head, head is not None, columns
    requires_grad = any(t.requires_grad for t in weights)
    huge_pages.settle(owner, matrices)
    return Blocks(table, kept, owner, first.q.dtype, sizes, scale, cosine, activation, eps, requires_grad)


def _takes_tokens(rows: int, suffix: int, blocks: Blocks, prefix_k: Tensor) -> bool:
    """Whether there are few enough tokens, and keys."""
    prefix, dim_head = prefix_k.shape[2], prefix_k.shape[-1]
    few = 0 < rows * suffix <= most_tokens(blocks.dtype) and dim_head <= MAX_DIM_HEAD
    return few and prefix + suffix <= MAX_KEYS and suffix * dim_head <= MAX_OWN


def takes_blocks(
    x: Tensor, blocks: Blocks, prefix_k: Tensor, prefix_v: Tensor, *, rotary=None, bias=None, mask=None, **_
) -> bool:
    """Whether `run_blocks` computes this: few rows in fp32 on the CPU, no gradient."""
    if not x.is_cpu or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if not prefix_k.dtype == prefix_v.dtype == torch.float32 or (blocks.requires_grad and torch.is_grad_enabled()):
        return False
    if not _takes_tokens(*x.shape[:2], blocks, prefix_k):
        return False
    return _are_plain(x, prefix_k, prefix_v, bias, mask, *(rotary or ())) and not _is_watched()


_operations = torch.library.Library("fastprior", "FRAGMENT")
_operations.define(
    "cpu_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? beside, Tensor? scale, Tensor? stream, "
    "Tensor? stream_gain, Tensor? norm_gain, Tensor? norm_bias, float eps, str? activation, Tensor? residual, "
    "ScalarType dtype) -> (Tensor, Tensor)"
)


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
    _check(run(call, torch.get_num_threads()), x)
    return out, total


_operations.impl("cpu_linear", _run, "CPU")
torch.library.register_fake("fastprior::cpu_linear", _fake, lib=_operations)


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
        torch.get_num_threads(),
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


_operations.define(
    "cpu_blocks(Tensor x, Tensor table, Tensor prefix_k, Tensor prefix_v, int outputs, int[] sizes, float scale, "
    "Tensor? cos, Tensor? sin, bool cosine, Tensor? bias, Tensor? mask, str activation, float eps) -> Tensor"
)


def _fake_blocks(x, table, prefix_k, prefix_v, outputs, sizes, *_) -> Tensor:
    rows, suffix, _ = x.shape
    depth, _, _, *heads_and_dim = prefix_k.shape
    shape = (rows, outputs, sizes[-1]) if outputs else (depth, rows, suffix, 2, *heads_and_dim)
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _fit_block(block: Block, shapes: dict[str, tuple[int, int]], dim: int, inner: int) -> None:
    for at, (name, shape) in enumerate(shapes.items()):
        for kind, given, wanted in ("", block[at], shape), ("_scale", block[MATRICES + at], shape[:1]):
            if given is not None and given.shape != wanted:
                _fit(name + kind, given, *wanted)
        _fit(f"{name}_bias", block[2 * MATRICES + at], shape[0])
    for name in "norm_gain", "norm_bias", "out_gain", "ff_gain", "ff_bias":
        _fit(name, getattr(block, name), dim)
    _fit("inner_gain", block.inner_gain, inner)


def _run_blocks(
    x, table, prefix_k, prefix_v, outputs, sizes, scale, cos, sin, cosine, bias, mask, activation, eps
):  # fmt: skip
    kept = []
    _fit("x", x, *x.shape[:2], sizes[1])
    given = table, prefix_k, prefix_v, outputs, sizes, scale, cos, sin, cosine, bias, mask, activation, eps
    numbers = _numbers_of_blocks(*x.shape[:2], *given, kept)
    out = _fake_blocks(x, table, prefix_k, prefix_v, outputs, sizes)
    call = BLOCKS.pack(_address(x, kept), out.data_ptr(), *numbers)
    _check(library().run_blocks(call, torch.get_num_threads()), x)
    return out


def _numbers_of_blocks(
    rows, suffix, table, prefix_k, prefix_v, outputs, sizes, scale, cos, sin, cosine, bias, mask, activation, eps, kept
):  # fmt: skip
    """`struct blocks` behind x and out, of shapes that fit."""
    depth, dim, inner, heads, kv_heads, dim_head, head, columns = sizes
    prompts, prefix = prefix_k.shape[1:3]
    _fit_rows(rows * suffix)
    _fit("prefix_k", prefix_k, depth, prompts, prefix, kv_heads, dim_head)
    _fit("prefix_v", prefix_v, *prefix_k.shape)
    _fit_attention(rows, heads, outputs or suffix, suffix, dim_head, prefix_k[0], cos, sin, bias, mask)
    bias = None if bias is None else bias.expand(-1, heads, -1)
    (first_k, layer_k, *of_k), (first_v, layer_v, *of_v) = _cache(prefix_k, kept), _cache(prefix_v, kept)
    return (
        table.data_ptr(), depth, dim, inner, outputs, head, columns, ACTIVATIONS[activation], layer_k, layer_v,
        *(0,) * 12, first_k, *of_k, first_v, *of_v,
        _address(bias, kept), _address(mask, kept), _address(cos, kept), _address(sin, kept),
        0, 0, rows, 0, suffix, heads, kv_heads, dim_head, prompts, prefix, 0 if cos is None else cos.shape[-1], cosine,
        scale, eps,
    )  # fmt: skip


_operations.impl("cpu_blocks", _run_blocks, "CPU")
torch.library.register_fake("fastprior::cpu_blocks", _fake_blocks, lib=_operations)


def run_blocks(
    x: Tensor,
    blocks: Blocks,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    outputs: int,
    rotary: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """All blocks of a step, in one call and in fp32, for what `takes_blocks` says.

    Args:
        x: (rows, suffix, dim) fp32, the residual stream of the suffix tokens.
        blocks: from `prepare_blocks`.
        prefix_k, prefix_v: (depth, prompts, prefix, kv_heads, dim_head) fp32, see `reference.decode_attention`.
        outputs: of how many of the last tokens the result is wanted, that of the head where there is one. 0 asks for
            keys and values instead.
        rotary, bias, mask: see `reference.decode_attention`.
    Returns:
        (rows, outputs, dim) fp32, with a head its columns; without outputs keys and values of all tokens and blocks,
        neither rotated nor normalised: (depth, rows, suffix, 2, kv_heads, dim_head) fp32.
    """
    run = torch.ops.fastprior.cpu_blocks.default if torch.compiler.is_compiling() else _run_blocks
    given, tables = (blocks.table, prefix_k, prefix_v, outputs, blocks.sizes, blocks.scale), rotary or (None, None)
    return run(x, *given, *tables, blocks.cosine, bias, mask, blocks.activation, blocks.eps)


class Run:
    """A run whose steps are calls of C; from `prepare_run`.

    Attributes:
        x: the state, (samples, dim) fp32, which a call overwrites.
        steps: how many there are.
    """

    def __init__(self, call: bytes, x: Tensor, x0: Tensor, kept: object, steps: int):
        self.x, self.steps = x, steps
        self._x0, self._call, self._kept, self._run = x0, call, kept, library().run_steps

    def start(self, x: Tensor) -> None:
        """Begin at x (samples, dim)."""
        _fit("x", x, *self.x.shape)
        self.x.copy_(x)
        self._x0.zero_()

    def __call__(self, first: int, noise: Sequence[Tensor | None]) -> None:
        """Some steps that follow each other.

        Args:
            first: the number of the first.
            noise: that of each step, (samples, dim), or None.
        Raises:
            IndexError: there are not so many steps.
        """
        kept, count = [], len(noise)
        if not 0 <= first <= first + count <= self.steps:
            raise IndexError(f"steps {first} to {first + count - 1}; there are {self.steps}")
        for drawn in noise:
            _fit("noise", drawn, *self.x.shape)
        pointers = struct.pack(f"={count}q", *(_address(drawn, kept) for drawn in noise))
        _check(self._run(self._call, pointers, first, count, torch.get_num_threads()), self.x)


def prepare_run(
    blocks: Blocks,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    rows: int,
    samples: int,
    time_tokens: Tensor,
    query: Tensor,
    coefficients: Tensor,
    null_table: Tensor,
    cond_scale: float,
    clamp: str | None = None,
    radius: float = 1.0,
    rotary: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
) -> Run | None:
    """A run, each step of which makes its tokens, runs all blocks, and does `reference.diffusion_step`.

    A row holds the time's tokens, the noisy embeddings of its samples, and as many queries. None where `run_blocks`
    does not take this, or what the head gives is no embedding.

    Args:
        blocks, prefix_k, prefix_v, rotary, bias: see `run_blocks`.
        rows, samples: how many rows, and samples in each; those of one prompt lie together.
        time_tokens: (steps, tokens, dim) fp32.
        query: (dim,).
        coefficients: (steps, 6) fp32, the table of `reference.diffusion_step`, as are the next.
        null_table: (steps, dim) fp32; zeros leave predictions as they are.
        cond_scale, clamp, radius: see there.
    """
    steps, times, dim = time_tokens.shape
    x = torch.empty(rows * samples, dim, dtype=torch.float32, device="cpu")
    x0, suffix = torch.empty_like(x), times + 2 * samples
    given, (cos, sin) = (prefix_k, prefix_v, time_tokens, coefficients, null_table), rotary or (None, None)
    kept = [blocks, query, cos, sin, bias, *given]
    if not blocks.has_head or blocks.sizes[-1] != dim or not _are_plain(query, *given):
        return None
    tokens = x.new_empty(rows, suffix, 0)
    taken = takes_blocks(tokens, blocks, prefix_k, prefix_v, rotary=rotary, bias=bias)
    if not taken or any(t.dtype != torch.float32 for t in given):
        return None
    _fit("query", query, dim)
    _fit("coefficients", coefficients, steps, 6)
    _fit("null_table", null_table, steps, dim)
    numbers = _numbers_of_blocks(
        rows, suffix, blocks.table, prefix_k, prefix_v, samples, blocks.sizes, blocks.scale, cos, sin, blocks.cosine,
        bias, None, blocks.activation, blocks.eps, kept,
    )  # fmt: skip
    tables = (_address(t, kept) for t in (time_tokens, null_table, coefficients))
    call = RUN.pack(
        0, 0, *numbers, *tables, *_vector(query, kept), x.data_ptr(), x0.data_ptr(), CLAMPS[clamp], cond_scale, radius
    )
    return Run(call, x, x0, kept, steps)
