"""Whole blocks of linears and attention on the CPU, in one call: calls of `c/blocks.c`."""

from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import calls, huge_pages, structs
from .attention import attention_of, caches_of, fits_stacks
from .library import KINDS, library, most_rows, thread_count


def most_tokens(dtype: torch.dtype) -> int:
    """The most tokens that `run_blocks` takes with weights of this dtype: what it saves between linears counts, too."""
    return max(most_rows(dtype), min(128, most_rows(torch.float32)))


MATRICES, BIASES, NORMS = structs.Block.MATRICES, structs.Block.BIASES, structs.Block.NORMS
SCALES = tuple(f"{name}_scale" for name in MATRICES)


class Block(namedtuple("Block", (*MATRICES, *SCALES, *BIASES, *NORMS), defaults=(None,) * 23)):
    """The weights of a transformer block: attention and feed-forward, each behind a norm, on a residual stream.

    A head, the norm and the linear of what the last block gives, is one of `q` and what belongs to it.

    Attributes:
        q, k, v, out, expand, contract: the matrices. Without `v`, `k` has the values' rows behind those of the keys.
        q_scale, …, q_bias, …: of each matrix; scales are those of int8 weights.
        norm_gain, norm_bias, ff_gain, ff_bias: of the norms before attention and before the feed-forward.
        out_gain, inner_gain: of norms of attention's result, and before `contract`.
    """


class Blocks(NamedTuple):
    """The blocks of a step as C reads them, from `prepare_blocks`.

    Attributes:
        table: (depth, numbers) int64, the source's `struct block`: where the weights lie; one row more with a head.
        kept: what lies there.
        owner: whose weights they are.
        dtype: of the matrices.
        shape: depth, dim, inner, heads, kv_heads, dim_head, whether there is a head, and columns of the result.
        scale, cosine, activation, eps: see `prepare_blocks`.
        requires_grad: whether a weight does.
    """

    table: Tensor
    kept: object
    owner: nn.Module
    dtype: torch.dtype
    shape: tuple[int, ...]
    scale: float
    cosine: bool
    activation: str
    eps: float
    requires_grad: bool

    @property
    def has_head(self) -> bool:
        return bool(self.shape[-2])


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
    matrices = [t for block in everything for name in MATRICES if (t := getattr(block, name)) is not None]
    if not calls.are_numbers(weights) or any(t.dtype != first.q.dtype or t.stride(1) != 1 for t in matrices):
        return None
    if calls.is_watched() or first.q.dtype not in KINDS or not most_tokens(first.q.dtype):
        return None
    own, shared, dim, inner = heads * dim_head, kv_heads * dim_head, first.q.shape[1], first.contract.shape[1]
    kept = [t.untyped_storage() for t in weights]  # those of a parameter may be replaced
    shapes = {
        "q": (own, dim), "k": (shared, dim), "v": (shared, dim), "out": (dim, own),
        "expand": (inner * 2 if activation == "swiglu" else inner, dim), "contract": (dim, inner),
    }  # fmt: skip
    columns = dim if head is None else len(head.q)
    for block in everything:
        given = {"q": (columns, dim)} if block is head else shapes
        given = given if block is head or block.v is not None else shapes | {"k": (2 * shared, dim)}
        _check_block(block, given, dim, inner)
    table = (structs.Block * len(everything))(*(_struct_of(block, kept) for block in everything))
    table = torch.frombuffer(table, dtype=torch.int64).view(len(everything), -1)
    shape = len(blocks), dim, inner, heads, kv_heads, dim_head, head is not None, columns
    requires_grad = any(t.requires_grad for t in weights)
    huge_pages.settle(owner, matrices)
    return Blocks(table, kept, owner, first.q.dtype, shape, scale, cosine, activation, eps, requires_grad)


def takes_blocks(
    x: Tensor, blocks: Blocks, prefix_k: Tensor, prefix_v: Tensor, *, rotary=None, bias=None, mask=None, **_
) -> bool:
    """Whether `run_blocks` computes this: few rows in fp32 on the CPU, no gradient."""
    if not x.is_cpu or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if not prefix_k.dtype == prefix_v.dtype == torch.float32 or (blocks.requires_grad and torch.is_grad_enabled()):
        return False
    if not 0 < x.shape[0] * x.shape[1] <= most_tokens(blocks.dtype):
        return False
    if not fits_stacks(prefix_k.shape[-1], prefix_k.shape[2], x.shape[1]):
        return False
    return calls.are_plain(x, prefix_k, prefix_v, bias, mask, *(rotary or ())) and not calls.is_watched()


def _struct_of(block: Block, kept: list) -> structs.Block:
    fields = {name: calls.vector_of(getattr(block, name), kept) for name in (*BIASES, *NORMS)}
    for name, scale in zip(MATRICES, SCALES):
        if (t := getattr(block, name)) is not None:
            scale = calls.vector_of(getattr(block, scale), kept)
            fields[name] = structs.Weight((t.data_ptr(), KINDS[t.dtype], t.stride(0)), scale)
    return structs.Block(**fields)


def _check_block(block: Block, shapes: dict[str, tuple[int, int]], dim: int, inner: int) -> None:
    for name, shape in shapes.items():
        calls.check_shape(name, getattr(block, name), *shape)
        calls.check_shape(f"{name}_scale", getattr(block, f"{name}_scale"), shape[0])
        calls.check_shape(f"{name}_bias", getattr(block, f"{name}_bias"), shape[0])
    for name in NORMS:
        calls.check_shape(name, getattr(block, name), inner if name == "inner_gain" else dim)


def _fake_blocks(x, table, prefix_k, prefix_v, outputs, shape, *_) -> Tensor:
    rows, suffix, _ = x.shape
    depth, _, _, *heads_and_dim = prefix_k.shape
    out = (rows, outputs, shape[-1]) if outputs else (depth, rows, suffix, 2, *heads_and_dim)
    return torch.empty(out, dtype=torch.float32, device=x.device)


def _run_blocks(
    x, table, prefix_k, prefix_v, outputs, shape, scale, cos, sin, cosine, bias, mask, activation, eps
):  # fmt: skip
    kept, (rows, suffix, _) = [], x.shape
    calls.check_shape("x", x, rows, suffix, shape[1])
    call = blocks_of(
        rows, suffix, table, prefix_k, prefix_v, outputs, shape, scale, cos, sin, cosine, bias, mask, activation, eps,
        kept,
    )  # fmt: skip
    out = _fake_blocks(x, table, prefix_k, prefix_v, outputs, shape)
    call.x, call.out = calls.address_of(x, kept), out.data_ptr()
    calls.check_memory(library().run_blocks(call, thread_count()), x)
    return out


def blocks_of(
    rows, suffix, table, prefix_k, prefix_v, outputs, shape, scale, cos, sin, cosine, bias, mask, activation, eps, kept
) -> structs.Blocks:  # fmt: skip
    """Everything but x and out, which the caller sets; what C reads by address is kept.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    depth, dim, inner, heads, kv_heads, dim_head, head, columns = shape
    calls.check_rows(rows * suffix)
    calls.check_shape("prefix_k", prefix_k, depth, *prefix_k.shape[1:3], kv_heads, dim_head)
    calls.check_shape("prefix_v", prefix_v, *prefix_k.shape)
    prefix_k, prefix_v = caches_of(prefix_k, prefix_v)
    kept += prefix_k, prefix_v
    return structs.Blocks(
        blocks=table.data_ptr(), depth=depth, dim=dim, inner=inner, outputs=outputs, head=head, columns=columns,
        activation=calls.ACTIVATIONS[activation], eps=eps, prefix_layer=prefix_k.stride(0),
        attention=attention_of(
            rows, heads, outputs or suffix, suffix, dim_head, prefix_k, prefix_v, scale, cos, sin, cosine, bias, mask,
            kept,
        ),
    )  # fmt: skip


calls.define_operation(
    "cpu_blocks(Tensor x, Tensor table, Tensor prefix_k, Tensor prefix_v, int outputs, int[] shape, float scale, "
    "Tensor? cos, Tensor? sin, bool cosine, Tensor? bias, Tensor? mask, str activation, float eps) -> Tensor",
    _run_blocks,
    _fake_blocks,
)


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
    given, tables = (blocks.table, prefix_k, prefix_v, outputs, blocks.shape, blocks.scale), rotary or (None, None)
    return run(x, *given, *tables, blocks.cosine, bias, mask, blocks.activation, blocks.eps)
