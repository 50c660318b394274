"""Ops 3 and 5 on GPUs: softmax over a window and sinks, alone or under one normaliser with linear attention of everything older.

    o_t = (sum_near exp(s_tj) v_j + exp(mix_t) sum_older d_tj fq_t.fk_j v_j) / (the same sums without v)

Forward, per chunk of BT queries: the linear branch opens the online softmax (its logarithm of weight, mix, is the first maximum), then come the sinks
and the blocks of the window. Blocks are laid so that the first one starts at the slot that leaves the window with the chunk's first query: the same
tile of keys is the oldest part of the window for some queries and the newest older token for the others, and enters the state as well. The second
block is the first one of the next chunk and, with KEEP, stays on chip. Any window size works; LINEAR False drops the branch and the chunks become independent.

Backward needs one pair of numbers a query. With L the logarithm of the whole mass, w_tj = exp(s_tj - L_t) is the final weight and
ds_tj = w_tj (do_t.v_j + e_t), e_t = -do_t.o_t; un-normalised outputs (op 3) are the same with L the maximum, do the gradient of the numerator and e
that of the denominator. The kernels here do the window's and the sinks' part; the linear part is `scan_kernel` on fq exp(mix - L).

Slots: key slot of query t is t + before; `window` slots are seen, its own included; sink n is seen from position + t - n >= window on.

Key: T queries, X slots, H query heads, R per key/value head, K key size, V value size, F features, NS sinks, BT chunk and block, BN tile of sinks.
"""

import triton
import triton.language as tl

from subquad.kernels.triton.features import feature_index, read_features
from subquad.kernels.triton.pieces import (
    LN2,
    LOG2E,
    causal_mask,
    fades,
    first_row,
    head_of,
    pair_decay,
    read_tile,
    softmax_block,
    vector_weights,
    write_tile,
)


@triton.jit
def read_pair(k, v, at, o, ok, ov, has, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    """Rows of k and v; at: row times heads plus head."""
    return read_tile(k + at * K, o, G * K, ok, has, ok < K), read_tile(v + at * V, o, G * V, ov, has, ov < V)


@triton.jit
def read_sinks(sk, sv, i_n, i_g, start, length, TS, on, ok, ov,
               G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, NS: tl.constexpr, VARLEN: tl.constexpr):  # fmt: skip
    """Keys and values of the sinks; a sequence shorter than NS has fewer."""
    at = first_row(start, i_n, TS, VARLEN) * G + i_g
    return read_pair(sk, sv, at, on, ok, ov, on < tl.minimum(NS, length if VARLEN else TS), G, K, V)


@triton.jit
def sinks_seen(t, on, here, position, window, NS: tl.constexpr):
    """[query, sink]: the sink has left the query's window."""
    return here[:, None] & (on < NS)[None, :] & (position + t[:, None] - on[None, :] >= window)


@triton.jit
def window_seen(t, slot, here, exists, before, window):
    """[query, slot]: the slot is in the query's window."""
    ahead = slot[None, :] - (t[:, None] + before)
    return here[:, None] & exists[None, :] & (ahead <= 0) & (ahead > -window)


@triton.jit
def attend(b_q, b_k, b_v, seen, m, den, sums, log_scale, PRECISION: tl.constexpr):
    """The online softmax takes in one block of keys."""
    scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * log_scale
    return softmax_block(tl.where(seen, scores, float("-inf")), b_v, m, den, sums, PRECISION)


@triton.jit
def band_forward_kernel(
    q, k, v, fq, fk, mix, g, sk, sv, logit, o, total, top, h0, ht, hs, cu,
    scale, T, X, TS, before, position, window, skip, zero,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, NS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr, SEG: tl.constexpr, LEVELS: tl.constexpr,
    KEEP: tl.constexpr, LINEAR: tl.constexpr, DECAY: tl.constexpr, LOGIT: tl.constexpr, SEGMENTED: tl.constexpr, VARLEN: tl.constexpr,
    USE_H0: tl.constexpr, STORE_HT: tl.constexpr, PRECISION: tl.constexpr,
    PHI: tl.constexpr, SIGNS: tl.constexpr, NORM: tl.constexpr, GAIN: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Grid (V / BV, programs per sequence, N H), SEG chunks a program. LINEAR: o normalised, top = log of the mass; else o the numerator.

    PHI: fq and fk have F / SIGNS numbers a row, features are made of them here (features.py).

    h0 [N, G, F, V + 1] or, SEGMENTED, hs [slots, G, V + 1, F] as scan_kernel leaves it with v and fk exchanged; ht per group, written by the last program.
    """
    i_v, i_s = tl.program_id(0), tl.program_id(1)
    G: tl.constexpr = H // R
    i_n, i_h, i_g, start, length = head_of(tl.program_id(2), cu, T, H, R, VARLEN)
    chunks = tl.cdiv(length, BT)
    first = i_s * SEG
    if first >= chunks:
        return
    oi, ok, ov, of, on = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BF), tl.arange(0, BN)
    mk, mv, mf = ok < K, ov < V, of < F
    Y: tl.constexpr = F // SIGNS
    oy = tl.arange(0, BF // SIGNS)
    my = oy < Y
    if PHI:
        of, mf = feature_index(BF, F, SIGNS)
    start_k = first_row(start, i_n, X, VARLEN)
    q += (start * H + i_h) * K
    o += (start * H + i_h) * V
    total += start * H + i_h
    top += start * H + i_h
    k += (start_k * G + i_g) * K
    v += (start_k * G + i_g) * V
    if NS > 0:
        b_sk, b_sv = read_sinks(sk, sv, i_n, i_g, start, length, TS, on, ok, ov, G, K, V, NS, VARLEN)
    if LINEAR:
        fq += (start * H + i_h) * Y
        fk += (start_k * G + i_g) * Y
        mix += start * H + i_h
        if DECAY == 1:
            g += start * G + i_g
        if DECAY == 2:
            g += (start * G + i_g) * F
        state = tl.zeros([BF, BV], dtype=tl.float32)
        mass = tl.zeros([BF], dtype=tl.float32)
        if SEGMENTED:
            hs += ((start // (SEG * BT) + i_n + i_s) * G + i_g) * F * (V + 1)
            state += tl.trans(read_tile(hs, ov, F, of, mv, mf))
            mass += tl.load(hs + V * F + of, mask=mf, other=0.0)
        elif USE_H0:
            h0 += (i_n.to(tl.int64) * G + i_g) * F * (V + 1)
            state += read_tile(h0, of, V + 1, ov, mf, mv)
            mass += tl.load(h0 + of * (V + 1) + V, mask=mf, other=0.0)
    log_scale = scale * LOG2E
    # The slot that leaves when a query arrives is `window` before its own.
    if KEEP:
        oldest = first * BT + oi + (before - window)
        there = (oldest >= 0) & (oldest < length + before)
        b_k, b_v = read_pair(k, v, (tl.cast(first, tl.int64) * BT + (before - window)) * G, oi, ok, ov, there, G, K, V)
    FROM: tl.constexpr = 2 if KEEP else 1

    # What does not change is computed anew in every chunk where many tiles are alive: carried along, it spills (112 bytes on compute capability 9.0).
    for i_t in tl.range(first, tl.minimum(first + SEG, chunks), disable_licm=PHI or DECAY == 2):
        t0 = tl.cast(i_t, tl.int64) * BT
        t = i_t * BT + oi
        here = t < length
        oldest = t + (before - window)
        there = (oldest >= 0) & (oldest < length + before)
        low = t0 + (before - window)
        if not KEEP:
            b_k, b_v = read_pair(k, v, low * G, oi, ok, ov, there, G, K, V)
        m = tl.full([BT], float("-inf"), dtype=tl.float32)
        den = tl.zeros([BT], dtype=tl.float32)
        sums = tl.zeros([BT, BV], dtype=tl.float32)
        if LOGIT:
            m = tl.zeros([BT], dtype=tl.float32) + tl.load(logit + i_h).to(tl.float32) * LOG2E
            den += 1.0
        if LINEAR:
            leaves = here & (oldest >= skip)
            if PHI:
                b_f = read_features(fk + low * (G * Y), oi, G * Y, of, oy, leaves, mf, my, Y, SIGNS, NORM, GAIN, LIMIT, FLOOR)
                b_fq = read_features(fq + t0 * (H * Y), oi, H * Y, of, oy, here, mf, my, Y, SIGNS, NORM, GAIN, LIMIT, FLOOR)
            else:
                b_f = read_tile(fk + low * (G * F), oi, G * F, of, leaves, mf)
                b_fq = read_tile(fq + t0 * (H * F), oi, H * F, of, here, mf)
            b_f, b_fq = b_f.to(b_v.dtype), b_fq.to(b_v.dtype)
            # In this order the fewest tiles are alive at once: mass, past, the state's update, and only then weights between tokens of the chunk.
            if DECAY == 2:
                c = tl.cumsum(read_tile(g + t0 * (G * F), oi, G * F, of, here, mf), 0)
                ahead, back, fade = fades(c, BT, True)
                similar = vector_weights(b_fq, b_f, c, BT, LEVELS, BF, False, PRECISION)
                b_fq = (b_fq * ahead).to(b_fq.dtype)
            past_mass = tl.sum(b_fq.to(tl.float32) * mass[None, :], 1)
            if DECAY == 1:
                c = tl.cumsum(tl.load(g + t0 * G + oi * G, mask=here, other=0.0), 0)
                ahead, back, fade = fades(c, BT, False)
            past = tl.dot(b_fq, state.to(b_fq.dtype), input_precision=PRECISION)
            b_left = b_f
            if DECAY == 1:
                past *= ahead[:, None]
                past_mass *= ahead
                b_left = (b_f * back[:, None]).to(b_f.dtype)
                state *= fade
                mass *= fade
            if DECAY == 2:
                b_left = (b_f * back).to(b_f.dtype)
                state *= fade[:, None]
                mass *= fade
            state = tl.dot(tl.trans(b_left), b_v, state, input_precision=PRECISION)
            mass += tl.sum(b_left.to(tl.float32), 0)
            if DECAY != 2:
                similar = tl.dot(b_fq, tl.trans(b_f), input_precision=PRECISION)
                if DECAY == 1:
                    similar *= pair_decay(c, BT, False)
                else:
                    similar = tl.where(causal_mask(BT, False), similar, 0.0)
            older = position + t - window >= NS  # something has left the window; an initial state counts from then on
            den = tl.where(older, tl.sum(similar, 1) + past_mass, 0.0)
            sums = tl.dot(similar.to(b_v.dtype), b_v, past, input_precision=PRECISION)
            sums = tl.where(older[:, None], sums, 0.0)
            b_mix = tl.load(mix + t0 * H + oi * H, mask=here, other=0.0).to(tl.float32)
            # A branch without mass must not set the maximum: everything else would underflow beneath it.
            m = tl.where(den > 0, b_mix * LOG2E, float("-inf"))
        b_q = read_tile(q + t0 * (H * K), oi, H * K, ok, here, mk)
        if NS > 0:
            m, den, sums = attend(b_q, b_sk, b_sv, sinks_seen(t, on, here, position, window, NS), m, den, sums, log_scale, PRECISION)
        m, den, sums = attend(b_q, b_k, b_v, window_seen(t, oldest, here, there, before, window), m, den, sums, log_scale, PRECISION)
        if KEEP:
            slot = oldest + BT
            exists = (slot >= 0) & (slot < length + before)
            b_k, b_v = read_pair(k, v, (low + BT) * G, oi, ok, ov, exists, G, K, V)
            m, den, sums = attend(b_q, b_k, b_v, window_seen(t, slot, here, exists, before, window), m, den, sums, log_scale, PRECISION)
        for i_b in range(FROM, tl.cdiv(window + BT, BT)):
            w_slot = oldest + i_b * BT
            w_exists = (w_slot >= 0) & (w_slot < length + before)
            w_k, w_v = read_pair(k, v, (low + i_b * BT) * G, oi, ok, ov, w_exists, G, K, V)
            m, den, sums = attend(b_q, w_k, w_v, window_seen(t, w_slot, here, w_exists, before, window), m, den, sums, log_scale, PRECISION)
        if LINEAR:
            sums = sums / den[:, None]
            m = (m + tl.log2(den)) * LN2
        else:
            m = tl.where(m == float("-inf"), 0.0, m) * LN2
        write_tile(o + t0 * (H * V), oi, H * V, ov, here, mv, sums)
        if i_v == 0:
            tl.store(top + t0 * H + oi * H, m, mask=here)
            if not LINEAR:
                tl.store(total + t0 * H + oi * H, den, mask=here)
    if LINEAR and STORE_HT:
        if (first + SEG >= chunks) & (i_h % R == 0):
            ht += (i_n.to(tl.int64) * G + i_g) * F * (V + 1)
            # `zero` keeps the compiler from carrying the addresses of h0's tile through the loop in registers, to use them again here.
            later_f, later_v = of + zero, ov + zero
            write_tile(ht, later_f, V + 1, later_v, mf, later_v < V, state)
            if i_v == 0:
                tl.store(ht + later_f * (V + 1) + V, mass, mask=mf)


@triton.jit
def read_queries(q, do, e, top, row, oi, ok, ov, here, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    """(q, do, e, top in log2) of a block of queries; row: of the first one, times heads plus head."""
    b_q, b_do = read_pair(q, do, row, oi, ok, ov, here, H, K, V)
    return b_q, b_do, tl.load(e + row + oi * H, mask=here, other=0.0), tl.load(top + row + oi * H, mask=here, other=0.0) * LOG2E


@triton.jit
def weights_and_slopes(b_q, b_k, b_v, b_do, b_e, b_top, seen, log_scale, PRECISION: tl.constexpr):
    """(w, ds) of a block of queries and keys: final weights and the gradient of their scaled scores."""
    scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * log_scale - b_top[:, None]
    weights = tl.exp2(tl.where(seen, scores, float("-inf")))
    slopes = weights * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) + b_e[:, None])
    return weights, slopes


@triton.jit
def key_gradients(b_q, b_k, b_v, b_do, b_e, b_top, seen, b_dk, b_dv, log_scale, PRECISION: tl.constexpr):
    """(dk / scale, dv) of a block of keys with one more block of queries."""
    weights, slopes = weights_and_slopes(b_q, b_k, b_v, b_do, b_e, b_top, seen, log_scale, PRECISION)
    b_dv = tl.dot(tl.trans(weights.to(b_do.dtype)), b_do, b_dv, input_precision=PRECISION)
    b_dk = tl.dot(tl.trans(slopes.to(b_q.dtype)), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def band_query_kernel(
    q, k, v, sk, sv, do, e, top, dq, cu, scale, T, X, TS, before, position, window,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, NS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries. Grid (blocks, N H); do [.., T, H, V], e, top [.., T, H] fp32. BV holds all of V."""
    i_t = tl.program_id(0)
    G: tl.constexpr = H // R
    i_n, i_h, i_g, start, length = head_of(tl.program_id(1), cu, T, H, R, VARLEN)
    if i_t * BT >= length:
        return
    oi, ok, ov, on = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BN)
    t = i_t * BT + oi
    here = t < length
    row = (start + i_t * BT) * H + i_h
    b_q, b_do, b_e, b_top = read_queries(q, do, e, top, row, oi, ok, ov, here, H, K, V)
    log_scale = scale * LOG2E
    b_dq = tl.zeros([BT, BK], dtype=tl.float32)
    if NS > 0:
        s_k, s_v = read_sinks(sk, sv, i_n, i_g, start, length, TS, on, ok, ov, G, K, V, NS, VARLEN)
        seen = sinks_seen(t, on, here, position, window, NS)
        s_weights, s_slopes = weights_and_slopes(b_q, s_k, s_v, b_do, b_e, b_top, seen, log_scale, PRECISION)
        b_dq = tl.dot(s_slopes.to(s_k.dtype), s_k, b_dq, input_precision=PRECISION)
    start_k = first_row(start, i_n, X, VARLEN)
    for i_b in range(tl.cdiv(window + BT, BT)):
        slot = t + (before - window + i_b * BT)
        exists = (slot >= 0) & (slot < length + before)
        at = (start_k + (i_t + i_b) * BT + (before - window)) * G + i_g
        b_k, b_v = read_pair(k, v, at, oi, ok, ov, exists, G, K, V)
        w_seen = window_seen(t, slot, here, exists, before, window)
        weights, slopes = weights_and_slopes(b_q, b_k, b_v, b_do, b_e, b_top, w_seen, log_scale, PRECISION)
        b_dq = tl.dot(slopes.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    write_tile(dq + row * K, oi, H * K, ok, here, ok < K, b_dq * scale)


@triton.jit
def band_key_kernel(
    q, k, v, do, e, top, dk, dv, cu, scale, T, X, before, window,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv [.., X, H, K | V] of a block of slots, through the window. Grid (blocks of slots, N H)."""
    i_x = tl.program_id(0)
    G: tl.constexpr = H // R
    i_n, i_h, i_g, start, length = head_of(tl.program_id(1), cu, T, H, R, VARLEN)
    slots = length + before
    if i_x * BT >= slots:
        return
    oi, ok, ov = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    slot = i_x * BT + oi
    exists = slot < slots
    row_k = first_row(start, i_n, X, VARLEN) + i_x * BT
    b_k, b_v = read_pair(k, v, row_k * G + i_g, oi, ok, ov, exists, G, K, V)
    b_dk = tl.zeros([BT, BK], dtype=tl.float32)
    b_dv = tl.zeros([BT, BV], dtype=tl.float32)
    for i_b in range(tl.cdiv(window + BT, BT)):
        t = slot - before + i_b * BT
        here = (t >= 0) & (t < length)
        row = (start + (i_x + i_b) * BT - before) * H + i_h
        b_q, b_do, b_e, b_top = read_queries(q, do, e, top, row, oi, ok, ov, here, H, K, V)
        seen = window_seen(t, slot, here, exists, before, window)
        b_dk, b_dv = key_gradients(b_q, b_k, b_v, b_do, b_e, b_top, seen, b_dk, b_dv, scale * LOG2E, PRECISION)
    at = row_k * H + i_h
    write_tile(dk + at * K, oi, H * K, ok, exists, ok < K, b_dk * scale)
    write_tile(dv + at * V, oi, H * V, ov, exists, ov < V, b_dv)


@triton.jit
def band_sink_kernel(
    q, sk, sv, do, e, top, dsk, dsv, owner, cu, scale, T, TS, position, window,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, NS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, SEG: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the sinks from SEG blocks of queries: dsk, dsv [slots, H, NS, K | V] fp32, owner [slots] the sequence. Grid (segments, N H)."""
    i_s = tl.program_id(0)
    G: tl.constexpr = H // R
    i_n, i_h, i_g, start, length = head_of(tl.program_id(1), cu, T, H, R, VARLEN)
    first, blocks = i_s * SEG, tl.cdiv(length, BT)
    if first >= blocks:
        return
    oi, ok, ov, on = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BN)
    b_k, b_v = read_sinks(sk, sv, i_n, i_g, start, length, TS, on, ok, ov, G, K, V, NS, VARLEN)
    b_dk = tl.zeros([BN, BK], dtype=tl.float32)
    b_dv = tl.zeros([BN, BV], dtype=tl.float32)
    for i_t in range(first, tl.minimum(first + SEG, blocks)):
        t = i_t * BT + oi
        here = t < length
        b_q, b_do, b_e, b_top = read_queries(q, do, e, top, (start + i_t * BT) * H + i_h, oi, ok, ov, here, H, K, V)
        seen = sinks_seen(t, on, here, position, window, NS)
        b_dk, b_dv = key_gradients(b_q, b_k, b_v, b_do, b_e, b_top, seen, b_dk, b_dv, scale * LOG2E, PRECISION)
    slot = start // (SEG * BT) + i_n + i_s
    if i_h == 0:
        tl.store(owner + slot, i_n.to(tl.int64))
    write_tile(dsk + (slot * H + i_h) * NS * K, on, K, ok, on < NS, ok < K, b_dk * scale)
    write_tile(dsv + (slot * H + i_h) * NS * V, on, V, ov, on < NS, ov < V, b_dv)
