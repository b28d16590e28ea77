// The gates of one image: from pooled vectors to the scale f and the added vector n.
#pragma once

#include "cpu/gated_excitation/call.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// A linear layer with its weight transposed to (inputs, round_up(outputs)), so that lanes are outputs.
template <typename T>
struct Linear {
  T* weight;
  T* bias;
  int64_t inputs, outputs;
  int64_t pitch() const { return round_up<T>(outputs); }
};

template <typename T>
Linear<T> transposed(const Call<T>& call, int weight, int bias, int64_t inputs, int64_t outputs) {
  const int64_t pitch = round_up<T>(outputs);
  T* w = shared<T>(call.host, inputs * pitch);
  T* b = shared<T>(call.host, pitch);
  const T* from = call.parameters[weight];
  transpose_matrix(from, inputs, from + inputs * outputs, outputs, inputs, w, pitch);
  for (int64_t i = 0; i < pitch; ++i) b[i] = i < outputs ? call.parameters[bias][i] : 0;
  return {w, b, inputs, outputs};
}

// a - b, in a's memory.
template <typename T>
Linear<T> difference(const Linear<T>& a, const Linear<T>& b) {
  const int64_t pitch = a.pitch();
  for (int64_t i = 0; i < a.inputs * pitch; i += kLanes<T>) {
    store<T>(a.weight + i, load<T>(a.weight + i) - load<T>(b.weight + i));
  }
  for (int64_t i = 0; i < pitch; i += kLanes<T>) store<T>(a.bias + i, load<T>(a.bias + i) - load<T>(b.bias + i));
  return a;
}

// Vectors vectors of outputs from i on. Several sums per output hide the latency of the additions.
template <typename T, int Vectors>
void apply_vectors(const Linear<T>& linear, const T* x, int64_t i, T* to) {
  constexpr int kSums = 4;
  const int64_t pitch = linear.pitch(), whole = linear.inputs / kSums * kSums;
  Vec<T> sum[Vectors][kSums] = {};
  for (int64_t j = 0; j < whole; j += kSums) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) {
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) {
        sum[v][k] += load<T>(linear.weight + (j + k) * pitch + i + v * kLanes<T>) * x[j + k];
      }
    }
  }
#pragma GCC unroll 3
  for (int v = 0; v < Vectors; ++v) {
    const int64_t at = i + v * kLanes<T>;
    for (int64_t j = whole; j < linear.inputs; ++j) sum[v][0] += load<T>(linear.weight + j * pitch + at) * x[j];
    store<T>(to + at, load<T>(linear.bias + at) + ((sum[v][0] + sum[v][1]) + (sum[v][2] + sum[v][3])));
  }
}

// to[0 .. round_up(outputs)) = W x + b.
template <typename T>
void apply(const Linear<T>& linear, const T* x, T* to) {
  const int64_t pitch = linear.pitch();
  int64_t i = 0;
  for (; i + 3 * kLanes<T> <= pitch; i += 3 * kLanes<T>) apply_vectors<T, 3>(linear, x, i, to);
  if (i + 2 * kLanes<T> <= pitch) {
    apply_vectors<T, 2>(linear, x, i, to);
  } else if (i < pitch) {
    apply_vectors<T, 1>(linear, x, i, to);
  }
}

template <typename T>
struct Gates {
  Linear<T> forget1, forget2, all;
  Linear<T> select;  // W3 - W5, b3 - b5: of the two branches' logits only the difference counts
  // BN1d of the hidden vector [forget; attention], each part padded to whole vectors, as (hidden - mean) * scale +
  // bias: in a small batch the mean is large against the deviation, and would cancel as part of a shift.
  T *mean, *scale, *bias;
};

template <typename T>
Gates<T> prepare_gates(const Call<T>& call) {
  const Sizes& s = call.sizes;
  return {transposed(call, kForget1Weight, kForget1Bias, s.channels, s.forget),
          transposed(call, kForget2Weight, kForget2Bias, s.forget, s.channels),
          transposed(call, kAllWeight, kAllBias, 2 * s.channels, s.attention),
          difference(transposed(call, kSelect3Weight, kSelect3Bias, s.attention, s.channels),
                     transposed(call, kSelect5Weight, kSelect5Bias, s.attention, s.channels)),
          shared<T>(call.host, call.hidden_pitch),
          shared<T>(call.host, call.hidden_pitch),
          shared<T>(call.host, call.hidden_pitch)};
}

// BN1d statistics as the gates use them, for hidden unit j in [0, F + R) of the unpadded order.
template <typename T>
struct HiddenUnit {
  T mean, var, weight, bias;
};

template <typename T>
HiddenUnit<T> hidden_unit(const Call<T>& call, int64_t j) {
  const Sizes& s = call.sizes;
  const bool forget = j < s.forget;
  const int64_t i = forget ? j : j - s.forget;
  const T* batch = static_cast<const T*>(call.args.hidden_statistics);
  const T weight = call.parameters[forget ? kForgetNormWeight : kAttentionNormWeight][i];
  const T bias = call.parameters[forget ? kForgetNormBias : kAttentionNormBias][i];
  if (call.args.training) return {batch[j], batch[s.hidden() + j], weight, bias};
  return {call.running[forget ? kForgetMean : kAttentionMean][i], call.running[forget ? kForgetVar : kAttentionVar][i],
          weight, bias};
}

// Place of hidden unit j in a padded hidden vector.
template <typename T>
int64_t hidden_place(const Call<T>& call, int64_t j) {
  return j < call.sizes.forget ? j : call.forget_pitch + j - call.sizes.forget;
}

template <typename T>
void prepare_hidden_norm(const Call<T>& call, Gates<T>& gates) {
  for (T* values : {gates.mean, gates.scale, gates.bias}) std::memset(values, 0, call.hidden_pitch * sizeof(T));
  for (int64_t j = 0; j < call.sizes.hidden(); ++j) {
    const HiddenUnit<T> unit = hidden_unit(call, j);
    const int64_t i = hidden_place(call, j);
    gates.scale[i] = unit.weight / std::sqrt(unit.var + static_cast<T>(call.args.eps));
    gates.mean[i] = unit.mean;
    gates.bias[i] = unit.bias;
  }
}

// Vectors of one image between its pooled vectors and its output; all padded to whole vectors.
template <typename T>
struct GateVectors {
  T* pooled;  // [c_f | c_3 | c_5], pitch round_up(C)
  T* both;    // [c_3; c_5] without padding between
  T* hidden;  // [h_f | h_a]
  T* active;  // tanh(BN1d(hidden))
  T* forget;  // f
  T* alpha;
  T* select;  // difference of the two branches' logits
  T* added;   // n
  void carve(Arena& arena, const Call<T>& call) {
    pooled = arena.take<T>(3 * call.channel_pitch);
    both = arena.take<T>(2 * call.sizes.channels);
    hidden = arena.take<T>(call.hidden_pitch);
    active = arena.take<T>(call.hidden_pitch);
    forget = arena.take<T>(call.channel_pitch);
    alpha = arena.take<T>(call.channel_pitch);
    select = arena.take<T>(call.channel_pitch);
    added = arena.take<T>(call.channel_pitch);
  }
};

template <typename T>
void hidden_vectors(const Call<T>& call, const Gates<T>& gates, const GateVectors<T>& v) {
  const int64_t c = call.sizes.channels;
  std::memcpy(v.both, v.pooled + kMix3 * call.channel_pitch, c * sizeof(T));
  std::memcpy(v.both + c, v.pooled + kMix5 * call.channel_pitch, c * sizeof(T));
  apply(gates.forget1, v.pooled, v.hidden);
  apply(gates.all, v.both, v.hidden + call.forget_pitch);
}

template <typename T>
void gate_vectors(const Call<T>& call, const Gates<T>& gates, const GateVectors<T>& v) {
  const int64_t pitch = call.channel_pitch;
  for (int64_t i = 0; i < call.hidden_pitch; i += kLanes<T>) {
    const Vec<T> centred = load<T>(v.hidden + i) - load<T>(gates.mean + i);
    const Vec<T> normed = centred * load<T>(gates.scale + i) + load<T>(gates.bias + i);
    store<T>(v.active + i, tanh(normed));
  }
  apply(gates.forget2, v.active, v.forget);
  apply(gates.select, v.active + call.forget_pitch, v.select);
  for (int64_t i = 0; i < pitch; i += kLanes<T>) {
    const Vec<T> alpha = sigmoid<T>(load<T>(v.select + i));
    const Vec<T> c3 = load<T>(v.pooled + kMix3 * pitch + i), c5 = load<T>(v.pooled + kMix5 * pitch + i);
    store<T>(v.forget + i, sigmoid<T>(load<T>(v.forget + i)));
    store<T>(v.alpha + i, alpha);
    store<T>(v.added + i, alpha * c3 + (1 - alpha) * c5);
  }
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
