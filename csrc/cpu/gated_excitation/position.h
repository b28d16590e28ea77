// Position softmax and the pooled vectors of one image: sums over positions that are weighted by it, strip by strip.
#pragma once

#include "cpu/gated_excitation/depthwise.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int64_t kBlock = 256;  // positions whose sums are added to the earlier ones at once, for accuracy

// sum_p exp(logit[p] - top) x[c, p] of the strips seen so far, and the same with x = 1: the lanes are still to be added
// up. A later strip with a higher logit rescales them (the online softmax of Milakov and Gimelshein, 2018).
template <typename T>
struct Pooling {
  Vec<T>* sums;  // channels
  T top = 0;
  Vec<T> total{};
  bool started = false;
};

// In place: exp(logits - top) for i < round_up(count); returns the sum, lane by lane.
template <typename T>
Vec<T> exponentials(T* logits, int64_t count, T top) {
  Vec<T> sum{};
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> e = exp(load<T>(logits + i) - top);
    store<T>(logits + i, e);
    sum += e;
  }
  return sum;
}

// The highest logit. Fills up the last vector with -infinity.
template <typename T>
T highest(T* logits, int64_t count) {
  const int64_t length = round_up<T>(count);
  for (int64_t i = count; i < length; ++i) logits[i] = -INFINITY;
  Vec<T> best = load<T>(logits);
  for (int64_t i = kLanes<T>; i < length; i += kLanes<T>) best = maximum<T>(best, load<T>(logits + i));
  return max_lanes<T>(best);
}

// sums[c] = sums[c] * factor + sum_i weights[i] maps[c * pitch + i] for Channels channels, which share every weight.
template <typename T, int Channels>
void pool_channels(const T* maps, int64_t pitch, const T* weights, int64_t count, Vec<T>* sums, bool first, T factor) {
  Vec<T> sum[Channels] = {};
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> weight = load<T>(weights + i);
#pragma GCC unroll 4
    for (int c = 0; c < Channels; ++c) sum[c] += load<T>(maps + c * pitch + i) * weight;
  }
#pragma GCC unroll 4
  for (int c = 0; c < Channels; ++c) sums[c] = first ? sum[c] : sums[c] * factor + sum[c];
}

// Adds up to kBlock positions: weights = exp(logits - pooling.top), and the sums, the earlier ones times `factor`.
template <typename T>
void pool_block(const T* maps, int64_t pitch, int64_t channels, int64_t count, T* logits, T factor,
                Pooling<T>& pooling) {
  const bool first = !pooling.started;
  const Vec<T> sum = exponentials(logits, count, pooling.top);
  pooling.total = first ? sum : pooling.total * factor + sum;
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4) {
    pool_channels<T, 4>(maps + c * pitch, pitch, logits, count, pooling.sums + c, first, factor);
  }
  for (; c < channels; ++c) {
    pool_channels<T, 1>(maps + c * pitch, pitch, logits, count, pooling.sums + c, first, factor);
  }
  pooling.started = true;
}

// Adds a strip: its logits are sum_c w[c] maps[c * pitch + i]; `weights` receives exp(logit - pooling.top).
template <typename T>
void pool_strip(const T* maps, int64_t pitch, int64_t channels, const T* w, int64_t count, T* weights,
                Pooling<T>& pooling) {
  combine(maps, pitch, channels, w, count, weights);
  const T best = highest(weights, count);
  const T top = !pooling.started || best > pooling.top ? best : pooling.top;
  T factor = pooling.started ? std::exp(pooling.top - top) : 1;
  pooling.top = top;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t length = count - begin < kBlock ? count - begin : kBlock;
    pool_block(maps + begin, pitch, channels, length, weights + begin, factor, pooling);
    factor = 1;
  }
}

// to[c] = sums[c] / total, lanes added up; kLanes channels at a time. Returns 1 / total.
template <typename T>
T finish_pooling(const Pooling<T>& pooling, int64_t channels, T* to) {
  constexpr int kL = kLanes<T>;
  const T inverse = 1 / sum_lanes<T>(pooling.total);
  for (int64_t c = 0; c < channels; c += kL) {
    Vec<T> v[kL];
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i) v[i] = c + i < channels ? pooling.sums[c + i] : Vec<T>{};
    store<T>(to + c, sum_lanes_of_each<T>(v) * inverse);
  }
  return inverse;
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
