// What csrc/cpu/peer_contrast.cpp (checks, allocation, dispatch) hands to csrc/cpu/peer_contrast_kernel.cpp, which is
// compiled once per instruction set.
#pragma once

#include "cpu/kernel.h"
#include "math/peer_contrast.h"

namespace pyext::cpu {

// Contiguous, in the dtype of the embeddings, unless said otherwise.
struct PeerContrast {
  peer_contrast::Sizes sizes;
  DType dtype;               // float or double
  const void* embeddings;    // peers x batch x features
  const int64_t* classes;    // batch: equal where labels are equal, not negative
  const int64_t* positives;  // batch: other rows of the same class
  double temperature, soft_temperature;
  void* terms;             // peer_contrast::kTerms; forward
  void* normalisers;       // 4 x peers x peers x batch: largest similarity and sum of a row, without itself, softened
  const void* grad_terms;  // peer_contrast::kTerms; backward
  void* grad_embeddings;   // backward
};

struct PeerContrastKernels {
  void (*forward)(const PeerContrast&, const Host&);
  void (*backward)(const PeerContrast&, const Host&);
};

namespace baseline {
extern const PeerContrastKernels peer_contrast_kernels;
}
namespace avx2 {
extern const PeerContrastKernels peer_contrast_kernels;
}
namespace avx512 {
extern const PeerContrastKernels peer_contrast_kernels;
}

}  // namespace pyext::cpu
