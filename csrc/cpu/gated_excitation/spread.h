// Backward pass of one image behind the gates: gradients of the position logits, of u, and of the parameters of the
// three poolings and both branches.
#pragma once

#include "cpu/gated_excitation/gate_gradients.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// Sums over positions and images that one thread collects for one channel; lanes are added up at the end.
template <typename T>
struct ChannelSums {
  Vec<T> forget_context;  // dw_f
  Vec<T> context[2];      // dw_3, dw_5
  Vec<T> norm_bias[2], norm_weight[2];
  Vec<T> kernel[2][kTaps];
};

// Depthwise maps of one image up to this size are one strip, in the second-level cache: they are needed before and
// after the sum over all positions that the logits' gradients contain, and larger ones are computed twice.
constexpr int64_t kWholeBytes = 256 * 1024;
constexpr int64_t kChunk = 1024;  // positions whose probabilities and logit gradients stay in the first-level cache

// Three maps of one value per position (branches forget, 3, 5), zero past the image.
template <typename T>
struct PositionMaps {
  T* map[kNumBranches];
  void carve(Arena& arena, const Sizes& s) {
    for (T*& m : map) m = arena.take<T>(round_up<T>(s.positions()));
  }
  void clear_ends(const Sizes& s) const {
    for (T* m : map) std::memset(m + s.positions(), 0, (round_up<T>(s.positions()) - s.positions()) * sizeof(T));
  }
};

// Gradients of one branch's depthwise maps for a chunk of kGroup channels, with what the taps reach around it.
template <typename T>
struct MapGradients {
  T* data;
  int64_t pitch;
  static int64_t margin(const Sizes& s) { return round_up<T>(2 * s.width) + kLanes<T>; }
  void carve(Arena& arena, const Sizes& s) {
    pitch = (s.positions() < kChunk ? round_up<T>(s.positions()) : kChunk) + 2 * margin(s);
    data = arena.take<T>(kGroup * pitch);
  }
  // Of channel i of the group; [q] stands for position q of a chunk that begins at `begin`.
  T* row(const Sizes& s, int64_t i, int64_t begin) const { return data + i * pitch + margin(s) - begin; }
  void clear_outside(const Sizes& s, int64_t begin, int64_t end) const {
    for (int64_t i = 0; i < kGroup; ++i) {
      clear(row(s, i, begin), begin - margin(s), 0);
      clear(row(s, i, begin), round_up<T>(s.positions()), end + margin(s));
    }
  }
};

template <typename T>
struct BackwardScratch {
  T *image, *grad, *result;
  PositionMaps<T> position, logit;
  MapGradients<T> maps;
  Strip<T> strip;
  void carve(Arena& arena, const Call<T>& call) {
    const Sizes& s = call.sizes;
    image = arena.take<T>(s.channels * call.pitch);
    grad = arena.take<T>(s.channels * call.pitch);
    result = arena.take<T>(s.channels * call.pitch);
    position.carve(arena, s);
    logit.carve(arena, s);
    maps.carve(arena, s);
    strip.carve(arena, s, kWholeBytes);
  }
};

// Gradients of the position logits: dl = pi (d - dot), d = sum_c dc[c] x[c, p], dot = sum_p pi d. An error of dot is
// one of every dl, and the gradients of the logits' weight add those up.
template <typename T>
void logit_gradients(const T* probability, T* logit, int64_t pitch) {
  const T total = sum_and_dot(logit, probability, pitch).second;
  for (int64_t p = 0; p < pitch; p += kLanes<T>) {
    store<T>(logit + p, load<T>(probability + p) * (load<T>(logit + p) - total));
  }
}

// sums[c].context[B] += sum_i dl[i] maps[c * pitch + i], the gradient of the logits' weight, of one strip; kBlock
// positions at once, for accuracy: dl adds up to zero.
template <typename T, int B>
void add_context(const Strip<T>& strip, int64_t channels, const T* logit, int64_t count, ChannelSums<T>* sums) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store<T>(strip.weights + i, load_first<T>(logit + i, count - i));
  const auto add = [&](auto width, int64_t c) {
    constexpr int kChannels = decltype(width)::value;
    Vec<T> sum[kChannels] = {};
    for (int64_t i = 0; i < count; i += kBlock) {
      pool_channels<T, kChannels>(strip.maps + c * strip.pitch + i, strip.pitch, strip.weights + i,
                                  count - i < kBlock ? count - i : kBlock, sum, i == 0, 1);
    }
    for (int k = 0; k < kChannels; ++k) sums[c + k].context[B] += sum[k];
  };
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4) add(std::integral_constant<int, 4>{}, c);
  for (; c < channels; ++c) add(std::integral_constant<int, 1>{}, c);
}

// Gradients of branch B's position logits, and of their weight.
template <typename T, int B>
void branch_logit_gradients(const Call<T>& call, const Image<const T>& u, const T* grad_pooled,
                            const BackwardScratch<T>& scratch, ChannelSums<T>* sums) {
  const Strip<T>& strip = scratch.strip;
  const int64_t channels = call.sizes.channels;
  const T* probability = scratch.position.map[kMix3 + B];
  T* logit = scratch.logit.map[kMix3 + B];
  const bool whole = strip.rows == call.sizes.height;
  const auto context = [&](int64_t first, int64_t count) {
    add_context<T, B>(strip, channels, logit + first, count, sums);
  };
  for_each_strip<T, B>(call, u, strip, [&](int64_t first, int64_t count) {
    combine(strip.maps, strip.pitch, channels, grad_pooled, count, strip.weights);
    std::memcpy(logit + first, strip.weights, count * sizeof(T));
    if (!whole) return;
    logit_gradients(probability, logit, call.pitch);
    context(first, count);
  });
  if (whole) return;
  logit_gradients(probability, logit, call.pitch);
  for_each_strip<T, B>(call, u, strip, context);
}

// Position maps of one image: saved probabilities, and gradients of the logits.
template <typename T>
void position_gradients(const Call<T>& call, int64_t n, const Image<const T>& u, const GateGradients<T>& g,
                        const BackwardScratch<T>& scratch, ChannelSums<T>* sums) {
  const Sizes& s = call.sizes;
  const int64_t positions = s.positions();
  const T* saved = static_cast<const T*>(call.args.position) + n * kNumBranches * positions;
  for (int b = 0; b < kNumBranches; ++b) {
    std::memcpy(scratch.position.map[b], saved + b * positions, positions * sizeof(T));
  }
  combine(u.data, u.pitch, s.channels, g.added, positions, scratch.logit.map[kForget]);
  scratch.position.clear_ends(s);
  scratch.logit.clear_ends(s);
  logit_gradients(scratch.position.map[kForget], scratch.logit.map[kForget], call.pitch);
  branch_logit_gradients<T, 0>(call, u, g.mix, scratch, sums);
  branch_logit_gradients<T, 1>(call, u, g.mix + call.channel_pitch, scratch, sums);
}

// du = f dout + pi_f dc_f + dl_f w_f for a chunk of one channel, and its part of dw_f.
template <typename T>
void spread_forget(const T* u, const T* grad, const T* probability, const T* logit, T f, T pooled, T context,
                   int64_t count, T* du, Vec<T>& sum) {
  Vec<T> total{};
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> dl = load<T>(logit + i);
    total += dl * load<T>(u + i);
    store<T>(du + i, load<T>(grad + i) * f + load<T>(probability + i) * pooled + dl * context);
  }
  sum += total;
}

// to[q] = pooled pi[q] + context dl[q], the gradient of one channel's depthwise map, for whole vectors of [begin, end).
template <typename T>
void map_gradient(const T* probability, const T* logit, T pooled, T context, int64_t begin, int64_t end, T* to) {
  for (int64_t q = begin; q < end; q += kLanes<T>) {
    store<T>(to + q, load<T>(probability + q) * pooled + load<T>(logit + q) * context);
  }
}

// What the vector of positions at q contributes to itself and to its neighbours in `spread_branch`.
template <typename T>
struct SpreadVector {
  Vec<T> above, here, below;  // da one row of taps above, at q, and below
  ColumnSums<T> sums;
  Vec<T> centred, r;
};

// One channel of one branch.
template <typename T, int B>
struct BranchSpread {
  static constexpr int kDilation = B + 1;
  const Call<T>& call;
  const Channel<T>& channel;
  const T *u, *map_gradient;  // of the whole image; [q] as in MapGradients
  Vec<T> taps[kTaps];         // the kernel, turned around

  BranchSpread(const Call<T>& c, const Channel<T>& one, const T* x, const T* gradient)
      : call(c), channel(one), u(x), map_gradient(gradient) {
#pragma GCC unroll 9
    for (int k = 0; k < kTaps; ++k) taps[k] = splat<T>(channel.kernel[B][kTaps - 1 - k]);
  }

  SpreadVector<T> at(int64_t q) const {
    const int64_t row = kDilation * call.sizes.width, left = call.sizes.positions() - q;
    SpreadVector<T> v{};
    if (left <= 0 || q < 0) return v;
    v.above = load_once<T>(map_gradient + q - row);
    v.here = load_once<T>(map_gradient + q);
    v.below = load_once<T>(map_gradient + q + row);
    v.sums = {v.above * taps[0] + v.here * taps[3] + v.below * taps[6],
              v.above * taps[1] + v.here * taps[4] + v.below * taps[7],
              v.above * taps[2] + v.here * taps[5] + v.below * taps[8]};
    v.centred = load<T>(u + q) - channel.mean[B];
    v.r = relu<T>(v.centred * channel.scale[B] + channel.bias[B]);
    // Past the image u is padded with zeros, of which BN makes something else.
    if (left < kLanes<T>) v.r = first_lanes<T>(v.r, left);
    return v;
  }

  // Adds the branch's part of du (before the batch's correction) at [begin, end) and its sums over these positions:
  // dr[q] = sum_k K_k da[q - o_k] is a depthwise map of da with the kernel turned around, and
  // dK_k = sum_q da[q - dy] r[q + dx] with o_k = dy + dx, so that r alone is shifted along the row.
  void run(int64_t begin, int64_t end, T* du, ChannelSums<T>& to) const {
    const LaneMask<T>*inside_left = call.column_mask[2 - kDilation], *inside_right = call.column_mask[2 + kDilation];
    Vec<T> kernel[kTaps] = {}, bias{}, weight{};
    SpreadVector<T> before = at(begin - kLanes<T>), now = at(begin);
    for (int64_t q = begin; q < end; q += kLanes<T>) {
      const SpreadVector<T> after = at(q + kLanes<T>);
      const Vec<T> dr = now.sums.centre +
                        keep<T>(shifted_up<T, kDilation>(before.sums.left, now.sums.left), inside_left + q) +
                        keep<T>(shifted_down<T, kDilation>(now.sums.right, after.sums.right), inside_right + q);
      const Vec<T> left = keep<T>(shifted_up<T, kDilation>(before.r, now.r), inside_left + q);
      const Vec<T> right = keep<T>(shifted_down<T, kDilation>(now.r, after.r), inside_right + q);
      const Vec<T> rows[3] = {now.below, now.here, now.above};
#pragma GCC unroll 3
      for (int dy = 0; dy < 3; ++dy) {
        kernel[3 * dy] += rows[dy] * left;
        kernel[3 * dy + 1] += rows[dy] * now.r;
        kernel[3 * dy + 2] += rows[dy] * right;
      }
      const Vec<T> zero{}, g = now.r > zero ? dr : zero;
      bias += g;
      weight += g * now.centred;
      store<T>(du + q, load<T>(du + q) + g * channel.scale[B]);
      before = now;
      now = after;
    }
    to.norm_bias[B] += bias;
    to.norm_weight[B] += weight * channel.inverse[B];
#pragma GCC unroll 9
    for (int k = 0; k < kTaps; ++k) to.kernel[B][k] += kernel[k];
  }
};

// One branch of the channels [group, stop) in the chunk [begin, end) of an image.
template <typename T, int B>
void spread_group(const Call<T>& call, const Image<const T>& u, const GateGradients<T>& g,
                  const BackwardScratch<T>& scratch, int64_t group, int64_t stop, int64_t begin, int64_t end,
                  const Image<T>& du, ChannelSums<T>* sums) {
  const Sizes& s = call.sizes;
  const T* context = call.parameters[B ? kContext5Weight : kContext3Weight];
  const int64_t reach = MapGradients<T>::margin(s), length = round_up<T>(s.positions());
  const int64_t from = begin > reach ? begin - reach : 0, until = end + reach < length ? end + reach : length;
  for (int64_t c = group; c < stop; ++c) {
    map_gradient(scratch.position.map[kMix3 + B], scratch.logit.map[kMix3 + B], g.mix[B * call.channel_pitch + c],
                 context[c], from, until, scratch.maps.row(s, c - group, begin));
  }
  for (int64_t c = group; c < stop; ++c) {
    const BranchSpread<T, B> branch(call, call.channels[c], u.row(c), scratch.maps.row(s, c - group, begin));
    branch.run(begin, end, du.row(c), sums[c]);
  }
}

// du of one image before the correction for batch statistics.
template <typename T>
void spread_image(const Call<T>& call, const Image<const T>& u, const Image<const T>& grad, const GateGradients<T>& g,
                  const BackwardScratch<T>& scratch, const Image<T>& du, ChannelSums<T>* sums) {
  const Sizes& s = call.sizes;
  const T* context = call.parameters[kForgetContextWeight];
  for (int64_t begin = 0; begin < s.positions(); begin += kChunk) {
    const int64_t end = begin + kChunk < s.positions() ? begin + kChunk : s.positions();
    scratch.maps.clear_outside(s, begin, end);
    for (int64_t group = 0; group < s.channels; group += kGroup) {
      const int64_t stop = group + kGroup < s.channels ? group + kGroup : s.channels;
      for (int64_t c = group; c < stop; ++c) {
        spread_forget(u.row(c) + begin, grad.row(c) + begin, scratch.position.map[kForget] + begin,
                      scratch.logit.map[kForget] + begin, g.forget[c], g.added[c], context[c], end - begin,
                      du.row(c) + begin, sums[c].forget_context);
      }
      spread_group<T, 0>(call, u, g, scratch, group, stop, begin, end, du, sums);
      spread_group<T, 1>(call, u, g, scratch, group, stop, begin, end, du, sums);
    }
  }
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
