// hybrid_block's contract as every kernel sees it: extents and the order of its tensors, which
// pyext/ops/hybrid_block.py repeats under state-dict names; a test compares the two.
#pragma once

#include <cstdint>

#include "math/gated_excitation.h"

namespace pyext::hybrid_block {

// Of one module: the squeeze cell, then the gates' parameters and running statistics in gated_excitation's order.
enum Tensors {
  kNorm1Weight,
  kNorm1Bias,
  kNorm1Mean,
  kNorm1Var,
  kConv1Weight,
  kNorm2Weight,
  kNorm2Bias,
  kNorm2Mean,
  kNorm2Var,
  kConv2Weight,
  kGateParameters,
  kGateRunning = kGateParameters + gated_excitation::kNumParameters,
  kNumTensors = kGateRunning + gated_excitation::kNumRunning,
};

struct Sizes {
  int64_t batch;
  int64_t channels;  // of the input
  int64_t height;
  int64_t width;
  int64_t modules;
  int64_t squeeze;  // channels between the two convolutions
  int64_t growth;   // channels that a module gives
  int64_t groups;   // of the 3x3 convolution
  int64_t attention;
  int64_t forget;
  int64_t stride;
  bool dense;  // a module's output follows its input's channels; else there is one module, whose output is the result

  int64_t inputs(int64_t module) const { return channels + module * growth; }
  int64_t positions() const { return height * width; }
  int64_t out_channels() const { return dense ? inputs(modules) : growth; }
  int64_t out_height() const { return (height - 1) / stride + 1; }
  int64_t out_width() const { return (width - 1) / stride + 1; }
  int64_t out_positions() const { return out_height() * out_width(); }
  gated_excitation::Sizes gates() const { return {batch, growth, out_height(), out_width(), forget, attention}; }
};

inline bool is_convolution(int tensor) { return tensor == kConv1Weight || tensor == kConv2Weight; }

// Of a convolution's weight whose int32 elements hold two input channels each, as the CPU kernel for bfloat16 reads it.
inline Shape packed_shape(int tensor, const Sizes& s, int64_t module) {
  const auto pairs = [](int64_t channels) { return (channels + 1) / 2; };
  if (tensor == kConv1Weight) return {2, {s.squeeze, pairs(s.inputs(module))}};
  return {4, {s.groups, s.growth / s.groups, pairs(s.squeeze / s.groups), 9}};
}

// Of one tensor of module `module`.
inline Shape tensor_shape(int tensor, const Sizes& s, int64_t module) {
  if (tensor >= kGateRunning) return gated_excitation::running_shape(tensor - kGateRunning, s.gates());
  if (tensor >= kGateParameters) return gated_excitation::parameter_shape(tensor - kGateParameters, s.gates());
  if (tensor == kConv1Weight) return {4, {s.squeeze, s.inputs(module), 1, 1}};
  if (tensor == kConv2Weight) return {4, {s.growth, s.squeeze / s.groups, 3, 3}};
  return {1, {tensor < kConv1Weight ? s.inputs(module) : s.squeeze}};
}

inline int64_t tensor_numel(int tensor, const Sizes& s, int64_t module) {
  return tensor_shape(tensor, s, module).numel();
}

}  // namespace pyext::hybrid_block
