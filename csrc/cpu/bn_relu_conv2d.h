// What csrc/cpu/bn_relu_conv2d.cpp (checks, allocation, dispatch) hands to csrc/cpu/bn_relu_conv2d_kernel.cpp, which is
// compiled once per instruction set and therefore includes no torch or container header.
#pragma once

#include "cpu/kernel.h"
#include "math/bn_relu_conv2d.h"

namespace pyext::cpu {

struct BNReLUConv2d {
  bn_relu_conv2d::Sizes sizes;
  DType dtype;            // of maps
  DType parameter_dtype;  // dtype or the accumulate type
  bool training;          // whether mean and var are the batch's, so that gradients flow through them
  double eps;
  bool rows;  // maps are as images_innermost has them: float or double, no groups, stride 1
  Map x;
  const void* norm_weight;
  const void* norm_bias;
  const void* conv_weight;
  // In the accumulate type. `statistics` writes them, the others read them.
  void* mean;
  void* var;
  Map out;
  // In the accumulate type, or null: where the forward pass writes the batch statistics of its result.
  void* out_mean;
  void* out_var;
  Map grad_out;
  Map grad_x;
  // In the accumulate type.
  void* grad_norm_weight;
  void* grad_norm_bias;
  void* grad_conv_weight;
  // Whether the gradient of x is added to what grad_x holds.
  bool add;
  // [in_channels][2] or null: where the backward pass adds what batch statistics have to do with the gradient of x, for
  // `correct` to take it from grad_x once for all calls: of_ones and of_centred of
  // grad_x - of_ones - of_centred (x - mean).
  double* corrections;
};

// Whether each channel of the map (N, C, H, W), several images, is one dense row of H x W x N elements.
inline bool images_innermost(const Map& m, int64_t batch, int64_t height, int64_t width) {
  return batch > 1 && m.stride[0] == 1 && (width == 1 || m.stride[3] == batch) &&
         (height == 1 || m.stride[2] == width * batch) && m.stride[1] >= height * width * batch;
}

struct BNReLUConv2dKernels {
  void (*statistics)(const BNReLUConv2d&, const Host&);
  void (*forward)(const BNReLUConv2d&, const Host&);
  void (*backward)(const BNReLUConv2d&, const Host&);
  void (*correct)(const BNReLUConv2d&, const Host&);
  // Of a pool in place of the convolution: `kernel` is 0 and `out_channels` those of x. The means of 2x2:
  void (*pool)(const BNReLUConv2d&, const Host&);
  void (*pool_backward)(const BNReLUConv2d&, const Host&);
  // Maxima of 3x3 at a stride of two, in float or double: channels of x and of its gradient are planes whose rows
  // follow one another, those of the result as `rows` says.
  void (*max_pool)(const BNReLUConv2d&, const Host&);
  void (*max_pool_backward)(const BNReLUConv2d&, const Host&);
};

const BNReLUConv2dKernels& selected_bn_relu_conv2d();

namespace baseline {
extern const BNReLUConv2dKernels bn_relu_conv2d_kernels;
}
namespace avx2 {
extern const BNReLUConv2dKernels bn_relu_conv2d_kernels;
}
namespace avx512 {
extern const BNReLUConv2dKernels bn_relu_conv2d_kernels;
}

}  // namespace pyext::cpu
