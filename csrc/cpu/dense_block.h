// What csrc/cpu/dense_block.cpp (checks, allocation, dispatch) hands to csrc/cpu/dense_block_kernel.cpp, which is
// compiled once per instruction set and therefore includes no torch or container header.
#pragma once

#include "cpu/kernel.h"
#include "math/dense_block.h"

namespace pyext::cpu {

struct DenseBlock {
  dense_block::Sizes sizes;
  DType dtype;  // of x and out
  Map x;
  Map out;             // channels innermost, no gaps
  const void* packed;  // of packed_numel elements in the accumulate type
};

struct DenseBlockTensors {
  dense_block::Sizes sizes;
  DType dtype;  // the accumulate type, of all tensors and the result
  double eps;
  const void* const* tensors;  // layers x layer_tensors(), contiguous
};

struct DenseBlockKernels {
  void (*forward)(const DenseBlock&, const Host&);
  void (*pack)(const DenseBlockTensors&, void* packed, const Host&);
  int64_t (*packed_numel)(const dense_block::Sizes&, DType accumulate);
};

namespace baseline {
extern const DenseBlockKernels dense_block_kernels;
}
namespace avx2 {
extern const DenseBlockKernels dense_block_kernels;
}
namespace avx512 {
extern const DenseBlockKernels dense_block_kernels;
}

}  // namespace pyext::cpu
