// Matrices as products read them, and a layer's constants in the order in which a call meets them.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/dense_block.h"
#include "cpu/hybrid_block/squeeze.h"
#include "cpu/product.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

using DenseSizes = dense_block::Sizes;

constexpr int kPanelVectors = 2;
constexpr int kProductRows = kTileRegisters / kPanelVectors;
constexpr int kPlaces = 16;  // of a tile of 4x4

// (depth, columns) in panels of kPanelVectors vectors of columns, the last one perhaps of fewer: panel by panel, each
// (depth, its columns).
template <typename T>
struct Panels {
  static constexpr int64_t kColumns = kPanelVectors * kLanes<T>;
  T* data;
  int64_t depth;
  int64_t columns;  // whole vectors

  static int64_t numel(int64_t depth, int64_t columns) { return depth * round_up<T>(columns); }
  int64_t count() const { return (columns + kColumns - 1) / kColumns; }
  T at(int64_t k, int64_t column) const {
    const int64_t first = column / kColumns * kColumns, width = std::min(kColumns, columns - first);
    return data[first * depth + k * width + column - first];
  }
};

// out (rows x columns) = or += left (rows x depth) * the rows [first, first + depth) of the panels `own`.
template <typename T>
inline void multiply_panels(Left<T> left, const Panels<T>& right, Range own, int64_t first, int64_t depth, T* out,
                            int64_t out_pitch, int64_t rows, Result result) {
  const int64_t tiles = (rows + kProductRows - 1) / kProductRows;
  for (int64_t p = own.begin; p < own.end; ++p) {
    const int64_t column = p * Panels<T>::kColumns, width = std::min(Panels<T>::kColumns, right.columns - column);
    const T* panel = right.data + column * right.depth + first * width;
    with_constant<kPanelVectors>(width / kLanes<T>, [&](auto vectors) {
      for (int64_t t = 0; t < tiles; ++t) {
        const Range own_rows = part_of(rows, tiles, t);
        with_constant<kProductRows>(own_rows.end - own_rows.begin, [&](auto count) {
          product_tile<T, decltype(count)::value, decltype(vectors)::value>(
              {left.data + own_rows.begin * left.row_stride, left.row_stride, left.depth_stride}, panel, width,
              out + own_rows.begin * out_pitch + column, out_pitch, depth, result);
        });
      }
    });
  }
}

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

// --- packing
// ----------------------------------------------------------------------------------------------------------

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

// G g G^T of a kernel g of 3x3 (arXiv 1509.09308): with G = (1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1).
template <typename T>
void transform_kernel(const T* g, T (&to)[kPlaces]) {
  T rows[4][3];
  for (int j = 0; j < 3; ++j) {
    const T a = g[j], b = g[3 + j], c = g[6 + j];
    rows[0][j] = a;
    rows[1][j] = (a + c + b) / 2;
    rows[2][j] = (a + c - b) / 2;
    rows[3][j] = c;
  }
  for (int i = 0; i < 4; ++i) {
    const T a = rows[i][0], b = rows[i][1], c = rows[i][2];
    to[4 * i] = a;
    to[4 * i + 1] = (a + c + b) / 2;
    to[4 * i + 2] = (a + c - b) / 2;
    to[4 * i + 3] = c;
  }
}

template <typename T>
void pack_layer(const DenseSizes& s, const DenseLayer<T>& layer, const void* const* tensors, double eps) {
  using namespace dense_block;
  const void* const* own = tensors - s.first_tensor();
  if (s.squeeze > 0) {
    pack_norm(layer.norm1, layer.inputs, own + kNorm1Weight, eps);
    const T* weight = static_cast<const T*>(own[kConv1Weight]);
    pack_panels(layer.conv1, s.squeeze, [&](int64_t k, int64_t column) { return weight[column * layer.inputs + k]; });
  }
  const int64_t taken = layer.conv2.depth;
  pack_norm(layer.norm2, taken, own + kNorm2Weight, eps);
  const T* weight = static_cast<const T*>(own[kConv2Weight]);
  for (int place = 0; place < kPlaces; ++place) {
    pack_panels(layer.kernels(place), s.growth, [&](int64_t k, int64_t column) {
      T transformed[kPlaces];
      transform_kernel(weight + (column * taken + k) * kTaps, transformed);
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
}

template <typename T>
int64_t packed_elements(const DenseSizes& s) {
  Pieces<T> pieces(nullptr);
  for (int64_t i = 0; i < s.layers; ++i) take_layer(pieces, s, i);
  return pieces.used();
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
