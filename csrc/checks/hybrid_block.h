// What hybrid_block's bindings check, whatever the device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "checks/shape.h"
#include "math/hybrid_block.h"

namespace pyext::hybrid_block {

constexpr size_t kNumExtents = 8;

// `extents`: modules, squeeze, growth, groups, attention, forget, stride, dense.
inline Sizes sizes_of(const torch::stable::Tensor& x, const std::vector<int64_t>& extents) {
  STD_TORCH_CHECK(x.dim() == 4, "hybrid_block: x has ", x.dim(), " dimensions, expected (N, C, H, W)");
  STD_TORCH_CHECK(extents.size() == kNumExtents, "hybrid_block: ", extents.size(), " extents, expected ",
                  static_cast<int>(kNumExtents));
  for (size_t i = 0; i + 1 < kNumExtents; ++i)
    STD_TORCH_CHECK(extents[i] > 0, "hybrid_block: extents must be positive");
  const Sizes s{x.size(0),  x.size(1),  x.size(2),  x.size(3),  extents[0], extents[1],
                extents[2], extents[3], extents[4], extents[5], extents[6], extents[7] != 0};
  STD_TORCH_CHECK(s.channels > 0 && s.positions() > 0,
                  "hybrid_block: x is empty, expected at least one channel and position");
  STD_TORCH_CHECK(s.squeeze % s.groups == 0 && s.growth % s.groups == 0,
                  "hybrid_block: squeeze and growth must be multiples of groups");
  STD_TORCH_CHECK(s.stride <= 2 && (s.dense ? s.stride == 1 : s.modules == 1),
                  "hybrid_block: a dense block has stride 1; another has one module and a stride of 1 or 2");
  return s;
}

// `packed`: whether the convolutions' weights are.
inline void check(const std::vector<torch::stable::Tensor>& tensors, const Sizes& s, double eps, bool packed = false) {
  STD_TORCH_CHECK(static_cast<int64_t>(tensors.size()) == s.modules * kNumTensors, "hybrid_block: ", tensors.size(),
                  " tensors, expected ", s.modules * kNumTensors);
  for (int64_t i = 0; i < static_cast<int64_t>(tensors.size()); ++i) {
    const int tensor = static_cast<int>(i % kNumTensors);
    const int64_t module = i / kNumTensors;
    const bool pairs = packed && is_convolution(tensor);
    const Shape shape = pairs ? packed_shape(tensor, s, module) : tensor_shape(tensor, s, module);
    check_shape(tensors[i], shape, "hybrid_block", "tensors", i);
  }
  STD_TORCH_CHECK(eps >= 0, "hybrid_block: eps is ", eps, ", expected at least 0");
}

}  // namespace pyext::hybrid_block
