"""Whole steps of a run: a fixed list of launches on buffers of its own, with no operation of PyTorch between them.

All of it is one chain of dependent launches, see `launch.chain`. The state, how far each sample is and its scale lie on
the device, so that a graph of some steps is good for any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import MATRICES, Block
from ..reference import NormArgs, Rotary
from . import attend_project, decode, launch, skinny_linear, step
from .norm import launch_layer_norm
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
        self, state: RunState, begin: Callable[[], None], launches: Sequence[Callable[[], None]], buffers: list[Tensor]
    ):
        self.x, self._x0, self.index, self.scale, self.noise = state
        self.steps, self.buffers = len(self.noise), buffers
        self._begin, self._launches = begin, launches

    @cached_property
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
        if len(noise) > 1 and all(drawn is not None for drawn in noise):
            torch.stack(tuple(noise), out=self.noise[first : first + len(noise)])
            return
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


class _Norm(NamedTuple):
    """A LayerNorm in front of a linear."""

    gain: Tensor | None
    bias: Tensor | None = None
    eps: float | None = None
    stable: bool = False


@dataclass
class _Step:
    """The launches of a step while they are collected, and the memory that they hand each other.

    Attributes:
        prefix_k, …, mask: see `ops.prepare_launches`.
        suffix: tokens of a row.
        launches: so far.
        buffers: by name and shape.
    """

    prefix_k: Tensor
    prefix_v: Tensor
    suffix: int
    dtype: torch.dtype
    rows: int
    samples: int
    heads: int
    scale: float
    cosine: bool
    activation: str
    eps: float
    guided: int = 0
    rotary: Rotary | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    launches: list[Callable[[], None]] = field(default_factory=list)
    buffers: dict[tuple, Tensor] = field(default_factory=dict)

    def takes(self, blocks: Sequence[Block], head: Block, entry: Weight | None) -> bool:
        """Whether kernels of so few tokens take all of it, with weights of products in one dtype."""
        (_, prompts, prefix, _, dim_head), (columns, width) = self.prefix_k.shape, head.q.shape
        tokens, everything = self.rows * self.suffix, [*blocks, head]
        if not skinny_linear.takes(tokens, self.dtype) or not tokens or self.rows % prompts:
            return False
        if prefix >= MAX_PREFIX or self.suffix > decode.MAX_SUFFIX or not 16 <= dim_head <= 128:
            return False
        normed = [width, columns, *(block.contract.shape[1] for block in blocks if block.inner_gain is not None)]
        if max(normed) > launch.MAX_DIM or columns != (width if entry is None else entry.weight.shape[1]):
            return False
        if entry is not None:
            everything.append(Block(entry.weight, q_bias=entry.bias, q_scale=entry.scale))
        return all(map(self._takes_weights, everything))

    def _takes_weights(self, block: Block) -> bool:
        for t in block:
            if t is None:
                continue
            if t.stride(-1) != 1 or t.device != self.prefix_k.device or (t.requires_grad and torch.is_grad_enabled()):
                return False
        for name in MATRICES:
            weight, scale = getattr(block, name), getattr(block, f"{name}_scale")
            if weight is not None and weight.dtype != self.dtype and (scale is None or weight.element_size() > 1):
                return False
        return len({(w.bias is None, w.scale is None) for w in _inputs(block)}) == 1  # they are one launch

    def memory(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer: the same for the same name and shape."""
        key = name, shape
        if key not in self.buffers:
            self.buffers[key] = launch.empty(shape, self.prefix_k, dtype or self.dtype)
        return self.buffers[key]

    def state(self, steps: int, columns: int, cond_scale: float | Tensor) -> RunState:
        fp32, count = torch.float32, (self.rows - self.guided) * self.samples
        state = RunState(
            self.memory("x", count, columns, dtype=fp32), self.memory("x0", count, columns, dtype=fp32),
            self.memory("index", count, dtype=torch.int64), self.memory("scale", count, dtype=fp32),
            self.memory("noise", steps, count, columns, dtype=fp32),
        )  # fmt: skip
        for t in state:
            t.zero_()
        state.scale.copy_(cond_scale) if torch.is_tensor(cond_scale) else state.scale.fill_(cond_scale)
        return state

    def add(self, launcher: Callable[..., None], *args, **options) -> None:
        self.launches.append(partial(launcher, *args, **options))

    def linear(
        self, x: Tensor, weights: Sequence[Weight], out: Tensor, norm: _Norm | None = None, *,
        stream: Tensor | None = None, stream_gain: Tensor | None = None, total: Tensor | None = None, **options,
    ) -> None:  # fmt: skip
        """A linear and its norm, which has launches of its own where rows are too long to be held."""
        eps = self.eps if norm is None or norm.eps is None else norm.eps
        if norm is not None and skinny_linear.holds(*x.shape):
            options |= dict(stream=stream, stream_gain=stream_gain, total=total)
            options |= dict(norm_gain=norm.gain, norm_bias=norm.bias, stable=norm.stable)
        elif norm is not None:
            if stream is not None:
                self.add(launch_layer_norm, NormArgs(x, stream_gain, after=stream, eps=eps), total)
                x = total
            normed = self.memory("normed", *x.shape)
            self.add(launch_layer_norm, NormArgs(x, norm.gain, norm.bias, eps=eps, stable=norm.stable), normed)
            x = normed
        self.add(skinny_linear.launch_skinny_linear, x, weights, out, operand=self.dtype, eps=eps, **options)

    def run_blocks(self, blocks: Sequence[Block], stream: Tensor) -> Tensor:
        """All blocks on a stream (rows, suffix, width).

        Returns:
            (rows * queries, width) fp32, the results of the tokens that are wanted alone where they lie evenly: with
            one row, or one sample in each.
        """
        rows, suffix, width = stream.shape
        flat, queries = stream.flatten(0, 1), self.samples if rows == 1 or self.samples == 1 else suffix
        last = self.memory("last", rows * queries, width, dtype=torch.float32)
        for index, block in enumerate(blocks):
            seq, old, out = suffix, flat, flat
            if index == len(blocks) - 1:
                seq, out = queries, last
                if queries < suffix:
                    old = stream[0, -queries:] if rows == 1 else stream[:, -1]
            x = self._attention(index, block, flat, seq, old, out)
            self._feed_forward(block, x, old, out)
        return last

    def _attention(self, index: int, block: Block, flat: Tensor, seq: int, old: Tensor, out: Tensor) -> Tensor:
        """Attention of the last `seq` tokens of each row, joined to their old stream in `out`.

        What has a norm before it is joined is given as it is instead.
        """
        rows, suffix, (*_, kv_heads, dim_head) = self.rows, self.suffix, self.prefix_k.shape
        own, shared, count = self.heads * dim_head, kv_heads * dim_head, rows * seq
        qkv = self.memory("qkv", rows, suffix, own + 2 * shared)
        self.linear(flat, _inputs(block), qkv.flatten(0, 1), _Norm(block.norm_gain, block.norm_bias))
        q, k, v = qkv.split((own, shared, shared), dim=-1)
        q = q[:, suffix - seq :].unflatten(-1, (self.heads, dim_head))
        k, v = (t.unflatten(-1, (kv_heads, dim_head)) for t in (k, v))
        weight, cache = Weight(block.out, block.out_bias, block.out_scale), (self.prefix_k[index], self.prefix_v[index])
        normed = block.out_gain is not None
        joined = self.memory("projected", count, len(block.out)) if normed else out
        if normed and self._attends_in_one_launch(seq):
            options = dict(scale=self.scale, cosine=self.cosine, rotary=self.rotary, bias=self.bias)
            of_row = q[0], k[0, :, 0], v[0, :, 0], *(t[0, :, 0] for t in cache)
            mask = None if self.mask is None else self.mask[0]
            self.add(attend_project.launch_attend_project, *of_row, weight, joined, mask=mask, **options)
            return joined
        attended, (cos, sin) = self.memory("attended", rows, seq, own), self.rotary or (None, None)
        tables = cos, sin, self.bias, self.mask, self.scale, self.cosine
        self.add(decode.launch_decode_attention, q, k, v, *cache, *tables, attended)
        self.linear(attended.flatten(0, 1), [weight], joined, residual=None if normed else old)
        return joined

    def _attends_in_one_launch(self, seq: int) -> bool:
        _, _, prefix, kv_heads, dim_head = self.prefix_k.shape
        sizes = self.rows, seq, self.heads, kv_heads, dim_head, prefix
        return self.prefix_k.dtype == self.dtype and attend_project.takes(*sizes, self.dtype)

    def _feed_forward(self, block: Block, x: Tensor, old: Tensor, out: Tensor) -> None:
        of_stream, residual = {}, x
        if block.out_gain is not None:
            residual = self.memory("total", *x.shape, dtype=torch.float32)
            of_stream = dict(stream=old, stream_gain=block.out_gain, total=residual)
        hidden = self.memory("hidden", len(x), block.contract.shape[1])
        expand = Weight(block.expand, block.expand_bias, block.expand_scale)
        norm = _Norm(block.ff_gain, block.ff_bias)
        self.linear(x, [expand], hidden, norm, activation=self.activation, **of_stream)
        contract = Weight(block.contract, block.contract_bias, block.contract_scale)
        norm = None if block.inner_gain is None else _Norm(block.inner_gain)
        self.linear(hidden, [contract], out, norm, residual=residual)


def prepare_run(
    blocks: Sequence[Block],
    head: Block,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    tables: RunTables,
    entry: Weight | None = None,
    entry_position: Tensor | None = None,
    cond_scale: float | Tensor = 1.0,
    head_eps: float | None = None,
    stable: bool = False,
    **shared,
) -> Run | None:
    """`ops.prepare_launches`, with its tables as `RunTables`; None for no steps, too.

    Args:
        cond_scale: of guidance, also (samples,).
        **shared: what `_Step` has: dtype, rows, samples, heads, scale, cosine, activation, eps, and others.
    """
    (steps, times, width), columns, fp32 = tables.time.shape, len(head.q), torch.float32
    built = _Step(prefix_k, prefix_v, times + 2 * shared["samples"], **shared)
    if not steps or not built.takes(blocks, head, entry):
        return None
    rows, samples = built.rows, built.samples
    state = built.state(steps, columns, cond_scale)
    stream, entered = built.memory("stream", rows, built.suffix, width, dtype=fp32), None
    if entry is not None:
        entered = built.memory("entered", rows * samples, columns, dtype=fp32)
        position = None if entry_position is None else entry_position.expand(rows * samples, width)
        built.linear(entered, [entry], stream[:, times : times + samples], residual=position)
    last = built.run_blocks(blocks, stream)
    pred = built.memory("pred", len(last), columns, dtype=fp32)
    norm = _Norm(head.norm_gain, head.norm_bias, head_eps, stable)
    built.linear(last, [Weight(head.q, head.q_bias, head.q_scale)], pred, norm)
    wanted = pred.view(rows, -1, columns)[:, -samples:]
    advance = partial(step.launch_advance, state, wanted, tables, stream, entered)
    built.add(advance, updates=True)
    return Run(state, partial(advance, updates=False), built.launches, [*built.buffers.values()])


def _inputs(block: Block) -> list[Weight]:
    """The projections before attention; keys and values may be one matrix."""
    names = [name for name in ("q", "k", "v") if getattr(block, name) is not None]
    return [Weight(*(getattr(block, name + part) for part in ("", "_bias", "_scale"))) for name in names]


def clamps_of(clamp: str | None, radius: float, steps: int, device: torch.device) -> Tensor | None:
    """`RunTables.clamps` of runs that clamp all steps alike, see `ops.diffusion_step`."""
    if clamp is None:
        return None
    pair = (radius, 0.0) if clamp == "range" else (math.inf, radius)
    return torch.tensor(pair, dtype=torch.float32, device=device).repeat(steps, 1)
