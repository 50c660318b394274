"""Feature maps inside the kernels of ops 1 and 5 (subquad.kernels.features): phi of tiles, what a tile of columns needs of its rows, the way back.

A tile with all of a row's features makes its own normaliser (`read_features`). Where the gradient of queries or keys is summed, features are the value axis and a
program sees some columns: those are read (`feature_columns`) beside the rows' normalisers, which one small kernel leaves before.

Key: M rows (tokens times heads), Y numbers of a row, F = SIGNS Y features, BM and BY tiles of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.features import FUSED
from subquad.kernels.triton.launch import pad
from subquad.kernels.triton.pieces import LOG2E, read_tile, write_tile

NO_MAP = dict(SIGNS=1, NORM=0, GAIN=1.0, LIMIT=0.0, FLOOR=0.0)


def constants(feature_map: str | None) -> dict[str, int | float]:
    """What kernels are told of a map."""
    if feature_map is None:
        return NO_MAP
    row = FUSED[feature_map]
    limit = row.limit if row.norm == 0 else 0.0
    return dict(SIGNS=row.signs, NORM=row.norm, GAIN=row.gain, LIMIT=limit, FLOOR=row.floor)


@triton.jit
def highest(u, has_column, NORM: tl.constexpr):
    """Largest exponents of a row, of u and of -u: [BM] each."""
    seen = has_column[None, :]
    plus, minus = tl.max(tl.where(seen, u, float("-inf")), 1), tl.max(tl.where(seen, -u, float("-inf")), 1)
    if NORM == 2:
        plus = tl.maximum(plus, minus)
        minus = plus
    return plus, minus


@triton.jit
def sides(y, has_row, has_column, SIGNS: tl.constexpr, NORM: tl.constexpr, GAIN: tl.constexpr, LIMIT: tl.constexpr):
    """phi of y and of -y before the floor, [BM, BY] each (of y twice with one sign); 0 outside."""
    u = y.to(tl.float32) * (GAIN * LOG2E)
    inside = has_row[:, None] & has_column[None, :]
    if NORM == 0:
        u = tl.minimum(tl.maximum(u, -LIMIT * LOG2E), LIMIT * LOG2E)
        plus, minus = tl.where(inside, tl.exp2(u), 0.0), tl.where(inside, tl.exp2(-u), 0.0)
    else:
        top, bottom = highest(u, has_column, NORM)
        plus = tl.where(inside, tl.exp2(u - top[:, None]), 0.0)
        total = tl.sum(plus, 1)
        minus = plus
        if SIGNS == 2:
            minus = tl.where(inside, tl.exp2(-u - bottom[:, None]), 0.0)
            rest = tl.sum(minus, 1)
            if NORM == 2:
                total += rest
                rest = total
            minus = minus / tl.where(has_row, rest, 1.0)[:, None]
        plus = plus / tl.where(has_row, total, 1.0)[:, None]
    return plus, minus


@triton.jit
def row_norm(u, has_column, NORM: tl.constexpr, SIGNS: tl.constexpr):
    """(log2 sum exp2 of u, of -u) per row, u [BM, BY] all of a row's exponents in log2."""
    top, bottom = highest(u, has_column, NORM)
    total = tl.sum(tl.where(has_column[None, :], tl.exp2(u - top[:, None]), 0.0), 1)
    rest = total
    if SIGNS == 2:
        rest = tl.sum(tl.where(has_column[None, :], tl.exp2(-u - bottom[:, None]), 0.0), 1)
        if NORM == 2:
            total += rest
            rest = total
    return top + tl.log2(total), bottom + tl.log2(rest)


@triton.jit
def at_features(y, plus, rest, row, stride, index, has_row, has_index, Y: tl.constexpr,
                NORM: tl.constexpr, GAIN: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr):  # fmt: skip
    """phi [BM, features] at features `index` of rows row * stride of y, one by one; plus, rest [BM]: normalisers of y's rows and of -y's."""
    minus = index >= Y
    u = read_tile(y, row, stride, tl.where(minus, index - Y, index), has_row, has_index).to(tl.float32) * (GAIN * LOG2E)
    u = tl.where(minus[None, :], -u, u)
    if NORM == 0:
        u = tl.minimum(tl.maximum(u, -LIMIT * LOG2E), LIMIT * LOG2E)
    else:
        u -= tl.where(minus[None, :], rest[:, None], plus[:, None])
    found = tl.exp2(u)
    if FLOOR > 0:
        found = tl.maximum(found, FLOOR)
    return tl.where(has_row[:, None] & has_index[None, :], found, 0.0)


@triton.jit
def read_features(y, row, stride, index, numbers, has_row, has_index, has_number, Y: tl.constexpr,
                  SIGNS: tl.constexpr, NORM: tl.constexpr, GAIN: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr):  # fmt: skip
    """phi of whole rows: `index` all their features, `numbers` [BY] what they are made of. The second read of a row comes from the nearest cache: a tile
    put together from halves in registers took 64 bytes of spills where this takes none."""
    if NORM == 0:
        plus = tl.where(has_row, 0.0, 0.0)
        rest = plus
    else:
        u = read_tile(y, row, stride, numbers, has_row, has_number).to(tl.float32) * (GAIN * LOG2E)
        plus, rest = row_norm(u, has_number, NORM, SIGNS)
    return at_features(y, plus, rest, row, stride, index, has_row, has_index, Y, NORM, GAIN, LIMIT, FLOOR)


@triton.jit
def feature_index(BF: tl.constexpr, F: tl.constexpr, SIGNS: tl.constexpr):
    """(feature, is there one) of a tile of BF: each sign is padded for itself."""
    BY: tl.constexpr = BF // SIGNS
    Y: tl.constexpr = F // SIGNS
    column = tl.arange(0, BF)
    return column // BY * Y + column % BY, column % BY < Y


@triton.jit
def feature_columns(y, norms, row, stride, index, has_row, has_index, Y: tl.constexpr,
                    SIGNS: tl.constexpr, NORM: tl.constexpr, GAIN: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr):  # fmt: skip
    """phi of some features of rows; norms: what `feature_kernel` left, per row and sign, at row * stride / Y * SIGNS."""
    if NORM == 0:
        plus = tl.where(has_row, 0.0, 0.0)
        rest = plus
    else:
        at = norms + row * (stride // Y * SIGNS)
        plus = tl.load(at, mask=has_row, other=0.0)
        rest = plus
        if SIGNS == 2:
            rest = tl.load(at + 1, mask=has_row, other=0.0)
    return at_features(y, plus, rest, row, stride, index, has_row, has_index, Y, NORM, GAIN, LIMIT, FLOOR)


@triton.jit
def feature_kernel(
    y, norms, dphi, weight, dy, dmix, M, Y: tl.constexpr, BM: tl.constexpr, BY: tl.constexpr, BACKWARD: tl.constexpr, WEIGHT: tl.constexpr,
    SIGNS: tl.constexpr, NORM: tl.constexpr, GAIN: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """What happens to rows outside the scans. Grid (M / BM).

    Before them: norms [M, SIGNS] fp32 for `feature_columns`. BACKWARD, after them: dy [M, Y] from dphi [M, SIGNS Y] fp32; WEIGHT: dphi is the gradient of
    weight phi, and dmix [M] = weight sum phi dphi is left too.
    """
    start = tl.program_id(0).to(tl.int64) * BM
    oi, oy = tl.arange(0, BM), tl.arange(0, BY)
    here, my = start + oi < M, oy < Y
    b_y = read_tile(y + start * Y, oi, Y, oy, here, my).to(tl.float32)
    if BACKWARD:
        F: tl.constexpr = SIGNS * Y
        plus, minus = sides(b_y, here, my, SIGNS, NORM, GAIN, LIMIT)
        d_plus = read_tile(dphi + start * F, oi, F, oy, here, my)
        d_minus = d_plus
        if SIGNS == 2:
            d_minus = read_tile(dphi + start * F + Y, oi, F, oy, here, my)
        if WEIGHT:
            w = tl.load(weight + start + oi, mask=here, other=0.0)[:, None]
            d_plus *= w
            d_minus *= w
        if FLOOR > 0:  # a feature at its floor has no slope
            held = tl.where(plus > FLOOR, 0.0, d_plus)
            held_minus = tl.where(minus > FLOOR, 0.0, d_minus)
            d_plus -= held
            d_minus -= held_minus
        mean = tl.sum(plus * d_plus, 1)
        rest = tl.sum(minus * d_minus, 1)
        both = mean
        if SIGNS == 2:
            both += rest
        if WEIGHT:
            gained = both
            if FLOOR > 0:
                gained += FLOOR * tl.sum(held, 1)
                if SIGNS == 2:
                    gained += FLOOR * tl.sum(held_minus, 1)
            tl.store(dmix + start + oi, gained, mask=here)
        if NORM == 2:
            mean = both
            rest = both
        if NORM > 0:
            d_plus -= mean[:, None]
            d_minus -= rest[:, None]
        found = plus * d_plus
        if SIGNS == 2:
            found -= minus * d_minus
        if NORM == 0:  # no slope where the clamp holds the exponent
            found = tl.where(tl.abs(b_y) * GAIN > LIMIT, 0.0, found)
        write_tile(dy + start * Y, oi, Y, oy, here, my, found * GAIN)
    else:
        plus, rest = row_norm(b_y * (GAIN * LOG2E), my, NORM, SIGNS)
        at = norms + (start + oi) * SIGNS
        tl.store(at, plus, mask=here)
        if SIGNS == 2:
            tl.store(at + 1, rest, mask=here)


def _launch(y: Tensor, feature_map: str, backward: bool, *given: Tensor | None) -> None:
    """given: norms, dphi, weight, dy, dmix, as far as they are needed."""
    Y, M = y.shape[-1], y.numel() // y.shape[-1]
    BM = max(8, 1024 // pad(Y))  # 8 numbers a thread: 2,048 spilled 8 bytes at Y = 128 on sm_80, 4,096 took twice the registers
    feature_kernel[(triton.cdiv(M, BM),)](
        y, *(y if x is None else x for x in given), M, Y=Y, BM=BM, BY=pad(Y), BACKWARD=backward, WEIGHT=given[2] is not None,
        **constants(feature_map), num_warps=4,
    )  # fmt: skip


def row_norms(y: Tensor, feature_map: str | None) -> Tensor | None:
    """[.., SIGNS] fp32 for kernels that read single columns; None where the map needs none."""
    if feature_map is None or FUSED[feature_map].norm == 0:
        return None
    norms = y.new_empty(*y.shape[:-1], FUSED[feature_map].signs, dtype=torch.float32)
    _launch(y, feature_map, False, norms, None, None, None, None)
    return norms


def feature_gradient(y: Tensor, dphi: Tensor, feature_map: str, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(gradient of y in its dtype, that of log weight or None). dphi [.., F] fp32: of phi, or of weight phi with weight [..] fp32."""
    dy, dmix = torch.empty_like(y), None if weight is None else torch.empty_like(weight)
    _launch(y, feature_map, True, None, dphi, weight, dy, dmix)
    return dy, dmix
