// Where the input of some images lies: padded planes of each channel, so that a tap is an offset and every vector of
// results has one address. Small maps of several images lie beside one another, position by position, so that they fill
// vectors; a stride spreads a channel over one plane for each remainder of its rows and columns.
#pragma once

#include "cpu/masked_conv2d/blocks.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int64_t kStripVectorsOfResults = 32;  // about: what a block reads and writes in one strip stays in cache

template <typename T>
struct Frame {
  int64_t images;
  int64_t pitch;      // of the rows of a plane
  int64_t plane;      // elements
  int64_t channel;    // of all planes of a channel
  int64_t row_slots;  // from one row of results to the next
  bool separate;      // whether every row of results begins a vector
  int64_t strip_rows;

  Frame(const MaskedSizes& s, int64_t images) : images(images) {
    const int64_t width = s.columns.output() * images, height = s.rows.output();
    pitch = (s.columns.needed() + s.columns.stride - 1) / s.columns.stride * images;
    plane = (s.rows.needed() + s.rows.stride - 1) / s.rows.stride * pitch;
    channel = s.rows.stride * s.columns.stride * plane;
    const int64_t joined = (height - 1) * pitch + width;
    separate = height * round_up<T>(width) <= round_up<T>(joined);
    row_slots = separate ? round_up<T>(width) : pitch;
    const int64_t rows = kStripVectorsOfResults * kLanes<T> / row_slots / s.pool * s.pool;
    strip_rows = std::min(std::max(rows, s.pool), height);
  }

  // Of padded row y and column x.
  int64_t place(const MaskedSizes& s, int64_t y, int64_t x) const {
    return (y % s.rows.stride * s.columns.stride + x % s.columns.stride) * plane + y / s.rows.stride * pitch +
           x / s.columns.stride * images;
  }

  int64_t strips(const MaskedSizes& s) const { return (s.rows.output() + strip_rows - 1) / strip_rows; }
  int64_t vectors(const MaskedSizes& s, int64_t rows) const {
    const int64_t width = s.columns.output() * images;
    return (separate ? rows * row_slots : round_up<T>((rows - 1) * pitch + width)) / kLanes<T>;
  }
  // Whether the vectors of a strip are its results, position by position, and nothing else.
  bool in_order(const MaskedSizes& s) const { return separate && images == 1 && row_slots == s.columns.output(); }
  // Of the vectors computed, the part that is results, in percent.
  int64_t filled(const MaskedSizes& s) const {
    return 100 * images * s.conv_positions() / (vectors(s, s.rows.output()) * kLanes<T>);
  }
  int64_t elements(int64_t channels) const { return channels * channel + kMostVectors * kLanes<T>; }
};

// Images whose positions share vectors: one where its own fill them, else enough for a few vectors.
template <typename T>
inline int64_t images_together(const MaskedSizes& s) {
  if (Frame<T>(s, 1).filled(s) >= 80) return 1;
  constexpr int64_t kEnough = 16 * kLanes<T>;
  return (kEnough + s.conv_positions() - 1) / s.conv_positions();
}

// What a frame's loops look up: where the vectors of a strip begin in the planes and which rows they are of, the taps,
// and where an image's rows and columns go.
template <typename T>
struct Walk {
  int64_t* vector;
  Range* row;  // of results, from the strip's first on
  int64_t* tap;
  int64_t* line;
  int64_t* column;
  int64_t height, width;  // rows and columns that are needed

  Walk(const MaskedSizes& s, const Frame<T>& frame, const Host& host) {
    const int64_t count = frame.vectors(s, frame.strip_rows), per_row = frame.row_slots / kLanes<T>;
    vector = shared<int64_t>(host, count);
    row = shared<Range>(host, count);
    for (int64_t v = 0; v < count; ++v) {
      vector[v] = frame.separate ? v / per_row * frame.pitch + v % per_row * kLanes<T> : v * kLanes<T>;
      row[v] = {vector[v] / frame.pitch, (vector[v] + kLanes<T> - 1) / frame.pitch + 1};
      if (frame.separate) row[v].end = row[v].begin + 1;
    }
    tap = shared<int64_t>(host, s.taps());
    for (int64_t k = 0; k < s.taps(); ++k) {
      tap[k] = frame.place(s, k / s.columns.kernel * s.rows.dilation, k % s.columns.kernel * s.columns.dilation);
    }
    height = std::clamp<int64_t>(s.rows.needed() - s.rows.padding, 0, s.rows.input);
    line = shared<int64_t>(host, height);
    for (int64_t y = 0; y < height; ++y) line[y] = frame.place(s, s.rows.padding + y, 0);
    width = std::clamp<int64_t>(s.columns.needed() - s.columns.padding, 0, s.columns.input);
    column = shared<int64_t>(host, width);
    for (int64_t x = 0; x < width; ++x) column[x] = frame.place(s, 0, s.columns.padding + x);
  }

  // Without the first and last rows of taps that meet nothing but padding in the rows [first, end) of results.
  static Range taps_inside(const MaskedSizes& s, int64_t first, int64_t end) {
    const masked_conv2d::Axis& rows = s.rows;
    Range inside{0, rows.kernel};
    const auto input_row = [&](int64_t y, int64_t tap) { return y * rows.stride + tap * rows.dilation - rows.padding; };
    while (inside.begin < inside.end && input_row(end - 1, inside.begin) < 0) ++inside.begin;
    while (inside.begin < inside.end && input_row(first, inside.end - 1) >= rows.input) --inside.end;
    return {inside.begin * s.columns.kernel, inside.end * s.columns.kernel};
  }
};

template <typename S, typename T>
inline void write_row(const S* from, T* to, int64_t n) {
  if constexpr (std::is_same_v<S, T>) {
    if (n % kLanes<T> == 0) {
      for (int64_t i = 0; i < n; i += kLanes<T>) store<T>(to + i, load<T>(from + i));
      return;
    }
  }
  convert(from, to, n);
}

// Channel c of the images listed, each `frame.images` in turn, into its planes, which are zero elsewhere.
template <typename S, typename T>
inline void write_channel(const MaskedSizes& s, const Frame<T>& frame, const Walk<T>& walk, const Map& x,
                          const int64_t* images, int64_t c, T* to) {
  std::memset(to, 0, frame.channel * sizeof(T));
  const bool dense = s.columns.stride == 1 && frame.images == 1 && x.stride[3] == 1;
  for (int64_t n = 0; n < frame.images; ++n) {
    const S* from = static_cast<const S*>(x.data) + images[n] * x.stride[0] + c * x.stride[1];
    for (int64_t y = 0; y < walk.height; ++y, from += x.stride[2]) {
      T* row = to + n + walk.line[y];
      if (dense) {
        if (walk.width > 0) write_row(from, row + walk.column[0], walk.width);
        continue;
      }
      for (int64_t i = 0; i < walk.width; ++i) row[walk.column[i]] = to_accumulate(from[i * x.stride[3]]);
    }
  }
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
