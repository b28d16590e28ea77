// The two products whose results are maps: the convolution, and the gradient of x, which is one with the roles of
// inputs and outputs exchanged.
#pragma once

#include "cuda/masked_conv2d/tile.h"

namespace pyext::masked_conv2d {

template <typename T, typename P>
struct Convolution {
  Layer layer;
  bool backward;
  const T* source;
  Grid grid;  // the source's; of an arranged map, in tiles of 16-bit elements
  T* result;  // batch x places x positions, contiguous
  Positions positions;
  int pool;  // rows and columns of the windows whose largest element is a result
  const P* weight;
  int64_t weight_strides[4];
  const P* factors;  // of weights of an output in the backward pass, or null
  const P* scale;    // these three are null in the backward pass
  const P* shift;
  const P* gate;
  bool channels_inside;  // whether the source's channels lie closer together than its columns, or are arranged
  unsigned row_tiles, column_tiles;
  unsigned splits;  // of the depth, whose sums are added afterwards where there are several
  float* partial;   // splits x tiles x columns x rows, or null

  __host__ __device__ const Lists& sources() const { return backward ? layer.outputs : layer.inputs; }
  __host__ __device__ const Lists& results() const { return backward ? layer.inputs : layer.outputs; }
  __host__ __device__ int result_positions() const { return positions.height * positions.width; }
  __host__ __device__ int window() const { return pool * pool; }
  __device__ Line line(const Extent& extent, int phase) const {
    return backward ? backward_line(extent, phase) : forward_line(extent, pool);
  }
  // Where the weight of an output channel, and of an input channel of a group, begins.
  __device__ int64_t of_output(int channel) const { return channel * weight_strides[0]; }
  __device__ int64_t of_input(int channel) const { return channel % layer.inputs.group_channels() * weight_strides[1]; }
  __device__ int64_t of_source(int channel) const { return backward ? of_output(channel) : of_input(channel); }
  __device__ int64_t of_result(int channel) const { return backward ? of_input(channel) : of_output(channel); }
  __device__ int64_t of_tap(int row, int column) const { return row * weight_strides[2] + column * weight_strides[3]; }
  __device__ float factor(int channel) const { return factors == nullptr ? 1.f : to_float(factors[channel]); }

  // The result of channel `channel` of image `image`, at place `place`, from its sum.
  __device__ __forceinline__ float finish(float sum, int channel, int image, int place) const {
    float v = sum;
    if (scale != nullptr) v *= to_float(scale[channel]);
    if (shift != nullptr) v += to_float(shift[channel]);
    if (gate != nullptr) v *= to_float(gate[int64_t{image} * results().length + place]);
    // Comparisons that a NaN passes through.
    if (!backward && layer.activation != Activation::kNone) v = v < 0.f ? 0.f : v;
    if (!backward && layer.activation == Activation::kRelu6) v = v > 6.f ? 6.f : v;
    return v;
  }
};

// NaN where one is.
__device__ __forceinline__ float larger(float x, float y) { return y > x || y != y ? y : x; }

namespace tiled {

// Tensor cores would wait for elements that are gathered one by one: the source is first arranged (arrange.h).
template <typename T>
constexpr bool kArranged = sizeof(T) == 2;

// The block's tile: rows are positions of the images of one sub-network, windows one after the other, and columns its
// channels of one group.
struct Tile {
  int first_image;  // in the order of images
  Cut rows;         // of the positions of one phase
  Line down, across;
  int per_image;  // positions of the phase in one image
  const Chosen* columns;
  int column_count;
  const Chosen* channels;  // along the depth
  int channel_count;
  int depth_channels;  // with those that are none, up to a unit of an arranged map
  int slot;            // of the first one in an arranged map

  template <typename T, typename P>
  __device__ Tile(const Convolution<T, P>& c, unsigned tile) {
    const Layer& l = c.layer;
    const int phases = c.positions.phases();
    const auto subnet_start = [&](int s) { return l.images.starts[s]; };
    const auto start = [&](int segment) {
      const int s = segment / phases, phase = segment - s * phases;
      const int64_t first = subnet_start(s), of_image = int64_t{c.result_positions()} * c.window();
      if (phase == 0) return first * of_image;
      return first * of_image + (subnet_start(s + 1) - first) * c.positions.before(phase);
    };
    rows = cut_at(tile / c.column_tiles, kRows, l.segments() * phases, start);
    const int subnet = rows.segment / phases, phase = rows.segment - subnet * phases;
    first_image = subnet_start(subnet);
    down = c.line(l.rows, phase / c.positions.across);
    across = c.line(l.columns, phase % c.positions.across);
    per_image = down.count * across.count;
    const Lists& results = c.results();
    const auto column_start = [&](int group) -> int64_t {  // places without a channel follow the last group's
      return group < results.groups ? results.start(subnet, group) : results.length;
    };
    const Cut cut = cut_at(tile % c.column_tiles, kColumns, results.groups, column_start);
    column_count = static_cast<int>(cut.count);
    columns = results.of(subnet) + column_start(cut.segment) + cut.first;
    const int begin = c.sources().start(subnet, cut.segment);
    channels = c.sources().of(subnet) + begin;
    channel_count = c.sources().start(subnet, cut.segment + 1) - begin;
    depth_channels = kArranged<T> ? (channel_count + kSlots - 1) / kSlots * kSlots : channel_count;
    slot = c.sources().slot(subnet, cut.segment);
  }
};

struct Row {
  int image;     // -1: none
  int position;  // of the result
};

template <typename T>
struct Shared {
  masked_conv2d::Shared<T> product;
  Tile tile;
  Row rows[kRows];
};

template <typename T, typename P>
__device__ void fill_row(const Convolution<T, P>& c, const Tile& tile, int row, Shared<T>& shared) {
  if (row >= tile.rows.count) {
    shared.rows[row] = {-1, 0};
    shared.product.places[row] = {0, kNowhere, kNowhere};
    return;
  }
  const int64_t item = (tile.rows.first + row) / c.window();
  const int of_window = row % c.window();
  const int nth = static_cast<int>(item / tile.per_image);
  const int position = static_cast<int>(item - int64_t{nth} * tile.per_image);
  const int image = c.layer.images.order[tile.first_image + nth];
  const int y = position / tile.across.count, x = position - y * tile.across.count;
  const int read_y = (y * c.pool + of_window / c.pool) * tile.down.read_step + tile.down.read_start;
  const int read_x = (x * c.pool + of_window % c.pool) * tile.across.read_step + tile.across.read_start;
  shared.rows[row] = {image, (y * tile.down.write_step + tile.down.write_start) * c.positions.width +
                                 x * tile.across.write_step + tile.across.write_start};
  shared.product.places[row] = {image * c.grid.image + read_y * c.grid.row + read_x * c.grid.column, read_y, read_x};
}

template <typename T, typename P>
__device__ Depth depth_at(const Convolution<T, P>& c, const Tile& tile, int k) {
  const int taps = tile.down.taps * tile.across.taps;
  const int nth = c.channels_inside ? k % tile.depth_channels : k / taps;
  const int tap = c.channels_inside ? k / tile.depth_channels : k - nth * taps;
  if (nth >= tile.channel_count) return no_depth();
  const Chosen chosen = tile.channels[nth];
  const int place = kArranged<T> ? tile.slot + nth : chosen.place;
  const int down = tap / tile.across.taps, across = tap - down * tile.across.taps;
  const int y = down * tile.down.move, x = across * tile.across.move;
  const int64_t weight =
      c.of_tap(tile.down.first_tap + down * tile.down.tap_step, tile.across.first_tap + across * tile.across.tap_step);
  return {{place * c.grid.channel + y * c.grid.row + x * c.grid.column, y, x},
          c.of_source(chosen.channel) + weight,
          c.factor(chosen.channel),
          min(tile.channel_count - nth, kSlots)};
}

// The results of the tile whose sums are in shared memory.
template <typename T, typename P>
__device__ void store_results(const Convolution<T, P>& c, const Shared<T>& shared) {
  const int results = kRows / c.window(), row = threadIdx.x % results * c.window();
  const Row to = shared.rows[row];
  if (to.image < 0) return;
  for (int column = threadIdx.x / results; column < shared.tile.column_count; column += kThreads / results) {
    const Chosen chosen = shared.tile.columns[column];
    T* at = c.result + (int64_t{to.image} * c.results().length + chosen.place) * c.result_positions() + to.position;
    const auto value = [&](int i) {
      return c.finish(shared.product.sums[column][row + i], chosen.channel, to.image, chosen.place);
    };
    float largest = chosen.channel < 0 ? 0.f : value(0);
    for (int i = 1; i < c.window() && chosen.channel >= 0; ++i) largest = larger(largest, value(i));
    *at = from_float<T>(largest);
  }
}

// Sets up tile `tile` of the grid; returns whether it has results.
template <typename T, typename P>
__device__ bool enter(const Convolution<T, P>& c, unsigned tile, Shared<T>& shared) {
  if (threadIdx.x == 0) shared.tile = Tile(c, tile);
  __syncthreads();
  if (shared.tile.rows.count <= 0 || shared.tile.column_count <= 0) return false;
  if (threadIdx.x < kRows) fill_row(c, shared.tile, threadIdx.x, shared);
  return true;
}

// The partial sums of a tile.
template <typename T, typename P>
__device__ float* partial_of(const Convolution<T, P>& c, unsigned split, unsigned tile) {
  return c.partial + (int64_t{split} * c.row_tiles * c.column_tiles + tile) * (kRows * kColumns);
}

template <typename T, typename P>
__device__ auto source_of(const Convolution<T, P>& c, const Shared<T>& shared) {
  const Place* places = shared.product.places;
  if constexpr (kArranged<T>) {
    return Arranged<T>{c.source, c.grid.height, c.grid.width, places};
  } else {
    return Gathered<T>{c.source, c.grid.height, c.grid.width, places, c.channels_inside};
  }
}

// Block: a tile, or one split of it.
template <typename T, typename P>
__device__ void convolve(const Convolution<T, P>& c) {
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(dynamic_shared());
  const unsigned tiles = c.row_tiles * c.column_tiles, split = blockIdx.x / tiles, nth = blockIdx.x % tiles;
  if (!enter(c, nth, shared)) return;
  const Tile& tile = shared.tile;
  if (threadIdx.x < kColumns) {
    const int channel = static_cast<int>(threadIdx.x) < tile.column_count ? tile.columns[threadIdx.x].channel : -1;
    shared.product.offsets[threadIdx.x] = channel < 0 ? -1 : c.of_result(channel);
  }
  const Indexed<T, P> right{c.weight, shared.product.offsets, true, c.factors != nullptr};
  const int depth = tile.depth_channels * tile.down.taps * tile.across.taps;
  const int64_t chunks = chunks_of<T>(depth);
  const Chunks own{chunks * split / c.splits, chunks * (split + 1) / c.splits};
  multiply_tile(shared.product, depth, own, source_of(c, shared), right,
                [&](int64_t k) { return depth_at(c, tile, static_cast<int>(k)); });
  if (c.partial == nullptr) return store_results(c, shared);
  float* partial = partial_of(c, split, nth);
  for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) partial[i] = shared.product.sums[i / kRows][i % kRows];
}

// Block: a tile, from the sums of its splits.
template <typename T, typename P>
__device__ void join(const Convolution<T, P>& c) {
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(dynamic_shared());
  if (!enter(c, blockIdx.x, shared)) return;
  for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
    float sum = 0.f;
    for (unsigned split = 0; split < c.splits; ++split) sum += partial_of(c, split, blockIdx.x)[i];
    shared.product.sums[i / kRows][i % kRows] = sum;
  }
  __syncthreads();
  store_results(c, shared);
}

}  // namespace tiled

namespace single {

// Where a position reads for a kernel element, or -1.
__device__ __forceinline__ int source_of(const Extent& e, bool backward, int position, int tap) {
  if (!backward) {
    const int at = position * e.stride - e.padding + tap * e.dilation;
    return at < e.input ? at : -1;
  }
  const int reached = position + e.padding - tap * e.dilation;
  if (reached < 0 || reached % e.stride != 0) return -1;
  return reached / e.stride < e.output ? reached / e.stride : -1;
}

// The sum of one result.
template <typename T, typename P>
__device__ float sum_of(const Convolution<T, P>& c, int image, int subnet, int channel, int y, int x) {
  const Lists& sources = c.sources();
  const int group = channel / c.results().group_channels();
  const Chosen* chosen = sources.of(subnet);
  const int end = sources.start(subnet, group + 1);
  float sum = 0.f;
  for (int k = sources.start(subnet, group); k < end; ++k) {
    const T* from = c.source + image * c.grid.image + chosen[k].place * c.grid.channel;
    const P* weight = c.weight + c.of_source(chosen[k].channel) + c.of_result(channel);
    float of_channel = 0.f;
    for (int down = 0; down < c.layer.rows.kernel; ++down) {
      const int from_y = source_of(c.layer.rows, c.backward, y, down);
      if (from_y < 0) continue;
      for (int across = 0; across < c.layer.columns.kernel; ++across) {
        const int from_x = source_of(c.layer.columns, c.backward, x, across);
        if (from_x < 0) continue;
        of_channel +=
            to_float(from[from_y * c.grid.row + from_x * c.grid.column]) * to_float(weight[c.of_tap(down, across)]);
      }
    }
    sum += of_channel * c.factor(chosen[k].channel);
  }
  return sum;
}

// Thread: one result. `row_tiles` are a map's blocks.
template <typename T, typename P>
__device__ void convolve(const Convolution<T, P>& c) {
  const Lists& results = c.results();
  const int image = static_cast<int>(blockIdx.x / c.row_tiles);
  const unsigned positions = static_cast<unsigned>(c.result_positions());
  const unsigned item = blockIdx.x % c.row_tiles * kThreads + threadIdx.x;
  if (item >= results.length * positions) return;
  const int place = static_cast<int>(item / positions), position = static_cast<int>(item % positions);
  const int subnet = c.layer.images.subnet(image);
  T* at = c.result + int64_t{image} * (results.length * positions) + item;
  const int channel = results.channel(subnet, c.layer.images.subnets, place);
  if (channel < 0) {
    *at = from_float<T>(0.f);
    return;
  }
  const int y = position / c.positions.width * c.pool, x = position % c.positions.width * c.pool;
  const auto value = [&](int i) {
    return c.finish(sum_of(c, image, subnet, channel, y + i / c.pool, x + i % c.pool), channel, image, place);
  };
  float largest = value(0);
  for (int i = 1; i < c.window(); ++i) largest = larger(largest, value(i));
  *at = from_float<T>(largest);
}

}  // namespace single

}  // namespace pyext::masked_conv2d
