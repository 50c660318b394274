"""Op 2 on GPUs: the (gated) delta rule in WY form, chunk by chunk.

With c the cumulative log decay inside a chunk, D_ij = exp(c_i - c_j), S the state before it:

    A = strictly lower (beta_i D_ij k_i.k_j)      X = (I + A)^-1        R = beta (v - e^c k S)      U = X R
    o = e^c q S + lower (q k^T * D) U             S' = e^last S + (k e^(last - c))^T U

X is found by doubling: with X the inverse of the diagonal blocks of size s, X - X L X is that of size 2 s, L the parts of A between their halves.
Every step is exact block elimination, so repeated keys with beta near 1 do no harm (a power series in A would lose everything to cancellation).

Backward, from dO and the state gradient dS' after the chunk, with P = lower (q k^T * D) and ke = k e^(last - c):

    dU = P^T dO + ke dS'      dR = X^T dU      dS = e^last dS' + (q e^c)^T dO - (k e^c beta)^T dR
    dP = lower (dO U^T)       dA = -strictly lower (dR U^T)

Kernels: `invert_kernel` (X, parallel over chunks), `delta_kernel` (forward, or only the states at chunk starts), `delta_back_kernel` (state
gradients at chunk ends, backwards in time), and `delta_gradient_kernel` (everything else, parallel over chunks). The inverse is kept in the inputs'
dtype: [T, BT] numbers a head. Backward works per query head; the heads of a group are summed by the caller.

Key: T tokens, H query heads, G key/value heads, R = H / G, K key size, V value size, BT chunk size.
"""

import triton
import triton.language as tl

from subquad.kernels.triton.pieces import causal_mask, fades, head_of, level_mask, pair_decay, read_tile, write_tile


@triton.jit
def chunk_decay(g, inside, GATED: tl.constexpr, BT: tl.constexpr):
    """Cumulative log decay, [BT]."""
    c = tl.zeros([BT], dtype=tl.float32)
    if GATED:
        c += tl.cumsum(tl.load(g, mask=inside, other=0.0), 0)
    return c


@triton.jit
def read_chunk(k, beta, g, x, row, oi, ok, inside, G: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, GATED: tl.constexpr):
    """(k, X, beta, cumulative log decay) of a chunk; row: of its first token, times heads plus head."""
    b_k = read_tile(k + row * K, oi, G * K, ok, inside, ok < K)
    b_x = read_tile(x + row * BT, oi, G * BT, oi, inside, oi < BT)
    b_beta = tl.load(beta + row + oi * G, mask=inside, other=0.0)
    return b_k, b_x, b_beta, chunk_decay(g + row + oi * G, inside, GATED, BT)


@triton.jit
def invert_kernel(
    k, beta, g, x, cu, T,
    G: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
    GATED: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """X of every chunk. Grid (chunks, N G); k [.., T, G, K], beta, g [.., T, G] fp32 -> x [.., T, G, BT]."""
    i_t = tl.program_id(0)
    _, i_g, _, start, length = head_of(tl.program_id(1), cu, T, G, 1, VARLEN)
    if i_t * BT >= length:
        return
    oi, ok = tl.arange(0, BT), tl.arange(0, BK)
    t = i_t * BT + oi
    inside = t < length
    row = (start + i_t * BT) * G + i_g
    b_k = read_tile(k + row * K, oi, G * K, ok, inside, ok < K)
    b_beta = tl.load(beta + row + oi * G, mask=inside, other=0.0)
    c = chunk_decay(g + row + oi * G, inside, GATED, BT)
    a = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_beta[:, None]
    if GATED:
        a *= pair_decay(c, BT, False)
    b_x = tl.where(oi[:, None] == oi[None, :], 1.0, 0.0) - tl.where(level_mask(0, BT, False), a, 0.0)
    for level in tl.static_range(1, LEVELS):
        between = tl.where(level_mask(level, BT, False), a, 0.0)
        b_x -= tl.dot(b_x, tl.dot(between, b_x, input_precision=SOLVE), input_precision=SOLVE)
    write_tile(x + row * BT, oi, G * BT, oi, inside, oi < BT, b_x)


@triton.jit
def delta_kernel(
    q, k, v, beta, g, x, o, h0, ht, hs, cu, scale, T,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATED: tl.constexpr, OUTPUT: tl.constexpr, STATES: tl.constexpr, VARLEN: tl.constexpr,
    USE_H0: tl.constexpr, STORE_HT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Forward. Grid (V / BV, N H). OUTPUT: writes o [.., T, H, V]; STATES: writes the state before every chunk to hs [slots, H, K, V] (R = 1)."""
    i_v, i_nh = tl.program_id(0), tl.program_id(1)
    G: tl.constexpr = H // R
    i_n, i_h, i_g, start, length = head_of(i_nh, cu, T, H, R, VARLEN)
    oi, ok, ov = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    mk, mv = ok < K, ov < V
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if USE_H0:
        state += read_tile(h0 + (i_n.to(tl.int64) * G + i_g) * K * V, ok, V, ov, mk, mv)
    hs += ((start // BT + i_n) * H + i_h) * K * V
    for i_t in range(tl.cdiv(length, BT)):
        t = i_t * BT + oi
        inside = t < length
        row, row_q = (start + i_t * BT) * G + i_g, (start + i_t * BT) * H + i_h
        b_k, b_x, b_beta, c = read_chunk(k, beta, g, x, row, oi, ok, inside, G, K, BT, GATED)
        ahead, back, fade = fades(c, BT, False)
        b_v = read_tile(v + row * V, oi, G * V, ov, inside, mv)
        if STATES:
            write_tile(hs, ok, V, ov, mk, mv, state)
            hs += H * K * V
        b_s = state.to(b_k.dtype)
        seen = tl.dot(b_k, b_s, input_precision=PRECISION)
        if GATED:
            seen *= ahead[:, None]
        right = (b_v - seen) * b_beta[:, None]
        b_u = tl.dot(b_x, right.to(b_x.dtype), input_precision=PRECISION).to(b_v.dtype)
        if OUTPUT:
            b_q = read_tile(q + row_q * K, oi, H * K, ok, inside, mk)
            weights = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            past = tl.dot(b_q, b_s, input_precision=PRECISION)
            if GATED:
                weights *= pair_decay(c, BT, False)
                past *= ahead[:, None]
            else:
                weights = tl.where(causal_mask(BT, False), weights, 0.0)
            b_o = tl.dot(weights.to(b_u.dtype), b_u, past, input_precision=PRECISION) * scale
            write_tile(o + row_q * V, oi, H * V, ov, inside, mv, b_o)
        if GATED:
            b_k = (b_k * back[:, None]).to(b_k.dtype)
            state *= fade
        state = tl.dot(tl.trans(b_k), b_u, state, input_precision=PRECISION)
    if STORE_HT:
        if i_h % R == 0:
            write_tile(ht + (i_n.to(tl.int64) * G + i_g) * K * V, ok, V, ov, mk, mv, state)


@triton.jit
def delta_back_kernel(
    q, k, do, beta, g, x, dht, dh0, ds, cu, T,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATED: tl.constexpr, VARLEN: tl.constexpr, USE_DHT: tl.constexpr, STORE_DH0: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """State gradients at chunk ends, ds [slots, H, K, V], backwards in time. Grid (V / BV, N H). dht [N, G, K, V] counts once per group, dh0 [N, H, K, V]."""
    i_v, i_nh = tl.program_id(0), tl.program_id(1)
    G: tl.constexpr = H // R
    i_n, i_h, i_g, start, length = head_of(i_nh, cu, T, H, R, VARLEN)
    oi, ok, ov = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    mk, mv = ok < K, ov < V
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if USE_DHT:
        state += read_tile(dht + (i_n.to(tl.int64) * G + i_g) * K * V, ok, V, ov, mk, mv)
        state = tl.where(i_h % R == 0, state, 0.0)
    chunks = tl.cdiv(length, BT)
    ds += ((start // BT + i_n) * H + i_h) * K * V
    for n in range(chunks):
        i_t = chunks - 1 - n
        t = i_t * BT + oi
        inside = t < length
        row, row_q = (start + i_t * BT) * G + i_g, (start + i_t * BT) * H + i_h
        b_k, b_x, b_beta, c = read_chunk(k, beta, g, x, row, oi, ok, inside, G, K, BT, GATED)
        ahead, back, fade = fades(c, BT, False)
        b_q = read_tile(q + row_q * K, oi, H * K, ok, inside, mk)
        b_do = read_tile(do + row_q * V, oi, H * V, ov, inside, mv)
        write_tile(ds + tl.cast(i_t, tl.int64) * (H * K * V), ok, V, ov, mk, mv, state)
        turned = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        if GATED:
            turned *= pair_decay(c, BT, True)
            left = (b_k * back[:, None]).to(b_k.dtype)
        else:
            turned = tl.where(causal_mask(BT, True), turned, 0.0)
            left = b_k
        du = tl.dot(turned.to(b_do.dtype), b_do, input_precision=PRECISION)
        du = tl.dot(left, state.to(left.dtype), du, input_precision=PRECISION)
        dr = tl.dot(tl.trans(b_x), du.to(b_x.dtype), input_precision=PRECISION) * b_beta[:, None]
        if GATED:
            b_q = (b_q * ahead[:, None]).to(b_q.dtype)
            b_k = (b_k * ahead[:, None]).to(b_k.dtype)
            state *= fade
        state = tl.dot(tl.trans(b_q), b_do, state, input_precision=PRECISION)
        state -= tl.dot(tl.trans(b_k), dr.to(b_k.dtype), input_precision=PRECISION)
    if STORE_DH0:
        write_tile(dh0 + i_nh.to(tl.int64) * K * V, ok, V, ov, mk, mv, state)


@triton.jit
def delta_gradient_kernel(
    q, k, v, do, beta, g, x, hs, ds, dq, dk, dv, dbeta, dg, cu, T,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATED: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk and query head from the states around it. Grid (chunks, N H). dq, dk, dv, dbeta, dg [.., T, H ..]; hs per G, ds per H."""
    i_t = tl.program_id(0)
    G: tl.constexpr = H // R
    i_n, i_h, i_g, start, length = head_of(tl.program_id(1), cu, T, H, R, VARLEN)
    if i_t * BT >= length:
        return
    oi, ok = tl.arange(0, BT), tl.arange(0, BK)
    mk = ok < K
    t = i_t * BT + oi
    inside = t < length
    row, row_q = (start + i_t * BT) * G + i_g, (start + i_t * BT) * H + i_h
    b_k, b_x, b_beta, c = read_chunk(k, beta, g, x, row, oi, ok, inside, G, K, BT, GATED)
    slot = start // BT + i_n + i_t
    hs += (slot * G + i_g) * K * V
    ds += (slot * H + i_h) * K * V
    ahead, back, fade = fades(c, BT, False)
    # q and k are read again where they are used, so that no tile is held through the loop.
    turned = tl.dot(b_k, tl.trans(read_tile(q + row_q * K, oi, H * K, ok, inside, mk)), input_precision=PRECISION)  # P^T
    turned = (turned * pair_decay(c, BT, True)).to(b_k.dtype)
    d_p = tl.zeros([BT, BT], dtype=tl.float32)
    d_a = tl.zeros([BT, BT], dtype=tl.float32)
    d_q = tl.zeros([BT, BK], dtype=tl.float32)
    d_k = tl.zeros([BT, BK], dtype=tl.float32)
    d_beta = tl.zeros([BT], dtype=tl.float32)
    d_c = tl.zeros([BT], dtype=tl.float32)
    through = tl.zeros([BT], dtype=tl.float32)
    d_last = 0.0
    for i_v in range(tl.cdiv(V, BV)):
        ov = i_v * BV + tl.arange(0, BV)
        mv = ov < V
        b_v = read_tile(v + row * V, oi, G * V, ov, inside, mv)
        b_do = read_tile(do + row_q * V, oi, H * V, ov, inside, mv)
        b_s, b_ds = read_tile(hs, ok, V, ov, mk, mv), read_tile(ds, ok, V, ov, mk, mv)
        w_k = read_tile(k + row * K, oi, G * K, ok, inside, mk)
        seen = tl.dot(w_k, b_s, input_precision=PRECISION) * ahead[:, None]
        wrong = b_v - seen
        b_u = tl.dot(b_x, (wrong * b_beta[:, None]).to(b_x.dtype), input_precision=PRECISION).to(b_v.dtype)
        left = tl.dot(w_k, b_ds, input_precision=PRECISION) * back[:, None]
        through += tl.sum(b_u * left, 1)
        du = tl.dot(turned, b_do, left, input_precision=PRECISION)
        dr = tl.dot(tl.trans(b_x), du.to(b_x.dtype), input_precision=PRECISION)
        d_p = tl.dot(b_do, tl.trans(b_u), d_p, input_precision=PRECISION)
        d_a = tl.dot(dr.to(b_u.dtype), tl.trans(b_u), d_a, input_precision=PRECISION)
        d_beta += tl.sum(dr * wrong, 1)
        dr *= b_beta[:, None]
        write_tile(dv + row_q * V, oi, H * V, ov, inside, mv, dr)
        d_c -= tl.sum(dr * seen, 1)
        d_q = tl.dot(b_do, tl.trans(b_s), d_q, input_precision=PRECISION)
        d_k = tl.dot((b_u * back[:, None]).to(b_ds.dtype), tl.trans(b_ds), d_k, input_precision=PRECISION)
        d_k = tl.dot((dr * -ahead[:, None]).to(b_s.dtype), tl.trans(b_s), d_k, input_precision=PRECISION)
        d_last += tl.sum(tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), 1), 0)
    # `through`: what passes through k e^(last - c), by row.
    b_q, b_k = read_tile(q + row_q * K, oi, H * K, ok, inside, mk), read_tile(k + row * K, oi, G * K, ok, inside, mk)
    d_q *= ahead[:, None]
    d_c += tl.sum(d_q * b_q, 1) - through
    d_last = d_last * fade + tl.sum(through, 0)
    decay = pair_decay(c, BT, False)
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
    write_tile(dq + row_q * K, oi, H * K, ok, inside, mk, d_q)
    write_tile(dk + row_q * K, oi, H * K, ok, inside, mk, d_k)
    tl.store(dbeta + row_q + oi * H, d_beta, mask=inside)
    if GATED:  # c_i is the sum of the gates up to i, and `last` of all of them
        tl.store(dg + row_q + oi * H, d_last + tl.sum(d_c, 0) - tl.cumsum(d_c, 0) + d_c, mask=inside)
