// hybrid_block on the CPU. Compiled once per instruction set (PYEXT_CAPABILITY is its namespace).
//
// An image goes through the whole block while it is in the second-level cache. The squeeze cell's convolutions keep
// tiles of channels x positions in registers; what lies between them is written to padded planes, in which a tap of the
// 3x3 convolution is an offset, so that positions are whole vectors without any mask. Where groups are wide enough,
// that convolution is done by tiles of F(2x2, 3x3) (tiles.h). With packed weights, planes and weights hold pairs of
// channels in bfloat16, which is the depth of avx512_bf16's dot product.
#include "cpu/hybrid_block/block.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

void run_forward(const HybridBlock& args, const Host& host) {
  if (args.packed) {
    if (args.dtype == DType::kFloat) return Block<float, Pairs>(args, host).forward();
    return Block<BFloat16, Pairs>(args, host).forward();
  }
  with_element_type(args.dtype, [&](auto zero) {
    using S = decltype(zero);
    Block<S, Numbers<Accumulate<S>>>(args, host).forward();
  });
}

}  // namespace

const HybridBlockKernels hybrid_block_kernels = {run_forward};

}  // namespace pyext::cpu::PYEXT_CAPABILITY
