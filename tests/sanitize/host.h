// A Host (csrc/cpu/kernel.h) whose threads and memory the sanitizers see through: std::thread instead of
// torch's OpenMP pool, which is not instrumented, and memory of exactly the size that was asked for, filled with NaN.
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/kernel.h"

namespace pyext::sanitize {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, Free>;

// A kernel that reads what nobody wrote computes NaN.
inline Memory allocate(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, bytes ? bytes : 1)) std::abort();
  std::memset(p, 0xFF, bytes);
  return Memory(p);
}

inline void run_tasks(void*, int64_t tasks, void (*work)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t task = 0; task < tasks; ++task) threads.emplace_back(work, context, task);
  for (std::thread& thread : threads) thread.join();
}

inline void* thread_scratch(size_t bytes) {
  thread_local Memory memory;
  memory = allocate(bytes);
  return memory.get();
}

class CallMemory {
 public:
  cpu::Host host(int64_t threads) { return {this, threads, run_tasks, thread_scratch, shared}; }

 private:
  static void* shared(void* self, size_t bytes) {
    auto& blocks = static_cast<CallMemory*>(self)->blocks_;
    blocks.push_back(allocate(bytes));
    return blocks.back().get();
  }
  std::vector<Memory> blocks_;
};

}  // namespace pyext::sanitize
