// The network's parameters as kernels read them.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "math/gated_excitation.h"
#include "math/gates.h"

namespace pyext::gated_excitation {

using namespace pyext::cuda;

constexpr int kTaps = 9;
constexpr int kMixBranches = 2;

template <typename P>
struct Network {
  const P* parameter[kNumParameters];
  const P* running[kNumRunning];
  const float* map_statistics;
  const float* hidden_statistics;
  int channels;
  int forget;
  int attention;
  float eps;
  bool training;

  __device__ __forceinline__ int hidden() const { return forget + attention; }
  __device__ __forceinline__ float at(Parameter which, int64_t index) const {
    return to_float(parameter[which][index]);
  }
};

template <int kBranch, typename P>
__device__ Normalization map_normalization(const Network<P>& net, int c) {
  constexpr Parameter kWeight = kBranch == 0 ? kNorm3Weight : kNorm5Weight;
  constexpr Parameter kBias = kBranch == 0 ? kNorm3Bias : kNorm5Bias;
  constexpr Running kMean = kBranch == 0 ? kNorm3Mean : kNorm5Mean;
  constexpr Running kVar = kBranch == 0 ? kNorm3Var : kNorm5Var;
  const float mean = net.training ? net.map_statistics[c] : to_float(net.running[kMean][c]);
  const float variance = net.training ? net.map_statistics[net.channels + c] : to_float(net.running[kVar][c]);
  return {mean, reciprocal_deviation(variance, net.eps), net.at(kWeight, c), net.at(kBias, c)};
}

// Batch normalisation of hidden unit `j`: those of the forget gate first, then those of the update gate.
template <typename P>
__device__ Normalization hidden_normalization(const Network<P>& net, int j) {
  const bool forget = j < net.forget;
  const int unit = forget ? j : j - net.forget;
  float mean, variance;
  if (net.training) {
    mean = net.hidden_statistics[j];
    variance = net.hidden_statistics[net.hidden() + j];
  } else {
    mean = to_float(forget ? net.running[kForgetMean][unit] : net.running[kAttentionMean][unit]);
    variance = to_float(forget ? net.running[kForgetVar][unit] : net.running[kAttentionVar][unit]);
  }
  const float weight = forget ? net.at(kForgetNormWeight, unit) : net.at(kAttentionNormWeight, unit);
  const float bias = forget ? net.at(kForgetNormBias, unit) : net.at(kAttentionNormBias, unit);
  return {mean, reciprocal_deviation(variance, net.eps), weight, bias};
}

// What a warp needs to know of one channel of one depthwise branch.
struct BranchChannel {
  float tap[kTaps];
  Normalization norm;
};

template <int kBranch, typename P>
__device__ BranchChannel load_branch_channel(const Network<P>& net, int c) {
  constexpr Parameter kKernel = kBranch == 0 ? kConv3Weight : kConv5Weight;
  BranchChannel channel;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) channel.tap[tap] = net.at(kKernel, int64_t{kTaps} * c + tap);
  channel.norm = map_normalization<kBranch>(net, c);
  return channel;
}

// Cells from a position to the position that tap `tap` of branch `kBranch` reads; the dilation is kBranch + 1.
template <int kBranch>
__device__ __forceinline__ int tap_offset(int tap, int pitch) {
  return ((tap / 3 - 1) * pitch + tap % 3 - 1) * (kBranch + 1);
}

}  // namespace pyext::gated_excitation
