// Matrix products of blocks that fit in the second-level cache.
#pragma once

#include "cpu/vector.h"

namespace {

// A register tile: its accumulators hide the latency of a multiply-add, and leave registers for what they are fed with.
constexpr int kTileRows = 4;
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;

// Elements (row, k) of the left factor at row * row_stride + k * depth_stride.
template <typename T>
struct Left {
  const T* data;
  int64_t row_stride, depth_stride;
};

// What a product does with the elements that are there.
enum class Result { kReplaced, kAdded };

template <typename T, int Vectors>
inline void product_tile(Left<T> left, const T* right, int64_t right_pitch, T* out, int64_t out_pitch, int64_t depth,
                         Result result) {
  Vec<T> sum[kTileRows][Vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> columns[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) columns[v] = load_once<T>(right + k * right_pitch + v * kLanes<T>);
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      const Vec<T> x = in_register<T>(splat<T>(left.data[r * left.row_stride + k * left.depth_stride]));
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] += x * columns[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      T* to = out + r * out_pitch + v * kLanes<T>;
      store<T>(to, result == Result::kAdded ? load<T>(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// out (rows x columns) = or += left (rows x depth) * right (depth x columns); rows in whole tiles, columns in whole
// vectors.
template <typename T, int Vectors = kTileVectors>
void product(Left<T> left, const T* right, int64_t right_pitch, T* out, int64_t out_pitch, int64_t rows,
             int64_t columns, int64_t depth, Result result) {
  int64_t c = 0;
  for (; c + Vectors * kLanes<T> <= columns; c += Vectors * kLanes<T>) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
      product_tile<T, Vectors>({left.data + r * left.row_stride, left.row_stride, left.depth_stride}, right + c,
                               right_pitch, out + r * out_pitch + c, out_pitch, depth, result);
    }
  }
  if constexpr (Vectors > 1) {
    if (c < columns) {
      product<T, Vectors - 1>(left, right + c, right_pitch, out + c, out_pitch, rows, columns - c, depth, result);
    }
  }
}

}  // namespace
