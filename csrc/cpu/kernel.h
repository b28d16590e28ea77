// What every operator's binding (csrc/cpu/<op>.cpp) hands to its kernels (csrc/cpu/<op>_kernel.cpp), which are compiled
// once per instruction set and therefore include no torch or container header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyext::cpu {

enum class DType { kFloat, kDouble, kBFloat16, kHalf };

// A tensor (N, C, H, W) with strides in elements.
struct Map {
  void* data;
  int64_t stride[4];
};

// Services of the caller that a kernel may use.
struct Host {
  void* self;
  int64_t threads;
  // parallel(self, ...) runs work(context, task) for every task in [0, tasks), on several threads.
  void (*parallel)(void* self, int64_t tasks, void (*work)(void* context, int64_t task), void* context);
  // Memory of the calling thread, 64-byte aligned, valid until its next call from the same thread.
  void* (*scratch)(size_t bytes);
  // shared(self, bytes): memory for the whole call, 64-byte aligned.
  void* (*shared)(void* self, size_t bytes);
};

}  // namespace pyext::cpu
