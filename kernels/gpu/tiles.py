"""Tiles of skinny linears: rows and weights as tensor cores take them of the threads that read them.

A product of tensor cores takes pairs of columns of each thread, from places of its own choice. Which columns these are
does not matter to a sum, so a thread gives those that it read side by side, and neither rows nor weights change hands.
"""

import triton
import triton.language as tl


@triton.jit
def columns(PARTS: tl.constexpr, THREADS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns of a chunk as threads read them of rows, (threads, 1, parts, 1, of a thread, side by side)."""
    EACH: tl.constexpr = BLOCK_K // THREADS
    SIDE: tl.constexpr = min(EACH, 4)
    thread, part = tl.arange(0, THREADS) * EACH, tl.arange(0, PARTS) * BLOCK_K
    k = thread[:, None] + part[None, :]
    k = k[:, None, :, None, None, None] + (tl.arange(0, EACH // SIDE) * SIDE)[None, None, None, None, :, None]
    return k + tl.arange(0, SIDE)[None, None, None, None, None, :]


@triton.jit
def placed(t):
    """What was read by `columns`, as (groups of rows, rows, parts, columns)."""
    t = tl.permute(t, (3, 1, 2, 0, 4, 5))
    return tl.reshape(t, (t.shape[0], t.shape[1], t.shape[2], t.shape[3] * t.shape[4] * t.shape[5]))


@triton.jit
def load_rows(ptr, row, in_rows, stride, k, dim, EVEN: tl.constexpr):
    """Numbers of rows, which others wrote: see `placed`."""
    mask = in_rows
    if not EVEN:
        mask = mask & (k < dim)
    return placed(tl.load(ptr + (row.to(tl.int64) * stride + k), mask=mask, other=0.0, cache_modifier=".cg"))


@triton.jit
def load_vector(ptr, row, k, dim, EVEN: tl.constexpr):
    """A vector as the same threads read it that read rows."""
    k += tl.zeros_like(row)
    if EVEN:
        out = tl.load(ptr + k)
    else:
        out = tl.load(ptr + k, mask=k < dim, other=0.0)
    return placed(out)


@triton.jit
def load_first(ptr, row, in_rows, stride):
    """The first number of each row, (groups, rows, 1, 1)."""
    first = tl.load(ptr + row.to(tl.int64) * stride, mask=in_rows, other=0.0, cache_modifier=".cg")
    return first.to(tl.float32)[:, :, None, None]


@triton.jit
def sum_parts(y, A: tl.constexpr, B: tl.constexpr, PARTS: tl.constexpr):
    """Sum (A, B, parts) over its parts, which warps have: they hand over all at once, and threads add."""
    tl.static_assert(PARTS == 4 or PARTS == 8 or PARTS == 16)
    if PARTS == 16:
        left, right = tl.split(tl.reshape(y, (A, B, 8, 2)))
        y = left + right
    if PARTS >= 8:
        left, right = tl.split(tl.reshape(y, (A, B, 4, 2)))
        y = left + right
    left, right = tl.split(tl.reshape(y, (A, B, 2, 2)))
    left, right = tl.split(left + right)
    return left + right


@triton.jit
def add(x, first, total, squares, k, dim, EVEN: tl.constexpr):
    """Add a chunk of rows to sums, and to sums of squares, of differences from the first number of each row."""
    x = x.to(tl.float32) - first
    if not EVEN:
        x = tl.where(k < dim, x, 0.0)
    return total + x, squares + x * x


@triton.jit
def moments(total, squares, first, share, eps):
    """Mean and reciprocal deviation of rows, fp32, of what `add` summed up in each thread.

    Warps meet once, since the differences are from a number of the row. That is at most sqrt(dim) deviations from the
    mean, so the variance is right to dim units in the last place at worst.
    """
    both = tl.join(tl.sum(total, axis=3), tl.sum(squares, axis=3))
    total, squares = tl.split(tl.sum(both, axis=2))
    mean = (total * share)[:, :, None, None]
    rstd = tl.rsqrt(tl.maximum((squares * share)[:, :, None, None] - mean * mean, 0.0) + eps)
    return mean + first, rstd


@triton.jit
def normed(x, mean, rstd, gain, bias, k, dim, EVEN: tl.constexpr):
    """LayerNorm of a chunk of rows, fp32."""
    y = tl.fma(x.to(tl.float32), rstd, -mean * rstd)
    if gain is not None:
        y *= gain.to(tl.float32)
    if bias is not None:
        y += bias.to(tl.float32)
    if not EVEN:
        y = tl.where(k < dim, y, 0.0)
    return y


@triton.jit
def store_total(total_ptr, x, row, in_rows, k, dim):
    """Write a chunk of a stream's sum, by the threads that read it."""
    x = tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], k.shape[0], k.shape[4], k.shape[5]))
    cell = total_ptr + row * dim + k
    tl.store(cell, tl.permute(x, (3, 1, 2, 0, 4, 5)).to(total_ptr.dtype.element_ty), mask=in_rows & (k < dim))


@triton.jit
def load_tile(ptr, row, in_tile, stride, start, dim, PARTS: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr):
    """Weights of a piece's results by parts of the sum, (parts, results, columns); nobody reads them again soon.

    A thread asks for `VECTOR` numbers that lie side by side, and these are those that the tensor cores take from it:
    columns are given in another order, see `in_order`. So they stay in the registers where they arrive.
    """
    BLOCK_K: tl.constexpr = 4 * VECTOR
    GROUPS: tl.constexpr = in_tile.shape[0] // 8
    k = start + tl.arange(0, PARTS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    row = tl.permute(tl.reshape(row.to(tl.int64), (GROUPS, 8)), (1, 0))[:, None, :, None]
    mask = tl.permute(tl.reshape(in_tile, (GROUPS, 8)), (1, 0))[:, None, :, None]
    if not EVEN:
        mask = mask & (k < dim)[None, :, None, :]
    at = row * stride + k[None, :, None, :]
    tile = tl.load(ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
    tile = tl.reshape(tl.permute(tile, (1, 2, 0, 3)), (PARTS, GROUPS * 8, BLOCK_K))
    return in_order(tile, PARTS, GROUPS * 8, VECTOR)


@triton.jit
def in_order(t, A: tl.constexpr, B: tl.constexpr, VECTOR: tl.constexpr):
    """Columns in the order in which threads hold them for a product: two of each of four threads, and so on."""
    BLOCKS: tl.constexpr = t.shape[2] // (4 * VECTOR)
    t = tl.reshape(t, (A, B, BLOCKS, 4, VECTOR // 2, 2))
    return tl.reshape(tl.permute(t, (0, 1, 2, 4, 3, 5)), (A, B, BLOCKS * 4 * VECTOR))


@triton.jit
def multiply(weight, x, y, OPERAND: tl.constexpr):
    """Add the products of parts of the sum, (parts, results, rows): rows are the narrow side of the tensor cores."""
    return tl.dot(weight.to(OPERAND), x, y, input_precision="tf32x3")


@triton.jit
def join(pieces, PIECES: tl.constexpr, PIECE: tl.constexpr, BLOCK_M: tl.constexpr):
    """The sum over parts of all pieces of a tile, (results, rows): with three pieces there are results for four."""
    PARTS: tl.constexpr = pieces[0].shape[0]
    if PIECES == 1:
        y = sum_parts(tl.permute(pieces[0], (1, 2, 0)), PIECE, BLOCK_M, PARTS)
    elif PIECES == 2:
        y = tl.reshape(tl.permute(tl.join(pieces[0], pieces[1]), (3, 1, 2, 0)), (2 * PIECE, BLOCK_M, PARTS))
        y = sum_parts(y, 2 * PIECE, BLOCK_M, PARTS)
    else:
        if PIECES == 4:
            last = pieces[3]
        else:
            last = tl.zeros_like(pieces[0])
        y = tl.join(tl.join(pieces[0], pieces[1]), tl.join(pieces[2], last))
        y = tl.reshape(tl.permute(y, (4, 3, 1, 2, 0)), (4 * PIECE, BLOCK_M, PARTS))
        y = sum_parts(y, 4 * PIECE, BLOCK_M, PARTS)
    return y


@triton.jit
def pairs(y, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Values and gates, (pairs, rows), of results that have eight of each in turn."""
    y = tl.permute(tl.reshape(y, (PAIRS // 8, 2, 8, BLOCK_M)), (0, 2, 3, 1))
    return tl.split(tl.reshape(y, (PAIRS, BLOCK_M, 2)))
