// The gradient of the weight before scaling: products of the gradient of v and x over all positions, cut into chunks
// whose sums are added afterwards, in the order of chunks.
#pragma once

#include "cuda/masked_conv2d/tile.h"

namespace pyext::masked_conv2d {

// One chunk's part of the gradient: of kept channels, (outputs x pitch), where a row has the kept inputs of the
// output's group times taps; or, where groups are small, of the whole weight.
struct Partial {
  float* data;
  int64_t rows, pitch;
  int64_t chunks;   // at most
  int chunk_shift;  // of a chunk's length, a power of two: positions of images in their order
  int images;       // of a chunk, where groups are small
  bool whole;

  int64_t numel() const { return chunks * rows * pitch; }
  __device__ int64_t at(int64_t nth, int row, int column) const { return (nth * rows + row) * pitch + column; }
};

// Maps are given as they are or, to arranged_weights, arranged.
template <typename T>
struct WeightProduct {
  Layer layer;
  const T* x;
  Grid grid;
  const T* grad;  // of v
  int64_t grad_image, grad_position;
  Partial partial;
  unsigned row_tiles, column_tiles;
};

namespace tiled {

// The block's tile: rows are outputs of one group, and positions are of the images of one sub-network.
struct WeightTile {
  int64_t chunk;
  Cut positions;
  int first_image;
  Cut rows;
  int first_row;  // in the list of outputs
  const Chosen* outputs;
  const Chosen* inputs;
  int input_count;
  int output_slot, input_slot;  // of the first of them, in arranged maps
  int first_column, columns;

  template <typename T>
  __device__ explicit WeightTile(const WeightProduct<T>& w) {
    const Layer& l = w.layer;
    const unsigned tile = blockIdx.x / w.column_tiles;
    chunk = tile / w.row_tiles;
    positions = cut_at(chunk, int64_t{1} << w.partial.chunk_shift, l.segments(),
                       [&](int subnet) { return int64_t{l.images.starts[subnet]} * l.out_positions(); });
    const int subnet = positions.segment;
    first_image = l.images.starts[subnet];
    rows = cut_at(tile % w.row_tiles, kRows, l.outputs.groups,
                  [&](int group) -> int64_t { return l.outputs.start(subnet, group); });
    first_row = l.outputs.start(subnet, rows.segment) + static_cast<int>(rows.first);
    outputs = l.outputs.of(subnet) + first_row;
    const int begin = l.inputs.start(subnet, rows.segment);
    inputs = l.inputs.of(subnet) + begin;
    input_count = l.inputs.start(subnet, rows.segment + 1) - begin;
    output_slot = l.outputs.slot(subnet, rows.segment) + static_cast<int>(rows.first);
    input_slot = l.inputs.slot(subnet, rows.segment);
    first_column = static_cast<int>(blockIdx.x % w.column_tiles) * kColumns;
    columns = min(input_count * l.taps() - first_column, kColumns);
  }
};

template <typename T>
struct WeightShared {
  masked_conv2d::Shared<T> product;
  WeightTile tile;
};

// A column's part of where x is read: a kept input and a tap.
template <typename T>
__device__ Place column_place(const WeightProduct<T>& w, const WeightTile& tile, int column) {
  const int nth = (tile.first_column + column) / w.layer.taps();
  const int tap = tile.first_column + column - nth * w.layer.taps();
  const int down = tap / w.layer.columns.kernel;
  const int y = down * w.layer.rows.dilation;
  const int x = (tap - down * w.layer.columns.kernel) * w.layer.columns.dilation;
  return {tile.inputs[nth].place * w.grid.channel + y * w.grid.row + x * w.grid.column, y, x};
}

template <typename T>
__device__ Depth position_at(const WeightProduct<T>& w, const WeightTile& tile, int64_t item) {
  const int per_image = w.layer.out_positions(), width = w.layer.columns.output;
  const int nth = static_cast<int>(item / per_image);
  const int position = static_cast<int>(item - int64_t{nth} * per_image);
  const int64_t image = w.layer.images.order[tile.first_image + nth];
  const int down = position / width;
  const int y = down * w.layer.rows.stride - w.layer.rows.padding;
  const int x = (position - down * width) * w.layer.columns.stride - w.layer.columns.padding;
  return {{image * w.grid.image + y * w.grid.row + x * w.grid.column, y, x},
          image * w.grad_image + position * w.grad_position,
          1.f,
          0};
}

// A tile's sum of the output at `row` and the input and tap at `column`. One that came out as no number is added up
// again, without the places outside of the map, whose zeros make NaN of a gradient that is no number.
template <typename T>
__device__ __forceinline__ float checked_sum(const WeightProduct<T>& w, const WeightTile& tile, float sum, int64_t row,
                                             const Place& column) {
  if (sum == sum) return sum;
  sum = 0.f;
  for (int64_t k = 0; k < tile.positions.count; ++k) {
    const Depth depth = position_at(w, tile, tile.positions.first + k);
    if (!is_inside(depth.place, column, w.grid.height, w.grid.width)) continue;
    sum += to_float(w.grad[depth.offset + row]) * to_float(w.x[depth.place.offset + column.offset]);
  }
  return sum;
}

// Block: a tile of outputs and of inputs times taps, over one chunk of positions.
template <typename T>
__device__ void multiply_weights(const WeightProduct<T>& w) {
  WeightShared<T>& shared = *reinterpret_cast<WeightShared<T>*>(dynamic_shared());
  if (threadIdx.x == 0) shared.tile = WeightTile(w);
  __syncthreads();
  const WeightTile& tile = shared.tile;
  if (tile.positions.count <= 0 || tile.rows.count <= 0 || tile.columns <= 0) return;
  const int thread = threadIdx.x;
  if (thread < kRows) {
    shared.product.offsets[thread] =
        thread < tile.rows.count ? int64_t{tile.outputs[thread].place} * w.layer.out_positions() : -1;
  }
  if (thread < kColumns) {
    shared.product.places[thread] =
        thread < tile.columns ? column_place(w, tile, thread) : Place{0, kNowhere, kNowhere};
  }
  const Indexed<T, T> left{w.grad, shared.product.offsets, true, false};
  const Gathered<T> right{w.x, w.grid.height, w.grid.width, shared.product.places, true};
  const Chunks chunks{0, chunks_of<T>(tile.positions.count)};
  multiply_tile(shared.product, tile.positions.count, chunks, left, right,
                [&](int64_t k) { return position_at(w, tile, tile.positions.first + k); });
  const int column = thread % kColumns;
  if (column >= tile.columns) return;
  for (int row = thread / kColumns; row < tile.rows.count; row += kThreads / kColumns) {
    w.partial.data[w.partial.at(tile.chunk, tile.first_row + row, tile.first_column + column)] = checked_sum(
        w, tile, shared.product.sums[column][row], shared.product.offsets[row], shared.product.places[column]);
  }
}

}  // namespace tiled

namespace single {

// Sum over the positions of one image, for a lane of the warp that has it.
template <typename T>
__device__ float sum_of_positions(const WeightProduct<T>& w, const T* grad, const T* x, int down, int across,
                                  int lane) {
  const Extent &rows = w.layer.rows, &columns = w.layer.columns;
  float sum = 0.f;
  for (int position = lane; position < w.layer.out_positions(); position += kWarp) {
    const int out_y = position / columns.output;
    const int y = out_y * rows.stride - rows.padding + down * rows.dilation;
    const int column = (position - out_y * columns.output) * columns.stride - columns.padding;
    const int at = column + across * columns.dilation;
    if (y < 0 || y >= rows.input || at < 0 || at >= columns.input) continue;
    sum += to_float(grad[position]) * to_float(x[y * w.grid.row + at * w.grid.column]);
  }
  return sum;
}

// Block: one element of the whole weight, over one chunk of images, a warp per image.
template <typename T>
__device__ void multiply_weights(const WeightProduct<T>& w) {
  const Layer& l = w.layer;
  const unsigned pitch = static_cast<unsigned>(w.partial.pitch), row = blockIdx.x / pitch;
  const int column = static_cast<int>(blockIdx.x - row * pitch);
  const unsigned chunk = row / static_cast<unsigned>(w.partial.rows);
  const int output = static_cast<int>(row - chunk * static_cast<unsigned>(w.partial.rows));
  const int group = output / l.outputs.group_channels(), nth = column / l.taps(), tap = column - nth * l.taps();
  const int input = group * l.inputs.group_channels() + nth, down = tap / l.columns.kernel;
  const int first = static_cast<int>(chunk) * w.partial.images, end = min(first + w.partial.images, l.images.batch);
  float sum[1] = {};
  for (int image = first + static_cast<int>(threadIdx.x) / kWarp; image < end; image += kWarps) {
    const int subnet = l.images.subnet(image);
    const int of_output = l.outputs.rank(subnet, output), of_input = l.inputs.rank(subnet, input);
    if (of_output < 0 || of_input < 0) continue;
    const T* grad =
        w.grad + (int64_t{image} * l.outputs.length + l.outputs.of(subnet)[of_output].place) * l.out_positions();
    const T* x = w.x + image * w.grid.image + l.inputs.of(subnet)[of_input].place * w.grid.channel;
    sum[0] += sum_of_positions(w, grad, x, down, tap - down * l.columns.kernel, threadIdx.x % kWarp);
  }
  block_sum(sum, reinterpret_cast<float*>(dynamic_shared()));
  if (threadIdx.x == 0) w.partial.data[w.partial.at(chunk, output, column)] = sum[0];
}

}  // namespace single

}  // namespace pyext::masked_conv2d
