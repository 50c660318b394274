"""C++: matrix products of tiles, whole and lower triangles, and the rows of memory that are asked for meanwhile.
"""

SOURCE = r"""
// Rows that will be needed soon, asked for within products, 128 bytes with every 8 steps of one (or ASKS times as much): the memory's latency hides behind
// arithmetic, and there are always few in flight, so that what misses the first cache level meanwhile need not wait. They are read into the second: the tiles
// at hand fill the first.
struct Few {
  const char* p;
  int64_t stride;
  INLINE_MEMBER void ask() {
    __builtin_prefetch(p, 0, 2), __builtin_prefetch(p + 64, 0, 2);
    p += stride;
  }
};
struct Ahead {
  static constexpr int MOST = 64;
  struct Rows { const char* p; int64_t stride, count; } of[MOST];
  int used = 0, now = 0;
  int64_t row = 0;
  void add(const char* p, int64_t stride, int64_t count) {
    if (used < MOST && count > 0) of[used++] = {p, stride, count};
  }
  // `count` rows: those that touch in the order of memory, which the machine's own prefetching follows.
  void want(const char* p, int64_t stride, int64_t bytes, int64_t count) {
    if (stride == bytes) return add(p, 128, (bytes * count + 127) / 128);
    for (int64_t c = 0; bytes <= 128 * count && c < bytes; c += 128) add(p + c, stride, count);
    for (int64_t i = 0; bytes > 128 * count && i < count; i++) add(p + i * stride, 128, (bytes + 127) / 128);
  }
  void want(const Tensor& t, int64_t b, int64_t from, int64_t h, int rows, int size, int64_t hi) {
    int bytes = t.type ? 2 : 4;
    want(at(t, b, from, h), t.st * bytes, (int64_t)size * bytes, hi - from < rows ? hi - from : rows);
  }
  void want(const float* p, int64_t count) { want((const char*)p, 128, 128, (count + 31) / 32); }
  // Quarter i of 4 `groups` of rows from .. end of `groups` times `each` heads: some tokens of all heads where these are neighbours in memory, else of a group.
  void part(const Tensor& t, int64_t b, int64_t from, int64_t end, int64_t h, int64_t groups, int64_t each, int64_t size, int64_t i) {
    int64_t one = t.type ? 2 : 4, n = 4 * groups, runs = 1, heads = groups * each;
    if (t.sh != size) h += i / 4 * each, i %= 4, n = 4, runs = each, heads = 1;
    int64_t first = from + (end - from) * i / n, count = from + (end - from) * (i + 1) / n - first;
    for (int64_t r = 0; r < runs; r++) want(at(t, b, first, h + r), t.st * one, heads * size * one, count);
  }
  Few next(int rows) {
    const Rows& r = of[now];
    Few few = {r.p + row * r.stride, r.stride};
    if ((row += rows) >= r.count) row = 0, now++;
    return few;
  }
};
INLINE Few few(Ahead* ahead, int K, const float* none, int asks = 1) {
  return ahead && ahead->now < ahead->used ? ahead->next((K + 7) / 8 * asks) : Few{(const char*)none, 0};
}

// ---- products: out[M, N] (= or +=) A[M, K] B[K, N]. AT: A is stored [K, M]. M and K multiples of MR, N of L.
template <int M, int N, bool AT>
INLINE void step(vf (&acc)[M][N], int k, const float* A, int64_t lda, const float* B, int64_t ldb) {
  vf b[N];
  for (int n = 0; n < N; n++) b[n] = ld(B + k * ldb + n * L);
  for (int m = 0; m < M; m++) {
    vf a = bc(AT ? A[k * lda + m] : A[m * lda + k]);
    for (int n = 0; n < N; n++) acc[m][n] += a * b[n];
  }
}
template <int M, int N, bool AT, int ASKS = 1>
INLINE void multiply(vf (&acc)[M][N], int K, const float* A, int64_t lda, const float* B, int64_t ldb, Few ahead) {
  int k = 0;
  for (; k + 8 <= K; k += 8) {
#pragma GCC unroll 8
    for (int u = 0; u < 8; u++) {
      if (u % (8 / ASKS) == 0) ahead.ask();
      step<M, N, AT>(acc, k + u, A, lda, B, ldb);
    }
  }
  if constexpr (MR < 8)
    for (; k < K; k++) step<M, N, AT>(acc, k, A, lda, B, ldb);
}
template <int M, int N, bool ACC, bool AT, int ASKS>
INLINE void micro(int K, const float* A, int64_t lda, const float* B, int64_t ldb, float* out, int64_t ldo, Ahead* ahead) {
  vf acc[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) acc[m][n] = ACC ? ld(out + m * ldo + n * L) : (vf){};
  multiply<M, N, AT, ASKS>(acc, K, A, lda, B, ldb, few(ahead, K, A, ASKS));
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) st(out + m * ldo + n * L, acc[m][n]);
}
// out = scale (fade A[M, K] B[K, N] + C[M, J] D[J, N]), fade: one number a row, or null.
template <int M, int N>
INLINE void micro_sum(int K, const float* A, int64_t lda, const float* B, const float* fade, int J, const float* C, int64_t ldc, const float* D, int64_t ldb,
                      float scale, Place out, Ahead* ahead) {
  vf acc[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) acc[m][n] = (vf){};
  multiply<M, N, false>(acc, K, A, lda, B, ldb, few(ahead, K, A));
  for (int m = 0; fade && m < M; m++)
    for (int n = 0; n < N; n++) acc[m][n] *= bc(fade[m]);
  multiply<M, N, false>(acc, J, C, ldc, D, ldb, few(ahead, J, C));
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) out.put(m, n * L, acc[m][n] * scale);
}
// fn(width, j) for the columns j .. of N, as many vectors at a time as the register tile has. fn is to be inlined: as a call a chunk takes 6 % longer.
template <class F>
INLINE void across(int N, F fn) {
  int j = 0;
  for (; j + NR * L <= N; j += NR * L) fn(std::integral_constant<int, NR>(), j);
  if constexpr (NR > 2)
    for (; j + 2 * L <= N; j += 2 * L) fn(std::integral_constant<int, 2>(), j);
  for (; j < N; j += L) fn(std::integral_constant<int, 1>(), j);
}
template <bool ACC, bool AT, int ASKS = 1>
static void gemm(int M, int N, int K, const float* A, int64_t lda, const float* B, int64_t ldb, float* out, int64_t ldo, Ahead* ahead = nullptr) {
  for (int i = 0; i < M; i += MR) {
    const float* a = AT ? A + i : A + i * lda;
    across(N, [&](auto width, int j) __attribute__((always_inline)) { micro<MR, width, ACC, AT, ASKS>(K, a, lda, B + j, ldb, out + i * ldo + j, ldo, ahead); });
  }
}
// Lower triangles, n x n: only blocks on and below the diagonal are touched.
template <bool ACC>
static void lower_rows(int n, int N, const float* A, int64_t lda, const float* B, int64_t ldb, float* out, int64_t ldo, Ahead* ahead = nullptr) {  // A lower
  for (int i = 0; i < n; i += MR) gemm<ACC, false>(MR, N, i + MR, A + i * lda, lda, B, ldb, out + i * ldo, ldo, ahead);
}
// out = scale (fade A B + C D), A [n, K], C lower [n, n]: a chunk's outputs from the state before it and from its own tokens.
static void lower_sum(int n, int N, int K, const float* A, int64_t lda, const float* B, const float* fade, const float* C, const float* D, float scale,
                      Place out, Ahead* ahead = nullptr) {
  for (int i = 0; i < n; i += MR) {
    const float* f = fade ? fade + i : fade;
    across(N, [&](auto width, int j) __attribute__((always_inline)) {
      micro_sum<MR, width>(K, A + i * lda, lda, B + j, f, i + MR, C + i * n, n, D + j, N, scale, out.from(i, j), ahead);
    });
  }
}
static void lower_transposed(int n, int N, const float* A, int64_t lda, const float* B, int64_t ldb, float* out, int64_t ldo) {  // += A^T B
  for (int j = 0; j < n; j += MR) gemm<true, true>(MR, N, n - j, A + j * lda + j, lda, B + j * ldb, ldb, out + j * ldo, ldo);
}
// out lower = A B^T, BT [K, n]; late: rows of A that are loaded as they are needed
static void lower_product(int n, int K, const float* A, int64_t lda, const float* BT, float* out, Ahead* ahead = nullptr, const Late& late = {}) {
  for (int i = 0; i < n; i += MR) {
    late.load(i, MR);
    int cols = up(i + MR);
    gemm<false, false>(MR, cols < n ? cols : n, K, A + i * lda, lda, BT, n, out + i * n, n, ahead);
  }
}
"""
