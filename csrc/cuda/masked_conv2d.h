// Launchers of masked_conv2d on raw device pointers. The operator's contract is in pyext/ops/masked_conv2d.py.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/tensors.h"
#include "math/masked_conv2d.h"

namespace pyext::masked_conv2d {

using cuda::Dtype;
using cuda::ImageTensor;

// What forward and backward read. `parameter_dtype`, which weight, scale, shift and gate have, is `dtype` or float32.
// Contiguous where no strides are told; null where there are none: scale, shift, gate, subnets.
struct Inputs {
  Dtype dtype;
  Dtype parameter_dtype;
  Sizes sizes;
  ImageTensor x;
  ImageTensor weight;  // of the whole layer: (out_channels, group_inputs, kernel, kernel)
  const void* scale;
  const void* shift;
  const void* gate;
  const int64_t* inputs;   // subnets x inputs
  const int64_t* outputs;  // subnets x outputs
  const int64_t* subnets;  // batch
};

// What backward writes, contiguous, x in dtype and the others in float32; null for what is not wanted.
struct Gradients {
  void* x;
  float* weight;
  float* scale;
  float* shift;
  float* gate;
};

// Each launcher needs a workspace of that many bytes, uninitialised, 16-byte aligned, on the device. All throw
// std::runtime_error with a reason.
size_t forward_workspace_bytes(const Inputs& inputs);

// Writes out: batch x outputs x out_height x out_width, contiguous, in dtype.
void forward(const Inputs& inputs, void* out, void* workspace, cudaStream_t stream);

// `wanted`: the gradients that backward will be given.
size_t backward_workspace_bytes(const Inputs& inputs, const Gradients& wanted);

// `out`, what forward wrote, and `grad_out` are contiguous, in dtype. The gradient of scale needs that of weight.
void backward(const Inputs& inputs, const void* grad_out, const void* out, const Gradients& gradients, void* workspace,
              cudaStream_t stream);

}  // namespace pyext::masked_conv2d
