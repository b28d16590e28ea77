// bn_relu_conv2d's sizes as every kernel sees them.
#pragma once

#include <cstdint>

namespace pyext::bn_relu_conv2d {

struct Sizes {
  int64_t batch;
  int64_t in_channels;
  int64_t height;
  int64_t width;
  int64_t out_channels;
  int64_t groups;
  int64_t kernel;  // 1, or 3 with padding 1; the CPU has 1 without groups and stride, and 0 for a pool of 2x2
  int64_t stride;  // 1 or 2

  int64_t positions() const { return height * width; }
  int64_t out_height() const { return (height - 1) / stride + 1; }
  int64_t out_width() const { return (width - 1) / stride + 1; }
  int64_t out_positions() const { return out_height() * out_width(); }
  int64_t group_inputs() const { return in_channels / groups; }
  int64_t group_outputs() const { return out_channels / groups; }
  int64_t weight_numel() const { return out_channels * group_inputs() * kernel * kernel; }
};

}  // namespace pyext::bn_relu_conv2d
