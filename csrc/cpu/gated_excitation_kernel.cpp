// gated_excitation on the CPU. Compiled once per instruction set (PYEXT_CAPABILITY is its namespace).
//
// A depthwise map a[c, p] = sum_k K[c, k] r[c, p + o_k], r = relu(BN(u)), is needed twice: in its position logits,
// which are sums over channels, and in its pooled vector, a sum over positions that the logits' softmax weighs. Both
// are done while a strip of rows of all channels is in the first-level cache; the softmax is an online one, over the
// strips.
#include "cpu/gated_excitation/backward.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

void run_forward(const GatedExcitation& args, const Host& host) {
  with_element_type(args.dtype, [&](auto zero) { forward<decltype(zero)>(args, host); });
}

void run_backward(const GatedExcitation& args, const Host& host) {
  with_element_type(args.dtype, [&](auto zero) { backward<decltype(zero)>(args, host); });
}

}  // namespace

const GatedExcitationKernels gated_excitation_kernels = {run_forward, run_backward};

}  // namespace pyext::cpu::PYEXT_CAPABILITY
