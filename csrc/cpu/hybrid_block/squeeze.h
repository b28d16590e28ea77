// The squeeze cell of one module on one image: BN, ReLU, 1x1 convolution, BN, ReLU, 3x3 convolution.
#pragma once

#include "cpu/hybrid_block/convolution.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// BN in evaluation as (x - mean) * scale + bias: as part of a shift, a mean that is large against the deviation would
// cancel.
template <typename T>
struct Norm {
  const T* mean;
  const T* bias;
  T* scale;
  Vec<T> relu_of(Vec<T> x, int64_t c) const { return relu<T>((x - mean[c]) * scale[c] + bias[c]); }
};

template <typename T>
struct Cell {
  Norm<T> norm1, norm2;
  const T* conv1;  // squeeze x inputs
  const T* conv2;  // growth x (squeeze / groups) x kTaps
  int64_t inputs;
};

// relu(BN(x)) of a strip of positions, channel by channel: to[(c * Vectors + v) * kLanes].
template <int Vectors, typename T>
inline void activate(const Cell<T>& cell, const Image<const T>& x, int64_t first, T* to) {
  for (int64_t c = 0; c < cell.inputs; ++c) {
    const T* from = x.row(c) + first;
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      store<T>(to + (c * Vectors + v) * kLanes<T>, cell.norm1.relu_of(load<T>(from + v * kLanes<T>), c));
    }
  }
}

// Outputs channels of the 1x1 convolution from `channel` on, at the positions of a strip, through BN and ReLU into
// planes.
template <int Vectors, int Outputs, typename T>
inline void expand(const Cell<T>& cell, const Planes& planes, const T* strip, int64_t first, int64_t count,
                   int64_t channel, T* squeezed) {
  Vec<T> sum[Outputs][Vectors] = {};
  multiply<Vectors, Outputs>(strip, cell.conv1 + channel * cell.inputs, cell.inputs, sum);
  alignas(64) T map[(Outputs * Vectors + 2) * kLanes<T>];  // rows are read up to two whole vectors
#pragma GCC unroll 8
  for (int o = 0; o < Outputs; ++o) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      store<T>(map + (o * Vectors + v) * kLanes<T>, cell.norm2.relu_of(sum[o][v], channel + o));
    }
  }
  for (int o = 0; o < Outputs; ++o) {
    write_planes(planes, map + o * Vectors * kLanes<T>, first, count, squeezed + (channel + o) * planes.channel);
  }
}

struct Range {
  int64_t begin, end;
};

// Part `part` of `parts` of [0, n).
inline Range part_of(int64_t n, int64_t parts, int64_t part) {
  return {split(n, parts, part), split(n, parts, part + 1)};
}

// Calls work(constant outputs, first channel) in tiles of at most kTileOutputs.
template <typename Work>
inline void for_each_tile(Range channels, Work work) {
  int64_t channel = channels.begin;
  for (; channel + kTileOutputs <= channels.end; channel += kTileOutputs) {
    work(std::integral_constant<int, kTileOutputs>(), channel);
  }
  if (channel < channels.end) {
    with_constant<kTileOutputs - 1>(channels.end - channel, [&](auto outputs) { work(outputs, channel); });
  }
}

template <typename T>
inline int64_t strip_count(const BlockSizes& s) {
  constexpr int64_t kLength = kStripVectors * kLanes<T>;
  return (s.positions() + kLength - 1) / kLength;
}

// Channels of relu(BN(1x1(relu(BN(x))))) at the positions of strips, into planes. `strip`: inputs x kStripVectors
// vectors.
template <typename T>
inline void squeeze_strips(const BlockSizes& s, const Cell<T>& cell, const Planes& planes, const Image<const T>& x,
                           Range strips, Range channels, T* strip, T* squeezed) {
  constexpr int64_t kLength = kStripVectors * kLanes<T>;
  for (int64_t first = strips.begin * kLength; first < strips.end * kLength; first += kLength) {
    const int64_t count = s.positions() - first < kLength ? s.positions() - first : kLength;
    with_constant<kStripVectors>((count + kLanes<T> - 1) / kLanes<T>, [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      activate<kVectors>(cell, x, first, strip);
      for_each_tile(channels, [&](auto outputs, int64_t channel) {
        expand<kVectors, decltype(outputs)::value>(cell, planes, strip, first, count, channel, squeezed);
      });
    });
  }
}

// Outputs channels of the 3x3 convolution from `channel` of `group` on, in rows of the result, into `u`.
template <int Outputs, typename T>
inline void convolve_channels(const BlockSizes& s, const Cell<T>& cell, const Planes& planes, const T* squeezed,
                              int64_t channel, int64_t group, Range rows, const Image<T>& u) {
  constexpr int kVectors = tile_vectors(Outputs);
  constexpr int64_t kLength = kVectors * kLanes<T>;
  const int64_t inputs = s.squeeze / s.groups, end = (rows.end - 1) * planes.pitch + s.out_width();
  const T* x = squeezed + group * inputs * planes.channel;
  const T* weight = cell.conv2 + channel * inputs * kTaps;
  alignas(64) T tile[(Outputs * kVectors + 1) * kLanes<T>];
  for (int64_t first = rows.begin * planes.pitch; first < end; first += kLength) {
    const int64_t count = end - first < kLength ? end - first : kLength;
    with_constant<kVectors>((count + kLanes<T> - 1) / kLanes<T>, [&](auto vectors) {
      constexpr int kTileLength = decltype(vectors)::value * kLanes<T>;
      convolve<decltype(vectors)::value, Outputs>(planes, x + first, weight, inputs, tile);
      for_each_row(first, count, planes.pitch, [&](int64_t at, int64_t row, int64_t column, int64_t run) {
        const int64_t inside = s.out_width() - column < run ? s.out_width() - column : run;
        for (int o = 0; o < Outputs && inside > 0; ++o) {
          copy_row(tile + o * kTileLength + at, u.row(channel + o) + row * s.out_width() + column, inside);
        }
      });
    });
  }
}

// Groups of the 3x3 convolution, in rows of the result.
template <typename T>
inline void convolve_groups(const BlockSizes& s, const Cell<T>& cell, const Planes& planes, const T* squeezed,
                            Range groups, Range rows, const Image<T>& u) {
  const int64_t per_group = s.growth / s.groups, tiles = (per_group + kTileOutputs - 1) / kTileOutputs;
  for (int64_t group = groups.begin; group < groups.end && rows.begin < rows.end; ++group) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      // Nearly equal tiles: of nine channels five and four, since three have too few accumulators for the latency.
      const Range channels = part_of(per_group, tiles, tile);
      with_constant<kTileOutputs>(channels.end - channels.begin, [&](auto outputs) {
        convolve_channels<decltype(outputs)::value>(s, cell, planes, squeezed, group * per_group + channels.begin,
                                                    group, rows, u);
      });
    }
  }
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
