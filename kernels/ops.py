"""The operations that models call: Triton kernels on CUDA; on the CPU linears and attention in C, else the reference.

`FASTPRIOR_KERNELS=reference` or `triton`, read when this is imported, forces one; on the CPU Triton's kernels run only
in its interpreter (`TRITON_INTERPRET=1`). fp64 always takes the reference. Options that a call does not use cost
nothing. Kernels raise TypeError for dtypes, and ValueError for shapes, strides and devices, that they cannot take.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from . import reference
from .arguments import LinearArgs
from .cpu import attention as cpu_attention
from .cpu import blocks as cpu_blocks
from .cpu import huge_pages
from .cpu import library as cpu_library
from .cpu import linear as cpu_linear
from .cpu import rows as cpu_rows
from .cpu import run as cpu_run
from .cpu import sums as cpu_sums
from .gpu import workspace
from .reference import AttentionArgs, NormArgs, Rotary, StepArgs

if TYPE_CHECKING:
    from .gpu.run import Run as Launches

BACKENDS = "reference", "triton"
OPERATIONS = "layer_norm", "attention", "decode_attention", "diffusion_step", "linear"
HAS_TRITON = importlib.util.find_spec("triton") is not None

cpu_library.forced = os.environ.get("FASTPRIOR_KERNELS") or None
if cpu_library.forced not in (None, *BACKENDS):
    raise ValueError(f"FASTPRIOR_KERNELS={cpu_library.forced!r}; it must be unset, 'reference' or 'triton'")


def is_recorded() -> bool:
    """Whether a program is made that runs elsewhere, and for other shapes: by torch.export, or torch.jit.trace."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def forced() -> str | None:
    """The backend that is forced, if one is: the reference, where a program is made for other runtimes."""
    return "reference" if is_recorded() else cpu_library.forced


@contextlib.contextmanager
def using(backend: str | None) -> Iterator[None]:
    """Force "reference" or "triton", or with None let the device decide, within the block."""
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend={backend!r}; it must be None, 'reference' or 'triton'")
    outer, cpu_library.forced = cpu_library.forced, backend
    try:
        yield
    finally:
        cpu_library.forced = outer


def on_triton(x: Tensor) -> bool:
    """Whether an operation on x runs as a Triton kernel."""
    if x.dtype == torch.float64:
        return False
    backend = forced()
    if backend is None:
        return x.is_cuda and (HAS_TRITON or _warn_without_triton())
    return backend == "triton"


def _warn_without_triton() -> Literal[False]:
    if not torch.compiler.is_compiling():  # a trace has no room for it; python says it once
        warnings.warn("triton is not installed: on CUDA plain PyTorch runs, far slower", RuntimeWarning, stacklevel=2)
    return False


def launcher(name: str) -> Callable | None:
    """The launcher of Triton's kernels that an operation such as "fastprior::linear" runs; None where it is another."""
    if not HAS_TRITON:
        return None
    from .gpu import launch

    return launch.LAUNCHERS.get(name)


# imported on first use: the kernels need triton, and most of its import time is not torch's


def layer_norm(
    x: Tensor,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    stable: bool = False,
    rms: bool = False,
    residual: Tensor | None = None,
    after: Tensor | None = None,
    l2: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm `(x - mean) / sqrt(var + eps) * gain + bias` over the last dimension, and what is fused around it.

    In order: add `residual`, divide by the row maximum (`stable`), normalise, scale to length 1 (`l2`), add `after`.

    Args:
        x: (..., dim), any float dtype; statistics are accumulated in fp32.
        gain, bias: (dim,), cast to the dtype of `x`.
        eps: added to the variance.
        stable: first divide by the *signed* maximum of the row, taken as a constant in backward. A row whose maximum
            is negative changes sign: trained weights depend on it.
        rms: RMSNorm (Zhang & Sennrich 2019): the mean is not subtracted, and is not part of the variance.
        residual: the shape of `x`, added to it before; the sum is returned as well.
        after: the shape of `x`, added to the result.
        l2: scale each row of the result to Euclidean length 1 (before `after`).
        dtype: of the result; by default that of `x` (with `residual`, of the sum), promoted with that of `after`.
    Returns:
        (..., dim); with `residual` also the sum, in the wider dtype of the two.
    """
    if on_triton(x):
        from .gpu.norm import layer_norm as run
    else:
        run = reference.layer_norm
    return run(NormArgs(x, gain, bias, residual, after, eps, stable, rms, l2, dtype))


def swiglu_norm(x: Tensor, gain: Tensor | None, eps: float = 1e-5) -> Tensor:
    """SwiGLU of the two halves of rows, `a * silu(b)`, and a LayerNorm of the result.

    Args:
        x: (..., 2 * dim), any float dtype.
        gain: (dim,), of the norm; None for none.
        eps: of the norm.
    Returns:
        (..., dim), in the dtype of `x`.
    """
    if on_triton(x) and not torch.compiler.is_compiling():  # which fuses it, and chooses what backward keeps
        from .gpu.gated import swiglu_norm as run
    else:
        run = reference.swiglu_norm
    return run(x, gain, eps)


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
    """`residual + activation(norm(x) @ weight.T * scale + bias)`, with a fast way for few rows.

    With a stream, x is first normalised and added to it: `x = stream + norm(x) * stream_gain`.

    Args:
        x: (..., in), any float dtype.
        weight: (out, in), in the dtype of the product; or int8 or float8_e4m3fn with `scale`.
        bias: (out,).
        beside: (more, in), a second weight: its results stand beside those of the first, and so do bias and scale.
        scale: (out,) fp32, of quantised weights.
        stream, stream_gain: (..., in) and (in,), of the residual stream that x's norm is added to.
        norm_gain, norm_bias: (in,), of a LayerNorm of x over its last dimension; without a gain there is none.
        eps: of both norms.
        activation: None, "gelu" (exact), or "swiglu": `a * silu(b)` of the two halves of the result.
        residual: (..., out), or (..., out / 2) with "swiglu"; added last.
        dtype: of the product, which what was normalised is rounded to; by default that of the weights, or with a scale
            that of `x`.
    Returns:
        (..., out), or (..., out / 2) with "swiglu", in the product's dtype, promoted with that of `residual`; with a
        stream also the sum, in the wider dtype of `x` and `stream`.
    """
    args = LinearArgs(
        *(x, weight, bias, beside, scale, stream, stream_gain, norm_gain, norm_bias, eps, activation, residual, dtype)
    )
    if on_triton(x) and reference.autocast_dtype(x) is None:  # which casts for PyTorch's own linear alone
        from .gpu.linear import linear as run

        return run(args)
    found = cpu_linear.linear_where_taken(args)
    return reference.linear(args) if found is None else found


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
    """Attention of heads that share keys and values in groups, prepared here: rotary, l2-norm, null key, bias, masks.

    `softmax(scale * q' k'^T + bias + mask) v'`, where q' and k' are rotated, then of length 1 with `cosine`, and a
    null key and value stand in front of the others.

    Args:
        q: (batch, seq, heads, dim_head), for the last `seq` of the keys' positions.
        k, v: (batch, keys, kv_heads, dim_head); kv_heads divides heads, and query head i uses i // (heads / kv_heads).
        scale: of the logits.
        rotary: cos and sin (keys, width) fp32 for `reference.rotate`, by position.
        cosine: l2-normalise queries and keys, after the rotation.
        null_kv: (2, kv_heads, dim_head), a key and value that every query sees; not rotated. Column 0.
        bias: (seq, heads, columns) added to the logits; or, with `buckets`, a table (num_buckets, heads).
        buckets: (keys,) int64, the bucket of every distance from 0: query at position p and column c have distance
            max(p - c, 0). With a null key, key j is column j + 1 (and so one nearer than it is: trained weights rely
            on it).
        causal: the query at position p sees keys up to p.
        causal_fill: what is added to the logits of keys that it may not see.
        mask: (batch, keys), added to the logits; or bool, False where the key's logit becomes the lowest finite number.
        dropout: probability of dropping an attention weight (those of the null key too).
        seed: 0-d int64, of the dropout mask (`reference.dropout_mask`); without it torch's generator draws.
    Returns:
        (batch, seq, heads * dim_head) in the dtype of q.
    """
    if on_triton(q):
        from .gpu.attention import attention as run
    else:
        run = reference.attention
    (cos, sin), numbers = rotary or (None, None), (scale, cosine, causal, causal_fill, dropout)
    return run(AttentionArgs(q, k, v, null_kv, cos, sin, bias, buckets, mask, seed, *numbers))


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    scale: float,
    rotary: Rotary | None = None,
    cosine: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of the few suffix tokens over a cached prefix and over themselves.

    Args:
        q: (rows, seq, heads, dim_head), of the last `seq` suffix tokens.
        k, v: (rows, suffix, kv_heads, dim_head), the suffix's own.
        prefix_k, prefix_v: (prompts, prefix, kv_heads, dim_head), keys rotated and normalised already, a null key
            among them; row i belongs to prompt i // (rows / prompts).
        scale, cosine: see `attention`.
        rotary: cos and sin (suffix, width) fp32, of the suffix's positions.
        bias: (suffix, heads, prefix + suffix), added to the logits; -inf where a key must not be seen. Without it a
            suffix token sees the prefix, itself and the suffix tokens before it.
        mask: (prompts, prefix), added to the logits of the prefix.
        dropout: probability of dropping an attention weight; torch's generator draws.
    Returns:
        (rows, seq, heads * dim_head) in the dtype of q.
    """
    options = dict(scale=scale, rotary=rotary, cosine=cosine, bias=bias, mask=mask)
    if on_triton(q) and not dropout:  # which only training has
        from .gpu.decode import decode_attention as run

        return run(q, k, v, prefix_k, prefix_v, **options)
    if not dropout:
        found = cpu_attention.decode_where_taken(q, k, v, prefix_k, prefix_v, **options)
        if found is not None:
            return found
    return reference.decode_attention(q, k, v, prefix_k, prefix_v, **options, dropout=dropout)


def diffusion_step(
    x: Tensor,
    pred: Tensor,
    null_pred: Tensor | None,
    cond_scale: Tensor,
    x0_prev: Tensor,
    noise: Tensor | None,
    table: Tensor,
    index: Tensor,
    clamp: str | None = None,
    radius: float = 1.0,
    *,
    null_table: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Guidance, prediction to x0, clamp and solver update, in one pass over the embedding.

    `pred = null + (pred - null) * cond_scale`; `x0 = clamp(p * x + q * pred)`;
    `x = a * x + b * x0 + c * x0_prev + s * noise`, with `(p, q, a, b, c, s) = table[index]`.

    Args:
        x, x0_prev, noise: (rows, dim), fp32.
        pred: (rows, dim), any float dtype.
        null_pred: (rows, dim), the unconditional prediction; without it and `null_table` there is no guidance.
        cond_scale: 0-d or (rows,), fp32.
        noise: None draws it from `seed` (`reference.philox_normal`).
        table: (steps, 6), fp32, of a solver.
        index: 0-d or (rows,) int64: the step, or that of each row.
        clamp, radius: see `reference.clamp_x0`.
        null_table: (steps, dim), unconditional predictions by step, in place of `null_pred`.
        seed: 0-d int64.
    Returns:
        the next x, and x0, (rows, dim) fp32.
    """
    if on_triton(x):
        from .gpu.step import diffusion_step as run
    else:
        run = reference.diffusion_step
    return run(StepArgs(x, pred, null_pred, cond_scale, x0_prev, noise, table, index, clamp, radius, null_table, seed))


def prepare_launches(
    blocks: Sequence[Block],
    head: Block,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    time_tokens: Tensor,
    query: Tensor,
    coefficients: Tensor,
    null_table: Tensor | None = None,
    clamp: str | None = None,
    radius: float = 1.0,
    uses_prediction: bool = False,
    time_position: Tensor | None = None,
    query_position: Tensor | None = None,
    entry: Block | None = None,
    **options,
) -> Launches | None:
    """A run, each step of which makes its tokens, runs all blocks and the head, and does `diffusion_step`.

    All in a few launches on memory that stays where it is, for CUDA graphs; what is given is read where it lies, at
    every step. A row holds the time's tokens, the noisy embeddings of its samples, and as many queries. None where no
    Triton kernels run, or something follows operations; for more than 16 tokens, products of other than 16 bits,
    weights of several dtypes, and what else kernels of so few tokens do not take.

    Args:
        blocks: their weights, with norms before attention and feed-forward; `head` has the last norm and linear.
        prefix_k, prefix_v: (depth, prompts, prefix, kv_heads, dim_head), see `decode_attention`, and so are heads,
            scale, cosine, rotary, bias and mask.
        time_tokens: (steps, tokens, width), to which `time_position` (tokens, width) fp32 is added.
        query: (width,), to which `query_position` (width,) fp32 is added.
        coefficients: (steps, 6) fp32, the table of `diffusion_step`, as are the next.
        null_table: (steps, dim), unconditional predictions by step, for runs without a branch for them.
        clamp, radius: see there.
        uses_prediction: whether the last coefficient is that of the last prediction, in place of the last x0.
        entry: of `q` alone, the linear that makes a token of a noisy embedding, which is one itself without.
        **options: entry_position (width,) fp32, which is added to what `entry` makes;
            dtype, of products;
            rows and samples: how many rows, and samples in each; those of one prompt lie together;
            guided: so many of the last rows are the unconditional branch of as many of the first;
            cond_scale of guidance, a number or (samples,);
            activation, "gelu" or "swiglu"; eps and head_eps, of norms; stable, see `layer_norm`, of the head's;
            heads, scale, cosine, rotary, bias, mask.
    """
    if not on_triton(prefix_k) or cpu_library.is_watched() or torch.compiler.is_compiling():
        return None
    if reference.autocast_dtype(prefix_k) is not None:
        return None
    from .gpu import run, step

    clamps = run.clamps_of(clamp, radius, len(coefficients), coefficients.device)
    positions = time_position, query_position, uses_prediction
    tables = step.RunTables(coefficients, clamps, null_table, time_tokens, query, *positions)
    entry = None if entry is None else run.Weight(entry.q, entry.q_bias, entry.q_scale)
    return run.prepare_run(blocks, head, prefix_k, prefix_v, tables=tables, entry=entry, **options)


Workspace, sharing = workspace.Workspace, workspace.sharing


def sum_rows(parts: Sequence[Tensor]) -> list[tuple[Tensor, bool]]:
    """Sums of rows of 512 bytes, and whether all numbers are finite, of each tensor: both in one reading of memory.

    Args:
        parts: (n,) each, contiguous, whose bytes fill rows. Only floats may be not finite.
    Returns:
        (rows,) int64, each row summed as 64 integers of 64 bits modulo 2**64; and False where there is NaN or infinity.
    """
    found = cpu_sums.sum_rows_where_taken(parts)
    return reference.sum_rows(parts) if found is None else found


# of the CPU alone: whole blocks, and whole steps, in one call
Block, Blocks, Run, one_thread = cpu_blocks.Block, cpu_blocks.Blocks, cpu_run.Run, cpu_library.one_thread
prepare_blocks, run_blocks = cpu_blocks.prepare_blocks, cpu_blocks.run_blocks_where_taken
prepare_run, to_huge_pages = cpu_run.prepare_run, huge_pages.collapse
Rows, RowStep, RowTable, prepare_rows = cpu_rows.Rows, cpu_rows.RowStep, cpu_rows.RowTable, cpu_rows.prepare_rows
