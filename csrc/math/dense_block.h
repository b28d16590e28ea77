// dense_block's contract as every kernel sees it: extents and the order of its tensors, which pyext/ops/dense_block.py
// repeats under state-dict names; a test compares the two.
#pragma once

#include <cstdint>

#include "math/shape.h"

namespace pyext::dense_block {

// Of one layer; without a bottleneck the last cell alone.
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
  int64_t squeeze;  // channels between the two convolutions; 0 for a layer of one, the 3x3
  int64_t growth;   // channels that a layer gives

  int64_t inputs(int64_t layer) const { return channels + layer * growth; }
  int64_t out_channels() const { return inputs(layers); }
  int64_t positions() const { return height * width; }
  // The first of a layer's tensors, and how many it has.
  int first_tensor() const { return squeeze > 0 ? 0 : kNorm2Weight; }
  int layer_tensors() const { return kNumTensors - first_tensor(); }
  // What the 3x3 convolution reads.
  int64_t taken(int64_t layer) const { return squeeze > 0 ? squeeze : inputs(layer); }
};

// Of tensor `tensor` of layer `layer`.
inline Shape tensor_shape(int tensor, const Sizes& s, int64_t layer) {
  if (tensor == kConv1Weight) return {4, {s.squeeze, s.inputs(layer), 1, 1}};
  if (tensor == kConv2Weight) return {4, {s.growth, s.taken(layer), 3, 3}};
  return {1, {tensor < kConv1Weight ? s.inputs(layer) : s.taken(layer)}};
}

}  // namespace pyext::dense_block
