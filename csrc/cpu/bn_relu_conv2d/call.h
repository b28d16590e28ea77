// The constants of one call, for both passes.
#pragma once

#include <algorithm>

#include "cpu/bn_relu_conv2d.h"
#include "cpu/hybrid_block/squeeze.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

using ConvolutionSizes = bn_relu_conv2d::Sizes;

// Sizes in the words of hybrid_block, whose squeeze cell has both convolutions.
inline BlockSizes block_sizes(const ConvolutionSizes& s) {
  return {s.batch, s.in_channels, s.height, s.width, 1, s.in_channels, s.out_channels, s.groups, 1, 1, s.stride, false};
}

template <typename T>
struct Convolution {
  const BNReLUConv2d& args;
  const Host& host;
  ConvolutionSizes s;
  Cell<T> cell{};  // of its two normalisations and convolutions the ones that there are
  T* inverse;      // reciprocal standard deviations

  Convolution(const BNReLUConv2d& args, const Host& host) : args(args), host(host), s(args.sizes) {
    const T *mean = static_cast<const T*>(args.mean), *var = static_cast<const T*>(args.var);
    const T* weight = parameter(args.norm_weight, s.in_channels);
    T* scale = shared<T>(host, s.in_channels);
    inverse = shared<T>(host, s.in_channels);
    for (int64_t c = 0; c < s.in_channels; ++c) {
      inverse[c] = 1 / std::sqrt(var[c] + static_cast<T>(args.eps));
      scale[c] = weight[c] * inverse[c];
    }
    cell.norm1 = cell.norm2 = {mean, parameter(args.norm_bias, s.in_channels), scale};
    cell.conv1 = cell.conv2 = parameter(args.conv_weight, s.weight_numel());
    cell.inputs = s.in_channels;
  }

  const Norm<T>& norm() const { return cell.norm1; }
  const T* weight() const { return cell.conv1; }
  Extent in_extent() const { return {s.in_channels, s.height, s.width}; }
  Extent out_extent() const { return {s.out_channels, s.out_height(), s.out_width()}; }

 private:
  const T* parameter(const void* data, int64_t numel) const {
    return as_accumulate<T>(host, data, args.parameter_dtype, numel);
  }
};

// Runs work(images) once per thread; every image is in one range.
template <typename Work>
inline void parallel_ranges(const Host& host, int64_t batch, Work work) {
  const int64_t tasks = task_count(host, batch);
  parallel(host, tasks, [&](int64_t task) { work(part_of(batch, tasks, task), task); });
}

constexpr int64_t round_up_to_tiles(int64_t channels) {
  return (channels + kTileOutputs - 1) / kTileOutputs * kTileOutputs;
}

// Calls work(constant vectors, first position) for strips of at most kStripVectors vectors.
template <typename T, typename Work>
inline void for_each_strip(int64_t positions, Work work) {
  constexpr int64_t kLength = kStripVectors * kLanes<T>;
  for (int64_t first = 0; first < positions; first += kLength) {
    const int64_t count = std::min(positions - first, kLength);
    with_constant<kStripVectors>((count + kLanes<T> - 1) / kLanes<T>, [&](auto vectors) { work(vectors, first); });
  }
}

// A strip that is read, or else written too, later on.
template <int Vectors, bool kWritten, typename T>
inline void prefetch(const T* strip) {
#pragma GCC unroll 8
  for (int byte = 0; byte < Vectors * kVectorBytes; byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(strip) + byte, kWritten);
  }
}

// A tile out of its registers: instead of, or added to, what is there. What is done with it later may have conditions,
// which would keep the compiler from holding the accumulators in registers.
template <int Vectors, int Rows, typename T>
inline void store_tile(const Vec<T> (&tile)[Rows][Vectors], T* to, int64_t pitch, bool adds = false) {
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      T* at = to + r * pitch + v * kLanes<T>;
      store<T>(at, adds ? load<T>(at) + tile[r][v] : tile[r][v]);
    }
  }
}

// Taps of a 3x3 convolution, and where they lie from a position in padded planes.
struct TapOffsets {
  int count = 0;
  int index[kTaps];
  int64_t offset[kTaps];

  void add(int tap, int64_t from_position) {
    index[count] = tap;
    offset[count++] = from_position;
  }
};

// A tile of a 3x3 convolution: sums over `depth` channels' planes, at the vectors of positions `at`, with the weights
// [kTaps][weight_pitch / Rows channels][Rows] of the taps; to[r * to_pitch + v * kLanes], or added to it.
template <int Vectors, int Rows, typename T>
PYEXT_OWN_REGISTERS void convolve_taps(const T* planes, int64_t channel, int64_t depth, const int64_t (&at)[Vectors],
                                       const TapOffsets& taps, const T* weight, int64_t weight_pitch, T* to,
                                       int64_t to_pitch, bool adds) {
  Vec<T> sum[Rows][Vectors] = {};
  for (int t = 0; t < taps.count; ++t) {
    const T *from = planes + taps.offset[t], *factors = weight + taps.index[t] * weight_pitch;
    for (int64_t i = 0; i < depth; ++i, from += channel, factors += Rows) {
      Vec<T> positions[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) positions[v] = load_once<T>(from + at[v]);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Vec<T> factor = in_register<T>(splat<T>(factors[r]));
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[r][v] += factor * positions[v];
      }
    }
  }
  store_tile(sum, to, to_pitch, adds);
}

constexpr int64_t kPlaneBytes = 192 * 1024;  // what the planes of the channels in work may take, with room for others

// How many channels' planes stay in cache, of `channels`: in whole tiles.
template <typename T>
inline int64_t channels_in_cache(const Planes& planes, int64_t channels) {
  const int64_t most = kPlaneBytes / (planes.channel * static_cast<int64_t>(sizeof(T)));
  return std::min(round_up_to_tiles(channels), std::max<int64_t>(1, most / kTileOutputs) * kTileOutputs);
}

// The map from channel `first` on.
template <typename S>
inline Map channels_from(Map map, int64_t first) {
  map.data = static_cast<S*>(map.data) + first * map.stride[1];
  return map;
}

// relu(BN(x)) of the channels of one image, of which x and the padded planes begin with the first.
template <typename T>
inline void activate_planes(const Convolution<T>& call, const Planes& planes, const Image<const T>& x, Range channels,
                            T* row, T* to) {
  const bool whole = planes.stride == 1 && planes.width % kLanes<T> == 0;  // vectors in each row
  const int64_t length = whole ? planes.width : call.s.positions();
  for (int64_t c = channels.begin; c < channels.end; ++c, to += planes.channel) {
    const Vec<T> mean = splat<T>(call.norm().mean[c]), scale = splat<T>(call.norm().scale[c]),
                 bias = splat<T>(call.norm().bias[c]);
    T* made = whole ? to + planes.place(1, 1) : row;
    const T *from = x.row(c - channels.begin), *end = from + call.s.positions();
    for (; from < end; from += length, made += planes.pitch) {
      for (int64_t p = 0; p < length; p += kLanes<T>) {
        store<T>(made + p, relu<T>((load<T>(from + p) - mean) * scale + bias));
      }
    }
    if (!whole) write_planes(planes, row, 0, call.s.positions(), to);
  }
}

// Planes of one channel end in zeros, so that a vector which begins in the last row meets no other channel.
template <typename T>
inline Planes separate_planes(const ConvolutionSizes& s) {
  Planes planes(block_sizes(s));
  planes.channel += kLanes<T>;
  return planes;
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
