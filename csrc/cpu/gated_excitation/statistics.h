// Batch statistics of the map and of the hidden vectors.
#pragma once

#include "cpu/gated_excitation/call.h"
#include "cpu/moments.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

template <typename S, typename T>
void map_statistics(const Call<T>& call) {
  const Sizes& s = call.sizes;
  double* moments = shared<double>(call.host, 2 * s.batch * call.channel_pitch);
  parallel_images(call.host, s.batch, [&](int64_t n) {
    T* scratch = static_cast<T*>(call.host.scratch(s.channels * call.pitch * sizeof(T)));
    const Image<const T> u = load_image<S>(call.args.u, n, s.batch, call.extent, scratch);
    image_moments(u, call.extent, call.channel_pitch, moments + 2 * n * call.channel_pitch);
  });
  T* statistics = static_cast<T*>(call.args.map_statistics);
  merge_moments(moments, s.batch, call.extent, call.channel_pitch, statistics, statistics + s.channels);
}

// Mean and biased variance of every hidden unit over the batch.
template <typename T>
void hidden_moments(const Call<T>& call, double* __restrict mean, double* __restrict var) {
  const int64_t batch = call.sizes.batch, units = call.sizes.hidden();
  const T* hidden = static_cast<const T*>(call.args.hidden);
  for (int64_t j = 0; j < units; ++j) mean[j] = var[j] = 0;
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t j = 0; j < units; ++j) mean[j] += hidden[n * units + j];
  }
  for (int64_t j = 0; j < units; ++j) mean[j] /= batch;
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t j = 0; j < units; ++j) {
      const double deviation = hidden[n * units + j] - mean[j];
      var[j] += deviation * deviation;
    }
  }
  for (int64_t j = 0; j < units; ++j) var[j] /= batch;
}

template <typename T>
void hidden_statistics(const Call<T>& call) {
  const int64_t units = call.sizes.hidden();
  double *mean = shared<double>(call.host, units), *var = shared<double>(call.host, units);
  hidden_moments(call, mean, var);
  T* to = static_cast<T*>(call.args.hidden_statistics);
  for (int64_t j = 0; j < units; ++j) {
    to[j] = static_cast<T>(mean[j]);
    to[units + j] = static_cast<T>(var[j]);
  }
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
