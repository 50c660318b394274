"""Pieces that several kernels share: whose turn a program has, tiles of rows, decay inside a chunk, online softmax.

Key: BT tokens of a chunk, D features of a tile, H query heads, G key/value heads, R = H / G.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def bounds(cu, i_n, T, VARLEN: tl.constexpr):
    """(first row of sequence i_n as int64, its length). Sequences are rows of a batch or, with VARLEN, stretches between entries of cu."""
    if VARLEN:
        start = tl.load(cu + i_n).to(tl.int64)
        length = (tl.load(cu + i_n + 1).to(tl.int64) - start).to(tl.int32)
    else:
        start = i_n.to(tl.int64) * T
        length = T
    return start, length


@triton.jit
def first_row(start, i_n, rows, VARLEN: tl.constexpr):
    """First row of sequence i_n in a tensor with `rows` rows a sequence of its own; packed tensors share their rows."""
    return start if VARLEN else i_n.to(tl.int64) * rows


@triton.jit
def head_of(i_nh, cu, T, H: tl.constexpr, R: tl.constexpr, VARLEN: tl.constexpr):
    """(sequence, head, its key/value head, first row, length) of program i_nh of N H."""
    i_n, i_h = i_nh // H, i_nh % H
    start, length = bounds(cu, i_n, T, VARLEN)
    return i_n, i_h, i_h // R, start, length


@triton.jit
def read_tile(x, row, stride, column, has_row, has_column):
    """[rows, columns] of x at row * stride + column, 0 where there is none. `x` carries the 64-bit base, offsets inside a tile are 32-bit."""
    return tl.load(x + row[:, None] * stride + column[None, :], mask=has_row[:, None] & has_column[None, :], other=0.0)


@triton.jit
def write_tile(x, row, stride, column, has_row, has_column, tile):
    """The reverse of `read_tile`, in the type of x."""
    tl.store(x + row[:, None] * stride + column[None, :], tile.to(x.dtype.element_ty), mask=has_row[:, None] & has_column[None, :])


@triton.jit
def fades(c, BT: tl.constexpr, VECTOR: tl.constexpr):
    """Decay from the chunk's start to each token, from each token to the chunk's end, and over the chunk.

    c: cumulative log decay, [BT] or, VECTOR, [BT, D]; the last result has no axis of tokens.
    """
    last = tl.arange(0, BT) == BT - 1
    if VECTOR:
        last = last[:, None]
    total = tl.sum(tl.where(last, c, 0.0), 0)
    return tl.exp2(c * LOG2E), tl.exp2((total - c) * LOG2E), tl.exp2(total * LOG2E)


@triton.jit
def causal_mask(BT: tl.constexpr, REVERSE: tl.constexpr):
    """[row, column]: row reads column. REVERSE runs time backwards."""
    i = tl.arange(0, BT)
    return (i[:, None] <= i[None, :]) if REVERSE else (i[:, None] >= i[None, :])


@triton.jit
def pair_decay(c, BT: tl.constexpr, REVERSE: tl.constexpr):
    """[BT, BT]: exp of the decay between row and column, 0 where the row does not read the column. c: cumulative log decay."""
    between = (c[None, :] - c[:, None]) if REVERSE else (c[:, None] - c[None, :])
    return tl.exp2(tl.where(causal_mask(BT, REVERSE), between * LOG2E, float("-inf")))


@triton.jit
def level_mask(LEVEL: tl.constexpr, BT: tl.constexpr, REVERSE: tl.constexpr):
    """Pairs in one block of 2^(LEVEL+1) tokens whose later token is in its upper half and whose earlier one in its lower half.

    Over all levels every pair of two different tokens is met exactly once.
    """
    i = tl.arange(0, BT)
    same = (i[:, None] >> (LEVEL + 1)) == (i[None, :] >> (LEVEL + 1))
    row, column = (i[:, None] >> LEVEL) & 1, (i[None, :] >> LEVEL) & 1
    return same & ((row < column) if REVERSE else (row > column))


@triton.jit
def level_decay(c, LEVEL: tl.constexpr, BT: tl.constexpr, D: tl.constexpr, REVERSE: tl.constexpr):
    """(row factor, column factor), [BT, D], both <= 1: their product is the decay between the tokens of every pair of `level_mask`.

    The reference is the last token of the lower half, so no exponent is positive, however strong the decay.
    """
    half: tl.constexpr = 2**LEVEL
    blocks = tl.reshape(c, (BT // (2 * half), 2 * half, D))
    at = tl.arange(0, 2 * half)[None, :, None] == half - 1
    reference = tl.sum(tl.where(at, blocks, 0.0), 1)
    off = tl.reshape(blocks - reference[:, None, :], (BT, D)) * LOG2E
    later, earlier = tl.exp2(tl.minimum(off, 0.0)), tl.exp2(tl.minimum(-off, 0.0))
    if REVERSE:
        row, column = earlier, later
    else:
        row, column = later, earlier
    return row, column


@triton.jit
def vector_weights(q, k, c, BT: tl.constexpr, LEVELS: tl.constexpr, D: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """[BT, BT]: sum_f q_if k_jf exp(decay_f between i and j), 0 where i does not read j; c [BT, D] cumulative log decay."""
    i = tl.arange(0, BT)
    own = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
    weights = tl.where(i[:, None] == i[None, :], own[:, None], 0.0)
    for level in tl.static_range(LEVELS):
        row, column = level_decay(c, level, BT, D, REVERSE)
        pairs = tl.dot((q * row).to(q.dtype), tl.trans((k * column).to(k.dtype)), input_precision=PRECISION)
        weights += tl.where(level_mask(level, BT, REVERSE), pairs, 0.0)
    return weights


@triton.jit
def softmax_block(scores, v, top, total, sums, PRECISION: tl.constexpr):
    """One more block of keys: scores [BT, BN] in log2, -inf where unseen. Returns (top, total, sums), all relative to the new top."""
    new = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores - safe[:, None])
    keep = tl.exp2(top - safe)
    total = total * keep + tl.sum(weights, 1)
    sums = tl.dot(weights.to(v.dtype), v, sums * keep[:, None], input_precision=PRECISION)
    return new, total, sums
