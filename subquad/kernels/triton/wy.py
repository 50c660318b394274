"""Op 2 on GPUs: the (gated) delta rule in WY form, chunk by chunk.

With c the cumulative log decay inside a chunk, D_ij = exp(c_i - c_j), S the state before it:

    A = strictly lower (beta_i D_ij k_i.k_j)      X = (I + A)^-1        R = beta (v - e^c k S)      U = X R
    o = e^c q S + lower (q k^T * D) U             S' = e^last S + (k e^(last - c))^T U

X is found by doubling: with X the inverse of the diagonal blocks of size s, X - X L X is that of size 2 s, L the parts of A between their halves.
Every step is exact block elimination, so repeated keys with beta near 1 do no harm (a power series in A would lose everything to cancellation).

Backward, from dO and the state gradient dS' after the chunk, with P = lower (q k^T * D) and ke = k e^(last - c):

    dU = P^T dO + ke dS'      dR = X^T dU      dS = e^last dS' + (q e^c)^T dO - (k e^c beta)^T dR
    dP = lower (dO U^T)       dA = -strictly lower (dR U^T)

Three kernels: `invert_kernel` (X, parallel over chunks), `delta_kernel` (forward, or only the states at chunk starts), `delta_back_kernel` (state
gradients at chunk ends, backwards in time), and `delta_gradient_kernel` (everything else, parallel over chunks). The inverse is kept in the inputs'
dtype: [T, BT] numbers a head. Backward works per query head; the heads of a group are summed by the caller.

Key: T tokens, H query heads, G key/value heads, R = H / G, K key size, V value size, BT chunk size.
"""

import triton
import triton.language as tl

from subquad.kernels.triton.pieces import LOG2E, bounds, level_mask, pair_decay


@triton.jit
def chunk_gates(g, inside, GATED: tl.constexpr, BT: tl.constexpr):
    """(cumulative log decay [BT], its last value)."""
    c = tl.zeros([BT], dtype=tl.float32)
    if GATED:
        c += tl.cumsum(tl.load(g, mask=inside, other=0.0), 0)
    return c, tl.sum(tl.where(tl.arange(0, BT) == BT - 1, c, 0.0), 0)


@triton.jit
def invert_kernel(
    k, beta, g, x, cu, T,
    G: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
    GATED: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """X of every chunk. Grid (chunks, N G); k [.., T, G, K], beta, g [.., T, G] fp32 -> x [.., T, G, BT]."""
    i_t, i_ng = tl.program_id(0), tl.program_id(1)
    i_n, i_g = i_ng // G, i_ng % G
    start, length = bounds(cu, i_n, T, VARLEN)
    if i_t * BT >= length:
        return
    oi, ok = tl.arange(0, BT), tl.arange(0, BK)
    t = i_t * BT + oi
    inside = t < length
    row, tokens = (start + i_t * BT) * G + i_g, oi * G
    b_k = tl.load(k + row * K + tokens[:, None] * K + ok[None, :], mask=inside[:, None] & (ok < K)[None, :], other=0.0)
    b_beta = tl.load(beta + row + tokens, mask=inside, other=0.0)
    c, _ = chunk_gates(g + row + tokens, inside, GATED, BT)
    a = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_beta[:, None]
    if GATED:
        a *= pair_decay(c, BT, False)
    b_x = tl.where(oi[:, None] == oi[None, :], 1.0, 0.0) - tl.where(level_mask(0, BT, False), a, 0.0)
    for level in tl.static_range(1, LEVELS):
        between = tl.where(level_mask(level, BT, False), a, 0.0)
        b_x -= tl.dot(b_x, tl.dot(between, b_x, input_precision=SOLVE), input_precision=SOLVE)
    tl.store(x + row * BT + tokens[:, None] * BT + oi[None, :], b_x.to(x.dtype.element_ty), mask=inside[:, None])


@triton.jit
def delta_kernel(
    q, k, v, beta, g, x, o, h0, ht, hs, cu, scale, T,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATED: tl.constexpr, OUTPUT: tl.constexpr, STATES: tl.constexpr, VARLEN: tl.constexpr,
    USE_H0: tl.constexpr, STORE_HT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Forward. Grid (V / BV, N H). OUTPUT: writes o [.., T, H, V]; STATES: writes the state before every chunk to hs [slots, H, K, V] (R = 1)."""
    i_v, i_nh = tl.program_id(0), tl.program_id(1)
    i_n, i_h = i_nh // H, i_nh % H
    G: tl.constexpr = H // R
    i_g = i_h // R
    start, length = bounds(cu, i_n, T, VARLEN)
    oi, ok, ov = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    tokens, tokens_q = oi * G, oi * H
    mk, mv = ok < K, ov < V
    tile = ok[:, None] * V + ov[None, :]
    whole = mk[:, None] & mv[None, :]
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if USE_H0:
        state += tl.load(h0 + (i_n.to(tl.int64) * G + i_g) * K * V + tile, mask=whole, other=0.0)
    hs += ((start // BT + i_n) * H + i_h) * K * V
    for i_t in range(tl.cdiv(length, BT)):
        t = i_t * BT + oi
        inside = t < length
        row, row_q = (start + i_t * BT) * G + i_g, (start + i_t * BT) * H + i_h
        b_k = tl.load(k + row * K + tokens[:, None] * K + ok[None, :], mask=inside[:, None] & mk[None, :], other=0.0)
        b_v = tl.load(v + row * V + tokens[:, None] * V + ov[None, :], mask=inside[:, None] & mv[None, :], other=0.0)
        b_x = tl.load(x + row * BT + tokens[:, None] * BT + oi[None, :], mask=inside[:, None], other=0.0)
        b_beta = tl.load(beta + row + tokens, mask=inside, other=0.0)
        c, last = chunk_gates(g + row + tokens, inside, GATED, BT)
        if STATES:
            tl.store(hs + tile, state.to(hs.dtype.element_ty), mask=whole)
            hs += H * K * V
        b_s = state.to(b_k.dtype)
        seen = tl.dot(b_k, b_s, input_precision=PRECISION)
        if GATED:
            seen *= tl.exp2(c * LOG2E)[:, None]
        right = (b_v - seen) * b_beta[:, None]
        b_u = tl.dot(b_x, right.to(b_x.dtype), input_precision=PRECISION).to(b_v.dtype)
        if OUTPUT:
            b_q = tl.load(q + row_q * K + tokens_q[:, None] * K + ok[None, :], mask=inside[:, None] & mk[None, :], other=0.0)
            weights = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            past = tl.dot(b_q, b_s, input_precision=PRECISION)
            if GATED:
                weights *= pair_decay(c, BT, False)
                past *= tl.exp2(c * LOG2E)[:, None]
            else:
                weights = tl.where(oi[:, None] >= oi[None, :], weights, 0.0)
            b_o = tl.dot(weights.to(b_u.dtype), b_u, past, input_precision=PRECISION) * scale
            tl.store(o + row_q * V + tokens_q[:, None] * V + ov[None, :], b_o.to(o.dtype.element_ty), mask=inside[:, None] & mv[None, :])
        if GATED:
            b_k = (b_k * tl.exp2((last - c) * LOG2E)[:, None]).to(b_k.dtype)
            state *= tl.exp2(last * LOG2E)
        state = tl.dot(tl.trans(b_k), b_u, state, input_precision=PRECISION)
    if STORE_HT:
        if i_h % R == 0:
            tl.store(ht + (i_n.to(tl.int64) * G + i_g) * K * V + tile, state, mask=whole)


@triton.jit
def delta_back_kernel(
    q, k, do, beta, g, x, dht, dh0, ds, cu, T,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATED: tl.constexpr, VARLEN: tl.constexpr, USE_DHT: tl.constexpr, STORE_DH0: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """State gradients at chunk ends, ds [slots, H, K, V], backwards in time. Grid (V / BV, N H). dht [N, G, K, V] counts once per group, dh0 [N, H, K, V]."""
    i_v, i_nh = tl.program_id(0), tl.program_id(1)
    i_n, i_h = i_nh // H, i_nh % H
    G: tl.constexpr = H // R
    i_g = i_h // R
    start, length = bounds(cu, i_n, T, VARLEN)
    oi, ok, ov = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    tokens, tokens_q = oi * G, oi * H
    mk, mv = ok < K, ov < V
    tile = ok[:, None] * V + ov[None, :]
    whole = mk[:, None] & mv[None, :]
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if USE_DHT:
        state += tl.load(dht + (i_n.to(tl.int64) * G + i_g) * K * V + tile, mask=whole, other=0.0)
        state = tl.where(i_h % R == 0, state, 0.0)
    chunks = tl.cdiv(length, BT)
    ds += ((start // BT + i_n) * H + i_h) * K * V
    for n in range(chunks):
        i_t = chunks - 1 - n
        t = i_t * BT + oi
        inside = t < length
        row, row_q = (start + i_t * BT) * G + i_g, (start + i_t * BT) * H + i_h
        b_q = tl.load(q + row_q * K + tokens_q[:, None] * K + ok[None, :], mask=inside[:, None] & mk[None, :], other=0.0)
        b_k = tl.load(k + row * K + tokens[:, None] * K + ok[None, :], mask=inside[:, None] & mk[None, :], other=0.0)
        b_do = tl.load(do + row_q * V + tokens_q[:, None] * V + ov[None, :], mask=inside[:, None] & mv[None, :], other=0.0)
        b_x = tl.load(x + row * BT + tokens[:, None] * BT + oi[None, :], mask=inside[:, None], other=0.0)
        b_beta = tl.load(beta + row + tokens, mask=inside, other=0.0)
        c, last = chunk_gates(g + row + tokens, inside, GATED, BT)
        tl.store(ds + tl.cast(i_t, tl.int64) * (H * K * V) + tile, state.to(ds.dtype.element_ty), mask=whole)
        turned = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        if GATED:
            turned *= pair_decay(c, BT, True)
            left = (b_k * tl.exp2((last - c) * LOG2E)[:, None]).to(b_k.dtype)
        else:
            turned = tl.where(oi[:, None] <= oi[None, :], turned, 0.0)
            left = b_k
        du = tl.dot(turned.to(b_do.dtype), b_do, input_precision=PRECISION)
        du = tl.dot(left, state.to(left.dtype), du, input_precision=PRECISION)
        dr = tl.dot(tl.trans(b_x), du.to(b_x.dtype), input_precision=PRECISION) * b_beta[:, None]
        if GATED:
            ahead = tl.exp2(c * LOG2E)[:, None]
            b_q = (b_q * ahead).to(b_q.dtype)
            b_k = (b_k * ahead).to(b_k.dtype)
            state *= tl.exp2(last * LOG2E)
        state = tl.dot(tl.trans(b_q), b_do, state, input_precision=PRECISION)
        state -= tl.dot(tl.trans(b_k), dr.to(b_k.dtype), input_precision=PRECISION)
    if STORE_DH0:
        tl.store(dh0 + i_nh.to(tl.int64) * K * V + tile, state, mask=whole)


@triton.jit
def delta_gradient_kernel(
    q, k, v, do, beta, g, x, hs, ds, dq, dk, dv, dbeta, dg, cu, T,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATED: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk and query head from the states around it. Grid (chunks, N H). dq, dk, dv, dbeta, dg [.., T, H ..]; hs per G, ds per H."""
    i_t, i_nh = tl.program_id(0), tl.program_id(1)
    i_n, i_h = i_nh // H, i_nh % H
    G: tl.constexpr = H // R
    i_g = i_h // R
    start, length = bounds(cu, i_n, T, VARLEN)
    if i_t * BT >= length:
        return
    oi, ok = tl.arange(0, BT), tl.arange(0, BK)
    mk = ok < K
    t = i_t * BT + oi
    inside = t < length
    row, row_q = (start + i_t * BT) * G + i_g, (start + i_t * BT) * H + i_h
    tokens, tokens_q = oi * G, oi * H
    m = inside[:, None] & mk[None, :]
    b_q = tl.load(q + row_q * K + tokens_q[:, None] * K + ok[None, :], mask=m, other=0.0)
    b_k = tl.load(k + row * K + tokens[:, None] * K + ok[None, :], mask=m, other=0.0)
    b_x = tl.load(x + row * BT + tokens[:, None] * BT + oi[None, :], mask=inside[:, None], other=0.0)
    b_beta = tl.load(beta + row + tokens, mask=inside, other=0.0)
    c, last = chunk_gates(g + row + tokens, inside, GATED, BT)
    slot = start // BT + i_n + i_t
    hs += (slot * G + i_g) * K * V
    ds += (slot * H + i_h) * K * V
    ahead, back, decay = tl.exp2(c * LOG2E), tl.exp2((last - c) * LOG2E), pair_decay(c, BT, False)
    turned = (tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * pair_decay(c, BT, True)).to(b_q.dtype)  # P^T
    left = (b_k * back[:, None]).to(b_k.dtype)
    d_p = tl.zeros([BT, BT], dtype=tl.float32)
    d_a = tl.zeros([BT, BT], dtype=tl.float32)
    d_q = tl.zeros([BT, BK], dtype=tl.float32)
    d_k = tl.zeros([BT, BK], dtype=tl.float32)
    d_left = tl.zeros([BT, BK], dtype=tl.float32)
    d_beta = tl.zeros([BT], dtype=tl.float32)
    d_c = tl.zeros([BT], dtype=tl.float32)
    d_last = 0.0
    for i_v in range(tl.cdiv(V, BV)):
        ov = i_v * BV + tl.arange(0, BV)
        mv = inside[:, None] & (ov < V)[None, :]
        tile, whole = ok[:, None] * V + ov[None, :], mk[:, None] & (ov < V)[None, :]
        b_v = tl.load(v + row * V + tokens[:, None] * V + ov[None, :], mask=mv, other=0.0)
        b_do = tl.load(do + row_q * V + tokens_q[:, None] * V + ov[None, :], mask=mv, other=0.0)
        b_s = tl.load(hs + tile, mask=whole, other=0.0)
        b_ds = tl.load(ds + tile, mask=whole, other=0.0)
        seen = tl.dot(b_k, b_s, input_precision=PRECISION) * ahead[:, None]
        wrong = b_v - seen
        b_u = tl.dot(b_x, (wrong * b_beta[:, None]).to(b_x.dtype), input_precision=PRECISION).to(b_v.dtype)
        du = tl.dot(turned, b_do, input_precision=PRECISION)
        du = tl.dot(left, b_ds, du, input_precision=PRECISION)
        dr = tl.dot(tl.trans(b_x), du.to(b_x.dtype), input_precision=PRECISION)
        d_p = tl.dot(b_do, tl.trans(b_u), d_p, input_precision=PRECISION)
        d_a = tl.dot(dr.to(b_u.dtype), tl.trans(b_u), d_a, input_precision=PRECISION)
        d_beta += tl.sum(dr * wrong, 1)
        dr *= b_beta[:, None]
        tl.store(dv + row_q * V + tokens_q[:, None] * V + ov[None, :], dr.to(dv.dtype.element_ty), mask=mv)
        d_c -= tl.sum(dr * seen, 1)
        read = tl.dot(b_do, tl.trans(b_s), input_precision=PRECISION)
        d_q += read
        d_k = tl.dot((dr * ahead[:, None]).to(b_s.dtype), tl.trans(b_s), d_k, input_precision=PRECISION)
        d_left = tl.dot(b_u, tl.trans(b_ds), d_left, input_precision=PRECISION)
        d_last += tl.sum(tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), 1), 0)
    # What was summed: d_k = minus the gradient through k S, d_left that of k e^(last - c), d_q that of e^c q S.
    d_q *= ahead[:, None]
    d_c += tl.sum(d_q * b_q, 1)
    d_left *= back[:, None]
    through = tl.sum(d_left * b_k, 1)
    d_c -= through
    d_last = d_last * tl.exp2(last * LOG2E) + tl.sum(through, 0)
    d_k = d_left - d_k
    d_p = d_p * decay
    strictly = oi[:, None] > oi[None, :]
    d_a = tl.where(strictly, -d_a * decay, 0.0)
    products = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * d_a
    d_beta += tl.sum(products, 1)
    products *= b_beta[:, None]
    products += tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * d_p
    d_c += tl.sum(products, 1) - tl.sum(products, 0)
    d_a *= b_beta[:, None]
    low_p, low_a = d_p.to(b_k.dtype), d_a.to(b_k.dtype)
    d_q = tl.dot(low_p, b_k, d_q, input_precision=PRECISION)
    d_k = tl.dot(tl.trans(low_p), b_q, d_k, input_precision=PRECISION)
    d_k = tl.dot(low_a, b_k, d_k, input_precision=PRECISION)
    d_k = tl.dot(tl.trans(low_a), b_k, d_k, input_precision=PRECISION)
    tl.store(dq + row_q * K + tokens_q[:, None] * K + ok[None, :], d_q.to(dq.dtype.element_ty), mask=m)
    tl.store(dk + row_q * K + tokens_q[:, None] * K + ok[None, :], d_k.to(dk.dtype.element_ty), mask=m)
    tl.store(dbeta + row_q + tokens_q, d_beta, mask=inside)
    if GATED:  # c_i is the sum of the gates up to i, and `last` of all of them
        tl.store(dg + row_q + tokens_q, d_last + tl.sum(d_c, 0) - tl.cumsum(d_c, 0) + d_c, mask=inside)
