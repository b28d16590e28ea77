// Products with a right factor that is packed in panels of columns, which the register tiles read one after the other.
#pragma once

#include <algorithm>

#include "cpu/hybrid_block/squeeze.h"
#include "cpu/product.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int kPanelVectors = 2;
constexpr int kProductRows = kTileRegisters / kPanelVectors;

// (depth, columns) in panels of kPanelVectors vectors of columns, the last one perhaps of fewer: panel by panel, each
// (depth, its columns).
template <typename T>
struct Panels {
  static constexpr int64_t kColumns = kPanelVectors * kLanes<T>;
  T* data;
  int64_t depth;
  int64_t columns;  // whole vectors

  static int64_t numel(int64_t depth, int64_t columns) { return depth * round_up<T>(columns); }
  int64_t count() const { return (columns + kColumns - 1) / kColumns; }
  T* at(int64_t k, int64_t column) const {
    const int64_t first = column / kColumns * kColumns, width = std::min(kColumns, columns - first);
    return data + first * depth + k * width + column - first;
  }
  Panels moved(int64_t elements) const { return {data + elements, depth, columns}; }
};

// out (rows x columns) = or += left (rows x depth) * the rows [first, first + depth) of the panels `own`.
template <typename T>
PYEXT_OWN_REGISTERS void multiply_panels(Left<T> left, const Panels<T>& right, Range own, int64_t first, int64_t depth,
                                         T* out, int64_t out_pitch, int64_t rows, Result result) {
  const int64_t tiles = (rows + kProductRows - 1) / kProductRows;
  for (int64_t p = own.begin; p < own.end; ++p) {
    const int64_t column = p * Panels<T>::kColumns, width = std::min(Panels<T>::kColumns, right.columns - column);
    const T* panel = right.data + column * right.depth + first * width;
    with_constant<kPanelVectors>(width / kLanes<T>, [&](auto vectors) {
      for (int64_t t = 0; t < tiles; ++t) {
        const Range own_rows = part_of(rows, tiles, t);
        with_constant<kProductRows>(own_rows.end - own_rows.begin, [&](auto count) {
          product_tile<T, decltype(count)::value, decltype(vectors)::value>(
              {left.data + own_rows.begin * left.row_stride, left.row_stride, left.depth_stride}, panel, width,
              out + own_rows.begin * out_pitch + column, out_pitch, depth, result);
        });
      }
    });
  }
}

// [0, n) in parts of at most `most` that begin at multiples of `unit`: visit(first, count).
template <typename Visit>
inline void in_parts(int64_t n, int64_t most, int64_t unit, Visit visit) {
  const int64_t units = (n + unit - 1) / unit, parts = (n + most - 1) / most;
  for (int64_t part = 0; part < parts; ++part) {
    const Range own = part_of(units, parts, part);
    visit(own.begin * unit, std::min(own.end * unit, n) - own.begin * unit);
  }
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
