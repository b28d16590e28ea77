// What csrc/cpu/hybrid_block.cpp (checks, allocation, dispatch) hands to csrc/cpu/hybrid_block_kernel.cpp, which is
// compiled once per instruction set and therefore includes no torch or container header.
#pragma once

#include "cpu/kernel.h"
#include "math/hybrid_block.h"

namespace pyext::cpu {

struct HybridBlock {
  hybrid_block::Sizes sizes;
  DType dtype;  // of x and out
  double eps;
  Map x;
  Map out;
  const void* const* tensors;  // modules x kNumTensors, contiguous
  const DType* tensor_dtypes;  // of each, but of packed weights: dtype or the accumulate type
  bool packed;                 // the convolutions' weights are pairs of bfloat16; dtype is kFloat or kBFloat16
};

struct HybridBlockKernels {
  void (*forward)(const HybridBlock&, const Host&);
};

namespace baseline {
extern const HybridBlockKernels hybrid_block_kernels;
}
namespace avx2 {
extern const HybridBlockKernels hybrid_block_kernels;
}
namespace avx512 {
extern const HybridBlockKernels hybrid_block_kernels;
}
namespace avx512_bf16 {
extern const HybridBlockKernels hybrid_block_kernels;
}

}  // namespace pyext::cpu
