// dense_block on the CPU. Compiled once per instruction set (PYEXT_CAPABILITY is its namespace).
//
// Both convolutions are products of packed matrices whose results stay in registers: positions or tiles x channels.
// Operations: 2 x positions x inputs x squeeze for the 1x1, 2 x tiles x 16 x squeeze x growth for the 3x3 convolution,
// where a tile has four positions; bytes: packed weights once for each group of images, the maps once.
#include "cpu/dense_block/block.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

void run_forward(const DenseBlock& args, const Host& host) {
  with_element_type(args.dtype, [&](auto element) { DenseForward<decltype(element)>(args, host).run(); });
}

void run_pack(const DenseBlockTensors& args, void* packed, const Host& host) {
  if (args.dtype == DType::kDouble) return pack_layers(args, static_cast<double*>(packed), host);
  pack_layers(args, static_cast<float*>(packed), host);
}

int64_t packed_numel(const dense_block::Sizes& sizes, DType accumulate) {
  return accumulate == DType::kDouble ? packed_elements<double>(sizes) : packed_elements<float>(sizes);
}

}  // namespace

const DenseBlockKernels dense_block_kernels = {run_forward, run_pack, packed_numel};

}  // namespace pyext::cpu::PYEXT_CAPABILITY
