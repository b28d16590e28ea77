// Launcher of memory_update on raw device pointers. The operator's contract is in pyext/ops/memory_update.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/tensors.h"

namespace pyext::memory_update {

struct Inputs {
  int64_t peers;
  int64_t batch;
  int64_t features;
  int64_t rows;  // of one bank
  cuda::Dtype dtype;
  void* const* banks;       // host array, one address per peer
  const int64_t* pitch;     // host array, elements from one row of a bank to the next
  const float* embeddings;  // peers x batch x features, contiguous
  const int64_t* index;     // batch
  float momentum;
};

void update(const Inputs& inputs, cudaStream_t stream);

}  // namespace pyext::memory_update
