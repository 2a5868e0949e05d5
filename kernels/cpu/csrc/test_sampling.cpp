// What tests reach sampling by: the kernels of one instruction set on logits of their own.
#include <vector>

#include "isa.h"
#include "philox.h"

#define PW_TEST extern "C" __attribute__((visibility("default")))

namespace {
struct Aligned {
  explicit Aligned(int64_t bytes) : memory(size_t(bytes) + 64) {}
  char *data() { return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64; }
  std::vector<char> memory;
};
}  // namespace

// logits [num, vocab] of the outputs of `s`, whose tokens are not read. How many failed.
PW_TEST int pw_test_sample(const char *isa, const float *logits, int vocab, const pw_samples *s) {
  const pw::Kernels &kernels = *pw::find_kernels(isa);
  Aligned scratch(kernels.sampling_scratch(vocab));
  int failed = 0;
  for (int i = 0; i < s->num; i++)
    failed -= kernels.sample(logits + int64_t(i) * vocab, vocab, *s, i, scratch.data());
  return failed;
}

PW_TEST int pw_test_score(const char *isa, const float *logits, int vocab, const int64_t *token_ids,
                          const int32_t *num_top, int count, int max_top, double *logprobs, int64_t *ranks,
                          int64_t *top_ids, double *top_logprobs) {
  const pw::Kernels &kernels = *pw::find_kernels(isa);
  Aligned scratch(kernels.sampling_scratch(vocab));
  int failed = 0;
  for (int i = 0; i < count; i++)
    failed -= kernels.score(logits + int64_t(i) * vocab, vocab, token_ids[i], num_top[i], max_top, logprobs + i,
                            ranks + i, top_ids + i * max_top, top_logprobs + i * max_top, scratch.data());
  return failed;
}

// Eight calls: counters [4][8] become their words.
PW_TEST void pw_test_philox(uint32_t *counters, uint64_t seed) {
  pw::u64x8 c[4];
  for (int i = 0; i < 32; i++) c[i / 8][i % 8] = counters[i];
  pw::philox(c, seed);
  for (int i = 0; i < 32; i++) counters[i] = uint32_t(c[i / 8][i % 8]);
}

// The noise of tokens first … first + 31 (first a multiple of 4), by both ways to it, and the bound on it, [32] each.
PW_TEST void pw_test_noise(uint64_t seed, int64_t position, int32_t first, float *by_run, float *by_id, float *bound) {
  const pw::Stream stream = {seed, uint32_t(position)};
  pw::u32x16 words[2];
  pw::words_of_run(stream, first, words);
  for (int i = 0; i < 32; i++) {
    int32_t ids[16] = {first + i};
    by_run[i] = pw::gumbel(words[i / 16][i % 16]);
    by_id[i] = pw::gumbel(pw::words_of(stream, ids)[0]);
    bound[i] = pw::gumbel_bound(words[i / 16])[i % 16];
  }
}
