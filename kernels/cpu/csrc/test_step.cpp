// For tests of whole steps and for benchmarks/cpu_step.py: KV that was written, and what the machine can do.
#include <ctime>

#include "model.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

}  // namespace

// Every KV page gets ordinary numbers: memory that was never written is one page of zeros, which is always in the cache.
EXPORT void pw_test_fill_kv(pw_model *model) {
  uint16_t *kv = model->kv.as<uint16_t>();
  uint64_t state = 1;
  for (size_t i = 0, n = model->kv_layer_bytes * model->layers.size() / 2; i < n; i++) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    kv[i] = uint16_t(0x3C00 | (state >> 40 & 0x3FF) | (state >> 33 & 1) << 15);
  }
}

// Bytes a second that `threads` read from memory, `bytes` in all, once.
EXPORT double pw_test_read_speed(int threads, int64_t bytes) {
  pw::Memory memory;
  memory.reserve(size_t(bytes), "benchmark");
  typedef uint64_t words __attribute__((vector_size(64)));
  words *data = memory.as<words>();
  const int64_t count = bytes / 64 / threads;
  for (int64_t i = 0; i < bytes / 64; i++) data[i] = words{} + uint64_t(i);
  pw::Team team(threads, true);
  uint64_t seen = 0;
  auto body = [&](int thread) {
    words sums[4] = {};
    const words *mine = data + thread * count;
    for (int64_t i = 0; i + 4 <= count; i += 4)
      for (int j = 0; j < 4; j++) sums[j] |= mine[i + j];
    __atomic_fetch_or(&seen, sums[0][0] | sums[1][0] | sums[2][0] | sums[3][0], __ATOMIC_RELAXED);
  };
  const double begin = now();
  team.run(body);
  return seen ? double(bytes) / (now() - begin) : 0;
}

// Multiply-adds a second of `threads`, two operations each, nothing but registers: "bf16", "int8" or "float".
#if defined(__x86_64__)
#define TIMES(instruction)                                                                                        \
  asm volatile(instruction " %%zmm30,%%zmm31,%%zmm0\n" instruction " %%zmm30,%%zmm31,%%zmm1\n"                    \
               instruction " %%zmm30,%%zmm31,%%zmm2\n" instruction " %%zmm30,%%zmm31,%%zmm3\n"                    \
               instruction " %%zmm30,%%zmm31,%%zmm4\n" instruction " %%zmm30,%%zmm31,%%zmm5\n"                    \
               instruction " %%zmm30,%%zmm31,%%zmm6\n" instruction " %%zmm30,%%zmm31,%%zmm7\n"                    \
               instruction " %%zmm30,%%zmm31,%%zmm8\n" instruction " %%zmm30,%%zmm31,%%zmm9\n"                    \
               instruction " %%zmm30,%%zmm31,%%zmm10\n" instruction " %%zmm30,%%zmm31,%%zmm11\n" ::               \
                   : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11")

EXPORT double pw_test_peak(const char *isa, int threads, const char *type) {
  const bool bf16 = *type == 'b', int8 = *type == 'i';
  if (pw::find_kernels(isa) != pw::find_kernels("avx512_bf16")) return 0;  // the others are not known here
  constexpr int64_t loops = 4'000'000;
  pw::Team team(threads, true);
  auto body = [&](int) {
    for (int64_t i = 0; i < loops; i++) {
      if (bf16) TIMES("vdpbf16ps");
      else if (int8) TIMES("vpdpbusd");
      else TIMES("vfmadd231ps");
    }
  };
  const double begin = now();
  team.run(body);
  return 2.0 * (bf16 ? 32 : int8 ? 64 : 16) * 12 * double(loops) * threads / (now() - begin);
}
#else
EXPORT double pw_test_peak(const char *, int, const char *) { return 0; }
#endif
