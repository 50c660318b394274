"""C++: the additive recurrence, chunk by chunk: op 1, the linear half of op 5, and what op 2 (delta_source.py) builds on.

Within a chunk, c_t is the running sum of log decays. No exponential of a difference is taken: pair decays are running products of exp(g_t) <= 1, so
nothing overflows however strong the decay, and vanishing products are zeros. For backward (linear_backward_source.py) the state before each 64 tokens
is kept.
"""

SOURCE = r"""
enum { PLAIN = 0, SCALAR = 1, VECTOR = 2 };

struct LinearArgs {  // ops 1 and 2
  Tensor q, k, v, g, beta, o, dq, dk, dv, dg, dbeta;  // backward: o is the gradient of the output
  const float *h0, *dhT;
  float *hT, *dh0, *kept;  // kept [blocks, G, state]: the state before each 64 tokens of each sequence, for backward; null: nobody asks for it
  const int64_t* seq;  // [N, 3]: row, first token, end
  int64_t N, G, R, K, V, mode, threads;
  double scale;
  Map map;  // of q and k: they have Y numbers a head then, K features
  int64_t Y;
};
// Are the gradients of a call larger than the caches? numbers: per token of all heads. (bf16 rows are not streamed.)
static bool past_caches(const Tensor& gradient, const int64_t* seq, int64_t N, int64_t numbers) {
  int64_t tokens = 0;
  for (int64_t s = 0; s < N; s++) tokens += seq[3 * s + 2] - seq[3 * s + 1];
  return gradient.type == 0 && 4 * tokens * numbers > CACHES;
}

struct Linear {  // one (sequence, key/value head)
  int K, V, Kp, Vp, mode, n;  // n: rows of a chunk
  bool sums;                  // also sums of features (the denominator): z
  bool rows;                  // keys are wanted as rows, kk, and not only as columns, kT
  float *S, *z, *kT, *kk, *kw, *vv, *u, *D, *ec, *wr, *fade, *e, *P, *qs;  // u: values as they are written
  bool empty = true;  // S and z are zeros
  Features phi;

  Linear(int K, int V, int mode, const Map& map, bool sums = false)
      : K(K), V(V), Kp(up(K)), Vp(up(V)), mode(mode), n(mode == VECTOR ? 16 : 64), sums(sums),
        rows(sums || mode == VECTOR), phi(map, K) {
    S = arena.zeros(Kp * Vp), z = arena.zeros(Kp);
    kT = arena.get(Kp * n), kk = arena.get(Kp * n), kw = arena.get(Kp * n), u = vv = arena.get(n * Vp);
    D = arena.zeros(n * n), P = arena.zeros(n * n), qs = arena.get(n * Kp);
    int width = mode == VECTOR ? Kp : 1;
    ec = arena.get(n * width), wr = arena.get(n * width), e = arena.get(n * width), fade = arena.get(Kp);
  }
  // g: where the decays of rows t.. stand (time of the queries); outside the sequence there is no decay.
  void decays(const Tensor& g, int64_t b, int64_t t, int64_t h, int64_t lo, int64_t hi) {
    if (mode == PLAIN) return;
    if (mode == SCALAR) {
      load_column(g, b, t, h, n, lo, hi, e);
      for (int i = 0; i < n; i += L) st(e + i, vexp(ld(e + i)));
      float p = 1, s = 1;
      for (int i = 0; i < n; i++) ec[i] = p *= e[i];
      for (int i = n - 1; i >= 0; i--) wr[i] = s, s *= e[i];
      fade[0] = p;
      for (int i = 0; i < n; i++) {
        if (i)
          for (int j = 0; j < up(i); j += L) st(D + i * n + j, e[i] * ld(D + (i - 1) * n + j));
        D[i * n + i] = 1;
      }
      return;
    }
    load_tile(g, b, t, h, n, K, lo, hi, e);
    for (int i = 0; i < n * Kp; i += L) st(e + i, vexp(ld(e + i)));
    for (int f = 0; f < Kp; f += L) {
      vf p = bc(1), s = bc(1);
      for (int i = 0; i < n; i++) p = p * ld(e + i * Kp + f), st(ec + i * Kp + f, p);
      for (int i = n - 1; i >= 0; i--) st(wr + i * Kp + f, s), s = s * ld(e + i * Kp + f);
      st(fade + f, p);
    }
  }
  // Keys and values that are written during this chunk: rows `from`.. (they may be other tokens than the queries').
  void keys(const Tensor& k, const Tensor& v, int64_t b, int64_t from, int64_t h, int64_t lo, int64_t hi) {
    load_tile(v, b, from, h, n, V, lo, hi, vv);
    if (!rows) return phi.load_columns(k, b, from, h, n, lo, hi, kk, kT);
    phi.load(k, b, from, h, n, lo, hi, kk);
    if (mode != VECTOR) transpose(n, Kp, kk, Kp, kT, n);
  }
  void load(const LinearArgs& a, int64_t b, int64_t t, int64_t h, int64_t lo, int64_t hi) {
    decays(a.g, b, t, h, lo, hi);
    keys(a.k, a.v, b, t, h, lo, hi);
  }
  void mask_rows(float* X) {  // what lies above the diagonal is in the diagonal's own vectors
    for (int i = 0; i < n; i++) {
      float *x = X + i * n, *d = D + i * n;
      int own = i / L * L;
      for (int j = 0; mode == SCALAR && j < own; j += L) st(x + j, ld(x + j) * ld(d + j));
      vf last = mode == SCALAR ? ld(x + own) * ld(d + own) : ld(x + own);
      st(x + own, pick(iota() <= (vi){} + (i - own), last, bc(0)));
    }
  }
  void products(const float* q, int64_t ldq) {  // vector decay: P_tj = sum_f q_t k_j prod e, by running products
    for (int j = 0; j < n; j++) {
      memcpy(qs, kk + j * Kp, 4 * Kp);
      for (int t = j; t < n; t++) {
        vf s = {};
        const float *qt = q + t * ldq, *et = e + t * Kp;
        for (int f = 0; f < Kp; f += L) {
          vf x = ld(qs + f);
          if (t > j) x = x * ld(et + f), st(qs + f, x);
          s += x * ld(qt + f);
        }
        P[t * n + j] = hsum(s);
      }
      for (int t = 0; t < j; t++) P[t * n + j] = 0;
    }
  }
  // out [n, Vp] = scale q_t . S_t; den[t] = q_t . z_t
  void read(const float* q, int64_t ldq, Place out, float* den, float scale = 1.0f, Ahead* ahead = nullptr, const Late& late = {}) {
    if (mode == VECTOR) {
      products(q, ldq);
      for (int t = 0; t < n; t++)
        for (int f = 0; f < Kp; f += L) st(qs + t * Kp + f, ld(q + t * ldq + f) * ld(ec + t * Kp + f));
      q = qs, ldq = Kp;
    } else {
      lower_product(n, Kp, q, ldq, kT, P, ahead, late);
      mask_rows(P);
    }
    lower_sum(n, Vp, empty ? 0 : Kp, q, ldq, S, mode == SCALAR ? ec : nullptr, P, u, scale, out, ahead);
    if (den)
      for (int t = 0; t < n; t++) {
        vf s = {};
        int cols = up(t / MR * MR + MR);
        for (int j = 0; j < cols && j < n; j += L) s += ld(P + t * n + j);
        den[t] = hsum(s) + (empty ? 0.0f : (mode == SCALAR ? ec[t] : 1.0f) * dot(q + t * ldq, z, Kp));
      }
  }
  void weighted_keys() {  // kw = k faded to the end of the chunk
    if (mode == PLAIN) return;
    for (int t = 0; t < n; t++)
      for (int f = 0; f < Kp; f += L) st(kw + t * Kp + f, ld(kk + t * Kp + f) * (mode == SCALAR ? bc(wr[t]) : ld(wr + t * Kp + f)));
  }
  const float* written() { return mode == PLAIN ? kk : kw; }
  void fade_state(float* X, float* x) {
    if (mode == PLAIN) return;
    for (int f = 0; f < Kp; f++) scale_row(X + f * Vp, mode == SCALAR ? fade[0] : fade[f], Vp);
    for (int f = 0; f < Kp; f += L) st(x + f, ld(x + f) * (mode == SCALAR ? bc(fade[0]) : ld(fade + f)));
  }
  void write(Ahead* ahead = nullptr) {  // the last use of a chunk's keys: kT is faded where it stands
    fade_state(S, z);
    if (mode == VECTOR) {
      weighted_keys();
      gemm<true, true, 2>(Kp, Vp, n, kw, Kp, u, Vp, S, Vp, ahead);
    } else {
      for (int f = 0; mode == SCALAR && f < Kp; f++)
        for (int t = 0; t < n; t += L) st(kT + f * n + t, ld(kT + f * n + t) * ld(wr + t));
      gemm<true, false, 2>(Kp, Vp, n, kT, n, u, Vp, S, Vp, ahead);
    }
    for (int t = 0; sums && t < n; t++) axpy(z, mode == SCALAR ? wr[t] : 1.0f, (mode == VECTOR ? kw : kk) + t * Kp, Kp);
    empty = false;
  }
  // The state as the forward keeps it for backward: [K, V], and [K] where there are sums.
  int64_t kept_size() const { return (int64_t)K * (V + sums); }
  void keep(float* dst) {
    store_state(dst, K, V, V, S);
    if (sums) memcpy(dst + K * V, z, 4 * K);
  }
  void restore(float* src, float* buf) {  // buf: where sizes need padding
    if (K % L == 0 && V % L == 0) {
      S = src, z = sums ? src + K * V : z;
      return;
    }
    S = buf, z = buf + Kp * Vp;
    load_state(src, K, V, V, S);
    memset(z, 0, 4 * Kp);
    if (sums) memcpy(z, src + K * V, 4 * K);
  }
};
constexpr int BLOCK = 64;  // tokens between kept states
static int64_t blocks_before(const int64_t* seq, int64_t s) {
  int64_t n = 0;
  for (int64_t i = 0; i < s; i++) n += (seq[3 * i + 2] - seq[3 * i + 1] + BLOCK - 1) / BLOCK;
  return n;
}

// States of several heads behind one set of tiles.
struct Heads {
  Linear& l;
  int64_t first, size;
  float* all;
  std::vector<char> empty;
  Heads(Linear& l, int64_t h0, int64_t h1) : l(l), first(h0), size(l.Kp * (l.Vp + 1)), empty(h1 - h0, 1) { all = arena.zeros((h1 - h0) * size); }
  void take(int64_t h) { l.S = all + (h - first) * size, l.z = l.S + l.Kp * l.Vp, l.empty = empty[h - first]; }
  void put(int64_t h) { empty[h - first] = l.empty; }
};

// What heads h0 .. h1 take in the chunk from t on and where its results go: the share that is asked for while head h is at work on the chunk before, a
// quarter of it from each tensor in turn. (By heads, whose rows lie apart, it is 6 % slower at 4,096 tokens, 8 heads of 64.)
static Ahead share_of_next(const LinearArgs& a, int64_t b, int64_t t, int64_t h, int64_t h0, int64_t h1, int rows, int64_t hi) {
  Ahead ahead;
  int64_t G = h1 - h0, end = std::min(hi, t + rows);
  for (int64_t i = 4 * (h - h0), last = i + 4; t < end && i < last; i++) {
    ahead.part(a.k, b, t, end, h0, G, 1, a.Y, i);
    ahead.part(a.v, b, t, end, h0, G, 1, a.V, i);
    ahead.part(a.q, b, t, end, h0 * a.R, G, a.R, a.Y, i);
    ahead.part(a.o, b, t, end, h0 * a.R, G, a.R, a.V, i);
  }
  return ahead;
}

template <class Cell>
static void forward(const LinearArgs& a) {
  parallel_heads(a.N, a.G, a.threads, [&](int64_t s, int64_t h0, int64_t h1) {
    int64_t b = a.seq[3 * s], lo = a.seq[3 * s + 1], hi = a.seq[3 * s + 2], KV = a.K * a.V;
    Cell l(a.K, a.V, a.mode, a.map);
    Heads heads(l, h0, h1);
    int64_t block = blocks_before(a.seq, s);
    float *q = arena.get(l.n * l.Kp), *out = arena.get(l.n * l.Vp);
    for (int64_t h = h0; a.h0 && h < h1; h++) {
      heads.take(h);
      load_state(a.h0 + (s * a.G + h) * KV, a.K, a.V, a.V, l.S);
      heads.empty[h - h0] = 0;
    }
    for (int64_t t = lo; t < hi; t += l.n)
      for (int64_t h = h0; h < h1; h++) {
        heads.take(h);
        if (a.kept && (t - lo) % BLOCK == 0) l.keep(a.kept + ((block + (t - lo) / BLOCK) * a.G + h) * l.kept_size());
        l.load(a, b, t, h, lo, hi);
        Ahead ahead = share_of_next(a, b, t + l.n, h, h0, h1, l.n, hi);
        for (int64_t r = 0; r < a.R; r++) {
          int64_t head = h * a.R + r, ldq;
          Late late = {};
          const float* rows = l.phi.borrow(a.q, b, t, head, l.n, lo, hi, q, ldq, l.mode == VECTOR ? nullptr : &late);
          Place to = lend_tile(a.o, b, t, head, l.n, a.V, lo, hi, out);
          l.read(rows, ldq, to, nullptr, a.scale, &ahead, late);
          if (to.p == out) store_tile(a.o, b, t, head, l.n, a.V, lo, hi, out);
        }
        if (a.hT || t + l.n < hi) l.write(&ahead);
        heads.put(h);
      }
    for (int64_t h = h0; a.hT && h < h1; h++) heads.take(h), store_state(a.hT + (s * a.G + h) * KV, a.K, a.V, a.V, l.S);
  });
}

extern "C" void subquad_additive(const LinearArgs* a) { forward<Linear>(*a); }
"""
