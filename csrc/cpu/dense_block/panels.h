// A layer's constants in the order in which a call meets them.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/dense_block.h"
#include "cpu/panels.h"
#include "cpu/winograd.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

using DenseSizes = dense_block::Sizes;

// BN in evaluation as (x - mean) * scale + bias; zeros up to whole vectors.
template <typename T>
struct Normalised {
  T *mean, *scale, *bias;
  Vec<T> relu_of(Vec<T> x, int64_t c) const {
    return relu<T>((x - load<T>(mean + c)) * load<T>(scale + c) + load<T>(bias + c));
  }
};

template <typename T>
struct DenseLayer {
  int64_t inputs;
  Normalised<T> norm1;  // with a bottleneck
  Panels<T> conv1;      // (inputs, squeeze)
  Normalised<T> norm2;
  Panels<T> conv2;  // (taken, growth), the first of kPlaces
  int64_t conv2_pitch;

  // What all transformed kernels have at one place.
  Panels<T> kernels(int place) const { return {conv2.data + place * conv2_pitch, conv2.depth, conv2.columns}; }
};

template <typename T>
struct DenseTransition {
  Normalised<T> norm;
  Panels<T> conv;  // (channels, transition)
};

// Hands out the pieces of packed constants in their order.
template <typename T>
class Pieces {
 public:
  explicit Pieces(T* data) : data_(data) {}
  T* take(int64_t n) {
    T* piece = data_ + used_;
    used_ += round_up<T>(n);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  T* data_;
  int64_t used_ = 0;
};

template <typename T>
Normalised<T> take_norm(Pieces<T>& pieces, int64_t channels) {
  T *mean = pieces.take(channels), *scale = pieces.take(channels), *bias = pieces.take(channels);
  return {mean, scale, bias};
}

template <typename T>
DenseLayer<T> take_layer(Pieces<T>& pieces, const DenseSizes& s, int64_t index) {
  DenseLayer<T> layer{};
  layer.inputs = s.inputs(index);
  if (s.squeeze > 0) {
    layer.norm1 = take_norm(pieces, layer.inputs);
    layer.conv1 = {pieces.take(Panels<T>::numel(layer.inputs, s.squeeze)), layer.inputs, round_up<T>(s.squeeze)};
  }
  layer.norm2 = take_norm(pieces, s.taken(index));
  layer.conv2_pitch = Panels<T>::numel(s.taken(index), s.growth);
  layer.conv2 = {pieces.take(kPlaces * layer.conv2_pitch), s.taken(index), round_up<T>(s.growth)};
  return layer;
}

template <typename T>
DenseTransition<T> take_transition(Pieces<T>& pieces, const DenseSizes& s) {
  const int64_t channels = s.maps_channels();
  const Normalised<T> norm = take_norm(pieces, channels);
  return {norm, {pieces.take(Panels<T>::numel(channels, s.transition)), channels, round_up<T>(s.transition)}};
}

// --- packing ---

// value(k, column) to panels, whose columns beyond `columns` are zero.
template <typename T, typename Value>
void pack_panels(const Panels<T>& panels, int64_t columns, Value value) {
  T* to = panels.data;
  for (int64_t column = 0; column < panels.columns; column += Panels<T>::kColumns) {
    const int64_t width = std::min(Panels<T>::kColumns, panels.columns - column);
    for (int64_t k = 0; k < panels.depth; ++k) {
      for (int64_t i = 0; i < width; ++i) *to++ = column + i < columns ? value(k, column + i) : T(0);
    }
  }
}

template <typename T>
void pack_norm(const Normalised<T>& norm, int64_t channels, const void* const* tensors, double eps) {
  const T *weight = static_cast<const T*>(tensors[0]), *bias = static_cast<const T*>(tensors[1]);
  const T *mean = static_cast<const T*>(tensors[2]), *var = static_cast<const T*>(tensors[3]);
  for (T* to : {norm.mean, norm.scale, norm.bias}) std::fill_n(to, round_up<T>(channels), T(0));
  for (int64_t c = 0; c < channels; ++c) {
    norm.mean[c] = mean[c];
    norm.scale[c] = weight[c] / std::sqrt(var[c] + static_cast<T>(eps));
    norm.bias[c] = bias[c];
  }
}

// Of a 1x1 convolution.
template <typename T>
void pack_weight(const Panels<T>& panels, int64_t outputs, const void* tensor) {
  const T* weight = static_cast<const T*>(tensor);
  pack_panels(panels, outputs, [&](int64_t k, int64_t column) { return weight[column * panels.depth + k]; });
}

template <typename T>
void pack_layer(const DenseSizes& s, const DenseLayer<T>& layer, const void* const* tensors, double eps) {
  using namespace dense_block;
  const void* const* own = tensors - s.first_tensor();
  if (s.squeeze > 0) {
    pack_norm(layer.norm1, layer.inputs, own + kNorm1Weight, eps);
    pack_weight(layer.conv1, s.squeeze, own[kConv1Weight]);
  }
  const int64_t taken = layer.conv2.depth;
  pack_norm(layer.norm2, taken, own + kNorm2Weight, eps);
  const T* weight = static_cast<const T*>(own[kConv2Weight]);
  for (int place = 0; place < kPlaces; ++place) {
    pack_panels(layer.kernels(place), s.growth, [&](int64_t k, int64_t column) {
      T kernel[kTaps], transformed[kPlaces];
      std::copy_n(weight + (column * taken + k) * kTaps, kTaps, kernel);
      transform_kernel(kernel, transformed);
      return transformed[place];
    });
  }
}

template <typename T>
void pack_layers(const DenseBlockTensors& args, T* packed, const Host& host) {
  const DenseSizes& s = args.sizes;
  DenseLayer<T>* layers = shared<DenseLayer<T>>(host, s.layers);
  Pieces<T> pieces(packed);
  for (int64_t i = 0; i < s.layers; ++i) layers[i] = take_layer(pieces, s, i);
  const int64_t tasks = task_count(host, s.layers);
  parallel(host, tasks, [&](int64_t task) {
    const Range own = part_of(s.layers, tasks, task);
    for (int64_t i = own.begin; i < own.end; ++i) {
      pack_layer(s, layers[i], args.tensors + i * s.layer_tensors(), args.eps);
    }
  });
  if (s.transition > 0) {
    const DenseTransition<T> transition = take_transition(pieces, s);
    const void* const* own = args.tensors + s.layers * s.layer_tensors();
    pack_norm(transition.norm, s.maps_channels(), own + dense_block::kNorm1Weight, args.eps);
    pack_weight(transition.conv, s.transition, own[dense_block::kConv1Weight]);
  }
}

template <typename T>
int64_t packed_elements(const DenseSizes& s) {
  Pieces<T> pieces(nullptr);
  for (int64_t i = 0; i < s.layers; ++i) take_layer(pieces, s, i);
  if (s.transition > 0) take_transition(pieces, s);
  return pieces.used();
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
