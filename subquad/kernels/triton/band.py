"""Ops 3 and 5 on GPUs: softmax over a window and sinks, alone or under one normaliser with linear attention of everything older.

    o_t = (sum_near exp(s_tj) v_j + exp(mix_t) sum_older d_tj fq_t.fk_j v_j) / (the same sums without v)

Forward, per chunk of BT queries: the linear branch opens the online softmax (its logarithm of weight, mix, is the first maximum), then come the sinks
and the blocks of the window. Blocks are laid so that the first one starts at the slot that leaves the window with the chunk's first query: the same
tile of keys is the oldest part of the window for some queries and the newest older token for the others, and enters the state afterwards. Any window
size works; LINEAR False drops the branch and the chunks become independent.

Backward needs one pair of numbers a query. With L the logarithm of the whole mass, w_tj = exp(s_tj - L_t) is the final weight and
ds_tj = w_tj (do_t.v_j + e_t), e_t = -do_t.o_t; un-normalised outputs (op 3) are the same with L the maximum, do the gradient of the numerator and e
that of the denominator. The kernels here do the window's and the sinks' part; the linear part is `scan_kernel` on fq exp(mix - L).

Slots: key slot of query t is t + before; `window` slots are seen, its own included; sink n is seen from position + t - n >= window on.

Key: T queries, X slots, H query heads, R per key/value head, K key size, V value size, F features, NS sinks, BT chunk and block, BN tile of sinks.
"""

import triton
import triton.language as tl

from subquad.kernels.triton.pieces import LN2, LOG2E, bounds, causal_mask, pair_decay, softmax_block, vector_weights


@triton.jit
def band_forward_kernel(
    q, k, v, fq, fk, mix, g, sk, sv, logit, o, total, top, h0, ht, hs, cu,
    scale, T, X, TS, before, position, window, skip,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, NS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr, SEG: tl.constexpr, LEVELS: tl.constexpr,
    LINEAR: tl.constexpr, DECAY: tl.constexpr, LOGIT: tl.constexpr, SEGMENTED: tl.constexpr, VARLEN: tl.constexpr,
    USE_H0: tl.constexpr, STORE_HT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (V / BV, programs per sequence, N H), SEG chunks a program. LINEAR: o normalised, top = log of the mass; else o the numerator.

    h0 [N, G, F, V + 1] or, SEGMENTED, hs [slots, G, V + 1, F] as scan_kernel leaves it with v and fk exchanged; ht per group, written by the last program.
    """
    i_v, i_s, i_nh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_n, i_h = i_nh // H, i_nh % H
    G: tl.constexpr = H // R
    i_g = i_h // R
    start, length = bounds(cu, i_n, T, VARLEN)
    chunks = tl.cdiv(length, BT)
    first = i_s * SEG
    if first >= chunks:
        return
    start_k = start if VARLEN else i_n.to(tl.int64) * X
    start_s = start if VARLEN else i_n.to(tl.int64) * TS
    sinks = tl.minimum(NS, length if VARLEN else TS)
    oi, ok, ov, of, on = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BF), tl.arange(0, BN)
    mk, mv, mf = ok < K, ov < V, of < F
    at_q, at_k, at_v = oi[:, None] * (H * K) + ok[None, :], oi[:, None] * (G * K) + ok[None, :], oi[:, None] * (G * V) + ov[None, :]
    q += (start * H + i_h) * K
    o += (start * H + i_h) * V
    total += start * H + i_h
    top += start * H + i_h
    k += (start_k * G + i_g) * K
    v += (start_k * G + i_g) * V
    if NS > 0:
        sk += (start_s * G + i_g) * K
        sv += (start_s * G + i_g) * V
        b_sk = tl.load(sk + on[:, None] * (G * K) + ok[None, :], mask=(on < sinks)[:, None] & mk[None, :], other=0.0)
        b_sv = tl.load(sv + on[:, None] * (G * V) + ov[None, :], mask=(on < sinks)[:, None] & mv[None, :], other=0.0)
    if LINEAR:
        fq += (start * H + i_h) * F
        fk += (start_k * G + i_g) * F
        mix += start * H + i_h
        if DECAY == 1:
            g += start * G + i_g
        if DECAY == 2:
            g += (start * G + i_g) * F
        state = tl.zeros([BF, BV], dtype=tl.float32)
        mass = tl.zeros([BF], dtype=tl.float32)
        inside = mf[:, None] & mv[None, :]
        if SEGMENTED:
            hs += ((start // (SEG * BT) + i_n + i_s) * G + i_g) * F * (V + 1)
            state += tl.load(hs + of[:, None] + ov[None, :] * F, mask=inside, other=0.0)
            mass += tl.load(hs + V * F + of, mask=mf, other=0.0)
        elif USE_H0:
            h0 += (i_n.to(tl.int64) * G + i_g) * F * (V + 1)
            state += tl.load(h0 + of[:, None] * (V + 1) + ov[None, :], mask=inside, other=0.0)
            mass += tl.load(h0 + of * (V + 1) + V, mask=mf, other=0.0)
    log_scale = scale * LOG2E

    for i_t in range(first, tl.minimum(first + SEG, chunks)):
        t0 = tl.cast(i_t, tl.int64) * BT
        t = i_t * BT + oi
        here = t < length
        b_q = tl.load(q + t0 * (H * K) + at_q, mask=here[:, None] & mk[None, :], other=0.0)
        oldest = t + (before - window)  # the slot that leaves when query t arrives, and the first block's slots
        there = (oldest >= 0) & (oldest < length + before)
        low = t0 + (before - window)
        b_k = tl.load(k + low * (G * K) + at_k, mask=there[:, None] & mk[None, :], other=0.0)
        b_v = tl.load(v + low * (G * V) + at_v, mask=there[:, None] & mv[None, :], other=0.0)
        m = tl.full([BT], float("-inf"), dtype=tl.float32)
        den = tl.zeros([BT], dtype=tl.float32)
        if LOGIT:
            m = tl.zeros([BT], dtype=tl.float32) + tl.load(logit + i_h).to(tl.float32) * LOG2E
            den += 1.0
        if LINEAR:
            leaves = here & (oldest >= skip)
            b_f = tl.load(fk + low * (G * F) + oi[:, None] * (G * F) + of[None, :], mask=leaves[:, None] & mf[None, :], other=0.0).to(
                b_v.dtype
            )
            b_fq = tl.load(fq + t0 * (H * F) + oi[:, None] * (H * F) + of[None, :], mask=here[:, None] & mf[None, :], other=0.0).to(
                b_v.dtype
            )
            if DECAY == 1:
                c = tl.cumsum(tl.load(g + t0 * G + oi * G, mask=here, other=0.0), 0)
                last = tl.sum(tl.where(oi == BT - 1, c, 0.0), 0)
            if DECAY == 2:
                at_g = t0 * (G * F) + oi[:, None] * (G * F) + of[None, :]
                c = tl.cumsum(tl.load(g + at_g, mask=here[:, None] & mf[None, :], other=0.0), 0)
                last = tl.sum(tl.where((oi == BT - 1)[:, None], c, 0.0), 0)
            if DECAY == 2:
                similar = vector_weights(b_fq, b_f, c, BT, LEVELS, BF, False, PRECISION)
                b_fq = (b_fq * tl.exp2(c * LOG2E)).to(b_fq.dtype)
            else:
                similar = tl.dot(b_fq, tl.trans(b_f), input_precision=PRECISION)
                if DECAY == 1:
                    similar *= pair_decay(c, BT, False)
                else:
                    similar = tl.where(causal_mask(BT, False), similar, 0.0)
            past = tl.dot(b_fq, state.to(b_fq.dtype), input_precision=PRECISION)
            past_mass = tl.sum(b_fq.to(tl.float32) * mass[None, :], 1)
            if DECAY == 1:
                past *= tl.exp2(c * LOG2E)[:, None]
                past_mass *= tl.exp2(c * LOG2E)
            older = position + t - window >= NS  # something has left the window; an initial state counts from then on
            den = tl.where(older, tl.sum(similar, 1) + past_mass, 0.0)
            sums = tl.dot(similar.to(b_v.dtype), b_v, past, input_precision=PRECISION)
            b_mix = tl.load(mix + t0 * H + oi * H, mask=here, other=0.0).to(tl.float32)
            # A branch without mass must not set the maximum: everything else would underflow beneath it.
            m = tl.where(den > 0, b_mix * LOG2E, float("-inf"))
            sums = tl.where(older[:, None], sums, 0.0)
        else:
            sums = tl.zeros([BT, BV], dtype=tl.float32)
        if NS > 0:
            seen = here[:, None] & (on < NS)[None, :] & (position + t[:, None] - on[None, :] >= window)
            scores = tl.dot(b_q, tl.trans(b_sk), input_precision=PRECISION) * log_scale
            m, den, sums = softmax_block(tl.where(seen, scores, float("-inf")), b_sv, m, den, sums, PRECISION)
        # The first block: for the queries before the one that drops it, each of its slots is still in the window.
        seen = there[None, :] & (oi[None, :] > oi[:, None]) & (oi[None, :] <= oi[:, None] + window)
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * log_scale
        m, den, sums = softmax_block(tl.where(seen, scores, float("-inf")), b_v, m, den, sums, PRECISION)
        for i_b in range(1, tl.cdiv(window + BT, BT)):
            slot = oldest + i_b * BT
            ahead = slot[None, :] - (t[:, None] + before)  # <= 0: not after the query
            exists = (slot >= 0) & (slot < length + before)
            at = low + i_b * BT
            w_k = tl.load(k + at * (G * K) + at_k, mask=exists[:, None] & mk[None, :], other=0.0)
            w_v = tl.load(v + at * (G * V) + at_v, mask=exists[:, None] & mv[None, :], other=0.0)
            scores = tl.dot(b_q, tl.trans(w_k), input_precision=PRECISION) * log_scale
            seen = exists[None, :] & (ahead <= 0) & (ahead > -window)
            m, den, sums = softmax_block(tl.where(seen, scores, float("-inf")), w_v, m, den, sums, PRECISION)
        at_o = t0 * (H * V) + oi[:, None] * (H * V) + ov[None, :]
        if LINEAR:
            tl.store(o + at_o, (sums / den[:, None]).to(o.dtype.element_ty), mask=here[:, None] & mv[None, :])
            if i_v == 0:
                tl.store(top + t0 * H + oi * H, (m + tl.log2(den)) * LN2, mask=here)
            if DECAY == 1:
                b_f = (b_f * tl.exp2((last - c) * LOG2E)[:, None]).to(b_f.dtype)
                state *= tl.exp2(last * LOG2E)
                mass *= tl.exp2(last * LOG2E)
            if DECAY == 2:
                b_f = (b_f * tl.exp2((last[None, :] - c) * LOG2E)).to(b_f.dtype)
                state *= tl.exp2(last * LOG2E)[:, None]
                mass *= tl.exp2(last * LOG2E)
            state = tl.dot(tl.trans(b_f), b_v, state, input_precision=PRECISION)
            mass += tl.sum(b_f.to(tl.float32), 0)
        else:
            tl.store(o + at_o, sums, mask=here[:, None] & mv[None, :])
            if i_v == 0:
                tl.store(top + t0 * H + oi * H, tl.where(m == float("-inf"), 0.0, m) * LN2, mask=here)
                tl.store(total + t0 * H + oi * H, den, mask=here)
    if LINEAR and STORE_HT:
        if (first + SEG >= chunks) & (i_h % R == 0):
            ht += (i_n.to(tl.int64) * G + i_g) * F * (V + 1)
            tl.store(ht + of[:, None] * (V + 1) + ov[None, :], state, mask=inside)
            if i_v == 0:
                tl.store(ht + of * (V + 1) + V, mass, mask=mf)


@triton.jit
def weights_and_slopes(b_q, b_k, b_v, b_do, b_e, b_top, seen, log_scale, PRECISION: tl.constexpr):
    """(w, ds) of a block of queries and keys: final weights and the gradient of their scaled scores."""
    scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * log_scale - b_top[:, None]
    weights = tl.exp2(tl.where(seen, scores, float("-inf")))
    slopes = weights * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) + b_e[:, None])
    return weights, slopes


@triton.jit
def band_query_kernel(
    q, k, v, sk, sv, do, e, top, dq, cu, scale, T, X, TS, before, position, window,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, NS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries. Grid (blocks, N H); do [.., T, H, V], e, top [.., T, H] fp32. BV holds all of V."""
    i_t, i_nh = tl.program_id(0), tl.program_id(1)
    i_n, i_h = i_nh // H, i_nh % H
    G: tl.constexpr = H // R
    i_g = i_h // R
    start, length = bounds(cu, i_n, T, VARLEN)
    if i_t * BT >= length:
        return
    start_k = start if VARLEN else i_n.to(tl.int64) * X
    start_s = start if VARLEN else i_n.to(tl.int64) * TS
    sinks = tl.minimum(NS, length if VARLEN else TS)
    oi, ok, ov, on = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BN)
    mk, mv = ok < K, ov < V
    t = i_t * BT + oi
    here = t < length
    row = (start + i_t * BT) * H + i_h
    at_q = row * K + oi[:, None] * (H * K) + ok[None, :]
    b_q = tl.load(q + at_q, mask=here[:, None] & mk[None, :], other=0.0)
    b_do = tl.load(do + row * V + oi[:, None] * (H * V) + ov[None, :], mask=here[:, None] & mv[None, :], other=0.0)
    b_e = tl.load(e + row + oi * H, mask=here, other=0.0)
    b_top = tl.load(top + row + oi * H, mask=here, other=0.0) * LOG2E
    log_scale = scale * LOG2E
    b_dq = tl.zeros([BT, BK], dtype=tl.float32)
    if NS > 0:
        at = start_s * G + i_g
        has = (on < sinks)[:, None]
        s_k = tl.load(sk + at * K + on[:, None] * (G * K) + ok[None, :], mask=has & mk[None, :], other=0.0)
        s_v = tl.load(sv + at * V + on[:, None] * (G * V) + ov[None, :], mask=has & mv[None, :], other=0.0)
        s_seen = here[:, None] & (on < NS)[None, :] & (position + t[:, None] - on[None, :] >= window)
        s_weights, s_slopes = weights_and_slopes(b_q, s_k, s_v, b_do, b_e, b_top, s_seen, log_scale, PRECISION)
        b_dq = tl.dot(s_slopes.to(s_k.dtype), s_k, b_dq, input_precision=PRECISION)
    for i_b in range(tl.cdiv(window + BT, BT)):
        slot = t + (before - window + i_b * BT)
        exists = (slot >= 0) & (slot < length + before)
        at = (start_k + (i_t + i_b) * BT + (before - window)) * G + i_g
        b_k = tl.load(k + at * K + oi[:, None] * (G * K) + ok[None, :], mask=exists[:, None] & mk[None, :], other=0.0)
        b_v = tl.load(v + at * V + oi[:, None] * (G * V) + ov[None, :], mask=exists[:, None] & mv[None, :], other=0.0)
        ahead = slot[None, :] - (t[:, None] + before)
        seen = here[:, None] & exists[None, :] & (ahead <= 0) & (ahead > -window)
        _, slopes = weights_and_slopes(b_q, b_k, b_v, b_do, b_e, b_top, seen, log_scale, PRECISION)
        b_dq = tl.dot(slopes.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    tl.store(dq + at_q, (b_dq * scale).to(dq.dtype.element_ty), mask=here[:, None] & mk[None, :])


@triton.jit
def band_key_kernel(
    q, k, v, do, e, top, dk, dv, cu, scale, T, X, before, window,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv [.., X, H, K | V] of a block of slots, through the window. Grid (blocks of slots, N H)."""
    i_x, i_nh = tl.program_id(0), tl.program_id(1)
    i_n, i_h = i_nh // H, i_nh % H
    G: tl.constexpr = H // R
    i_g = i_h // R
    start, length = bounds(cu, i_n, T, VARLEN)
    slots = length + before
    if i_x * BT >= slots:
        return
    start_k = start if VARLEN else i_n.to(tl.int64) * X
    oi, ok, ov = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    mk, mv = ok < K, ov < V
    slot = i_x * BT + oi
    exists = slot < slots
    at = (start_k + i_x * BT) * G + i_g
    b_k = tl.load(k + at * K + oi[:, None] * (G * K) + ok[None, :], mask=exists[:, None] & mk[None, :], other=0.0)
    b_v = tl.load(v + at * V + oi[:, None] * (G * V) + ov[None, :], mask=exists[:, None] & mv[None, :], other=0.0)
    b_dk = tl.zeros([BT, BK], dtype=tl.float32)
    b_dv = tl.zeros([BT, BV], dtype=tl.float32)
    log_scale = scale * LOG2E
    for i_b in range(tl.cdiv(window + BT, BT)):
        t = slot - before + i_b * BT
        here = (t >= 0) & (t < length)
        row = (start + (i_x + i_b) * BT - before) * H + i_h
        b_q = tl.load(q + row * K + oi[:, None] * (H * K) + ok[None, :], mask=here[:, None] & mk[None, :], other=0.0)
        b_do = tl.load(do + row * V + oi[:, None] * (H * V) + ov[None, :], mask=here[:, None] & mv[None, :], other=0.0)
        b_e = tl.load(e + row + oi * H, mask=here, other=0.0)
        b_top = tl.load(top + row + oi * H, mask=here, other=0.0) * LOG2E
        ahead = slot[None, :] - (t[:, None] + before)
        seen = here[:, None] & exists[None, :] & (ahead <= 0) & (ahead > -window)
        weights, slopes = weights_and_slopes(b_q, b_k, b_v, b_do, b_e, b_top, seen, log_scale, PRECISION)
        b_dv = tl.dot(tl.trans(weights.to(b_do.dtype)), b_do, b_dv, input_precision=PRECISION)
        b_dk = tl.dot(tl.trans(slopes.to(b_q.dtype)), b_q, b_dk, input_precision=PRECISION)
    at = (start_k + i_x * BT) * H + i_h
    tl.store(dk + at * K + oi[:, None] * (H * K) + ok[None, :], (b_dk * scale).to(dk.dtype.element_ty), mask=exists[:, None] & mk[None, :])
    tl.store(dv + at * V + oi[:, None] * (H * V) + ov[None, :], b_dv.to(dv.dtype.element_ty), mask=exists[:, None] & mv[None, :])


@triton.jit
def band_sink_kernel(
    q, sk, sv, do, e, top, dsk, dsv, owner, cu, scale, T, TS, position, window,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, NS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, SEG: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the sinks from SEG blocks of queries: dsk, dsv [slots, H, NS, K | V] fp32, owner [slots] the sequence. Grid (segments, N H)."""
    i_s, i_nh = tl.program_id(0), tl.program_id(1)
    i_n, i_h = i_nh // H, i_nh % H
    G: tl.constexpr = H // R
    i_g = i_h // R
    start, length = bounds(cu, i_n, T, VARLEN)
    first, blocks = i_s * SEG, tl.cdiv(length, BT)
    if first >= blocks:
        return
    start_s = start if VARLEN else i_n.to(tl.int64) * TS
    sinks = tl.minimum(NS, length if VARLEN else TS)
    oi, ok, ov, on = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BN)
    mk, mv, has = ok < K, ov < V, on < sinks
    at = start_s * G + i_g
    b_k = tl.load(sk + at * K + on[:, None] * (G * K) + ok[None, :], mask=has[:, None] & mk[None, :], other=0.0)
    b_v = tl.load(sv + at * V + on[:, None] * (G * V) + ov[None, :], mask=has[:, None] & mv[None, :], other=0.0)
    b_dk = tl.zeros([BN, BK], dtype=tl.float32)
    b_dv = tl.zeros([BN, BV], dtype=tl.float32)
    log_scale = scale * LOG2E
    for i_t in range(first, tl.minimum(first + SEG, blocks)):
        t = i_t * BT + oi
        here = t < length
        row = (start + i_t * BT) * H + i_h
        b_q = tl.load(q + row * K + oi[:, None] * (H * K) + ok[None, :], mask=here[:, None] & mk[None, :], other=0.0)
        b_do = tl.load(do + row * V + oi[:, None] * (H * V) + ov[None, :], mask=here[:, None] & mv[None, :], other=0.0)
        b_e = tl.load(e + row + oi * H, mask=here, other=0.0)
        b_top = tl.load(top + row + oi * H, mask=here, other=0.0) * LOG2E
        seen = here[:, None] & (on < NS)[None, :] & (position + t[:, None] - on[None, :] >= window)
        weights, slopes = weights_and_slopes(b_q, b_k, b_v, b_do, b_e, b_top, seen, log_scale, PRECISION)
        b_dv = tl.dot(tl.trans(weights.to(b_do.dtype)), b_do, b_dv, input_precision=PRECISION)
        b_dk = tl.dot(tl.trans(slopes.to(b_q.dtype)), b_q, b_dk, input_precision=PRECISION)
    slot = start // (SEG * BT) + i_n + i_s
    if i_h == 0:
        tl.store(owner + slot, i_n.to(tl.int64))
    kept = (on < NS)[:, None]
    dsk += (slot * H + i_h) * NS * K
    dsv += (slot * H + i_h) * NS * V
    tl.store(dsk + on[:, None] * K + ok[None, :], b_dk * scale, mask=kept & mk[None, :])
    tl.store(dsv + on[:, None] * V + ov[None, :], b_dv, mask=kept & mv[None, :])
