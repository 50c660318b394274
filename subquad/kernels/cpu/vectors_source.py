"""C++: vectors of fp32 and what is done within a few of them. Everything else is written in these words.

L floats per vector (16 AVX-512, 8 AVX2, 4 elsewhere) and the register tile MR x NR vectors are set by the compiler's target.
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
#include <type_traits>
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
// 16-bit words and their zero-extended numbers, each in one instruction: g++ 12 makes five and three of them.
INLINE vu widen(vh x) {
#if defined(__AVX512F__)
  return (vu)__builtin_ia32_pmovzxwd512_mask((short __attribute__((vector_size(32))))x, (vi){}, -1);
#else
  return __builtin_convertvector(x, vu);
#endif
}
INLINE vh narrow(vu x) {
#if defined(__AVX512F__)
  return (vh)__builtin_ia32_pmovdw512_mask((vi)x, (short __attribute__((vector_size(32)))){}, -1);
#else
  return __builtin_convertvector(x, vh);
#endif
}
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

// ---- transposition of tiles: dst[c][r] = src[r][c]; rows and cols multiples of L
template <class F>  // row(i): L numbers of row i
INLINE void transpose_block(F row, float* dst, int64_t ldd) {
  constexpr int G = L / 4;  // lanes of four: squares of four are turned within them, then whole lanes change places
  vf a[L], b[L];
  vi lo = {}, hi = {}, first = {}, second = {}, low = {}, high = {};
  for (int i = 0; i < L; i++) {
    int lane = i / 4 * 4, at = i % 4;
    lo[i] = lane + at / 2 + at % 2 * L, hi[i] = lo[i] + 2;
    first[i] = lane + at % 2 + at / 2 * L, second[i] = first[i] + 2;
    low[i] = i / 8 * 4 + i % 4 + i / 4 % 2 * L, high[i] = low[i] + L / 2;
  }
  for (int i = 0; i < L; i++) a[i] = row(i);
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
template <class F>  // at(r, c): L numbers of row r from column c on
INLINE void transpose_from(int rows, int cols, F at, float* dst, int64_t ldd) {
  for (int i = 0; i < rows; i += L)
    for (int j = 0; j < cols; j += L) transpose_block([&](int r) __attribute__((always_inline)) { return at(i + r, j); }, dst + j * ldd + i, ldd);
}
static void transpose(int rows, int cols, const float* src, int64_t lds, float* dst, int64_t ldd) {
  transpose_from(rows, cols, [&](int r, int c) __attribute__((always_inline)) { return ld(src + r * lds + c); }, dst, ldd);
}
"""
