// The squeeze cell of one module on one image: BN, ReLU, 1x1 convolution, BN, ReLU, 3x3 convolution.
#pragma once

#include "cpu/hybrid_block/tiles.h"

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
  T* tiled;        // of each group, kPlaces x growth / groups x squeeze / groups; null where tiles are not faster
  int64_t inputs;
};

// relu(BN(x)) of a strip of `count` positions, lane by lane of the channels: to[(l * Vectors + v) * kLanes]. With
// Halves, of two vectors the first takes their even positions and the second the odd ones.
template <int Vectors, typename T, typename L = Numbers<T>, bool Halves = false>
inline void activate(const Cell<T>& cell, const Image<const T>& x, int64_t first, T* to,
                     int64_t count = Vectors * kLanes<T>) {
  constexpr auto kOrder = std::make_integer_sequence<int, kLanes<T>>();
  for (int64_t l = 0; l < L::lanes(cell.inputs); ++l) {
    Vec<T> strip[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      Vec<T> channels[L::kDepth] = {};
#pragma GCC unroll 2
      for (int d = 0; d < L::kDepth; ++d) {
        const int64_t c = l * L::kDepth + d;
        if ((L::kDepth > 1 && c == cell.inputs) || (Halves && v * kLanes<T> >= count)) break;
        channels[d] = cell.norm1.relu_of(load<T>(x.row(c) + first + v * kLanes<T>), c);
      }
      strip[v] = L::joined(channels);
    }
    T* row = to + l * Vectors * kLanes<T>;
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const Vec<T> a = strip[v - v % 2], b = strip[Vectors > 1 ? v - v % 2 + 1 : 0];
      const Vec<T> half = v % 2 == 0 ? even_lanes<T>(a, b, kOrder) : odd_lanes<T>(a, b, kOrder);
      store<T>(row + v * kLanes<T>, Halves ? half : strip[v]);
    }
  }
}

// Outputs channels of the 1x1 convolution from `channel` on, at the positions of a strip, through BN and ReLU into
// planes, which begin at `to`.
template <int Vectors, int Outputs, bool Halves, typename T, typename L>
PYEXT_OWN_REGISTERS void expand(const Cell<T>& cell, const Planes& planes, const T* strip, int64_t first, int64_t count,
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
  constexpr int64_t kMapPitch = Vectors * kLanes<T>, kPair = 2 * kLanes<T>;
  if (!Halves) return write_planes(planes, map, kMapPitch, kRows, first, count, to);
  for (int64_t at = 0; at < count; at += kPair) {
    const int64_t some = count - at < kPair ? count - at : kPair;
    write_halves(planes, map + at, map + at + kLanes<T>, kMapPitch, kRows, (first + at) / 2, some / 2, to);
  }
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

constexpr int64_t kCacheBytes = 192 * 1024;  // a part of the second-level cache

// Strips whose inputs stay in the second-level cache together, so that they meet weights that were read once.
template <typename T>
inline int64_t strips_together(int64_t lanes) {
  constexpr int64_t kStripBytes = kStripVectors * kLanes<T> * sizeof(T);
  return kCacheBytes / (lanes * kStripBytes) + 1;
}

// Elements of memory for them, for at most `lanes`.
template <typename T>
inline int64_t strips_size(int64_t lanes) {
  return kCacheBytes / sizeof(T) + lanes * kStripVectors * kLanes<T>;
}

template <bool Halves, typename T, typename L>
inline void squeeze_strips(const BlockSizes& s, const Cell<T>& cell, const Planes& planes, const Image<const T>& x,
                           Range strips, Range groups, T* memory, T* squeezed) {
  constexpr int64_t kLength = kStripVectors * kLanes<T>;
  constexpr int kStep = Halves ? 2 : 1;
  static_assert(kStripVectors % kStep == 0);
  const int64_t lanes = L::lanes(cell.inputs), together = strips_together<T>(lanes);
  const auto for_each = [&](Range some, auto work) {
    for (int64_t i = some.begin; i < some.end; ++i) {
      const int64_t first = i * kLength, count = s.positions() - first < kLength ? s.positions() - first : kLength;
      T* strip = memory + (i - some.begin) * lanes * kLength;
      if (Halves && count <= kLanes<T>) {  // halves would be half empty
        work(std::integral_constant<int, 1>(), std::false_type(), first, count, strip);
        continue;
      }
      with_constant<kStripVectors / kStep>((count + kStep * kLanes<T> - 1) / (kStep * kLanes<T>), [&](auto steps) {
        work(std::integral_constant<int, kStep* decltype(steps)::value>(), std::bool_constant<Halves>(), first, count,
             strip);
      });
    }
  };
  for (int64_t begin = strips.begin; begin < strips.end; begin += together) {
    const Range some{begin, begin + together < strips.end ? begin + together : strips.end};
    for_each(some, [&](auto vectors, auto halves, int64_t first, int64_t count, T* strip) {
      activate<decltype(vectors)::value, T, L, decltype(halves)::value>(cell, x, first, strip, count);
    });
    for_each_squeezed<L>(s, groups, [&](auto outputs, int64_t channel, int64_t lane) {
      for_each(some, [&](auto vectors, auto halves, int64_t first, int64_t count, T* strip) {
        expand<decltype(vectors)::value, decltype(outputs)::value, decltype(halves)::value, T, L>(
            cell, planes, strip, first, count, channel, squeezed + lane * planes.channel);
      });
    });
  }
}

// The channels of groups of relu(BN(1x1(relu(BN(x))))) at the positions of strips, into planes. `memory`: of
// strips_together strips, lanes of the inputs x kStripVectors vectors each.
template <typename T, typename L>
inline void squeeze_strips(const BlockSizes& s, const Cell<T>& cell, const Planes& planes, const Image<const T>& x,
                           Range strips, Range groups, T* memory, T* squeezed) {
  // Planes of even and odd columns take halves of a strip, where a position's is its column's.
  if (planes.stride == 2 && s.width % 2 == 0) {
    squeeze_strips<true, T, L>(s, cell, planes, x, strips, groups, memory, squeezed);
  } else {
    squeeze_strips<false, T, L>(s, cell, planes, x, strips, groups, memory, squeezed);
  }
}

// Outputs channels of the 3x3 convolution of the lanes `own` of the planes `x`, in rows of a result of `width` columns.
// `sums` keeps what they add to, null where they are all; with the last lanes these are results, piece by piece:
// put(results of the first channel from there on, elements from one channel to the next, row, column, count). What put
// is given can be read up to two whole vectors.
template <int Outputs, typename T, typename L, typename Put>
inline void convolve_planes(const Planes& planes, const T* x, const T* weight, int64_t inputs, Range own, Range rows,
                            int64_t width, T* sums, Put put) {
  constexpr int kVectors = tile_vectors(Outputs);
  constexpr int64_t kLength = kVectors * kLanes<T>;
  const int64_t end = (rows.end - 1) * planes.pitch + width;
  alignas(64) T only[(Outputs * kVectors + 2) * kLanes<T>];
  T* tile = sums == nullptr ? only : sums;
  for (int64_t first = rows.begin * planes.pitch; first < end; first += kLength) {
    const int64_t count = end - first < kLength ? end - first : kLength;
    with_constant<kVectors>((count + kLanes<T> - 1) / kLanes<T>, [&](auto vectors) {
      constexpr int kTileLength = decltype(vectors)::value * kLanes<T>;
      convolve<decltype(vectors)::value, Outputs, T, L>(planes, x + first, weight, inputs, own, tile);
      if (own.end == inputs)
        for_each_row(first, count, planes.pitch, [&](int64_t at, int64_t row, int64_t column, int64_t run) {
          const int64_t inside = width - column < run ? width - column : run;
          if (inside > 0) put(tile + at, kTileLength, row, column, inside);
        });
    });
    if (sums != nullptr) tile += Outputs * kLength;
  }
}

// How the 3x3 convolution goes through the rows and inputs of a group.
struct ConvolutionParts {
  int64_t rows;    // whose sums, of all outputs, stay in cache
  int64_t inputs;  // parts of the inputs: what those rows read of one stays in cache

  template <typename T>
  static ConvolutionParts of(const BlockSizes& s, const Planes& planes, int64_t inputs, int64_t rows) {
    const auto inputs_bytes = [&](int64_t rows) {
      return inputs * (rows + 2) * planes.stride * planes.stride * planes.pitch * static_cast<int64_t>(sizeof(T));
    };
    if (inputs_bytes(rows) <= kCacheBytes) return {rows, 1};
    const int64_t row_bytes = s.growth / s.groups * planes.pitch * static_cast<int64_t>(sizeof(T));
    const int64_t most = kCacheBytes / row_bytes + 1, some = rows < most ? rows : most;
    return {some, inputs_bytes(some) / kCacheBytes + 1};
  }
};

// Elements of memory for the sums of `outputs` channels of the 3x3 convolution.
template <typename T>
inline int64_t sums_size(const Planes& planes, const ConvolutionParts& parts, int64_t outputs) {
  // Of each tile the last vectors are whole, and read behind.
  return parts.inputs > 1 ? outputs * (parts.rows * planes.pitch + (kMostVectors + 2) * kLanes<T>) : 0;
}

// Groups of the 3x3 convolution, in rows of the result. `sums`: of sums_size for a group's outputs; null where it is
// not to be convolved in parts.
template <typename T, typename L = Numbers<T>>
inline void convolve_groups(const BlockSizes& s, const Cell<T>& cell, const Planes& planes, const T* squeezed,
                            Range groups, Range rows, const Image<T>& u, T* sums = nullptr) {
  const int64_t per_group = s.growth / s.groups, tiles = (per_group + kTileOutputs - 1) / kTileOutputs;
  const int64_t inputs = group_lanes<L>(s);
  ConvolutionParts parts{rows.end - rows.begin, 1};
  if (sums != nullptr) parts = ConvolutionParts::of<T>(s, planes, inputs, parts.rows);
  const auto convolve_part = [&](int64_t group, Range own, Range some) {
    T* memory = parts.inputs > 1 ? sums : nullptr;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      // Nearly equal tiles: of nine channels five and four, since three have too few accumulators for the latency.
      const Range channels = part_of(per_group, tiles, tile);
      const int64_t channel = group * per_group + channels.begin;
      with_constant<kTileOutputs>(channels.end - channels.begin, [&](auto outputs) {
        convolve_planes<decltype(outputs)::value, T, L>(
            planes, squeezed + group * inputs * planes.channel, cell.conv2 + channel * inputs * kTaps, inputs, own,
            some, s.out_width(), memory, [&](const T* from, int64_t pitch, int64_t row, int64_t column, int64_t count) {
              for (int64_t o = 0; o < decltype(outputs)::value; ++o) {
                copy_row(from + o * pitch, u.row(channel + o) + row * s.out_width() + column, count);
              }
            });
      });
      if (memory != nullptr) memory += sums_size<T>(planes, parts, channels.end - channels.begin);
    }
  };
  for (int64_t group = groups.begin; group < groups.end; ++group) {
    for (int64_t first = rows.begin; first < rows.end; first += parts.rows) {
      const Range some{first, first + parts.rows < rows.end ? first + parts.rows : rows.end};
      for (int64_t part = 0; part < parts.inputs; ++part) {
        convolve_part(group, part_of(inputs, parts.inputs, part), some);
      }
    }
  }
}

// Whether the 3x3 convolution is faster by tiles: by the products of whole vectors of either form. A transform of a
// vector takes about as long as 36 of them.
template <typename T>
inline bool prefers_tiles(const BlockSizes& s, const Tiles& tiles) {
  constexpr int64_t kTransform = 36;
  const int64_t inputs = s.squeeze / s.groups, outputs = s.growth / s.groups;
  const int64_t plain_lanes = (s.height - 1) * (s.width + 2) + s.width, lanes = tiles.lanes({0, tiles.rows}).end;
  // Rows of odd width are split one by one, which takes what is won.
  return s.stride == 1 && s.width % 2 == 0 &&
         round_up<T>(lanes) * (kPlaces * inputs * outputs + kTransform * (inputs + outputs)) <
             round_up<T>(plain_lanes) * kTaps * inputs * outputs;
}

// Groups of the 3x3 convolution by tiles, in rows of tiles.
template <typename T>
inline void convolve_groups_by_tiles(const BlockSizes& s, const Cell<T>& cell, const Tiles& tiles, const T* squeezed,
                                     Range groups, Range rows, const TileScratch<T>& scratch, const Image<T>& u) {
  const int64_t inputs = s.squeeze / s.groups, outputs = s.growth / s.groups, kernels = outputs * inputs;
  for (int64_t group = groups.begin; group < groups.end; ++group) {
    const TiledWeights<T> weights{cell.conv2 + group * kernels * kTaps, cell.tiled + group * kernels * kPlaces, inputs,
                                  outputs};
    const auto put = [&](int64_t first, int64_t count, Range channels, int64_t pitch) {
      for_each_row(first, count, tiles.planes.pitch, [&](int64_t at, int64_t y, int64_t x, int64_t run) {
        const int64_t inside = tiles.columns - x < run ? tiles.columns - x : run;
        const int64_t elements = s.width - kStep * x < kStep * inside ? s.width - kStep * x : kStep * inside;
        const int64_t below = s.height - kStep * y < kStep ? 1 : kStep;
        for (int64_t o = 0; o < channels.end - channels.begin && inside > 0; ++o) {
          T* to = u.row(group * outputs + channels.begin + o) + kStep * (y * s.width + x);
          for (int64_t i = 0; i < below; ++i) {
            const T* from = scratch.results + (o * kResults + i * kStep) * pitch + at;
            join_row(from, from + pitch, to + i * s.width, elements);
          }
        }
      });
    };
    convolve_tiles(tiles, squeezed + group * inputs * tiles.planes.channel, weights, rows, scratch, put);
  }
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
