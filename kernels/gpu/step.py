"""The whole arithmetic of a diffusion step between two network evaluations, in one launch and one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..arguments import flat
from ..reference import StepArgs
from . import launch, philox
from .launch import MAX_DIM, check, row_block, row_strides

CLAMPS = None, "range", "l2"


@triton.jit
def _normal(seed, c0, c1):
    """Standard normal noise of counters c0 and c0 + 1, see `reference.philox_normal`."""
    u = tl.maximum(philox.uniform(seed, c0, c1), 1e-7)
    angle = philox.uniform(seed, c0 + 1, c1)
    # the cosine of a whole turn is the sine of at most a quarter, whose series is short; tl.cos is long for any angle
    z = (tl.abs(angle - 0.5) - 0.25) * 6.283185307179586
    w = z * z
    sine = z * (1 + w * (-1 / 6 + w * (1 / 120 + w * (-1 / 5040 + w * (1 / 362880 - w / 39916800)))))
    return tl.sqrt(-2.0 * tl.log(u)) * sine


@triton.jit(do_not_specialize=["stride_scale", "stride_index"])
def _diffusion_step_fwd_kernel(
    x_ptr, pred_ptr, null_ptr, cond_scale_ptr, x0_prev_ptr, noise_ptr, table_ptr, index_ptr, seed_ptr,
    x_next_ptr, x0_ptr,  # may be x_ptr and x0_prev_ptr: a program reads its row before it writes it
    dim, stride_x_row, stride_pred_row, stride_null_row, stride_x0_prev_row, stride_noise_row,
    stride_x_next_row, stride_x0_row, stride_scale, stride_index, radius,
    CLAMP: tl.constexpr, NULL_BY_INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < dim
    index = tl.load(index_ptr + row * stride_index)
    x = tl.load(x_ptr + row * stride_x_row + col, mask=inside, other=0.0)
    pred = tl.load(pred_ptr + row * stride_pred_row + col, mask=inside, other=0.0).to(tl.float32)
    x0_prev = tl.load(x0_prev_ptr + row * stride_x0_prev_row + col, mask=inside, other=0.0)
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + row * stride_noise_row + col, mask=inside, other=0.0)
    else:
        noise = _normal(tl.load(seed_ptr), (tl.program_id(0) * dim + col) * 2, index.to(tl.int32))
    if null_ptr is not None:
        null_row = index if NULL_BY_INDEX else row
        null = tl.load(null_ptr + null_row * stride_null_row + col, mask=inside, other=0.0).to(tl.float32)
        pred = null + (pred - null) * tl.load(cond_scale_ptr + row * stride_scale)

    coefficients = table_ptr + index * 6
    p, q = tl.load(coefficients), tl.load(coefficients + 1)
    a, b = tl.load(coefficients + 2), tl.load(coefficients + 3)
    c, s = tl.load(coefficients + 4), tl.load(coefficients + 5)
    x0 = p * x + q * pred
    if CLAMP == "range":
        x0 = tl.clamp(x0, -radius, radius, propagate_nan=tl.PropagateNan.ALL)
    elif CLAMP == "l2":
        norm = tl.sqrt(tl.sum(x0 * x0, axis=0))
        x0 *= radius / tl.maximum(norm, 1e-12, propagate_nan=tl.PropagateNan.ALL)
    x_next = a * x + b * x0 + c * x0_prev + s * noise
    tl.store(x_next_ptr + row * stride_x_next_row + col, x_next, mask=inside)
    tl.store(x0_ptr + row * stride_x0_row + col, x0, mask=inside)


@triton.jit(do_not_specialize=["steps", "samples", "guided", "together", "suffix", "times"])
def _advance_fwd_kernel(
    x_ptr, x0_ptr, index_ptr, pred_ptr, null_table_ptr, cond_scale_ptr, noise_ptr, table_ptr, clamp_ptr,
    time_ptr, time_position_ptr, query_ptr, query_position_ptr, tokens_ptr, entry_ptr,
    steps, samples, guided, together, suffix, times, dim, width,
    stride_pred_group, stride_pred_row, stride_table_row, stride_null_row, stride_time_step,
    CLAMPS: tl.constexpr, OF_PREDICTION: tl.constexpr, GUIDED: tl.constexpr, UPDATES: tl.constexpr,
    TIMES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One sample's step, and the tokens of its next one; a guided sample has a second row behind all samples."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    sample = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    inside = col < dim
    token = tl.arange(0, BLOCK_WIDTH)
    in_token = token < width
    query = tl.load(query_ptr + token, mask=in_token, other=0.0).to(tl.float32)
    if query_position_ptr is not None:
        query += tl.load(query_position_ptr + token, mask=in_token, other=0.0)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    cell = sample.to(tl.int64) * dim + col
    index = tl.load(index_ptr + sample, cache_modifier=".cg")
    following, tokens_of_time = index, ()
    if UPDATES:
        following = tl.where(index + 1 < steps, index + 1, 0)
    for number_of_time in tl.static_range(TIMES):
        at = number_of_time * width + token
        time = tl.load(time_ptr + following * stride_time_step + at, mask=in_token, other=0.0).to(tl.float32)
        if time_position_ptr is not None:
            time += tl.load(time_position_ptr + at, mask=in_token, other=0.0)
        tokens_of_time += (time,)
    x = tl.load(x_ptr + cell, mask=inside, other=0.0, cache_modifier=".cg")
    if UPDATES:
        x0_prev = tl.load(x0_ptr + cell, mask=inside, other=0.0, cache_modifier=".cg")
        at = sample // together * stride_pred_group + sample % together * stride_pred_row
        pred = tl.load(pred_ptr + at + col, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        if GUIDED or null_table_ptr is not None:
            cond_scale = tl.load(cond_scale_ptr + sample, cache_modifier=".cg")
            if GUIDED:
                unconditional = tl.where(sample < guided, sample + samples, sample)
                at = unconditional // together * stride_pred_group + unconditional % together * stride_pred_row
                null = tl.load(pred_ptr + at + col, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
            else:
                null = tl.load(null_table_ptr + index * stride_null_row + col, mask=inside, other=0.0).to(tl.float32)
        coefficients = table_ptr + index * stride_table_row
        p, q = tl.load(coefficients), tl.load(coefficients + 1)
        a, b = tl.load(coefficients + 2), tl.load(coefficients + 3)
        c, s = tl.load(coefficients + 4), tl.load(coefficients + 5)
        noise = tl.load(noise_ptr + (index * samples + sample) * dim + col, mask=inside, other=0.0)
        if CLAMPS:  # both numbers of a step: the limit of each element, and the length, 0 for as it is
            limit, length = tl.load(clamp_ptr + index * 2), tl.load(clamp_ptr + index * 2 + 1)
        tl.debug_barrier()  # or some are asked for when others are there
        if GUIDED or null_table_ptr is not None:
            pred = null + (pred - null) * cond_scale
        x0 = p * x + q * pred
        if CLAMPS:
            x0 = tl.clamp(x0, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
            norm = tl.maximum(tl.sqrt(tl.sum(x0 * x0, axis=0)), 1e-12, propagate_nan=tl.PropagateNan.ALL)
            x0 *= tl.where(length > 0, length / norm, 1.0)
        if OF_PREDICTION:
            x0_prev = pred
        x = a * x + b * x0 + c * x0_prev + s * noise
        tl.store(x_ptr + cell, x, mask=inside)
        tl.store(x0_ptr + cell, pred if OF_PREDICTION else x0, mask=inside)
        tl.store(index_ptr + sample, following)  # all threads have read it: they met

    for copy in tl.static_range(1 + GUIDED):
        number = sample + copy * samples
        here = (copy == 0) | (sample < guided)
        row, within = number // together, number % together
        row_ptr = tokens_ptr + row.to(tl.int64) * suffix * width
        if entry_ptr is not None:  # a linear makes the token
            tl.store(entry_ptr + number.to(tl.int64) * dim + col, x, mask=inside & here)
        else:
            tl.store(row_ptr + (times + within) * width + col, x, mask=inside & here)
        tl.store(row_ptr + (times + together + within) * width + token, query, mask=in_token & here)
        for number_of_time in tl.static_range(TIMES):
            cell = row_ptr + number_of_time * width + token
            tl.store(cell, tokens_of_time[number_of_time], mask=in_token & here & (within == 0))


class RunState(NamedTuple):
    """What the steps of a run change, and what they take that differs from sample to sample; contiguous.

    Attributes:
        x, x0: (samples, dim) fp32.
        index: (samples,) int64, the step that each sample is at; counted up, and behind the last step 0 again.
        scale: (samples,) fp32, of guidance.
        noise: (steps, samples, dim) fp32.
    """

    x: Tensor
    x0: Tensor
    index: Tensor
    scale: Tensor
    noise: Tensor


class RunTables(NamedTuple):
    """What steps look up by their index, and the tokens that are the same in all of them.

    Attributes:
        coefficients: (steps, 6) fp32, see `ops.diffusion_step`.
        clamps: (steps, 2) fp32, the limit of an element of x0 and the length of x0, infinite and 0 for as it is.
        null: (steps, dim), unconditional predictions, for runs whose second branch needs none.
        time: (steps, times, width), tokens, to which `time_position` (times, width) fp32 is added.
        query: (width,), the token whose result is the prediction; `query_position` is added.
        of_prediction: see `StepTable.uses_prediction`: x0 is the prediction for the last coefficient.
    """

    coefficients: Tensor
    clamps: Tensor | None
    null: Tensor | None
    time: Tensor
    query: Tensor
    time_position: Tensor | None = None
    query_position: Tensor | None = None
    of_prediction: bool = False


@dataclass(frozen=True)
class StepConfig:
    """One row a program, of `block` elements."""

    block: int
    num_warps: int


def diffusion_step_config(dim: int) -> StepConfig:
    block = row_block(dim)
    # no more threads than groups of 4 elements: every element is read by one thread alone, as in-place results need
    return StepConfig(block=block, num_warps=max(block // 256, 2))


def diffusion_step_fwd(args: StepArgs) -> tuple[Tensor, Tensor]:
    """The next x, and x0. Checks nothing."""
    out = launch.empty(args.x.shape, args.x), launch.empty(args.x.shape, args.x)
    diffusion_step_into(out, args)
    return out


def _results(args: StepArgs) -> tuple[Tensor, Tensor]:
    return args.x.new_empty(args.x.shape), args.x.new_empty(args.x.shape)


def diffusion_step_into(out: tuple[Tensor, Tensor], args: StepArgs) -> None:
    """Write the next x, and x0, to two tensors, which may be x and x0_prev themselves; see `diffusion_step_fwd`."""
    x, pred, null_pred, cond_scale, x0_prev, noise, table, index, clamp, radius, null_table, seed = args
    (rows, dim), null = x.shape, null_pred if null_table is None else null_table
    config = diffusion_step_config(dim)
    launch.launch(
        _diffusion_step_fwd_kernel, (rows,),
        x, pred, null, cond_scale, x0_prev, noise, table, index, seed if noise is None else None, *out,
        dim, *row_strides(x, pred, null, x0_prev, noise, *out), int(cond_scale.numel() > 1), int(index.numel() > 1),
        radius, CLAMP=clamp, NULL_BY_INDEX=null_table is not None, BLOCK=config.block,
        num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip


_diffusion_step = launch.custom_op("diffusion_step", diffusion_step_fwd, _results)
launch.by_reference(_diffusion_step, flat(reference.diffusion_step)[0])


def diffusion_step(args: StepArgs) -> tuple[Tensor, Tensor]:
    """`ops.diffusion_step` as one kernel; PyTorch computes rows beyond 4096, and every gradient.

    Last dimensions must be contiguous. cond_scale and index may also be (1,). They are read on the device, so an index
    beyond the table is not noticed: the result is then undefined.
    """
    x, pred, null_pred, cond_scale, x0_prev, noise, table, index, clamp, radius, null_table, seed = args
    if clamp not in CLAMPS:
        raise ValueError(f"clamp={clamp!r}; it must be None, 'range' or 'l2'")
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (rows, dim)")
    if noise is None and seed is None:
        raise ValueError("noise=None and seed=None; one of them must be given")
    if table.ndim != 2:
        raise ValueError(f"table has shape {tuple(table.shape)}; it must be (steps, 6)")
    rows, steps, shape = len(x), len(table), x.shape
    fp32 = dict(x=(x, shape), x0_prev=(x0_prev, shape), noise=(noise, shape), table=(table, (steps, 6)))
    check(x, (torch.float32,), contiguous=True, **fp32)
    check(x, (torch.float32,), cond_scale=(cond_scale, _per_row(cond_scale, rows)))
    check(x, (torch.int64,), index=(index, _per_row(index, rows)), seed=(seed, ()))
    preds = dict(pred=(pred, shape), null_pred=(null_pred, shape), null_table=(null_table, (steps, shape[1])))
    check(x, contiguous=True, **preds)
    if x.shape[1] > MAX_DIM:
        return reference.diffusion_step(args)
    cond_scale, table, index = cond_scale.contiguous(), table.contiguous(), index.contiguous()
    return _diffusion_step(
        x, pred, null_pred, cond_scale, x0_prev, noise, table, index, clamp, radius, null_table, seed
    )


def _per_row(t: Tensor, rows: int) -> tuple[int, ...]:
    """The shape that t must have: its own where it is one value for all rows."""
    return tuple(t.shape) if t.numel() == 1 and t.ndim < 2 else (rows,)


def launch_advance(
    state: RunState, pred: Tensor, tables: RunTables, tokens: Tensor, entry: Tensor | None, *, updates: bool
) -> None:
    """Launch the step of every sample, and the tokens of its next one; without `updates` these alone.

    Args:
        pred: (rows, together, dim), predictions of all samples, then those of guidance's other branch; any float dtype.
        tokens: (rows, suffix, width) fp32, written: the time's, the noisy embeddings, and the queries.
        entry: (rows * together, dim) fp32, written in place of the noisy embeddings, which a linear then makes.
    """
    (samples, dim), (rows, together, _), (_, suffix, width) = state.x.shape, pred.shape, tokens.shape
    (steps, times, _), guided = tables.time.shape, rows * together - samples
    launch.launch(
        _advance_fwd_kernel, (samples,),
        state.x, state.x0, state.index, pred, tables.null, state.scale, state.noise, tables.coefficients, tables.clamps,
        tables.time, tables.time_position, tables.query, tables.query_position, tokens, entry,
        steps, samples, guided, together, suffix, times, dim, width,
        *pred.stride()[:2], *row_strides(tables.coefficients, tables.null, tables.time),
        CLAMPS=tables.clamps is not None, OF_PREDICTION=tables.of_prediction, GUIDED=guided > 0, UPDATES=updates,
        TIMES=times, BLOCK=row_block(dim), BLOCK_WIDTH=row_block(width), DEPENDENT=launch.in_chain(), chained=True,
        num_warps=max(row_block(dim) // 256, 2), num_stages=1,
    )  # fmt: skip
