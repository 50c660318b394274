"""C++: one token at a time (op 4). States are [B, G, K, V] fp32 as the caller holds them and are updated in place."""

SOURCE = r"""
struct Row {  // state row [V]: y += q * (row = fade * row + k * v)
  static inline void update(float* s, float fade, float k, const float* v, int V) {
    int c = 0;
    for (; c + L <= V; c += L) st(s + c, fade * ld(s + c) + k * ld(v + c));
    for (; c < V; c++) s[c] = fade * s[c] + k * v[c];
  }
  static inline void add(float* y, float a, const float* s, int V) {
    int c = 0;
    for (; c + L <= V; c += L) st(y + c, ld(y + c) + a * ld(s + c));
    for (; c < V; c++) y[c] += a * s[c];
  }
};
// q [B, G, R, K], k [B, G, K], v [B, G, V], S [B, G, K, V], o [B, G, R, V]; beta [B, G], null: additive; g null, [B, G] or [B, G, K]
extern "C" void subquad_linear_step(const float* q, const float* k, const float* v, const float* beta, const float* g, float* S, float* o, int64_t BG,
                                    int64_t R, int64_t K, int64_t V, int64_t mode, double scale) {
  std::vector<float> u(V);
  for (int64_t i = 0; i < BG; i++, q += R * K, k += K, v += V, o += R * V) {
    memset(o, 0, 4 * R * V);
    float fade = mode == 1 ? expf(g[i]) : 1.0f;
    if (beta) {
      std::fill(u.begin(), u.end(), 0.0f);
      for (int64_t f = 0; f < K; f++) Row::add(u.data(), k[f], S + f * V, V);
      for (int64_t c = 0; c < V; c++) u[c] = beta[i] * (v[c] - fade * u[c]);
    }
    for (int64_t f = 0; f < K; f++, S += V) {
      Row::update(S, mode == 2 ? expf(g[i * K + f]) : fade, k[f], beta ? u.data() : v, V);
      for (int64_t r = 0; r < R; r++) Row::add(o + r * V, q[r * K + f] * (float)scale, S, V);
    }
  }
}
struct StepArgs {
  Tensor q, k, v, sk, sv;  // q [B, 1, H, K], k and v [B, W, G, *], sinks [B, N, G, *]
  float* S;                // [B, G, F, V + 1] or null
  const float *fq, *mix, *lk, *lv, *g;  // [B, H, F], [B, H], [B, G, F] or null, [B, G, V], null | [B, G] | [B, G, F]
  float* o;                // [B, H, V]
  int64_t B, G, R, K, V, F, W, N, mode;
  double scale;
};
extern "C" void subquad_window_linear_step(const StepArgs* pa) {
  const StepArgs& a = *pa;
  int Kp = up(a.K), Vp = up(a.V), V1 = a.V + 1;
  int64_t n = a.W + a.N;
  float *p = arena.get(a.R * n), *q = arena.get(a.R * Kp), *row = arena.get(Kp > Vp ? Kp : Vp), *out = arena.get(a.R * Vp), *y = arena.get(a.R * V1);
  float *lv = arena.get(V1), *mass = arena.get(a.R), *high = arena.get(a.R);
  for (int64_t b = 0; b < a.B; b++)
    for (int64_t h = 0; h < a.G; h++) {
      for (int64_t r = 0; r < a.R; r++) load_tile(a.q, b, 0, h * a.R + r, 1, a.K, 0, 1, q + r * Kp, a.scale);
      for (int64_t j = 0; j < n; j++) {
        load_tile(j < a.N ? a.sk : a.k, b, j < a.N ? j : j - a.N, h, 1, a.K, 0, n, row);
        for (int64_t r = 0; r < a.R; r++) p[r * n + j] = dot(q + r * Kp, row, Kp);
      }
      for (int64_t r = 0; r < a.R; r++) {
        float m = p[r * n], s = 0;
        for (int64_t j = 1; j < n; j++) m = p[r * n + j] > m ? p[r * n + j] : m;
        int64_t j = 0;
        for (; j + L <= n; j += L) {
          vf w = vexp(ld(p + r * n + j) - m);
          st(p + r * n + j, w);
          s += hsum(w);
        }
        for (; j < n; j++) s += p[r * n + j] = exp1(p[r * n + j] - m);
        mass[r] = s, high[r] = m;
      }
      memset(out, 0, 4 * a.R * Vp);
      for (int64_t j = 0; j < n; j++) {
        load_tile(j < a.N ? a.sv : a.v, b, j < a.N ? j : j - a.N, h, 1, a.V, 0, n, row);
        for (int64_t r = 0; r < a.R; r++) axpy(out + r * Vp, p[r * n + j], row, Vp);
      }
      int64_t i = b * a.G + h;
      if (a.S) {
        float* S = a.S + i * a.F * V1;
        const float* lk = a.lk ? a.lk + i * a.F : nullptr;
        if (lk) memcpy(lv, a.lv + i * a.V, 4 * a.V), lv[a.V] = 1;
        else memset(lv, 0, 4 * V1);
        memset(y, 0, 4 * a.R * V1);
        float fade = a.mode == 1 ? expf(a.g[i]) : 1.0f;
        for (int64_t f = 0; f < a.F; f++) {
          Row::update(S + f * V1, a.mode == 2 ? expf(a.g[i * a.F + f]) : fade, lk ? lk[f] : 0.0f, lv, V1);
          for (int64_t r = 0; r < a.R; r++) Row::add(y + r * V1, a.fq[(i * a.R + r) * a.F + f], S + f * V1, V1);
        }
      }
      for (int64_t r = 0; r < a.R; r++) {
        float mix = a.S ? a.mix[i * a.R + r] : NONE, top = mix > high[r] ? mix : high[r];
        float c = exp1(high[r] - top), d = a.S ? exp1(mix - top) : 0.0f, total = c * mass[r] + (a.S ? d * y[r * V1 + a.V] : 0.0f);
        float* o = a.o + (i * a.R + r) * a.V;
        for (int64_t v = 0; v < a.V; v++) o[v] = (c * out[r * Vp + v] + (a.S ? d * y[r * V1 + v] : 0.0f)) / total;
      }
    }
  arena.reset();
}
"""
