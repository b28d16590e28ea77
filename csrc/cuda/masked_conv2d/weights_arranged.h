// The gradient of the weight from arranged maps, in 16 bits: a tile's columns are inputs at one tap, so that both
// operands are copied 16 bytes at a time, and lie in shared memory position by position.
#pragma once

#include "cuda/masked_conv2d/weights.h"

namespace pyext::masked_conv2d::arranged {

using tiled::checked_sum;
using tiled::WeightTile;

// Of a group. Fewer fill no tile, whose columns are inputs at one tap: then columns are inputs times taps (weights.h).
constexpr int kLeastInputs = 32;

template <typename T>
struct Shared {
  union {
    struct {
      T left[2][kDepth<T>][kRows + kSlots];
      T right[2][kDepth<T>][kColumns + kSlots];
    } chunks;
    Sums sums;
  };
  Depth depth[2][kDepth<T>];
  WeightTile tile;
};

// The tile's columns: inputs [first, first + count) of the group's, at one tap.
struct Columns {
  int tap, first, count;
  Place place;  // of the tap

  template <typename T>
  __device__ Columns(const WeightProduct<T>& w, const WeightTile& tile) {
    const int column_tile = static_cast<int>(blockIdx.x % w.column_tiles);
    tap = column_tile % w.layer.taps();
    first = column_tile / w.layer.taps() * kColumns;
    count = min(tile.input_count - first, kColumns);
    const int down = tap / w.layer.columns.kernel;
    const int y = down * w.layer.rows.dilation;
    const int x = (tap - down * w.layer.columns.kernel) * w.layer.columns.dilation;
    place = {y * w.grid.row + x * w.grid.column + tile.input_slot + first, y, x};
  }
};

// Copies kSlots channels, of which there are `left` or fewer.
template <typename T>
__device__ __forceinline__ void copy_channels(T* to, const T* data, int64_t offset, bool inside, int left) {
  const int bytes = inside ? min(max(left, 0), kSlots) * static_cast<int>(sizeof(T)) : 0;
  copy_to_shared(to, bytes > 0 ? data + offset : data, bytes);
}

template <typename T>
__device__ __forceinline__ void copy_chunk(const WeightProduct<T>& w, const Columns& columns, Shared<T>& shared,
                                           int stage) {
  constexpr int kRowUnits = kRows / kSlots, kColumnUnits = kColumns / kSlots;
  const WeightTile& tile = shared.tile;
#pragma unroll
  for (int unit = threadIdx.x; unit < kDepth<T> * kRowUnits; unit += kThreads) {
    const int k = unit / kRowUnits, row = unit % kRowUnits * kSlots;
    const int64_t offset = shared.depth[stage][k].offset;
    copy_channels(&shared.chunks.left[stage][k][row], w.grad, offset + tile.output_slot + row, offset >= 0,
                  static_cast<int>(tile.rows.count) - row);
  }
#pragma unroll
  for (int unit = threadIdx.x; unit < kDepth<T> * kColumnUnits; unit += kThreads) {
    const int k = unit / kColumnUnits, column = unit % kColumnUnits * kSlots;
    const Place place = shared.depth[stage][k].place;
    copy_channels(&shared.chunks.right[stage][k][column], w.x, place.offset + columns.place.offset + column,
                  is_inside(place, columns.place, w.grid.height, w.grid.width), columns.count - column);
  }
}

// Block: a tile of outputs and of inputs at one tap, over one chunk of positions.
template <typename T>
__device__ void multiply_weights(const WeightProduct<T>& w) {
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(dynamic_shared());
  if (threadIdx.x == 0) shared.tile = WeightTile(w);
  __syncthreads();
  const WeightTile& tile = shared.tile;
  const Columns columns(w, tile);
  if (tile.positions.count <= 0 || tile.rows.count <= 0 || columns.count <= 0) return;
  const int64_t chunks = chunks_of<T>(tile.positions.count);
  const auto fill = [&](int64_t chunk) {
    if (threadIdx.x >= kDepth<T> || chunk >= chunks) return;
    const int64_t k = chunk * kDepth<T> + threadIdx.x;
    shared.depth[chunk % 2][threadIdx.x] =
        k < tile.positions.count ? position_at(w, tile, tile.positions.first + k) : no_depth();
  };
  Part part = {};
  fill(0);
  fill(1);
  __syncthreads();
  copy_chunk(w, columns, shared, 0);
  wait_for_copies();
  __syncthreads();
  // What a step writes was last read in the step before: the other chunk, and the entries of its own.
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int stage = chunk % 2;
    if (chunk + 1 < chunks) copy_chunk(w, columns, shared, 1 - stage);
    multiply_across<kDepth<T>, kRows + kSlots, kColumns + kSlots>(part, &shared.chunks.left[stage][0][row_of_warp()],
                                                                  &shared.chunks.right[stage][0][column_of_warp()]);
    wait_for_copies();
    fill(chunk + 2);
    __syncthreads();
  }
  store_part(part, shared.sums);
  __syncthreads();
  const int column = threadIdx.x % kColumns;
  if (column >= columns.count) return;
  const Place from{columns.place.offset + column, columns.place.y, columns.place.x};
  for (int row = threadIdx.x / kColumns; row < tile.rows.count; row += kThreads / kColumns) {
    const int place = (columns.first + column) * w.layer.taps() + columns.tap;
    w.partial.data[w.partial.at(tile.chunk, tile.first_row + row, place)] =
        checked_sum(w, tile, shared.sums[column][row], tile.output_slot + row, from);
  }
}

}  // namespace pyext::masked_conv2d::arranged
