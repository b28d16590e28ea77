// Where the tiles of dense blocks' 3x3 convolutions (cpu/winograd.h) lie. Channels are in vectors.
#pragma once

#include "cpu/dense_block/panels.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// Of the kernel of 3x3, row i and column j, for input k and output `column`: the transformed one holds its corners, and
// sums and differences about what is between them.
template <typename T>
inline T kernel_at(const DenseLayer<T>& layer, int i, int j, int64_t k, int64_t column) {
  constexpr int kCorner[] = {0, 1, 3};
  const auto at = [&](int y, int x) { return *layer.kernels(kTile * y + x).at(k, column); };
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
