// The 3x3 convolution by F(2x2, 3x3) (arXiv 1509.09308): of each tile of 4x4 positions, 2x2 results by 16 products a
// channel, instead of 36. With channels in vectors, the transforms are sums of whole vectors.
#pragma once

#include "cpu/dense_block/panels.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int kTile = 4;  // rows and columns of a tile
constexpr int kStep = 2;  // from one tile to the next, and rows and columns of its results

// B^T d B of a tile's vectors of channels, with B^T = (1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1): place by place.
template <typename T>
inline void transform_input(const T* d, int64_t row, int64_t column, T* to, int64_t place) {
  // Row i of B^T d is the sum of rows first[i] and second[i] of d, the latter times sign[i].
  const auto sums = [&](int first, int second, bool minus, T* to) {
    Vec<T> t[kTile];
#pragma GCC unroll 4
    for (int j = 0; j < kTile; ++j) {
      const Vec<T> a = load<T>(d + first * row + j * column), b = load<T>(d + second * row + j * column);
      t[j] = minus ? a - b : a + b;
    }
    store<T>(to, t[0] - t[2]);
    store<T>(to + place, t[1] + t[2]);
    store<T>(to + 2 * place, t[2] - t[1]);
    store<T>(to + 3 * place, t[1] - t[3]);
  };
  sums(0, 2, true, to);
  sums(1, 2, false, to + kTile * place);
  sums(2, 1, true, to + 2 * kTile * place);
  sums(1, 3, true, to + 3 * kTile * place);
}

// A^T m A of vectors of results, with A^T = (1 1 1 0; 0 1 -1 -1).
template <typename T>
inline void transform_output(const T* m, int64_t place, Vec<T> (&to)[kStep][kStep]) {
  Vec<T> rows[kStep][kTile];
#pragma GCC unroll 4
  for (int j = 0; j < kTile; ++j) {
    const Vec<T> a = load<T>(m + j * place), b = load<T>(m + (kTile + j) * place),
                 c = load<T>(m + (2 * kTile + j) * place), d = load<T>(m + (3 * kTile + j) * place);
    rows[0][j] = a + b + c;
    rows[1][j] = b - c - d;
  }
#pragma GCC unroll 2
  for (int i = 0; i < kStep; ++i) {
    to[i][0] = rows[i][0] + rows[i][1] + rows[i][2];
    to[i][1] = rows[i][1] - rows[i][2] - rows[i][3];
  }
}

// Of the kernel of 3x3, row i and column j, for input k and output `column`: the transformed one holds its corners, and
// sums and differences about what is between them.
template <typename T>
inline T kernel_at(const DenseLayer<T>& layer, int i, int j, int64_t k, int64_t column) {
  constexpr int kCorner[] = {0, 1, 3};
  const auto at = [&](int y, int x) { return layer.kernels(kTile * y + x).at(k, column); };
  const auto in_row = [&](int y) { return j == 1 ? at(y, 1) - at(y, 2) : at(y, kCorner[j]); };
  return i == 1 ? in_row(1) - in_row(2) : in_row(kCorner[i]);
}

// Some images' maps with a border of zeros, channels innermost, tiles beside one another.
struct Padded {
  int64_t height, width;  // of the map
  int64_t tile_rows, tile_columns;
  int64_t pitch;  // of a position
  int64_t row, image;

  Padded(const DenseSizes& s, int64_t pitch) : height(s.height), width(s.width), pitch(pitch) {
    tile_rows = (height + kStep - 1) / kStep;
    tile_columns = (width + kStep - 1) / kStep;
    row = (tile_columns * kStep + 2) * pitch;
    image = (tile_rows * kStep + 2) * row;
  }
  int64_t tiles() const { return tile_rows * tile_columns; }
  // Of position `p` of all images, one after another.
  int64_t place(int64_t p) const {
    const int64_t n = p / (height * width), rest = p % (height * width);
    return n * image + (rest / width + 1) * row + (rest % width + 1) * pitch;
  }
};

// A tile of all images' tiles: where it begins, and its results.
struct Tile {
  int64_t input;
  int64_t output;  // position
  int64_t rows, columns;

  Tile(const Padded& padded, int64_t index) {
    const int64_t n = index / padded.tiles(), rest = index % padded.tiles();
    const int64_t y = rest / padded.tile_columns * kStep, x = rest % padded.tile_columns * kStep;
    input = n * padded.image + y * padded.row + x * padded.pitch;
    output = (n * padded.height + y) * padded.width + x;
    rows = std::min<int64_t>(padded.height - y, kStep);
    columns = std::min<int64_t>(padded.width - x, kStep);
  }
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
