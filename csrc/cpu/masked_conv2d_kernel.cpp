// masked_conv2d on the CPU. Compiled once per instruction set (PYEXT_CAPABILITY is its namespace).
//
// A tile of results, outputs x vectors of positions, stays in registers over all kept inputs and taps; weights come
// from panels in that order. Operations: 2 x kept inputs x taps x kept outputs x positions; bytes: kept weights once
// for each unit of images, the maps once. Taps that meet nothing but padding in all rows of a tile are left out.
#include "cpu/masked_conv2d/chain.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

void run_forward(const MaskedConv2d* layers, int64_t count, const Host& host) {
  with_element_type(layers[0].dtype, [&](auto element) { MaskedChain<decltype(element)>(layers, count, host).run(); });
}

void run_pack(const MaskedConv2d& args, void* packed, const Host& host) {
  const Blocks blocks(args, host);
  if (args.dtype == DType::kDouble) return pack_panels(args, blocks, static_cast<double*>(packed), host);
  pack_panels(args, blocks, static_cast<float*>(packed), host);
}

int64_t packed_numel(const MaskedConv2d& args) {
  return for_each_block(args, [](int64_t, const Block&) {});
}

}  // namespace

const MaskedConv2dKernels masked_conv2d_kernels = {run_forward, run_pack, packed_numel};

}  // namespace pyext::cpu::PYEXT_CAPABILITY
