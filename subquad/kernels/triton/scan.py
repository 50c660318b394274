"""The one kernel behind `additive`, forward and backward, and behind the linear branch's gradients of `window_linear`.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,   o_t = scale S_t^T q_t                       forward
    S_t = exp(g_{t+1}) S_{t+1} + k_t v_t^T,   o_t = S_t^T q_t                         REVERSE

Gradients are the same sums with the roles exchanged, so they need no kernels of their own:

    dq = scan(q=do, k=v, v=k)      dk = scan(q=v, k=do, v=q, REVERSE)      dv = scan(q=k, k=q, v=do, REVERSE)

The decay belongs to the feature axis, which is the k axis of the first and last form and the v axis of the others: DECAY 2 and 3.
With EXTRA the sums have one more feature, given by a number per token instead of a column: 1 on the k side and x on the q side (EXTRA 1), or the
other way round (EXTRA 2). That is how the gradient of a normaliser joins in.

A feature map (PHI, features.py) is applied to the tiles as they are read: 1 to q and k, 2 to v, whose columns are features then; WEIGHT multiplies k's (1)
or v's (2) rows by a number each.

Rows may be shifted: at time t the kernel reads q row t - shift_q and k, v row t - shift_k, and rows below `skip` do not exist.
MODE 0 walks a whole sequence in one program. MODE 1 only leaves the state at every SEG-th chunk, MODE 2 computes the outputs of SEG chunks from
such a state: two launches that fill a GPU when there are few heads.

Key: B batch, T tokens, H heads of this launch, K features, V columns, BT tokens of a chunk.
"""

import triton
import triton.language as tl

from subquad.kernels.triton.features import feature_columns, feature_index, read_features
from subquad.kernels.triton.pieces import (
    causal_mask,
    fades,
    first_row,
    head_of,
    level_decay,
    level_mask,
    pair_decay,
    read_tile,
    vector_weights,
    write_tile,
)


@triton.jit
def scan_kernel(
    q, k, v, g, x, o, h0, ht, hs, cu, norms, weight,
    scale, T, TQ, TK, shift_q, shift_k, skip_q, skip_k, stride_head, stride_k, stride_v, zero,
    H: tl.constexpr, RQ: tl.constexpr, RK: tl.constexpr, RG: tl.constexpr, RS: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SEG: tl.constexpr, LEVELS: tl.constexpr,
    MODE: tl.constexpr, DECAY: tl.constexpr, EXTRA: tl.constexpr, REVERSE: tl.constexpr,
    VARLEN: tl.constexpr, USE_H0: tl.constexpr, STORE_HT: tl.constexpr, PRECISION: tl.constexpr,
    PHI: tl.constexpr, WEIGHT: tl.constexpr, SIGNS: tl.constexpr, NORM: tl.constexpr, GAIN: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Grid (V / BV, segments, N H). q [.., TQ, H/RQ, K], k, v [.., TK, H/RK, K | V], g [.., T, H/RG (, K or V)] fp32, x [.., H] fp32, o as q with V.

    With PHI the rows of what is mapped are SIGNS times shorter; norms [.., TK, H/RK, SIGNS] of v (PHI 2), weight [.., TK, H/RK], both fp32.
    h0 per sequence and H/RS heads, ht per sequence and H heads, both with the strides given (row K holds the extra feature); hs is contiguous.
    """
    i_v, i_s, i_nh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_n, i_h, _, start, length = head_of(i_nh, cu, T, H, 1, VARLEN)
    start_q, start_k = first_row(start, i_n, TQ, VARLEN), first_row(start, i_n, TK, VARLEN)
    chunks = tl.cdiv(length, BT)
    first = i_s * SEG if MODE == 2 else 0
    last = tl.minimum(first + SEG, chunks) if MODE == 2 else chunks
    if MODE == 2:
        if first >= last:
            return
    ok, ov, oi = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    mk, mv = ok < K, ov < V
    YK: tl.constexpr = K // SIGNS if PHI == 1 else K
    YV: tl.constexpr = V // SIGNS if PHI == 2 else V
    if PHI == 1:
        oy = tl.arange(0, BK // SIGNS)
        my = oy < YK
        ok, mk = feature_index(BK, K, SIGNS)
    HQ: tl.constexpr = H // RQ
    HK: tl.constexpr = H // RK
    HG: tl.constexpr = H // RG
    GATES: tl.constexpr = K if DECAY == 2 else (V if DECAY == 3 else 1)
    ROWS: tl.constexpr = K + 1 if EXTRA > 0 else K
    q += (start_q * HQ + i_h // RQ) * YK
    o += (start_q * H + i_h) * V
    k += (start_k * HK + i_h // RK) * YK
    v += (start_k * HK + i_h // RK) * YV
    norms += (start_k * HK + i_h // RK) * SIGNS
    weight += start_k * HK + i_h // RK
    g += (start * HG + i_h // RG) * GATES
    x += start * H + i_h
    hs += ((start // (SEG * BT) + i_n) * H + i_h) * ROWS * V

    state = tl.zeros([BK, BV], dtype=tl.float32)
    extra = tl.zeros([BV], dtype=tl.float32)
    if MODE == 2:
        hs += i_s.to(tl.int64) * H * ROWS * V
        state += read_tile(hs, ok, V, ov, mk, mv)
        if EXTRA > 0:
            extra += tl.load(hs + K * V + ov, mask=mv, other=0.0)
    elif USE_H0:
        h0 += (i_n.to(tl.int64) * (H // RS) + i_h // RS) * stride_head
        state += read_tile(h0, ok, stride_k, ov * stride_v, mk, mv)
        if EXTRA > 0:
            extra += tl.load(h0 + K * stride_k + ov * stride_v, mask=mv, other=0.0)
        if REVERSE:  # the heads of a group are summed afterwards, and the gradient of their one final state counts once
            state = tl.where(i_h % RS == 0, state, 0.0)
            extra = tl.where(i_h % RS == 0, extra, 0.0)

    for n in tl.range(first, last, disable_licm=PHI > 0):  # as in band.py
        i_t = chunks - 1 - n if REVERSE else n
        if MODE == 1:
            if n % SEG == 0:
                place = hs + tl.cast(n // SEG, tl.int64) * (H * ROWS * V)
                write_tile(place, ok, V, ov, mk, mv, state)
                if EXTRA > 0:
                    tl.store(place + K * V + ov, extra, mask=mv)
        t0 = tl.cast(i_t, tl.int64) * BT
        t = i_t * BT + oi
        has_q, has_k = (t < length) & (t - shift_q >= skip_q), (t < length) & (t - shift_k >= skip_k)
        at_k = (t0 - shift_k) * HK
        if PHI == 1:
            b_k = read_features(k + at_k * YK, oi, HK * YK, ok, oy, has_k, mk, my, YK, SIGNS, NORM, GAIN, LIMIT, FLOOR)
            if WEIGHT:
                b_k *= tl.load(weight + at_k + oi * HK, mask=has_k, other=0.0)[:, None]
            b_k = b_k.to(v.dtype.element_ty)
        else:
            b_k = read_tile(k + at_k * K, oi, HK * K, ok, has_k, mk)
            if PHI == 0:
                b_k = b_k.to(v.dtype.element_ty)
        if PHI == 2:
            b_v = feature_columns(v + at_k * YV, norms + at_k * SIGNS, oi, HK * YV, ov, has_k, mv, YV, SIGNS, NORM, GAIN, LIMIT, FLOOR)
            if WEIGHT:
                b_v *= tl.load(weight + at_k + oi * HK, mask=has_k, other=0.0)[:, None]
            b_v = b_v.to(k.dtype.element_ty)
        else:
            b_v = read_tile(v + at_k * V, oi, HK * V, ov, has_k, mv)
        if (EXTRA > 0 and MODE != 1) or EXTRA == 2:
            b_x = tl.load(x + t0 * H + oi * H, mask=t < length, other=0.0)
        if DECAY == 1:
            c = tl.cumsum(tl.load(g + t0 * HG + oi * HG, mask=t < length, other=0.0), 0)
        if DECAY == 2:
            c = tl.cumsum(read_tile(g + t0 * (HG * K), oi, HG * K, ok, t < length, mk), 0)
        if DECAY == 3:
            c = tl.cumsum(read_tile(g + t0 * (HG * V), oi, HG * V, ov, t < length, mv), 0)
        if DECAY > 0:
            ahead, back, fade = fades(c, BT, DECAY > 1)
            if REVERSE:
                read, write = back, ahead
            else:
                read, write = ahead, back

        if MODE != 1:
            if PHI == 1:
                at_q = q + (t0 - shift_q) * (HQ * YK)
                b_q = read_features(at_q, oi, HQ * YK, ok, oy, has_q, mk, my, YK, SIGNS, NORM, GAIN, LIMIT, FLOOR).to(b_v.dtype)
            else:
                b_q = read_tile(q + (t0 - shift_q) * (HQ * K), oi, HQ * K, ok, has_q, mk).to(b_v.dtype)
            # What the chunk reads of its own tokens.
            if DECAY == 2:
                weights = vector_weights(b_q, b_k, c, BT, LEVELS, BK, REVERSE, PRECISION)
            else:
                weights = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
                if EXTRA == 1:
                    weights += tl.where(has_q, b_x, 0.0)[:, None]
                if EXTRA == 2:
                    weights += tl.where(has_k, b_x, 0.0)[None, :]
                if DECAY == 1:
                    weights *= pair_decay(c, BT, REVERSE)
                else:
                    weights = tl.where(causal_mask(BT, REVERSE), weights, 0.0)
            if DECAY == 3:
                own = tl.sum(tl.where(oi[:, None] == oi[None, :], weights, 0.0), 1)
                b_o = own[:, None] * b_v
                for level in tl.static_range(LEVELS):
                    row, column = level_decay(c, level, BT, BV, REVERSE)
                    pairs = tl.where(level_mask(level, BT, REVERSE), weights, 0.0).to(b_v.dtype)
                    b_o += row * tl.dot(pairs, (b_v * column).to(b_v.dtype), input_precision=PRECISION)
            else:
                b_o = tl.dot(weights.to(b_v.dtype), b_v, input_precision=PRECISION)
            # What it reads of the state.
            if DECAY == 2:
                b_o += tl.dot((b_q * read).to(b_q.dtype), state.to(b_q.dtype), input_precision=PRECISION)
            else:
                past = tl.dot(b_q, state.to(b_q.dtype), input_precision=PRECISION)
                if EXTRA == 1:
                    past += b_x[:, None] * extra[None, :]
                if EXTRA == 2:
                    past += extra[None, :]
                if DECAY == 1:
                    past *= read[:, None]
                if DECAY == 3:
                    past *= read
                b_o += past
            write_tile(o + (t0 - shift_q) * (H * V), oi, H * V, ov, has_q, mv, b_o * scale)

        # What it leaves behind.
        if DECAY == 1:
            b_k = (b_k * write[:, None]).to(b_k.dtype)
            state *= fade
        if DECAY == 2:
            b_k = (b_k * write).to(b_k.dtype)
            state *= fade[:, None]
        if DECAY == 3:
            b_v = (b_v * write).to(b_v.dtype)
            state *= fade[None, :]
        state = tl.dot(tl.trans(b_k), b_v, state, input_precision=PRECISION)
        if EXTRA > 0:
            each = tl.where(has_k, 1.0, 0.0)
            if EXTRA == 2:
                each *= b_x
            if DECAY == 1:
                each *= write
                extra *= fade
            if DECAY == 3:
                extra *= fade
            extra += tl.sum(each[:, None] * b_v, 0)
    if STORE_HT:
        ht += i_nh.to(tl.int64) * stride_head
        # `zero` keeps the compiler from carrying this tile of addresses through the loop in registers.
        later_k, later_v = ok + zero, ov + zero
        write_tile(ht, later_k, stride_k, later_v * stride_v, mk, later_v < V, state)
        if EXTRA > 0:
            tl.store(ht + K * stride_k + ov * stride_v, extra, mask=mv)


@triton.jit
def decay_gradient_kernel(
    q, dq, k, dk, carry, dg, cu, norms_q, norms_k, weight, T, TK, shift_k, skip_k,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    SCALAR: tl.constexpr, USE_H0: tl.constexpr, USE_CARRY: tl.constexpr, VARLEN: tl.constexpr,
    PHI: tl.constexpr, WEIGHT: tl.constexpr, SIGNS: tl.constexpr, NORM: tl.constexpr, GAIN: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """dg_t = carry + sum over s >= t of (sum_r q_s dq_s - k_s dk_s): every later token's exponent holds g_t once.

    Up to the first token that is written, without an initial state, g_t fades nothing: that sum is rounding errors, and what is stored is 0.

    Grid (K / BK, N G); q, dq [.., T, G R, K], k, dk [.., TK, G, K] (row t - shift_k), carry [N, G (, K)], dg [.., T, G (, K)], all but q and k fp32.
    PHI: q and k are what a feature map takes, with norms as in feature_columns; WEIGHT [.., T, G R] fp32 multiplies the rows of q.
    """
    i_k, i_ng = tl.program_id(0), tl.program_id(1)
    i_n, i_g, _, start, length = head_of(i_ng, cu, T, G, 1, VARLEN)
    start_k = first_row(start, i_n, TK, VARLEN)
    ok, oi = i_k * BK + tl.arange(0, BK), tl.arange(0, BT)
    mk = ok < K
    Y: tl.constexpr = K // SIGNS
    q += (start * G + i_g) * R * Y
    dq += (start * G + i_g) * R * K
    k += (start_k * G + i_g) * Y
    norms_q += (start * G + i_g) * R * SIGNS
    norms_k += (start_k * G + i_g) * SIGNS
    weight += (start * G + i_g) * R
    dk += (start_k * G + i_g) * K
    if SCALAR:
        later = tl.load(carry + i_ng).to(tl.float32) if USE_CARRY else 0.0
        dg += start * G + i_g
    else:
        later = tl.zeros([BK], dtype=tl.float32)
        if USE_CARRY:
            later += tl.load(carry + i_ng.to(tl.int64) * K + ok, mask=mk, other=0.0)
        dg += (start * G + i_g) * K
    chunks = tl.cdiv(length, BT)
    for n in range(chunks):
        t0 = tl.cast(chunks - 1 - n, tl.int64) * BT
        t = (chunks - 1 - n) * BT + oi
        here = t < length
        has_k = here & (t - shift_k >= skip_k)
        fading = (t - shift_k > skip_k) | USE_H0
        at_k = (t0 - shift_k) * G
        if PHI:
            b_k = feature_columns(k + at_k * Y, norms_k + at_k * SIGNS, oi, G * Y, ok, has_k, mk, Y, SIGNS, NORM, GAIN, LIMIT, FLOOR)
        else:
            b_k = read_tile(k + at_k * K, oi, G * K, ok, has_k, mk).to(tl.float32)
        each = -b_k * read_tile(dk + at_k * K, oi, G * K, ok, has_k, mk).to(tl.float32)
        for r in range(R):
            at = t0 * (G * R) + r
            if PHI:
                b_q = feature_columns(q + at * Y, norms_q + at * SIGNS, oi, G * R * Y, ok, here, mk, Y, SIGNS, NORM, GAIN, LIMIT, FLOOR)
                if WEIGHT:
                    b_q *= tl.load(weight + at + oi * (G * R), mask=here, other=0.0)[:, None]
            else:
                b_q = read_tile(q + at * K, oi, G * R * K, ok, here, mk).to(tl.float32)
            each += b_q * read_tile(dq + at * K, oi, G * R * K, ok, here, mk).to(tl.float32)
        if SCALAR:
            e = tl.sum(each, 1)
            total = tl.sum(e, 0)
            tl.store(dg + t0 * G + oi * G, tl.where(fading, later + total - tl.cumsum(e, 0) + e, 0.0), mask=here)
            later += total
        else:
            total = tl.sum(each, 0)
            dg_t = tl.where(fading[:, None], (later + total)[None, :] - tl.cumsum(each, 0) + each, 0.0)
            write_tile(dg + t0 * (G * K), oi, G * K, ok, here, mk, dg_t)
            later += total
