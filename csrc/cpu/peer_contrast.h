// What csrc/cpu/peer_contrast.cpp (checks, allocation, dispatch) hands to csrc/cpu/peer_contrast_kernel.cpp, which is
// compiled once per instruction set.
#pragma once

#include "cpu/kernel.h"
#include "math/peer_contrast.h"

namespace pyext::cpu {

// Contiguous. Numbers without a dtype here are double for double embeddings, else float.
struct PeerContrast {
  peer_contrast::Sizes sizes;
  DType dtype;             // of the embeddings and their gradient
  const void* embeddings;  // peers x batch x features
  const int64_t* images;   // batch: the images, class after class
  const int64_t* begins;   // classes + 1: where in `images` a class begins
  int64_t classes;
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
