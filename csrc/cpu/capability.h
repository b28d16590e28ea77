// Which instruction set the CPU kernels run with. Each csrc/cpu/*_kernel.cpp is compiled once per set, but for
// avx512_bf16, which only those have that gain by it (setup.py names them): the others then run as avx512.
#pragma once

#include <string>
#include <vector>

namespace pyext::cpu {

enum class Capability { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

const char* name(Capability capability);

// What this build holds and this machine can run, worst first.
std::vector<Capability> available_capabilities();

// The best available one, or the one that PYEXT_CPU_CAPABILITY names; fixed at the first call.
Capability capability();

// Picks an operator's kernels.
template <typename Kernels>
const Kernels& select(const Kernels& baseline, const Kernels& avx2, const Kernels& avx512) {
  switch (capability()) {
    case Capability::kAvx512Bf16:
    case Capability::kAvx512:
      return avx512;
    case Capability::kAvx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace pyext::cpu
