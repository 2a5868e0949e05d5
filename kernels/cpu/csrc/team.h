// A persistent team of threads. The caller is thread 0; the others sleep between steps and spin inside one.
#pragma once
#include <atomic>
#include <cstdint>

namespace pw {

class Team {
 public:
  // `spin`: threads wait for each other awake, which is for as many as there are CPUs to run them at once. Throws
  // std::system_error where a thread cannot be made.
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

  // Inside a body, by every thread: calls item(argument, thread, i) once for each i < count. Each thread begins with a
  // range of its own, contiguous and the same in every step, and when that is done takes from the back of another's.
  // Returns when no item is left to begin: others may still be at work on theirs. At most 2²⁴ − 1 items.
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
