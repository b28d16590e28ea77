// Replaces csrc/cuda/instructions.h: the same functions in terms of what a warp exchanges.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <cstring>

#include "cuda/mma.h"

namespace pyext::cuda {

inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float wide(__half x) { return __half2float(x); }

// The two elements that a register of lane `lane` holds.
template <typename T>
std::array<double, 2> elements(uint32_t own, int lane) {
  const uint32_t bits = __shfl_sync(0xffffffffu, own, lane);
  T pair[2];
  std::memcpy(pair, &bits, sizeof(bits));
  return {wide(pair[0]), wide(pair[1])};
}

// Every lane assembles the operands from all lanes' registers, as MmaLayout has them.
template <typename T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  double left[16][16];
  double right[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaLayout layout(lane);
    for (int r = 0; r < 4; ++r) {
      const std::array<double, 2> pair = elements<T>(a[r], lane);
      for (int i = 0; i < 2; ++i) left[layout.a_row(r)][layout.a_k(r) + i] = pair[i];
    }
    for (int r = 0; r < 2; ++r) {
      const std::array<double, 2> pair = elements<T>(b[r], lane);
      for (int i = 0; i < 2; ++i) right[layout.b_k(r) + i][layout.b_column()] = pair[i];
    }
  }
  const MmaLayout own(static_cast<int>(cuda_host::current_lane()));
  for (int r = 0; r < 4; ++r) {
    double sum = d[r];
    for (int k = 0; k < 16; ++k) sum += left[own.d_row(r)][k] * right[k][own.d_column(r)];
    d[r] = static_cast<float>(sum);
  }
}

}  // namespace pyext::cuda
