// The operator's contract as every kernel sees it: its tensors' order and shapes and the layout of its flat gradient.
// pyext/ops/gated_excitation.py holds the same order under state-dict names; a test compares the two.
#pragma once

#include <cstdint>

#include "math/shape.h"

namespace pyext::gated_excitation {

enum Parameter {
  kNorm3Weight,
  kNorm3Bias,
  kConv3Weight,
  kNorm5Weight,
  kNorm5Bias,
  kConv5Weight,
  kContext3Weight,
  kContext3Bias,
  kContext5Weight,
  kContext5Bias,
  kAllWeight,
  kAllBias,
  kAttentionNormWeight,
  kAttentionNormBias,
  kSelect3Weight,
  kSelect3Bias,
  kSelect5Weight,
  kSelect5Bias,
  kForgetContextWeight,
  kForgetContextBias,
  kForgetNormWeight,
  kForgetNormBias,
  kForget1Weight,
  kForget1Bias,
  kForget2Weight,
  kForget2Bias,
  kNumParameters,
};

enum Running {
  kNorm3Mean,
  kNorm3Var,
  kNorm5Mean,
  kNorm5Var,
  kAttentionMean,
  kAttentionVar,
  kForgetMean,
  kForgetVar,
  kNumRunning,
};

// Position maps and pooled vectors are stored in this order.
enum Branch { kForget, kMix3, kMix5, kNumBranches };

struct Sizes {
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t forget;     // rows of fc1
  int64_t attention;  // rows of fcall

  int64_t positions() const { return height * width; }
  int64_t hidden() const { return forget + attention; }
};

inline Shape parameter_shape(int parameter, const Sizes& s) {
  switch (parameter) {
    case kConv3Weight:
    case kConv5Weight:
      return {4, {s.channels, 1, 3, 3}};
    case kContext3Weight:
    case kContext5Weight:
    case kForgetContextWeight:
      return {4, {1, s.channels, 1, 1}};
    case kContext3Bias:
    case kContext5Bias:
    case kForgetContextBias:
      return {1, {1}};
    case kAllWeight:
      return {4, {s.attention, 2 * s.channels, 1, 1}};
    case kAllBias:
    case kAttentionNormWeight:
    case kAttentionNormBias:
      return {1, {s.attention}};
    case kSelect3Weight:
    case kSelect5Weight:
      return {4, {s.channels, s.attention, 1, 1}};
    case kForgetNormWeight:
    case kForgetNormBias:
    case kForget1Bias:
      return {1, {s.forget}};
    case kForget1Weight:
      return {4, {s.forget, s.channels, 1, 1}};
    case kForget2Weight:
      return {4, {s.channels, s.forget, 1, 1}};
    default:
      return {1, {s.channels}};
  }
}

// Elements of one parameter, which is also its extent in the flat gradient.
inline int64_t parameter_numel(int parameter, const Sizes& s) { return parameter_shape(parameter, s).numel(); }

inline Shape running_shape(int running, const Sizes& s) {
  const int64_t lengths[] = {s.channels, s.channels, s.attention, s.forget};
  return {1, {lengths[running / 2]}};
}

}  // namespace pyext::gated_excitation
