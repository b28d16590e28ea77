// Launchers of bn_relu_conv2d on raw device pointers. The operator's contract is in pyext/ops/bn_relu_conv2d.py.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/tensors.h"
#include "math/bn_relu_conv2d.h"

namespace pyext::bn_relu_conv2d {

using cuda::Dtype;
using cuda::ImageTensor;

// What both passes read. The convolution's weights are contiguous and of x's dtype, vectors have one float32 per
// channel of x. `mean` and `var` are those of the mode.
struct Call {
  Dtype dtype;
  Sizes sizes;
  ImageTensor x;
  const float* norm_weight;
  const float* norm_bias;
  const void* conv_weight;
  const float* mean;
  const float* var;
  int32_t training;
  float eps;
};

// Contiguous: grad_x in x's dtype, the others float32.
struct Gradients {
  void* x;
  float* norm_weight;
  float* norm_bias;
  float* conv_weight;
};

// Each launcher needs a workspace of that many bytes, uninitialised, 16-byte aligned, on the device. All throw
// std::runtime_error with a reason.
//
// Mean and biased variance of x, whose first four sizes alone are read, and of which there is at least one image.
size_t statistics_workspace_bytes(const Sizes& sizes);
void statistics(Dtype dtype, const Sizes& sizes, const ImageTensor& x, float* mean, float* var, void* workspace,
                cudaStream_t stream);

// `out` is (batch, out_channels, out_height, out_width), contiguous, in x's dtype.
size_t forward_workspace_bytes(const Sizes& sizes);
void forward(const Call& call, void* out, void* workspace, cudaStream_t stream);

size_t backward_workspace_bytes(const Sizes& sizes);
void backward(const Call& call, const ImageTensor& grad_out, const Gradients& gradients, void* workspace,
              cudaStream_t stream);

}  // namespace pyext::bn_relu_conv2d
