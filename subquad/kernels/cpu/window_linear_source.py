"""C++: window + sinks + linear under one normaliser, forward and backward: op 5, out of Window (banded_source.py) and Linear (linear_source.py).

Both halves see the same 64 queries; the linear half's keys are those that leave the window meanwhile.
"""

SOURCE = r"""
// Slot x leaves the window at query x + window. Keys of the linear half for query block i are slots i * 64 - window ..; of those that are no sinks.
static void left_bounds(const WindowArgs& a, int64_t ks, int64_t lo, int64_t hi, int64_t& from, int64_t& to) {
  int64_t x = a.sinks - a.position > -a.before ? a.sinks - a.position : -a.before;
  from = ks + x, to = ks + hi - lo - a.window;  // later ones leave after the last query
}
static bool older(const WindowArgs& a, int64_t t) { return a.position + t - a.window >= a.sinks; }  // has anything left before or at query t

// The state as callers hold it: column V of a feature's row is the sum of features, z.
static void load_sums(const float* src, int F, int V, float* S, float* z) {
  load_state(src, F, V, V + 1, S);
  for (int f = 0; f < F; f++) z[f] = src[f * (V + 1) + V];
}
static void store_sums(float* dst, int F, int V, const float* S, const float* z) {
  store_state(dst, F, V, V + 1, S);
  for (int f = 0; f < F; f++) dst[f * (V + 1) + V] = z[f];
}

// While query head r of 64 is read: its own output, then what the next one takes: of this head, of the next of h0 .. h1, of the block after.
static Ahead rows_after(const WindowArgs& a, int64_t b, int64_t t, int64_t h, int64_t r, int64_t h0, int64_t h1, int64_t hi) {
  Ahead ahead;
  int64_t head = h * a.R + r + 1, end = hi + a.before;
  ahead.want(a.o, b, t, head - 1, BQ, a.V, hi);
  if (r + 1 == a.R) {
    if (++h == h1) h = h0, t += BQ, head = h * a.R;
    int64_t ks = t + a.before;
    ahead.want(a.k, b, ks, h, BQ, a.K, end);
    ahead.want(a.v, b, ks, h, BQ, a.V, end);
    ahead.want(a.fk, b, ks - a.window, h, BQ, a.Y, end);
  }
  ahead.want(a.q, b, t, head, BQ, a.K, hi);
  ahead.want(a.fq, b, t, head, BQ, a.Y, hi);
  return ahead;
}

struct MixedForward {  // neighbouring heads h0 .. h1 of one sequence, block by block
  const WindowArgs& a;
  int64_t s, h0, h1, b, lo, hi, ks, from, to, block, size, ld;
  Linear l;
  Heads heads;
  std::vector<Window> windows;
  float *tile, *buf, *fbuf, *out, *y, *parts, den[BQ], top[BQ], yden[BQ], mix[BQ], mass[BQ];
  MixedForward(const WindowArgs& a, int64_t s, int64_t h0, int64_t h1)
      : a(a), s(s), h0(h0), h1(h1), b(a.seq[3 * s]), lo(a.seq[3 * s + 1]), hi(a.seq[3 * s + 2]), ks(lo + a.before), block(blocks_before(a.seq, s)),
        size(a.F * (a.V + 1)), l(a.F, a.V, a.mode, a.map, true), heads(l, h0, h1) {
    left_bounds(a, ks, lo, hi, from, to);
    for (int64_t h = h0; h < h1; h++) {
      windows.emplace_back(a, b, h, lo, hi);
      windows.back().P = windows[0].P, windows.back().have = windows[0].first_block(0);
      if (!a.h0) continue;
      heads.take(h);
      load_sums(a.h0 + (s * a.G + h) * size, a.F, a.V, l.S, l.z);
      heads.empty[h - h0] = 0;
    }
    const Window& w = windows[0];
    tile = arena.get(BQ * w.Kp), buf = arena.get(BQ * w.Kp), out = arena.get(BQ * w.Vp), y = arena.get(BQ * w.Vp), fbuf = arena.get(l.n * l.Kp);
    parts = arena.get(l.mode == VECTOR ? a.R * BQ * (w.Vp + 1) : 1);  // sub-chunks of 16 for all query heads, before the window's 64
  }
  void run() {
    for (int64_t i = 0; lo + i * BQ < hi; i++)
      for (int64_t h = h0; h < h1; h++) {
        heads.take(h);
        queries(i, h, windows[h - h0]);
        heads.put(h);
      }
    for (int64_t h = h0; a.hT && h < h1; h++) heads.take(h), store_sums(a.hT + (s * a.G + h) * size, a.F, a.V, l.S, l.z);
  }
  void queries(int64_t i, int64_t h, Window& w) {
    int64_t t = lo + i * BQ;
    for (; w.have <= i; w.have++) w.load_block(w.have, tile);
    bool some = older(a, i * BQ + BQ - 1) || !l.empty;
    if (a.kept) l.keep(a.kept + ((block + i) * a.G + h) * l.kept_size());
    for (int c = 0; some && c < BQ; c += l.n) {
      l.decays(a.g, b, t + c, h, lo, hi);
      l.keys(a.fk, a.v, b, ks + i * BQ + c - a.window, h, from, to);
      if (l.mode != VECTOR) break;  // one chunk: read below, while its products are at hand
      for (int64_t r = 0; r < a.R; r++) {
        float* mine = parts + r * BQ * (w.Vp + 1);
        const float* fq = l.phi.borrow(a.fq, b, t + c, h * a.R + r, l.n, lo, hi, fbuf, ld);
        l.read(fq, ld, {mine + c * w.Vp, w.Vp}, mine + BQ * w.Vp + c);
      }
      if (t + c < hi) l.write();
    }
    for (int64_t r = 0; r < a.R; r++) {
      int64_t head = h * a.R + r;
      const float* q = borrow_tile(a.q, b, t, head, BQ, a.K, lo, hi, buf, ld);
      Ahead ahead = rows_after(a, b, t, h, r, h0, h1, hi);
      w.forward(i, q, ld, out, den, top, &ahead);
      const float *yr = y, *dr = yden;
      if (some && l.mode == VECTOR) yr = parts + r * BQ * (w.Vp + 1), dr = yr + BQ * w.Vp;
      else if (some) {
        const float* fq = l.phi.borrow(a.fq, b, t, head, BQ, lo, hi, fbuf, ld);
        l.read(fq, ld, {y, w.Vp}, yden, 1.0f, &ahead);
      }
      load_column(a.mix, b, t, head, BQ, lo, hi, mix);
      for (int m = 0; m < BQ && t + m < hi; m++) join(some && older(a, i * BQ + m), m, w.Vp, yr + m * w.Vp, dr[m]);
      store_tile(a.o, b, t, head, BQ, a.V, lo, hi, out);
      if (a.top.p) store_column(a.top, b, t, head, BQ, lo, hi, mass);
    }
    if (some && l.mode != VECTOR && (a.hT || t + BQ < hi)) l.write();
  }
  void join(bool both, int m, int Vp, const float* yr, float dr) {  // row m of out: both branches under one normaliser
    float high = both && mix[m] > top[m] ? mix[m] : top[m];
    float p = exp1(top[m] - high), c = both ? exp1(mix[m] - high) : 0.0f, total = p * den[m] + (both ? c * dr : 0.0f);
    if (total < 1.17549435e-38f) total = 1.17549435e-38f;
    mass[m] = high + logf(total);
    float* o = out + m * Vp;
    if (both) for (int v = 0; v < Vp; v += L) st(o + v, (p * ::ld(o + v) + c * ::ld(yr + v)) / total);
    else for (int v = 0; v < Vp; v += L) st(o + v, ::ld(o + v) / total);
  }
};
// Heads walked together: their rows are neighbours in memory, which the machine's own prefetching sees. As many as keep keys, values and states in 1 MB.
static int64_t together(const WindowArgs& a) {
  int64_t blocks = (a.window - 2 + BQ) / BQ + 1, bytes = 4 * (blocks * BQ * (up(a.K) + up(a.V)) + up(a.F) * up(a.V));
  return std::max<int64_t>(1, std::min<int64_t>(a.G, (1 << 20) / bytes));
}

extern "C" void subquad_window_linear(const WindowArgs* pa) {
  const WindowArgs& a = *pa;
  int64_t most = together(a), groups = (a.G + most - 1) / most;
  if (a.N * groups < a.threads) groups = a.G;
  parallel(a.N * groups, a.threads, [&](int64_t i) {
    MixedForward(a, i / groups, i % groups * a.G / groups, (i % groups + 1) * a.G / groups).run();
  });
}

// -a.b per row, summed in the order of a product of tiles: where one weight is 1 the two cancel exactly.
static void row_dots(int rows, int V, const float* a, const float* b, float* out) {
  for (int i = 0; i < rows; i += 8) {
    float s[8] = {0};
    for (int k = 0; k < V; k++)
      for (int m = 0; m < 8; m++) s[m] += a[(i + m) * V + k] * b[(i + m) * V + k];
    for (int m = 0; m < 8; m++) out[i + m] = -s[m];
  }
}

struct MixedRows {  // d: gradient of the output; dd: minus d.o; given: log of the whole mass
  const WindowArgs& a;
  int64_t b, lo, hi;
  float *d, *o, dd[BQ], given[BQ];
  void load(int64_t t, int64_t head, int rows) {
    load_tile(a.dout, b, t, head, rows, a.V, lo, hi, d);
    load_tile(a.o, b, t, head, rows, a.V, lo, hi, o);
    row_dots(rows, up(a.V), d, o, dd);
    load_column(a.top, b, t, head, rows, lo, hi, given, INFINITY);
  }
};

struct Older {  // features, gates and the state of one (sequence, key/value head)
  const WindowArgs& a;
  int64_t task, b, h, lo, hi, ks, from, to, first, ld;
  Linear l;
  LinearBackward w;
  BlockStates states;
  float* fbuf;
  bool past;
  Older(const WindowArgs& a, int64_t task, int64_t b, int64_t lo, int64_t hi, bool past)
      : a(a), task(task), b(b), h(task % a.G), lo(lo), hi(hi), ks(lo + a.before), l(a.F, a.V, a.mode, a.map, true), w(l), states(l), past(past) {
    l.empty = false, first = blocks_before(a.seq, task / a.G), fbuf = arena.get(l.n * l.Kp);
    if (a.dhT) load_sums(a.dhT + task * a.F * (a.V + 1), a.F, a.V, w.dS, w.dz);
    left_bounds(a, ks, lo, hi, from, to);
  }
  void load(int64_t x) {  // the chunk of queries x ..
    l.decays(a.g, b, lo + x, h, lo, hi);
    l.keys(a.fk, a.v, b, ks + x - a.window, h, from, to);
  }
  int chunks(int64_t i) const { return ((hi - lo - i * BQ < BQ ? hi - lo - i * BQ : BQ) + l.n - 1) / l.n; }
  float* kept(int64_t i) const { return a.kept + ((first + i) * a.G + h) * l.kept_size(); }
  void fill(int64_t i) {
    states.fill(kept(i), chunks(i), [&](int c) { load(i * BQ + c * l.n); });
  }
  void begin(int64_t i, int c) {
    states.take(c);
    load(i * BQ + c * l.n);
    w.begin();
  }
  void head(int64_t x, int64_t head, MixedRows& rows, Ahead* ahead) {  // scales the rows' gradients by the state's share of the mass
    float mix[BQ], dmix[BQ];
    load_column(a.mix, b, lo + x, head, l.n, lo, hi, mix);
    for (int m = 0; m < l.n; m++) {
      float c = older(a, x + m) ? exp1(mix[m] - rows.given[m]) : 0.0f;
      rows.dd[m] *= c;
      scale_row(rows.d + m * l.Vp, c, l.Vp);
    }
    const float* fq = l.phi.borrow(a.fq, b, lo + x, head, l.n, lo, hi, fbuf, ld);
    w.head(fq, ld, rows.d, rows.dd, ahead);
    for (int m = 0; m < l.n; m++) dmix[m] = dot(fq + m * ld, w.dq + m * l.Kp, l.Kp);
    l.phi.store(a.dfq, a.fq, b, lo + x, head, l.n, lo, hi, fq, ld, w.dq, past);
    store_column(a.dmix, b, lo + x, head, l.n, lo, hi, dmix);
  }
  void finish(int64_t x, WindowBackward* near) {  // what the state asks of values is added to `near` (null: nobody asks)
    l.phi.store(a.dfk, a.fk, b, ks + x - a.window, h, l.n, from, to, l.kk, l.Kp, w.dk, past);
    w.store_decay(a.dg, b, lo + x, h, lo, hi);
    for (int m = 0; near && m < l.n; m++) {
      int64_t slot = x + m - a.window, block = near->w.block_of(slot);
      if (ks + slot >= from && ks + slot < to) axpy(near->values_gradient(block) + (slot - block * BQ) * l.Vp, 1.0f, w.dv + m * l.Vp, l.Vp);
    }
  }
  void end() {  // the features of tokens that never entered the state in this call: sinks, those that left before it, those still in the window
    int64_t some = from > ks - a.window ? from : ks - a.window, all = ks + hi - lo;
    float* zeros = arena.zeros(l.Kp);
    for (int64_t row = ks - a.before; row < all; row++)
      if (row < some || row >= to) store_tile(a.dfk, b, row, h, 1, a.Y, row, row + 1, zeros);
    if (a.dh0) store_sums(a.dh0 + task * a.F * (a.V + 1), a.F, a.V, w.dS, w.dz);
  }
};

static Ahead mixed_before(const WindowArgs& a, int64_t b, int64_t t, int64_t h, int64_t r, int64_t lo, int64_t hi, bool past) {
  Ahead ahead;
  if (a.need_window) ahead = rows_before(a, b, t, h, r, lo, hi, past);
  int64_t head = h * a.R + r, end = hi + a.before, left = t + a.before - a.window;
  if (!past) ahead.want(a.dfq, b, t, head, BQ, a.Y, hi);
  if (r + 1 == a.R) {
    if (!past && left >= lo) ahead.want(a.dfk, b, left, h, BQ, a.Y, end);
    t -= BQ, left -= BQ, head = h * a.R - 1;
    if (t < lo) return ahead;
    if (left >= lo) ahead.want(a.fk, b, left, h, BQ, a.Y, end);
  }
  ahead.want(a.fq, b, t, head + 1, BQ, a.Y, hi);
  ahead.want(a.o, b, t, head + 1, BQ, a.V, hi);
  return ahead;
}

extern "C" void subquad_window_linear_backward(const WindowArgs* pa) {
  const WindowArgs& a = *pa;
  parallel(a.N * a.G, a.threads, [&](int64_t task) {
    int64_t s = task / a.G, h = task % a.G, b = a.seq[3 * s], lo = a.seq[3 * s + 1], hi = a.seq[3 * s + 2];
    std::optional<Window> window;
    std::optional<WindowBackward> near;
    bool past = past_caches(a.dfq, a.seq, a.N, a.G * (a.R + 1) * a.Y + (a.need_window ? a.G * (a.R * a.K + a.K + a.V) : 0));
    if (a.need_window) window.emplace(a, b, h, lo, hi, true), near.emplace(*window, past);
    WindowBackward* w = near ? &*near : nullptr;
    Older older(a, task, b, lo, hi, past);
    MixedRows rows{a, b, lo, hi, arena.get(BQ * up(a.V)), arena.get(BQ * up(a.V))};
    float *buf = arena.get(BQ * up(a.K)), *dq = arena.get(BQ * up(a.K));
    bool whole = older.l.n == BQ;  // else, vector decay, the state's share comes in chunks of 16
    for (int64_t i = (hi - lo + BQ - 1) / BQ - 1; i >= 0; i--) {
      int64_t t = lo + i * BQ, x = i * BQ;
      if (w) w->open(i);
      older.fill(i);
      if (whole) older.begin(i, 0);
      for (int64_t r = 0; (w || whole) && r < a.R; r++) {
        int64_t head = h * a.R + r;
        rows.load(t, head, BQ);
        Ahead ahead = mixed_before(a, b, t, h, r, lo, hi, past);
        if (r + 1 == a.R && i > 0) ahead.want(older.kept(i - 1), older.l.kept_size());
        if (w) {
          load_tile(a.q, b, t, head, BQ, a.K, lo, hi, buf);
          w->block(i, buf, up(a.K), rows.d, rows.dd, rows.given, dq, &ahead);
          store_tile(a.dq, b, t, head, BQ, a.K, lo, hi, dq, 1.0f, past);
        }
        if (whole) older.head(x, head, rows, &ahead);
      }
      if (whole) older.finish(x, w);
      for (int c = whole ? -1 : older.chunks(i) - 1; c >= 0; c--) {
        int64_t part = x + c * older.l.n;
        older.begin(i, c);
        for (int64_t r = 0; r < a.R; r++) {
          rows.load(lo + part, h * a.R + r, older.l.n);
          older.head(part, h * a.R + r, rows, nullptr);
        }
        older.finish(part, w);
      }
      if (w) w->close(i);
    }
    if (w) w->end();
    older.end();
  });
}
"""
