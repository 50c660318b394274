"""C++: banded attention, forward and backward, 64 queries at a time: op 3, and the window's half of op 5 (window_linear_source.py).

Keys are kept in blocks of 64, transposed once and reused by every query block that sees them. Coordinates are those of the queries: slot x >= 0 is
the token of query x, x < 0 an earlier one. A block of 8 queries multiplies only the columns that its band covers.
"""

SOURCE = r"""
struct WindowArgs {
  Tensor q, k, v, sk, sv;               // sk, sv: sinks (their own tensors, or k and v again)
  Tensor o, den, top;                   // op 3: numerator, denominator, maximum; op 5: output, -, log of the whole mass
  Tensor fq, fk, mix, g;                // op 5
  Tensor dout, dden;                    // backward: gradients of o (op 3: of the numerator) and of the denominator; centred: that of o / den, and den
  Tensor dq, dk, dv, dsk, dsv, dfq, dfk, dmix, dg;
  const float *h0, *dhT;
  float *hT, *dh0, *kept;               // kept: as in LinearArgs, the state before each 64 queries
  const int64_t* seq;
  int64_t N, G, R, K, V, F, mode, threads;
  int64_t window, sinks, before, position;  // before: slots in front of the first query; sinks from the first tokens when own_sinks is 0
  int64_t own_sinks, need_window, centred;
  double scale;
  Map map;  // of fq and fk: they have Y numbers a head then, F features
  int64_t Y;
};
constexpr int BQ = 64;
constexpr float NONE = -INFINITY;

struct Window {
  const WindowArgs& a;
  int64_t b, h, lo, hi, ks;  // tokens lo..hi of row b; ks: where slot x stands in k and v is ks + x
  int K, V, Kp, Vp, sp, width;
  int64_t blocks;
  float *kT, *vb, *skT, *sv, *P, *rowtop;
  int64_t have;              // key blocks below this one are loaded
  Window(const WindowArgs& a, int64_t b, int64_t h, int64_t lo, int64_t hi, bool left = false) : a(a), b(b), h(h), lo(lo), hi(hi) {
    ks = lo + a.before;
    K = a.K, V = a.V, Kp = up(K), Vp = up(V), sp = up(a.sinks);
    // A band of 64 queries spans at most this many; left: with the tokens that leave the window meanwhile
    blocks = (a.window - (left ? 1 : 2) + BQ) / BQ + 1;
    int64_t all = (a.before + BQ - 1) / BQ + (hi - lo + BQ - 1) / BQ;  // a window longer than the sequence
    if (blocks > all) blocks = all > 1 ? all : 1;
    width = sp + blocks * BQ;
    kT = arena.get(blocks * Kp * BQ), vb = arena.get(blocks * BQ * Vp), P = arena.zeros(BQ * width);
    skT = arena.get(Kp * sp + 1), sv = arena.get(sp * Vp + 1);
    have = -blocks;
    if (sp) {
      float* tile = arena.get(sp * Kp);
      int64_t from = a.own_sinks ? 0 : ks, end = a.own_sinks ? a.sinks : ks + (a.sinks < hi - lo ? a.sinks : hi - lo);
      load_tile(a.sk, b, from, h, sp, K, from, end, tile, a.scale);
      transpose(sp, Kp, tile, Kp, skT, sp);
      load_tile(a.sv, b, from, h, sp, V, from, end, sv);
    }
  }
  float* keys(int64_t block) { return kT + ((block % blocks + blocks) % blocks) * Kp * BQ; }
  float* values(int64_t block) { return vb + ((block % blocks + blocks) % blocks) * BQ * Vp; }
  void load_block(int64_t block, float* tile) {
    load_tile(a.k, b, ks + block * BQ, h, BQ, K, ks - a.before, ks + hi - lo, tile, a.scale);  // the scale sits in the keys
    transpose(BQ, Kp, tile, Kp, keys(block), BQ);
    load_tile(a.v, b, ks + block * BQ, h, BQ, V, ks - a.before, ks + hi - lo, values(block));
  }
  int64_t block_of(int64_t x) const {
    if (x < -a.before) x = -a.before;
    return x >= 0 ? x / BQ : -((-x + BQ - 1) / BQ);
  }
  int64_t first_block(int64_t i) const { return block_of(i * BQ - a.window + 1); }  // the oldest key block that query block i sees
  // Columns of rows r .. r + MR - 1 of query block i, relative to the first block.
  void columns(int64_t i, int r, int& c0, int& c1) const {
    int64_t first = first_block(i) * BQ, x0 = i * BQ + r - a.window + 1;
    if (x0 < -a.before) x0 = -a.before;
    c0 = (x0 - first) / L * L;
    c1 = up(i * BQ + r + MR - first);
  }
  template <class Fn>
  void pieces(int64_t first, int c0, int c1, Fn fn) const {  // split [c0, c1) at block borders
    for (int c = c0; c < c1;) {
      int inside = c % BQ, len = BQ - inside < c1 - c ? BQ - inside : c1 - c;
      fn(first + c / BQ, inside, c, len);
      c += len;
    }
  }
  bool sinks_seen(int64_t i, int r) const { return sp && a.position + i * BQ + r + MR - 1 >= a.window; }
  // P row = q.(scale k) inside the band and of the sinks seen, NONE elsewhere in the columns touched.
  void scores(int64_t i, int r, const float* q, int64_t ldq, int c0, int c1, Ahead* ahead) {
    int64_t first = first_block(i);
    float* p = P + r * width;
    if (sinks_seen(i, r)) gemm<false, false>(MR, sp, Kp, q, ldq, skT, sp, p, width, ahead);
    pieces(first, c0, c1, [&](int64_t block, int inside, int c, int len) {
      gemm<false, false>(MR, len, Kp, q, ldq, keys(block) + inside, BQ, p + sp + c, width, ahead);
    });
  }
  vi band(int64_t x0, int64_t t) const {  // which of slots x0 .. x0 + L - 1 query t sees
    int32_t low = t - a.window + 1 > -a.before ? t - a.window + 1 : -a.before;
    vi x = iota() + (int32_t)x0;
    return (x >= (vi){} + low) & (x <= (vi){} + (int32_t)t);
  }
  vi sinks_band(int n0, int64_t t) const {
    int64_t gone = a.position + t - a.window;  // sinks 0 .. gone have left the window
    int32_t end = gone + 1 < a.sinks ? (gone + 1 > 0 ? gone + 1 : 0) : a.sinks;
    return iota() + n0 < (vi){} + end;
  }
  // Weights exp(s - m) of rows r.. into P (zeros outside), m = given[row] or the row's own maximum; total mass and m out.
  void weights(int64_t i, int r, int c0, int c1, const float* given, float* den, float* top) {
    int64_t first = first_block(i) * BQ;
    bool sinks = sinks_seen(i, r);
    for (int m = 0; m < MR; m++) {
      float* p = P + (r + m) * width;
      int64_t t = i * BQ + r + m;
      float high;
      if (given) high = given[r + m];
      else {
        vf mx = bc(NONE);
        for (int c = 0; sinks && c < sp; c += L) mx = vmax(mx, pick(sinks_band(c, t), ld(p + c), bc(NONE)));
        for (int c = c0; c < c1; c += L) mx = vmax(mx, pick(band(first + c, t), ld(p + sp + c), bc(NONE)));
        high = hmax(mx);
      }
      vf sum = {};
      for (int c = 0; sinks && c < sp; c += L) {
        vf w = vexp(pick(sinks_band(c, t), ld(p + c) - high, bc(NONE)));
        st(p + c, w);
        sum += w;
      }
      for (int c = c0; c < c1; c += L) {
        vf w = vexp(pick(band(first + c, t), ld(p + sp + c) - high, bc(NONE)));
        st(p + sp + c, w);
        sum += w;
      }
      if (den) den[r + m] = hsum(sum), top[r + m] = high;
    }
  }
  // out [BQ, Vp], den, top of query block i
  void forward(int64_t i, const float* q, int64_t ldq, float* out, float* den, float* top, Ahead* ahead = nullptr) {
    int64_t first = first_block(i);
    int c0, c1, end = hi - lo - i * BQ < BQ ? hi - lo - i * BQ : BQ;
    for (int r = 0; r < end; r += MR) {  // all scores first: keys and values together are more than the first cache level holds
      columns(i, r, c0, c1);
      scores(i, r, q + r * ldq, ldq, c0, c1, ahead);
      weights(i, r, c0, c1, nullptr, den, top);
    }
    for (int r = 0; r < end; r += MR) {
      columns(i, r, c0, c1);
      float* o = out + r * Vp;
      bool begun = false;
      if (sinks_seen(i, r)) gemm<false, false>(MR, Vp, sp, P + r * width, width, sv, Vp, o, Vp, ahead), begun = true;
      pieces(first, c0, c1, [&](int64_t block, int inside, int c, int len) {
        if (begun) gemm<true, false>(MR, Vp, len, P + r * width + sp + c, width, values(block) + inside * Vp, Vp, o, Vp, ahead);
        else gemm<false, false>(MR, Vp, len, P + r * width + sp + c, width, values(block) + inside * Vp, Vp, o, Vp, ahead);
        begun = true;
      });
    }
  }
};

// Weights exp(s - given), ds = w (d.v + dd); centred: w (d.v - sum w (d.v) / dd), 0 to the last digit where there is one key.
// Query blocks come from the last to the first: gradients of keys and values are kept for as many key blocks as
// a band spans, and written when the last query that sees them is done; those of sinks among the first tokens stay to the end.
struct WindowBackward {
  Window& w;
  float *dK, *dV, *dsK, *dsV, *vT, *kk, *svT, *skk, *G;
  bool past;           // gradients are streamed
  int64_t held, have;  // key blocks 0 .. held - 1 have sinks; have: the next block to load
  WindowBackward(Window& w, bool past) : w(w), past(past) {
    const WindowArgs& a = w.a;
    int64_t T = w.hi - w.lo;
    held = a.own_sinks ? 0 : ((a.sinks < T ? a.sinks : T) + BQ - 1) / BQ, have = (T + BQ - 1) / BQ - 1;
    dK = arena.zeros((w.blocks + held) * BQ * w.Kp), dV = arena.zeros((w.blocks + held) * BQ * w.Vp);
    dsK = arena.zeros(w.sp * w.Kp + 1), dsV = arena.zeros(w.sp * w.Vp + 1);
    vT = arena.get(w.blocks * w.Vp * BQ), kk = arena.get(w.blocks * w.Kp * BQ), G = arena.zeros(BQ * w.width);
    svT = arena.get(w.Vp * w.sp + 1), skk = arena.get(w.Kp * w.sp + 1);
    if (w.sp) transpose(w.sp, w.Vp, w.sv, w.Vp, svT, w.sp), transpose(w.Kp, w.sp, w.skT, w.sp, skk, w.Kp);
  }
  int slot(int64_t block) const { return (block % w.blocks + w.blocks) % w.blocks; }
  int64_t place(int64_t block) const { return (block >= 0 && block < held ? w.blocks + block : slot(block)) * BQ; }
  float* keys_gradient(int64_t block) { return dK + place(block) * w.Kp; }
  float* values_gradient(int64_t block) { return dV + place(block) * w.Vp; }
  // Before query block i: keys and values down to the one that leaves the window of its first query (Window's `left`).
  void open(int64_t i) {
    for (int64_t low = w.block_of(i * BQ - w.a.window); have >= low; have--) {
      w.load_block(have, kk + slot(have) * w.Kp * BQ);
      transpose(BQ, w.Vp, w.values(have), w.Vp, vT + slot(have) * w.Vp * BQ, BQ);
      memset(keys_gradient(have), 0, 4 * BQ * w.Kp), memset(values_gradient(have), 0, 4 * BQ * w.Vp);
    }
  }
  void close(int64_t block) {  // after query block `block`
    if (block < 0 || block >= held) store(block, keys_gradient(block), values_gradient(block));
  }
  void store(int64_t block, const float* k, const float* v) {
    store_tile(w.a.dk, w.b, w.ks + block * BQ, w.h, BQ, w.K, w.ks - w.a.before, w.ks + w.hi - w.lo, k, w.a.scale, past);
    store_tile(w.a.dv, w.b, w.ks + block * BQ, w.h, BQ, w.V, w.ks - w.a.before, w.ks + w.hi - w.lo, v, 1.0f, past);
  }
  void end() {  // sinks, slots before the first query, and zeros for those that no query sees
    const WindowArgs& a = w.a;
    for (int64_t n = 0; held && n < a.sinks && n < w.hi - w.lo; n++) {
      axpy(keys_gradient(n / BQ) + n % BQ * w.Kp, 1.0f, dsK + n * w.Kp, w.Kp);
      axpy(values_gradient(n / BQ) + n % BQ * w.Vp, 1.0f, dsV + n * w.Vp, w.Vp);
    }
    for (int64_t x = 0; x < held; x++) store(x, keys_gradient(x), values_gradient(x));
    if (w.sp && a.own_sinks) {
      store_tile(a.dsk, w.b, 0, w.h, a.sinks, a.K, 0, a.sinks, dsK, a.scale);
      store_tile(a.dsv, w.b, 0, w.h, a.sinks, a.V, 0, a.sinks, dsV);
    }
    int64_t x = -1;
    for (; x > have; x--) close(x);
    memset(dK, 0, 4 * BQ * w.Kp), memset(dV, 0, 4 * BQ * w.Vp);
    for (; x * BQ > -a.before - BQ; x--) store(x, dK, dV);
  }
  void block(int64_t i, const float* q, int64_t ldq, const float* d, const float* dd, const float* given, float* dq, Ahead* ahead) {
    int64_t first = w.first_block(i);
    int Kp = w.Kp, Vp = w.Vp, sp = w.sp, width = w.width, c0, c1, seen = BQ;  // seen: the first row that sees sinks
    for (int r = 0; r < BQ; r += MR) {
      w.columns(i, r, c0, c1);
      w.scores(i, r, q + r * ldq, ldq, c0, c1, ahead);
      w.weights(i, r, c0, c1, given, nullptr, nullptr);
      if (seen == BQ && w.sinks_seen(i, r)) seen = r;
    }
    for (int r = 0; r < BQ; r += MR) {
      w.columns(i, r, c0, c1);
      const float *dr = d + r * Vp, *p = w.P + r * width;
      float* g = G + r * width;
      if (r >= seen) gemm<false, false>(MR, sp, Vp, dr, Vp, svT, sp, g, width, ahead);
      w.pieces(first, c0, c1, [&](int64_t block, int inside, int c, int len) {
        gemm<false, false>(MR, len, Vp, dr, Vp, vT + slot(block) * Vp * BQ + inside, BQ, g + sp + c, width, ahead);
      });
      for (int m = 0; m < MR; m++) {
        const float* pm = p + m * width;
        float* gm = g + m * width;
        vf add = bc(dd[r + m]);
        if (w.a.centred) {
          vf sum = {};
          for (int c = 0; r >= seen && c < sp; c += L) sum += ld(pm + c) * ld(gm + c);
          for (int c = sp + c0; c < sp + c1; c += L) sum += ld(pm + c) * ld(gm + c);
          add = bc(dd[r + m] > 0 ? -hsum(sum) / dd[r + m] : 0.0f);
        }
        for (int c = 0; r >= seen && c < sp; c += L) st(gm + c, ld(pm + c) * (ld(gm + c) + add));
        for (int c = sp + c0; c < sp + c1; c += L) st(gm + c, ld(pm + c) * (ld(gm + c) + add));
      }
    }
    for (int r = 0; r < BQ; r += MR) {
      w.columns(i, r, c0, c1);
      const float* g = G + r * width;
      float* out = dq + r * Kp;
      memset(out, 0, 4 * MR * Kp);
      if (r >= seen) gemm<true, false>(MR, Kp, sp, g, width, skk, Kp, out, Kp, ahead);
      w.pieces(first, c0, c1, [&](int64_t block, int inside, int c, int len) {
        gemm<true, false>(MR, Kp, len, g + sp + c, width, kk + slot(block) * Kp * BQ + inside * Kp, Kp, out, Kp, ahead);
      });
    }
    if (seen < BQ) {
      gemm<true, true>(sp, Kp, BQ - seen, G + seen * width, width, q + seen * ldq, ldq, dsK, Kp, ahead);
      gemm<true, true>(sp, Vp, BQ - seen, w.P + seen * width, width, d + seen * Vp, Vp, dsV, Vp, ahead);
    }
    // Keys gather from all 64 queries at once: for each block of 8 columns, the rows whose band touches it.
    w.pieces(first, 0, int((i + 1 - first) * BQ), [&](int64_t block, int, int c, int len) {
      for (int s = 0; s < len; s += MR) {
        int64_t x = block * BQ + s;  // rows t with x - 0 <= t (t >= x) and t <= x + MR - 1 + window - 1, whole register blocks, computed columns only
        int64_t from = x - i * BQ, to = x + MR - 1 + w.a.window - i * BQ;
        if (to <= 0) continue;
        int r0 = from > 0 ? int(from / MR * MR) : 0, r1 = to < BQ ? int((to + MR - 1) / MR * MR) : BQ;
        if (r0 >= r1) continue;
        const float *g = G + r0 * width + sp + c + s, *p = w.P + r0 * width + sp + c + s;
        gemm<true, true>(MR, Kp, r1 - r0, g, width, q + r0 * ldq, ldq, keys_gradient(block) + s * Kp, Kp, ahead);
        gemm<true, true>(MR, Vp, r1 - r0, p, width, d + r0 * Vp, Vp, values_gradient(block) + s * Vp, Vp, ahead);
      }
    });
  }
};

extern "C" void subquad_banded(const WindowArgs* pa) {
  const WindowArgs& a = *pa;
  parallel(a.N * a.G, a.threads, [&](int64_t task) {
    int64_t s = task / a.G, h = task % a.G, b = a.seq[3 * s], lo = a.seq[3 * s + 1], hi = a.seq[3 * s + 2], ld;
    Window w(a, b, h, lo, hi);
    float *tile = arena.get(BQ * w.Kp), *buf = arena.get(BQ * w.Kp), *out = arena.get(BQ * w.Vp), den[BQ], top[BQ];
    w.have = w.first_block(0);
    for (int64_t i = 0, t = lo; t < hi; i++, t += BQ) {
      for (; w.have <= i; w.have++) w.load_block(w.have, tile);
      for (int64_t r = 0; r < a.R; r++) {
        const float* q = borrow_tile(a.q, b, t, h * a.R + r, BQ, a.K, lo, hi, buf, ld);
        w.forward(i, q, ld, out, den, top);
        store_tile(a.o, b, t, h * a.R + r, BQ, a.V, lo, hi, out);
        store_column(a.den, b, t, h * a.R + r, BQ, lo, hi, den);
        store_column(a.top, b, t, h * a.R + r, BQ, lo, hi, top);
      }
    }
  });
}

// While the gradients of query head r are computed: where they go if they are not streamed, then what the next one takes, or the block before.
static Ahead rows_before(const WindowArgs& a, int64_t b, int64_t t, int64_t h, int64_t r, int64_t lo, int64_t hi,
                         bool past) {
  Ahead ahead;
  int64_t head = h * a.R + r, ks = t + a.before, end = hi + a.before;
  if (!past) ahead.want(a.dq, b, t, head, BQ, a.K, hi);
  if (r + 1 == a.R) {
    if (!past) ahead.want(a.dk, b, ks, h, BQ, a.K, end), ahead.want(a.dv, b, ks, h, BQ, a.V, end);
    t -= BQ, head = h * a.R - 1;
    if (t < lo) return ahead;
    int64_t low = ks - BQ - a.window;
    if (low >= lo) ahead.want(a.k, b, low, h, BQ, a.K, end), ahead.want(a.v, b, low, h, BQ, a.V, end);
  }
  ahead.want(a.q, b, t, head + 1, BQ, a.K, hi);
  ahead.want(a.dout, b, t, head + 1, BQ, a.V, hi);
  return ahead;
}

struct BandedRows {
  const WindowArgs& a;
  int64_t b, lo, hi;
  float *d, dd[BQ], given[BQ];
  void load(int64_t t, int64_t head, int rows) {
    load_tile(a.dout, b, t, head, rows, a.V, lo, hi, d);
    load_column(a.dden, b, t, head, rows, lo, hi, dd);
    load_column(a.top, b, t, head, rows, lo, hi, given, INFINITY);
  }
};

extern "C" void subquad_banded_backward(const WindowArgs* pa) {
  const WindowArgs& a = *pa;
  parallel(a.N * a.G, a.threads, [&](int64_t task) {
    int64_t s = task / a.G, h = task % a.G, b = a.seq[3 * s], lo = a.seq[3 * s + 1], hi = a.seq[3 * s + 2];
    Window f(a, b, h, lo, hi, true);
    bool past = past_caches(a.dq, a.seq, a.N, a.G * (a.R * a.K + a.K + a.V));
    WindowBackward w(f, past);
    BandedRows rows{a, b, lo, hi, arena.get(BQ * f.Vp)};
    float *buf = arena.get(BQ * f.Kp), *dq = arena.get(BQ * f.Kp);
    for (int64_t i = (hi - lo + BQ - 1) / BQ - 1; i >= 0; i--) {
      int64_t t = lo + i * BQ;
      w.open(i);
      for (int64_t r = 0; r < a.R; r++) {
        load_tile(a.q, b, t, h * a.R + r, BQ, a.K, lo, hi, buf);
        rows.load(t, h * a.R + r, BQ);
        Ahead ahead = rows_before(a, b, t, h, r, lo, hi, past);
        w.block(i, buf, f.Kp, rows.d, rows.dd, rows.given, dq, &ahead);
        store_tile(a.dq, b, t, h * a.R + r, BQ, a.K, lo, hi, dq, 1.0f, past);
      }
      w.close(i);
    }
    w.end();
  });
}
"""
