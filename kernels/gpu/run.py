"""Whole steps of a run: a fixed list of launches on buffers of its own, with no operation of PyTorch between them.

All of it is one chain of dependent launches, see `launch.chain`. The state, how far each sample is and its scale lie on
the device, so that a graph of some steps is good for any of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..cpu.blocks import Block
from ..reference import Rotary
from . import attend_project, decode, launch, skinny_linear, step
from .skinny_linear import Weight
from .step import RunState, RunTables

MAX_PREFIX = 512  # from which a launch over the cache is two


class Run:
    """A run whose steps are launches; from `prepare_run`.

    Attributes:
        x: the state, (samples, dim) fp32, overwritten.
        steps: how many rows its tables have.
        noise: (steps, samples, dim) fp32, what each step adds.
        scale: (samples,) fp32, of guidance.
        index: (samples,) int64, the step that each sample is at; the steps count it up, and after the last it is 0.
        buffers: all its memory.
    """

    def __init__(
        self, state: RunState, begin: Callable[[], None], launches: Sequence[Callable[[], None]], kept: object,
        buffers: list[Tensor],
    ):  # fmt: skip
        self.x, self._x0, self.index, self.scale, self.noise = state
        self.steps, self.buffers = len(self.noise), [*state, *buffers]
        self._begin, self._launches, self._kept = begin, launches, kept

    @functools.cached_property
    def launches(self) -> int:
        """Kernels of a step."""
        count = []
        with launch.instead(lambda *_: count.append(1)):
            self.advance(1)
        return len(count)

    def start(self, x: Tensor) -> None:
        """Begin at x (samples, dim)."""
        if x.shape != self.x.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be {tuple(self.x.shape)}")
        self.x.copy_(x)
        self._x0.zero_()
        self.index.zero_()
        self._begin()

    def draw(self, first: int, noise: Sequence[Tensor | None]) -> None:
        """Keep the noise of some steps that follow each other, (samples, dim) each; None where one adds none.

        Raises IndexError where there are not so many steps.
        """
        if not 0 <= first <= first + len(noise) <= self.steps:
            raise IndexError(f"steps {first} to {first + len(noise) - 1}; there are {self.steps}")
        for number, drawn in enumerate(noise, first):
            if drawn is not None:
                self.noise[number].copy_(drawn)

    def advance(self, count: int) -> None:
        """Launch the next steps."""
        with launch.chain(self.x.device):
            for _ in range(count):
                for one in self._launches:
                    one()

    def __call__(self, first: int, noise: Sequence[Tensor | None]) -> None:
        """Some steps that follow each other, with their noise: see `draw`."""
        self.draw(first, noise)
        self.advance(len(noise))


def prepare_run(
    blocks: Sequence[Block],
    head: Block,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    dtype: torch.dtype,
    rows: int,
    samples: int,
    guided: int = 0,
    heads: int,
    scale: float,
    cosine: bool,
    activation: str,
    eps: float,
    head_eps: float | None = None,
    stable: bool = False,
    tables: RunTables,
    entry: Weight | None = None,
    entry_position: Tensor | None = None,
    cond_scale: float | Tensor = 1.0,
    rotary: Rotary | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Run | None:
    """A run, each step of which makes its tokens, runs all blocks and the head, and does `ops.diffusion_step`.

    None for more than 16 tokens, and what the kernels of such few do not take.

    Args:
        blocks: their weights, with norms before attention and feed-forward; `head` has the last norm and linear.
        prefix_k, prefix_v: (depth, prompts, prefix, kv_heads, dim_head), see `ops.decode_attention`.
        dtype: of products.
        rows, samples: how many rows, and samples in each; those of one prompt lie together.
        guided: so many of the last rows are the unconditional branch of as many of the first.
        heads, scale, cosine, rotary, bias, mask: see `ops.decode_attention`.
        activation: of the feed-forwards, "gelu" or "swiglu".
        eps, head_eps: of norms; stable: see `ops.layer_norm`, of the head's.
        tables: see `RunTables`.
        entry: the linear that makes a token of a noisy embedding, and `entry_position` (width,), which is added.
        cond_scale: of guidance.
    """
    depth, prompts, prefix, kv_heads, dim_head = prefix_k.shape
    _, times, width = tables.time.shape
    suffix = times + 2 * samples
    tokens, inner = rows * suffix, blocks[0].contract.shape[1]
    weights = [t for block in (*blocks, head) for t in block if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in weights):
        return None
    if any(t.ndim == 2 and t.stride(1) != 1 for t in weights) or rows % prompts:
        return None
    if not skinny_linear.takes(tokens, dtype) or max(width, len(head.q)) > launch.MAX_DIM:
        return None
    if prefix >= MAX_PREFIX or suffix > decode.MAX_SUFFIX or not 16 <= dim_head <= 128:
        return None
    # the tokens whose results are wanted of the last block: those alone, where they lie evenly
    queries = samples if rows == 1 or samples == 1 else suffix
    steps, columns = len(tables.time), len(head.q)
    buffers: list[Tensor] = []

    def memory(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        buffers.append(launch.empty(shape, prefix_k, kind))
        return buffers[-1]

    fp32, count = torch.float32, (rows - guided) * samples
    state = RunState(
        memory(count, columns, kind=fp32), memory(count, columns, kind=fp32), memory(count, kind=torch.int64),
        memory(count, kind=fp32), memory(steps, count, columns, kind=fp32),
    )  # fmt: skip
    for t in state:
        t.zero_()
    state.scale.copy_(cond_scale) if torch.is_tensor(cond_scale) else state.scale.fill_(cond_scale)
    own, shared = heads * dim_head, kv_heads * dim_head
    stream, qkv = memory(rows, suffix, width, kind=fp32), memory(rows, suffix, own + 2 * shared)
    flat, hidden = stream.flatten(0, 1), memory(tokens, inner)
    attended, projected = memory(tokens, own), memory(tokens, width)
    last, total = memory(rows * queries, width, kind=fp32), memory(tokens, width, kind=fp32)
    pred = memory(rows * queries, columns, kind=fp32)
    entered = None if entry is None else memory(rows * samples, columns, kind=fp32)
    linear = functools.partial(functools.partial, skinny_linear.launch_skinny_linear, operand=dtype, eps=eps)
    launches = []
    if entry is not None:
        where = stream[:, times : times + samples]
        position = None if entry_position is None else entry_position.expand(rows * samples, width)
        launches.append(linear(entered, [entry], where, residual=position))
    for number, block in enumerate(blocks):
        seq = queries if number == depth - 1 else suffix
        norm = dict(norm_gain=block.norm_gain, norm_bias=block.norm_bias)
        launches.append(linear(flat, _inputs(block), qkv.flatten(0, 1), **norm))
        q, k, v = qkv.split((own, shared, shared), dim=-1)
        q = q[:, suffix - seq :].unflatten(-1, (heads, dim_head))
        k, v = (t.unflatten(-1, (kv_heads, dim_head)) for t in (k, v))
        old, after, count = (flat, flat, tokens) if seq == suffix else (stream[:, suffix - seq :], last, rows * seq)
        old = old if old.ndim == 2 else old[0] if rows == 1 else old[:, 0]
        if seq == suffix and number == depth - 1:
            after = last
        out, cache = Weight(block.out, block.out_bias, block.out_scale), (prefix_k[number], prefix_v[number])
        normed = block.out_gain is not None  # attention's result has a norm of its own before it joins the stream
        joined = projected[:count] if normed else after
        if _is_one_launch(rows, seq, heads, kv_heads, dim_head, prefix, dtype, prefix_k) and normed:
            launches.append(
                functools.partial(
                    attend_project.launch_attend_project, q[0], k[0, :, 0], v[0, :, 0], *(t[0, :, 0] for t in cache),
                    out, joined, scale=scale, cosine=cosine, rotary=rotary, bias=bias,
                    mask=None if mask is None else mask[0],
                )
            )  # fmt: skip
        else:
            cos, sin = rotary or (None, None)
            heads_out = attended[:count].view(rows, seq, own)
            args = q, k, v, *cache, cos, sin, bias, mask, scale, cosine, heads_out
            launches.append(functools.partial(decode.launch_decode_attention, *args))
            launches.append(linear(attended[:count], [out], joined, residual=None if normed else old))
        of_stream = dict(stream=old, stream_gain=block.out_gain, total=total[:count]) if normed else {}
        launches += _feed_forward(block, linear, joined, hidden[:count], total[:count] if normed else after, after,
                                  activation, of_stream)  # fmt: skip
    norm = dict(norm_gain=head.norm_gain, norm_bias=head.norm_bias, stable=stable)
    of_head = functools.partial(linear, eps=eps if head_eps is None else head_eps)
    launches.append(of_head(last, [Weight(head.q, head.q_bias, head.q_scale)], pred, **norm))
    wanted = pred.view(rows, queries, columns)[:, queries - samples :]
    advance = functools.partial(step.launch_advance, state, wanted, tables, stream, entered)
    launches.append(functools.partial(advance, updates=True))
    kept = weights, prefix_k, prefix_v, tables, entry, entry_position, rotary, bias, mask
    return Run(state, functools.partial(advance, updates=False), launches, kept, buffers)


def _inputs(block: Block) -> list[Weight]:
    """The projections before attention; keys and values may be one matrix."""
    names = [name for name in ("q", "k", "v") if getattr(block, name) is not None]
    return [Weight(*(getattr(block, name + part) for part in ("", "_bias", "_scale"))) for name in names]


def _feed_forward(block, linear, x, hidden, residual, out, activation, of_stream) -> list[Callable[[], None]]:
    norm = dict(norm_gain=block.ff_gain, norm_bias=block.ff_bias)
    expand = Weight(block.expand, block.expand_bias, block.expand_scale)
    contract = Weight(block.contract, block.contract_bias, block.contract_scale)
    return [
        linear(x, [expand], hidden, activation=activation, **norm, **of_stream),
        linear(hidden, [contract], out, norm_gain=block.inner_gain, residual=residual),
    ]


def _is_one_launch(rows, seq, heads, kv_heads, dim_head, prefix, dtype, cache) -> bool:
    return cache.dtype == dtype and attend_project.takes(rows, seq, heads, kv_heads, dim_head, prefix, dtype)


def clamps_of(clamp: str | None, radius: float, steps: int, device: torch.device) -> Tensor | None:
    """`RunTables.clamps` of runs that clamp all steps alike, see `ops.diffusion_step`."""
    if clamp is None:
        return None
    pair = (radius, 0.0) if clamp == "range" else (math.inf, radius)
    return torch.tensor(pair, dtype=torch.float32, device=device).repeat(steps, 1)
