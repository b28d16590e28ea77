// Launchers of gated_excitation on raw device pointers. The operator's contract is in pyext/ops/gated_excitation.py.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/tensors.h"
#include "math/gated_excitation.h"

namespace pyext::gated_excitation {

using cuda::Dtype;
using cuda::ImageTensor;

// What forward and backward read. `parameter_dtype`, which `running` has too, is `dtype` or float32.
struct Inputs {
  Dtype dtype;
  Dtype parameter_dtype;
  Sizes sizes;
  ImageTensor u;
  const void* parameters[kNumParameters];
  const void* running[kNumRunning];
  int32_t training;
  float eps;
};

// float32, shapes as in the contract. Forward writes position, pooled and hidden if they are to be saved, and the
// statistics in training mode. Backward reads what there is of them.
struct Saved {
  float* position;
  float* pooled;
  float* hidden;
  float* map_statistics;
  float* hidden_statistics;
};

// Each launcher needs a workspace of that many bytes, uninitialised, 16-byte aligned, on the device. All throw
// std::runtime_error with a reason. `save`: whether backward will follow.
size_t forward_workspace_bytes(const Inputs& inputs, bool save);
void forward(const Inputs& inputs, bool save, const ImageTensor& out, const Saved& saved, void* workspace,
             cudaStream_t stream);

size_t backward_workspace_bytes(const Inputs& inputs);
void backward(const Inputs& inputs, const ImageTensor& grad_out, const Saved& saved, const ImageTensor& grad_u,
              float* grad_parameters, void* workspace, cudaStream_t stream);

}  // namespace pyext::gated_excitation
