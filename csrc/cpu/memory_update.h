// What csrc/cpu/memory_update.cpp hands to csrc/cpu/memory_update_kernel.cpp.
#pragma once

#include "cpu/kernel.h"

namespace pyext::cpu {

struct MemoryUpdate {
  int64_t peers, batch, features;
  DType dtype;             // of the banks
  void* const* banks;      // one per peer
  const int64_t* pitch;    // elements from one row of a bank to the next
  const void* embeddings;  // peers x batch x features, accumulate type, contiguous
  const int64_t* index;    // batch: rows of the banks
  double momentum;
};

struct MemoryUpdateKernels {
  void (*run)(const MemoryUpdate&, const Host&);
};

namespace baseline {
extern const MemoryUpdateKernels memory_update_kernels;
}
namespace avx2 {
extern const MemoryUpdateKernels memory_update_kernels;
}
namespace avx512 {
extern const MemoryUpdateKernels memory_update_kernels;
}

}  // namespace pyext::cpu
