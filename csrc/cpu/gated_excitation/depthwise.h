// The depthwise branches of one image, a strip of rows at a time: what a strip needs stays in the first-level cache,
// and no depthwise map is ever stored beyond it.
#pragma once

#include "cpu/gated_excitation/call.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int64_t kStripBytes = 32 * 1024;
constexpr int64_t kLeastRows = 4;  // two rows above and two below a strip are normalised once more
// Channels that are normalised before the first of them is read again: a load that spans two stores which are not yet
// in the cache has to wait for them.
constexpr int64_t kGroup = 4;

// Memory for one strip of one branch.
template <typename T>
struct Strip {
  T* rectified;  // kGroup x rectified_pitch: relu(BN(u)), with the rows above and below that the taps reach
  T* maps;       // channels x pitch: the depthwise maps
  T* weights;    // pitch: one value per position of the strip
  int64_t rows, pitch, rectified_pitch;
  static int64_t margin(const Sizes& s) { return round_up<T>(2 * s.width) + kLanes<T>; }
  void carve(Arena& arena, const Sizes& s, int64_t bytes = kStripBytes) {
    const int64_t fitting = bytes / (s.channels * s.width * static_cast<int64_t>(sizeof(T)));
    const int64_t wanted = fitting > kLeastRows ? fitting : kLeastRows;
    rows = wanted < s.height ? wanted : s.height;
    pitch = round_up<T>(rows * s.width);
    rectified_pitch = pitch + 2 * margin(s) + kLanes<T>;
    rectified = arena.take<T>(kGroup * rectified_pitch);
    maps = arena.take<T>(s.channels * pitch);
    weights = arena.take<T>(pitch);
  }
};

// x[begin .. end) = 0, and up to a vector more.
template <typename T>
void clear(T* x, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; p += kLanes<T>) store<T>(x + p, Vec<T>{});
}

// r[q] = relu(BN(u[q])) of branch B for the vectors that cover [begin, end), where `begin` starts one.
template <typename T, int B>
void rectify(const T* u, const Channel<T>& channel, int64_t begin, int64_t end, T* r) {
  const T mean = channel.mean[B], scale = channel.scale[B], bias = channel.bias[B];
  for (int64_t q = begin; q < end; q += kLanes<T>) store<T>(r + q, relu<T>((load<T>(u + q) - mean) * scale + bias));
}

// Sums along the three rows that one column of taps reaches.
template <typename T>
struct ColumnSums {
  Vec<T> left, centre, right;
};

template <typename T>
ColumnSums<T> column_sums(const T* r, int64_t row, const Vec<T> (&k)[kTaps]) {
  const Vec<T> above = load_once<T>(r - row), here = load_once<T>(r), below = load_once<T>(r + row);
  return {above * k[0] + here * k[3] + below * k[6], above * k[1] + here * k[4] + below * k[7],
          above * k[2] + here * k[5] + below * k[8]};
}

// to[i] = sum_k kernel[k] r[i + o_k] for i < round_up(count), a row's end taken into account; position 0 starts a row.
// The shift along a row is applied to the sums over the rows, so that all loads keep the alignment of the rows; what is
// shifted in from before the first or after the last position lies outside of their rows and is masked.
template <typename T, int Dilation>
void depthwise(const Call<T>& call, const T* r, const T* kernel, int64_t count, T* to) {
  const int64_t row = Dilation * call.sizes.width;
  const auto *inside_left = call.column_mask[2 - Dilation], *inside_right = call.column_mask[2 + Dilation];
  Vec<T> k[kTaps];
#pragma GCC unroll 9
  for (int i = 0; i < kTaps; ++i) k[i] = splat<T>(kernel[i]);
  ColumnSums<T> now = column_sums<T>(r, row, k);
  Vec<T> sum = now.centre + keep<T>(shifted_up<T, Dilation>(Vec<T>{}, now.left), inside_left);
  int64_t i = 0;
  for (; i + kLanes<T> < count; i += kLanes<T>) {
    const ColumnSums<T> next = column_sums<T>(r + i + kLanes<T>, row, k);
    store<T>(to + i, sum + keep<T>(shifted_down<T, Dilation>(now.right, next.right), inside_right + i));
    sum = next.centre + keep<T>(shifted_up<T, Dilation>(now.left, next.left), inside_left + i + kLanes<T>);
    now = next;
  }
  store<T>(to + i, sum + keep<T>(shifted_down<T, Dilation>(now.right, Vec<T>{}), inside_right + i));
}

// Calls work(first, count) for every strip of rows of branch B, [first, first + count) its positions, when
// strip.maps[c * strip.pitch + i] holds the branch's depthwise map of channel c at position first + i. Past a strip's
// count the maps are finite.
template <typename T, int B, typename Work>
void for_each_strip(const Call<T>& call, const Image<const T>& u, const Strip<T>& strip, Work work) {
  constexpr int kDilation = B + 1;
  const Sizes& s = call.sizes;
  const int64_t positions = s.positions(), reach = kDilation * s.width;
  for (int64_t y = 0; y < s.height; y += strip.rows) {
    const int64_t first = y * s.width, last = (y + strip.rows < s.height ? y + strip.rows : s.height) * s.width;
    const int64_t begin = (first > reach ? first - reach : 0) / kLanes<T> * kLanes<T>;
    const int64_t end = last + reach + kLanes<T> < positions ? last + reach + kLanes<T> : positions;
    T* r = strip.rectified + Strip<T>::margin(s) - first;  // r[q] stands for position q
    for (int64_t i = 0; i < kGroup; ++i) {
      clear(r + i * strip.rectified_pitch, first - reach, 0);
      clear(r + i * strip.rectified_pitch, positions, last + reach + kLanes<T>);
    }
    for (int64_t group = 0; group < s.channels; group += kGroup) {
      const int64_t stop = group + kGroup < s.channels ? group + kGroup : s.channels;
      for (int64_t c = group; c < stop; ++c) {
        T* to = r + (c - group) * strip.rectified_pitch;
        rectify<T, B>(u.row(c), call.channels[c], begin, end, to);
        if (end == positions) store<T>(to + positions, Vec<T>{});
      }
      for (int64_t c = group; c < stop; ++c) {
        depthwise<T, kDilation>(call, r + (c - group) * strip.rectified_pitch + first, call.channels[c].kernel[B],
                                last - first, strip.maps + c * strip.pitch);
      }
    }
    work(first, last - first);
  }
}

// Vectors vectors of to[i] = sum_c w[c] maps[c * pitch + i], in eight chains of additions.
template <typename T, int Vectors>
void combine_vectors(const T* maps, int64_t pitch, int64_t channels, const T* w, T* to) {
  constexpr int kChains = 8 / Vectors;
  Vec<T> sum[kChains][Vectors] = {};
  int64_t c = 0;
  for (; c + kChains <= channels; c += kChains) {
#pragma GCC unroll 8
    for (int k = 0; k < kChains; ++k) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[k][v] += load<T>(maps + (c + k) * pitch + v * kLanes<T>) * w[c + k];
    }
  }
  for (; c < channels; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[0][v] += load<T>(maps + c * pitch + v * kLanes<T>) * w[c];
  }
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 8
    for (int k = 1; k < kChains; ++k) sum[0][v] += sum[k][v];
    store<T>(to + v * kLanes<T>, sum[0][v]);
  }
}

// to[i] = sum_c w[c] maps[c * pitch + i] for i < round_up(count).
template <typename T>
void combine(const T* maps, int64_t pitch, int64_t channels, const T* w, int64_t count, T* to) {
  constexpr int64_t kL = kLanes<T>;
  int64_t i = 0;
  for (; i + 7 * kL < count; i += 8 * kL) combine_vectors<T, 8>(maps + i, pitch, channels, w, to + i);
  for (; i + 3 * kL < count; i += 4 * kL) combine_vectors<T, 4>(maps + i, pitch, channels, w, to + i);
  for (; i < count; i += kL) combine_vectors<T, 1>(maps + i, pitch, channels, w, to + i);
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
