// convolution_stem on the CPU. Compiled once per instruction set (PYEXT_CAPABILITY is its namespace).
//
// Maps lie in the four planes of their even and odd rows and columns, in which layers, but the first, are convolved by
// tiles and the pool's windows are whole vectors. An image goes through all layers a few rows at a time, so that a
// layer reads what is still in cache. Operations: 2 x positions x 9 x inputs x outputs for the first layer, 2 x tiles x
// 16 x inputs x outputs for the others, where a tile has four positions; bytes: input and result once.
#include "cpu/convolution_stem/stem.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

void run_forward(const ConvolutionStem& args, const Host& host) {
  with_element_type(args.dtype, [&](auto element) { Stem<decltype(element)>(args, host).forward(); });
}

}  // namespace

const ConvolutionStemKernels convolution_stem_kernels = {run_forward};

}  // namespace pyext::cpu::PYEXT_CAPABILITY
