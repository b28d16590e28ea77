// masked_conv2d's sizes as every kernel sees them.
#pragma once

#include <cstdint>

namespace pyext::masked_conv2d {

enum class Activation { kNone, kRelu, kRelu6 };

// Of rows and of columns.
struct Axis {
  int64_t input;
  int64_t kernel;
  int64_t stride;
  int64_t padding;
  int64_t dilation;

  // Input elements, with padding, that the results need.
  int64_t needed() const { return (output() - 1) * stride + dilation * (kernel - 1) + 1; }
  // Not positive where the kernel does not fit.
  int64_t output() const {
    const int64_t room = input + 2 * padding - dilation * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
  }
};

struct Sizes {
  int64_t batch;
  int64_t inputs;   // channels of x: the longest list of inputs
  int64_t outputs;  // of the result: the longest list of outputs
  int64_t subnets;  // lists
  Axis rows, columns;
  int64_t out_channels;  // of the whole layer
  int64_t group_inputs;
  int64_t groups;
  Activation activation;
  int64_t pool;  // rows and columns of the windows whose largest element is the result: 1 or 2

  int64_t group_outputs() const { return out_channels / groups; }
  int64_t taps() const { return rows.kernel * columns.kernel; }
  // Of the convolution, and of the result.
  int64_t conv_positions() const { return rows.output() * columns.output(); }
  int64_t out_height() const { return rows.output() / pool; }
  int64_t out_width() const { return columns.output() / pool; }
};

}  // namespace pyext::masked_conv2d
