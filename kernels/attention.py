"""Flash attention (Dao 2023) with what models put around it: rotary, l2-norm, null key, position bias, masks, dropout.

The heads that share a head of keys are rows of one tile, `row = query * group + member`, so that a tile of keys serves
them all. Logits are not stored: backward computes them again, from the maximum and the sum of each row. The null key
is column 0: its row of keys is read from elsewhere, and its gradient is that of a column. Forward rotates and
normalises queries and keys as it loads them; backward, where every kernel would do so again, does it first and once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, philox
from .reference import Rotary

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


# below, ptr is a tile of pointers (rows, features); features from DIM on are not there


@triton.jit
def _tile(row_ptr, BLOCK_D: tl.constexpr):
    return row_ptr[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _key_tile(ptr, null_ptr, key, stride, head, NULL: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to keys or values; key -1 is the null one of this head."""
    tile = _tile(ptr + key.to(tl.int64) * stride, BLOCK_D)
    if NULL:  # chosen for the whole tile: of a choice of rows Triton does not know that they are aligned
        tile = tl.where(key[:, None] < 0, null_ptr + head * DIM + tl.arange(0, BLOCK_D)[None, :], tile)
    return tile


@triton.jit
def _load(ptr, DIM: tl.constexpr):
    return tl.load(ptr, mask=tl.arange(0, ptr.shape[1])[None, :] < DIM, other=0.0)


@triton.jit
def _store(ptr, x, inside, DIM: tl.constexpr):
    feature = tl.arange(0, ptr.shape[1])[None, :]
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=inside[:, None] & (feature < DIM))


@triton.jit
def _swap_pairs(x):
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(odd, even), x.shape)


@triton.jit
def _tables(cos_ptr, sin_ptr, position, width, BLOCK_D: tl.constexpr):
    """Rows of the rotary tables; positions below 0 and features beyond the width are not turned."""
    feature = tl.arange(0, BLOCK_D)[None, :]
    turned = (position >= 0)[:, None] & (feature < width)
    at = position[:, None] * width + feature
    return tl.load(cos_ptr + at, mask=turned, other=1.0), tl.load(sin_ptr + at, mask=turned, other=0.0)


@triton.jit
def _rotated(ptr, cos_ptr, sin_ptr, position, width, DIM: tl.constexpr):
    x = _load(ptr, DIM)
    if cos_ptr is not None:
        cos, sin = _tables(cos_ptr, sin_ptr, position, width, ptr.shape[1])
        x = x.to(tl.float32) * cos + _swap_pairs(x).to(tl.float32) * sin
    return x


@triton.jit
def _length(x):
    return tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)


@triton.jit
def _prepared(ptr, cos_ptr, sin_ptr, position, width, COSINE: tl.constexpr, DIM: tl.constexpr):
    """Queries or keys as the dot product takes them: rotated, then of length 1 with COSINE."""
    x = _rotated(ptr, cos_ptr, sin_ptr, position, width, DIM)
    if COSINE:
        x = x.to(tl.float32)
        x = x / _length(x)[:, None]
    return x.to(ptr.dtype.element_ty)


@triton.jit
def _prepared_bwd(grad, ptr, length_ptr, cos_ptr, sin_ptr, position, width, DIM: tl.constexpr):
    """The gradient of rows, from that of the prepared ones, fp32, and their lengths before (none without COSINE)."""
    if length_ptr is not None:
        x = _load(ptr, DIM).to(tl.float32)
        grad = (grad - x * tl.sum(grad * x, axis=1)[:, None]) / tl.load(length_ptr)[:, None]
    if cos_ptr is not None:
        cos, sin = _tables(cos_ptr, sin_ptr, position, width, ptr.shape[1])
        grad = grad * cos + _swap_pairs(grad * sin)
    return grad


# the functions below take queries, members and columns of shapes that broadcast, in either order


@triton.jit
def _logits(
    products, query, member, column, bias_ptr, mask_ptr, scale, fill,
    stride_bias_row, stride_bias_head, stride_bias_column, seq, keys,
    NULL: tl.constexpr, RELATIVE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Logits of products q k, fp32; -inf for columns beyond the last and those a query does not see."""
    position, columns = query + keys - seq, keys + NULL
    logits = products * scale
    if bias_ptr is not None:
        if RELATIVE:
            bias_ptr += tl.maximum(position - column, 0) * stride_bias_row + member * stride_bias_head
        else:
            bias_ptr += query.to(tl.int64) * stride_bias_row + member * stride_bias_head
            bias_ptr += tl.minimum(column, columns - 1) * stride_bias_column
        logits += tl.load(bias_ptr).to(tl.float32)
    visible = column < columns
    if CAUSAL == 1:
        visible = visible & (column <= position + NULL)
    if CAUSAL == 2:
        logits = tl.where(column <= position + NULL, logits, logits + fill)
    if mask_ptr is not None:
        key = column - NULL
        if mask_ptr.dtype.element_ty == tl.int8:
            keep = tl.load(mask_ptr + key, mask=(key >= 0) & (key < keys), other=1)
            logits = tl.where(keep != 0, logits, LOWEST)
        else:
            logits += tl.load(mask_ptr + key, mask=(key >= 0) & (key < keys), other=0.0)
    return tl.where(visible, logits, float("-inf"))


@triton.jit
def _kept(weights, seed_ptr, dropout, query, column, columns, head):
    """The weights that dropout leaves, not yet scaled by 1 / (1 - dropout)."""
    draw = philox.uniform(tl.load(seed_ptr), query * columns + column, head)
    return tl.where(draw >= dropout, weights, 0.0)


@triton.jit
def _weights_bwd(logits, dp, top, inverse, delta, mask_ptr, seed_ptr, dropout, query, column, columns, head):
    """The weights that met the values, and the gradient of the logits, from dp = do v and the numbers of each row."""
    weights = tl.exp(logits - top) * inverse
    used = weights
    if seed_ptr is not None:
        used = _kept(weights, seed_ptr, dropout, query, column, columns, head) / (1 - dropout)
        dlogits = used * dp - weights * delta
    else:
        dlogits = weights * (dp - delta)
    if mask_ptr is not None:
        # a masked logit is a constant, which matters where a row has no other
        if mask_ptr.dtype.element_ty == tl.int8:
            dlogits = tl.where(logits == LOWEST, 0.0, dlogits)
    return used, dlogits


@triton.jit(do_not_specialize=["seq", "keys", "kv_heads", "group"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, null_k_ptr, null_v_ptr, cos_ptr, sin_ptr, bias_ptr, mask_ptr, seed_ptr, scale, fill, dropout,
    stride_q_batch, stride_q_seq, stride_q_head, stride_k_batch, stride_k_seq, stride_k_head,
    stride_v_batch, stride_v_seq, stride_v_head, stride_bias_row, stride_bias_head, stride_bias_column,
    seq, keys, kv_heads, group, width,
    out_ptr, top_ptr, inverse_ptr,
    COSINE: tl.constexpr,
    NULL: tl.constexpr, RELATIVE: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    rows, columns, shift = seq * group, keys + NULL, keys - seq
    # the tiles that see most come first
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    inside, row = row < rows, tl.minimum(row, rows - 1)
    query, member = row // group, row % group
    head = kv_head * group + member
    at = (batch * seq + query) * (kv_heads * group) + head

    q_tile = _tile(q_ptr + batch * stride_q_batch + query.to(tl.int64) * stride_q_seq + head * stride_q_head, BLOCK_D)
    q = _prepared(q_tile, cos_ptr, sin_ptr, query + shift, width, COSINE, DIM)
    k_ptr += batch * stride_k_batch + kv_head * stride_k_head
    v_ptr += batch * stride_v_batch + kv_head * stride_v_head
    if bias_ptr is not None:
        bias_ptr += kv_head * group * stride_bias_head
    if mask_ptr is not None:
        mask_ptr += batch * keys

    # the lowest finite number, so that rows that see nothing yet do not subtract -inf from -inf
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = columns
    if CAUSAL == 1:
        end = tl.minimum(start + BLOCK_M - 1, rows - 1) // group + shift + NULL + 1
    for first in range(0, end, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        key = tl.minimum(column, columns - 1) - NULL
        k_tile = _key_tile(k_ptr, null_k_ptr, key, stride_k_seq, kv_head, NULL, DIM, BLOCK_D)
        k = _prepared(k_tile, cos_ptr, sin_ptr, key, width, COSINE, DIM)
        v = _load(_key_tile(v_ptr, null_v_ptr, key, stride_v_seq, kv_head, NULL, DIM, BLOCK_D), DIM)
        logits = _logits(
            tl.dot(q, tl.trans(k), input_precision="tf32x3"),
            query[:, None], member[:, None], column[None, :], bias_ptr, mask_ptr, scale, fill,
            stride_bias_row, stride_bias_head, stride_bias_column, seq, keys, NULL, RELATIVE, CAUSAL,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        weights = tl.exp(logits - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        if seed_ptr is not None:
            c1 = pair * group + member[:, None]
            weights = _kept(weights, seed_ptr, dropout, query[:, None], column[None, :], columns, c1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="tf32x3")
        top = new_top

    inverse = tl.where(total > 0, 1 / total, 0.0)
    acc *= (inverse / (1 - dropout))[:, None]
    _store(_tile(out_ptr + at * DIM, BLOCK_D), acc, inside, DIM)
    row += pair.to(tl.int64) * rows
    tl.store(top_ptr + row, top, mask=inside)
    tl.store(inverse_ptr + row, inverse, mask=inside)


@triton.jit(do_not_specialize=["rows", "heads", "shift"])
def _attention_prepare_kernel(
    x_ptr, null_ptr, cos_ptr, sin_ptr, stride_x_batch, stride_x_seq, stride_x_head, rows, heads, shift, width,
    y_ptr, length_ptr,
    NULL: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Queries or keys (the null one first), prepared, and with `length_ptr` their lengths before they were made 1."""
    batch = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, row = row < rows, tl.minimum(row, rows - 1)
    index, head = row // heads - NULL, row % heads
    x_rows = x_ptr + batch * stride_x_batch + head * stride_x_head
    x_tile = _key_tile(x_rows, null_ptr, index, stride_x_seq, head[:, None], NULL, DIM, BLOCK_D)
    x = _rotated(x_tile, cos_ptr, sin_ptr, index + shift, width, DIM)
    row += batch * rows
    if length_ptr is not None:
        x = x.to(tl.float32)
        length = _length(x)
        x = x / length[:, None]
        tl.store(length_ptr + row, length, mask=inside)
    _store(_tile(y_ptr + row * DIM, BLOCK_D), x, inside, DIM)


@triton.jit(do_not_specialize=["seq", "keys", "kv_heads", "group"])
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, null_v_ptr, cos_ptr, sin_ptr, bias_ptr, mask_ptr, seed_ptr, scale, fill, dropout,
    stride_q_batch, stride_q_seq, stride_q_head, stride_k_batch, stride_k_seq, stride_k_head,
    stride_v_batch, stride_v_seq, stride_v_head, stride_bias_row, stride_bias_head, stride_bias_column,
    seq, keys, kv_heads, group, width,
    top_ptr, inverse_ptr, delta_ptr, grad_ptr, out_ptr, length_ptr, dq_ptr,
    NULL: tl.constexpr, RELATIVE: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of q, and delta: the sum of out * grad of each row."""
    pair = tl.program_id(0)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    rows, columns, shift = seq * group, keys + NULL, keys - seq
    # the tiles that see most come first
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    inside, row = row < rows, tl.minimum(row, rows - 1)
    query, member = row // group, row % group
    head = kv_head * group + member
    at = (batch * seq + query) * (kv_heads * group) + head

    q_tile = _tile(q_ptr + batch * stride_q_batch + query.to(tl.int64) * stride_q_seq + head * stride_q_head, BLOCK_D)
    q = _load(q_tile, DIM)
    do = _load(_tile(grad_ptr + at * DIM, BLOCK_D), DIM)
    out = _load(_tile(out_ptr + at * DIM, BLOCK_D), DIM)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), axis=1)
    row += pair.to(tl.int64) * rows
    tl.store(delta_ptr + row, delta, mask=inside)
    top, inverse = tl.load(top_ptr + row), tl.load(inverse_ptr + row)
    k_ptr += batch * stride_k_batch + kv_head * stride_k_head
    v_ptr += batch * stride_v_batch + kv_head * stride_v_head
    if bias_ptr is not None:
        bias_ptr += kv_head * group * stride_bias_head
    if mask_ptr is not None:
        mask_ptr += batch * keys

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = columns
    if CAUSAL == 1:
        end = tl.minimum(start + BLOCK_M - 1, rows - 1) // group + shift + NULL + 1
    for first in range(0, end, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        key = tl.minimum(column, columns - 1) - NULL
        k = _load(_tile(k_ptr + (key + NULL).to(tl.int64) * stride_k_seq, BLOCK_D), DIM)
        v = _load(_key_tile(v_ptr, null_v_ptr, key, stride_v_seq, kv_head, NULL, DIM, BLOCK_D), DIM)
        logits = _logits(
            tl.dot(q, tl.trans(k), input_precision="tf32x3"),
            query[:, None], member[:, None], column[None, :], bias_ptr, mask_ptr, scale, fill,
            stride_bias_row, stride_bias_head, stride_bias_column, seq, keys, NULL, RELATIVE, CAUSAL,
        )  # fmt: skip
        _, dlogits = _weights_bwd(
            logits, tl.dot(do, tl.trans(v), input_precision="tf32x3"),
            top[:, None], inverse[:, None], delta[:, None],
            mask_ptr, seed_ptr, dropout, query[:, None], column[None, :], columns, pair * group + member[:, None],
        )  # fmt: skip
        dq += tl.dot(dlogits.to(k.dtype), k, input_precision="tf32x3")

    if length_ptr is not None:
        length_ptr += at
    dq = _prepared_bwd(dq * scale, q_tile, length_ptr, cos_ptr, sin_ptr, query + shift, width, DIM)
    _store(_tile(dq_ptr + at * DIM, BLOCK_D), dq, inside, DIM)


@triton.jit(do_not_specialize=["seq", "keys", "kv_heads", "group"])
def _attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, null_v_ptr, cos_ptr, sin_ptr, bias_ptr, mask_ptr, seed_ptr, scale, fill, dropout,
    stride_q_batch, stride_q_seq, stride_q_head, stride_k_batch, stride_k_seq, stride_k_head,
    stride_v_batch, stride_v_seq, stride_v_head, stride_bias_row, stride_bias_head, stride_bias_column,
    seq, keys, kv_heads, group, width,
    top_ptr, inverse_ptr, delta_ptr, grad_ptr, length_ptr, dk_ptr, dv_ptr, dnull_k_ptr, dnull_v_ptr,
    NULL: tl.constexpr, RELATIVE: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of k and v, and those of the null ones of each batch element; a partial sum per split of rows."""
    pair = tl.program_id(0)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    rows, columns, shift = seq * group, keys + NULL, keys - seq
    start = tl.program_id(1) * BLOCK_N
    column = start + tl.arange(0, BLOCK_N)
    key = tl.minimum(column, columns - 1) - NULL
    k_ptr += batch * stride_k_batch + kv_head * stride_k_head
    v_ptr += batch * stride_v_batch + kv_head * stride_v_head
    if bias_ptr is not None:
        bias_ptr += kv_head * group * stride_bias_head
    if mask_ptr is not None:
        mask_ptr += batch * keys
    k_tile = _tile(k_ptr + (key + NULL).to(tl.int64) * stride_k_seq, BLOCK_D)
    k = _load(k_tile, DIM)
    v = _load(_key_tile(v_ptr, null_v_ptr, key, stride_v_seq, kv_head, NULL, DIM, BLOCK_D), DIM)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin = tl.program_id(2) * BLOCK_M
    if CAUSAL == 1:
        begin += tl.maximum(start - NULL - shift, 0) * group
    for first in range(begin, rows, tl.num_programs(2) * BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        inside, row = row < rows, tl.minimum(row, rows - 1)
        query, member = row // group, row % group
        head = kv_head * group + member
        q_tile = _tile(
            q_ptr + batch * stride_q_batch + query.to(tl.int64) * stride_q_seq + head * stride_q_head, BLOCK_D
        )
        q = _load(q_tile, DIM)
        do = _load(_tile(grad_ptr + ((batch * seq + query) * (kv_heads * group) + head) * DIM, BLOCK_D), DIM)
        row += pair.to(tl.int64) * rows
        top, delta = tl.load(top_ptr + row), tl.load(delta_ptr + row)
        inverse = tl.load(inverse_ptr + row, mask=inside, other=0.0)  # so that rows beyond the last weigh nothing
        logits = _logits(
            tl.dot(k, tl.trans(q), input_precision="tf32x3"),
            query[None, :], member[None, :], column[:, None], bias_ptr, mask_ptr, scale, fill,
            stride_bias_row, stride_bias_head, stride_bias_column, seq, keys, NULL, RELATIVE, CAUSAL,
        )  # fmt: skip
        weights, dlogits = _weights_bwd(
            logits, tl.dot(v, tl.trans(do), input_precision="tf32x3"),
            top[None, :], inverse[None, :], delta[None, :],
            mask_ptr, seed_ptr, dropout, query[None, :], column[:, None], columns, pair * group + member[None, :],
        )  # fmt: skip
        dv += tl.dot(weights.to(do.dtype), do, input_precision="tf32x3")
        dk += tl.dot(dlogits.to(q.dtype), q, input_precision="tf32x3")

    if length_ptr is not None:
        length_ptr += (batch * columns + key + NULL) * kv_heads + kv_head
    dk = _prepared_bwd(dk * scale, k_tile, length_ptr, cos_ptr, sin_ptr, key, width, DIM)
    part = tl.program_id(2) * (tl.num_programs(0) // kv_heads) + batch
    at = ((part * keys + key) * kv_heads + kv_head) * DIM
    inside = (column >= NULL) & (column < columns)
    _store(_tile(dk_ptr + at, BLOCK_D), dk, inside, DIM)
    _store(_tile(dv_ptr + at, BLOCK_D), dv, inside, DIM)
    if NULL:
        at = (part * kv_heads + kv_head) * DIM + key * 0
        _store(_tile(dnull_k_ptr + at, BLOCK_D), dk, column == 0, DIM)
        _store(_tile(dnull_v_ptr + at, BLOCK_D), dv, column == 0, DIM)


@triton.jit(do_not_specialize=["seq", "keys", "kv_heads", "group", "batches", "chunks", "num_buckets"])
def _attention_bwd_dbias_kernel(
    q_ptr, k_ptr, v_ptr, null_v_ptr, cos_ptr, sin_ptr, bias_ptr, mask_ptr, seed_ptr, scale, fill, dropout,
    stride_q_batch, stride_q_seq, stride_q_head, stride_k_batch, stride_k_seq, stride_k_head,
    stride_v_batch, stride_v_seq, stride_v_head, stride_bias_row, stride_bias_head, stride_bias_column,
    seq, keys, kv_heads, group, width,
    top_ptr, inverse_ptr, delta_ptr, grad_ptr, buckets_ptr, dbias_ptr, batches, chunks, num_buckets,
    NULL: tl.constexpr, RELATIVE: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of bias of one head, or with RELATIVE of its buckets: a partial sum per chunk of batch."""
    head, chunk = tl.program_id(1) // chunks, tl.program_id(1) % chunks
    kv_head, member = head // group, head % group
    rows, columns, shift = seq * group, keys + NULL, keys - seq
    tiles = tl.cdiv(columns, BLOCK_N)
    query = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.program_id(0) % tiles * BLOCK_N
    column = start + tl.arange(0, BLOCK_N)
    inside, query = query < seq, tl.minimum(query, seq - 1)
    key = tl.minimum(column, columns - 1) - NULL
    q_ptr += head * stride_q_head
    k_ptr += kv_head * stride_k_head
    v_ptr += kv_head * stride_v_head
    bias_ptr += kv_head * group * stride_bias_head

    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    end = batches
    if CAUSAL == 1:
        end = tl.where(start <= tl.max(query) + shift + NULL, batches, 0)
    for number in range(chunk, end, chunks):
        pair, batch = number * kv_heads + kv_head, tl.cast(number, tl.int64)
        q = _load(_tile(q_ptr + batch * stride_q_batch + query.to(tl.int64) * stride_q_seq, BLOCK_D), DIM)
        k = _load(_tile(k_ptr + batch * stride_k_batch + (key + NULL).to(tl.int64) * stride_k_seq, BLOCK_D), DIM)
        v_tile = _key_tile(v_ptr + batch * stride_v_batch, null_v_ptr, key, stride_v_seq, kv_head, NULL, DIM, BLOCK_D)
        v = _load(v_tile, DIM)
        do = _load(_tile(grad_ptr + ((batch * seq + query) * (kv_heads * group) + head) * DIM, BLOCK_D), DIM)
        row = pair.to(tl.int64) * rows + query * group + member
        top, delta = tl.load(top_ptr + row), tl.load(delta_ptr + row)
        inverse = tl.load(inverse_ptr + row, mask=inside, other=0.0)
        mask_rows_ptr = mask_ptr
        if mask_ptr is not None:
            mask_rows_ptr += batch * keys
        logits = _logits(
            tl.dot(q, tl.trans(k), input_precision="tf32x3"),
            query[:, None], member, column[None, :], bias_ptr, mask_rows_ptr, scale, fill,
            stride_bias_row, stride_bias_head, stride_bias_column, seq, keys, NULL, RELATIVE, CAUSAL,
        )  # fmt: skip
        _, dlogits = _weights_bwd(
            logits, tl.dot(do, tl.trans(v), input_precision="tf32x3"),
            top[:, None], inverse[:, None], delta[:, None],
            mask_ptr, seed_ptr, dropout, query[:, None], column[None, :], columns, pair * group + member,
        )  # fmt: skip
        dbias += dlogits

    if RELATIVE:
        bucket = tl.load(buckets_ptr + tl.maximum(query[:, None] + shift - column[None, :], 0))
        dbias_ptr += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * num_buckets
        for b in range(num_buckets):
            tl.store(dbias_ptr + b, tl.sum(tl.where(bucket == b, dbias, 0.0)))
    else:
        at = ((chunk * seq + query).to(tl.int64) * (kv_heads * group) + head) * columns
        tl.store(dbias_ptr + at[:, None] + column[None, :], dbias, mask=inside[:, None] & (column < columns))


# programs that fill a large chip a few times over, however few the heads
PROGRAMS = 512


@dataclass(frozen=True)
class Config:
    block_m: int  # rows
    block_n: int  # columns
    num_warps: int
    num_stages: int


# (bytes of an element, features, plain): tiles whose kernels spill no registers from compute capability 8.0 to 10.0;
# the last, 16 bytes. Features that are masked take registers too: the tiles of 64 are for dim_head 64 alone.
TILES = {
    (2, 64, True): dict(fwd=(128, 64, 8, 2), dq=(64, 32, 4, 2), dkv=(64, 128, 8, 2)),
    (2, 64, False): dict(fwd=(64, 64, 8, 1), dq=(64, 32, 8, 1), dkv=(32, 64, 4, 1), dbias=(32, 32, 4, 1)),
    (2, 128, True): dict(fwd=(64, 64, 8, 2), dq=(64, 64, 8, 2), dkv=(32, 64, 8, 2)),
    (2, 128, False): dict(fwd=(64, 32, 8, 1), dq=(32, 32, 8, 1), dkv=(32, 32, 8, 1), dbias=(32, 16, 4, 1)),
    (4, 64, True): dict(fwd=(32, 32, 8, 1), dq=(32, 16, 8, 1), dkv=(32, 16, 4, 1)),
    (4, 64, False): dict(fwd=(32, 32, 4, 1), dq=(32, 32, 8, 1), dkv=(16, 32, 8, 1), dbias=(16, 32, 4, 1)),
    (4, 128, True): dict(fwd=(16, 32, 8, 1), dq=(16, 32, 8, 1), dkv=(32, 16, 8, 1)),
    (4, 128, False): dict(fwd=(16, 32, 8, 1), dq=(16, 32, 8, 1), dkv=(16, 16, 8, 1), dbias=(32, 8, 4, 1)),
}


def attention_config(kernel: str, dim_head: int, element_size: int, plain: bool) -> Config:
    """Of kernel "fwd", "dq", "dkv" or "dbias"; `plain` without bias and dropout, which take many registers."""
    return Config(*TILES[element_size, 64 if dim_head == 64 else 128, plain][kernel])


def _shared(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    null_kv: tuple[Tensor | None, ...],
    cos: Tensor | None,
    sin: Tensor | None,
    bias: Tensor | None,
    relative: bool,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    causal: bool,
    causal_fill: float,
    dropout: float,
) -> tuple[Config, tuple, dict]:
    """The launch configuration, and the arguments and keyword arguments of `launch` that the kernels share.

    `null_kv` and `bias` are as the kernels take them: pointers apart, and with `relative` (distances, heads).
    """
    seq, heads, dim = q.shape[1:]
    keys, kv_heads = v.shape[1:3]
    block_d = max(64, launch.power_of_2(dim))
    config = attention_config(kernel, dim, q.element_size(), plain=bias is None and seed is None)
    bias_strides = (0, 0, 0) if bias is None else (*bias.stride(), 0) if relative else bias.stride()
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.int8)
    arguments = (
        *(q, k, v, *null_kv, cos, sin, bias, mask, seed),
        *(float(scale), float(causal_fill), float(dropout)),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *bias_strides),
        *(seq, keys, kv_heads, heads // kv_heads, 0 if cos is None else cos.shape[-1]),
    )
    constants = dict(
        NULL=int(null_kv[-1] is not None),
        RELATIVE=relative,
        CAUSAL=0 if not causal else 1 if causal_fill == -math.inf else 2,
        DIM=dim,
        BLOCK_D=block_d,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return config, arguments, constants


def _prepare(
    x: Tensor, null: Tensor | None, cos: Tensor | None, sin: Tensor | None, cosine: bool, shift: int
) -> tuple[Tensor, Tensor | None]:
    """Queries or keys as the dot product takes them, the null one first; with `cosine` their lengths before, fp32."""
    (batch, seq, heads, dim), block_d = x.shape, max(64, launch.power_of_2(x.shape[-1]))
    seq += null is not None
    y = launch.empty((batch, seq, heads, dim), x)
    length = launch.empty((batch, seq, heads), x, torch.float32) if cosine else None
    width = 0 if cos is None else cos.shape[-1]
    arguments = x, null, cos, sin, *x.stride()[:3], seq * heads, heads, shift, width, y, length
    constants = dict(NULL=int(null is not None), DIM=dim, BLOCK_D=block_d, BLOCK_M=64, num_warps=4, num_stages=1)
    launch.launch(_attention_prepare_kernel, (batch, launch.ceil_div(seq * heads, 64)), *arguments, **constants)
    return y, length


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    null_kv: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    bias: Tensor | None,
    buckets: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    cosine: bool,
    causal: bool,
    causal_fill: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """The result; and (2, batch, kv_heads, rows) fp32, the maximum and the inverse of the sum of each row."""
    nulls = (None, None) if null_kv is None else null_kv.unbind()
    relative = buckets is not None
    by_distance = bias.index_select(0, buckets) if relative else bias
    options = nulls, cos, sin, by_distance, relative, mask, seed, scale, causal, causal_fill, dropout
    config, arguments, constants = _shared("fwd", q, k, v, *options)
    (batch, seq, heads, dim), kv_heads = q.shape, k.shape[2]
    rows = seq * (heads // kv_heads)
    out = launch.empty((batch, seq, heads * dim), q)
    stats = launch.empty((2, batch, kv_heads, rows), q, torch.float32)
    grid = batch * kv_heads, launch.ceil_div(rows, config.block_m)
    launch.launch(_attention_fwd_kernel, grid, *arguments, out, *stats.unbind(), COSINE=cosine, **constants)
    return out, stats


def attention_bwd(
    grad: Tensor,
    out: Tensor,
    stats: Tensor,
    bias_grad: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    null_kv: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    bias: Tensor | None,
    buckets: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    cosine: bool,
    causal: bool,
    causal_fill: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, null_kv and bias, each empty where there is none; that of bias where `bias_grad`."""
    (batch, seq, heads, dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    rows, columns = seq * (heads // kv_heads), keys + (null_kv is not None)
    grad = grad.contiguous()
    top, inverse = stats.unbind()
    delta = launch.empty(top.shape, top)
    null_k, null_v = (None, None) if null_kv is None else null_kv.unbind()
    q_length = k_length = None
    turned = cosine or cos is not None
    if turned:
        q, q_length = _prepare(q, None, cos, sin, cosine, keys - seq)
    if turned or null_kv is not None:
        k, k_length = _prepare(k, null_k, cos, sin, cosine, 0)
    relative = buckets is not None
    by_distance = bias.index_select(0, buckets) if relative else bias
    inputs = q, k, v, (null_v,), cos, sin, by_distance, relative, mask, seed, scale, causal, causal_fill, dropout

    config, arguments, constants = _shared("dq", *inputs)
    dq = launch.empty(q.shape, q)
    grid = batch * kv_heads, launch.ceil_div(rows, config.block_m)
    launch.launch(_attention_bwd_dq_kernel, grid, *arguments, top, inverse, delta, grad, out, q_length, dq, **constants)

    config, arguments, constants = _shared("dkv", *inputs)
    tiles = launch.ceil_div(columns, config.block_n)
    # few heads of keys make few programs: then the rows are split among several
    splits = max(1, min(PROGRAMS // (batch * kv_heads * tiles), launch.ceil_div(rows, config.block_m)))
    dk, dv = (launch.empty((splits, *v.shape), v, torch.float32 if splits > 1 else v.dtype) for _ in range(2))
    dnull = None if null_kv is None else launch.empty((2, splits * batch, kv_heads, dim), v, torch.float32)
    dnull_k, dnull_v = (None, None) if dnull is None else dnull.unbind()
    grid = batch * kv_heads, tiles, splits
    launch.launch(
        _attention_bwd_dkv_kernel,
        grid,
        *(*arguments, top, inverse, delta, grad, k_length, dk, dv, dnull_k, dnull_v),
        **constants,
    )
    dk, dv = (t.sum(0).to(v.dtype) if splits > 1 else t.view(v.shape) for t in (dk, dv))
    dnull = launch.empty((0,), q) if dnull is None else dnull.sum(1).to(null_kv.dtype)

    if not bias_grad:
        return dq, dk, dv, dnull, launch.empty((0,), q)
    config, arguments, constants = _shared("dbias", *inputs)
    tiles = launch.ceil_div(seq, config.block_m) * launch.ceil_div(columns, config.block_n)
    chunks = max(1, min(PROGRAMS // (heads * tiles), batch))
    num_buckets = len(bias) if relative else 0
    shape = (heads, chunks * tiles, num_buckets) if relative else (chunks, seq, heads, columns)
    parts = launch.empty(shape, q, torch.float32)
    launch.launch(
        _attention_bwd_dbias_kernel,
        (tiles, heads * chunks),
        *(*arguments, top, inverse, delta, grad, buckets, parts, batch, chunks, num_buckets),
        **constants,
    )
    dbias = parts.sum(1).t() if relative else parts.sum(0)
    return dq, dk, dv, dnull, dbias.to(bias.dtype).contiguous()


_attention = torch.library.custom_op("fastprior::attention", attention_fwd, mutates_args=())
_attention_bwd = torch.library.custom_op("fastprior::attention_bwd", attention_bwd, mutates_args=())


@_attention.register_fake
def _(q, k, *_):
    batch, seq, heads, dim = q.shape
    kv_heads = k.shape[2]
    stats = q.new_empty((2, batch, kv_heads, seq * (heads // kv_heads)), dtype=torch.float32)
    return q.new_empty((batch, seq, heads * dim)), stats


@_attention_bwd.register_fake
def _(grad, out, stats, bias_grad, q, k, v, null_kv, cos, sin, bias, *_):
    given = q, k, v, null_kv, bias if bias_grad else None
    return tuple(q.new_empty((0,)) if t is None else t.new_empty(t.shape) for t in given)


def _setup_context(ctx, inputs, output):
    ctx.numbers = inputs[10:]
    ctx.save_for_backward(*inputs[:10], *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    *inputs, out, stats = ctx.saved_tensors
    needed = ctx.needs_input_grad
    dq, dk, dv, dnull, dbias = _attention_bwd(grad, out, stats, needed[6], *inputs, *ctx.numbers)
    grads = dq, dk, dv, dnull, None, None, dbias, *[None] * 8
    return tuple(grad if need else None for grad, need in zip(grads, needed))


_attention.register_autograd(_backward, setup_context=_setup_context)


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
    """Attention with everything around it in one kernel: see `reference.attention`.

    Raises:
        TypeError, ValueError: for an argument that the kernels cannot take. They take dim_head from 16 to 128, and give
            no gradient to rotary tables and masks.
    """
    _check(q, k, v, rotary, null_kv, bias, buckets, mask, dropout, seed)
    cos, sin = (None, None) if rotary is None else (table.float().contiguous() for table in rotary)
    null_kv = None if null_kv is None else null_kv.to(q.dtype).contiguous()
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask.float()).contiguous()
    if not dropout:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (), device=q.device)
    options = null_kv, cos, sin, bias, buckets, mask, seed, scale, cosine, causal, causal_fill, dropout
    return _attention(q, k, v, *options)[0]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Rotary | None,
    null_kv: Tensor | None,
    bias: Tensor | None,
    buckets: Tensor | None,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> None:
    launch.check_dtype("q", q)
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q and k have {q.dim()} and {k.dim()} dimensions; they must have 4")
    (batch, seq, heads, dim_head), (keys, kv_heads) = q.shape, k.shape[1:3]
    launch.check_shape("q", q, q.shape, q)
    for name, tensor in (("k", k), ("v", v)):
        launch.check_dtype(name, tensor, (q.dtype,))
        launch.check_shape(name, tensor, (batch, keys, kv_heads, dim_head), q)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        launch.check_last_contiguous(name, tensor)
    if not 16 <= dim_head <= 128:
        raise ValueError(f"q has dim_head {dim_head}; it must be from 16 to 128")
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads; they must be a multiple of the {kv_heads} heads of k")
    if seq > keys:
        raise ValueError(f"q has {seq} positions; they must be the last of the {keys} of k")
    if rotary is not None:
        width = rotary[0].shape[-1]
        for name, table in zip(("rotary cos", "rotary sin"), rotary):
            launch.check_shape(name, table, (keys, width), q)
            _check_no_gradient(name, table)
        if width % 2 or width > dim_head:
            raise ValueError(f"rotary tables have width {width}; it must be even and at most dim_head, {dim_head}")
    if null_kv is not None:
        launch.check_shape("null_kv", null_kv, (2, kv_heads, dim_head), q)
    if buckets is not None:
        if bias is None:
            raise ValueError("buckets came without bias; they are buckets of the table that bias is")
        launch.check_dtype("buckets", buckets, (torch.int64,))
        launch.check_shape("buckets", buckets, (keys,), q)
        launch.check_shape("bias", bias, (len(bias), heads), q)
    elif bias is not None:
        launch.check_shape("bias", bias, (seq, heads, keys + (null_kv is not None)), q)
    if bias is not None:
        launch.check_dtype("bias", bias)
    if mask is not None:
        launch.check_dtype("mask", mask, (torch.bool, *launch.FLOATS))
        launch.check_shape("mask", mask, (batch, keys), q)
        _check_no_gradient("mask", mask)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}; it must be at least 0 and less than 1")
    if seed is not None:
        launch.check_dtype("seed", seed, (torch.int64,))
        launch.check_shape("seed", seed, (), q)


def _check_no_gradient(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name} requires a gradient, which these kernels do not give; use reference.attention")
