// Backward pass: gates over the batch, then one sweep over the images, then the correction for batch statistics.
#pragma once

#include "cpu/gated_excitation/spread.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

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
      position_gradients(call, n, u, g, scratch, mine);
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
