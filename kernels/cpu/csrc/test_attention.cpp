// What tests reach rows.inc, kv.inc and attention.inc by: each function of a table, by the name of its instruction set.
#include <vector>

#include "isa.h"

using namespace pw;

#pragma GCC visibility push(default)
extern "C" {

void pw_test_embed(const char *isa, const pw_spec *spec, int64_t token, float *x) {
  find_kernels(isa)->embed(*spec, token, x);
}

void pw_test_normalize(const char *isa, const float *x, const float *weight, float eps, int k, float *y) {
  find_kernels(isa)->normalize(x, weight, eps, k, y);
}

void pw_test_prepare(const char *isa, const float *x, const float *norm_weight, float eps, int k, const Operand *to,
                     int row) {
  find_kernels(isa)->prepare(x, norm_weight, eps, k, *to, row);
}

bool pw_test_attention_fits(const char *isa, const AttentionShape *shape) {
  return find_kernels(isa)->attention_fits(*shape);
}

int64_t pw_test_page_bytes(const char *isa, const AttentionShape *shape) { return find_kernels(isa)->page_bytes(*shape); }

// Tokens [count] in order, rows of qkv `ld` apart.
void pw_test_write_kv(const char *isa, const AttentionShape *shape, const pw_layer *layer, float *qkv, int64_t ld,
                      const int64_t *positions, const int64_t *slots, int count, char *pages) {
  for (int i = 0; i < count; i++)
    find_kernels(isa)->write_kv(*shape, *layer, qkv + i * ld, positions[i], slots[i], pages);
}

// `layers` attentions after one plan, on the same pages `layer_bytes` apart.
void pw_test_attend(const char *isa, int threads, const AttentionShape *shape, int window, const pw_batch *batch,
                    const float *qkv, int64_t ld, const char *pages, int layers, int64_t layer_bytes, float *out) {
  const Kernels *kernels = find_kernels(isa);
  Team team(threads, false);
  std::vector<char> memory(kernels->attend_bytes(*shape, *batch, threads) + 64, char(0xFF));
  char *scratch = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) & 63);
  kernels->attend_plan(*shape, *batch, threads, scratch);
  auto body = [&](int thread) {
    for (int layer = 0; layer < layers; layer++) {
      kernels->attend(team, thread, *shape, window, *batch, qkv, ld, pages + layer * layer_bytes, out, scratch);
      team.barrier(thread);
    }
  };
  team.run(body);
}

}  // extern "C"
#pragma GCC visibility pop
