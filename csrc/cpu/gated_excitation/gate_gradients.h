// Backward pass of the gates: from the output's gradient to the pooled vectors', and the gates' parameters.
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

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
