// hybrid_block on the CPU. Compiled once per instruction set (PYEXT_CAPABILITY is its namespace).
//
// An image goes through the whole block while it is in the second-level cache. The squeeze cell's convolutions keep
// tiles of channels x positions in registers; what lies between them is written to padded planes, in which a tap of the
// 3x3 convolution is an offset, so that positions are whole vectors without any mask.
#include "cpu/hybrid_block/block.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

void run_forward(const HybridBlock& args, const Host& host) {
  switch (args.dtype) {
    case DType::kFloat:
      return Block<float>(args, host).forward();
    case DType::kDouble:
      return Block<double>(args, host).forward();
    case DType::kBFloat16:
      return Block<BFloat16>(args, host).forward();
    case DType::kHalf:
      return Block<Half>(args, host).forward();
  }
}

}  // namespace

const HybridBlockKernels hybrid_block_kernels = {run_forward};

}  // namespace pyext::cpu::PYEXT_CAPABILITY
