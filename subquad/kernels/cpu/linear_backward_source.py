"""C++: the additive recurrence backward, and what op 2 and op 5 build on.

Chunks are walked from the end, each from the state that the forward kept before its 64 tokens. Gradients of log decays are prefix or suffix sums inside a
chunk plus what crosses it whole; no difference of large sums.
"""

SOURCE = r"""
struct LinearBackward {  // around a Linear whose S, z are the state before the chunk at hand
  Linear& l;
  float *dS, *dz, *ST, *dST, *uT, *G, *dq, *dk, *dv, *dec, *tmp, *un;  // dv: gradient of u
  LinearBackward(Linear& l) : l(l) {
    int n = l.n, Kp = l.Kp, Vp = l.Vp;
    l.rows = true, dS = arena.zeros(Kp * Vp), dz = arena.zeros(Kp), ST = arena.get(Kp * Vp), dST = arena.get(Kp * Vp), uT = arena.get(Vp * n);
    G = arena.zeros(n * n), dq = arena.get(n * Kp), dk = arena.get(n * Kp), dv = arena.get(n * Vp), tmp = arena.get(n * Kp), un = arena.get(Kp);
    dec = arena.get(n * (l.mode == VECTOR ? Kp : 1));
  }
  // After load(): what the state after the chunk asks of keys, values, decays; then dS becomes the gradient of S before it, queries missing.
  void begin() {
    int n = l.n, Kp = l.Kp, Vp = l.Vp;
    transpose(n, Vp, l.u, Vp, uT, n);
    transpose(Kp, Vp, l.S, Vp, ST, Kp);
    transpose(Kp, Vp, dS, Vp, dST, Kp);
    l.weighted_keys();
    gemm<false, false>(n, Kp, Vp, l.u, Vp, dST, Kp, dk, Kp);
    if (l.sums)
      for (int t = 0; t < n; t++) axpy(dk + t * Kp, 1.0f, dz, Kp);
    gemm<false, false>(n, Vp, Kp, l.written(), Kp, dS, Vp, dv, Vp);
    if (l.mode == SCALAR) {
      double through = 0;
      for (int f = 0; f < Kp; f++) through += dot(l.S + f * Vp, dS + f * Vp, Vp);
      if (l.sums) through += dot(l.z, dz, Kp);
      through *= l.fade[0];
      for (int t = 0; t < n; t++) {
        dec[t] = through;  // keys written before t, and all of the older state, pass step t
        scale_row(dk + t * Kp, l.wr[t], Kp);
        through += dot(dk + t * Kp, l.kk + t * Kp, Kp);
      }
    }
    if (l.mode == VECTOR) {
      for (int f = 0; f < Kp; f++) un[f] = l.fade[f] * (dot(l.S + f * Vp, dS + f * Vp, Vp) + (l.sums ? l.z[f] * dz[f] : 0.0f));
      for (int t = 0; t < n; t++) {
        memcpy(dec + t * Kp, un, 4 * Kp);
        for (int f = 0; f < Kp; f += L) {
          vf x = ld(dk + t * Kp + f) * ld(l.wr + t * Kp + f);
          st(dk + t * Kp + f, x);
          st(un + f, ld(un + f) + x * ld(l.kk + t * Kp + f));
        }
      }
    }
    l.fade_state(dS, dz);
  }
  // A pair's gradient goes to the decays between its tokens: all rows from t on less all columns, in fp64, where what is in both cancels.
  void add_suffixes(const double* rows, const double* cols) {
    double suffix = 0;
    for (int t = l.n - 1; t >= 0; t--) dec[t] += suffix += rows[t] - cols[t];
  }
  // One query head: q [n, Kp], d = gradient of its output [n, Vp], dd = gradient of its denominator [n] or null. Leaves dq; adds to the rest.
  void head(const float* q, int64_t ldq, const float* d, const float* dd, Ahead* ahead = nullptr) {
    if (l.mode == VECTOR) return vector_head(q, ldq, d, dd);
    int n = l.n, Kp = l.Kp, Vp = l.Vp;
    lower_product(n, Kp, q, ldq, l.kT, l.P, ahead);
    lower_product(n, Vp, d, Vp, uT, G, ahead);
    l.mask_rows(l.P);
    for (int t = 0; dd && t < n; t++)
      for (int j = 0; j < up(t / MR * MR + MR) && j < n; j += L) st(G + t * n + j, ld(G + t * n + j) + dd[t]);
    gemm<false, false>(n, Kp, Vp, d, Vp, ST, Kp, dq, Kp, ahead);
    if (dd)
      for (int t = 0; t < n; t++) axpy(dq + t * Kp, dd[t], l.z, Kp);
    const float* faded = q;
    int64_t ldf = ldq;
    if (l.mode == SCALAR) {
      double cols[64] = {0}, rows[64];
      for (int t = 0; t < n; t++) {
        double s = 0;
        for (int j = 0; j < t; j++) {
          float x = G[t * n + j] * l.P[t * n + j];
          s += x, cols[j] += x;
        }
        scale_row(dq + t * Kp, l.ec[t], Kp);
        rows[t] = s + dot(q + t * ldq, dq + t * Kp, Kp);
        for (int f = 0; f < Kp; f += L) st(l.qs + t * Kp + f, l.ec[t] * ld(q + t * ldq + f));
      }
      add_suffixes(rows, cols);
      faded = l.qs, ldf = Kp;
    }
    l.mask_rows(G);
    lower_rows<true>(n, Kp, G, n, l.kk, Kp, dq, Kp, ahead);
    lower_transposed(n, Kp, G, n, q, ldq, dk, Kp);
    lower_transposed(n, Vp, l.P, n, d, Vp, dv, Vp);
    gemm<true, true>(Kp, Vp, n, faded, ldf, d, Vp, dS, Vp, ahead);
    if (dd)
      for (int t = 0; t < n; t++) axpy(dz, dd[t], faded + t * ldf, Kp);
  }
  void vector_head(const float* q, int64_t ldq, const float* d, const float* dd) {
    int n = l.n, Kp = l.Kp, Vp = l.Vp;
    l.products(q, ldq);
    lower_product(n, Vp, d, Vp, uT, G);
    float* extra = tmp;  // [n, Kp] gradient of the running sum of log decays at each row
    memset(extra, 0, 4 * n * Kp);
    gemm<false, false>(n, Kp, Vp, d, Vp, ST, Kp, dq, Kp);
    for (int t = 0; t < n; t++) {
      if (dd) axpy(dq + t * Kp, dd[t], l.z, Kp);
      for (int f = 0; f < Kp; f += L) {
        vf c = ld(l.ec + t * Kp + f), qt = ld(q + t * ldq + f), x = ld(dq + t * Kp + f) * c;
        st(dq + t * Kp + f, x);
        st(l.qs + t * Kp + f, qt * c);
        st(extra + t * Kp + f, x * qt);
      }
    }
    for (int j = 0; j < n; j++)
      for (int f = 0; f < Kp; f += L) {
        vf kj = ld(l.kk + j * Kp + f), u = bc(1), own = {}, out = {};
        for (int t = j; t < n; t++) {
          if (t > j) u = u * ld(l.e + t * Kp + f);
          vf g = u * (G[t * n + j] + (dd ? dd[t] : 0.0f)), qt = ld(q + t * ldq + f), x = g * kj;
          st(dq + t * Kp + f, ld(dq + t * Kp + f) + x);
          out += g * qt;
          if (t > j) {
            vf both = x * qt;
            own += both;
            st(extra + t * Kp + f, ld(extra + t * Kp + f) + both);
          }
        }
        st(dk + j * Kp + f, ld(dk + j * Kp + f) + out);
        st(extra + j * Kp + f, ld(extra + j * Kp + f) - own);
      }
    for (int f = 0; f < Kp; f += L) {
      vf suffix = {};
      for (int t = n - 1; t >= 0; t--) {
        suffix += ld(extra + t * Kp + f);
        st(dec + t * Kp + f, ld(dec + t * Kp + f) + suffix);
      }
    }
    lower_transposed(n, Vp, l.P, n, d, Vp, dv, Vp);
    gemm<true, true>(Kp, Vp, n, l.qs, Kp, d, Vp, dS, Vp);
    if (dd)
      for (int t = 0; t < n; t++) axpy(dz, dd[t], l.qs + t * Kp, Kp);
  }
  void finish() {}  // after all heads
  void store(const LinearArgs& a, int64_t b, int64_t t, int64_t h, int64_t lo, int64_t hi, bool past) {
    l.phi.store(a.dk, a.k, b, t, h, l.n, lo, hi, l.kk, l.Kp, dk, past);
    store_tile(a.dv, b, t, h, l.n, a.V, lo, hi, dv, 1.0f, past);
    store_decay(a.dg, b, t, h, lo, hi);
  }
  void store_decay(const Tensor& dg, int64_t b, int64_t t, int64_t h, int64_t lo, int64_t hi) {
    if (l.mode == SCALAR) store_column(dg, b, t, h, l.n, lo, hi, dec);
    if (l.mode == VECTOR) store_tile(dg, b, t, h, l.n, l.K, lo, hi, dec);
  }
};

// Gradients of the states of several heads behind one set of tiles.
template <class Backward>
struct HeadGradients {
  Backward& w;
  int64_t first, size;
  float* all;
  HeadGradients(Backward& w, int64_t h0, int64_t h1) : w(w), first(h0), size(w.l.Kp * (w.l.Vp + 1)) { all = arena.zeros((h1 - h0) * size); }
  void take(int64_t h) { w.dS = all + (h - first) * size, w.dz = w.dS + w.l.Kp * w.l.Vp; }
};

// Backward: the gradients of query head r where they are not streamed, then what the next one takes; before the first head, the chunk before.
static Ahead rows_before(const LinearArgs& a, int64_t b, int64_t t, int64_t h, int64_t r, int64_t h0, int64_t h1, int rows, int64_t lo, int64_t hi,
                         bool past) {
  Ahead ahead;
  if (!past) ahead.want(a.dq, b, t, h * a.R + r, rows, a.Y, hi);
  if (r + 1 == a.R) {
    if (!past) ahead.want(a.dk, b, t, h, rows, a.Y, hi), ahead.want(a.dv, b, t, h, rows, a.V, hi);
    if (++h == h1) h = h0, t -= rows;
    if (t < lo) return ahead;
    r = -1;
    ahead.want(a.k, b, t, h, rows, a.Y, hi);
    ahead.want(a.v, b, t, h, rows, a.V, hi);
  }
  ahead.want(a.q, b, t, h * a.R + r + 1, rows, a.Y, hi);
  ahead.want(a.o, b, t, h * a.R + r + 1, rows, a.V, hi);
  return ahead;
}

// The states before each chunk of a block of 64 tokens: the first was kept, the others (vector decay: chunks of 16) are written again.
struct BlockStates {
  Linear& l;
  int64_t size;
  float *own, *S[BLOCK / 16], *z[BLOCK / 16];
  BlockStates(Linear& l) : l(l), size(l.Kp * (l.Vp + 1)), own(arena.get(BLOCK / l.n * size)) {}
  template <class Load>
  void fill(float* kept, int count, Load load) {  // load(c): chunk c's decays, keys and values
    l.restore(kept, own);
    for (int c = 0;; c++) {
      S[c] = l.S, z[c] = l.z;
      if (c + 1 == count) break;
      float* next = own + (c + 1) * size;
      memcpy(next, l.S, 4 * l.Kp * l.Vp), memcpy(next + l.Kp * l.Vp, l.z, 4 * l.Kp);
      l.S = next, l.z = next + l.Kp * l.Vp;
      load(c);
      l.write();
    }
  }
  void take(int c) { l.S = S[c], l.z = z[c]; }
};

template <class Cell, class Backward>
static void backward(const LinearArgs& a) {
  parallel_heads(a.N, a.G, a.threads, [&](int64_t s, int64_t h0, int64_t h1) {
    int64_t b = a.seq[3 * s], lo = a.seq[3 * s + 1], hi = a.seq[3 * s + 2], KV = a.K * a.V, block = blocks_before(a.seq, s);
    Cell l(a.K, a.V, a.mode, a.map);
    Backward w(l);
    HeadGradients<Backward> gradients(w, h0, h1);
    BlockStates states(l);
    l.empty = false;
    float *q = arena.get(l.n * l.Kp), *d = arena.get(l.n * l.Vp);
    bool past = past_caches(a.dq, a.seq, a.N, a.G * (a.R * a.Y + a.Y + a.V));
    auto kept = [&](int64_t i, int64_t h) { return a.kept + ((block + i) * a.G + h) * l.kept_size(); };
    for (int64_t h = h0; a.dhT && h < h1; h++) gradients.take(h), load_state(a.dhT + (s * a.G + h) * KV, a.K, a.V, a.V, w.dS);
    for (int64_t i = (hi - lo + BLOCK - 1) / BLOCK - 1; i >= 0; i--)
      for (int64_t h = h0; h < h1; h++) {
        int64_t from = lo + i * BLOCK, left = hi - from < BLOCK ? hi - from : BLOCK, chunks = (left + l.n - 1) / l.n;
        gradients.take(h);
        states.fill(kept(i, h), chunks, [&](int c) { l.load(a, b, from + c * l.n, h, lo, hi); });
        for (int64_t c = chunks - 1; c >= 0; c--) {
          int64_t t = from + c * l.n;
          states.take(c);
          l.load(a, b, t, h, lo, hi);
          w.begin();
          for (int64_t r = 0; r < a.R; r++) {
            l.phi.load(a.q, b, t, h * a.R + r, l.n, lo, hi, q);
            load_tile(a.o, b, t, h * a.R + r, l.n, a.V, lo, hi, d, a.scale);
            Ahead ahead = rows_before(a, b, t, h, r, h0, h1, l.n, lo, hi, past);
            if (r + 1 == a.R && c == 0 && (h + 1 < h1 || i > 0)) ahead.want(h + 1 < h1 ? kept(i, h + 1) : kept(i - 1, h0), l.kept_size());
            w.head(q, l.Kp, d, nullptr, &ahead);
            l.phi.store(a.dq, a.q, b, t, h * a.R + r, l.n, lo, hi, q, l.Kp, w.dq, past);
          }
          w.finish();
          w.store(a, b, t, h, lo, hi, past);
        }
      }
    for (int64_t h = h0; a.dh0 && h < h1; h++) gradients.take(h), store_state(a.dh0 + (s * a.G + h) * KV, a.K, a.V, a.V, w.dS);
  });
}

extern "C" void subquad_additive_backward(const LinearArgs* a) { backward<Linear, LinearBackward>(*a); }
"""
