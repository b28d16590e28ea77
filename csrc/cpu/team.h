// Threads that stay together for a call of many short parallel regions.
//
// A region of torch's pool wakes its threads and waits for them: a few microseconds while they spin in between, but 30
// where they sleep, as GNU's OpenMP threads do when a process has started more of them than there are processors. Here
// the threads enter one region of the pool. One of them runs the program; the others wait, spinning, for the tasks that
// it gives out. Nobody waits for a thread that has not come: where the pool runs its tasks one after the other, the
// first finds the program, does all tasks itself, and the next find it finished.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>

namespace pyext::cpu {

class Team {
 public:
  using Work = void (*)(void* context, int64_t task);

  // Every thread of the team calls this, with the same program. One of them runs it; what it passes to run() is shared
  // among all that have come.
  template <typename F>
  void enter(const F& program) {
    if (begun_.exchange(true)) {
      serve();
    } else {
      lead(program);
    }
  }

  // After all have returned: throws what the program or a task has thrown.
  void leave() const {
    if (failure_) std::rethrow_exception(failure_);
  }

  // work(context, task) for every task in [0, tasks); from within the program.
  void run(int64_t tasks, Work work, void* context) {
    work_ = work;
    context_ = context;
    unfinished_.store(tasks, std::memory_order_relaxed);
    unclaimed_.store(tasks, std::memory_order_release);
    while (work_on_one()) {
    }
    for (int64_t spins = 0; unfinished_.load(std::memory_order_acquire) > 0; ++spins) pause(spins);
    if (failed_.load(std::memory_order_acquire)) std::rethrow_exception(failure_);
  }

 private:
  static constexpr int64_t kSpins = 4096;  // tens of microseconds; then others of the machine may run

  static void pause(int64_t spins) {
    if (spins >= kSpins) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  template <typename F>
  void lead(const F& program) {
    try {
      program();
    } catch (...) {
      fail();
    }
    ended_.store(true, std::memory_order_release);
  }

  void serve() {
    for (int64_t spins = 0; !ended_.load(std::memory_order_acquire); ++spins) {
      if (work_on_one()) {
        spins = 0;
      } else {
        pause(spins);
      }
    }
  }

  // What the task is, is read after it was claimed: until it is finished, the program gives out no other.
  bool work_on_one() {
    int64_t left = unclaimed_.load(std::memory_order_acquire);
    while (left > 0) {
      if (!unclaimed_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) continue;
      try {
        work_(context_, left - 1);
      } catch (...) {
        fail();
      }
      unfinished_.fetch_sub(1, std::memory_order_release);
      return true;
    }
    return false;
  }

  // The first failure is the one that is told.
  void fail() {
    if (failing_.exchange(true)) return;
    failure_ = std::current_exception();
    failed_.store(true, std::memory_order_release);
  }

  Work work_ = nullptr;
  void* context_ = nullptr;
  std::atomic<int64_t> unclaimed_{0};
  std::atomic<int64_t> unfinished_{0};
  std::atomic<bool> begun_{false};
  std::atomic<bool> ended_{false};
  std::atomic<bool> failing_{false};
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

}  // namespace pyext::cpu
