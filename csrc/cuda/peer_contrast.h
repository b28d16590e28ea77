// Launchers of peer_contrast on raw device pointers. The operator's contract is in pyext/ops/peer_contrast.py.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/tensors.h"
#include "math/peer_contrast.h"

namespace pyext::peer_contrast {

struct Inputs {
  Sizes sizes;
  cuda::Dtype dtype;
  const void* embeddings;     // peers x batch x features, in dtype
  int64_t peer, row, column;  // strides of embeddings, in elements
  const int64_t* labels;      // batch, contiguous
  double temperature, soft_temperature;
};

// Each launcher needs a workspace of that many bytes, uninitialised, 16-byte aligned, on the device. All throw
// std::runtime_error with a reason.
size_t forward_workspace_bytes(const Inputs& inputs);

// Writes kTerms terms, and normalisers (4 x peers x peers x batch): of the rows of x_ij / temperature the largest
// similarity and the sum of exponentials above it, without the row's own image, and the same softened, with it. Where
// no exponential can overflow the largest is written as 0; rows without terms have zeros.
void forward(const Inputs& inputs, float* terms, float* normalisers, void* workspace, cudaStream_t stream);

size_t backward_workspace_bytes(const Inputs& inputs);

// Writes grad_embeddings, peers x batch x features, contiguous, in dtype.
void backward(const Inputs& inputs, const float* normalisers, const float* grad_terms, void* grad_embeddings,
              void* workspace, cudaStream_t stream);

}  // namespace pyext::peer_contrast
