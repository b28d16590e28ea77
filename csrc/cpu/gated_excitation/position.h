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

// Sums over channels, one per tap of branch B, of Vectors vectors of positions from q on; with branch 3 comes the
// forget logit. Two vectors share every broadcast weight, which makes the additions and not the loads the limit.
template <typename T, int B, int Vectors>
void project_vectors(const Call<T>& call, const Image<const T>& u, const ProjectionWeights<T>* weights, int64_t q,
                     T* maps, int64_t pitch) {
  Vec<T> forget[Vectors] = {}, sum[kTaps][Vectors] = {};
  for (int64_t c = 0; c < call.sizes.channels; ++c) {
    const Channel<T>& channel = call.channels[c];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      const Vec<T> x = load<T>(u.row(c) + q + v * kLanes<T>);
      const Vec<T> r = relu<T>(x * channel.scale[B] + channel.shift[B]);
      if (B == 0) forget[v] += x * weights[c].forget;
#pragma GCC unroll 9
      for (int k = 0; k < kTaps; ++k) sum[k][v] += r * weights[c].mix[B][k];
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < Vectors; ++v) {
    T* to = maps + q + v * kLanes<T>;
    if (B == 0) store<T>(to, forget[v]);
#pragma GCC unroll 9
    for (int k = 0; k < kTaps; ++k) store<T>(to + (1 + B * kTaps + k) * pitch, sum[k][v]);
  }
}

// maps[j * pitch + q], j < kMaps, for the vectors that cover positions [begin, end).
template <typename T>
void project(const Call<T>& call, const Image<const T>& u, const ProjectionWeights<T>* weights, int64_t begin,
             int64_t end, T* maps, int64_t pitch) {
  int64_t q = begin;
  for (; q + kLanes<T> < end; q += 2 * kLanes<T>) {
    project_vectors<T, 0, 2>(call, u, weights, q, maps, pitch);
    project_vectors<T, 1, 2>(call, u, weights, q, maps, pitch);
  }
  if (q < end) {
    project_vectors<T, 0, 1>(call, u, weights, q, maps, pitch);
    project_vectors<T, 1, 1>(call, u, weights, q, maps, pitch);
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

// x[begin .. end) = 0, and up to a vector more.
template <typename T>
void clear(T* x, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; p += kLanes<T>) store<T>(x + p, Vec<T>{});
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
    for (int j = 1; j < kMaps; ++j) clear(maps + j * strip.pitch, origin, 0);
    int64_t p = first;
    for (int64_t q = begin; q < end; q += kChunk) {
      const int64_t projected = q + kChunk < end ? q + kChunk : end;
      project(call, u, weights, q, projected, maps, strip.pitch);
      if (projected == end) {
        for (int j = 1; j < kMaps; ++j) clear(maps + j * strip.pitch, end, last + reach);
      }
      // What the taps reach is in the first-level cache now. A last partial vector spills into the next strip's part
      // or the margin, both written later.
      const int64_t ready = projected == end ? last : projected - reach - kLanes<T>;
      for (; p < ready; p += kLanes<T>) {
        store<T>(to.map[kForget] + p, load<T>(maps + p));
        store<T>(to.map[kMix3] + p, gather_taps<T, kMix3>(call, maps, strip.pitch, p));
        store<T>(to.map[kMix5] + p, gather_taps<T, kMix5>(call, maps, strip.pitch, p));
      }
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

// sum_k g[k] kernel[k] in three independent chains.
template <typename T>
Vec<T> weigh_taps(const Vec<T> (&g)[kTaps], const T* kernel) {
  Vec<T> sum[3];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) sum[i] = g[i] * kernel[i] + g[3 + i] * kernel[3 + i] + g[6 + i] * kernel[6 + i];
  return sum[0] + sum[1] + sum[2];
}

// Adds a chunk's part of branch B's pooled vector, and with branch 3 of c_f, for Channels channels from c on, which
// share every load of a shifted probability.
template <typename T, int B, int Channels>
void pool_channels(const Call<T>& call, const Image<const T>& u, int64_t c, const T* forget, const T* shifted,
                   int64_t begin, int64_t end, LaneSums<T> sums) {
  const Channel<T>* channel = call.channels + c;
  Vec<T> pooled[Channels] = {}, g[Channels][kTaps] = {};
  for (int64_t q = begin; q < end; q += kLanes<T>) {
    Vec<T> r[Channels];
#pragma GCC unroll 2
    for (int i = 0; i < Channels; ++i) {
      const Vec<T> x = load<T>(u.row(c + i) + q);
      r[i] = relu<T>(x * channel[i].scale[B] + channel[i].shift[B]);
      if (B == 0) pooled[i] += x * load<T>(forget + q);
    }
#pragma GCC unroll 9
    for (int k = 0; k < kTaps; ++k) {
      const Vec<T> probability = load<T>(shifted + k * kChunk + q - begin);
#pragma GCC unroll 2
      for (int i = 0; i < Channels; ++i) g[i][k] += r[i] * probability;
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < Channels; ++i) {
    // The first chunk writes, so that nothing has to be cleared before it.
    const Vec<T> zero{}, mixed = weigh_taps<T>(g[i], channel[i].kernel[B]);
    if (B == 0) sums[c + i][kForget] = pooled[i] + (begin == 0 ? zero : sums[c + i][kForget]);
    sums[c + i][kMix3 + B] = mixed + (begin == 0 ? zero : sums[c + i][kMix3 + B]);
  }
}

// Adds a chunk's part of c_f, c_3 and c_5; shifted holds 9 + 9 maps of kChunk.
template <typename T>
void pool_chunk(const Call<T>& call, const Image<const T>& u, const T* forget, const T* shifted, int64_t begin,
                int64_t end, LaneSums<T> sums) {
  const T* shifted5 = shifted + kTaps * kChunk;
  int64_t c = 0;
  for (; c + 1 < call.sizes.channels; c += 2) {
    pool_channels<T, 0, 2>(call, u, c, forget, shifted, begin, end, sums);
    pool_channels<T, 1, 2>(call, u, c, forget, shifted5, begin, end, sums);
  }
  if (c < call.sizes.channels) {
    pool_channels<T, 0, 1>(call, u, c, forget, shifted, begin, end, sums);
    pool_channels<T, 1, 1>(call, u, c, forget, shifted5, begin, end, sums);
  }
}

// Adds up the lanes of sums[c][b] into to[b][c] for every channel, kLanes sums at a time.
template <typename T>
void finish_sums(const LaneSums<T> sums, int64_t channels, int64_t to_pitch, T* to) {
  constexpr int kL = kLanes<T>;
  for (int b = 0; b < kNumBranches; ++b) {
    for (int64_t c = 0; c < channels; c += kL) {
      Vec<T> v[kL];
#pragma GCC unroll 16
      for (int i = 0; i < kL; ++i) v[i] = c + i < channels ? sums[c + i][b] : Vec<T>{};
      store<T>(to + b * to_pitch + c, sum_lanes_of_each<T>(v));
    }
  }
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
