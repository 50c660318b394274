"""C++: one token at a time (op 4). States are [B, G, K, V] fp32 as the caller holds them and are updated in place.

A state is read and written once: it fades, takes the token and is multiplied with the queries while a row's columns stand in registers.
"""

SOURCE = r"""
struct StepArgs {
  Tensor q, k, v, beta, g;        // q [B, 1, H, K]; additive and delta: k, v [B, 1, G, *]; window: [B, W, G, *]; beta [B, 1, G]; g [B, 1, G] or [B, 1, G, *]
  Tensor sk, sv, fq, mix, lk, lv;  // window: sinks [B, N, G, *], [B, 1, H, F], [B, 1, H], [B, 1, G, F] or null, [B, 1, G, V]
  float *S, *o;                    // [B, G, K, V], window: [B, G, F, V + 1] or null; o [B, H, V]
  int64_t B, G, R, K, V, F, W, N, mode;
  double scale;
};
constexpr int SN = 4;  // vectors of a state's row in registers at once: enough sums to hide the latency of one

// Columns of a state [K, ld]: S_f = fade_f S_f + k_f v, out_m = sum_f q_m,f S_f for M queries. step: 0 where all features share a fade.
template <int M, int N, bool WRITE>
INLINE void columns(float* S, int64_t ld, int K, const float* fade, int step, const float* k, const float* v, const float* q, int64_t ldq, float* out,
                    int64_t ldo) {
  vf sum[M][N] = {}, value[N];
  for (int n = 0; WRITE && n < N; n++) value[n] = ::ld(v + n * L);
  for (int f = 0; f < K; f++, S += ld)
    for (int n = 0; n < N; n++) {
      vf s = ::ld(S + n * L);
      if (WRITE) s = fade[f * step] * s + k[f] * value[n], st(S + n * L, s);
      for (int m = 0; m < M; m++) sum[m][n] += q[m * ldq + f] * s;
    }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) st(out + m * ldo + n * L, sum[m][n]);
}
template <int M, bool WRITE>
static void rows(float* S, int V, int K, const float* fade, int step, const float* k, const float* v, const float* q, int64_t ldq, float* out,
                 int64_t ldo) {
  int c = 0;
  for (; c + SN * L <= V; c += SN * L) columns<M, SN, WRITE>(S + c, V, K, fade, step, k, v + c, q, ldq, out + c, ldo);
  for (; c + L <= V; c += L) columns<M, 1, WRITE>(S + c, V, K, fade, step, k, v + c, q, ldq, out + c, ldo);
  for (; c < V; c++) {
    float sum[M] = {0};
    for (int f = 0; f < K; f++) {
      float& s = S[f * V + c];
      if (WRITE) s = fade[f * step] * s + k[f] * v[c];
      for (int m = 0; m < M; m++) sum[m] += q[m * ldq + f] * s;
    }
    for (int m = 0; m < M; m++) out[m * ldo + c] = sum[m];
  }
}
// One head's state [K, V] and its R queries q [R, ldq]: out [R, ldo].
static void step_state(float* S, int V, int K, const float* fade, int step, const float* k, const float* v, int R, const float* q, int64_t ldq,
                       float* out, int64_t ldo) {
  int r = R > 1 ? 2 : 1;
  if (R > 1) rows<2, true>(S, V, K, fade, step, k, v, q, ldq, out, ldo);
  else rows<1, true>(S, V, K, fade, step, k, v, q, ldq, out, ldo);
  for (; r + 2 <= R; r += 2) rows<2, false>(S, V, K, fade, step, k, v, q + r * ldq, ldq, out + r * ldo, ldo);
  if (r < R) rows<1, false>(S, V, K, fade, step, k, v, q + r * ldq, ldq, out + r * ldo, ldo);
}
// exp of a head's log decays: one number (returns 0) or one a feature (returns 1)
static int fades(const StepArgs& a, int64_t b, int64_t h, int K, float* fade) {
  if (a.mode == VECTOR) {
    load_tile(a.g, b, 0, h, 1, K, 0, 1, fade);
    for (int f = 0; f < K; f += L) st(fade + f, vexp(ld(fade + f)));
    return 1;
  }
  fade[0] = a.mode == SCALAR ? exp1(load1(at(a.g, b, 0, h), a.g.type)) : 1.0f;
  return 0;
}
static void load_queries(const Tensor& q, int64_t b, int64_t h, int64_t R, int K, float scale, float* dst) {
  for (int64_t r = 0; r < R; r++) load_tile(q, b, 0, h * R + r, 1, K, 0, 1, dst + r * up(K), scale);
}

extern "C" void subquad_linear_step(const StepArgs* pa) {  // additive; delta where beta is given
  const StepArgs& a = *pa;
  FlushSubnormals flush;
  int Kp = up(a.K);
  float *q = arena.get(a.R * Kp), *k = arena.get(Kp), *v = arena.get(up(a.V)), *fade = arena.get(Kp), *S = a.S, *o = a.o;
  float* old = arena.get(up(a.V));
  for (int64_t b = 0; b < a.B; b++)
    for (int64_t h = 0; h < a.G; h++, S += a.K * a.V, o += a.R * a.V) {
      load_queries(a.q, b, h, a.R, a.K, a.scale, q);
      load_tile(a.k, b, 0, h, 1, a.K, 0, 1, k);
      load_tile(a.v, b, 0, h, 1, a.V, 0, 1, v);
      int step = fades(a, b, h, a.K, fade);
      if (a.beta.p) {
        rows<1, false>(S, a.V, a.K, fade, step, k, v, k, 0, old, 0);
        float beta = load1(at(a.beta, b, 0, h), a.beta.type);
        for (int64_t c = 0; c < a.V; c++) v[c] = beta * (v[c] - fade[0] * old[c]);
      }
      step_state(S, a.V, a.K, fade, step, k, v, a.R, q, Kp, o, a.V);
    }
  arena.reset();
}

// Scores of one query with `count` <= L rows, a vector of them at once
INLINE vf dots(const float* q, const float* rows, int64_t ld, int count, int n) {
  vf s[L];
  for (int j = 0; j < L; j++) {
    vf x = {};
    for (int i = 0; j < count && i < n; i += L) x += ::ld(q + i) * ::ld(rows + j * ld + i);
    s[j] = x;
  }
  vi even = {}, odd = {};
  for (int i = 0; i < L; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
  for (int w = L / 2; w; w /= 2)  // halves the vectors: w then hold the sums of 2 w, in order
    for (int j = 0; j < w; j++) s[j] = __builtin_shuffle(s[2 * j], s[2 * j + 1], even) + __builtin_shuffle(s[2 * j], s[2 * j + 1], odd);
  return s[0];
}
// out [V] += sum_j p_j row_j
static void gather(const float* p, const float* rows, int64_t ld, int count, int V, float* out) {
  int c = 0;
  for (; c + SN * L <= V; c += SN * L) {
    vf s[SN];
    for (int n = 0; n < SN; n++) s[n] = ::ld(out + c + n * L);
    for (int j = 0; j < count; j++)
      for (int n = 0; n < SN; n++) s[n] += p[j] * ::ld(rows + j * ld + c + n * L);
    for (int n = 0; n < SN; n++) st(out + c + n * L, s[n]);
  }
  for (int j = 0; c < V && j < count; j++) axpy(out + c, p[j], rows + j * ld + c, V - c);
}
struct WindowStep {  // one head: softmax over sinks and window, and the state's share
  const StepArgs& a;
  int Kp, Vp, V1, n;
  float *p, *q, *buf, *out, *y, *value, *none, *fade, *fq, *lk, mass, high;
  WindowStep(const StepArgs& a) : a(a), Kp(up(a.K)), Vp(up(a.V)), V1(a.V + 1), n(a.W + a.N) {
    int Fp = up(a.F);
    p = arena.get(n + 2 * L), q = arena.get(a.R * Kp), buf = arena.get(L * std::max(Kp, Vp)), out = arena.get(Vp), y = arena.get(a.R * V1);
    value = arena.zeros(up(V1)), fade = arena.get(Fp + 1), fq = arena.get(a.R * Fp), lk = arena.zeros(Fp);
  }
  template <class Fn>
  void pieces(const Tensor& sinks, const Tensor& window, int64_t b, int64_t h, int size, Fn fn) {  // rows of sinks, then of the window, L at a time
    int64_t ld;
    for (int part = 0, first = 0; part < 2; part++) {
      int count = part ? a.W : a.N;
      for (int j = 0; j < count; j += L) {
        int some = count - j < L ? count - j : L;
        const float* rows = borrow_tile(part ? window : sinks, b, j, h, some, size, 0, count, buf, ld);
        fn(first + j, rows, ld, some);
      }
      first += count;
    }
  }
  void near(int64_t b, int64_t h, const float* q) {
    pieces(a.sk, a.k, b, h, a.K, [&](int j, const float* rows, int64_t ld, int some) { st(p + j, dots(q, rows, ld, some, Kp)); });
    for (int j = n; j < up(n); j++) p[j] = NONE;
    vf top = bc(NONE), sum = {};
    for (int j = 0; j < n; j += L) top = vmax(top, ld(p + j));
    high = hmax(top);
    for (int j = 0; j < n; j += L) {
      vf w = vexp(ld(p + j) - high);
      st(p + j, w);
      sum += w;
    }
    mass = hsum(sum);
    memset(out, 0, 4 * Vp);
    pieces(a.sv, a.v, b, h, a.V, [&](int j, const float* rows, int64_t ld, int some) { gather(p + j, rows, ld, some, Vp, out); });
  }
  void older(int64_t b, int64_t h) {
    load_queries(a.fq, b, h, a.R, a.F, 1.0f, fq);
    if (a.lk.p) {
      load_tile(a.lk, b, 0, h, 1, a.F, 0, 1, lk);
      load_tile(a.lv, b, 0, h, 1, a.V, 0, 1, value);
      value[a.V] = 1;
    }
    int step = fades(a, b, h, a.F, fade);
    step_state(a.S + (b * a.G + h) * a.F * V1, V1, a.F, fade, step, lk, value, a.R, fq, up(a.F), y, V1);
  }
  void head(int64_t b, int64_t h) {
    load_queries(a.q, b, h, a.R, a.K, a.scale, q);
    if (a.S) older(b, h);
    for (int64_t r = 0; r < a.R; r++) {
      near(b, h, q + r * Kp);
      float* o = a.o + ((b * a.G + h) * a.R + r) * a.V;
      if (!a.S) {
        for (int64_t v = 0; v < a.V; v++) o[v] = out[v] / mass;
        continue;
      }
      const float *yr = y + r * V1, mix = load1(at(a.mix, b, 0, h * a.R + r), a.mix.type);
      float top = mix > high ? mix : high, c = exp1(high - top), d = exp1(mix - top), total = c * mass + d * yr[a.V];
      for (int64_t v = 0; v < a.V; v++) o[v] = (c * out[v] + d * yr[v]) / total;
    }
  }
};
extern "C" void subquad_window_linear_step(const StepArgs* pa) {
  FlushSubnormals flush;
  {
    WindowStep step(*pa);
    for (int64_t b = 0; b < pa->B; b++)
      for (int64_t h = 0; h < pa->G; h++) step.head(b, h);
  }
  arena.reset();
}
"""
