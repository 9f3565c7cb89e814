"""The kernels of `attention`: what each computes of a tile; `attention` launches them.

The heads that share a head of keys are rows of one tile, `row = query * group + member`, so that a tile of keys serves
them all. Logits are not stored: backward computes them again, from the maximum and the sum of each row. The null key
is column 0: its row of keys is read from elsewhere, and its gradient is that of a column. Forward rotates and
normalises queries and keys as it loads them; backward, where every kernel would do so again, does it first and once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import philox

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


# in what follows ptr is a tile of pointers (rows, features); features from DIM on are not there
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
def _load(ptr, features):
    return tl.load(ptr, mask=tl.arange(0, ptr.shape[1])[None, :] < features, other=0.0)


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


# these take queries, members and columns of shapes that broadcast, in either order
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
        q_row = q_ptr + batch * stride_q_batch + query.to(tl.int64) * stride_q_seq
        k_row = k_ptr + batch * stride_k_batch + (key + NULL).to(tl.int64) * stride_k_seq
        do_row = grad_ptr + ((batch * seq + query) * (kv_heads * group) + head) * DIM
        products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        dp = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # some features at a time: an operand of a product stands in registers whole, in fp32 twice
        for start_d in range(0, DIM, BLOCK_D):
            features = DIM - start_d
            q, k = _load(_tile(q_row + start_d, BLOCK_D), features), _load(_tile(k_row + start_d, BLOCK_D), features)
            products = tl.dot(q, tl.trans(k), products, input_precision="tf32x3")
            v_at = v_ptr + batch * stride_v_batch
            v_tile = _key_tile(v_at, null_v_ptr, key, stride_v_seq, kv_head, NULL, DIM, BLOCK_D)
            v = _load(v_tile + start_d, features)
            do = _load(_tile(do_row + start_d, BLOCK_D), features)
            dp = tl.dot(do, tl.trans(v), dp, input_precision="tf32x3")
        row = pair.to(tl.int64) * rows + query * group + member
        top, delta = tl.load(top_ptr + row), tl.load(delta_ptr + row)
        inverse = tl.load(inverse_ptr + row, mask=inside, other=0.0)
        mask_rows_ptr = mask_ptr
        if mask_ptr is not None:
            mask_rows_ptr += batch * keys
        logits = _logits(
            products, query[:, None], member, column[None, :], bias_ptr, mask_rows_ptr, scale, fill,
            stride_bias_row, stride_bias_head, stride_bias_column, seq, keys, NULL, RELATIVE, CAUSAL,
        )  # fmt: skip
        _, dlogits = _weights_bwd(
            logits, dp, top[:, None], inverse[:, None], delta[:, None],
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
