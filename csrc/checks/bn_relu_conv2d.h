// What bn_relu_conv2d's bindings check, whatever the device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "checks/shape.h"
#include "math/bn_relu_conv2d.h"

namespace pyext::bn_relu_conv2d {

inline Sizes sizes_of(const torch::stable::Tensor& x, const torch::stable::Tensor& conv_weight, int64_t stride,
                      int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 4 && conv_weight.dim() == 4 && groups > 0 && (stride == 1 || stride == 2),
                  "bn_relu_conv2d: expected x and a weight of four dimensions, groups and a stride of 1 or 2");
  const Sizes s{x.size(0), x.size(1), x.size(2), x.size(3), conv_weight.size(0), groups, conv_weight.size(2), stride};
  STD_TORCH_CHECK(s.in_channels > 0 && s.positions() > 0 && s.out_channels > 0,
                  "bn_relu_conv2d: x or conv_weight is empty, expected at least one channel and position");
  STD_TORCH_CHECK(conv_weight.size(3) == s.kernel && (s.kernel == 1 || s.kernel == 3),
                  "bn_relu_conv2d: the kernels have 1x1 and 3x3 convolutions");
  STD_TORCH_CHECK(
      s.in_channels % groups == 0 && s.out_channels % groups == 0 && conv_weight.size(1) == s.group_inputs(),
      "bn_relu_conv2d: conv_weight does not have x's channels in ", groups, " groups");
  return s;
}

inline Shape vector_shape(const Sizes& s) { return {1, {s.in_channels}}; }
inline Shape weight_shape(const Sizes& s) { return {4, {s.out_channels, s.group_inputs(), s.kernel, s.kernel}}; }

inline void check_eps(double eps) {
  STD_TORCH_CHECK(eps >= 0, "bn_relu_conv2d: eps is ", eps, ", expected at least 0");
}

// The gradient of the result has its shape and x's dtype.
inline void check_gradient(const torch::stable::Tensor& grad_out, const torch::stable::Tensor& x, const Sizes& s) {
  const Shape shape{4, {s.batch, s.out_channels, s.out_height(), s.out_width()}};
  STD_TORCH_CHECK(grad_out.scalar_type() == x.scalar_type() && has_shape(grad_out, shape),
                  "bn_relu_conv2d: grad_out differs from the result in shape or dtype");
}

}  // namespace pyext::bn_relu_conv2d
