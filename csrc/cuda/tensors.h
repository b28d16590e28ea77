// Tensors as the launchers see them.
#pragma once

#include <cstdint>

namespace pyext::cuda {

enum class Dtype : int32_t { kFloat, kBFloat16, kHalf };

// A tensor of shape (batch, channels, height, width); strides in elements.
struct ImageTensor {
  void* data;
  int64_t strides[4];
};

}  // namespace pyext::cuda
