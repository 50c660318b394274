"""Op 4 on GPUs: one token. The state stays in fp32 and is updated in place; one program per sequence and key/value head reads it once for all of the
head's queries. No matrix products: a token is bound by the bytes of its state.

Key: B batch, G key/value heads, R query heads per key/value head, K key size, V value size, F features, W window slots, NS sinks.
"""

import torch
import triton
import triton.language as tl

from subquad.kernels.triton.launch import pad
from subquad.kernels.triton.pieces import LOG2E


@triton.jit
def step_kernel(
    q, k, v, beta, g, state, o, scale,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DELTA: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Grid (V / BV, B G). q [B, G R, K], k [B, G, K], v [B, G, V], state [B, G, K, V], o [B, G R, V] fp32."""
    i_v, i_bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ok, ov = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    mk, mv = ok < K, ov < V
    at = state + i_bg * K * V + ok[:, None] * V + ov[None, :]
    inside = mk[:, None] & mv[None, :]
    s = tl.load(at, mask=inside, other=0.0)
    b_k = tl.load(k + i_bg * K + ok, mask=mk, other=0.0).to(tl.float32)
    b_v = tl.load(v + i_bg * V + ov, mask=mv, other=0.0).to(tl.float32)
    if DECAY == 1:
        s *= tl.exp2(tl.load(g + i_bg) * LOG2E)
    if DECAY == 2:
        s *= tl.exp2(tl.load(g + i_bg * K + ok, mask=mk, other=0.0) * LOG2E)[:, None]
    if DELTA:
        b_v = (b_v - tl.sum(s * b_k[:, None], 0)) * tl.load(beta + i_bg).to(tl.float32)
    s += b_k[:, None] * b_v[None, :]
    tl.store(at, s, mask=inside)
    for r in range(R):
        b_q = tl.load(q + (i_bg * R + r) * K + ok, mask=mk, other=0.0).to(tl.float32)
        tl.store(o + (i_bg * R + r) * V + ov, tl.sum(s * b_q[:, None], 0) * scale, mask=mv)


@triton.jit
def attend(q, k, v, count, low, m, den, sums, log_scale, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
           BV: tl.constexpr):  # fmt: skip
    """Online softmax of one query over `count` rows of k, v, from row `low` in blocks of BN; m and den are scalars, m in log2."""
    on, ok, ov = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, BV)
    for i in range(tl.cdiv(count, BN)):
        has = i * BN + on < count
        row = (low + i * BN + on) * G
        b_k = tl.load(k + row[:, None] * K + ok[None, :], mask=has[:, None] & (ok < K)[None, :], other=0.0).to(tl.float32)
        b_v = tl.load(v + row[:, None] * V + ov[None, :], mask=has[:, None] & (ov < V)[None, :], other=0.0).to(tl.float32)
        scores = tl.where(has, tl.sum(b_k * q[None, :], 1) * log_scale, float("-inf"))
        new = tl.maximum(m, tl.max(scores, 0))
        weights, keep = tl.exp2(scores - new), tl.exp2(m - new)
        den = den * keep + tl.sum(weights, 0)
        sums = sums * keep + tl.sum(weights[:, None] * b_v, 0)
        m = new
    return m, den, sums


@triton.jit
def window_step_kernel(
    q, k, v, sk, sv, fq, mix, state, left_fk, left_v, g, o, scale, W,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, NS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr,
    LINEAR: tl.constexpr, LEFT: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Grid (B G). k, v [B, W, G, K | V], sk, sv [B, NS, G, ..], fq [B, G R, F], mix [B, G R], state [B, G, F, V + 1], o [B, G R, V] fp32."""
    i_bg = tl.program_id(0).to(tl.int64)
    i_b, i_g = i_bg // G, i_bg % G
    ok, ov, of = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BF)
    mv, mf = ov < V, of < F
    if LINEAR:
        at = state + i_bg * F * (V + 1) + of * (V + 1)
        inside = mf[:, None] & mv[None, :]
        s = tl.load(at[:, None] + ov[None, :], mask=inside, other=0.0)
        mass = tl.load(at + V, mask=mf, other=0.0)
        if DECAY == 1:
            fade = tl.exp2(tl.load(g + i_bg) * LOG2E)
            s *= fade
            mass *= fade
        if DECAY == 2:
            fades = tl.exp2(tl.load(g + i_bg * F + of, mask=mf, other=0.0) * LOG2E)
            s *= fades[:, None]
            mass *= fades
        if LEFT:
            b_f = tl.load(left_fk + i_bg * F + of, mask=mf, other=0.0).to(tl.float32)
            s += b_f[:, None] * tl.load(left_v + i_bg * V + ov, mask=mv, other=0.0).to(tl.float32)[None, :]
            mass += b_f
        tl.store(at[:, None] + ov[None, :], s, mask=inside)
        tl.store(at + V, mass, mask=mf)
    k += (i_b * W * G + i_g) * K
    v += (i_b * W * G + i_g) * V
    log_scale = scale * LOG2E
    for r in range(R):
        row = i_bg * R + r
        b_q = tl.load(q + row * K + ok, mask=ok < K, other=0.0).to(tl.float32)
        m, den = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
        sums = tl.zeros([BV], dtype=tl.float32)
        if LINEAR:
            b_f = tl.load(fq + row * F + of, mask=mf, other=0.0).to(tl.float32)
            den = tl.sum(b_f * mass, 0)
            sums = tl.sum(b_f[:, None] * s, 0)
            m = tl.where(den > 0, tl.load(mix + row).to(tl.float32) * LOG2E, float("-inf"))
        m, den, sums = attend(b_q, k, v, W, 0, m, den, sums, log_scale, G, K, V, BN, BK, BV)
        if NS > 0:
            m, den, sums = attend(
                b_q, sk + (i_b * NS * G + i_g) * K, sv + (i_b * NS * G + i_g) * V, NS, 0, m, den, sums, log_scale, G, K, V, BN, BK, BV
            )
        tl.store(o + row * V + ov, sums / den, mask=mv)


def step(q, k, v, beta, g, state, scale: float):
    """`additive_step` or, with beta, `delta_step`."""
    (B, H, K), (G, V) = q.shape, v.shape[1:]
    BV = min(pad(V), 32)
    out = q.new_empty(B, H, V, dtype=torch.float32)
    step_kernel[(triton.cdiv(V, BV), B * G)](
        q, k, v, q if beta is None else beta, q if g is None else g, state, out, scale, G=G, R=H // G, K=K, V=V, BK=pad(K), BV=BV,
        DELTA=beta is not None, DECAY=0 if g is None else g.dim() - 1, num_warps=4,
    )  # fmt: skip
    return out


def window_step(q, k, v, fq, mix, state, left_fk, left_v, g, scale, sink_k, sink_v):
    """`window_linear_step`."""
    (B, H, K), (W, G, V) = q.shape, v.shape[1:]
    F, NS = 1 if fq is None else fq.shape[-1], 0 if sink_k is None else sink_k.shape[1]
    out = q.new_empty(B, H, V, dtype=torch.float32)
    given = (sink_k, sink_v, fq, mix, state, left_fk, left_v, g)
    window_step_kernel[(B * G,)](
        q, k, v, *(q if x is None else x for x in given), out, K**-0.5 if scale is None else scale, W, G=G, R=H // G, K=K, V=V, F=F, NS=NS,
        BK=pad(K), BV=pad(V), BF=pad(F), BN=32, LINEAR=state is not None, LEFT=left_fk is not None, DECAY=0 if g is None else g.dim() - 1,
        num_warps=8 if pad(F) * pad(V) > 8192 else 4,
    )  # fmt: skip
    return out
