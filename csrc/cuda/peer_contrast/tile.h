// A tile of similarities: fetching rows and columns by chunks of features, and their product, on tensor cores for
// 16-bit elements.
#pragma once

#include "cuda/instructions.h"
#include "cuda/mma.h"
#include "cuda/peer_contrast/plan.h"

namespace pyext::peer_contrast {

// A thread's results of a warp's 32 x 32 part: [m][n] are those of the mma of rows 16 m and columns 8 n.
using Part = float[2][4][4];

// Row 8 q + group and column 8 s + 2 member + e of a part.
__device__ __forceinline__ float& at(Part& part, int q, int s, int e) { return part[q / 2][s][q % 2 * 2 + e]; }

struct Lane {
  int row_warp, column_warp;
  MmaLayout layout;

  __device__ Lane()
      : row_warp(threadIdx.x / kWarp / kColumnWarps),
        column_warp(threadIdx.x / kWarp % kColumnWarps),
        layout(threadIdx.x % kWarp) {}
};

// part += left right for one chunk. left[row][k] is the warp's rows; right is its columns, as right[column][k], or,
// transposed, right[k][column].
template <bool kTransposed, typename T>
__device__ __forceinline__ void multiply(Part& part, const T* left, const T* right) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[2][4], b[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) load_matrices<false>(a[m], left + (m * 16 + lane % 16) * kPitch<T> + k + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = 8 * (2 * n + lane / 16), of_k = k + lane / 8 % 2 * 8;
      load_matrices<kTransposed>(b[n], kTransposed ? right + (of_k + lane % 8) * kPitch<T> + column
                                                   : right + (column + lane % 8) * kPitch<T> + of_k);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        mma_16x8x16<T>(part[m][n], a[m], {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]});
      }
    }
  }
}

// b[k][column] of two columns, from right[column][k], or, transposed, right[k][column].
template <bool kTransposed, int K>
__device__ __forceinline__ void load_columns(float (&b)[K][2], const float* right) {
  if constexpr (kTransposed) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const Pack<float, 2> pair = load_pack<2>(right + i * kPitch<float>);
      b[i][0] = pair.at[0];
      b[i][1] = pair.at[1];
    }
  } else {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Pack<float, K> column = load_pack<K>(right + e * kPitch<float>);
#pragma unroll
      for (int i = 0; i < K; ++i) b[i][e] = column.at[i];
    }
  }
}

template <bool kTransposed>
__device__ __forceinline__ void multiply(Part& part, const float* left, const float* right) {
  constexpr int kStep = 4;
  const MmaLayout layout(threadIdx.x % kWarp);
#pragma unroll 1  // the next step's operands would take registers that there are not
  for (int k = 0; k < kDepth; k += kStep) {
    Pack<float, kStep> a[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) a[q] = load_pack<kStep>(left + (8 * q + layout.group) * kPitch<float> + k);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int column = 8 * s + 2 * layout.member;
      float b[kStep][2];
      load_columns<kTransposed>(b,
                                kTransposed ? right + k * kPitch<float> + column : right + column * kPitch<float> + k);
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

// What a block reads: its rows, and stretch blockIdx.y of the columns, tile by tile, each by its chunks of features and
// then (in the backward pass) once more by `outputs` chunks from first_output on.
template <typename T, int P>
class Operands {
 public:
  __device__ Operands(const Plan& plan, const T* panels, int group, int first_output, int outputs)
      : plan_(plan),
        first_output_(first_output),
        chunks_(plan.chunks()),
        steps_(chunks_ + outputs),
        rows_(reinterpret_cast<T*>(dynamic_shared())),
        columns_(rows_ + plan.row_chunks * kRows * kPitch<T>),
        row_image(static_cast<int>(plan.first_tile + blockIdx.x) * Tile<P>::kRowImages),
        first_tile(static_cast<int>(blockIdx.y * plan.tiles_per_stretch)),
        last_tile(static_cast<int>(min(plan.column_tiles, first_tile + plan.tiles_per_stretch))) {
    const int row = threadIdx.x / kFetchers, packet = threadIdx.x % kFetchers * kPacket;
    const int64_t peer = Members(plan.groups, group)[Tile<P>::peer(row)];
    source_ = panels + (peer * plan.padded_batch + Tile<P>::image(row)) * plan.padded_features + packet;
    target_ = row * kPitch<T> + packet;
    if (!plan.ahead()) return;
    for (int chunk = 0; chunk < chunks_; ++chunk) fetch_rows(chunk);
    fetch_columns(first_tile, 0, columns_);
  }

  // The block's memory after rows and columns.
  __device__ T* rest() const { return columns_ + (plan_.ahead() ? 2 : 1) * kColumns * kPitch<T>; }

  // Columns of step `step` of `tile`: a chunk of features, or beyond the last one of outputs. Steps are asked for in
  // order; all threads have then left the step before.
  __device__ const T* columns(int tile, int step) {
    if (!plan_.ahead()) {
      __syncthreads();
      if (step < chunks_) fetch_rows(step);
      fetch_columns(tile, step, columns_);
      wait_for_copies();
      __syncthreads();
      return columns_;
    }
    const T* now = columns_ + (count_ % 2) * kColumns * kPitch<T>;
    T* next = columns_ + (++count_ % 2) * kColumns * kPitch<T>;
    wait_for_copies();
    __syncthreads();
    if (step + 1 < steps_) {
      fetch_columns(tile, step + 1, next);
    } else if (tile + 1 < last_tile) {
      fetch_columns(tile + 1, 0, next);
    }
    return now;
  }

  // Similarities of the warp's part of `tile`.
  __device__ void similarities(const Lane& lane, int tile, Part& part) {
    for (int chunk = 0; chunk < chunks_; ++chunk) {
      const T* right = columns(tile, chunk) + lane.column_warp * kPart * kPitch<T>;
      const T* rows = rows_ + (plan_.ahead() ? chunk : 0) * kRows * kPitch<T>;
      multiply<false>(part, rows + lane.row_warp * kPart * kPitch<T>, right);
    }
  }

 private:
  __device__ void fetch_rows(int chunk) {
    fetch<kRows>(rows_ + (plan_.ahead() ? chunk : 0) * kRows * kPitch<T>, row_image, chunk);
  }

  __device__ void fetch_columns(int tile, int step, T* to) {
    fetch<kColumns>(to, tile * Tile<P>::kColumnImages, step < chunks_ ? step : first_output_ + step - chunks_);
  }

  // A thread copies the same packets of row threadIdx.x / kFetchers of every part, so of the same peer.
  template <int kCount>
  __device__ __forceinline__ void fetch(T* to, int first_image, int chunk) {
    const T* from = source_ + first_image * plan_.padded_features + int64_t{chunk} * kDepth;
    to += target_;
#pragma unroll
    for (int part = 0; part < kCount / kPart; ++part) {
#pragma unroll
      for (int k = 0; k < kDepth; k += kFetchers * kPacket) copy_to_shared(to + part * kPart * kPitch<T> + k, from + k);
      from += Tile<P>::kImagesOfPart * plan_.padded_features;
    }
  }

  static constexpr int kPacket = 16 / sizeof(T), kFetchers = kThreads / kPart;
  static_assert(kDepth % (kFetchers * kPacket) == 0);

  const Plan& plan_;
  const T* source_;
  const int first_output_, chunks_, steps_;
  T *rows_, *columns_;
  int target_, count_ = 0;

 public:
  // Images are counted in 32 bits, as their classes are: 64 would take registers that there are not.
  const int row_image, first_tile, last_tile;
};

}  // namespace pyext::peer_contrast
