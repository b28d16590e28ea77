// Backward pass: gates over the batch, then one sweep over the images, then the correction for batch statistics.
#pragma once

#include "cpu/gated_excitation/forward.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// Per-image vectors of the gates' backward pass, kept for the whole batch: the weight gradients are sums over images of
// outer products of these.
template <typename T>
struct GateGradients {
  T *forget, *added;          // f; dn, later dc_f
  T *forget_logit, *select;   // d(W2 y), d(W3 t) = -d(W5 t)
  T *active, *both, *pooled;  // [y | t], [c_3; c_5], c_f
  T* hidden;                  // d(BN1d output), later d(hidden)
  T* mix;                     // dc_3, dc_5: 2 x round_up(C)
  void carve(Arena& arena, const Call<T>& call, int64_t batch) {
    const int64_t c = call.channel_pitch;
    forget = arena.take<T>(batch * c);
    added = arena.take<T>(batch * c);
    forget_logit = arena.take<T>(batch * c);
    select = arena.take<T>(batch * c);
    pooled = arena.take<T>(batch * c);
    mix = arena.take<T>(batch * 2 * c);
    both = arena.take<T>(batch * round_up<T>(2 * call.sizes.channels));
    active = arena.take<T>(batch * call.hidden_pitch);
    hidden = arena.take<T>(batch * call.hidden_pitch);
  }
  GateGradients of_image(const Call<T>& call, int64_t n) const {
    const int64_t c = call.channel_pitch, h = call.hidden_pitch;
    return {forget + n * c, added + n * c,  forget_logit + n * c,
            select + n * c, active + n * h, both + n * round_up<T>(2 * call.sizes.channels),
            pooled + n * c, hidden + n * h, mix + n * 2 * c};
  }
};

// to[0 .. round_up(columns)) = sum_i W[i][.] x[i], rows of W contiguous; zero past the columns.
template <typename T>
void transposed_product(const T* w, const T* x, int64_t rows, int64_t columns, T* to) {
  constexpr int kChains = 4;
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    const int64_t count = columns - j;
    const auto term = [&](int64_t i) { return load_first<T>(w + i * columns + j, count) * x[i]; };
    Vec<T> sum[kChains] = {};
    int64_t i = 0;
    for (; i + kChains <= rows; i += kChains) {
#pragma GCC unroll 4
      for (int k = 0; k < kChains; ++k) sum[k] += term(i + k);
    }
    for (; i < rows; ++i) sum[0] += term(i);
    store<T>(to + j, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

// sum_p x[p] and sum_p x[p] y[p] for whole vectors of positions, in several chains: one would wait for itself.
template <typename T>
std::pair<T, T> block_sum_and_dot(const T* x, const T* y, int64_t length) {
  constexpr int kChains = 4;
  constexpr int64_t kStep = kChains * kLanes<T>;
  Vec<T> sum[kChains] = {}, dot[kChains] = {};
  int64_t p = 0;
  for (; p + kStep <= length; p += kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      const Vec<T> v = load<T>(x + p + i * kLanes<T>);
      sum[i] += v;
      dot[i] += v * load<T>(y + p + i * kLanes<T>);
    }
  }
  for (; p < length; p += kLanes<T>) {
    sum[0] += load<T>(x + p);
    dot[0] += load<T>(x + p) * load<T>(y + p);
  }
  return {sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3])), sum_lanes<T>((dot[0] + dot[1]) + (dot[2] + dot[3]))};
}

// The same over any number of blocks, whose sums are added up in double precision: the gates' gradients are what is
// left of a cancellation between these sums.
template <typename T>
std::pair<T, T> sum_and_dot(const T* x, const T* y, int64_t length) {
  double sum = 0, dot = 0;
  for (int64_t p = 0; p < length; p += kBlock) {
    const auto [s, d] = block_sum_and_dot(x + p, y + p, length - p < kBlock ? length - p : kBlock);
    sum += s;
    dot += d;
  }
  return {static_cast<T>(sum), static_cast<T>(dot)};
}

// dn = sum_p dout and df = sum_p dout u of one image, then back through the gates up to the BN1d outputs; `select` is
// W3 - W5.
template <typename T>
void gate_gradients(const Call<T>& call, const T* select, const Image<const T>& u, const Image<const T>& grad,
                    const GateVectors<T>& v, const GateGradients<T>& g) {
  const Sizes& s = call.sizes;
  const int64_t pitch = call.channel_pitch;
  T* grad_hidden = g.hidden;
  for (int64_t c = 0; c < s.channels; ++c) {
    const auto [sum, dot] = sum_and_dot(grad.row(c), u.row(c), call.pitch);
    const T dn = sum, f = v.forget[c], alpha = v.alpha[c];
    const T difference = v.pooled[kMix3 * pitch + c] - v.pooled[kMix5 * pitch + c];
    g.added[c] = dn;
    g.forget_logit[c] = dot * f * (1 - f);
    g.select[c] = dn * difference * alpha * (1 - alpha);
    g.mix[c] = alpha * dn;
    g.mix[pitch + c] = (1 - alpha) * dn;
  }
  std::memcpy(g.forget, v.forget, pitch * sizeof(T));
  std::memcpy(g.pooled, v.pooled, pitch * sizeof(T));
  std::memcpy(g.both, v.both, 2 * s.channels * sizeof(T));
  std::memcpy(g.active, v.active, call.hidden_pitch * sizeof(T));
  transposed_product(call.parameters[kForget2Weight], g.forget_logit, s.channels, s.forget, grad_hidden);
  transposed_product(select, g.select, s.channels, s.attention, grad_hidden + call.forget_pitch);
  for (int64_t i = 0; i < call.hidden_pitch; ++i) grad_hidden[i] *= 1 - v.active[i] * v.active[i];
}

// Places of the parameters' gradients in the flat gradient.
template <typename T>
struct ParameterGradients {
  T* at[kNumParameters];
  explicit ParameterGradients(const Call<T>& call) {
    T* next = static_cast<T*>(call.args.grad_parameters);
    for (int k = 0; k < kNumParameters; ++k) {
      at[k] = next;
      next += parameter_numel(k, call.sizes);
    }
  }
};

// One of the two BN1d: its units' place in a padded hidden vector and in the unpadded order.
template <typename T>
struct HiddenNorm {
  int64_t place, first, units;
  const double *mean, *inverse;
  const T* weight;
  T *grad_bias, *grad_weight, *grad_linear_bias;
};

// Backward of one BN1d over the whole batch: d(BN1d output) becomes d(hidden) in place.
template <typename T>
void hidden_norm_gradients(const Call<T>& call, const GateGradients<T>& all, const HiddenNorm<T>& norm) {
  const int64_t batch = call.sizes.batch, units = norm.units;
  const T* hidden = static_cast<const T*>(call.args.hidden) + norm.first;
  double* __restrict sums = shared<double>(call.host, 3 * units);
  double* __restrict dots = sums + units, * __restrict totals = dots + units;
  std::memset(sums, 0, 3 * units * sizeof(double));
  for (int64_t n = 0; n < batch; ++n) {
    const T *grad = all.hidden + n * call.hidden_pitch + norm.place, *x = hidden + n * call.sizes.hidden();
    for (int64_t j = 0; j < units; ++j) {
      sums[j] += grad[j];
      dots[j] += grad[j] * (x[j] - norm.mean[j]) * norm.inverse[j];
    }
  }
  const double share = call.args.training ? 1.0 / batch : 0;
  for (int64_t n = 0; n < batch; ++n) {
    T* __restrict grad = all.hidden + n * call.hidden_pitch + norm.place;
    const T* x = hidden + n * call.sizes.hidden();
    for (int64_t j = 0; j < units; ++j) {
      const double xhat = (x[j] - norm.mean[j]) * norm.inverse[j];
      const double d = (grad[j] - (sums[j] + xhat * dots[j]) * share) * (norm.weight[j] * norm.inverse[j]);
      totals[j] += d;
      grad[j] = static_cast<T>(d);
    }
  }
  for (int64_t j = 0; j < units; ++j) {
    norm.grad_bias[j] = static_cast<T>(sums[j]);
    norm.grad_weight[j] = static_cast<T>(dots[j]);
    norm.grad_linear_bias[j] = static_cast<T>(totals[j]);
  }
}

// Both BN1d. Mean and inverse standard deviation are taken from the batch itself where its statistics are used: rounded
// to T they would dominate the error, since a small batch's gradient is what is left of a cancellation.
template <typename T>
void hidden_norm_gradients(const Call<T>& call, const GateGradients<T>& all, const ParameterGradients<T>& to) {
  const Sizes& s = call.sizes;
  double *mean = shared<double>(call.host, s.hidden()), *inverse = shared<double>(call.host, s.hidden());
  if (call.args.training) hidden_moments(call, mean, inverse);
  for (int64_t j = 0; j < s.hidden(); ++j) {
    if (!call.args.training) {
      const HiddenUnit<T> unit = hidden_unit(call, j);
      mean[j] = unit.mean;
      inverse[j] = unit.var;
    }
    inverse[j] = 1 / std::sqrt(inverse[j] + call.args.eps);
  }
  hidden_norm_gradients(call, all,
                        {0, 0, s.forget, mean, inverse, call.parameters[kForgetNormWeight], to.at[kForgetNormBias],
                         to.at[kForgetNormWeight], to.at[kForget1Bias]});
  hidden_norm_gradients(
      call, all,
      {call.forget_pitch, s.forget, s.attention, mean + s.forget, inverse + s.forget,
       call.parameters[kAttentionNormWeight], to.at[kAttentionNormBias], to.at[kAttentionNormWeight], to.at[kAllBias]});
}

// weight[i][j] = sum_n rows[n][i] columns[n][j], images in order; columns are readable up to whole vectors.
template <typename T>
struct OuterProducts {
  const T *rows, *columns;
  int64_t row_pitch, column_pitch, num_rows, num_columns;
  T* weight;
  T* negative = nullptr;  // receives -weight unless null

  static constexpr int kRows = 8;  // rows that share every load of a column, and chains of additions
  int64_t blocks() const { return (num_rows + kRows - 1) / kRows; }
  void run(int64_t batch, int64_t block) const {
    const int64_t first = block * kRows, last = num_rows - 1;
    int64_t row[kRows];
    for (int k = 0; k < kRows; ++k) row[k] = first + k < last ? first + k : last;
    for (int64_t j = 0; j < num_columns; j += kLanes<T>) {
      Vec<T> sum[kRows] = {};
      for (int64_t n = 0; n < batch; ++n) {
        const Vec<T> column = load<T>(columns + n * column_pitch + j);
#pragma GCC unroll 8
        for (int k = 0; k < kRows; ++k) sum[k] += column * rows[n * row_pitch + row[k]];
      }
      const int64_t count = num_columns - j < kLanes<T> ? num_columns - j : kLanes<T>;
#pragma GCC unroll 8
      for (int k = 0; k < kRows; ++k) {
        if (first + k > last) continue;
        store_partial(weight + row[k] * num_columns + j, sum[k], count);
        if (negative) store_partial(negative + row[k] * num_columns + j, -sum[k], count);
      }
    }
  }
};

// to[c] = sum_n x[n][c], rows of x padded to whole vectors.
template <typename T>
void sum_over_images(const Call<T>& call, const T* x, T* to, T* negative) {
  for (int64_t c = 0; c < call.sizes.channels; c += kLanes<T>) {
    Vec<T> sum{};
    for (int64_t n = 0; n < call.sizes.batch; ++n) sum += load<T>(x + n * call.channel_pitch + c);
    const int64_t left = call.sizes.channels - c, count = left < kLanes<T> ? left : kLanes<T>;
    store_partial(to + c, sum, count);
    if (negative) store_partial(negative + c, -sum, count);
  }
}

template <typename T>
void gate_weight_gradients(const Call<T>& call, const GateGradients<T>& all, const ParameterGradients<T>& to) {
  const Sizes& s = call.sizes;
  const int64_t c = call.channel_pitch, h = call.hidden_pitch, f = call.forget_pitch;
  const OuterProducts<T> products[] = {
      {all.forget_logit, all.active, c, h, s.channels, s.forget, to.at[kForget2Weight]},
      {all.hidden, all.pooled, h, c, s.forget, s.channels, to.at[kForget1Weight]},
      {all.select, all.active + f, c, h, s.channels, s.attention, to.at[kSelect3Weight], to.at[kSelect5Weight]},
      {all.hidden + f, all.both, h, round_up<T>(2 * s.channels), s.attention, 2 * s.channels, to.at[kAllWeight]},
  };
  int64_t most = 0;
  for (const auto& product : products) most = most < product.blocks() ? product.blocks() : most;
  // A task is one block of every product, so that tasks take nearly the same time.
  parallel(call.host, most, [&](int64_t task) {
    for (const auto& product : products) {
      for (int64_t b = split(product.blocks(), most, task); b < split(product.blocks(), most, task + 1); ++b) {
        product.run(s.batch, b);
      }
    }
  });
  sum_over_images<T>(call, all.forget_logit, to.at[kForget2Bias], nullptr);
  sum_over_images<T>(call, all.select, to.at[kSelect3Bias], to.at[kSelect5Bias]);
}

// Sums over positions and images that one thread collects for one channel; lanes are added up at the end.
template <typename T>
struct ChannelSums {
  Vec<T> forget_context;  // dw_f
  Vec<T> context[2];      // dw_3, dw_5
  Vec<T> norm_bias[2], norm_weight[2];
  Vec<T> kernel[2][kTaps];
};

constexpr int64_t kChunk = 256;  // positions whose shifted probabilities stay in the first-level cache

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

template <typename T>
struct BackwardScratch {
  T *image, *grad, *result;
  T* shifted;  // [branch][probability, logit gradient][tap][kChunk]
  PositionMaps<T> position, logit;
  Strip<T> strip;
  void carve(Arena& arena, const Call<T>& call) {
    const Sizes& s = call.sizes;
    image = arena.take<T>(s.channels * call.pitch);
    grad = arena.take<T>(s.channels * call.pitch);
    result = arena.take<T>(s.channels * call.pitch);
    shifted = arena.take<T>(4 * kTaps * kChunk);
    position.carve(arena, s);
    logit.carve(arena, s);
    strip.carve(arena, s);
  }
};

struct Tap {
  int dy, dx;
};

// Offset of tap k in a 3x3 window of dilation 1 (branch kMix3) or 2 (branch kMix5).
constexpr Tap tap(int branch, int k) {
  const int dilation = branch == kMix3 ? 1 : 2;
  return {(k / 3 - 1) * dilation, (k % 3 - 1) * dilation};
}

// to[k * kChunk + i] = map[q - o_k], q = begin + i, where q - o_k lies inside the image, else 0.
template <typename T, int Branch>
void shift_chunk(const Call<T>& call, const T* map, int64_t begin, int64_t end, T* to) {
#pragma GCC unroll 9
  for (int k = 0; k < kTaps; ++k) {
    const Tap o = tap(Branch, k);
    const T* from = map - (o.dy * call.sizes.width + o.dx);
    const LaneMask<T>* mask = call.column_mask[2 - o.dx];
    for (int64_t q = begin; q < end; q += kLanes<T>) {
      store<T>(to + k * kChunk + q - begin, keep<T>(load<T>(from + q), mask + q));
    }
    // Past the image u is padded with zeros, of which BN makes something else.
    for (int64_t i = end - begin; i < round_up<T>(end - begin); ++i) to[k * kChunk + i] = 0;
  }
}

// Gradients of the position logits: dl = pi (d - dot), d = sum_c dc[c] x[c, p], dot = sum_p pi d.
template <typename T>
void logit_gradients(const T* probability, T* logit, int64_t pitch) {
  Vec<T> dot{};
  for (int64_t p = 0; p < pitch; p += kLanes<T>) dot += load<T>(probability + p) * load<T>(logit + p);
  const T total = sum_lanes<T>(dot);
  for (int64_t p = 0; p < pitch; p += kLanes<T>) {
    store<T>(logit + p, load<T>(probability + p) * (load<T>(logit + p) - total));
  }
}

// What one branch of one channel needs in the inner loop of `spread_branch`.
template <typename T>
struct Branch {
  T mean, scale, bias, inverse;  // BN; xhat = (u - mean) * inverse
  T pooled, context;             // dc[c], w[c]
  const T* kernel;
  const T* shifted;  // probabilities, then logit gradients
};

// Adds one branch's part of a chunk of du (before the batch's correction) and its sums over positions.
// Along the taps k, at q: P = sum K_k pi[q - o_k], L = sum K_k dl[q - o_k]; then dr = dc P + w L, and, summed over q,
// dK_k = dc sum pi[q - o_k] r + w sum dl[q - o_k] r, dw = sum L r.
template <typename T>
void spread_branch(const Branch<T>& b, const T* u, int64_t count, T* du, ChannelSums<T>& sums, int branch) {
  Vec<T> from_probability[kTaps] = {}, from_logit[kTaps] = {}, context{}, bias{}, weight{};
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> centred = load<T>(u + i) - b.mean;
    const Vec<T> r = relu<T>(centred * b.scale + b.bias);
    Vec<T> probability{}, logit{};
#pragma GCC unroll 9
    for (int k = 0; k < kTaps; ++k) {
      const Vec<T> pi = load<T>(b.shifted + k * kChunk + i), dl = load<T>(b.shifted + (kTaps + k) * kChunk + i);
      probability += pi * b.kernel[k];
      logit += dl * b.kernel[k];
      from_probability[k] += pi * r;
      from_logit[k] += dl * r;
    }
    context += logit * r;
    const Vec<T> zero{}, dr = probability * b.pooled + logit * b.context;
    const Vec<T> g = r > zero ? dr : zero;
    bias += g;
    weight += g * (centred * b.inverse);
    store<T>(du + i, load<T>(du + i) + g * b.scale);
  }
  sums.context[branch] += context;
  sums.norm_bias[branch] += bias;
  sums.norm_weight[branch] += weight;
#pragma GCC unroll 9
  for (int k = 0; k < kTaps; ++k) {
    sums.kernel[branch][k] += from_probability[k] * b.pooled + from_logit[k] * b.context;
  }
}

// du = f dout + pi_f dc_f + dl_f w_f for a chunk of one channel, and its part of dw_f.
template <typename T>
void spread_forget(const T* u, const T* grad, const T* probability, const T* logit, T f, T pooled, T context,
                   int64_t count, T* du, Vec<T>& sum) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> dl = load<T>(logit + i);
    sum += dl * load<T>(u + i);
    store<T>(du + i, load<T>(grad + i) * f + load<T>(probability + i) * pooled + dl * context);
  }
}

// du of one image before the correction for batch statistics.
template <typename T>
void spread_image(const Call<T>& call, const Image<const T>& u, const Image<const T>& grad, const GateGradients<T>& g,
                  const BackwardScratch<T>& scratch, const Image<T>& du, ChannelSums<T>* sums) {
  const Sizes& s = call.sizes;
  const T* context[2] = {call.parameters[kContext3Weight], call.parameters[kContext5Weight]};
  for (int64_t begin = 0; begin < s.positions(); begin += kChunk) {
    const int64_t end = begin + kChunk < s.positions() ? begin + kChunk : s.positions();
    const int64_t count = round_up<T>(end - begin);
    T* shifted = scratch.shifted;
    shift_chunk<T, kMix3>(call, scratch.position.map[kMix3], begin, end, shifted);
    shift_chunk<T, kMix3>(call, scratch.logit.map[kMix3], begin, end, shifted + kTaps * kChunk);
    shift_chunk<T, kMix5>(call, scratch.position.map[kMix5], begin, end, shifted + 2 * kTaps * kChunk);
    shift_chunk<T, kMix5>(call, scratch.logit.map[kMix5], begin, end, shifted + 3 * kTaps * kChunk);
    for (int64_t c = 0; c < s.channels; ++c) {
      const Channel<T>& channel = call.channels[c];
      const T* x = u.row(c) + begin;
      T* to = du.row(c) + begin;
      spread_forget(x, grad.row(c) + begin, scratch.position.map[kForget] + begin, scratch.logit.map[kForget] + begin,
                    g.forget[c], g.added[c], call.parameters[kForgetContextWeight][c], count, to,
                    sums[c].forget_context);
      for (int b = 0; b < 2; ++b) {
        const Branch<T> branch{channel.mean[b],
                               channel.scale[b],
                               channel.bias[b],
                               channel.inverse[b],
                               g.mix[b * call.channel_pitch + c],
                               context[b][c],
                               channel.kernel[b],
                               shifted + 2 * b * kTaps * kChunk};
        spread_branch(branch, x, count, to, sums[c], b);
      }
    }
  }
}

// Pooled-vector gradients of one image from the gates' hidden gradients: dc_f into g.added, dc_3 and dc_5 into g.mix.
template <typename T>
void pooled_gradients(const Call<T>& call, const GateGradients<T>& g, T* both) {
  const Sizes& s = call.sizes;
  transposed_product(call.parameters[kForget1Weight], g.hidden, s.forget, s.channels, g.added);
  transposed_product(call.parameters[kAllWeight], g.hidden + call.forget_pitch, s.attention, 2 * s.channels, both);
  for (int64_t c = 0; c < s.channels; ++c) {
    g.mix[c] += both[c];
    g.mix[call.channel_pitch + c] += both[s.channels + c];
  }
}

// to[p] = sum_c grad_pooled[c] a[c, p]. A strip's last partial vector spills into the next strip's part or the margin,
// both written later.
template <typename T, int B>
void branch_logit_sums(const Call<T>& call, const Image<const T>& u, const T* grad_pooled, const Strip<T>& strip,
                       T* to) {
  for_each_strip<T, B>(call, u, strip, [&](int64_t first, int64_t count) {
    combine(strip.maps, strip.pitch, call.sizes.channels, grad_pooled, count, to + first);
  });
}

// Position maps of one image: saved probabilities, and gradients of the logits.
template <typename T>
void position_gradients(const Call<T>& call, int64_t n, const Image<const T>& u, const GateGradients<T>& g,
                        const BackwardScratch<T>& scratch) {
  const Sizes& s = call.sizes;
  const int64_t positions = s.positions();
  const T* saved = static_cast<const T*>(call.args.position) + n * kNumBranches * positions;
  for (int b = 0; b < kNumBranches; ++b) {
    std::memcpy(scratch.position.map[b], saved + b * positions, positions * sizeof(T));
  }
  combine(u.data, u.pitch, s.channels, g.added, positions, scratch.logit.map[kForget]);
  branch_logit_sums<T, 0>(call, u, g.mix, scratch.strip, scratch.logit.map[kMix3]);
  branch_logit_sums<T, 1>(call, u, g.mix + call.channel_pitch, scratch.strip, scratch.logit.map[kMix5]);
  scratch.position.clear_margins(s);
  scratch.logit.clear_margins(s);
  for (int b = 0; b < kNumBranches; ++b) logit_gradients(scratch.position.map[b], scratch.logit.map[b], call.pitch);
}

// Adds up the threads' sums into the parameters' gradients.
template <typename T>
void finish_channel_sums(const Call<T>& call, const ChannelSums<T>* sums, int64_t tasks,
                         const ParameterGradients<T>& to) {
  const int64_t channels = call.sizes.channels;
  const auto total = [&](int64_t c, auto member) {
    T sum = 0;
    for (int64_t t = 0; t < tasks; ++t) sum += sum_lanes<T>(member(sums[t * channels + c]));
    return sum;
  };
  for (int64_t c = 0; c < channels; ++c) {
    to.at[kForgetContextWeight][c] = total(c, [](const auto& s) { return s.forget_context; });
    for (int b = 0; b < 2; ++b) {
      to.at[b ? kContext5Weight : kContext3Weight][c] = total(c, [b](const auto& s) { return s.context[b]; });
      to.at[b ? kNorm5Bias : kNorm3Bias][c] = total(c, [b](const auto& s) { return s.norm_bias[b]; });
      to.at[b ? kNorm5Weight : kNorm3Weight][c] = total(c, [b](const auto& s) { return s.norm_weight[b]; });
      for (int k = 0; k < kTaps; ++k) {
        to.at[b ? kConv5Weight : kConv3Weight][c * kTaps + k] =
            total(c, [b, k](const auto& s) { return s.kernel[b][k]; });
      }
    }
  }
  // A constant added to every logit leaves a softmax unchanged.
  for (const int bias : {kForgetContextBias, kContext3Bias, kContext5Bias}) *to.at[bias] = 0;
}

// Subtracts what flows back through the batch's mean and variance: rstd (S1 + xhat S2) / M, with
// S1 = sum_b gamma_b dbeta_b and S2 = sum_b gamma_b dgamma_b over both branches, which normalise the same u.
template <typename T>
void correct_image(const Call<T>& call, const ParameterGradients<T>& grads, const Image<const T>& u,
                   const Image<const T>& du, const Image<T>& to) {
  const Sizes& s = call.sizes;
  const T values = static_cast<T>(s.batch * s.positions());
  const T *gamma3 = call.parameters[kNorm3Weight], *gamma5 = call.parameters[kNorm5Weight];
  for (int64_t c = 0; c < s.channels; ++c) {
    const T mean = call.channels[c].mean[0], inverse = call.channels[c].inverse[0];
    const T s1 = gamma3[c] * grads.at[kNorm3Bias][c] + gamma5[c] * grads.at[kNorm5Bias][c];
    const T s2 = gamma3[c] * grads.at[kNorm3Weight][c] + gamma5[c] * grads.at[kNorm5Weight][c];
    const T slope = inverse * inverse * s2 / values, offset = inverse * s1 / values;
    for (int64_t p = 0; p < call.pitch; p += kLanes<T>) {
      const Vec<T> centred = load<T>(u.row(c) + p) - mean;
      store<T>(to.row(c) + p, load<T>(du.row(c) + p) - offset - centred * slope);
    }
  }
}

// Where du of image n lives between the two passes: the tensor itself where its memory is an image.
template <typename S, typename T>
Image<T> gradient_image(const Call<T>& call, T* buffer, int64_t n) {
  if constexpr (std::is_same_v<S, T>) {
    if (!buffer) return {image_data<S>(call.args.grad_u, n), call.args.grad_u.stride[1]};
  }
  return {buffer + n * call.sizes.channels * call.pitch, call.pitch};
}

// Back through the gates of every image up to the BN1d outputs.
template <typename S, typename T>
void all_gate_gradients(const Call<T>& call, const GateGradients<T>& all) {
  const Sizes& s = call.sizes;
  Gates<T> gates = prepare_gates(call);
  prepare_hidden_norm(call, gates);
  T* select = shared<T>(call.host, s.channels * s.attention);
  for (int64_t i = 0; i < s.channels * s.attention; ++i) {
    select[i] = call.parameters[kSelect3Weight][i] - call.parameters[kSelect5Weight][i];
  }
  parallel_images(call.host, s.batch, [&](int64_t n) {
    const auto scratch = carve_scratch<ForwardScratch<T>>(call.host, call);
    const GateVectors<T>& v = scratch.gates;
    restore_vectors(call, n, v);
    std::memcpy(v.both, v.pooled + kMix3 * call.channel_pitch, s.channels * sizeof(T));
    std::memcpy(v.both + s.channels, v.pooled + kMix5 * call.channel_pitch, s.channels * sizeof(T));
    gate_vectors(call, gates, v);
    const Image<const T> u = load_image<S>(call.args.u, n, s.batch, call.extent, scratch.image);
    const Image<const T> grad = load_image<S>(call.args.grad_out, n, s.batch, call.extent, scratch.result);
    gate_gradients(call, select, u, grad, v, all.of_image(call, n));
  });
}

template <typename S>
void backward(const GatedExcitation& args, const Host& host) {
  using T = Accumulate<S>;
  Call<T> call = begin_call<T>(args, host);
  const Sizes& s = call.sizes;
  prepare_channels(call);
  const ParameterGradients<T> grads(call);
  GateGradients<T> all;
  Arena measure(nullptr);
  all.carve(measure, call, s.batch);
  Arena arena(shared<char>(host, measure.used()));
  all.carve(arena, call, s.batch);
  all_gate_gradients<S>(call, all);
  hidden_norm_gradients(call, all, grads);
  gate_weight_gradients(call, all, grads);

  const int64_t tasks = task_count(host, s.batch);
  auto* sums = shared<ChannelSums<T>>(host, tasks * s.channels);
  const bool direct = is_image<S>(args.grad_u, call.extent);
  T* buffer = direct ? nullptr : shared<T>(host, s.batch * s.channels * call.pitch);
  parallel(host, tasks, [&](int64_t task) {
    const auto scratch = carve_scratch<BackwardScratch<T>>(host, call);
    ChannelSums<T>* mine = sums + task * s.channels;
    std::memset(static_cast<void*>(mine), 0, s.channels * sizeof(*mine));
    for (int64_t n = split(s.batch, tasks, task); n < split(s.batch, tasks, task + 1); ++n) {
      const GateGradients<T> g = all.of_image(call, n);
      const Image<const T> u = load_image<S>(args.u, n, s.batch, call.extent, scratch.image);
      const Image<const T> grad = load_image<S>(args.grad_out, n, s.batch, call.extent, scratch.grad);
      pooled_gradients(call, g, scratch.result);
      position_gradients(call, n, u, g, scratch);
      spread_image(call, u, grad, g, scratch, gradient_image<S>(call, buffer, n), mine);
    }
  });
  finish_channel_sums(call, sums, tasks, grads);

  if (direct && !args.training) return;
  parallel_images(host, s.batch, [&](int64_t n) {
    const auto scratch = carve_scratch<BackwardScratch<T>>(host, call);
    Image<T> du = gradient_image<S>(call, buffer, n);
    if (args.training) {
      const Image<const T> u = load_image<S>(args.u, n, s.batch, call.extent, scratch.image);
      correct_image(call, grads, u, Image<const T>{du.data, du.pitch}, du);
    }
    if (!direct) store_image<S>(Image<const T>{du.data, du.pitch}, args.grad_u, n, call.extent);
  });
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
