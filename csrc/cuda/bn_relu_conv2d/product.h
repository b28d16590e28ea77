// A tile of a product of matrices, whose operands are made as they are read: sum_k a(row, k) b(k, column). In float32
// by FMAs, in 16 bits on tensor cores with float32 sums.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/bn_relu_conv2d/places.h"
#include "cuda/instructions.h"
#include "cuda/mma.h"

namespace pyext::bn_relu_conv2d {

constexpr int kTile = 64;   // rows and columns of a block of threads
constexpr int kDepth = 16;  // of the operands in shared memory at once
constexpr int kQuad = 4;    // rows and columns of a thread
constexpr int kAcross = kTile / kQuad;
constexpr int kRounds = kTile * kDepth / kThreads;  // elements of each operand that a thread makes at once
static_assert(kAcross * kAcross == kThreads);

static_assert(kDepth == 16, "the inner extent of mma_16x8x16");

template <typename T>
struct Operands {
  // Rows of 12 words, so that the 8 of 4 words that a warp reads at once lie in different banks.
  T a[kTile][kDepth + 8];
  T b[kTile][kDepth + 8];
  float sum[kTile][kTile + kQuad];
};

template <>
struct Operands<float> {
  // Rows of 17 times 16 bytes: neighbours along k lie in different banks.
  float a[kDepth][kTile + kQuad];
  float b[kDepth][kTile + kQuad];
};

// How threads share the elements of an operand: neighbours in a warp are neighbours along the tile's side, or along k.
enum class Order { kSide, kDepth };

template <Order kOrder>
struct Share {
  int side[kRounds];
  int k[kRounds];

  __device__ __forceinline__ Share() {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int index = threadIdx.x + i * kThreads;
      side[i] = kOrder == Order::kSide ? index % kTile : index / kDepth;
      k[i] = kOrder == Order::kSide ? index / kTile : index % kDepth;
    }
  }
};

__device__ __forceinline__ int thread_row() { return threadIdx.x / kAcross * kQuad; }
__device__ __forceinline__ int thread_column() { return threadIdx.x % kAcross * kQuad; }

// Both operands of the terms from `start` on, into shared memory.
template <Order kOrderA, Order kOrderB, typename A, typename B, typename StoreA, typename StoreB>
__device__ __forceinline__ void load_operands(int start, int depth, const A& a, const B& b, const StoreA& store_a,
                                              const StoreB& store_b) {
  const Share<kOrderA> of_a;
  const Share<kOrderB> of_b;
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int k = start + of_a.k[i];
    store_a(of_a.side[i], of_a.k[i], k < depth ? a(of_a.side[i], k, i) : 0.f);
  }
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int k = start + of_b.k[i];
    store_b(of_b.side[i], of_b.k[i], k < depth ? b(of_b.side[i], k, i) : 0.f);
  }
}

// sum[i][j] = the products of `depth` terms for rows thread_row() + i and columns thread_column() + j. `a(side, k,
// round)` and `b` give an element, 0 beyond the matrix's side; they are not asked for terms beyond `depth`.
template <Order kOrderA, Order kOrderB, typename A, typename B>
__device__ __forceinline__ void multiply(int depth, const A& a, const B& b, Operands<float>& shared,
                                         float (&sum)[kQuad][kQuad]) {
#pragma unroll
  for (int i = 0; i < kQuad * kQuad; ++i) sum[i / kQuad][i % kQuad] = 0.f;
#pragma unroll 1
  for (int start = 0; start < depth; start += kDepth) {
    __syncthreads();
    load_operands<kOrderA, kOrderB>(
        start, depth, a, b, [&](int side, int k, float x) { shared.a[k][side] = x; },
        [&](int side, int k, float x) { shared.b[k][side] = x; });
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const Pack<float, kQuad> rows = load_pack<kQuad>(&shared.a[k][thread_row()]);
      const Pack<float, kQuad> columns = load_pack<kQuad>(&shared.b[k][thread_column()]);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) sum[i][j] += rows.at[i] * columns.at[j];
      }
    }
  }
}

// The same on tensor cores, with operands rounded to T: a warp has 32 rows by 16 columns, and sums change hands through
// shared memory.
template <Order kOrderA, Order kOrderB, typename T, typename A, typename B>
__device__ __forceinline__ void multiply(int depth, const A& a, const B& b, Operands<T>& shared,
                                         float (&sum)[kQuad][kQuad]) {
  constexpr int kRows = 16;
  constexpr int kColumns = 8;
  const MmaLayout layout(threadIdx.x % kWarp);
  const int warp = threadIdx.x / kWarp;
  const int first_row = warp / 4 * (2 * kRows);
  const int first_column = warp % 4 * (2 * kColumns);
  float d[2][2][4] = {};
#pragma unroll 1
  for (int start = 0; start < depth; start += kDepth) {
    __syncthreads();
    load_operands<kOrderA, kOrderB>(
        start, depth, a, b, [&](int side, int k, float x) { shared.a[side][k] = from_float<T>(x); },
        [&](int side, int k, float x) { shared.b[side][k] = from_float<T>(x); });
    __syncthreads();
    uint32_t rows[2][4];
    uint32_t columns[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        rows[i][r] = operand(&shared.a[first_row + i * kRows + layout.a_row(r)][layout.a_k(r)]);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        columns[i][r] = operand(&shared.b[first_column + i * kColumns + layout.b_column()][layout.b_k(r)]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) mma_16x8x16<T>(d[i][j], rows[i], columns[j]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        shared.sum[first_row + i * kRows + layout.d_row(r)][first_column + j * kColumns + layout.d_column(r)] =
            d[i][j][r];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const Pack<float, kQuad> row = load_pack<kQuad>(&shared.sum[thread_row() + i][thread_column()]);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) sum[i][j] = row.at[j];
  }
}

}  // namespace pyext::bn_relu_conv2d
