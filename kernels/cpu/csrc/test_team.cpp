// What tests reach the team by. Files named test_* are built into the library of the tests alone.
#include "team.h"

// `repeats` shares of `count` items, a barrier after every `between`: how often each was done [count]. An item is
// `work` loops.
extern "C" __attribute__((visibility("default"))) void pw_test_share(int threads, bool spin, int repeats, int count,
                                                                     int between, int work, int32_t *done) {
  pw::Team team(threads, spin);
  auto item = [&](int, int i) {
    for (volatile int w = 0; w < work; w = w + 1) {
    }
    __atomic_fetch_add(&done[i], 1, __ATOMIC_RELAXED);
  };
  auto body = [&](int thread) {
    for (int r = 0; r < repeats; r++) {
      team.share(thread, count, item);
      if (r % between == 0) team.barrier(thread);
    }
  };
  team.run(body);
}
