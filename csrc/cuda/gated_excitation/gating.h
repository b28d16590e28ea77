// The small linear maps between pooled vectors and gates, computed by one block for one image.
#pragma once

#include "cuda/gated_excitation/network.h"

namespace pyext::gated_excitation {

using namespace pyext::cuda;

// hidden = [W1 c_f + b1, W [c_3; c_5] + b]: one warp per row.
template <typename P>
__device__ void hidden_rows(const Network<P>& net, const float* pooled, float* hidden) {
  const int lane = threadIdx.x % kWarp;
  for (int j = threadIdx.x / kWarp; j < net.hidden(); j += blockDim.x / kWarp) {
    const bool forget = j < net.forget;
    const int unit = forget ? j : j - net.forget;
    const int columns = forget ? net.channels : 2 * net.channels;
    const P* row = (forget ? net.parameter[kForget1Weight] : net.parameter[kAllWeight]) + int64_t{unit} * columns;
    const float* input = forget ? pooled : pooled + net.channels;
    float sum = 0.f;
    for (int i = lane; i < columns; i += kWarp) sum += to_float(row[i]) * input[i];
    sum = warp_sum(sum);
    if (lane == 0) hidden[j] = sum + (forget ? net.at(kForget1Bias, unit) : net.at(kAllBias, unit));
  }
  __syncthreads();
}

template <typename P>
__device__ void activate(const Network<P>& net, const float* hidden, float* activation) {
  for (int j = threadIdx.x; j < net.hidden(); j += blockDim.x) {
    activation[j] = tanhf(hidden_normalization(net, j)(hidden[j]));
  }
  __syncthreads();
}

// Calls emit(c, f[c], alpha[c]) once per channel: one warp per channel.
template <typename P, typename Emit>
__device__ void gates(const Network<P>& net, const float* activation, Emit emit) {
  const int lane = threadIdx.x % kWarp;
  for (int c = threadIdx.x / kWarp; c < net.channels; c += blockDim.x / kWarp) {
    float forget = 0.f;
    for (int j = lane; j < net.forget; j += kWarp) {
      forget += net.at(kForget2Weight, int64_t{c} * net.forget + j) * activation[j];
    }
    float select = 0.f;
    for (int j = lane; j < net.attention; j += kWarp) {
      const int64_t at = int64_t{c} * net.attention + j;
      select += (net.at(kSelect3Weight, at) - net.at(kSelect5Weight, at)) * activation[net.forget + j];
    }
    forget = warp_sum(forget);
    select = warp_sum(select);
    if (lane == 0) {
      const float difference = net.at(kSelect3Bias, c) - net.at(kSelect5Bias, c);
      emit(c, sigmoid(forget + net.at(kForget2Bias, c)), sigmoid(select + difference));
    }
  }
  __syncthreads();
}

__device__ __forceinline__ float mix(float alpha, const float* pooled, int channels, int c) {
  return alpha * pooled[kMix3 * channels + c] + (1.f - alpha) * pooled[kMix5 * channels + c];
}

}  // namespace pyext::gated_excitation
