// Threads, barriers and shared work. Between steps threads sleep on a futex (Linux); inside a step nobody sleeps: to be
// woken takes longer than most of its phases.
#include "team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#include <memory>
#include <system_error>
#include <vector>

namespace pw {
namespace {

constexpr int64_t SPIN_NS = 300'000;  // between steps, before a thread goes to sleep
constexpr int PATIENCE = 40;         // looks at another's work (about 1 µs) before one helps
constexpr int LOOKS = 2'000;         // … and before the CPU is offered to others after each

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void sleep_while(std::atomic<uint32_t> &word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_all(std::atomic<uint32_t> &word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// What is left of a thread's range in the share of number `phase`: items begin … end − 1. One word, so that its owner
// (from the front) and helpers (from the back) agree on it; numbered, so that nobody clears it between shares.
struct Range {
  uint16_t phase;
  uint32_t begin, end;  // 24 bits each

  static Range of(uint64_t word) {
    return {uint16_t(word >> 48), uint32_t(word >> 24) & 0xFFFFFF, uint32_t(word) & 0xFFFFFF};
  }
  uint64_t word() const { return uint64_t(phase) << 48 | uint64_t(begin) << 24 | end; }
};

// What a line of the cache holds is written by one thread as a rule, and its way to another core takes half a
// microsecond on some machines: so the range, which its owner writes with every item, is looked at by others only when
// they help, and they wait for `done`, which is written once a share.
struct alignas(64) Seat {
  std::atomic<uint64_t> range{0};
  alignas(64) std::atomic<uint32_t> done{0};      // number of the last share whose whole range is done
  alignas(64) std::atomic<uint32_t> returned{0};  // items of this range that helpers have done, of all shares
  alignas(64) uint32_t phase = 0;                 // the owner's alone: number of its share,
  uint32_t helped = 0;                            // what `returned` comes to when all helpers are through,
  uint64_t waited = 0;                            // ticks
};

std::atomic<uint32_t> forks{0};
void count_fork() { forks.fetch_add(1, std::memory_order_relaxed); }
uint32_t count_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, count_fork);
  return registered == 0 ? forks.load(std::memory_order_relaxed) : 0;
}

}  // namespace

#if defined(__x86_64__)
uint64_t ticks() { return __builtin_ia32_rdtsc(); }
#else
uint64_t ticks() { return uint64_t(now_ns()); }
#endif

struct Team::State {
  struct Start {
    State *state;
    int thread;
  };

  int threads;
  bool spin;
  uint32_t born;  // after so many forks
  cpu_set_t allowed;
  std::vector<cpu_set_t> homes;  // of each thread, where there is a CPU for each and no more; else empty
  std::vector<Seat> seats;
  std::vector<Start> starts;
  std::vector<pthread_t> handles;
  void (*body)(void *, int) = nullptr;
  void *argument = nullptr;
  bool closing = false;
  alignas(64) std::atomic<uint32_t> step{0};    // raised to begin one
  alignas(64) std::atomic<uint32_t> asleep{0};  // threads that sleep until then

  State(int threads, bool spin) : threads(threads), spin(spin), born(count_forks()), seats(threads), starts(threads) {
    find_homes();
  }

  void share(int thread, int count, void (*item)(void *, int, int), void *argument);
  void barrier(int thread) { share(thread, 0, nullptr, nullptr); }
  void find_homes();
  void create_threads();
  void await_step(uint32_t seen);
  void begin_step();
  void close();
  template <class Help>
  void await(std::atomic<uint32_t> &word, uint32_t value, Help help);
  bool take(int owner, bool front, uint16_t phase, int count, int *item);
  uint32_t first(int owner, int count) const { return uint32_t(int64_t(count) * owner / threads); }
  static void *main(void *);
};

// A team as large as the machine gives each thread a CPU of its own: the kernel may leave a thread on the CPU of the one
// that woke it, and two that spin for each other on one CPU take four times as long.
void Team::State::find_homes() {
  if (!spin || sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) != threads) return;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    cpu_set_t home;
    CPU_ZERO(&home);
    CPU_SET(cpu, &home);
    homes.push_back(home);
  }
}

void Team::State::create_threads() {
  // Signals are for the threads of the program.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int error = 0;
  for (int i = 1; i < threads && !error; i++) {
    pthread_t handle;
    starts[i] = {this, i};
    error = pthread_create(&handle, nullptr, main, &starts[i]);
    if (error) break;
    handles.push_back(handle);
    if (!homes.empty()) pthread_setaffinity_np(handle, sizeof(cpu_set_t), &homes[i]);  // where it fails, it is slower
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (error) {
    close();
    throw std::system_error(error, std::generic_category(), "a thread cannot be made");
  }
}

void *Team::State::main(void *argument) {
  auto [state, thread] = *static_cast<Start *>(argument);
  pthread_setname_np(pthread_self(), "pagewire-step");
  for (uint32_t seen = 0;; seen++) {
    state->await_step(seen);
    if (state->closing) return nullptr;
    state->body(state->argument, thread);
    state->barrier(thread);
  }
}

void Team::State::await_step(uint32_t seen) {
  if (spin)
    for (int64_t until = now_ns() + SPIN_NS; now_ns() < until;)
      for (int i = 0; i < 32; i++) {
        if (step.load(std::memory_order_acquire) != seen) return;
        relax();
      }
  asleep.fetch_add(1);  // before the futex looks at `step`, as begin_step raises it before it looks at `asleep`
  while (step.load() == seen) sleep_while(step, seen);
  asleep.fetch_sub(1);
}

void Team::State::begin_step() {
  step.fetch_add(1);
  if (asleep.load()) wake_all(step);
}

void Team::State::close() {
  closing = true;
  begin_step();
  for (pthread_t handle : handles) pthread_join(handle, nullptr);
}

// Until `word` has come to `value`. `help`: takes an item meanwhile, where there is one.
template <class Help>
void Team::State::await(std::atomic<uint32_t> &word, uint32_t value, Help help) {
  for (int looks = 0;; looks++) {
    if (int32_t(word.load(std::memory_order_acquire) - value) >= 0) return;
    if ((!spin || looks >= PATIENCE) && help()) continue;
    if (spin && looks < LOOKS)
      relax();
    else
      sched_yield();  // whoever is awaited may be waiting for this very CPU
  }
}

bool Team::State::take(int owner, bool front, uint16_t phase, int count, int *item) {
  std::atomic<uint64_t> &word = seats[owner].range;
  for (uint64_t before = word.load(std::memory_order_relaxed);;) {
    Range range = Range::of(before);
    const int ahead = int16_t(range.phase - phase);
    if (ahead > 0) return false;  // it went on: nothing of this share is left
    // An owner that has not come yet finds its range begun by whoever came first.
    if (ahead < 0) range = {phase, first(owner, count), first(owner + 1, count)};
    const bool empty = range.begin == range.end;
    if (empty && ahead == 0) return false;
    if (!empty) *item = front ? int(range.begin++) : int(--range.end);
    if (word.compare_exchange_weak(before, range.word(), std::memory_order_relaxed)) return !empty;
  }
}

void Team::State::share(int thread, int count, void (*item)(void *, int, int), void *argument) {
  Seat &mine = seats[thread];
  const uint32_t phase = ++mine.phase;
  const uint16_t number = uint16_t(phase);
  int done = 0, i;
  while (take(thread, true, number, count, &i)) {
    if (i + 1 == int(first(thread + 1, count)))  // the last: what is looked at next is on its way by then
      for (int other = 0; other < threads; other++) __builtin_prefetch(&seats[other].done);
    item(argument, thread, i);
    done++;
  }
  const uint64_t begun = ticks();
  mine.helped += first(thread + 1, count) - first(thread, count) - uint32_t(done);
  await(mine.returned, mine.helped, [] { return false; });
  mine.done.store(phase, std::memory_order_release);
  for (int next = 1; next < threads; next++) {
    const int other = (thread + next) % threads;
    await(seats[other].done, phase, [&] {
      if (!take(other, false, number, count, &i)) return false;
      item(argument, thread, i);
      seats[other].returned.fetch_add(1, std::memory_order_release);
      return true;
    });
  }
  mine.waited += ticks() - begun;
}

Team::Team(int threads, bool spin) {
  auto state = std::make_unique<State>(threads, spin);
  state->create_threads();
  state_ = state.release();
}

Team::~Team() {
  if (alive()) state_->close();
  delete state_;
}

int Team::size() const { return state_->threads; }
bool Team::alive() const { return state_->born == count_forks(); }

void Team::run(void (*body)(void *, int), void *argument) {
  state_->body = body;
  state_->argument = argument;
  const bool at_home = !state_->homes.empty();
  if (at_home) sched_setaffinity(0, sizeof(cpu_set_t), &state_->homes[0]);
  if (state_->threads > 1) state_->begin_step();
  body(argument, 0);
  state_->barrier(0);
  if (at_home) sched_setaffinity(0, sizeof(cpu_set_t), &state_->allowed);  // the caller's own affairs
}

void Team::barrier(int thread) { state_->barrier(thread); }
void Team::share(int thread, int count, void (*item)(void *, int, int), void *argument) {
  state_->share(thread, count, item, argument);
}
uint64_t Team::waited(int thread) const { return state_->seats[thread].waited; }

}  // namespace pw
