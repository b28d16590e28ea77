// A block's tile of a product whose operands are gathered: where their elements lie is told by tables in shared memory,
// one entry per row, per column and per step along the inner dimension (the depth), so that an element costs two
// additions and, where it may lie in the border, two comparisons.
#pragma once

#include "cuda/masked_conv2d/plan.h"
#include "cuda/product.h"

namespace pyext::masked_conv2d {

constexpr int kPart = 32;  // rows and columns of a warp in a tile
constexpr int kRowWarps = 4;
constexpr int kColumnWarps = 2;
constexpr int kRows = kPart * kRowWarps;
constexpr int kColumns = kPart * kColumnWarps;
static_assert(kThreads == kWarp * kRowWarps * kColumnWarps);

template <typename T>
constexpr int kDepth = 64 / sizeof(T);  // of a chunk
template <typename T>
constexpr int kUnit = 16 / sizeof(T);  // elements along the depth that a thread fetches for one row
template <typename T>
constexpr int kPitch = kChunkPitch<T, kDepth<T>>;
constexpr int kUnits = 4;  // of a chunk's row

// What is added to a place outside every map, and is no place of one: sums of two stay below zero.
constexpr int kNowhere = -static_cast<int>(kLimit);

// One summand of where an element of a map is: the sum is inside if its y and x are.
struct alignas(16) Place {
  int64_t offset;
  int y, x;
};

// An entry of the depth: one summand of a map's element, and one of another tensor's (-1: of none), which is multiplied
// by `factor`.
struct alignas(16) Depth {
  Place place;
  int64_t offset;
  float factor;
  int channels;  // that follow one another in an arranged map, at most kSlots
};

__device__ __forceinline__ Depth no_depth() { return {{0, kNowhere, kNowhere}, -1, 0.f, 0}; }

using Sums = float[kColumns][kRows + 4];

template <typename T>
struct Shared {
  union {
    struct {
      T left[2][kRows * kPitch<T>];
      T right[2][kColumns * kPitch<T>];
    } chunks;
    Sums sums;
  };
  Depth depth[2][kDepth<T>];
  Place places[kRows];     // of the operand that is a map's
  int64_t offsets[kRows];  // of the other one, -1 for none
};

__device__ __forceinline__ bool is_inside(const Place& a, const Place& b, int height, int width) {
  return static_cast<unsigned>(a.y + b.y) < static_cast<unsigned>(height) &&
         static_cast<unsigned>(a.x + b.x) < static_cast<unsigned>(width);
}

// Elements of a map, zeros outside it.
template <typename T>
struct Gathered {
  static constexpr bool kCopied = false;
  const T* data;
  int height, width;
  const Place* places;
  bool along_depth;  // whether neighbours along the depth, not along rows, are neighbours in memory

  __device__ __forceinline__ Pack<T, kUnit<T>> operator()(int row, const Depth* depth) const {
    const Place own = places[row];
    Pack<T, kUnit<T>> unit;
#pragma unroll
    for (int i = 0; i < kUnit<T>; ++i) {
      const Place place = depth[i].place;
      const bool inside = is_inside(own, place, height, width);
      unit.at[i] = inside ? data[own.offset + place.offset] : from_float<T>(0.f);
    }
    return unit;
  }
};

// Elements of an arranged map, zeros outside it: a unit is 16 bytes, which are copied past the registers.
template <typename T>
struct Arranged {
  static_assert(kUnit<T> == kSlots);
  static constexpr bool kCopied = true, along_depth = true;
  const T* data;
  int height, width;
  const Place* places;

  __device__ __forceinline__ void copy(int row, const Depth* depth, T* to) const {
    const Place own = places[row], place = depth->place;
    const bool inside = is_inside(own, place, height, width);
    copy_to_shared(to, inside ? data + own.offset + place.offset : data,
                   inside ? depth->channels * static_cast<int>(sizeof(T)) : 0);
  }
};

// Elements of another tensor, as T.
template <typename T, typename P>
struct Indexed {
  static constexpr bool kCopied = false;
  const P* data;
  const int64_t* offsets;
  bool along_depth;
  bool scaled;  // whether factors are others than 1

  __device__ __forceinline__ Pack<T, kUnit<T>> operator()(int row, const Depth* depth) const {
    const int64_t own = offsets[row];
    Pack<T, kUnit<T>> unit;
#pragma unroll
    for (int i = 0; i < kUnit<T>; ++i) {
      const int64_t offset = depth[i].offset;
      const float value = (own | offset) >= 0 ? to_float(data[own + offset]) : 0.f;
      unit.at[i] = from_float<T>(scaled ? value * depth[i].factor : value);
    }
    return unit;
  }
};

// A thread's share of a chunk of `Count` rows of an operand.
template <typename T, int Count>
struct Share {
  static constexpr int kEach = Count * kUnits / kThreads;
  Pack<T, kUnit<T>> units[kEach];

  // To the registers or, if that is the operand's way, to `chunk`.
  template <typename Operand>
  __device__ __forceinline__ void fetch(const Operand& operand, const Depth* depth, T* chunk) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if constexpr (Operand::kCopied) {
        operand.copy(row(i, operand), depth + column(i, operand),
                     chunk + row(i, operand) * kPitch<T> + column(i, operand));
      } else {
        units[i] = operand(row(i, operand), depth + column(i, operand));
      }
    }
  }

  template <typename Operand>
  __device__ __forceinline__ void store(const Operand& operand, T* chunk) const {
    if constexpr (!Operand::kCopied) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) store_pack(chunk + row(i, operand) * kPitch<T> + column(i, operand), units[i]);
    }
  }

 private:
  template <typename Operand>
  __device__ __forceinline__ static int row(int i, const Operand& operand) {
    const int unit = threadIdx.x + i * kThreads;
    return operand.along_depth ? unit / kUnits : unit % Count;
  }
  template <typename Operand>
  __device__ __forceinline__ static int column(int i, const Operand& operand) {
    const int unit = threadIdx.x + i * kThreads;
    return (operand.along_depth ? unit % kUnits : unit / Count) * kUnit<T>;
  }
};

// The first row and column of the warp's part.
__device__ __forceinline__ int row_of_warp() { return threadIdx.x / kWarp / kColumnWarps * kPart; }
__device__ __forceinline__ int column_of_warp() { return threadIdx.x / kWarp % kColumnWarps * kPart; }

__device__ __forceinline__ void store_part(Part& part, Sums& sums) {
  const MmaLayout layout(threadIdx.x % kWarp);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = column_of_warp() + 8 * s + 2 * layout.member + e;
        sums[column][row_of_warp() + 8 * q + layout.group] = at(part, q, s, e);
      }
    }
  }
}

// Chunks of the depth, from `first` to that before `last`.
struct Chunks {
  int64_t first, last;
};

template <typename T>
__device__ __forceinline__ int64_t chunks_of(int64_t depth) {
  return (depth + kDepth<T> - 1) / kDepth<T>;
}

// The tile's product over `chunks` into shared.sums[column][row]. depth_at(k) gives entry k < depth. `shared`'s places
// and offsets are filled; a barrier is passed before they are read, and one after the sums are written.
template <typename T, typename Left, typename Right, typename DepthAt>
__device__ __forceinline__ void multiply_tile(Shared<T>& shared, int64_t depth, const Chunks& chunks, const Left& left,
                                              const Right& right, DepthAt depth_at) {
  const int first_row = row_of_warp(), first_column = column_of_warp();
  const auto fill = [&](int64_t chunk) {
    if (threadIdx.x >= kDepth<T> || chunk >= chunks.last) return;
    const int64_t k = chunk * kDepth<T> + threadIdx.x;
    shared.depth[chunk % 2][threadIdx.x] = k < depth ? depth_at(k) : no_depth();
  };
  Share<T, kRows> of_left;
  Share<T, kColumns> of_right;
  const auto fetch = [&](int64_t chunk) {
    of_left.fetch(left, shared.depth[chunk % 2], shared.chunks.left[chunk % 2]);
    of_right.fetch(right, shared.depth[chunk % 2], shared.chunks.right[chunk % 2]);
  };
  const auto store = [&](int64_t chunk) {
    of_left.store(left, shared.chunks.left[chunk % 2]);
    of_right.store(right, shared.chunks.right[chunk % 2]);
    if constexpr (Left::kCopied) wait_for_copies();
  };
  Part part = {};
  fill(chunks.first);
  fill(chunks.first + 1);
  __syncthreads();
  if (chunks.first < chunks.last) {
    fetch(chunks.first);
    store(chunks.first);
  }
  __syncthreads();
  // What a step writes was last read in the step before: the other chunk, and the entries of its own.
  for (int64_t chunk = chunks.first; chunk < chunks.last; ++chunk) {
    if (chunk + 1 < chunks.last) fetch(chunk + 1);
    multiply<false, kDepth<T>>(part, shared.chunks.left[chunk % 2] + first_row * kPitch<T>,
                               shared.chunks.right[chunk % 2] + first_column * kPitch<T>);
    if (chunk + 1 < chunks.last) store(chunk + 1);
    fill(chunk + 2);
    __syncthreads();
  }
  store_part(part, shared.sums);
  __syncthreads();
}

}  // namespace pyext::masked_conv2d
