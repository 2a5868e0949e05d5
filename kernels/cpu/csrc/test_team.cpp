// What tests reach the team by. Files named test_* are built into the library of the tests alone.
#include <vector>

#include "team.h"

// `repeats` shares of `count` items, of `work` loops each: how often each was done [count]. −1 where a share returned
// before all of its items were done.
extern "C" __attribute__((visibility("default"))) int pw_test_share(int threads, bool spin, int repeats, int count,
                                                                    int work, int32_t *done) {
  pw::Team team(threads, spin);
  auto item = [&](int, int i) {
    for (volatile int w = 0; w < work; w = w + 1) {
    }
    done[i]++;  // no atomic: a share ends before the next begins
  };
  std::vector<int> early(threads);
  auto body = [&](int thread) {
    for (int r = 1; r <= repeats; r++) {
      team.share(thread, count, item);
      for (int i = 0; i < count; i++) early[thread] += done[i] != r;
      team.barrier(thread);
    }
  };
  team.run(body);
  for (int count : early)
    if (count) return -1;
  return 0;
}
