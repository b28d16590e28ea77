// Layers one after another. Where there are enough images, a group of them goes through all layers on one thread: what
// lies between layers stays in its cache, and threads meet once.
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
    if (by_groups_) return run_groups();
    for (int64_t i = 0; i < count_; ++i) {
      const Ends whole{{layers_[i].x, groups_.order}, {layers_[i].out, groups_.order}};
      layers_[i].weight != nullptr ? forwards_[i].run() : mean(layers_[i], {0, 0, layers_[i].sizes.batch}, whole);
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

  void run_groups() const {
    int64_t most = 0, memory = 0, maps = 0;
    int64_t* places = shared<int64_t>(host_, layers_[0].sizes.batch);  // of a group's images in memory of its own
    for (int64_t g = 0; g < groups_.count; ++g) {
      most = std::max(most, groups_.all[g].images);
      for (int64_t i = 0; i < groups_.all[g].images; ++i) places[groups_.all[g].first + i] = i;
    }
    for (int64_t i = 0; i < count_; ++i) {
      if (layers_[i].weight != nullptr) memory = std::max(memory, forwards_[i].memory());
      maps = std::max(maps, most * layers_[i].out.stride[0]);
    }
    const int64_t size = 2 * ((maps + 63) / 64 * 64) * sizeof(S);  // what a layer reads and what it writes
    parallel(host_, groups_.count, [&](int64_t group) {
      char* own = static_cast<char*>(host_.scratch(size + memory * sizeof(T)));
      Images x{layers_[0].x, groups_.order};
      for (int64_t i = 0; i < count_; ++i) {
        const MaskedConv2d& layer = layers_[i];
        Images out{layer.out, groups_.order};
        if (i + 1 < count_) {
          out.maps.data = own + (i % 2) * size / 2;
          out.places = places;
        }
        if (layer.weight != nullptr) {
          forwards_[i].run_group(group, {x, out}, reinterpret_cast<T*>(own + size));
        } else {
          mean(layer, groups_.all[group], {x, out});
        }
        x = out;
      }
    });
  }

  static void mean(const MaskedConv2d& layer, const Groups::Group& group, const Ends& ends) {
    const MaskedSizes& s = layer.sizes;
    const T factor = T(1) / static_cast<T>(s.rows.input * s.columns.input);
    for (int64_t i = group.first; i < group.first + group.images; ++i) {
      const S* from = ends.x.image<const S>(i);
      S* to = ends.out.image<S>(i);
      for (int64_t c = 0; c < s.inputs; ++c) {
        from_accumulate(sum(s, ends.x.maps, from + c * ends.x.maps.stride[1]) * factor, to[c]);
      }
    }
  }

  // Of a channel's positions.
  static T sum(const MaskedSizes& s, const Map& maps, const S* from) {
    T total = 0;
    for (int64_t y = 0; y < s.rows.input; ++y) {
      T row = 0;
      const S* at = from + y * maps.stride[2];
      for (int64_t x = 0; x < s.columns.input; ++x) row += to_accumulate(at[x * maps.stride[3]]);
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
