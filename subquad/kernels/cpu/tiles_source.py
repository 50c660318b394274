"""C++: tensors in memory, of any dtype, into tiles of fp32 and back.

Tiles are row-major, their rows padded with zeros to a multiple of L, so that no product has a remainder.
"""

SOURCE = r"""
// ---- tensors [batch, tokens, heads, size], size contiguous; type 0 fp32, 1 bf16, 2 fp16
struct Tensor {
  char* p;
  int64_t sb, st, sh;
  int64_t type;
};
INLINE const char* at(const Tensor& t, int64_t b, int64_t i, int64_t h) {
  return t.p + (b * t.sb + i * t.st + h * t.sh) * (t.type ? 2 : 4);
}
constexpr int64_t CACHES = 16 << 20;  // bytes of results from which on they are streamed
// ---- tensors into tiles and back
INLINE vf half_to_float(vu h) {  // fp16 bits
  vu body = (h & 0x7fff) << 13;
  vf x = (vf)body * 5.192296858534828e33f;  // 2^112 moves the exponent's bias
  vu bits = (vu)x | (((h & 0x7c00) == 0x7c00) & 0x7f800000u);
  return (vf)(bits | ((h & 0x8000) << 16));
}
INLINE vf load(const char* p, int64_t type) {
  if (type == 0) return ld((const float*)p);
  vu h = widen(*(const vhu*)p);
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
  return narrow(x != x ? (vu){} + 0x7fc0u : r);
}
// Rows that are a tile as they stand in memory, but for their dtype: nothing to pad, nothing outside the sequence.
static bool is_whole(int64_t from, int rows, int size, int64_t lo, int64_t hi) { return size % L == 0 && from >= lo && from + rows <= hi; }
struct Whole {
  const char* p;
  int64_t stride;  // bytes
  int64_t type;
  Whole(const Tensor& t, int64_t b, int64_t from, int64_t h) : p(at(t, b, from, h)), stride(t.st * (t.type ? 2 : 4)), type(t.type) {}
  template <class F>  // fn(at), at(r, c): L numbers of row r from column c on, of a dtype that the compiler knows
  INLINE_MEMBER void read(F fn) const {
    if (type == 0) fn([&](int r, int c) __attribute__((always_inline)) { return load(p + r * stride + 4 * c, 0); });
    else if (type == 1) fn([&](int r, int c) __attribute__((always_inline)) { return load(p + r * stride + 2 * c, 1); });
    else fn([&](int r, int c) __attribute__((always_inline)) { return load(p + r * stride + 2 * c, 2); });
  }
  void copy(int from, int rows, int size, float* dst, float scale = 1.0f) const {  // rows from.. to the same rows of dst
    read([&](auto at) __attribute__((always_inline)) {
      for (int r = from; r < from + rows; r++)
        for (int c = 0; c < size; c += L) st(dst + r * size + c, scale == 1.0f ? at(r, c) : scale * at(r, c));
    });
  }
  void transposed(int rows, int size, float* dst) const {
    read([&](auto at) __attribute__((always_inline)) { transpose_from(rows, size, at, dst, rows); });
  }
};
// Rows `from`.. of one head into a tile [rows, up(size)]; rows outside [lo, hi) and padding are zeros.
static void load_tile(const Tensor& t, int64_t b, int64_t from, int64_t h, int rows, int size, int64_t lo, int64_t hi, float* dst, float scale = 1.0f) {
  if (is_whole(from, rows, size, lo, hi)) return Whole(t, b, from, h).copy(0, rows, size, dst, scale);
  int width = up(size), whole = size / L * L;
  for (int r = 0; r < rows; r++, dst += width) {
    int64_t i = from + r;
    if (i < lo || i >= hi) {
      memset(dst, 0, 4 * width);
      continue;
    }
    const char* p = at(t, b, i, h);
    int c = 0;
    for (; c < whole; c += L) st(dst + c, scale * load(p + (t.type ? 2 : 4) * c, t.type));
    for (; c < size; c++) dst[c] = scale * load1(p + (t.type ? 2 : 4) * c, t.type);
    for (; c < width; c++) dst[c] = 0;
  }
}
// The same, transposed: dst [up(size), rows]; through buf [rows, up(size)] where rows are no whole tile.
static void load_transposed(const Tensor& t, int64_t b, int64_t from, int64_t h, int rows, int size, int64_t lo, int64_t hi, float* buf, float* dst) {
  if (is_whole(from, rows, size, lo, hi)) return Whole(t, b, from, h).transposed(rows, size, dst);
  load_tile(t, b, from, h, rows, size, lo, hi, buf);
  transpose(rows, up(size), buf, up(size), dst, rows);
}
// Rows of 16-bit numbers that are copied into a tile between the products that need them, where that hides behind arithmetic (queries of a chunk: 11.36 -> 11.22
// us in cache, 1.5 to 2 % of a call at 1,024 and 4,096 tokens).
struct Late {
  std::optional<Whole> rows;
  int size;
  float* dst;
  void load(int from, int count) const {
    if (rows) rows->copy(from, count, size, dst);
  }
};
// As load_tile, without a copy where the tensor's own rows can serve (only as the left factor of a product: rows may lie far apart), and with none yet where
// the caller has them copied late.
static const float* borrow_tile(const Tensor& t, int64_t b, int64_t from, int64_t h, int rows, int size, int64_t lo, int64_t hi, float* buf, int64_t& ld,
                                Late* late = nullptr) {
  bool whole = is_whole(from, rows, size, lo, hi);
  ld = whole && t.type == 0 ? t.st : up(size);
  if (whole && t.type == 0) return (const float*)at(t, b, from, h);
  if (whole && late) *late = {Whole(t, b, from, h), size, buf};
  else load_tile(t, b, from, h, rows, size, lo, hi, buf);
  return buf;
}
// Where results of a tile go, rows `stride` numbers apart.
struct Place {
  void* p;
  int64_t stride;
  bool bf16 = false;
  INLINE_MEMBER Place from(int r, int c) const { return {(char*)p + (r * stride + c) * (bf16 ? 2 : 4), stride, bf16}; }
  INLINE_MEMBER void put(int r, int c, vf x) const {
    if (bf16) *(vhu*)((uint16_t*)p + r * stride + c) = to_bf16(x);
    else st((float*)p + r * stride + c, x);
  }
};
// Into the tensor's own rows where they can, else into a buffer, to be stored.
static Place lend_tile(const Tensor& t, int64_t b, int64_t from, int64_t h, int rows, int size, int64_t lo, int64_t hi, float* buf) {
  if (is_whole(from, rows, size, lo, hi)) return {(void*)at(t, b, from, h), t.st, t.type == 1};
  return {buf, up(size)};
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
"""
