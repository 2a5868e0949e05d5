// A persistent team of threads. The caller is thread 0; the others sleep between steps and spin inside one.
#pragma once
#include <atomic>
#include <cstdint>

namespace pw {

class Team {
 public:
  explicit Team(int threads);  // throws std::system_error where a thread cannot be made
  ~Team();
  Team(const Team &) = delete;
  Team &operator=(const Team &) = delete;

  int size() const;

  // Runs body(argument, thread) on every thread; returns when all have.
  void run(void (*body)(void *, int), void *argument);

  // Inside a body, by every thread: waits until all are here.
  void barrier(int thread);

  // Inside a body, by every thread, between two barriers at most one share: calls item(argument, thread, i) once for
  // each i < count. Each thread begins with a range of its own, contiguous and the same in every step, and when that is
  // done takes from the back of another's.
  void share(int thread, int count, void (*item)(void *, int thread, int i), void *argument);

  template <class F>
  void run(F &body) { run([](void *f, int thread) { (*static_cast<F *>(f))(thread); }, &body); }
  template <class F>
  void share(int thread, int count, F &item) {
    share(thread, count, [](void *f, int t, int i) { (*static_cast<F *>(f))(t, i); }, &item);
  }

 private:
  struct State;
  State *state_;
};

}  // namespace pw
