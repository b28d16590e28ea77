// The product of two tiles in shared memory by a block's warps, a part of 32 x 32 each, on tensor cores for 16-bit
// elements. Tiles are cut into chunks along the product's inner dimension, which lie row after row.
#pragma once

#include "cuda/device.h"
#include "cuda/instructions.h"
#include "cuda/mma.h"

namespace pyext::cuda {

// Elements from one row of a chunk to the next: 8 rows of 16 bytes, which a warp reads at once, lie in different banks.
template <typename T, int kDepth>
constexpr int kChunkPitch = kDepth + 16 / sizeof(T);

// A thread's results of a warp's 32 x 32 part: [m][n] are those of the mma of rows 16 m and columns 8 n.
using Part = float[2][4][4];

// Row 8 q + group and column 8 s + 2 member + e of a part.
__device__ __forceinline__ float& at(Part& part, int q, int s, int e) { return part[q / 2][s][q % 2 * 2 + e]; }

template <typename T>
__device__ __forceinline__ void multiply_fragments(Part& part, const uint32_t (&a)[2][4], const uint32_t (&b)[2][4]) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      mma_16x8x16<T>(part[m][n], a[m], {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]});
    }
  }
}

// part += left right for one chunk. left[row][k] is the warp's rows; right is its columns, as right[column][k], or,
// transposed, right[k][column].
template <bool kTransposed, int kDepth, typename T>
__device__ __forceinline__ void multiply(Part& part, const T* left, const T* right) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[2][4], b[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
      load_matrices<false>(a[m], left + (m * 16 + lane % 16) * kChunkPitch<T, kDepth> + k + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = 8 * (2 * n + lane / 16), of_k = k + lane / 8 % 2 * 8;
      load_matrices<kTransposed>(b[n], kTransposed ? right + (of_k + lane % 8) * kChunkPitch<T, kDepth> + column
                                                   : right + (column + lane % 8) * kChunkPitch<T, kDepth> + of_k);
    }
    multiply_fragments<T>(part, a, b);
  }
}

// The same of operands that both lie across: left[k][row] and right[k][column], with pitches of their own.
template <int kDepth, int kLeftPitch, int kRightPitch, typename T>
__device__ __forceinline__ void multiply_across(Part& part, const T* left, const T* right) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[2][4], b[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int row = m * 16 + lane / 8 % 2 * 8, of_k = k + lane / 16 * 8 + lane % 8;
      load_matrices<true>(a[m], left + of_k * kLeftPitch + row);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = 8 * (2 * n + lane / 16), of_k = k + lane / 8 % 2 * 8 + lane % 8;
      load_matrices<true>(b[n], right + of_k * kRightPitch + column);
    }
    multiply_fragments<T>(part, a, b);
  }
}

// b[k][column] of two columns, from right[column][k], or, transposed, right[k][column].
template <bool kTransposed, int kPitch, int K>
__device__ __forceinline__ void load_columns(float (&b)[K][2], const float* right) {
  if constexpr (kTransposed) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const Pack<float, 2> pair = load_pack<2>(right + i * kPitch);
      b[i][0] = pair.at[0];
      b[i][1] = pair.at[1];
    }
  } else {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Pack<float, K> column = load_pack<K>(right + e * kPitch);
#pragma unroll
      for (int i = 0; i < K; ++i) b[i][e] = column.at[i];
    }
  }
}

template <bool kTransposed, int kDepth>
__device__ __forceinline__ void multiply(Part& part, const float* left, const float* right) {
  constexpr int kStep = 4, kPitch = kChunkPitch<float, kDepth>;
  const MmaLayout layout(threadIdx.x % kWarp);
#pragma unroll 1  // the next step's operands would take registers that there are not
  for (int k = 0; k < kDepth; k += kStep) {
    Pack<float, kStep> a[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) a[q] = load_pack<kStep>(left + (8 * q + layout.group) * kPitch + k);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int column = 8 * s + 2 * layout.member;
      float b[kStep][2];
      load_columns<kTransposed, kPitch>(b, kTransposed ? right + k * kPitch + column : right + column * kPitch + k);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
#pragma unroll
          for (int e = 0; e < 2; ++e) at(part, q, s, e) += a[q].at[i] * b[i][e];
        }
      }
    }
  }
}

}  // namespace pyext::cuda
