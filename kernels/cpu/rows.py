"""Steps of rows that are each at a step of their own on the CPU, in one call: calls of `c/run.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import Rotary
from . import calls, library, structs
from .blocks import Blocks, blocks_of, takes_blocks
from .run import CLAMPS


class RowTable(NamedTuple):
    """All that differs between the steps of a solver; from `Rows.table`.

    Attributes:
        steps: how many there are.
        time, null, coefficients: where what each step has of them begins; `kept` lies there.
        clamp: as C counts them.
        radius: of the clamp.
    """

    steps: int
    time: int
    null: int
    coefficients: int
    clamp: int
    radius: float
    kept: tuple


class RowStep(NamedTuple):
    """A step of one row.

    Attributes:
        place: of its state, in `Rows.x`.
        prompt: whose prefix it has.
        table: its solver's.
        index: the step, in the table.
        cond_scale: of guidance.
        noise: (dim,) fp32 on the CPU, what the step adds; None for nothing.
    """

    place: int
    prompt: int
    table: RowTable
    index: int
    cond_scale: float
    noise: Tensor | None


class Rows:
    """Rows of one sample each, which begin and end at any step; from `prepare_rows`.

    Attributes:
        x: (places, dim) fp32, the states.
        k, v: (depth, prompts, prefix, kv_heads, dim_head) fp32, the prefixes.
        most: how many rows a call of `step` takes.
        times: tokens of a time.
    """

    def __init__(
        self, call: structs.Blocks, query: structs.Vector, x: Tensor, k: Tensor, v: Tensor, times: int, most: int,
        kept: list,
    ):  # fmt: skip
        self.x, self.k, self.v, self.most, self.times = x, k, v, most, times
        self._x0, self._noise = torch.zeros_like(x), torch.zeros_like(x)
        self._call, self._query, self._prompts, self._kept = call, query, k.shape[1], kept

    def keep(self, prompt: int, k: Tensor, v: Tensor) -> None:
        """Keep the prefix of a prompt, (depth, 1, prefix, kv_heads, dim_head) each, where no row has another."""
        self.k[:, prompt].copy_(k[:, 0])
        self.v[:, prompt].copy_(v[:, 0])

    def table(
        self, time_tokens: Tensor, coefficients: Tensor, null_table: Tensor, clamp: str | None, radius: float
    ) -> RowTable:
        """What steps need of a solver, see `prepare_run`.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        dim, steps, kept = self.x.shape[1], len(coefficients), []
        arrays = [
            ("time_tokens", time_tokens, (steps, self.times, dim)), ("null_table", null_table, (steps, dim)),
            ("coefficients", coefficients, (steps, 6)),
        ]  # fmt: skip
        found = library.aliases(t for _, t, _ in arrays)
        if any(t.dtype != torch.float32 or not t.is_cpu for t in found):
            raise ValueError("time_tokens, null_table and coefficients must be fp32 on the CPU")
        addresses = calls.addresses_of([(name, t, shape) for (name, _, shape), t in zip(arrays, found)], kept)
        return RowTable(steps, *addresses, CLAMPS[clamp], radius, (*found, *kept))

    def start(self, place: int, x: Tensor) -> None:
        """Begin a run at x (dim,), in a place that no other has."""
        self.x[place].copy_(x)
        self._x0[place].zero_()

    def step(self, rows: Sequence[RowStep]) -> None:
        """Make a step of each row, every one in another place.

        Raises:
            ValueError: no rows, or more than `most`; two in one place.
            IndexError: a place, prompt or step that is not there.
        """
        count, (places, dim) = len(rows), self.x.shape
        if not 0 < count <= self.most or len({row.place for row in rows}) < count:
            raise ValueError(f"{count} rows; they must be 1 to {self.most}, each in a place of its own")
        for row in rows:
            if not (0 <= row.place < places and 0 <= row.prompt < self._prompts and 0 <= row.index < row.table.steps):
                raise IndexError(
                    f"place {row.place} of {places}, prompt {row.prompt} of {self._prompts}, "
                    f"step {row.index} of {row.table.steps}"
                )
        size = 4 * dim
        made = (structs.Row * count)()
        for one, (place, _, table, index, scale, noise) in zip(made, rows):
            if noise is not None:
                self._noise[place].copy_(noise)
                one.noise = self._noise.data_ptr() + place * size
            one.time, one.null = table.time + index * self.times * size, table.null + index * size
            one.coefficients = table.coefficients + index * 24
            one.x, one.x0 = self.x.data_ptr() + place * size, self._x0.data_ptr() + place * size
            one.clamp, one.cond_scale, one.radius = table.clamp, scale, table.radius
        prompts = (ctypes.c_long * count)(*(row.prompt for row in rows))
        self._call.attention.rows, self._call.attention.prompt = count, ctypes.addressof(prompts)
        library.run("run_rows", self._call, made, self._query, x=self.x)


def prepare_rows(
    blocks: Blocks | None,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    prompts: int,
    places: int,
    times: int,
    query: Tensor,
    rotary: Rotary | None = None,
    bias: Tensor | None = None,
    alike: bool = False,
) -> Rows | None:
    """Steps of rows of one sample each, of which every one is at a step of its own, behind any prefix that is kept.

    A row holds the time's tokens, its noisy embedding, and the query. None without blocks, where `run_blocks` does not
    take this, or what the head gives is no embedding.

    Args:
        blocks, rotary, bias: see `run_blocks`.
        prefix_k, prefix_v: (depth, any, prefix, kv_heads, dim_head) fp32, such as those that will be kept.
        prompts: how many prefixes are kept.
        places: how many rows may be on their way.
        times: tokens of a time.
        query: (dim,).
        alike: a row's result does not depend on what other rows there are: to the bit, and more slowly where linears of
            more rows have faster forms.
    """
    if blocks is None or not blocks.has_head or blocks.shape[-1] != blocks.shape[1]:
        return None
    suffix, dim = times + 2, blocks.shape[1]
    found = library.take((prefix_k, prefix_v, query, bias, *(rotary or (None, None))))
    if found is None or not takes_blocks(blocks, suffix, suffix, found[:2]):
        return None
    prefix_k, prefix_v, query, bias, cos, sin = found
    k, v = (torch.zeros(len(t), prompts, *t.shape[2:], dtype=t.dtype, device="cpu") for t in (prefix_k, prefix_v))
    kept = [blocks, query, bias, cos, sin]
    (query,) = calls.vectors_of([("query", query, (dim,))], kept)
    call = blocks_of(
        kept, prompts, suffix, blocks.table, k, v, 1, blocks.shape, blocks.scale, cos, sin,
        blocks.cosine, bias, None, blocks.activation, blocks.eps,
    )  # fmt: skip
    call.alike = alike
    x = torch.zeros(places, dim, dtype=torch.float32, device="cpu")
    return Rows(call, structs.Vector(*query), x, k, v, times, blocks.most_tokens // suffix, kept)
