// The two products of a 3x3 convolution's backward pass, on padded planes (csrc/cpu/hybrid_block/planes.h).
#pragma once

#include "cpu/bn_relu_conv2d/gradients.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// Gradient of the result in rows of the planes' pitch, zero in between and around: element (y, x) of the result lies at
// its own place in the planes of the input, so that its taps are offsets there, and negative ones here.
struct GradientPlanes {
  int64_t pitch;
  int64_t channel;
  int64_t origin;  // of the first element of the first channel
  int64_t span;    // of a channel's elements

  template <typename T>
  static GradientPlanes of(const ConvolutionSizes& s, const Planes& planes) {
    const int64_t rows = s.out_height();
    return {planes.pitch, (rows + 2) * planes.pitch + kLanes<T>, planes.pitch + kLanes<T>,
            (rows - 1) * planes.pitch + s.out_width()};
  }
};

// The taps that reach one plane of the input, as offsets into the planes of the gradient.
inline TapOffsets reaching_taps(int64_t row_parity, int64_t column_parity, int64_t stride, int64_t pitch) {
  TapOffsets taps;
  for (int k = 0; k < kTaps; ++k) {
    const int64_t y = k / 3, x = k % 3;
    if (y % stride != row_parity || x % stride != column_parity) continue;
    taps.add(k, -(y / stride * pitch + x / stride));
  }
  return taps;
}

constexpr int kTapOutputs = 3;                               // output channels of a tile of dW
constexpr int kTapsAtOnce = kVectorBytes == 64 ? kTaps : 3;  // as accumulators fit

// Adds the sums of the lanes of `sum` to `to`.
template <typename T, int Count>
inline void add_lane_sums(const Vec<T> (&sum)[Count], double* to) {
#pragma GCC unroll 32
  for (int first = 0; first < Count; first += kLanes<T>) {
    Vec<T> some[kLanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) some[i] = first + i < Count ? sum[first + i] : Vec<T>{};
    const Vec<T> total = sum_lanes_of_each<T>(some);
    for (int i = 0; i < kLanes<T> && first + i < Count; ++i) to[i] += total[i];
    to += kLanes<T>;
  }
}

// Several images' planes of one input channel and of Outputs output channels.
template <typename T>
struct TapOperands {
  const T* z;
  int64_t z_image;
  const T* dy;
  int64_t dy_image, dy_channel;
  int64_t images, span;
};

// Where several images' planes are whose products with the gradient's positions, lanes being outputs, are summed.
template <typename T>
struct OuterOperands {
  const T* z;
  int64_t z_image;
  const T* dy;  // [rows][pitch][outputs]
  int64_t dy_image;
  int64_t images, rows, width, pitch;
};

// to[r * outputs + o] += sum over images and positions of dy[p][o] z[p + row[r]], outputs being Vectors vectors.
template <int Vectors, typename T>
PYEXT_OWN_REGISTERS void add_outer_taps(const OuterOperands<T>& in, const int64_t (&row)[kTileOutputs], int count,
                                        double* to) {
  Vec<T> sum[kTileOutputs][Vectors] = {};
  for (int64_t n = 0; n < in.images; ++n) {
    const T* z[kTileOutputs];
#pragma GCC unroll 8
    for (int r = 0; r < kTileOutputs; ++r) z[r] = in.z + n * in.z_image + row[r];
    for (int64_t y = 0; y < in.rows; ++y) {
      const T* dy = in.dy + n * in.dy_image + y * in.pitch * Vectors * kLanes<T>;
      for (int64_t p = y * in.pitch, end = p + in.width; p < end; ++p, dy += Vectors * kLanes<T>) {
        Vec<T> gradient[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) gradient[v] = load_once<T>(dy + v * kLanes<T>);
#pragma GCC unroll 8
        for (int r = 0; r < kTileOutputs; ++r) {
          const Vec<T> factor = in_register<T>(splat<T>(z[r][p]));
#pragma GCC unroll 8
          for (int v = 0; v < Vectors; ++v) sum[r][v] += factor * gradient[v];
        }
      }
    }
  }
  T tile[kTileOutputs][Vectors * kLanes<T>];
#pragma GCC unroll 8
  for (int r = 0; r < kTileOutputs; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store<T>(tile[r] + v * kLanes<T>, sum[r][v]);
  }
  for (int r = 0; r < count; ++r) {
    for (int i = 0; i < Vectors * kLanes<T>; ++i) to[r * Vectors * kLanes<T> + i] += tile[r][i];
  }
}

// to[o * to_pitch + k] += sum over images and positions of dy[o][p] z[p + tap k].
template <int Outputs, typename T>
PYEXT_OWN_REGISTERS void add_tap_gradients(const TapOperands<T>& in, const int64_t* tap, double* to, int64_t to_pitch) {
  for (int first = 0; first < kTaps; first += kTapsAtOnce) {
    Vec<T> sum[Outputs * kTapsAtOnce] = {};
    for (int64_t n = 0; n < in.images; ++n) {
      const T *z = in.z + n * in.z_image, *dy = in.dy + n * in.dy_image;
      for (int64_t p = 0; p < in.span; p += kLanes<T>) {
        Vec<T> gradient[Outputs];
#pragma GCC unroll 8
        for (int o = 0; o < Outputs; ++o) gradient[o] = load_once<T>(dy + o * in.dy_channel + p);
#pragma GCC unroll 16
        for (int k = 0; k < kTapsAtOnce; ++k) {
          const Vec<T> position = load_once<T>(z + tap[first + k] + p);
#pragma GCC unroll 8
          for (int o = 0; o < Outputs; ++o) sum[o * kTapsAtOnce + k] += position * gradient[o];
        }
      }
    }
    double totals[Outputs * kTapsAtOnce] = {};
    add_lane_sums<T>(sum, totals);
    for (int o = 0; o < Outputs; ++o) {
      for (int k = 0; k < kTapsAtOnce; ++k) to[o * to_pitch + first + k] += totals[o * kTapsAtOnce + k];
    }
  }
}

// The inverse of write_planes: the map of one channel from its planes, in rows without gaps.
template <typename T>
inline void read_planes(const Planes& planes, const T* channel, int64_t height, T* to) {
  for (int64_t y = 0; y < height; ++y, to += planes.width) {
    const T* even = channel + planes.place(y + 1, 1);
    if (planes.stride == 1) {
      copy_row(even, to, planes.width);
    } else {
      join_row(even, channel + planes.place(y + 1, 2), to, planes.width);
    }
  }
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
