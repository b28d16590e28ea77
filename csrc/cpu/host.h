// The Host services of csrc/cpu/kernel.h on top of torch: its thread pool and its allocator.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/kernel.h"
#include "cpu/team.h"

namespace pyext::cpu {

struct AlignedDelete {
  void operator()(void* p) const { std::free(p); }
};
using AlignedBuffer = std::unique_ptr<void, AlignedDelete>;

inline AlignedBuffer allocate_aligned(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!p && bytes > 0) throw std::bad_alloc();
  return AlignedBuffer(p);
}

// Grows to the largest request of its thread and is kept, since fresh pages cost more than the kernels' arithmetic.
inline void* thread_scratch(size_t bytes) {
  thread_local AlignedBuffer buffer;
  thread_local size_t capacity = 0;
#if defined(__SANITIZE_ADDRESS__)
  capacity = 0;  // of the exact size every time, so that an access past the end is one past the allocation's
#endif
  if (bytes > capacity) {
    buffer.reset();
    buffer = allocate_aligned(bytes);
    capacity = bytes;
  }
  return buffer.get();
}

// Owns what one call shares among its threads: memory, of which small pieces come from one block, and a team.
class CallMemory {
 public:
  Host host() {
    return {this, static_cast<int64_t>(torch::stable::get_num_threads()), run_tasks, thread_scratch, allocate};
  }

  // Runs program(), which gives each thread images of its own or, where there are fewer, shares every step's work in a
  // short parallel region: with threads that stay together.
  template <typename F>
  void run_images(int64_t images, const F& program) {
    if (images >= static_cast<int64_t>(torch::stable::get_num_threads())) return program();
    Team team;
    team_ = &team;
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) team.enter(program);
    });
    team_ = nullptr;
    team.leave();
  }

 private:
  static constexpr size_t kBlockBytes = 64 * 1024;

  static void run_tasks(void* self, int64_t tasks, Team::Work work, void* context) {
    if (Team* team = static_cast<CallMemory*>(self)->team_) return team->run(tasks, work, context);
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) work(context, task);
    });
  }

  static void* allocate(void* self, size_t bytes) {
    return static_cast<CallMemory*>(self)->take((bytes + 63) / 64 * 64);
  }

  void* take(size_t bytes) {
    if (bytes > left_) {
      left_ = bytes > kBlockBytes ? bytes : kBlockBytes;
      blocks_.push_back(allocate_aligned(left_));
      next_ = static_cast<char*>(blocks_.back().get());
    }
    left_ -= bytes;
    next_ += bytes;
    return next_ - bytes;
  }

  std::vector<AlignedBuffer> blocks_;
  char* next_ = nullptr;
  size_t left_ = 0;
  Team* team_ = nullptr;
};

}  // namespace pyext::cpu
