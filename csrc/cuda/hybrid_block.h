// Launchers of hybrid_block on raw device pointers. The operator's contract is in pyext/ops/hybrid_block.py.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/tensors.h"
#include "math/hybrid_block.h"

namespace pyext::hybrid_block {

using cuda::Dtype;
using cuda::ImageTensor;

// `parameter_dtype`, which all `tensors` have, is `dtype` or float32; they are contiguous, kNumTensors of each module.
// `x` is what a transition reads. A dense block reads `out`, whose first channels already hold its input.
struct Block {
  Dtype dtype;
  Dtype parameter_dtype;
  Sizes sizes;
  ImageTensor x;
  const void* const* tensors;
  float eps;
};

// Bytes of the uninitialised workspace that `forward` needs, 16-byte aligned, on the device.
size_t workspace_bytes(const Block& block);

// Writes the modules' channels of `out`, (batch, out_channels, out_height, out_width), contiguous, in x's dtype. Both
// throw std::runtime_error with a reason.
void forward(const Block& block, void* out, void* workspace, cudaStream_t stream);

}  // namespace pyext::hybrid_block
