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

template <bool kTransposed>
__device__ __forceinline__ void multiply(Part& part, const float* left, const float* right) {
  const MmaLayout layout(threadIdx.x % kWarp);
#pragma unroll 4
  for (int k = 0; k < kDepth; k += 2) {
    Pack<float, 2> a[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) a[q] = load_pack<2>(left + (8 * q + layout.group) * kPitch<float> + k);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int column = 8 * s + 2 * layout.member;
      Pack<float, 2> b[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        b[i] = load_pack<2>(kTransposed ? right + (k + i) * kPitch<float> + column
                                        : right + (column + i) * kPitch<float> + k);
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          at(part, q, s, e) += a[q].at[0] * (kTransposed ? b[0].at[e] : b[e].at[0]);
          at(part, q, s, e) += a[q].at[1] * (kTransposed ? b[1].at[e] : b[e].at[1]);
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
        panels_(panels),
        members_(plan.groups, group),
        first_output_(first_output),
        chunks_(plan.chunks()),
        steps_(chunks_ + outputs),
        rows_(reinterpret_cast<T*>(dynamic_shared())),
        columns_(rows_ + plan.row_chunks * kRows * kPitch<T>),
        row_image((plan.first_tile + blockIdx.x) * Tile<P>::kRowImages),
        first_tile(blockIdx.y * plan.tiles_per_stretch),
        last_tile(min(plan.column_tiles, first_tile + plan.tiles_per_stretch)) {
    if (!plan.ahead()) return;
    for (int chunk = 0; chunk < chunks_; ++chunk) fetch_rows(chunk);
    fetch_columns(first_tile, 0, columns_);
  }

  // The block's memory after rows and columns.
  __device__ T* rest() const { return columns_ + (plan_.ahead() ? 2 : 1) * kColumns * kPitch<T>; }

  // Columns of step `step` of `tile`: a chunk of features, or beyond the last one of outputs. Steps are asked for in
  // order; all threads have then left the step before.
  __device__ const T* columns(int64_t tile, int step) {
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
  __device__ void similarities(const Lane& lane, int64_t tile, Part& part) {
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

  __device__ void fetch_columns(int64_t tile, int step, T* to) {
    fetch<kColumns>(to, tile * Tile<P>::kColumnImages, step < chunks_ ? step : first_output_ + step - chunks_);
  }

  template <int kCount>
  __device__ void fetch(T* to, int64_t first_image, int chunk) {
    constexpr int kPacket = 16 / sizeof(T), kPackets = kDepth / kPacket;
    for (int i = threadIdx.x; i < kCount * kPackets; i += kThreads) {
      const int position = i / kPackets, k = i % kPackets * kPacket;
      const int64_t peer = members_[Tile<P>::peer(position)];
      const int64_t image = first_image + Tile<P>::image(position);
      const int64_t from = (peer * plan_.padded_batch + image) * plan_.padded_features + int64_t{chunk} * kDepth + k;
      copy_to_shared(to + position * kPitch<T> + k, panels_ + from);
    }
  }

  const Plan& plan_;
  const T* panels_;
  const Members members_;
  const int first_output_, chunks_, steps_;
  T *rows_, *columns_;
  int count_ = 0;

 public:
  const int64_t row_image, first_tile, last_tile;
};

}  // namespace pyext::peer_contrast
