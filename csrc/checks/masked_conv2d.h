// What masked_conv2d's bindings check, whatever the device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "checks/shape.h"
#include "math/masked_conv2d.h"

namespace pyext::masked_conv2d {

// `numbers`: strides, paddings and dilations of rows and columns, groups, activation.
constexpr size_t kNumbers = 8;
constexpr size_t kGroups = 6;
constexpr size_t kActivation = 7;

inline void check_numbers(const std::vector<int64_t>& numbers) {
  STD_TORCH_CHECK(numbers.size() == kNumbers && numbers[kActivation] >= 0 && numbers[kActivation] <= 2,
                  "masked_conv2d: expected ", kNumbers, " numbers");
}

// Of the whole layer and its lists: those of the maps are not set.
inline Sizes layer_sizes(const torch::stable::Tensor& weight, const torch::stable::Tensor& inputs,
                         const torch::stable::Tensor& outputs, int64_t groups) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.numel() > 0, "masked_conv2d: weight must be (channels, inputs, k, k)");
  STD_TORCH_CHECK(groups > 0 && weight.size(0) % groups == 0, "masked_conv2d: groups is ", groups,
                  ", expected a divisor of weight's channels");
  STD_TORCH_CHECK(inputs.dim() == 2 && outputs.dim() == 2 && inputs.size(0) == outputs.size(0) && inputs.numel() > 0 &&
                      outputs.numel() > 0,
                  "masked_conv2d: inputs and outputs must be lists of the same sub-networks");
  Sizes s{};
  s.subnets = inputs.size(0);
  s.inputs = inputs.size(1);
  s.outputs = outputs.size(1);
  s.out_channels = weight.size(0);
  s.group_inputs = weight.size(1);
  s.groups = groups;
  s.rows.kernel = weight.size(2);
  s.columns.kernel = weight.size(3);
  s.pool = 1;
  return s;
}

inline void set_axis(Axis& axis, int64_t input, const std::vector<int64_t>& numbers, int64_t index) {
  axis.input = input;
  axis.stride = numbers[index];
  axis.padding = numbers[2 + index];
  axis.dilation = numbers[4 + index];
  STD_TORCH_CHECK(input > 0 && axis.stride > 0 && axis.padding >= 0 && axis.dilation > 0 && axis.output() > 0,
                  "masked_conv2d: x is smaller than the kernel, or stride, padding or dilation is out of range");
}

inline Sizes sizes_of(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                      const torch::stable::Tensor& inputs, const torch::stable::Tensor& outputs,
                      const std::vector<int64_t>& numbers, int64_t pool) {
  check_numbers(numbers);
  Sizes s = layer_sizes(weight, inputs, outputs, numbers[kGroups]);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == s.inputs, "masked_conv2d: x must be (N, channels of inputs, H, W)");
  s.batch = x.size(0);
  set_axis(s.rows, x.size(2), numbers, 0);
  set_axis(s.columns, x.size(3), numbers, 1);
  s.activation = static_cast<Activation>(numbers[kActivation]);
  s.pool = pool;
  STD_TORCH_CHECK((pool == 1 || pool == 2) && s.out_height() > 0 && s.out_width() > 0, "masked_conv2d: pool is ", pool,
                  ", expected 1, or 2 where the result has two rows and columns");
  return s;
}

inline void check_subnets(bool given, const Sizes& s) {
  STD_TORCH_CHECK(given || s.subnets == 1, "masked_conv2d: subnets is None, but the lists are of several sub-networks");
}

inline Shape channel_shape(const Sizes& s) { return {1, {s.out_channels}}; }
inline Shape gate_shape(const Sizes& s) { return {2, {s.batch, s.outputs}}; }
inline Shape input_list_shape(const Sizes& s) { return {2, {s.subnets, s.inputs}}; }
inline Shape output_list_shape(const Sizes& s) { return {2, {s.subnets, s.outputs}}; }
inline Shape image_shape(const Sizes& s) { return {1, {s.batch}}; }

}  // namespace pyext::masked_conv2d
