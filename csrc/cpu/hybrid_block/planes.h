// Where a convolution's input lies: padded planes of each channel (or pair of channels, where lanes hold pairs), so
// that a tap is an offset and every vector of positions has one address. For a stride of two there are four planes, of
// the even and odd rows and columns.
#pragma once

#include "cpu/gated_excitation/call.h"
#include "math/hybrid_block.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

using BlockSizes = hybrid_block::Sizes;

struct Range {
  int64_t begin, end;
};

// Part `part` of `parts` of [0, n).
inline Range part_of(int64_t n, int64_t parts, int64_t part) {
  return {split(n, parts, part), split(n, parts, part + 1)};
}

struct Planes {
  int64_t width;    // of the map
  int64_t stride;   // 1 or 2
  int64_t pitch;    // of the rows of a plane
  int64_t size;     // of a plane
  int64_t channel;  // of all planes of a channel
  int64_t tap[kTaps];

  explicit Planes(const BlockSizes& s) : Planes(s.height, s.width, s.stride) {}

  Planes(int64_t height, int64_t width, int64_t stride) : width(width), stride(stride) {
    const auto extent = [&](int64_t n) { return (n + 2 + stride - 1) / stride; };
    pitch = extent(width);
    size = extent(height) * pitch;
    channel = stride * stride * size;
    for (int k = 0; k < kTaps; ++k) tap[k] = place(k / 3, k % 3);
  }

  // Of the element in row y and column x of the padded map.
  int64_t place(int64_t y, int64_t x) const {
    const int64_t odd = stride - 1;  // divisions by one or two
    return ((y & odd) * stride + (x & odd)) * size + (y >> odd) * pitch + (x >> odd);
  }
};

// Writes `count` elements; reads up to whole vectors.
template <typename T>
inline void copy_row(const T* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store<T>(to + i, load<T>(from + i));
  if (i < count) store_partial(to + i, load<T>(from + i), count - i);
}

// Elements 0, 2, 4 ... and 1, 3, 5 ... of a row of `count`, each to a row of its own; reads up to two whole vectors.
template <typename T>
inline void split_row(const T* from, T* even, T* odd, int64_t count) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>();
  const auto put = [](T* to, Vec<T> v, int64_t n) {
    if (n >= kLanes<T>) {
      store<T>(to, v);
    } else if (n > 0) {
      store_partial(to, v, n);
    }
  };
  for (int64_t i = 0; i < count; i += 2 * kLanes<T>) {
    const Vec<T> a = load<T>(from + i), b = load<T>(from + i + kLanes<T>);
    put(even + i / 2, even_lanes<T>(a, b, lanes), (count - i + 1) / 2);
    put(odd + i / 2, odd_lanes<T>(a, b, lanes), (count - i) / 2);
  }
}

// The inverse of split_row; reads up to whole vectors.
template <typename T>
inline void join_row(const T* even, const T* odd, T* to, int64_t count) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>();
  for (int64_t i = 0; i < count; i += 2 * kLanes<T>) {
    const Vec<T> a = load<T>(even + i / 2), b = load<T>(odd + i / 2);
    const Vec<T> joined[2] = {alternate<T, 0>(a, b, lanes), alternate<T, kLanes<T> / 2>(a, b, lanes)};
    T pair[2 * kLanes<T>];
    std::memcpy(pair, joined, sizeof(pair));
    copy_row(pair, to + i, count - i < 2 * kLanes<T> ? count - i : 2 * kLanes<T>);
  }
}

// Positions [first, first + count) of a map of rows of `width`, row by row: visit(offset from first, y, x, count).
template <typename Visit>
inline void for_each_row(int64_t first, int64_t count, int64_t width, Visit visit) {
  int64_t y = first / width, x = first % width;
  for (int64_t at = 0; at < count; x = 0, ++y) {
    const int64_t length = width - x < count - at ? width - x : count - at;
    visit(at, y, x, length);
    at += length;
  }
}

// Positions [first, first + count) of the maps of `channels`, which begin at from + c * from_pitch, into their planes.
template <typename T>
inline void write_planes(const Planes& planes, const T* from, int64_t from_pitch, int64_t channels, int64_t first,
                         int64_t count, T* to) {
  for_each_row(first, count, planes.width, [&](int64_t at, int64_t y, int64_t x, int64_t length) {
    T *even = to + planes.place(y + 1, x + 1), *odd = to + planes.place(y + 1, x + 2);
    for (int64_t c = 0; c < channels; ++c) {
      const T* row = from + c * from_pitch + at;
      if (planes.stride == 1) {
        copy_row(row, even + c * planes.channel, length);
      } else {
        split_row(row, even + c * planes.channel, odd + c * planes.channel, length);
      }
    }
  });
}

template <typename T>
inline void write_planes(const Planes& planes, const T* from, int64_t first, int64_t count, T* channel) {
  write_planes(planes, from, 0, 1, first, count, channel);
}

// As write_planes, where the positions 2 * first, 2 * first + 2 ... of each map lie at `even` and those behind each of
// them at `odd`, `count` of either, and the planes are of even and odd columns. Rows of the map are of even width.
template <typename T>
inline void write_halves(const Planes& planes, const T* even, const T* odd, int64_t from_pitch, int64_t channels,
                         int64_t first, int64_t count, T* to) {
  for_each_row(first, count, planes.width / 2, [&](int64_t at, int64_t y, int64_t x, int64_t length) {
    T *left = to + planes.place(y + 1, 2 * x + 1), *right = to + planes.place(y + 1, 2 * x + 2);
    for (int64_t c = 0; c < channels; ++c) {
      copy_row(even + c * from_pitch + at, left + c * planes.channel, length);
      copy_row(odd + c * from_pitch + at, right + c * planes.channel, length);
    }
  });
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
