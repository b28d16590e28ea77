// Matrix products of blocks that fit in the second-level cache.
#pragma once

#include "cpu/vector.h"

namespace {

// Elements (row, k) of the left factor at row * row_stride + k * depth_stride.
template <typename T>
struct Left {
  const T* data;
  int64_t row_stride, depth_stride;
};

// What a product does with the elements that are there.
enum class Result { kReplaced, kAdded };

// Rows x Vectors results stay in registers: enough of them hide the latency of a multiply-add, and leave registers for
// what they are fed with.
template <typename T, int Rows, int Vectors>
inline void product_tile(Left<T> left, const T* right, int64_t right_pitch, T* out, int64_t out_pitch, int64_t depth,
                         Result result) {
  Vec<T> sum[Rows][Vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> columns[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) columns[v] = load_once<T>(right + k * right_pitch + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> x = in_register<T>(splat<T>(left.data[r * left.row_stride + k * left.depth_stride]));
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] += x * columns[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      T* to = out + r * out_pitch + v * kLanes<T>;
      store<T>(to, result == Result::kAdded ? load<T>(to) + sum[r][v] : sum[r][v]);
    }
  }
}

}  // namespace
