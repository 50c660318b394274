"""C++: banded attention, forward and backward, 64 queries at a time: op 3, and the window's half of op 5 (window_linear_source.py).

Keys are kept in blocks of 64, transposed once and reused by every query block that sees them. Coordinates are those of the queries: slot x >= 0 is
the token of query x, x < 0 an earlier one. A block of 8 queries multiplies only the columns that its band covers.
"""

SOURCE = r"""
struct WindowArgs {
  Tensor q, k, v, sk, sv;               // sk, sv: sinks (their own tensors, or k and v again)
  Tensor o, den, top;                   // op 3: numerator, denominator, maximum; op 5: output, -, log of the whole mass
  Tensor fq, fk, mix, g;                // op 5
  Tensor dout, dden;                    // backward: gradients of o (op 3: of the numerator) and of the denominator
  Tensor dq, dk, dv, dsk, dsv, dfq, dfk, dmix, dg;
  const float *h0, *dhT;
  float *hT, *dh0, *kept;               // kept: as in LinearArgs, the state before each 64 queries
  const int64_t* seq;
  int64_t N, G, R, K, V, F, mode, threads;
  int64_t window, sinks, before, position;  // before: slots in front of the first query; sinks from the first tokens when own_sinks is 0
  int64_t own_sinks, need_window;
  double scale;
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
  Window(const WindowArgs& a, int64_t b, int64_t h, int64_t lo, int64_t hi) : a(a), b(b), h(h), lo(lo), hi(hi) {
    ks = lo + a.before;
    K = a.K, V = a.V, Kp = up(K), Vp = up(V), sp = up(a.sinks);
    blocks = (a.window - 2 + BQ) / BQ + 1;  // a band of 64 queries spans at most this many
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
  int64_t first_block(int64_t i) const {  // the oldest key block that query block i sees
    int64_t x = i * BQ - a.window + 1;
    if (x < -a.before) x = -a.before;
    return x >= 0 ? x / BQ : -((-x + BQ - 1) / BQ);
  }
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
  void scores(int64_t i, int r, const float* q, int64_t ldq, int c0, int c1) {
    int64_t first = first_block(i);
    float* p = P + r * width;
    if (sinks_seen(i, r)) gemm<false, false>(MR, sp, Kp, q, ldq, skT, sp, p, width);
    pieces(first, c0, c1, [&](int64_t block, int inside, int c, int len) {
      gemm<false, false>(MR, len, Kp, q, ldq, keys(block) + inside, BQ, p + sp + c, width);
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
  void forward(int64_t i, const float* q, int64_t ldq, float* out, float* den, float* top) {
    int64_t first = first_block(i);
    for (int r = 0; r < BQ && lo + i * BQ + r < hi; r += MR) {
      int c0, c1;
      columns(i, r, c0, c1);
      scores(i, r, q + r * ldq, ldq, c0, c1);
      weights(i, r, c0, c1, nullptr, den, top);
      float* o = out + r * Vp;
      bool begun = false;
      if (sinks_seen(i, r)) gemm<false, false>(MR, Vp, sp, P + r * width, width, sv, Vp, o, Vp), begun = true;
      pieces(first, c0, c1, [&](int64_t block, int inside, int c, int len) {
        if (begun) gemm<true, false>(MR, Vp, len, P + r * width + sp + c, width, values(block) + inside * Vp, Vp, o, Vp);
        else gemm<false, false>(MR, Vp, len, P + r * width + sp + c, width, values(block) + inside * Vp, Vp, o, Vp);
        begun = true;
      });
    }
  }
};

struct WindowBackward {  // weights exp(s - given), ds = w (d.v + dd)
  Window& w;
  float *dK, *dV, *dsK, *dsV, *vT, *kk, *svT, *skk, *G;
  int64_t slots;
  WindowBackward(Window& w) : w(w) {
    const WindowArgs& a = w.a;
    slots = (a.before + BQ - 1) / BQ * BQ + (w.hi - w.lo + BQ - 1) / BQ * BQ;
    dK = arena.zeros(slots * w.Kp + 1), dV = arena.zeros(slots * w.Vp + 1);
    dsK = arena.zeros(w.sp * w.Kp + 1), dsV = arena.zeros(w.sp * w.Vp + 1);
    vT = arena.get(w.blocks * w.Vp * BQ), kk = arena.get(w.blocks * w.Kp * BQ), G = arena.zeros(BQ * w.width);
    svT = arena.get(w.Vp * w.sp + 1), skk = arena.get(w.Kp * w.sp + 1);
    if (w.sp) transpose(w.sp, w.Vp, w.sv, w.Vp, svT, w.sp), transpose(w.Kp, w.sp, w.skT, w.sp, skk, w.Kp);
  }
  int64_t row(int64_t x) const { return x + (w.a.before + BQ - 1) / BQ * BQ; }
  int slot(int64_t block) const { return (block % w.blocks + w.blocks) % w.blocks; }
  void load_block(int64_t block) {
    float* tile = kk + slot(block) * w.Kp * BQ;
    w.load_block(block, tile);
    transpose(BQ, w.Vp, w.values(block), w.Vp, vT + slot(block) * w.Vp * BQ, BQ);
  }
  void block(int64_t i, const float* q, int64_t ldq, const float* d, const float* dd, const float* given, float* dq) {
    int64_t first = w.first_block(i);
    int Kp = w.Kp, Vp = w.Vp, sp = w.sp, width = w.width;
    for (int r = 0; r < BQ; r += MR) {
      int c0, c1;
      w.columns(i, r, c0, c1);
      const float *qr = q + r * ldq, *dr = d + r * Vp;
      float *p = w.P + r * width, *g = G + r * width;
      bool sinks = w.sinks_seen(i, r);
      w.scores(i, r, qr, ldq, c0, c1);
      w.weights(i, r, c0, c1, given, nullptr, nullptr);
      if (sinks) gemm<false, false>(MR, sp, Vp, dr, Vp, svT, sp, g, width);
      w.pieces(first, c0, c1, [&](int64_t block, int inside, int c, int len) {
        gemm<false, false>(MR, len, Vp, dr, Vp, vT + slot(block) * Vp * BQ + inside, BQ, g + sp + c, width);
      });
      for (int m = 0; m < MR; m++) {
        float *pm = p + m * width, *gm = g + m * width;
        vf add = bc(dd[r + m]);
        for (int c = 0; sinks && c < sp; c += L) st(gm + c, ld(pm + c) * (ld(gm + c) + add));
        for (int c = sp + c0; c < sp + c1; c += L) st(gm + c, ld(pm + c) * (ld(gm + c) + add));
      }
      float* out = dq + r * Kp;
      memset(out, 0, 4 * MR * Kp);
      if (sinks) {
        gemm<true, false>(MR, Kp, sp, g, width, skk, Kp, out, Kp);
        gemm<true, true>(sp, Kp, MR, g, width, qr, ldq, dsK, Kp);
        gemm<true, true>(sp, Vp, MR, p, width, dr, Vp, dsV, Vp);
      }
      w.pieces(first, c0, c1, [&](int64_t block, int inside, int c, int len) {
        gemm<true, false>(MR, Kp, len, g + sp + c, width, kk + slot(block) * Kp * BQ + inside * Kp, Kp, out, Kp);
      });
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
        gemm<true, true>(MR, Kp, r1 - r0, g, width, q + r0 * ldq, ldq, dK + row(x) * Kp, Kp);
        gemm<true, true>(MR, Vp, r1 - r0, p, width, d + r0 * Vp, Vp, dV + row(x) * Vp, Vp);
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

static void store_window(const WindowArgs& a, WindowBackward& w, int64_t b, int64_t h, int64_t lo, int64_t hi) {
  const Window& f = w.w;
  if (f.sp && !a.own_sinks)
    for (int64_t n = 0; n < a.sinks && n < hi - lo; n++) {
      axpy(w.dK + w.row(n) * f.Kp, 1.0f, w.dsK + n * f.Kp, f.Kp);
      axpy(w.dV + w.row(n) * f.Vp, 1.0f, w.dsV + n * f.Vp, f.Vp);
    }
  if (f.sp && a.own_sinks) {
    store_tile(a.dsk, b, 0, h, a.sinks, a.K, 0, a.sinks, w.dsK, a.scale);
    store_tile(a.dsv, b, 0, h, a.sinks, a.V, 0, a.sinks, w.dsV);
  }
  store_tile(a.dk, b, f.ks - a.before, h, a.before + hi - lo, a.K, 0, INT64_MAX, w.dK + w.row(-a.before) * f.Kp, a.scale);
  store_tile(a.dv, b, f.ks - a.before, h, a.before + hi - lo, a.V, 0, INT64_MAX, w.dV + w.row(-a.before) * f.Vp);
}

// Rows gives what the gradients of a head's rows t .. t + 63 start from: load(t, head) fills d, dd and given as WindowBackward::block takes them.
template <class Rows>
static void window_backward(const WindowArgs& a, Window& f, WindowBackward& w, Rows& rows) {
  int64_t ld;
  float *buf = arena.get(BQ * f.Kp), *dq = arena.get(BQ * f.Kp);
  f.have = f.first_block(0);
  for (int64_t i = 0, t = f.lo; t < f.hi; i++, t += BQ) {
    for (; f.have <= i; f.have++) w.load_block(f.have);
    for (int64_t r = 0; r < a.R; r++) {
      int64_t head = f.h * a.R + r;
      const float* q = borrow_tile(a.q, f.b, t, head, BQ, a.K, f.lo, f.hi, buf, ld);
      rows.load(t, head, BQ);
      w.block(i, q, ld, rows.d, rows.dd, rows.given, dq);
      store_tile(a.dq, f.b, t, head, BQ, a.K, f.lo, f.hi, dq);
    }
  }
  store_window(a, w, f.b, f.h, f.lo, f.hi);
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
    Window f(a, b, h, lo, hi);
    WindowBackward w(f);
    BandedRows rows{a, b, lo, hi, arena.get(BQ * f.Vp)};
    window_backward(a, f, w, rows);
  });
}
"""
