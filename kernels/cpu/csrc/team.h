// A persistent team of threads. The caller is thread 0; the others sleep between steps and stay awake inside one.
#pragma once
#include <atomic>
#include <cstdint>

namespace pw {

uint64_t ticks();  // of a clock that is quick to read; how long one lasts, two readings of another clock tell

class Team {
 public:
  // `spin`: whoever waits keeps its CPU for a while, which is for no more threads than may run at once; else it offers
  // the CPU to others at each look. Throws std::system_error where a thread cannot be made.
  Team(int threads, bool spin);
  ~Team();
  Team(const Team &) = delete;
  Team &operator=(const Team &) = delete;

  int size() const;
  bool alive() const;  // false in the child of a fork: the threads stayed with the parent

  // Runs body(argument, thread) on every thread; returns when all have.
  void run(void (*body)(void *, int), void *argument);

  // Inside a body, by every thread: waits until all are here.
  void barrier(int thread);

  // Inside a body, by every thread: calls item(argument, thread, i) once for each i < count, and returns when all are
  // done, whoever did them: a barrier as well. Each thread has a range of its own, contiguous and the same in every
  // step; one that has waited a while takes from the back of another's. At most 2²⁴ − 1 items.
  void share(int thread, int count, void (*item)(void *, int thread, int i), void *argument);

  // Ticks that a thread has spent in waiting for others, since the team was made.
  uint64_t waited(int thread) const;

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
