// What csrc/cpu/masked_conv2d.cpp (checks, allocation, dispatch) hands to csrc/cpu/masked_conv2d_kernel.cpp, which is
// compiled once per instruction set and therefore includes no torch or container header.
#pragma once

#include "cpu/kernel.h"
#include "math/masked_conv2d.h"

namespace pyext::cpu {

struct MaskedConv2d {
  masked_conv2d::Sizes sizes;
  DType dtype;            // of maps
  DType parameter_dtype;  // dtype or the accumulate type
  Map x;
  Map out;  // NCHW without gaps
  // Contiguous. Lists are (subnets, inputs or outputs), checked; null where there are none: subnets, scale, shift,
  // gate.
  const int64_t* inputs;
  const int64_t* outputs;
  const int64_t* image_subnets;
  const void* weight;  // null: no convolution, but the mean of each channel of x
  const void* scale;
  const void* shift;
  const void* gate;
  const void* packed;  // in the accumulate type, or null
};

struct MaskedConv2dKernels {
  // Layers of the same images one after another, each reading the result of the one before.
  void (*forward)(const MaskedConv2d* layers, int64_t count, const Host&);
  // Kept weights to `packed`, of packed_numel elements in the accumulate type.
  void (*pack)(const MaskedConv2d&, void* packed, const Host&);
  int64_t (*packed_numel)(const MaskedConv2d&);
};

namespace baseline {
extern const MaskedConv2dKernels masked_conv2d_kernels;
}
namespace avx2 {
extern const MaskedConv2dKernels masked_conv2d_kernels;
}
namespace avx512 {
extern const MaskedConv2dKernels masked_conv2d_kernels;
}

}  // namespace pyext::cpu
