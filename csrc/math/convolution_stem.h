// convolution_stem's contract as every kernel sees it: extents and the order of its tensors, which
// pyext/ops/convolution_stem.py repeats under state-dict names; a test compares the two.
#pragma once

#include <cstdint>

#include "math/shape.h"

namespace pyext::convolution_stem {

// Of one layer.
enum Tensors {
  kConvWeight,
  kNormWeight,
  kNormBias,
  kNormMean,
  kNormVar,
  kNumTensors,
};

struct Sizes {
  int64_t batch;
  int64_t channels;  // of the input
  int64_t height;
  int64_t width;
  int64_t layers;
  int64_t stride;  // of the first layer; the others' is 1

  // Of the layers' maps, and of the pooled one.
  int64_t map_height() const { return (height - 1) / stride + 1; }
  int64_t map_width() const { return (width - 1) / stride + 1; }
  int64_t out_height() const { return (map_height() - 1) / 2 + 1; }
  int64_t out_width() const { return (map_width() - 1) / 2 + 1; }
};

// Of one tensor of a layer.
inline Shape tensor_shape(int tensor, int64_t inputs, int64_t outputs) {
  if (tensor == kConvWeight) return {4, {outputs, inputs, 3, 3}};
  return {1, {outputs}};
}

}  // namespace pyext::convolution_stem
