// What csrc/cpu/convolution_stem.cpp (checks, allocation, dispatch) hands to csrc/cpu/convolution_stem_kernel.cpp,
// which is compiled once per instruction set and therefore includes no torch or container header.
#pragma once

#include "cpu/kernel.h"
#include "math/convolution_stem.h"

namespace pyext::cpu {

struct ConvolutionStem {
  convolution_stem::Sizes sizes;
  DType dtype;  // of x and out
  double eps;
  Map x;
  Map out;                     // NCHW, no gaps
  const int64_t* outputs;      // channels of each layer
  const void* const* tensors;  // layers x kNumTensors, contiguous
  const DType* tensor_dtypes;  // of each: dtype or the accumulate type
};

struct ConvolutionStemKernels {
  void (*forward)(const ConvolutionStem&, const Host&);
};

namespace baseline {
extern const ConvolutionStemKernels convolution_stem_kernels;
}
namespace avx2 {
extern const ConvolutionStemKernels convolution_stem_kernels;
}
namespace avx512 {
extern const ConvolutionStemKernels convolution_stem_kernels;
}

}  // namespace pyext::cpu
