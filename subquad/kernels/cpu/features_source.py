"""C++: feature maps inside the additive recurrence (features.py): tiles of y become tiles of features as they are loaded, gradients of features become
gradients of y as they are stored. Backward needs the features alone, which it makes again; where they have a floor, as they are without it.
"""

SOURCE = r"""
struct Map {  // signs 0: no map, the numbers are the features
  int64_t signs, norm;  // norm 0: none, 1: over one sign's features, 2: over both signs'
  double gain, limit, floor;
};

struct Features {
  Map m;
  int Y, F, Yp, Fp;
  float *y, *half[2], *bare, smallest, largest;  // half: one row's features of y and of -y; bare: a row's without floor
  Features(const Map& m, int F) : m(m), Y(m.signs ? F / m.signs : F), F(F), Yp(up(Y)), Fp(up(F)) {
    if (!m.signs) return;
    y = arena.get(64 * Yp), half[0] = arena.get(Yp), half[1] = arena.get(Yp), bare = arena.get(Fp);
    smallest = m.limit < 80 ? exp1(-m.limit) : 0, largest = m.limit < 80 ? exp1(m.limit) : INFINITY;
  }
  void load(const Tensor& t, int64_t b, int64_t from, int64_t h, int rows, int64_t lo, int64_t hi, float* dst) {
    if (!m.signs) return load_tile(t, b, from, h, rows, F, lo, hi, dst);
    load_tile(t, b, from, h, rows, Y, lo, hi, y, m.gain);
    for (int r = 0; r < rows; r++, dst += Fp)
      if (from + r < lo || from + r >= hi) memset(dst, 0, 4 * Fp);
      else row(y + r * Yp, dst, m.floor);
  }
  // As borrow_tile: rows that can be read where they are, are.
  const float* borrow(const Tensor& t, int64_t b, int64_t from, int64_t h, int rows, int64_t lo, int64_t hi, float* buf, int64_t& ld, Late* late = nullptr) {
    if (!m.signs) return borrow_tile(t, b, from, h, rows, F, lo, hi, buf, ld, late);
    load(t, b, from, h, rows, lo, hi, buf);
    ld = Fp;
    return buf;
  }
  // Transposed: dst [Fp, rows]; buf as for load.
  void load_columns(const Tensor& t, int64_t b, int64_t from, int64_t h, int rows, int64_t lo, int64_t hi, float* buf, float* dst) {
    if (!m.signs) return load_transposed(t, b, from, h, rows, F, lo, hi, buf, dst);
    load(t, b, from, h, rows, lo, hi, buf);
    transpose(rows, Fp, buf, Fp, dst, rows);
  }
  void row(float* x, float* dst, float least) {  // x [Yp] = gain y, padded with zeros; least: the floor
    float high[2] = {0, 0}, sum[2] = {0, 0};
    if (m.norm) {
      float most = x[0], lowest = x[0];
      int f = 0;
      if (Y >= L) {
        vf a = ld(x), c = a;
        for (f = L; f + L <= Y; f += L) a = vmax(a, ld(x + f)), c = pick(c > ld(x + f), ld(x + f), c);
        most = hmax(a), lowest = -hmax(-c);
      }
      for (; f < Y; f++) most = x[f] > most ? x[f] : most, lowest = x[f] < lowest ? x[f] : lowest;
      high[0] = most, high[1] = -lowest;
      if (m.norm == 2) high[0] = high[1] = high[0] > high[1] ? high[0] : high[1];
    }
    for (int s = 0; s < m.signs; s++) {
      float* p = half[s];
      vf total = {}, limit = bc(m.limit);
      for (int f = 0; f < Yp; f += L) {
        vf u = (s ? -ld(x + f) : ld(x + f)) - high[s];
        if (!m.norm) u = pick(u > limit, limit, u), u = pick(u < -limit, -limit, u);
        vf e = vexp(u);
        if (f + L > Y) e = pick(iota() < (vi){} + (Y - f), e, bc(0));
        st(p + f, e);
        total += e;
      }
      sum[s] = hsum(total);
    }
    if (m.norm == 2) sum[0] = sum[1] = sum[0] + sum[1];
    for (int s = 0; s < m.signs; s++, dst += Y) {
      float scale = m.norm ? 1 / sum[s] : 1.0f;
      vf floor = bc(least);
      if (Y % L == 0) {
        for (int f = 0; f < Y; f += L) st(dst + f, vmax(floor, scale * ld(half[s] + f)));
      } else
        for (int f = 0; f < Y; f++) dst[f] = std::max(least, scale * half[s][f]);
    }
    for (int f = F; f < Fp; f++) *dst++ = 0;
  }
  // The gradient of `of` from that of its features; p, dp [rows, Fp] (p with row stride ldp).
  void store(const Tensor& t, const Tensor& of, int64_t b, int64_t from, int64_t h, int rows, int64_t lo, int64_t hi, const float* p, int64_t ldp,
             const float* dp, bool past) {
    if (!m.signs) return store_tile(t, b, from, h, rows, F, lo, hi, dp, 1.0f, past);
    if (m.floor > 0) load_tile(of, b, from, h, rows, Y, lo, hi, y, m.gain);
    for (int r = 0; r < rows; r++) {
      if (from + r < lo || from + r >= hi) continue;
      if (m.floor > 0) row(y + r * Yp, bare, 0);
      row_back(m.floor > 0 ? bare : p + r * ldp, dp + r * Fp, y + r * Yp);
    }
    store_tile(t, b, from, h, rows, Y, lo, hi, y, m.gain, past);
  }
  void row_back(const float* p, const float* dp, float* dy) {
    float mean[2] = {0, 0};
    for (int s = 0; m.norm && s < m.signs; s++) {
      vf total = {};
      const float *ps = p + s * Y, *ds = dp + s * Y;
      int f = 0;
      vf floor = bc(m.floor);
      for (; f + L <= Y; f += L) total += pick(ld(ps + f) > floor, ld(ps + f) * ld(ds + f), bc(0));
      mean[s] = hsum(total);
      for (; f < Y; f++) mean[s] += ps[f] > (float)m.floor ? ps[f] * ds[f] : 0;
    }
    if (m.norm == 2) mean[0] = mean[1] = mean[0] + mean[1];
    int f = 0;
    for (; f + L <= Y; f += L) {
      vf g = slope(ld(p + f), ld(dp + f), bc(mean[0]));
      if (m.signs == 2) g = g - slope(ld(p + Y + f), ld(dp + Y + f), bc(mean[1]));
      st(dy + f, g);
    }
    for (; f < Y; f++) {
      dy[f] = slope(bc(p[f]), bc(dp[f]), bc(mean[0]))[0];
      if (m.signs == 2) dy[f] -= slope(bc(p[Y + f]), bc(dp[Y + f]), bc(mean[1]))[0];
    }
    for (; f < Yp; f++) dy[f] = 0;
  }
  vf slope(vf p, vf dp, vf mean) const {  // of a feature's exponent; none where the floor or the clamp holds it
    if (m.norm) return p * (pick(p > bc(m.floor), dp, bc(0)) - mean);
    return pick((p < bc(largest)) & (p > bc(smallest)), p * dp, bc(0));
  }
};
"""
