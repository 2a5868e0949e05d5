// What tests reach gemm.inc by, by the name of an instruction set.
#include "isa.h"

using namespace pw;

#pragma GCC visibility push(default)
extern "C" {

void pw_test_gemm(const char *isa, int threads, const pw_weight *weight, const Operand *x, int rows, const Output *out) {
  Team team(threads, false);
  auto body = [&](int thread) { find_kernels(isa)->gemm(team, thread, *weight, *x, rows, *out); };
  team.run(body);
}

// best [threads][rows]
void pw_test_gemm_argmax(const char *isa, int threads, const pw_weight *weight, const Operand *x, int rows, float softcap,
                         Best *best) {
  Team team(threads, false);
  auto body = [&](int thread) {
    find_kernels(isa)->gemm_argmax(team, thread, *weight, *x, rows, softcap, best + int64_t(thread) * rows);
  };
  team.run(body);
}

}  // extern "C"
#pragma GCC visibility pop
