// dense_block's contract as every kernel sees it: extents and the order of its tensors, which pyext/ops/dense_block.py
// repeats under state-dict names; a test compares the two.
#pragma once

#include <cstdint>

#include "math/shape.h"

namespace pyext::dense_block {

// Of one layer; without a bottleneck the last cell alone. A transition has the tensors of the first cell.
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
  kNumTensors,
};

struct Sizes {
  int64_t batch;
  int64_t channels;  // of the input
  int64_t height;
  int64_t width;
  int64_t layers;
  int64_t squeeze;     // channels between the two convolutions; 0 for a layer of one, the 3x3
  int64_t growth;      // channels that a layer gives
  int64_t transition;  // channels of the transition behind the layers; 0 for none

  int64_t inputs(int64_t layer) const { return channels + layer * growth; }
  int64_t maps_channels() const { return inputs(layers); }
  int64_t positions() const { return height * width; }
  int64_t out_channels() const { return transition > 0 ? transition : maps_channels(); }
  int64_t out_height() const { return transition > 0 ? height / 2 : height; }
  int64_t out_width() const { return transition > 0 ? width / 2 : width; }
  int64_t out_positions() const { return out_height() * out_width(); }
  // The first of a layer's tensors, and how many it has.
  int first_tensor() const { return squeeze > 0 ? 0 : kNorm2Weight; }
  int layer_tensors() const { return kNumTensors - first_tensor(); }
  int64_t tensors() const { return layers * layer_tensors() + (transition > 0 ? kNorm2Weight : 0); }
  // What the 3x3 convolution reads.
  int64_t taken(int64_t layer) const { return squeeze > 0 ? squeeze : inputs(layer); }
};

// Of tensor `tensor` of layer `layer`, or of the transition, which counts as one behind the last.
inline Shape tensor_shape(int tensor, const Sizes& s, int64_t layer) {
  if (layer == s.layers && tensor == kConv1Weight) return {4, {s.transition, s.inputs(layer), 1, 1}};
  if (tensor == kConv1Weight) return {4, {s.squeeze, s.inputs(layer), 1, 1}};
  if (tensor == kConv2Weight) return {4, {s.growth, s.taken(layer), 3, 3}};
  return {1, {tensor < kConv1Weight ? s.inputs(layer) : s.taken(layer)}};
}

// Of tensor `index` of the whole block.
inline Shape tensor_shape(int64_t index, const Sizes& s) {
  const int64_t layer = index / s.layer_tensors();
  const int first = layer < s.layers ? s.first_tensor() : kNorm1Weight;
  return tensor_shape(first + static_cast<int>(index - layer * s.layer_tensors()), s, layer);
}

}  // namespace pyext::dense_block
