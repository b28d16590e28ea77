// Products of rows in whole tiles and columns in whole vectors.
#pragma once

#include "cpu/product.h"

namespace {

constexpr int kTileRows = 4;
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;

// out (rows x columns) = or += left (rows x depth) * right (depth x columns); rows in whole tiles, columns in whole
// vectors.
template <typename T, int Vectors = kTileVectors>
void product(Left<T> left, const T* right, int64_t right_pitch, T* out, int64_t out_pitch, int64_t rows,
             int64_t columns, int64_t depth, Result result) {
  int64_t c = 0;
  for (; c + Vectors * kLanes<T> <= columns; c += Vectors * kLanes<T>) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
      product_tile<T, kTileRows, Vectors>({left.data + r * left.row_stride, left.row_stride, left.depth_stride},
                                          right + c, right_pitch, out + r * out_pitch + c, out_pitch, depth, result);
    }
  }
  if constexpr (Vectors > 1) {
    if (c < columns) {
      product<T, Vectors - 1>(left, right + c, right_pitch, out + c, out_pitch, rows, columns - c, depth, result);
    }
  }
}

}  // namespace
