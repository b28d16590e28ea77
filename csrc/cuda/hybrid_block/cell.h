// What both forms of the squeeze cell share: arguments, tiles with their borders, channels of a block, normalisations.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device.h"

namespace pyext::hybrid_block {

using namespace pyext::cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBordered = 192;  // positions of a tile with its border, at most one for each thread
constexpr int kCells = 128;     // positions of u in a tile
constexpr int kInputs = kWarp;  // channels of x that a block takes at once; a lane prepares each one's norm
constexpr int kTaps = 9;

// The norm and convolution of one stage.
template <typename P>
struct Stage {
  const P* weight;
  const P* bias;
  const P* mean;
  const P* var;
  const P* conv;
};

template <typename T, typename P>
struct Arguments {
  View<const T> x;
  Stage<P> first;
  Stage<P> second;
  T* u;
  float eps;
  int channels, height, width;
  int out_channels, out_height, out_width;
  int squeeze, groups, stride;
  int tile_height, tile_width, tiles_down, tiles_across;
  int block_groups;   // groups of one block of threads
  int parts;          // blocks that share one group's channels of u; 1 where a block has several groups
  int block_outputs;  // channels of u of one block
  int blocks;         // that share a tile
  int slice;          // channels between the convolutions that are in shared memory at once

  __host__ __device__ int bordered_height() const { return (tile_height - 1) * stride + 3; }
  __host__ __device__ int bordered_width() const { return (tile_width - 1) * stride + 3; }
  __host__ __device__ int bordered_cells() const { return bordered_height() * bordered_width(); }
  __host__ __device__ int group_squeeze() const { return squeeze / groups; }
  __host__ __device__ int group_outputs() const { return out_channels / groups; }
};

// What a block of threads works on.
struct Place {
  int64_t image;
  int top, left;       // of the tile in u
  int first_output;    // of u
  int outputs;         // channels of u
  int first_squeezed;  // of the channels between the convolutions
  int squeezed;        // of those, all that u's channels here depend on

  template <typename T, typename P>
  __device__ explicit Place(const Arguments<T, P>& a) {
    const int tiles = a.tiles_down * a.tiles_across;
    const int block = blockIdx.x % a.blocks;
    const int64_t image_tile = blockIdx.x / a.blocks;
    const int tile = image_tile % tiles;
    image = image_tile / tiles;
    top = tile / a.tiles_across * a.tile_height;
    left = tile % a.tiles_across * a.tile_width;
    const int group = block / a.parts * a.block_groups;
    const int groups = min(a.block_groups, a.groups - group);
    const int skipped = block % a.parts * a.block_outputs;
    first_output = group * a.group_outputs() + skipped;
    outputs = min(a.block_outputs, groups * a.group_outputs() - skipped);
    first_squeezed = group * a.group_squeeze();
    squeezed = groups * a.group_squeeze();
  }
};

// The thread's position of the tile with its border.
template <typename T>
struct Source {
  const T* data;  // its first channel
  bool inside;    // the map; what lies outside is padding of the 3x3 convolution

  template <typename P>
  __device__ Source(const Arguments<T, P>& a, const Place& at) {
    const int cell = threadIdx.x;
    const int y = at.top * a.stride - 1 + cell / a.bordered_width();
    const int x = at.left * a.stride - 1 + cell % a.bordered_width();
    inside = cell < a.bordered_cells() && y >= 0 && y < a.height && x >= 0 && x < a.width;
    data = a.x.at(at.image) + (inside ? a.x.offset(0, y, x) : 0);
  }

  template <typename P>
  __device__ float load(const Arguments<T, P>& a, int c) const {
    return inside && c < a.channels ? to_float(data[c * a.x.channel]) : 0.f;
  }
};

// A position of u in the tile.
struct Cell {
  int y, x;  // in u
  bool inside;
  int border;  // where the 3x3 convolution's first tap is in the tile with its border

  template <typename T, typename P>
  __device__ Cell(const Arguments<T, P>& a, const Place& at, int cell) {
    const int row = cell / a.tile_width;
    const int column = cell - row * a.tile_width;
    y = at.top + row;
    x = at.left + column;
    inside = row < a.tile_height && y < a.out_height && x < a.out_width;
    border = row * a.stride * a.bordered_width() + column * a.stride;
  }

  template <typename T, typename P>
  __device__ int64_t offset(const Arguments<T, P>& a, const Place& at, int output) const {
    const int64_t map = at.image * a.out_channels + at.first_output + output;
    return (map * a.out_height + y) * a.out_width + x;
  }
};

// A normalisation of one channel by running statistics, and ReLU.
struct alignas(16) Norm {
  float mean, scale, bias;

  __device__ float activated(float x) const {
    const float y = (x - mean) * scale + bias;
    return y < 0.f ? 0.f : y;  // NaN stays
  }
};

template <typename P>
__device__ Norm norm_of(const Stage<P>& stage, int channel, float eps) {
  return {to_float(stage.mean[channel]), to_float(stage.weight[channel]) / sqrtf(to_float(stage.var[channel]) + eps),
          to_float(stage.bias[channel])};
}

// Norms of kInputs channels for one warp, one by each lane; a channel that is none becomes zero.
template <typename T, typename P>
__device__ void load_norms(const Arguments<T, P>& a, int start, Norm* norms) {
  const int lane = threadIdx.x % kWarp;
  norms[lane] = start + lane < a.channels ? norm_of(a.first, start + lane, a.eps) : Norm{0.f, 0.f, 0.f};
}

}  // namespace pyext::hybrid_block
