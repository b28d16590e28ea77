// hybrid_block on the CPU. Compiled once per instruction set (PYEXT_CAPABILITY is its namespace).
//
// An image goes through the whole block while it is in the second-level cache. The squeeze cell's convolutions keep
// tiles of channels x positions in registers; what lies between them is written to padded planes, in which a tap of the
// 3x3 convolution is an offset, so that positions are whole vectors without any mask.
#include "cpu/hybrid_block/block.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

void run_forward(const HybridBlock& args, const Host& host) {
  with_element_type(args.dtype, [&](auto zero) { Block<decltype(zero)>(args, host).forward(); });
}

}  // namespace

const HybridBlockKernels hybrid_block_kernels = {run_forward};

}  // namespace pyext::cpu::PYEXT_CAPABILITY
