// Maps whose images lie innermost: a channel is one dense row of height x width x batch elements, whatever the size of
// an image. A 1x1 convolution is then a matrix product without remainders between images; a 3x3 convolution one whose
// taps are `batch` elements apart, so that a map of 2x2 fills vectors as one of 32x32 does. Tasks are stretches of
// positions or of channels. A channel that a task has whole gets its statistics, and the way back through them, at
// once.
#pragma once

#include "cpu/bn_relu_conv2d/gradients.h"
#include "cpu/moments.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// Elements that are summed in the accumulate type before they are added in double precision.
constexpr int64_t kFlushElements = 512;

template <typename T>
inline Image<T> rows_of(const Map& map) {
  return {static_cast<T*>(map.data), map.stride[1]};
}

// min(n, kLanes) elements, n > 0.
template <typename T>
inline void store_first(T* p, Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) {
    store<T>(p, v);
  } else {
    store_partial(p, v, n);
  }
}

// The first `count` elements of each row of a tile to row(o). By way of memory: a condition at each store would keep
// the compiler from holding the accumulators in registers.
template <typename T, int Outputs, int Vectors, typename Row>
inline void store_rows(const Vec<T> (&sum)[Outputs][Vectors], int64_t count, Row row) {
  alignas(64) T tile[Outputs][Vectors * kLanes<T>];
#pragma GCC unroll 8
  for (int o = 0; o < Outputs; ++o) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store<T>(tile[o] + v * kLanes<T>, sum[o][v]);
  }
  for (int o = 0; o < Outputs; ++o) copy_row(tile[o], row(o), std::min<int64_t>(count, Vectors * kLanes<T>));
}

// Calls work(task's range) for ranges of [0, n), one per thread at most.
template <typename Work>
inline void parallel_parts(const Host& host, int64_t n, Work work) {
  parallel_ranges(host, n, [&](Range range, int64_t) { work(range); });
}

// Tiles of channels of a product's result, and how many strips of positions there are: (strip, tile) are its units of
// work, the strip's tiles one after the other, so that few threads read more than their part of the operand.
struct Units {
  int64_t tiles, strips;
  int64_t count() const { return tiles * strips; }

  // begin(strip) at a strip's first unit in `range`, then work(strip, tile).
  template <typename Begin, typename Work>
  void visit(Range range, Begin begin, Work work) const {
    for (int64_t unit = range.begin; unit < range.end; ++unit) {
      if (unit == range.begin || unit % tiles == 0) begin(unit / tiles);
      work(unit / tiles, unit % tiles);
    }
  }
};

// Sums of two vectors over the stretches of a row, in double precision from one stretch to the next.
template <typename T>
struct RowSums {
  double first = 0, second = 0;

  // add(offset, count, sums): sums the elements [offset, offset + count), count at most kLanes, in the two vectors.
  template <typename Add>
  void take(int64_t elements, Add add) {
    for (int64_t begin = 0; begin < elements; begin += kFlushElements) {
      const int64_t end = std::min(elements, begin + kFlushElements);
      Vec<T> a{}, b{};
      for (int64_t p = begin; p < end; p += kLanes<T>) add(p, std::min<int64_t>(end - p, kLanes<T>), a, b);
      first += sum_lanes<T>(a);
      second += sum_lanes<T>(b);
    }
  }
};

// Mean and biased variance of every channel; the corrected two-pass algorithm, as in image_moments.
template <typename T>
void run_row_statistics(const BNReLUConv2d& args, const Host& host) {
  const ConvolutionSizes& s = args.sizes;
  const int64_t elements = s.batch * s.positions();
  const Image<const T> x = rows_of<const T>(args.x);
  T *means = static_cast<T*>(args.mean), *vars = static_cast<T*>(args.var);
  parallel_parts(host, s.in_channels, [&](Range channels) {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const T* row = x.row(c);
      RowSums<T> sums;
      sums.take(elements, [&](int64_t p, int64_t n, Vec<T>& sum, Vec<T>&) { sum += load_first<T>(row + p, n); });
      const T mean = static_cast<T>(sums.first / elements);
      RowSums<T> rest;
      rest.take(elements, [&](int64_t p, int64_t n, Vec<T>& sum, Vec<T>& squares) {
        const Vec<T> d = load_first<T>(row + p, n) - mean;
        const Vec<T> inside = n < kLanes<T> ? first_lanes<T>(d, n) : d;
        sum += inside;
        squares += inside * inside;
      });
      means[c] = static_cast<T>(mean + rest.first / elements);
      vars[c] = static_cast<T>((rest.second - rest.first * rest.first / elements) / elements);
    }
  });
}

template <typename T>
void correct_row(const T* x, int64_t elements, T mean, const Correction& correction, T* grad_x) {
  const T of_ones = static_cast<T>(correction.of_ones), of_centred = static_cast<T>(correction.of_centred);
  for (int64_t p = 0; p < elements; p += kLanes<T>) {
    const int64_t n = std::min<int64_t>(elements - p, kLanes<T>);
    const Vec<T> centred = load_first<T>(x + p, n) - mean;
    store_first(grad_x + p, load_first<T>(grad_x + p, n) - of_ones - centred * of_centred, n);
  }
}

// Takes from every channel of grad_x the corrections that calls of `backward` have left.
template <typename T>
void run_row_corrections(const BNReLUConv2d& args, const Host& host) {
  const int64_t elements = args.sizes.batch * args.sizes.positions();
  const Image<const T> x = rows_of<const T>(args.x);
  const Image<T> grad_x = rows_of<T>(args.grad_x);
  const T* mean = static_cast<const T*>(args.mean);
  parallel_parts(host, args.sizes.in_channels, [&](Range channels) {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const Correction correction{args.corrections[2 * c], args.corrections[2 * c + 1]};
      correct_row(x.row(c), elements, mean[c], correction, grad_x.row(c));
    }
  });
}

// The way back through ReLU and BN of channel c, whose x and dz are whole rows of `elements`, where dz is zero at those
// that are no part of the map: writes the gradients of the normalisation's parameters and of x.
template <typename T>
void finish_row(const Convolution<T>& call, int64_t c, int64_t elements, const T* x, const T* dz, T* grad_x) {
  RowSums<T> sums;
  const auto masked = [&](int64_t p, int64_t n, NormSums<T>& at) {
    return through_norm(call.norm(), c, load_first<T>(x + p, n), load_first<T>(dz + p, n), at);
  };
  sums.take(elements, [&](int64_t p, int64_t n, Vec<T>& gradient, Vec<T>& product) {
    NormSums<T> at{gradient, product};
    masked(p, n, at);
    gradient = at.gradient;
    product = at.product;
  });
  const Correction correction = finish_parameters(call, c, sums.first, sums.second);
  const bool training = call.args.training, add = call.args.add;
  const T of_ones = static_cast<T>(correction.of_ones), of_centred = static_cast<T>(correction.of_centred);
  for (int64_t p = 0; p < elements; p += kLanes<T>) {
    const int64_t n = std::min<int64_t>(elements - p, kLanes<T>);
    NormSums<T> unused;
    const Vec<T> scaled = masked(p, n, unused), centred = load_first<T>(x + p, n) - call.norm().mean[c];
    const Vec<T> gradient = training ? scaled - of_ones - centred * of_centred : scaled;
    store_first(grad_x + p, add ? load_first<T>(grad_x + p, n) + gradient : gradient, n);
  }
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
