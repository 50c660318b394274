"""C++: vectors, tiles in fp32, matrix products of tiles, threads. Everything else is written in these words.

L floats per vector (16 AVX-512, 8 AVX2, 4 elsewhere) and the register tile MR x NR vectors are set by the compiler's target. Tiles are row-major, their
rows padded with zeros to a multiple of L, so that no product has a remainder.
"""

SOURCE = r"""
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <thread>
#include <vector>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int L = 16, MR = 8, NR = 2;
#elif defined(__AVX2__)
constexpr int L = 8, MR = 4, NR = 3;
#else
constexpr int L = 4, MR = 4, NR = 2;
#endif
typedef float vf __attribute__((vector_size(4 * L)));
typedef float vfu __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * L)));
typedef uint32_t vu __attribute__((vector_size(4 * L)));
typedef uint16_t vh __attribute__((vector_size(2 * L)));
typedef uint16_t vhu __attribute__((vector_size(2 * L), aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

INLINE vf ld(const float* p) { return *(const vfu*)p; }
INLINE void st(float* p, vf x) { *(vfu*)p = x; }
// Past the caches, to an aligned place: for results larger than they are. A cache line that is written whole need not be read first.
INLINE void stream(float* p, vf x) {
#if defined(__AVX512F__)
  __builtin_ia32_movntps512(p, x);
#elif defined(__AVX2__)
  __builtin_ia32_movntps256(p, x);
#elif defined(__SSE2__)
  __builtin_ia32_movntps(p, x);
#else
  st(p, x);
#endif
}
constexpr int64_t CACHES = 16 << 20;  // bytes of results from which on they are streamed
INLINE vf bc(float x) { return x - (vf){}; }
INLINE vf pick(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
INLINE vf vmax(vf a, vf b) { return pick(a > b, a, b); }
INLINE float hsum(vf x) {
  float s[L];
  st(s, x);
  for (int w = L / 2; w; w /= 2)
    for (int i = 0; i < w; i++) s[i] += s[i + w];
  return s[0];
}
INLINE float hmax(vf x) {
  float m = x[0];
  for (int i = 1; i < L; i++) m = x[i] > m ? x[i] : m;
  return m;
}
INLINE vi iota() {
  vi x = {};
  for (int i = 0; i < L; i++) x[i] = i;
  return x;
}
// exp to about 1 ulp: 2^n e^r with |r| <= ln(2) / 2, e^r by its Taylor sum to r^6 (error below 1e-7). 0 below -87; NaN stays NaN.
INLINE vf vexp(vf x) {
  vi low = x < bc(-87.0f);
  x = pick(low, bc(-87.0f), x);
  x = pick(x > bc(88.0f), bc(88.0f), x);
  vf t = x * 1.44269504f + 12582912.0f, n = t - 12582912.0f;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = bc(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vf e = (vf)((vi)p + ((vi)t << 23));
  return (vf)((vi)e & ~low);
}
INLINE float exp1(float x) { return vexp(bc(x))[0]; }

INLINE int up(int n) { return (n + L - 1) / L * L; }
static inline float dot(const float* a, const float* b, int n) {  // n a multiple of L
  vf s = {};
  for (int i = 0; i < n; i += L) s += ld(a + i) * ld(b + i);
  return hsum(s);
}
static inline void axpy(float* y, float a, const float* x, int n) {
  for (int i = 0; i < n; i += L) st(y + i, ld(y + i) + a * ld(x + i));
}
static inline void scale_row(float* y, float a, int n) {
  for (int i = 0; i < n; i += L) st(y + i, a * ld(y + i));
}

// ---- tensors [batch, tokens, heads, size], size contiguous; type 0 fp32, 1 bf16, 2 fp16
struct Tensor {
  char* p;
  int64_t sb, st, sh;
  int64_t type;
};
INLINE const char* at(const Tensor& t, int64_t b, int64_t i, int64_t h) {
  return t.p + (b * t.sb + i * t.st + h * t.sh) * (t.type ? 2 : 4);
}
// Rows that will be needed soon, asked for within products, 128 bytes with every 8 steps of one: the memory's latency hides behind arithmetic, and there are
// always few in flight, so that what misses the first cache level meanwhile need not wait. They are read into the second: the tiles at hand fill the first.
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
  void want(const char* p, int64_t stride, int64_t bytes, int64_t count) {
    for (int64_t c = 0; c < bytes && used < MOST; c += 128) of[used++] = {p + c, stride, count};
  }
  void want(const Tensor& t, int64_t b, int64_t from, int64_t h, int rows, int size, int64_t hi) {
    int bytes = t.type ? 2 : 4;
    want(at(t, b, from, h), t.st * bytes, (int64_t)size * bytes, hi - from < rows ? hi - from : rows);
  }
  void want(const float* p, int64_t count) { want((const char*)p, 128, 128, (count + 31) / 32); }
  Few next(int rows) {
    if (now == used) return {of[0].p, 0};
    const Rows& r = of[now];
    Few few = {r.p + row * r.stride, r.stride};
    if ((row += rows) >= r.count) row = 0, now++;
    return few;
  }
};
INLINE Few few(Ahead* ahead, int K, const float* none) { return ahead && ahead->used ? ahead->next((K + 7) / 8) : Few{(const char*)none, 0}; }

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
template <int M, int N, bool AT>
INLINE void multiply(vf (&acc)[M][N], int K, const float* A, int64_t lda, const float* B, int64_t ldb, Few ahead) {
  int k = 0;
  for (; k + 8 <= K; k += 8) {
    ahead.ask();
#pragma GCC unroll 8
    for (int u = 0; u < 8; u++) step<M, N, AT>(acc, k + u, A, lda, B, ldb);
  }
  if constexpr (MR < 8)
    for (; k < K; k++) step<M, N, AT>(acc, k, A, lda, B, ldb);
}
template <int M, int N, bool ACC, bool AT>
INLINE void micro(int K, const float* A, int64_t lda, const float* B, int64_t ldb, float* out, int64_t ldo, Ahead* ahead) {
  vf acc[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) acc[m][n] = ACC ? ld(out + m * ldo + n * L) : (vf){};
  multiply<M, N, AT>(acc, K, A, lda, B, ldb, few(ahead, K, A));
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) st(out + m * ldo + n * L, acc[m][n]);
}
// out = scale (fade A[M, K] B[K, N] + C[M, J] D[J, N]), fade: one number a row, or null.
template <int M, int N>
INLINE void micro_sum(int K, const float* A, int64_t lda, const float* B, const float* fade, int J, const float* C, int64_t ldc, const float* D, int64_t ldb,
                      float scale, float* out, int64_t ldo, Ahead* ahead) {
  vf acc[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) acc[m][n] = (vf){};
  multiply<M, N, false>(acc, K, A, lda, B, ldb, few(ahead, K, A));
  for (int m = 0; fade && m < M; m++)
    for (int n = 0; n < N; n++) acc[m][n] *= bc(fade[m]);
  multiply<M, N, false>(acc, J, C, ldc, D, ldb, few(ahead, J, C));
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) st(out + m * ldo + n * L, acc[m][n] * scale);
}
template <bool ACC, bool AT>
static void gemm(int M, int N, int K, const float* A, int64_t lda, const float* B, int64_t ldb, float* out, int64_t ldo, Ahead* ahead = nullptr) {
  for (int i = 0; i < M; i += MR) {
    const float* a = AT ? A + i : A + i * lda;
    int j = 0;
    for (; j + NR * L <= N; j += NR * L) micro<MR, NR, ACC, AT>(K, a, lda, B + j, ldb, out + i * ldo + j, ldo, ahead);
    if constexpr (NR > 2)
      for (; j + 2 * L <= N; j += 2 * L) micro<MR, 2, ACC, AT>(K, a, lda, B + j, ldb, out + i * ldo + j, ldo, ahead);
    for (; j < N; j += L) micro<MR, 1, ACC, AT>(K, a, lda, B + j, ldb, out + i * ldo + j, ldo, ahead);
  }
}
// Lower triangles, n x n: only blocks on and below the diagonal are touched.
template <bool ACC>
static void lower_rows(int n, int N, const float* A, int64_t lda, const float* B, int64_t ldb, float* out, int64_t ldo, Ahead* ahead = nullptr) {  // A lower
  for (int i = 0; i < n; i += MR) gemm<ACC, false>(MR, N, i + MR, A + i * lda, lda, B, ldb, out + i * ldo, ldo, ahead);
}
// out = scale (fade A B + C D), A [n, K], C lower [n, n]: a chunk's outputs from the state before it and from its own tokens.
static void lower_sum(int n, int N, int K, const float* A, int64_t lda, const float* B, const float* fade, const float* C, const float* D, float scale,
                      float* out, int64_t ldo, Ahead* ahead = nullptr) {
  for (int i = 0; i < n; i += MR) {
    const float *a = A + i * lda, *c = C + i * n, *f = fade ? fade + i : fade;
    int j = 0;
    for (; j + NR * L <= N; j += NR * L) micro_sum<MR, NR>(K, a, lda, B + j, f, i + MR, c, n, D + j, N, scale, out + i * ldo + j, ldo, ahead);
    if constexpr (NR > 2)
      for (; j + 2 * L <= N; j += 2 * L) micro_sum<MR, 2>(K, a, lda, B + j, f, i + MR, c, n, D + j, N, scale, out + i * ldo + j, ldo, ahead);
    for (; j < N; j += L) micro_sum<MR, 1>(K, a, lda, B + j, f, i + MR, c, n, D + j, N, scale, out + i * ldo + j, ldo, ahead);
  }
}
static void lower_transposed(int n, int N, const float* A, int64_t lda, const float* B, int64_t ldb, float* out, int64_t ldo) {  // += A^T B
  for (int j = 0; j < n; j += MR) gemm<true, true>(MR, N, n - j, A + j * lda + j, lda, B + j * ldb, ldb, out + j * ldo, ldo);
}
// ---- transposition of tiles: dst[c][r] = src[r][c]; rows and cols multiples of L
INLINE void transpose_block(const float* src, int64_t lds, float* dst, int64_t ldd) {
  constexpr int G = L / 4;  // lanes of four: squares of four are turned within them, then whole lanes change places
  vf a[L], b[L];
  vi lo = {}, hi = {}, first = {}, second = {}, low = {}, high = {};
  for (int i = 0; i < L; i++) {
    int lane = i / 4 * 4, at = i % 4;
    lo[i] = lane + at / 2 + at % 2 * L, hi[i] = lo[i] + 2;
    first[i] = lane + at % 2 + at / 2 * L, second[i] = first[i] + 2;
    low[i] = i / 8 * 4 + i % 4 + i / 4 % 2 * L, high[i] = low[i] + L / 2;
  }
  for (int i = 0; i < L; i++) a[i] = ld(src + i * lds);
  for (int i = 0; i < L; i += 4) {
    vf x = __builtin_shuffle(a[i], a[i + 1], lo), y = __builtin_shuffle(a[i], a[i + 1], hi);
    vf z = __builtin_shuffle(a[i + 2], a[i + 3], lo), w = __builtin_shuffle(a[i + 2], a[i + 3], hi);
    b[i] = __builtin_shuffle(x, z, first), b[i + 1] = __builtin_shuffle(x, z, second);
    b[i + 2] = __builtin_shuffle(y, w, first), b[i + 3] = __builtin_shuffle(y, w, second);
  }
  for (int c = 0; c < 4; c++) {
    vf g[G], f[G];
    for (int i = 0; i < G; i++) g[i] = b[4 * i + c];
    for (int s = 1; s < G; s *= 2) {
      for (int i = 0; i < G / 2; i++) f[2 * i] = __builtin_shuffle(g[i], g[i + G / 2], low), f[2 * i + 1] = __builtin_shuffle(g[i], g[i + G / 2], high);
      for (int i = 0; i < G; i++) g[i] = f[i];
    }
    for (int i = 0; i < G; i++) st(dst + (4 * i + c) * ldd, g[i]);
  }
}
static void transpose(int rows, int cols, const float* src, int64_t lds, float* dst, int64_t ldd) {
  for (int i = 0; i < rows; i += L)
    for (int j = 0; j < cols; j += L) transpose_block(src + i * lds + j, lds, dst + j * ldd + i, ldd);
}

// ---- tensors into tiles and back
INLINE vf half_to_float(vu h) {  // fp16 bits
  vu body = (h & 0x7fff) << 13;
  vf x = (vf)body * 5.192296858534828e33f;  // 2^112 moves the exponent's bias
  vu bits = (vu)x | (((h & 0x7c00) == 0x7c00) & 0x7f800000u);
  return (vf)(bits | ((h & 0x8000) << 16));
}
INLINE vf load(const char* p, int64_t type) {
  if (type == 0) return ld((const float*)p);
  vu h = __builtin_convertvector(*(const vhu*)p, vu);
  return type == 1 ? (vf)(h << 16) : half_to_float(h);
}
static inline float load1(const char* p, int64_t type) {
  if (type == 0) return *(const float*)p;
  uint16_t h;
  memcpy(&h, p, 2);
  vu v = (vu){} + (uint32_t)h;
  return type == 1 ? ((vf)(v << 16))[0] : half_to_float(v)[0];
}
INLINE vh to_bf16(vf x) {  // to nearest, ties to even; NaN stays NaN
  vu b = (vu)x, r = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  vu nan = (vu)(x != x);
  return __builtin_convertvector((r & ~nan) | (((b >> 16) | 0x40) & nan), vh);
}
// Rows `from`.. of one head into a tile [rows, up(size)]; rows outside [lo, hi) and padding are zeros.
static void load_tile(const Tensor& t, int64_t b, int64_t from, int64_t h, int rows, int size, int64_t lo, int64_t hi, float* dst, float scale = 1.0f) {
  int width = up(size), whole = size / L * L;
  for (int r = 0; r < rows; r++, dst += width) {
    int64_t i = from + r;
    if (i < lo || i >= hi) {
      memset(dst, 0, 4 * width);
      continue;
    }
    const char* p = at(t, b, i, h);
    int c = 0;
    if (t.type == 0) for (; c < whole; c += L) st(dst + c, scale * ld((const float*)p + c));
    else if (t.type == 1) for (; c < whole; c += L) st(dst + c, scale * load(p + 2 * c, 1));
    else for (; c < whole; c += L) st(dst + c, scale * load(p + 2 * c, 2));
    for (; c < size; c++) dst[c] = scale * load1(p + (t.type ? 2 : 4) * c, t.type);
    for (; c < width; c++) dst[c] = 0;
  }
}
// The same, without a copy where the tensor's own rows can serve (only as the left factor of a product: rows may lie far apart).
static const float* borrow_tile(const Tensor& t, int64_t b, int64_t from, int64_t h, int rows, int size, int64_t lo, int64_t hi, float* buf, int64_t& ld) {
  if (t.type == 0 && size % L == 0 && from >= lo && from + rows <= hi) {
    ld = t.st;
    return (const float*)at(t, b, from, h);
  }
  load_tile(t, b, from, h, rows, size, lo, hi, buf);
  ld = up(size);
  return buf;
}
// Where results of a tile go: into the tensor's own rows where they can, else into a buffer, to be stored.
static float* lend_tile(const Tensor& t, int64_t b, int64_t from, int64_t h, int rows, int size, int64_t lo, int64_t hi, float* buf, int64_t& ld) {
  return const_cast<float*>(t.type == 0 && size % L == 0 && from >= lo && from + rows <= hi ? (ld = t.st, (const float*)at(t, b, from, h)) : (ld = up(size), buf));
}
static void store_tile(const Tensor& t, int64_t b, int64_t from, int64_t h, int rows, int size, int64_t lo, int64_t hi, const float* src, float scale = 1.0f,
                       bool past = false) {  // past: stream them
  int width = up(size), whole = size / L * L;
  for (int r = 0; r < rows; r++, src += width) {
    int64_t i = from + r;
    if (i < lo || i >= hi) continue;
    char* p = (char*)at(t, b, i, h);
    int c = 0;
    if (t.type == 0) {
      if (past && (uintptr_t)p % (4 * L) == 0) for (; c < whole; c += L) stream((float*)p + c, scale * ld(src + c));
      for (; c < whole; c += L) st((float*)p + c, scale * ld(src + c));
      for (; c < size; c++) ((float*)p)[c] = scale * src[c];
    } else {
      for (; c < whole; c += L) *(vhu*)(p + 2 * c) = to_bf16(scale * ld(src + c));
      for (; c < size; c++) {
        uint16_t x = to_bf16(bc(scale * src[c]))[0];
        memcpy(p + 2 * c, &x, 2);
      }
    }
  }
}
static void lower_product(int n, int K, const float* A, int64_t lda, const float* BT, float* out, Ahead* ahead = nullptr) {  // out lower = A B^T, BT [K, n]
  for (int i = 0; i < n; i += MR) {
    int cols = up(i + MR);
    gemm<false, false>(MR, cols < n ? cols : n, K, A + i * lda, lda, BT, n, out + i * n, n, ahead);
  }
}
// One number per token and head (fp32): rows into a column; outside [lo, hi): `fill`.
static void load_column(const Tensor& t, int64_t b, int64_t from, int64_t h, int rows, int64_t lo, int64_t hi, float* dst, float fill = 0.0f) {
  for (int r = 0; r < rows; r++) dst[r] = from + r < lo || from + r >= hi ? fill : *(const float*)at(t, b, from + r, h);
}
static void store_column(const Tensor& t, int64_t b, int64_t from, int64_t h, int rows, int64_t lo, int64_t hi, const float* src) {
  for (int r = 0; r < rows; r++)
    if (from + r >= lo && from + r < hi) *(float*)at(t, b, from + r, h) = src[r];
}
static void load_state(const float* src, int K, int V, int ld, float* dst) {  // [K, ld] -> [up(K), up(V)]
  memset(dst, 0, 4 * up(K) * up(V));
  for (int k = 0; k < K; k++) memcpy(dst + k * up(V), src + (int64_t)k * ld, 4 * V);
}
static void store_state(float* dst, int K, int V, int ld, const float* src) {
  for (int k = 0; k < K; k++) memcpy(dst + (int64_t)k * ld, src + k * up(V), 4 * V);
}

// ---- scratch memory: one block per thread, kept between calls unless it is large
struct Arena {
  char* base = nullptr;
  size_t size = 0, used = 0;
  std::vector<void*> more;
  float* get(size_t floats) {
    size_t bytes = (floats * 4 + 4 * L + 127) / 64 * 64;
    if (used + bytes > size) {
      void* p = aligned_alloc(64, bytes);
      more.push_back(p);
      wanted += bytes;
      return (float*)p;
    }
    float* p = (float*)(base + used);
    used += bytes;
    wanted += bytes;
    return p;
  }
  float* zeros(size_t floats) {
    float* p = get(floats);
    memset(p, 0, floats * 4);
    return p;
  }
  size_t wanted = 0;
  void reset() {
    for (void* p : more) free(p);
    more.clear();
    if (wanted > size && wanted <= (size_t)64 << 20) {
      free(base);
      base = (char*)aligned_alloc(64, wanted);
      size = wanted;
    }
    used = wanted = 0;
  }
  ~Arena() {
    for (void* p : more) free(p);
    free(base);
  }
};
static thread_local Arena arena;

// Numbers below 1e-38 (products of strong decays) count as zero: arithmetic on them is a hundred times slower.
struct FlushSubnormals {
#if defined(__SSE2__)
  unsigned kept = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(kept | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(kept); }
#endif
};
// One task per (sequence, key/value head): no two write the same place, so the number of threads changes no result.
template <class F>
static void parallel(int64_t tasks, int64_t threads, F task) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    FlushSubnormals flush;
    for (int64_t i; (i = next++) < tasks;) {
      task(i);
      arena.reset();
    }
#if defined(__SSE2__)
    _mm_sfence();  // streamed results are in memory before another thread reads them
#endif
  };
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < threads && i < tasks; i++) pool.emplace_back(work);
  work();
  for (auto& t : pool) t.join();
}
// The same with neighbouring heads in one task, as many as leave every thread work: their rows share pages of memory, so they are best walked together.
template <class F>
static void parallel_heads(int64_t N, int64_t G, int64_t threads, F task) {
  int64_t parts = threads > N ? (threads + N - 1) / (N > 0 ? N : 1) : 1;
  if (parts > G) parts = G;
  parallel(N * parts, threads, [&](int64_t i) { task(i / parts, i % parts * G / parts, (i % parts + 1) * G / parts); });
}
"""
