// What csrc/cpu/memory_contrast.cpp (checks, allocation, dispatch) hands to csrc/cpu/memory_contrast_kernel.cpp, which
// is compiled once per instruction set.
#pragma once

#include "cpu/kernel.h"
#include "math/memory_contrast.h"

namespace pyext::cpu {

// Contiguous, in the accumulate type, unless said otherwise.
struct MemoryContrast {
  memory_contrast::Sizes sizes;
  DType dtype;               // of the banks
  const void* const* banks;  // one per peer
  const int64_t* pitch;      // elements from one row of a bank to the next
  double temperature;
  bool tiled;
  const void* embeddings;  // peers x batch x features
  const int64_t* indices;  // batch x entries; forward
  int32_t* rows;           // batch x entries: the indices in the order in which the weights stand
  void* weights;           // peers x others x batch x entries: gradient of loss * batch * temperature by a score
  void* loss;              // one element; forward
  const void* grad_loss;   // one element; backward
  void* grad_embeddings;   // backward
};

// Both return false, having computed nothing, where an index is not a row of the banks.
struct MemoryContrastKernels {
  bool (*forward)(const MemoryContrast&, const Host&);
  bool (*backward)(const MemoryContrast&, const Host&);
};

namespace baseline {
extern const MemoryContrastKernels memory_contrast_kernels;
}
namespace avx2 {
extern const MemoryContrastKernels memory_contrast_kernels;
}
namespace avx512 {
extern const MemoryContrastKernels memory_contrast_kernels;
}

}  // namespace pyext::cpu
