// torch's tensors as bindings hand them to kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/kernel.h"

namespace pyext::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// None for a dtype that no kernel has.
inline std::optional<DType> dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    default:
      return std::nullopt;
  }
}

// The dtype that kernels compute in.
inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
inline ScalarType accumulate_type(DType dtype) {
  return dtype == DType::kDouble ? ScalarType::Double : ScalarType::Float;
}

inline Map map_of(const Tensor& tensor) {
  return {tensor.data_ptr(), {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)}};
}

// Contiguous data of tensors: the caller's own memory, or copies that live as long as this object.
class Contiguous {
 public:
  void* data(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor.data_ptr();
    copies_.push_back(torch::stable::contiguous(tensor));
    return copies_.back().data_ptr();
  }

 private:
  std::vector<Tensor> copies_;
};

}  // namespace pyext::cpu
