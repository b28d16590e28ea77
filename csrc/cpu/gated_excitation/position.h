// Sums over channels at every position, position softmax, and sums over positions for every channel.
#pragma once

#include "cpu/gated_excitation/call.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// Three maps of one value per position (branches forget, 3, 5), each with zeros around it for shifted reads.
template <typename T>
struct PositionMaps {
  T* map[kNumBranches];
  static int64_t margin(const Sizes& s) { return round_up<T>(2 * s.width + 2); }
  void carve(Arena& arena, const Sizes& s) {
    const int64_t length = round_up<T>(s.positions()) + 2 * margin(s);
    for (T*& m : map) m = arena.take<T>(length) + margin(s);
  }
  void clear_margins(const Sizes& s) const {
    for (T* m : map) {
      std::memset(m - margin(s), 0, margin(s) * sizeof(T));
      std::memset(m + s.positions(), 0, (round_up<T>(s.positions()) - s.positions() + margin(s)) * sizeof(T));
    }
  }
};

// The 19 per-tap maps of a strip of image rows and the two rows above and below that its taps reach.
template <typename T>
struct StripMaps {
  T* data;
  int64_t pitch;
  static int64_t rows(const Sizes& s) {
    const int64_t wanted = kStripPositions / s.width;
    return wanted < 1 ? 1 : (wanted < s.height ? wanted : s.height);
  }
  void carve(Arena& arena, const Sizes& s) {
    pitch = round_up<T>((rows(s) + 4) * s.width + 4) + 3 * kLanes<T>;
    data = arena.take<T>(kMaps * pitch);
  }
};

// maps[j][q - origin] for the vectors that cover positions [begin, end): sums over channels, one per tap.
template <typename T>
void project(const Call<T>& call, const Image<const T>& u, const ProjectionWeights<T>* weights, int64_t begin,
             int64_t end, T* maps, int64_t pitch) {
  for (int64_t q = begin; q < end; q += kLanes<T>) {
    Vec<T> sum[kMaps] = {};
    for (int64_t c = 0; c < call.sizes.channels; ++c) {
      const Channel<T>& channel = call.channels[c];
      const ProjectionWeights<T>& w = weights[c];
      const Vec<T> x = load<T>(u.row(c) + q);
      const Vec<T> r3 = relu<T>(x * channel.scale[0] + channel.shift[0]);
      const Vec<T> r5 = relu<T>(x * channel.scale[1] + channel.shift[1]);
      sum[0] += x * w.forget;
#pragma GCC unroll 9
      for (int k = 0; k < kTaps; ++k) {
        sum[1 + k] += r3 * w.mix[0][k];
        sum[1 + kTaps + k] += r5 * w.mix[1][k];
      }
    }
    for (int j = 0; j < kMaps; ++j) store<T>(maps + j * pitch + q, sum[j]);
  }
}

// Sum over the taps of one branch of its per-tap maps, each read at its own offset, at positions p...
template <typename T, int Branch>
Vec<T> gather_taps(const Call<T>& call, const T* maps, int64_t pitch, int64_t p) {
  Vec<T> total{};
#pragma GCC unroll 3
  for (int column = 0; column < 3; ++column) {
    Vec<T> sum{};
#pragma GCC unroll 3
    for (int row = 0; row < 3; ++row) {
      const int k = row * 3 + column;
      const Tap o = tap(Branch, k);
      sum += load<T>(maps + (1 + (Branch - kMix3) * kTaps + k) * pitch + p + o.dy * call.sizes.width + o.dx);
    }
    const int dx = tap(Branch, column).dx;
    total += dx == 0 ? sum : sum * load<T>(call.column_mask[dx + 2] + p);
  }
  return total;
}

// to[branch][p] = forget: sum_c w[c] u[c, p]; branches: sum_c,k w[c, k] r[c, p + o_k] with zero padding.
template <typename T>
void position_sums(const Call<T>& call, const Image<const T>& u, const ProjectionWeights<T>* weights,
                   const StripMaps<T>& strip, const PositionMaps<T>& to) {
  const Sizes& s = call.sizes;
  const int64_t width = s.width, positions = s.positions(), rows = StripMaps<T>::rows(s);
  for (int64_t y = 0; y < s.height; y += rows) {
    const int64_t first = y * width, last = (y + rows < s.height ? y + rows : s.height) * width;
    const int64_t reach = 2 * width + 2;
    const int64_t begin = (first - reach > 0 ? first - reach : 0) / kLanes<T> * kLanes<T>;
    const int64_t end = last + reach < positions ? last + reach : positions;
    // Element 0 of the strip's maps stands for position `origin`; what lies outside the image reads as zero.
    const int64_t origin = first - reach - kLanes<T>;
    T* maps = strip.data - origin;
    project(call, u, weights, begin, end, maps, strip.pitch);
    const int64_t computed = begin + round_up<T>(end - begin);
    for (int j = 1; j < kMaps; ++j) {
      T* m = maps + j * strip.pitch;
      for (int64_t p = origin; p < 0; ++p) m[p] = 0;
      for (int64_t p = end; p < (computed > last + reach ? computed : last + reach); ++p) m[p] = 0;
    }
    for (int64_t p = first; p < last; p += kLanes<T>) {
      // A last partial vector spills into the next strip's part or the margin, both written later.
      store<T>(to.map[kForget] + p, load<T>(maps + p));
      store<T>(to.map[kMix3] + p, gather_taps<T, kMix3>(call, maps, strip.pitch, p));
      store<T>(to.map[kMix5] + p, gather_taps<T, kMix5>(call, maps, strip.pitch, p));
    }
  }
}

// In place: probabilities over the first n elements; the rest of the last vector becomes zero.
template <typename T>
void softmax(T* x, int64_t n) {
  const int64_t length = round_up<T>(n);
  for (int64_t i = n; i < length; ++i) x[i] = -INFINITY;
  Vec<T> best = load<T>(x);
  for (int64_t i = kLanes<T>; i < length; i += kLanes<T>) best = maximum<T>(best, load<T>(x + i));
  const Vec<T> top = splat<T>(max_lanes<T>(best));
  Vec<T> sum{};
  for (int64_t i = 0; i < length; i += kLanes<T>) {
    const Vec<T> e = exp(load<T>(x + i) - top);
    store<T>(x + i, e);
    sum += e;
  }
  const Vec<T> inverse = splat<T>(1 / sum_lanes<T>(sum));
  for (int64_t i = 0; i < length; i += kLanes<T>) store<T>(x + i, load<T>(x + i) * inverse);
}

// to[k * kChunk + i] = map[q - o_k], q = begin + i, where q - o_k lies inside the image, else 0.
template <typename T, int Branch>
void shift_chunk(const Call<T>& call, const T* map, int64_t begin, int64_t end, T* to) {
#pragma GCC unroll 9
  for (int k = 0; k < kTaps; ++k) {
    const Tap o = tap(Branch, k);
    const T* from = map - (o.dy * call.sizes.width + o.dx);
    const T* mask = call.column_mask[2 - o.dx];
    for (int64_t q = begin; q < end; q += kLanes<T>) {
      const Vec<T> v = load<T>(from + q);
      store<T>(to + k * kChunk + q - begin, o.dx == 0 ? v : v * load<T>(mask + q));
    }
    // Past the image u is padded with zeros, of which BN makes something else.
    for (int64_t i = end - begin; i < round_up<T>(end - begin); ++i) to[k * kChunk + i] = 0;
  }
}

// Sums per channel as vectors whose lanes are still to be added: [c][branch].
template <typename T>
using LaneSums = Vec<T> (*)[kNumBranches];

// Adds a chunk's part of c_f, c_3 and c_5; shifted holds 9 + 9 maps of kChunk, the mask of zeros is in them.
template <typename T>
void pool_chunk(const Call<T>& call, const Image<const T>& u, const T* forget, const T* shifted, int64_t begin,
                int64_t end, LaneSums<T> sums) {
  for (int64_t c = 0; c < call.sizes.channels; ++c) {
    const Channel<T>& channel = call.channels[c];
    Vec<T> pooled{}, g3[kTaps] = {}, g5[kTaps] = {};
    for (int64_t q = begin; q < end; q += kLanes<T>) {
      const T* weights = shifted + q - begin;
      const Vec<T> x = load<T>(u.row(c) + q);
      const Vec<T> r3 = relu<T>(x * channel.scale[0] + channel.shift[0]);
      const Vec<T> r5 = relu<T>(x * channel.scale[1] + channel.shift[1]);
      pooled += x * load<T>(forget + q);
#pragma GCC unroll 9
      for (int k = 0; k < kTaps; ++k) {
        g3[k] += r3 * load<T>(weights + k * kChunk);
        g5[k] += r5 * load<T>(weights + (kTaps + k) * kChunk);
      }
    }
    Vec<T> sum3{}, sum5{};
#pragma GCC unroll 9
    for (int k = 0; k < kTaps; ++k) {
      sum3 += g3[k] * channel.kernel[0][k];
      sum5 += g5[k] * channel.kernel[1][k];
    }
    sums[c][kForget] += pooled;
    sums[c][kMix3] += sum3;
    sums[c][kMix5] += sum5;
  }
}

// Adds up the lanes of sums[c][b] into to[b][c] for every channel, kLanes sums at a time.
template <typename T>
void finish_sums(const LaneSums<T> sums, int64_t channels, int64_t to_pitch, T* to) {
  constexpr int kL = kLanes<T>;
  for (int b = 0; b < kNumBranches; ++b) {
    for (int64_t c = 0; c < channels; c += kL) {
      Vec<T> v[kL];
      for (int i = 0; i < kL; ++i) v[i] = c + i < channels ? sums[c + i][b] : Vec<T>{};
      store<T>(to + b * to_pitch + c, sum_lanes_of_each<T>(v));
    }
  }
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
