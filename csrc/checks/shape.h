// Whether a tensor is of the shape that a contract tells.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "math/shape.h"

namespace pyext {

inline bool has_shape(const torch::stable::Tensor& tensor, const Shape& shape) {
  const auto sizes = tensor.sizes();
  return static_cast<int>(sizes.size()) == shape.dims && std::equal(sizes.begin(), sizes.end(), shape.extents);
}

template <typename Extents>
std::string shape_text(const Extents& extents, int dims) {
  std::string text = "(";
  for (int i = 0; i < dims; ++i) text += std::to_string(extents[i]) + (i + 1 < dims ? ", " : dims == 1 ? ",)" : ")");
  return dims == 0 ? "()" : text;
}

// `list[index]`, of operator `op`, must be of `shape`.
inline void check_shape(const torch::stable::Tensor& tensor, const Shape& shape, const char* op, const char* list,
                        int64_t index) {
  if (has_shape(tensor, shape)) return;
  STD_TORCH_CHECK(false, op, ": ", list, "[", index, "] has shape ",
                  shape_text(tensor.sizes(), static_cast<int>(tensor.dim())), ", expected ",
                  shape_text(shape.extents, shape.dims));
}

}  // namespace pyext
