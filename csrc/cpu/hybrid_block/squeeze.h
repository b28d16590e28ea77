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
  const T* conv1;  // squeeze x lanes(inputs)
  const T* conv2;  // growth x lanes(squeeze / groups) x kTaps
  int64_t inputs;
};

// relu(BN(x)) of a strip of positions, lane by lane of the channels: to[(l * Vectors + v) * kLanes].
template <int Vectors, typename T, typename L = Numbers<T>>
inline void activate(const Cell<T>& cell, const Image<const T>& x, int64_t first, T* to) {
  for (int64_t l = 0; l < L::lanes(cell.inputs); ++l) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      Vec<T> channels[L::kDepth] = {};
#pragma GCC unroll 2
      for (int d = 0; d < L::kDepth; ++d) {
        const int64_t c = l * L::kDepth + d;
        if (L::kDepth > 1 && c == cell.inputs) break;
        channels[d] = cell.norm1.relu_of(load<T>(x.row(c) + first + v * kLanes<T>), c);
      }
      store<T>(to + (l * Vectors + v) * kLanes<T>, L::joined(channels));
    }
  }
}

// Outputs channels of the 1x1 convolution from `channel` on, at the positions of a strip, through BN and ReLU into
// planes, which begin at `to`.
template <int Vectors, int Outputs, typename T, typename L>
inline void expand(const Cell<T>& cell, const Planes& planes, const T* strip, int64_t first, int64_t count,
                   int64_t channel, T* to) {
  constexpr int kRows = L::lanes(Outputs);
  const int64_t lanes = L::lanes(cell.inputs);
  Vec<T> sum[Outputs][Vectors] = {};
  multiply<Vectors, Outputs, T, L>(strip, cell.conv1 + channel * lanes, lanes, sum);
  alignas(64) T map[(kRows * Vectors + 2) * kLanes<T>];  // rows are read up to two whole vectors
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      Vec<T> channels[L::kDepth] = {};
#pragma GCC unroll 2
      for (int d = 0; d < L::kDepth; ++d) {
        const int o = r * L::kDepth + d;
        if (o < Outputs) channels[d] = cell.norm2.relu_of(sum[o][v], channel + o);
      }
      store<T>(map + (r * Vectors + v) * kLanes<T>, L::joined(channels));
    }
  }
  for (int r = 0; r < kRows; ++r) {
    write_planes(planes, map + r * Vectors * kLanes<T>, first, count, to + r * planes.channel);
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

// Lanes of the planes of one group of the 3x3 convolution.
template <typename L>
inline int64_t group_lanes(const BlockSizes& s) {
  return L::lanes(s.squeeze / s.groups);
}

// Calls work(constant outputs, first channel, its lane of the planes) in tiles of the squeezed channels of groups. A
// lane holds channels of one group, and so does a tile where lanes hold several.
template <typename L, typename Work>
inline void for_each_squeezed(const BlockSizes& s, Range groups, Work work) {
  const int64_t per_group = s.squeeze / s.groups;
  if constexpr (L::kDepth == 1) {
    for_each_tile({groups.begin * per_group, groups.end * per_group},
                  [&](auto outputs, int64_t channel) { work(outputs, channel, channel); });
  } else {
    static_assert(kTileOutputs % L::kDepth == 0);
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const int64_t begin = g * per_group, lane = g * group_lanes<L>(s);
      for_each_tile({begin, begin + per_group}, [&](auto outputs, int64_t channel) {
        work(outputs, channel, lane + (channel - begin) / L::kDepth);
      });
    }
  }
}

// The channels of groups of relu(BN(1x1(relu(BN(x))))) at the positions of strips, into planes. `strip`: lanes of the
// inputs x kStripVectors vectors.
template <typename T, typename L>
inline void squeeze_strips(const BlockSizes& s, const Cell<T>& cell, const Planes& planes, const Image<const T>& x,
                           Range strips, Range groups, T* strip, T* squeezed) {
  constexpr int64_t kLength = kStripVectors * kLanes<T>;
  for (int64_t first = strips.begin * kLength; first < strips.end * kLength; first += kLength) {
    const int64_t count = s.positions() - first < kLength ? s.positions() - first : kLength;
    with_constant<kStripVectors>((count + kLanes<T> - 1) / kLanes<T>, [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      activate<kVectors, T, L>(cell, x, first, strip);
      for_each_squeezed<L>(s, groups, [&](auto outputs, int64_t channel, int64_t lane) {
        expand<kVectors, decltype(outputs)::value, T, L>(cell, planes, strip, first, count, channel,
                                                         squeezed + lane * planes.channel);
      });
    });
  }
}

// Outputs channels of the 3x3 convolution from `channel` of `group` on, in rows of the result, into `u`.
template <int Outputs, typename T, typename L>
inline void convolve_channels(const BlockSizes& s, const Cell<T>& cell, const Planes& planes, const T* squeezed,
                              int64_t channel, int64_t group, Range rows, const Image<T>& u) {
  constexpr int kVectors = tile_vectors(Outputs);
  constexpr int64_t kLength = kVectors * kLanes<T>;
  const int64_t inputs = group_lanes<L>(s), end = (rows.end - 1) * planes.pitch + s.out_width();
  const T* x = squeezed + group * inputs * planes.channel;
  const T* weight = cell.conv2 + channel * inputs * kTaps;
  alignas(64) T tile[(Outputs * kVectors + 1) * kLanes<T>];
  for (int64_t first = rows.begin * planes.pitch; first < end; first += kLength) {
    const int64_t count = end - first < kLength ? end - first : kLength;
    with_constant<kVectors>((count + kLanes<T> - 1) / kLanes<T>, [&](auto vectors) {
      constexpr int kTileLength = decltype(vectors)::value * kLanes<T>;
      convolve<decltype(vectors)::value, Outputs, T, L>(planes, x + first, weight, inputs, tile);
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
template <typename T, typename L = Numbers<T>>
inline void convolve_groups(const BlockSizes& s, const Cell<T>& cell, const Planes& planes, const T* squeezed,
                            Range groups, Range rows, const Image<T>& u) {
  const int64_t per_group = s.growth / s.groups, tiles = (per_group + kTileOutputs - 1) / kTileOutputs;
  for (int64_t group = groups.begin; group < groups.end && rows.begin < rows.end; ++group) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      // Nearly equal tiles: of nine channels five and four, since three have too few accumulators for the latency.
      const Range channels = part_of(per_group, tiles, tile);
      with_constant<kTileOutputs>(channels.end - channels.begin, [&](auto outputs) {
        convolve_channels<decltype(outputs)::value, T, L>(s, cell, planes, squeezed, group * per_group + channels.begin,
                                                          group, rows, u);
      });
    }
  }
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
