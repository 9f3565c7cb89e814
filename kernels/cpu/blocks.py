"""Whole blocks of linears and attention on the CPU, in one call: calls of `c/blocks.c`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from ctypes import addressof, c_long
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import BIASES, MATRICES, NORMS, SCALES, Block
from ..reference import Rotary
from . import calls, huge_pages, library, structs
from .attention import MAX_DIM_HEAD, MAX_KEYS, MAX_SUFFIX_NUMBERS, attention_of
from .library import KINDS, most_rows


def most_tokens(dtype: torch.dtype) -> int:
    """The most tokens that `run_blocks` takes with weights of this dtype: what it saves between linears counts, too."""
    return max(min(most_rows(dtype), 1024), min(128, most_rows(torch.float32)))


class Blocks(NamedTuple):
    """The blocks of a step as C reads them, from `prepare_blocks`.

    Attributes:
        table: (depth, numbers) int64, the source's `struct block`: where the weights lie; one row more with a head.
        kept: what lies there, also when other weights have taken its place.
        owner: whose weights they are.
        dtype: of the matrices.
        shape: depth, dim, inner, heads, kv_heads, dim_head, whether there is a head, and columns of the result.
        scale, cosine, activation, eps: see `ops.prepare_blocks`.
        requires_grad: whether a weight does.
        most_tokens: how many a call of `ops.run_blocks` takes.
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
    most_tokens: int

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
        heads, kv_heads, dim_head, scale, cosine: see `decode_attention`.
        activation: of the feed-forwards, "gelu" or "swiglu".
        eps: of all norms.
        head: after the blocks, see `Block`; its norm is `stable`, see `layer_norm`.
    Raises:
        ValueError: shapes that do not fit each other.
    """
    everything = [*blocks, *([] if head is None else [head])]
    weights = list(itertools.chain(*everything))
    requires_grad = any(t is not None and t.requires_grad for t in weights)
    if (kept := library.take(weights, gradients=True)) is None:
        return None
    everything = [Block(*weights) for weights in zip(*[iter(kept)] * len(Block._fields))]
    head = None if head is None else everything[-1]
    dtype, dim, inner = everything[0].q.dtype, everything[0].q.shape[1], everything[0].contract.shape[1]
    matrices = [t for block in everything for t in block[: len(MATRICES)] if t is not None]
    if dtype not in KINDS or any(t.dtype != dtype or t.stride(1) != 1 for t in matrices):
        return None
    own, shared, wide = heads * dim_head, kv_heads * dim_head, inner * 2 if activation == "swiglu" else inner
    columns = dim if head is None else len(head.q)
    of_matrices, of_vectors = [], []
    for block in everything:
        q, k = columns if block is head else own, 2 * shared if block.v is None else shared
        shapes = (q, dim), (k, dim), (shared, dim), (dim, own), (wide, dim), (dim, inner)
        lengths = [shape[:1] for shape in shapes]
        norms = [(inner if name == "inner_gain" else dim,) for name in NORMS]
        arrays = list(zip(Block._fields, block, (*shapes, *lengths, *lengths, *norms)))
        of_matrices += arrays[: len(MATRICES)]
        of_vectors += arrays[len(MATRICES) :]
    vectors = iter(calls.vectors_of(of_vectors, kept, of_matrices))
    table = (structs.Block * len(everything))(*(_struct_of(block, vectors) for block in everything))
    table = torch.frombuffer(table, dtype=torch.int64).view(len(everything), -1)
    shape = len(blocks), dim, inner, heads, kv_heads, dim_head, head is not None, columns
    huge_pages.settle(owner, matrices)
    most = most_tokens(dtype)
    return Blocks(table, kept, owner, dtype, shape, scale, cosine, activation, eps, requires_grad, most)


def _struct_of(block: Block, vectors: Iterator[tuple[int, int]]) -> structs.Block:
    """A row of the table; the vectors are those of the fields behind the matrices, in their order."""
    scales = list(itertools.islice(vectors, len(SCALES)))
    fields = dict(zip((*BIASES, *NORMS), vectors))
    for name, t, scale in zip(MATRICES, block, scales):
        if t is not None:
            fields[name] = structs.Weight((t.data_ptr(), KINDS[t.dtype], t.stride(0)), scale)
    return structs.Block(**fields)


def takes_blocks(blocks: Blocks, tokens: int, suffix: int, numbers: Sequence[Tensor]) -> bool:
    """Whether C runs blocks: rows of few tokens, in fp32, without gradient.

    Args:
        tokens, suffix: how many there are in all, and at most in a row.
        numbers: keys and values of the prefix, and others that must be fp32.
    """
    if torch.is_autocast_enabled("cpu") or (blocks.requires_grad and torch.is_grad_enabled()):
        return False
    return 0 < tokens <= blocks.most_tokens and _takes_numbers(suffix, numbers)


def _takes_numbers(suffix: int, numbers: Sequence[Tensor]) -> bool:
    _, _, prefix, _, dim_head = numbers[0].shape
    if any(t.dtype != torch.float32 for t in numbers):
        return False
    return dim_head <= MAX_DIM_HEAD and prefix + suffix <= MAX_KEYS and suffix * dim_head <= MAX_SUFFIX_NUMBERS


def _longest(starts: Sequence[int], tokens: int) -> int:
    """The most tokens of one text, of those that begin there. Raises ValueError unless together they are all tokens."""
    lengths = [end - begin for begin, end in itertools.pairwise(starts)]
    if not lengths or min(lengths) < 0 or starts[0] != 0 or starts[-1] != tokens:
        raise ValueError(f"starts={starts}; they must rise from 0 to the {tokens} tokens of x")
    return max(lengths)


def _fake_blocks(x, table, prefix_k, prefix_v, outputs, shape, *_) -> Tensor:
    rows, suffix, _ = x.shape
    depth, _, _, *heads_and_dim = prefix_k.shape
    out = (rows, outputs, shape[-1]) if outputs else (depth, rows, suffix, 2, *heads_and_dim)
    return torch.empty(out, dtype=torch.float32, device=x.device)


def _run_blocks(x, *args) -> Tensor:
    kept, (rows, suffix, _) = [], x.shape
    call, out = blocks_of(kept, rows, suffix, *args), _fake_blocks(x, *args)
    (call.x,) = calls.addresses_of([("x", x, (rows, suffix, call.dim))], kept)
    call.out = out.data_ptr()
    library.run("run_blocks", call, x=x, rows=rows * suffix)
    return out


def blocks_of(
    kept, rows, suffix, table, prefix_k, prefix_v, outputs, shape, scale, cos, sin, cosine, bias, mask, activation, eps,
    starts=None,
) -> structs.Blocks:  # fmt: skip
    """Everything but x, out, `alike` and whose prefix rows have, which the caller sets; what has to be copied is kept.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    depth, dim, inner, heads, kv_heads, dim_head, head, columns = shape
    others = {}
    if starts is not None:
        if rows != 1 or outputs or bias is not None or cos is not None:
            raise ValueError("starts are of one row, of which keys and values are wanted, without bias and rotary")
        rows, suffix = len(starts) - 1, _longest(starts, suffix)
        kept.append((c_long * len(starts))(*starts))
        others["starts"] = addressof(kept[-1])
    attention, prefix_layer = attention_of(
        kept, prefix_k, prefix_v, rows, heads, kv_heads, outputs or suffix, suffix, dim_head, scale, cos, sin, cosine,
        bias, mask, depth=(depth,), **others,
    )  # fmt: skip
    return structs.Blocks(
        blocks=table.data_ptr(), depth=depth, dim=dim, inner=inner, outputs=outputs, head=head, columns=columns,
        activation=calls.ACTIVATIONS[activation], eps=eps, prefix_layer=prefix_layer, attention=attention,
    )  # fmt: skip


def _takes_operation(x, table, prefix_k, prefix_v, *_) -> bool:
    return _takes_numbers(x.shape[1], (prefix_k, prefix_v, x))


calls.define_operation(
    "cpu_blocks(Tensor x, Tensor table, Tensor prefix_k, Tensor prefix_v, int outputs, int[] shape, float scale, "
    "Tensor? cos, Tensor? sin, bool cosine, Tensor? bias, Tensor? mask, str activation, float eps, "
    "int[]? starts=None) -> Tensor",
    _run_blocks,
    _takes_operation,
    _fake_blocks,
)


def run_blocks_where_taken(
    x: Tensor,
    blocks: Blocks | None,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    outputs: int,
    rotary: Rotary | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    starts: Sequence[int] | None = None,
) -> Tensor | None:
    """All blocks of a step, in one call and in fp32; None for what it does not take, and without blocks.

    Args:
        x: (rows, suffix, dim) fp32, the residual stream of the suffix tokens.
        blocks: from `prepare_blocks`.
        prefix_k, prefix_v: (depth, prompts, prefix, kv_heads, dim_head) fp32, see `decode_attention`.
        outputs: of how many of the last tokens the result is wanted, that of the head where there is one. 0 asks for
            keys and values instead.
        rotary, bias, mask: see `decode_attention`.
        starts: where texts of several lengths begin, from 0 to their end: x is one row of the tokens of all of them,
            each behind its own prompt's prefix, and keys and values are asked for, without rotary and bias.
    Returns:
        (rows, outputs, dim) fp32, with a head its columns; without outputs keys and values of all tokens and blocks,
        neither rotated nor normalised: (depth, rows, suffix, 2, kv_heads, dim_head) fp32.
    """
    if blocks is None or (found := library.take((prefix_k, prefix_v, x, bias, mask, *(rotary or ())))) is None:
        return None
    prefix_k, prefix_v, x, bias, mask, *rotary = found
    rows, tokens, _ = x.shape
    if not takes_blocks(blocks, rows * tokens, tokens if starts is None else _longest(starts, tokens), found[:3]):
        return None
    return run_blocks(
        x, blocks, prefix_k, prefix_v, outputs=outputs, rotary=rotary, bias=bias, mask=mask, starts=starts
    )


def run_blocks(
    x: Tensor, blocks: Blocks, prefix_k: Tensor, prefix_v: Tensor, *, outputs: int, rotary=None, bias=None, mask=None,
    starts=None,
) -> Tensor:  # fmt: skip
    """`run_blocks_where_taken` of what `takes_blocks` says."""
    run = torch.ops.fastprior.cpu_blocks.default if torch.compiler.is_compiling() else _run_blocks
    cos, sin = rotary or (None, None)
    return run(
        x, blocks.table, prefix_k, prefix_v, outputs, blocks.shape, blocks.scale, cos, sin, blocks.cosine, bias, mask,
        blocks.activation, blocks.eps, starts,
    )  # fmt: skip
