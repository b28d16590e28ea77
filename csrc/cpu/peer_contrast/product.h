// Matrix products of blocks that fit in the second-level cache.
#pragma once

#include "cpu/vector.h"

namespace {

// Rows of a register tile: eight accumulators or more hide the latency of a multiply-add.
constexpr int kTileRows = 4;
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;

// Elements (row, k) of the left factor at row * row_stride + k * depth_stride.
template <typename T>
struct Left {
  const T* data;
  int64_t row_stride, depth_stride;
};

template <typename T, int Vectors>
inline void product_tile(Left<T> left, const T* right, int64_t right_pitch, T* out, int64_t out_pitch, int64_t depth,
                         bool add) {
  Vec<T> sum[kTileRows][Vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> columns[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) columns[v] = load_once<T>(right + k * right_pitch + v * kLanes<T>);
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      const Vec<T> x = splat<T>(left.data[r * left.row_stride + k * left.depth_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] += x * columns[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      T* to = out + r * out_pitch + v * kLanes<T>;
      store<T>(to, add ? load<T>(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// out (rows x columns) = or += left (rows x depth) * right (depth x columns); rows in whole tiles, columns in whole
// vectors.
template <typename T>
void product(Left<T> left, const T* right, int64_t right_pitch, T* out, int64_t out_pitch, int64_t rows,
             int64_t columns, int64_t depth, bool add) {
  int64_t c = 0;
  for (; c + kTileVectors * kLanes<T> <= columns; c += kTileVectors * kLanes<T>) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
      product_tile<T, kTileVectors>({left.data + r * left.row_stride, left.row_stride, left.depth_stride}, right + c,
                                    right_pitch, out + r * out_pitch + c, out_pitch, depth, add);
    }
  }
  for (; c < columns; c += kLanes<T>) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
      product_tile<T, 1>({left.data + r * left.row_stride, left.row_stride, left.depth_stride}, right + c, right_pitch,
                         out + r * out_pitch + c, out_pitch, depth, add);
    }
  }
}

}  // namespace
