// A dense block, layer by layer, on some images at a time. Their maps lie in one buffer, channels innermost, so that
// what a layer reads is the front of each position's channels, and what it gives follows them.
#pragma once

#include "cpu/dense_block/winograd.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int64_t kMostDepth =
    256;                           // of the 1x1 product at once: a panel of so many rows stays in the first-level cache
constexpr int64_t kMostRows = 96;  // positions of the 1x1 product at once
constexpr int64_t kMostTaken = 128;        // channels of the 3x3 convolution at once
constexpr int64_t kMostTiles = 24;         // of the 3x3 convolution at once
constexpr int64_t kWantedPositions = 128;  // of the images at once, for which weights are read once
constexpr int64_t kSlack = 16;             // keeps rows that are met together in different sets of a cache

// Memory of a thread, and of the images that it works on alone.
template <typename T>
struct DenseScratch {
  T* maps;         // images x positions x channels
  T* padded;       // images
  T* activated;    // kMostRows x kMostDepth
  T* product;      // kMostRows x results of a 1x1 convolution
  T* transformed;  // places x kMostTiles x kMostTaken
  T* results;      // places x kMostTiles x growth

  static constexpr int64_t activated_pitch() { return kMostDepth + kSlack; }
  static constexpr int64_t transformed_place() { return kMostTiles * kMostTaken + kSlack; }
  static int64_t results_place(const DenseSizes& s) { return kMostTiles * round_up<T>(s.growth) + kSlack; }

  void carve(Arena& arena, const DenseSizes& s, int64_t maps_size, int64_t padded_size) {
    maps = arena.take<T>(maps_size);
    padded = arena.take<T>(padded_size);
    const int64_t widest = std::max(s.squeeze, s.transition);
    activated = arena.take<T>(widest > 0 ? kMostRows * activated_pitch() : 0);
    product = arena.take<T>(kMostRows * round_up<T>(widest));
    transformed = arena.take<T>(s.layers > 0 ? kPlaces * transformed_place() : 0);
    results = arena.take<T>(s.layers > 0 ? kPlaces * results_place(s) : 0);
  }
};

// Images that are worked on at once.
template <typename T>
struct DenseGroup {
  int64_t first, count;
  T* maps;
  T* padded;
};

// A thread's part of a 1x1 convolution.
struct DensePart {
  Range rows, panels;
};

template <typename S>
class DenseForward {
  using T = Accumulate<S>;
  using Scratch = DenseScratch<T>;
  using Group = DenseGroup<T>;

 public:
  DenseForward(const DenseBlock& args, const Host& host)
      : args_(args),
        host_(host),
        s_(args.sizes),
        pitch_(s_.maps_channels()),
        padded_(s_, round_up<T>(s_.layers > 0 ? s_.taken(s_.layers - 1) : 0)) {
    Pieces<T> pieces(static_cast<T*>(const_cast<void*>(args.packed)));
    layers_ = shared<DenseLayer<T>>(host, s_.layers);
    for (int64_t i = 0; i < s_.layers; ++i) layers_[i] = take_layer(pieces, s_, i);
    if (s_.transition > 0) transition_ = take_transition(pieces, s_);
    in_out_ = std::is_same_v<S, T> && s_.transition == 0;
    in_x_ = std::is_same_v<S, T> && s_.layers == 0 && is_dense(args.x);
  }

  void run() {
    // Fewer images than threads: all threads work on all images together.
    if (s_.batch < host_.threads) {
      T* maps = shared<T>(host_, own_maps_size(s_.batch));
      return run_group({0, s_.batch, maps, shared<T>(host_, padded_size(s_.batch))}, nullptr, host_.threads);
    }
    parallel(host_, host_.threads, [&](int64_t thread) { run_images(part_of(s_.batch, host_.threads, thread)); });
  }

 private:
  bool is_dense(const Map& map) const {
    const int64_t row = s_.width * pitch_;
    return map.stride[1] == 1 && map.stride[3] == pitch_ && map.stride[2] == row && map.stride[0] == s_.height * row;
  }

  int64_t maps_size(int64_t images) const { return images * s_.positions() * pitch_; }
  // Where they are neither the operator's argument nor its result.
  int64_t own_maps_size(int64_t images) const { return in_out_ || in_x_ ? 0 : maps_size(images); }
  int64_t padded_size(int64_t images) const { return images * padded_.image; }

  void run_images(Range own) const {
    const int64_t images = own.end - own.begin, wanted = (kWantedPositions + s_.positions() - 1) / s_.positions();
    const int64_t most = std::min(wanted, images);
    const auto scratch = carve_scratch<Scratch>(host_, s_, own_maps_size(most), padded_size(most));
    in_parts(images, most, 1, [&](int64_t first, int64_t count) {
      run_group({own.begin + first, count, scratch.maps, scratch.padded}, &scratch, 1);
    });
  }

  // With memory of the only thread, or of none for several.
  void run_group(Group group, const Scratch* scratch, int64_t threads) const {
    if (in_out_ || in_x_)
      group.maps = static_cast<T*>(in_out_ ? args_.out.data : args_.x.data) + maps_size(group.first);
    std::memset(group.padded, 0, padded_size(group.count) * sizeof(T));
    if (!in_x_) copy_input(group);
    for (int64_t i = 0; i < s_.layers; ++i) {
      const DenseLayer<T>& layer = layers_[i];
      share(scratch, threads, [&](const Scratch& own, int64_t part) { squeeze(layer, group, own, part, threads); });
      share(scratch, threads, [&](const Scratch& own, int64_t part) { convolve(layer, group, own, part, threads); });
    }
    if (s_.transition > 0) {
      share(scratch, threads, [&](const Scratch& own, int64_t part) { pass_on(group, own, part, threads); });
    } else if (!in_out_) {
      convert(group.maps, static_cast<S*>(args_.out.data) + maps_size(group.first), maps_size(group.count));
    }
  }

  // work(memory, part) for every part of `threads`.
  template <typename Work>
  void share(const Scratch* scratch, int64_t threads, Work work) const {
    if (threads == 1) return work(*scratch, 0);
    parallel(host_, threads, [&](int64_t part) { work(carve_scratch<Scratch>(host_, s_, 0, 0), part); });
  }

  void copy_input(const Group& group) const {
    const Map& x = args_.x;
    T* to = group.maps;
    for (int64_t n = group.first; n < group.first + group.count; ++n) {
      for (int64_t p = 0; p < s_.positions(); ++p, to += pitch_) {
        const S* from = image_data<S>(x, n) + p / s_.width * x.stride[2] + p % s_.width * x.stride[3];
        if (x.stride[1] == 1) {
          convert(from, to, s_.channels);
        } else {
          for (int64_t c = 0; c < s_.channels; ++c) to[c] = to_accumulate(from[c * x.stride[1]]);
        }
      }
    }
  }

  // What the 3x3 convolution reads, with its normalisation and ReLU, to the padded maps.
  void squeeze(const DenseLayer<T>& layer, const Group& group, const Scratch& scratch, int64_t part,
               int64_t threads) const {
    const int64_t rows = group.count * s_.positions();
    if (s_.squeeze == 0) return activate_all(layer, group, part_of(rows, threads, part));
    const DensePart own = part_of_product(rows, layer.conv1.count(), part, threads);
    in_parts(own.rows.end - own.rows.begin, kMostRows, 1, [&](int64_t first, int64_t count) {
      squeeze_rows(layer, group, scratch, own.rows.begin + first, count, own.panels);
    });
  }

  // Few positions: to share out the weights is better than to read them all in every thread.
  static DensePart part_of_product(int64_t rows, int64_t panels, int64_t part, int64_t threads) {
    if (threads == 1 || rows >= 2 * kProductRows * threads) return {part_of(rows, threads, part), {0, panels}};
    return {{0, rows}, part_of(panels, threads, part)};
  }

  void squeeze_rows(const DenseLayer<T>& layer, const Group& group, const Scratch& scratch, int64_t first,
                    int64_t count, Range panels) const {
    const int64_t pitch = round_up<T>(s_.squeeze);
    in_parts(layer.inputs, kMostDepth, kLanes<T>, [&](int64_t k, int64_t depth) {
      for (int64_t r = 0; r < count; ++r) {
        activate(layer.norm1, group.maps + (first + r) * pitch_, k, depth,
                 scratch.activated + r * Scratch::activated_pitch());
      }
      multiply_panels<T>({scratch.activated, Scratch::activated_pitch(), 1}, layer.conv1, panels, k, depth,
                         scratch.product, pitch, count, k == 0 ? Result::kReplaced : Result::kAdded);
    });
    const int64_t begin = panels.begin * Panels<T>::kColumns;
    const int64_t end = std::min(panels.end * Panels<T>::kColumns, layer.conv1.columns);
    for (int64_t r = 0; r < count; ++r) {
      const T* from = scratch.product + r * pitch;
      T* to = group.padded + padded_.place(first + r);
      for (int64_t c = begin; c < end; c += kLanes<T>) store<T>(to + c, layer.norm2.relu_of(load<T>(from + c), c));
    }
  }

  void activate_all(const DenseLayer<T>& layer, const Group& group, Range rows) const {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      activate(layer.norm2, group.maps + r * pitch_, 0, layer.inputs, group.padded + padded_.place(r));
    }
  }

  // relu(BN(x)) of channels [first, first + count), up to whole vectors.
  void activate(const Normalised<T>& norm, const T* x, int64_t first, int64_t count, T* to) const {
    int64_t c = 0;
    for (; c + kLanes<T> <= count; c += kLanes<T>) {
      store<T>(to + c, norm.relu_of(load<T>(x + first + c), first + c));
    }
    if (c < count) store<T>(to + c, norm.relu_of(load_first<T>(x + first + c, count - c), first + c));
  }

  // The 3x3 convolution of the padded maps, to the layer's place among the channels.
  void convolve(const DenseLayer<T>& layer, const Group& group, const Scratch& scratch, int64_t part,
                int64_t threads) const {
    const int64_t tiles = group.count * padded_.tiles(), count = layer.conv2.count();
    const bool by_tiles = threads == 1 || count < threads || tiles >= kProductRows * threads;
    const Range own = by_tiles ? part_of(tiles, threads, part) : Range{0, tiles};
    const Range panels = by_tiles ? Range{0, count} : part_of(count, threads, part);
    in_parts(own.end - own.begin, kMostTiles, 1, [&](int64_t first, int64_t some) {
      convolve_tiles(layer, group, scratch, own.begin + first, some, panels);
    });
  }

  void convolve_tiles(const DenseLayer<T>& layer, const Group& group, const Scratch& scratch, int64_t first,
                      int64_t count, Range panels) const {
    const int64_t pitch = round_up<T>(s_.growth), place_pitch = Scratch::results_place(s_);
    in_parts(layer.conv2.depth, kMostTaken, kLanes<T>, [&](int64_t k, int64_t depth) {
      for (int64_t t = 0; t < count; ++t) {
        const T* from = group.padded + Tile(padded_, first + t).input + k;
        T* to = scratch.transformed + t * kMostTaken;
        for (int64_t c = 0; c < depth; c += kLanes<T>) {
          transform_input<T>([&](int i, int j) { return load<T>(from + i * padded_.row + j * padded_.pitch + c); },
                             to + c, Scratch::transformed_place());
        }
      }
      for (int place = 0; place < kPlaces; ++place) {
        multiply_panels<T>({scratch.transformed + place * Scratch::transformed_place(), kMostTaken, 1},
                           layer.kernels(place), panels, k, depth, scratch.results + place * place_pitch, pitch, count,
                           k == 0 ? Result::kReplaced : Result::kAdded);
      }
    });
    const int64_t begin = panels.begin * Panels<T>::kColumns, end = std::min(panels.end * Panels<T>::kColumns, pitch);
    for (int64_t t = 0; t < count; ++t) {
      const Tile tile(padded_, first + t);
      Vec<T> all{};
      for (int64_t c = begin; c < end; c += kLanes<T>) {
        Vec<T> results[kStep][kStep];
        transform_output(scratch.results + t * pitch + c, place_pitch, results);
        write_results(tile, results, group.maps + layer.inputs + c, std::min<int64_t>(s_.growth - c, kLanes<T>));
        all += results[0][0] + results[0][1] + (results[1][0] + results[1][1]);
      }
      if (sum_lanes<T>(all * 0) != 0) convolve_plainly(layer, group, tile, begin, std::min(end, s_.growth));
    }
  }

  // Results that are not finite, once more: of an infinite input, differences of sums know no more than that it is one.
  void convolve_plainly(const DenseLayer<T>& layer, const Group& group, const Tile& tile, int64_t begin,
                        int64_t end) const {
    for (int64_t y = 0; y < tile.rows; ++y) {
      for (int64_t x = 0; x < tile.columns; ++x) {
        T* to = group.maps + (tile.output + y * s_.width + x) * pitch_ + layer.inputs;
        const T* from = group.padded + tile.input + y * padded_.row + x * padded_.pitch;
        for (int64_t c = begin; c < end; ++c) {
          if (to[c] - to[c] == 0) continue;
          T sum = 0;
          for (int k = 0; k < kTaps; ++k) {
            const T* position = from + k / 3 * padded_.row + k % 3 * padded_.pitch;
            for (int64_t i = 0; i < layer.conv2.depth; ++i) sum += position[i] * kernel_at(layer, k / 3, k % 3, i, c);
          }
          to[c] = sum;
        }
      }
    }
  }

  void write_results(const Tile& tile, const Vec<T> (&results)[kStep][kStep], T* maps, int64_t channels) const {
    for (int64_t y = 0; y < tile.rows; ++y) {
      for (int64_t x = 0; x < tile.columns; ++x) {
        T* to = maps + (tile.output + y * s_.width + x) * pitch_;
        if (channels == kLanes<T>) {
          store<T>(to, results[y][x]);
        } else {
          store_partial(to, results[y][x], channels);
        }
      }
    }
  }

  // The transition: its convolution is linear, so that it can read the means of windows of 2x2 positions.
  void pass_on(const Group& group, const Scratch& scratch, int64_t part, int64_t threads) const {
    const DensePart own = part_of_product(group.count * s_.out_positions(), transition_.conv.count(), part, threads);
    const int64_t pitch = round_up<T>(s_.transition), begin = own.panels.begin * Panels<T>::kColumns;
    const int64_t end = std::min(own.panels.end * Panels<T>::kColumns, s_.transition);
    in_parts(own.rows.end - own.rows.begin, kMostRows, 1, [&](int64_t part_first, int64_t count) {
      const int64_t first = own.rows.begin + part_first;
      in_parts(pitch_, kMostDepth, kLanes<T>, [&](int64_t k, int64_t depth) {
        for (int64_t r = 0; r < count; ++r) {
          activate_window(group, first + r, k, depth, scratch.activated + r * Scratch::activated_pitch());
        }
        multiply_panels<T>({scratch.activated, Scratch::activated_pitch(), 1}, transition_.conv, own.panels, k, depth,
                           scratch.product, pitch, count, k == 0 ? Result::kReplaced : Result::kAdded);
      });
      for (int64_t r = 0; r < count && begin < end; ++r) {
        S* to = static_cast<S*>(args_.out.data) + (group.first * s_.out_positions() + first + r) * s_.transition;
        convert(scratch.product + r * pitch + begin, to + begin, end - begin);
      }
    });
  }

  // The mean of relu(BN(x)) over the window of the transition's position `p`, channels as in `activate`.
  void activate_window(const Group& group, int64_t p, int64_t first, int64_t count, T* to) const {
    const int64_t n = p / s_.out_positions(), rest = p % s_.out_positions();
    const int64_t y = rest / s_.out_width() * 2, x = rest % s_.out_width() * 2;
    const T* corner = group.maps + ((n * s_.height + y) * s_.width + x) * pitch_ + first;
    const int64_t row = s_.width * pitch_;
    for (int64_t c = 0; c < count; c += kLanes<T>) {
      Vec<T> sum{};
      for (const T* from : {corner, corner + pitch_, corner + row, corner + row + pitch_}) {
        sum += transition_.norm.relu_of(load_first<T>(from + c, count - c), first + c);
      }
      store<T>(to + c, sum / 4);
    }
  }

  const DenseBlock& args_;
  const Host& host_;
  const DenseSizes& s_;
  const int64_t pitch_;
  const Padded padded_;
  DenseLayer<T>* layers_;
  DenseTransition<T> transition_{};
  bool in_out_, in_x_;  // whether the maps lie in the result, or are the argument
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
