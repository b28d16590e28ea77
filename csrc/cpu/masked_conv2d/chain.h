// Layers one after another. Where there are enough images, a group of them goes through all layers on one thread: maps
// and weights are read while they are in its cache, and threads meet once.
#pragma once

#include <new>

#include "cpu/masked_conv2d/forward.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int64_t kGroupImages = 32;  // that go through all layers together

template <typename S>
class MaskedChain {
  using T = Accumulate<S>;

 public:
  MaskedChain(const MaskedConv2d* layers, int64_t count, const Host& host)
      : layers_(layers), count_(count), host_(host), groups_(first_convolution(), kGroupImages, host.threads, host) {
    by_groups_ = count > 1 && groups_fill_threads();
    if (!by_groups_) groups_ = Groups(first_convolution(), layers[0].sizes.batch, 1, host);
    forwards_ = static_cast<MaskedForward<S>*>(host.shared(host.self, count * sizeof(MaskedForward<S>)));
    for (int64_t i = 0; i < count; ++i) {
      if (layers[i].weight != nullptr) new (forwards_ + i) MaskedForward<S>(layers[i], groups_, host);
    }
  }

  void run() const {
    if (by_groups_) {
      return parallel(host_, groups_.count, [&](int64_t group) {
        for (int64_t i = 0; i < count_; ++i) {
          layers_[i].weight != nullptr ? forwards_[i].run_group(group) : mean(layers_[i], groups_.all[group]);
        }
      });
    }
    for (int64_t i = 0; i < count_; ++i) {
      layers_[i].weight != nullptr ? forwards_[i].run() : mean(layers_[i], {0, 0, layers_[i].sizes.batch});
    }
  }

 private:
  // Which tells the sub-networks of the images; a mean, where there is none.
  const MaskedConv2d& first_convolution() const {
    int64_t i = 0;
    while (i + 1 < count_ && layers_[i].weight == nullptr) ++i;
    return layers_[i];
  }

  // Whether no thread gets much more than its share of the images: threads get groups that follow one another.
  bool groups_fill_threads() const {
    const int64_t each = (groups_.count + host_.threads - 1) / host_.threads;
    int64_t most = 0;
    for (int64_t first = 0; first < groups_.count; first += each) {
      int64_t images = 0;
      for (int64_t g = first; g < std::min(first + each, groups_.count); ++g) images += groups_.all[g].images;
      most = std::max(most, images);
    }
    return 5 * most * host_.threads <= 6 * layers_[0].sizes.batch;
  }

  void mean(const MaskedConv2d& layer, const Groups::Group& group) const {
    const MaskedSizes& s = layer.sizes;
    const T factor = T(1) / static_cast<T>(s.rows.input * s.columns.input);
    for (int64_t i = group.first; i < group.first + group.images; ++i) {
      const int64_t n = groups_.order[i];
      const S* from = static_cast<const S*>(layer.x.data) + n * layer.x.stride[0];
      S* to = static_cast<S*>(layer.out.data) + n * layer.out.stride[0];
      for (int64_t c = 0; c < s.inputs; ++c) from_accumulate(sum(layer, from + c * layer.x.stride[1]) * factor, to[c]);
    }
  }

  // Of a channel's positions.
  static T sum(const MaskedConv2d& layer, const S* from) {
    T total = 0;
    for (int64_t y = 0; y < layer.sizes.rows.input; ++y) {
      T row = 0;
      const S* at = from + y * layer.x.stride[2];
      for (int64_t x = 0; x < layer.sizes.columns.input; ++x) row += to_accumulate(at[x * layer.x.stride[3]]);
      total += row;
    }
    return total;
  }

  const MaskedConv2d* layers_;
  int64_t count_;
  const Host& host_;
  Groups groups_;
  bool by_groups_;
  MaskedForward<S>* forwards_;
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
