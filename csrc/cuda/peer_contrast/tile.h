// A tile of similarities: fetching rows and columns by chunks of features, and their product.
#pragma once

#include "cuda/instructions.h"
#include "cuda/peer_contrast/plan.h"

namespace pyext::peer_contrast {

struct Lane {
  int row_warp, column_warp;
  MmaLayout layout;

  __device__ Lane()
      : row_warp(threadIdx.x / kWarp / kColumnWarps),
        column_warp(threadIdx.x / kWarp % kColumnWarps),
        layout(threadIdx.x % kWarp) {}
};

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
      multiply<false, kDepth>(part, rows + lane.row_warp * kPart * kPitch<T>, right);
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
