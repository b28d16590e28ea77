// What csrc/cpu/gated_excitation.cpp (checks, allocation, dispatch) hands to csrc/cpu/gated_excitation_kernel.cpp,
// which is compiled once per instruction set and therefore includes no torch or container header.
#pragma once

#include "cpu/kernel.h"
#include "math/gated_excitation.h"

namespace pyext::cpu {

// Buffers of the accumulate type unless said otherwise; null where the caller did not ask.
struct GatedExcitation {
  gated_excitation::Sizes sizes;
  DType dtype;            // of u, out, grad_out, grad_u
  DType parameter_dtype;  // dtype or the accumulate type
  DType running_dtype;
  bool training;
  double eps;
  Map u;
  const void* parameters[gated_excitation::kNumParameters];
  const void* running[gated_excitation::kNumRunning];
  void* position;           // N x 3 x P
  void* pooled;             // N x 3 x C
  void* hidden;             // N x (F + R)
  void* map_statistics;     // 2 x C
  void* hidden_statistics;  // 2 x (F + R)
  Map out;                  // forward
  Map grad_out;             // backward, as all below
  Map grad_u;
  void* grad_parameters;  // flat
};

struct GatedExcitationKernels {
  void (*forward)(const GatedExcitation&, const Host&);
  void (*backward)(const GatedExcitation&, const Host&);
};

namespace baseline {
extern const GatedExcitationKernels gated_excitation_kernels;
}
namespace avx2 {
extern const GatedExcitationKernels gated_excitation_kernels;
}
namespace avx512 {
extern const GatedExcitationKernels gated_excitation_kernels;
}

}  // namespace pyext::cpu
