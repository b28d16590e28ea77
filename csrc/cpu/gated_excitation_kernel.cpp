// gated_excitation on the CPU. Compiled once per instruction set (PYEXT_CAPABILITY is its namespace).
//
// A depthwise map a[c, p] = sum_k K[c, k] r[c, p + o_k] is needed twice: in its position logits and in its pooled
// vector. Both sums are exchanged with the sum over the nine taps k, which leaves two small matrix products per image
// over contiguous positions, and no depthwise map at all:
//   logit[p]  = sum_k m_k[p + o_k]           m_k[q] = sum_c (w[c] K[c, k]) r[c, q]      (project)
//   pooled[c] = sum_k K[c, k] G[c, k]        G[c, k] = sum_q pi[q - o_k] r[c, q]        (pool_chunk)
// The nine maps m_k and the nine shifted probabilities are 1/C of a map each. r = relu(BN(u)) is recomputed from u.
#include "cpu/gated_excitation/backward.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

template <typename F>
void dispatch(DType dtype, F work) {
  switch (dtype) {
    case DType::kFloat:
      return work(float{});
    case DType::kDouble:
      return work(double{});
    case DType::kBFloat16:
      return work(BFloat16{});
    case DType::kHalf:
      return work(Half{});
  }
}

void run_forward(const GatedExcitation& args, const Host& host) {
  dispatch(args.dtype, [&](auto zero) { forward<decltype(zero)>(args, host); });
}

void run_backward(const GatedExcitation& args, const Host& host) {
  dispatch(args.dtype, [&](auto zero) { backward<decltype(zero)>(args, host); });
}

}  // namespace

const GatedExcitationKernels gated_excitation_kernels = {run_forward, run_backward};

}  // namespace pyext::cpu::PYEXT_CAPABILITY
