// Which instruction sets this library was built for, and which of them this host can run. Compiled for any host.
#include <cstring>

#include "isa.h"

namespace pw {

bool supported_generic() { return true; }

#if defined(__x86_64__)
bool supported_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool supported_avx512_vnni() {
  return supported_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
bool supported_avx512_bf16() { return supported_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif

namespace {
const Kernels *const tables[] = {
#if defined(__x86_64__)
    &kernels_avx512_bf16, &kernels_avx512_vnni, &kernels_avx2,
#endif
    &kernels_generic,
};
}  // namespace

const Kernels *find_kernels(const char *isa) {
  const bool any = !strcmp(isa, "auto");
  for (const Kernels *table : tables)
    if ((any || !strcmp(isa, table->name)) && table->supported()) return table;
  return nullptr;
}

const char *kernel_names() {
  struct Names {
    char text[128] = "";
    Names() {
      for (const Kernels *table : tables)
        if (table->supported()) strcat(strcat(text, *text ? " " : ""), table->name);
    }
  };
  static const Names names;
  return names.text;
}

}  // namespace pw
