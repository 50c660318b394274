"""C++: the (gated) delta rule in chunks of 64, forward and backward: op 2.

With D_ij the product of decays between j and i, A_ij = beta_i D_ij k_i.k_j for j < i, the corrected values solve (I + A) U = beta (V - e^c K S)
by blocks of rows; with U in the place of V the rest is the additive recurrence. Backward solves with the transpose.
"""

SOURCE = r"""
struct Delta : Linear {
  float *A, *KK, *KS, *beta;
  Delta(int K, int V, int mode, const Map& map) : Linear(K, V, mode, map) {
    rows = true, A = arena.zeros(n * n), KK = arena.zeros(n * n), u = arena.get(n * Vp), KS = arena.get(n * Vp), beta = arena.get(n);
  }
  float decay(int t) const { return mode == PLAIN ? 1.0f : ec[t]; }
  void load(const LinearArgs& a, int64_t b, int64_t t, int64_t h, int64_t lo, int64_t hi) {
    Linear::load(a, b, t, h, lo, hi);
    load_column(a.beta, b, t, h, n, lo, hi, beta);
    correct();
  }
  // u of this chunk. A holds -A below the diagonal, KK the plain products of keys.
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
      for (int c = 0; c < Vp; c += L) st(u + i * Vp + c, beta[i] * (ld(vv + i * Vp + c) - decay(i) * ld(KS + i * Vp + c)));
    for (int i = 0; i < n; i += MR) {
      if (i) gemm<true, false>(MR, Vp, i, A + i * n, n, u, Vp, u + i * Vp, Vp);
      for (int r = i + 1; r < i + MR; r++)
        for (int s = i; s < r; s++) axpy(u + r * Vp, A[r * n + s], u + s * Vp, Vp);
    }
  }
};

struct DeltaBackward : LinearBackward {
  Delta& c;
  float *part, *db;
  DeltaBackward(Delta& c) : LinearBackward(c), c(c) { part = arena.get(c.n * c.Kp), db = arena.get(c.n); }
  // From the gradient of u to those of values, keys, beta, decays and the state.
  void finish() {
    int n = c.n, Kp = c.Kp, Vp = c.Vp;
    double rows[64], cols[64] = {0};
    // dv becomes the gradient of the right-hand side: (I + A)^T X = dv, from the last rows up.
    for (int i0 = n - MR; i0 >= 0; i0 -= MR) {
      int below = n - i0 - MR;
      if (below) gemm<true, true>(MR, Vp, below, c.A + (i0 + MR) * n + i0, n, dv + (i0 + MR) * Vp, Vp, dv + i0 * Vp, Vp);
      for (int r = i0 + MR - 2; r >= i0; r--)
        for (int j = r + 1; j < i0 + MR; j++) axpy(dv + r * Vp, c.A[j * n + r], dv + j * Vp, Vp);
    }
    lower_product(n, Vp, dv, Vp, uT, G);  // minus the gradient of A
    gemm<false, false>(n, Kp, Vp, dv, Vp, ST, Kp, part, Kp);
    for (int t = 0; t < n; t++) {
      double s = 0;
      float beta = c.beta[t], fade = c.decay(t), read = dot(dv + t * Vp, c.KS + t * Vp, Vp);
      for (int j = 0; j < t; j++) {
        float D = c.mode == PLAIN ? 1.0f : c.D[t * n + j], x = -G[t * n + j] * D, y = x * c.KK[t * n + j];
        s += y;
        cols[j] += beta * y;
        G[t * n + j] = beta * x;
      }
      for (int j = t; j < n; j++) G[t * n + j] = 0;
      db[t] = dot(dv + t * Vp, c.vv + t * Vp, Vp) - fade * read + s;
      rows[t] = beta * (s - fade * read);
      axpy(dk + t * Kp, -beta * fade, part + t * Kp, Kp);
      for (int f = 0; f < Kp; f += L) st(c.qs + t * Kp + f, -beta * fade * ld(c.kk + t * Kp + f));
    }
    lower_rows<true>(n, Kp, G, n, c.kk, Kp, dk, Kp);
    lower_transposed(n, Kp, G, n, c.kk, Kp, dk, Kp);
    gemm<true, true>(Kp, Vp, n, c.qs, Kp, dv, Vp, dS, Vp);
    for (int t = 0; t < n; t++) scale_row(dv + t * Vp, c.beta[t], Vp);
    if (c.mode == SCALAR) add_suffixes(rows, cols);
  }
  void store(const LinearArgs& a, int64_t b, int64_t t, int64_t h, int64_t lo, int64_t hi, bool past) {
    LinearBackward::store(a, b, t, h, lo, hi, past);
    store_column(a.dbeta, b, t, h, c.n, lo, hi, db);
  }
};

extern "C" void subquad_delta(const LinearArgs* a) { forward<Delta>(*a); }
extern "C" void subquad_delta_backward(const LinearArgs* a) { backward<Delta, DeltaBackward>(*a); }
"""
