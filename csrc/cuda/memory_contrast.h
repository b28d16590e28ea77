// Launchers of memory_contrast on raw device pointers. The operator's contract is in pyext/ops/memory_contrast.py.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/tensors.h"
#include "math/memory_contrast.h"

namespace pyext::memory_contrast {

// Contiguous unless said otherwise.
struct Inputs {
  Sizes sizes;
  cuda::Dtype dtype;
  const void* const* banks;  // host array, one address per peer
  const int64_t* pitch;      // host array, elements from one row of a bank to the next
  const float* embeddings;   // peers x batch x features
  float temperature;
};

// Each launcher needs a workspace of that many bytes, uninitialised, 16-byte aligned, on the device. All throw
// std::runtime_error with a reason.
size_t forward_workspace_bytes(const Sizes& sizes);

// Writes rows (batch x entries, -1 for what is no row), weights (peers x others x batch x entries) and one loss.
void forward(const Inputs& inputs, const int64_t* indices, int32_t* rows, float* weights, float* loss, void* workspace,
             cudaStream_t stream);

size_t backward_workspace_bytes(const Sizes& sizes);

void backward(const Inputs& inputs, const int32_t* rows, const float* weights, const float* grad_loss,
              float* grad_embeddings, void* workspace, cudaStream_t stream);

}  // namespace pyext::memory_contrast
