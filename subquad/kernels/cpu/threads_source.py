"""C++: scratch memory and threads.
"""

SOURCE = r"""
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
