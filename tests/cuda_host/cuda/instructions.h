// Replaces csrc/cuda/instructions.h: the same functions in terms of what a warp exchanges.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

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

// Every lane assembles the rows of a and the columns of b that its own results need, as MmaLayout has them.
template <typename T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  double left[2][16];
  double right[16][2];
  const MmaLayout own(static_cast<int>(cuda_host::current_lane()));
  for (int member = 0; member < 4; ++member) {
    const MmaLayout row(own.group * 4 + member);
    for (int r = 0; r < 4; ++r) {
      const std::array<double, 2> pair = elements<T>(a[r], row.group * 4 + member);
      for (int i = 0; i < 2; ++i) left[r % 2][row.a_k(r) + i] = pair[i];
    }
    for (int column = 0; column < 2; ++column) {
      const int lane = own.d_column(column) * 4 + member;
      for (int r = 0; r < 2; ++r) {
        const std::array<double, 2> pair = elements<T>(b[r], lane);
        for (int i = 0; i < 2; ++i) right[MmaLayout(lane).b_k(r) + i][column] = pair[i];
      }
    }
  }
  for (int r = 0; r < 4; ++r) {
    double sum = d[r];
    for (int k = 0; k < 16; ++k) sum += left[r / 2][k] * right[k][r % 2];
    d[r] = static_cast<float>(sum);
  }
}

// Rows are read by the lanes that need their elements, so that every access is checked.
template <bool kTransposed>
void load_matrices(uint32_t (&x)[4], const void* row) {
  const MmaLayout own(static_cast<int>(cuda_host::current_lane()));
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int wanted = kTransposed ? own.b_k(0) + i : own.group;
      const void* of_lane = __shfl_sync(0xffffffffu, row, 8 * m + wanted);
      pair[i] = static_cast<const uint16_t*>(of_lane)[kTransposed ? own.group : own.b_k(0) + i];
    }
    std::memcpy(&x[m], pair, sizeof(pair));
  }
}

inline float exp2_flushed(float x) {
  const float power = std::exp2(x);
  return power < std::numeric_limits<float>::min() ? 0.f : power;
}

struct alignas(16) SixteenBytes {
  uint64_t halves[2];
};

inline void copy_to_shared(void* shared, const void* global) {
  *static_cast<SixteenBytes*>(shared) = *static_cast<const SixteenBytes*>(global);
}

inline void copy_to_shared(void* shared, const void* global, int bytes) {
  SixteenBytes copy{};
  for (int i = 0; i < bytes; ++i) {
    reinterpret_cast<unsigned char*>(&copy)[i] = static_cast<const unsigned char*>(global)[i];
  }
  *static_cast<SixteenBytes*>(shared) = copy;
}

inline void wait_for_copies() {}

}  // namespace pyext::cuda
