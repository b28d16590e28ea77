// Moments of maps: mean and squared deviations of every channel, by image, and merged over a batch.
// Included by kernels that are compiled once per instruction set: internal linkage throughout.
#pragma once

#include "cpu/image.h"

namespace {

template <typename T>
struct Deviations {
  Vec<T> sum, squares;
};

// sum_p (x[p] - mean) and sum_p (x[p] - mean)^2, lane by lane, in several chains of additions.
template <typename T>
inline Deviations<T> deviations(const T* x, int64_t positions, T mean) {
  constexpr int kChains = 4;
  constexpr int64_t kL = kLanes<T>;
  Vec<T> sum[kChains] = {}, squares[kChains] = {};
  const auto add = [&](int chain, Vec<T> d) {
    sum[chain] += d;
    squares[chain] += d * d;
  };
  int64_t p = 0;
  for (; p + kChains * kL <= positions; p += kChains * kL) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) add(i, load<T>(x + p + i * kL) - mean);
  }
  for (; p + kL <= positions; p += kL) add(0, load<T>(x + p) - mean);
  if (p < positions) add(0, first_lanes<T>(load<T>(x + p) - mean, positions - p));
  return {(sum[0] + sum[1]) + (sum[2] + sum[3]), (squares[0] + squares[1]) + (squares[2] + squares[3])};
}

// Mean and squared deviation sum of every channel of one image: to[c], to[channel_pitch + c]. Two passes over data in
// cache; the second also finds what rounding left in the mean (the corrected two-pass algorithm, Chan, Golub, LeVeque
// 1983). In double precision, since images are told apart by the differences of their means.
template <typename T>
void image_moments(const Image<const T>& u, const Extent& e, int64_t channel_pitch, double* to) {
  constexpr int kL = kLanes<T>;
  const int64_t positions = e.positions(), channels = e.channels;
  for (int64_t begin = 0; begin < channels; begin += kL) {
    const int count = channels - begin < kL ? channels - begin : kL;
    Vec<T> sums[kL] = {}, squares[kL] = {};
    for (int i = 0; i < count; ++i) sums[i] = deviations<T>(u.row(begin + i), positions, 0).sum;
    const Vec<T> means = sum_lanes_of_each<T>(sums) / static_cast<T>(positions);
    for (int i = 0; i < kL; ++i) sums[i] = Vec<T>{};
    for (int i = 0; i < count; ++i) {
      const Deviations<T> d = deviations<T>(u.row(begin + i), positions, means[i]);
      sums[i] = d.sum;
      squares[i] = d.squares;
    }
    const Vec<T> rest = sum_lanes_of_each<T>(sums), total = sum_lanes_of_each<T>(squares);
    for (int i = 0; i < kL; ++i) {
      const double correction = rest[i];
      to[begin + i] = means[i] + correction / positions;
      to[channel_pitch + begin + i] = total[i] - correction * correction / positions;
    }
  }
}

// Mean and biased variance per channel from every image's moments, merged in a fixed order (Chan, Golub, LeVeque 1979).
template <typename T>
void merge_moments(const double* moments, int64_t images, const Extent& e, int64_t channel_pitch, T* mean, T* var) {
  constexpr int kL = kLanes<T>;
  const int64_t channels = e.channels;
  const double weight = e.positions();
  for (int64_t begin = 0; begin < channels; begin += kL) {
    double m[kL] = {}, squares[kL] = {};
    for (int64_t n = 0; n < images; ++n) {
      const double *image = moments + 2 * n * channel_pitch + begin, *deviation = image + channel_pitch;
      const double share = 1.0 / (n + 1), factor = weight * n / (n + 1);
      for (int i = 0; i < kL; ++i) {
        const double delta = image[i] - m[i];
        m[i] += delta * share;
        squares[i] += deviation[i] + delta * delta * factor;
      }
    }
    for (int i = 0; i < kL && begin + i < channels; ++i) {
      mean[begin + i] = static_cast<T>(m[i]);
      var[begin + i] = static_cast<T>(squares[i] / (images * weight));
    }
  }
}

}  // namespace
