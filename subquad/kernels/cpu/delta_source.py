"""C++: the (gated) delta rule in chunks of 64, forward and backward: op 2.

With D_ij the product of decays between j and i, A_ij = beta_i D_ij k_i.k_j for j < i, the corrected values solve (I + A) U = beta (V - e^c K S)
by blocks of rows; then O = e^c Q S + (Q K^T * D) U and S' = e^{c_end} S + (e^{c_end - c} K)^T U. Backward solves with the transpose.
"""

SOURCE = r"""
struct DeltaArgs {
  Tensor q, k, v, g, beta, o, dq, dk, dv, dg, dbeta;  // backward: o is the gradient of the output
  const float *h0, *dhT;
  float *hT, *dh0;
  const int64_t* seq;
  int64_t N, G, R, K, V, mode, threads;
  double scale;
};

struct Delta : Linear {
  float *A, *KK, *U, *KS, *beta;
  Delta(int K, int V, int mode) : Linear(K, V, mode, false) {
    A = arena.zeros(n * n), KK = arena.zeros(n * n), U = arena.get(n * Vp), KS = arena.get(n * Vp), beta = arena.get(n);
  }
  float decay(int t) const { return mode == PLAIN ? 1.0f : ec[t]; }
  // After decays() and keys(): U of this chunk. A holds -A below the diagonal, KK the plain products of keys.
  void correct() {
    lower_product(n, Kp, kk, Kp, kT, KK);
    for (int i = 0; i < n; i++) {
      int cols = up(i / MR * MR + MR);
      if (cols > n) cols = n;
      vf b = bc(-beta[i]);
      for (int j = 0; j < cols; j += L) {
        vf x = b * ld(KK + i * n + j);
        st(A + i * n + j, mode == PLAIN ? x : x * ld(D + i * n + j));
      }
      for (int j = i; j < cols; j++) A[i * n + j] = 0;
    }
    if (empty) memset(KS, 0, 4 * n * Vp);
    else gemm<false, false>(n, Vp, Kp, kk, Kp, S, Vp, KS, Vp);
    for (int i = 0; i < n; i++)
      for (int c = 0; c < Vp; c += L) st(U + i * Vp + c, beta[i] * (ld(vv + i * Vp + c) - decay(i) * ld(KS + i * Vp + c)));
    for (int i = 0; i < n; i += MR) {
      if (i) gemm<true, false>(MR, Vp, i, A + i * n, n, U, Vp, U + i * Vp, Vp);
      for (int r = i + 1; r < i + MR; r++)
        for (int s = i; s < r; s++) axpy(U + r * Vp, A[r * n + s], U + s * Vp, Vp);
    }
  }
  void read(const float* q, int64_t ldq, float* out, const Ahead* ahead) {
    lower_product(n, Kp, q, ldq, kT, P, ahead);
    mask_rows(P);
    if (!empty) {
      gemm<false, false>(n, Vp, Kp, q, ldq, S, Vp, out, Vp);
      if (mode == SCALAR)
        for (int t = 0; t < n; t++) scale_row(out + t * Vp, ec[t], Vp);
      lower_rows<true>(n, Vp, P, n, U, Vp, out, Vp);
    } else
      lower_rows<false>(n, Vp, P, n, U, Vp, out, Vp);
  }
  void write() {
    weighted_keys();
    fade_state(S, z);
    gemm<true, true>(Kp, Vp, n, written(), Kp, U, Vp, S, Vp);
    empty = false;
  }
};

extern "C" void subquad_delta(const DeltaArgs* pa) {
  const DeltaArgs& a = *pa;
  parallel_heads(a.N, a.G, a.threads, [&](int64_t s, int64_t h0, int64_t h1) {
    int64_t b = a.seq[3 * s], lo = a.seq[3 * s + 1], hi = a.seq[3 * s + 2], KV = a.K * a.V;
    Delta l(a.K, a.V, a.mode);
    Heads heads(l, h0, h1);
    float *q = arena.get(l.n * l.Kp), *out = arena.get(l.n * l.Vp);
    for (int64_t h = h0; a.h0 && h < h1; h++) {
      heads.take(h);
      load_state(a.h0 + (s * a.G + h) * KV, a.K, a.V, a.V, l.S);
      heads.empty[h - h0] = 0;
    }
    for (int64_t t = lo; t < hi; t += l.n)
      for (int64_t h = h0; h < h1; h++) {
        heads.take(h);
        l.decays(a.g, b, t, h, lo, hi);
        l.keys(a.k, a.v, b, t, h, lo, hi);
        load_column(a.beta, b, t, h, l.n, lo, hi, l.beta);
        l.correct();
        Ahead ahead = next_rows(a, b, h + 1 < h1 ? t : t + l.n, h + 1 < h1 ? h + 1 : h0, l.n, hi);
        for (int64_t r = 0; r < a.R; r++) {
          load_tile(a.q, b, t, h * a.R + r, l.n, a.K, lo, hi, q);
          l.read(q, l.Kp, out, r ? nullptr : &ahead);
          store_tile(a.o, b, t, h * a.R + r, l.n, a.V, lo, hi, out, a.scale);
        }
        if (a.hT || t + l.n < hi) l.write();
        heads.put(h);
      }
    for (int64_t h = h0; a.hT && h < h1; h++) heads.take(h), store_state(a.hT + (s * a.G + h) * KV, a.K, a.V, a.V, l.S);
  });
}

extern "C" void subquad_delta_backward(const DeltaArgs* pa) {
  const DeltaArgs& a = *pa;
  parallel(a.N * a.G, a.threads, [&](int64_t task) {
    int64_t s = task / a.G, h = task % a.G, b = a.seq[3 * s], lo = a.seq[3 * s + 1], hi = a.seq[3 * s + 2], ld;
    Delta l(a.K, a.V, a.mode);
    int n = l.n, Kp = l.Kp, Vp = l.Vp;
    if (a.h0) load_state(a.h0 + task * a.K * a.V, a.K, a.V, a.V, l.S);
    l.empty = false;
    float *dS = arena.zeros(Kp * Vp), *ST = arena.get(Kp * Vp), *dST = arena.get(Kp * Vp), *UT = arena.get(n * Vp), *dU = arena.get(n * Vp);
    float *G = arena.zeros(n * n), *dq = arena.get(n * Kp), *dk = arena.get(n * Kp), *part = arena.get(n * Kp), *d = arena.get(n * Vp);
    float *dg = arena.get(n), *rows = arena.get(n), *cols = arena.get(n), *db = arena.get(n), *buf = arena.get(n * Kp);
    if (a.dhT) load_state(a.dhT + task * a.K * a.V, a.K, a.V, a.V, dS);
    int64_t chunks = (hi - lo + n - 1) / n, size = Kp * Vp;
    float* states = arena.get(chunks * size + 1);
    auto load = [&](int64_t t) {
      l.decays(a.g, b, t, h, lo, hi);
      l.keys(a.k, a.v, b, t, h, lo, hi);
      load_column(a.beta, b, t, h, n, lo, hi, l.beta);
      l.correct();
    };
    for (int64_t i = 0; i < chunks; i++) {
      memcpy(states + i * size, l.S, 4 * size);
      if (i + 1 == chunks) break;
      load(lo + i * n);
      l.write();
    }
    for (int64_t i = chunks - 1; i >= 0; i--) {
      int64_t t0 = lo + i * n;
      l.S = states + i * size;
      load(t0);
      transpose(Kp, Vp, l.S, Vp, ST, Kp);
      transpose(Kp, Vp, dS, Vp, dST, Kp);
      transpose(n, Vp, l.U, Vp, UT, n);
      l.weighted_keys();
      gemm<false, false>(n, Vp, Kp, l.written(), Kp, dS, Vp, dU, Vp);
      gemm<false, false>(n, Kp, Vp, l.U, Vp, dST, Kp, dk, Kp);
      memset(rows, 0, 4 * n), memset(cols, 0, 4 * n);
      if (l.mode == SCALAR) {
        float through = 0;
        for (int f = 0; f < Kp; f++) through += dot(l.S + f * Vp, dS + f * Vp, Vp);
        through *= l.fade[0];
        for (int t = 0; t < n; t++) {
          dg[t] = through;
          scale_row(dk + t * Kp, l.wr[t], Kp);
          through += dot(dk + t * Kp, l.kk + t * Kp, Kp);
        }
      }
      l.fade_state(dS, l.z);
      for (int64_t r = 0; r < a.R; r++) {
        const float* q = borrow_tile(a.q, b, t0, h * a.R + r, n, a.K, lo, hi, buf, ld);
        load_tile(a.o, b, t0, h * a.R + r, n, a.V, lo, hi, d, a.scale);
        lower_product(n, Kp, q, ld, l.kT, l.P);
        lower_product(n, Vp, d, Vp, UT, G);
        l.mask_rows(l.P);
        gemm<false, false>(n, Kp, Vp, d, Vp, ST, Kp, dq, Kp);
        const float* faded = q;
        int64_t ldf = ld;
        if (l.mode == SCALAR) {
          for (int t = 0; t < n; t++) {
            for (int j = 0; j < t; j++) {
              float x = G[t * n + j] * l.P[t * n + j];
              rows[t] += x, cols[j] += x;
            }
            scale_row(dq + t * Kp, l.ec[t], Kp);
            rows[t] += dot(q + t * ld, dq + t * Kp, Kp);
            for (int f = 0; f < Kp; f += L) st(l.qs + t * Kp + f, l.ec[t] * ::ld(q + t * ld + f));
          }
          faded = l.qs, ldf = Kp;
        }
        l.mask_rows(G);
        lower_rows<true>(n, Kp, G, n, l.kk, Kp, dq, Kp);
        store_tile(a.dq, b, t0, h * a.R + r, n, a.K, lo, hi, dq);
        lower_transposed(n, Kp, G, n, q, ld, dk, Kp);
        lower_transposed(n, Vp, l.P, n, d, Vp, dU, Vp);
        gemm<true, true>(Kp, Vp, n, faded, ldf, d, Vp, dS, Vp);
      }
      // dU becomes the gradient of the right-hand side: (I + A)^T X = dU, from the last rows up.
      for (int i0 = n - MR; i0 >= 0; i0 -= MR) {
        int below = n - i0 - MR;
        if (below) gemm<true, true>(MR, Vp, below, l.A + (i0 + MR) * n + i0, n, dU + (i0 + MR) * Vp, Vp, dU + i0 * Vp, Vp);
        for (int r = i0 + MR - 2; r >= i0; r--)
          for (int j = r + 1; j < i0 + MR; j++) axpy(dU + r * Vp, l.A[j * n + r], dU + j * Vp, Vp);
      }
      lower_product(n, Vp, dU, Vp, UT, G);  // minus the gradient of A
      gemm<false, false>(n, Kp, Vp, dU, Vp, ST, Kp, part, Kp);
      for (int t = 0; t < n; t++) {
        float beta = l.beta[t], c = l.decay(t), s = 0, read = dot(dU + t * Vp, l.KS + t * Vp, Vp);
        db[t] = dot(dU + t * Vp, l.vv + t * Vp, Vp) - c * read;
        for (int j = 0; j < t; j++) {
          float D = l.mode == PLAIN ? 1.0f : l.D[t * n + j], x = -G[t * n + j] * D, y = x * l.KK[t * n + j];
          s += y;
          cols[j] += beta * y;
          G[t * n + j] = beta * x;
        }
        for (int j = t; j < n; j++) G[t * n + j] = 0;
        db[t] += s;
        rows[t] += beta * (s - c * read);
        axpy(dk + t * Kp, -beta * c, part + t * Kp, Kp);
        for (int f = 0; f < Kp; f += L) st(l.qs + t * Kp + f, -beta * c * ::ld(l.kk + t * Kp + f));
      }
      lower_rows<true>(n, Kp, G, n, l.kk, Kp, dk, Kp);
      lower_transposed(n, Kp, G, n, l.kk, Kp, dk, Kp);
      gemm<true, true>(Kp, Vp, n, l.qs, Kp, dU, Vp, dS, Vp);
      for (int t = 0; t < n; t++) scale_row(dU + t * Vp, l.beta[t], Vp);
      float suffix = 0;
      for (int t = n - 1; t >= 0; t--) suffix += rows[t] - cols[t], rows[t] = suffix;
      for (int t = 0; t < n; t++) dg[t] += rows[t];
      store_tile(a.dk, b, t0, h, n, a.K, lo, hi, dk);
      store_tile(a.dv, b, t0, h, n, a.V, lo, hi, dU);
      store_column(a.dbeta, b, t0, h, n, lo, hi, db);
      if (l.mode == SCALAR) store_column(a.dg, b, t0, h, n, lo, hi, dg);
    }
    if (a.dh0) store_state(a.dh0 + task * a.K * a.V, a.K, a.V, a.V, dS);
  });
}
"""
