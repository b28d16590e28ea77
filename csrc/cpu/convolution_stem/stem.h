// A stem on one image after another: convolutions with normalisation and ReLU, then the pool.
#pragma once

#include <algorithm>
#include <new>

#include "cpu/convolution_stem.h"
#include "cpu/hybrid_block/squeeze.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

namespace cs = convolution_stem;

constexpr int64_t kBandRows = 4;  // of tiles, which go through all layers together

// Behind the planes of all channels: tiles read on there.
template <typename T>
constexpr int64_t kStemSlack = kMostVectors * kLanes<T>;

template <typename T>
struct StemLayer {
  Norm<T> norm;
  const T* weight;
  T* tiled;  // kPlaces x outputs x inputs; of all layers but the first
  int64_t inputs, outputs;
  int64_t place;  // of its result among the maps
};

// Memory of one image in work, and of the threads that work on it.
template <typename T>
struct StemScratch {
  T* image;       // where the tensor's own memory cannot serve
  T* planes;      // of the image
  T* maps;        // planes of all layers' results
  int64_t* done;  // of each layer, rows of tiles
  T* tiles;       // one of tiles_size per thread
  int64_t tiles_size;

  void carve(Arena& arena, const StemLayer<T>* layers, int64_t count, int64_t positions, const Planes& read,
             int64_t maps_size, int64_t threads) {
    image = arena.take<T>(layers[0].inputs * round_up<T>(positions));
    planes = arena.take<T>(layers[0].inputs * read.channel + kStemSlack<T>);
    maps = arena.take<T>(maps_size);
    done = arena.take<int64_t>(count);
    int64_t most_inputs = 0, most_outputs = 0;
    for (int64_t l = 1; l < count; ++l) {
      most_inputs = std::max(most_inputs, layers[l].inputs);
      most_outputs = std::max(most_outputs, layers[l].outputs);
    }
    tiles_size = TileScratch<T>::elements(most_inputs, most_outputs);
    tiles = arena.take<T>(threads * tiles_size);
  }
};

template <typename S>
class Stem {
  using T = Accumulate<S>;

 public:
  Stem(const ConvolutionStem& args, const Host& host)
      : args_(args),
        host_(host),
        s_(args.sizes),
        read_(s_.height, s_.width, s_.stride),
        tiles_(s_.map_height(), s_.map_width()) {
    layers_ = static_cast<StemLayer<T>*>(host.shared(host.self, s_.layers * sizeof(StemLayer<T>)));
    for (int64_t l = 0; l < s_.layers; ++l) prepare(l);
    for (int r = 0; r < kResults; ++r) inside_[r] = inside(r);
  }

  void forward() {
    // Fewer images than threads: all threads work on one image, layer by layer.
    if (s_.batch < host_.threads) {
      const StemScratch<T> scratch = carve(host_.threads);
      for (int64_t n = 0; n < s_.batch; ++n) run_together(n, scratch);
      return;
    }
    parallel(host_, host_.threads, [&](int64_t thread) {
      const Range images = part_of(s_.batch, host_.threads, thread);
      if (images.begin == images.end) return;
      const StemScratch<T> scratch = carve(1);
      for (int64_t n = images.begin; n < images.end; ++n) run_alone(n, scratch);
    });
  }

 private:
  const T* tensor(int64_t layer, int index) const {
    const int64_t at = layer * cs::kNumTensors + index;
    const StemLayer<T>& own = layers_[layer];
    return as_accumulate<T>(host_, args_.tensors[at], args_.tensor_dtypes[at],
                            cs::tensor_shape(index, own.inputs, own.outputs).numel());
  }

  void prepare(int64_t l) {
    StemLayer<T>& layer = *new (layers_ + l) StemLayer<T>{};
    layer.inputs = l == 0 ? s_.channels : args_.outputs[l - 1];
    layer.outputs = args_.outputs[l];
    layer.weight = tensor(l, cs::kConvWeight);
    const T *weight = tensor(l, cs::kNormWeight), *var = tensor(l, cs::kNormVar);
    T* scale = shared<T>(host_, layer.outputs);
    for (int64_t c = 0; c < layer.outputs; ++c) scale[c] = weight[c] / std::sqrt(var[c] + static_cast<T>(args_.eps));
    layer.place = maps_size_;
    maps_size_ += layer.outputs * tiles_.planes.channel + kStemSlack<T>;
    layer.norm = {tensor(l, cs::kNormMean), tensor(l, cs::kNormBias), scale};
    if (l == 0) return;
    const int64_t kernels = layer.outputs * layer.inputs;
    layer.tiled = shared<T>(host_, kPlaces * kernels);
    transform_kernels(layer.weight, kernels, layer.tiled);
  }

  // Of all lanes of tiles, those whose result r lies in the map.
  const LaneMask<T>* inside(int r) const {
    const int64_t length = tiles_.rows * tiles_.planes.pitch + kMostVectors * kLanes<T>;
    auto* mask = shared_zeros<LaneMask<T>>(host_, length);
    for (int64_t y = 0; y < tiles_.rows && kStep * y + r / kStep < tiles_.height; ++y) {
      for (int64_t x = 0; x < tiles_.columns && kStep * x + r % kStep < tiles_.width; ++x) {
        mask[y * tiles_.planes.pitch + x] = -1;
      }
    }
    return mask;
  }

  StemScratch<T> carve(int64_t threads) const {
    const auto scratch =
        carve_scratch<StemScratch<T>>(host_, layers_, s_.layers, s_.height * s_.width, read_, maps_size_, threads);
    std::memset(scratch.planes, 0, (layers_[0].inputs * read_.channel + kStemSlack<T>)*sizeof(T));
    for (int64_t l = 0; l < s_.layers; ++l) {
      for (int64_t c = 0; c < layers_[l].outputs; ++c) clear_border(map(scratch, l, c));
      std::memset(map(scratch, l, layers_[l].outputs), 0, kStemSlack<T> * sizeof(T));
    }
    return scratch;
  }

  // Planes of a channel of layer l's result.
  T* map(const StemScratch<T>& scratch, int64_t l, int64_t c) const {
    return scratch.maps + layers_[l].place + c * tiles_.planes.channel;
  }

  // What lies around the map in a channel's planes.
  void clear_border(T* channel) const {
    const Planes& planes = tiles_.planes;
    const int64_t rows = planes.size / planes.pitch;
    for (int64_t y = 0; y < kStep * rows; ++y) {
      const bool outside = y == 0 || y > tiles_.height;
      for (int64_t x = 0; x < kStep * planes.pitch; x = outside || x > 0 ? x + 1 : tiles_.width + 1) {
        channel[planes.place(y, x)] = 0;
      }
    }
  }

  void run_alone(int64_t n, const StemScratch<T>& scratch) const {
    const Image<const T> image = image_of(n, scratch);
    write_image(image, {0, s_.channels}, scratch);
    std::fill_n(scratch.done, s_.layers, 0);
    for (int64_t rows = 0; rows < tiles_.rows; rows += kBandRows) {
      const int64_t end = std::min(rows + kBandRows, tiles_.rows);
      for (int64_t l = 0; l < s_.layers; ++l) {
        // A tile reads the first row of the next one's results.
        const int64_t until = std::min(end + s_.layers - 1 - l, tiles_.rows);
        run_layer(l, {scratch.done[l], until}, scratch, 0);
        scratch.done[l] = until;
      }
      pool(n, {rows, end}, scratch);
    }
  }

  void run_together(int64_t n, const StemScratch<T>& scratch) const {
    const Image<const T> image = image_of(n, scratch);
    share(s_.channels, [&](Range channels, int64_t) { write_image(image, channels, scratch); });
    for (int64_t l = 0; l < s_.layers; ++l) {
      share(tiles_.rows, [&](Range rows, int64_t thread) { run_layer(l, rows, scratch, thread); });
    }
    share(tiles_.rows, [&](Range rows, int64_t) { pool(n, rows, scratch); });
  }

  template <typename Work>
  void share(int64_t items, Work work) const {
    parallel(host_, host_.threads, [&](int64_t thread) {
      const Range own = part_of(items, host_.threads, thread);
      if (own.begin < own.end) work(own, thread);
    });
  }

  Image<const T> image_of(int64_t n, const StemScratch<T>& scratch) const {
    return load_image<S>(args_.x, n, s_.batch, Extent{s_.channels, s_.height, s_.width}, scratch.image);
  }

  void write_image(const Image<const T>& image, Range channels, const StemScratch<T>& scratch) const {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      for (int64_t y = 0; y < s_.height; ++y) {
        write_row(image.row(c) + y * s_.width, y, s_.width, scratch.planes + c * read_.channel);
      }
    }
  }

  // Nothing is read behind the row.
  void write_row(const T* from, int64_t y, int64_t width, T* channel) const {
    constexpr int64_t kLength = 2 * kLanes<T>;
    for (int64_t x = 0; x < width; x += kLength) {
      T row[kLength];
      const T* at = from + x;
      const int64_t count = std::min(width - x, kLength);
      if (count < kLength) {
        std::memcpy(row, at, count * sizeof(T));
        at = row;
      }
      put_row(read_, at, y, x, count, channel);
    }
  }

  // Elements from column x of row y of a map on, into its planes; reads up to two whole vectors.
  static void put_row(const Planes& planes, const T* from, int64_t y, int64_t x, int64_t count, T* channel) {
    T* to = channel + planes.place(y + 1, x + 1);
    if (planes.stride == 1) {
      copy_row(from, to, count);
    } else {
      split_row(from, to, channel + planes.place(y + 1, x + 2), count);
    }
  }

  void run_layer(int64_t l, Range rows, const StemScratch<T>& scratch, int64_t thread) const {
    if (rows.begin == rows.end) return;
    if (l == 0) return run_first(rows, scratch);
    const StemLayer<T>& layer = layers_[l];
    const TileScratch<T> own(scratch.tiles + thread * scratch.tiles_size, layer.inputs, layer.outputs);
    const TiledWeights<T> weights{layer.weight, layer.tiled, layer.inputs, layer.outputs};
    convolve_tiles(tiles_, map(scratch, l - 1, 0), weights, rows, own,
                   [&](int64_t first, int64_t count, Range channels, int64_t pitch) {
                     for (int64_t c = channels.begin; c < channels.end; ++c) {
                       const T* from = own.results + (c - channels.begin) * kResults * pitch;
                       put_tiles(layer.norm, c, from, pitch, first, count, map(scratch, l, c));
                     }
                   });
  }

  // Results of tiles from lane `first` on, through BN and ReLU into a channel's planes.
  void put_tiles(const Norm<T>& norm, int64_t c, const T* from, int64_t pitch, int64_t first, int64_t count,
                 T* channel) const {
    for (int r = 0; r < kResults; ++r) {
      const LaneMask<T>* mask = inside_[r] + first;
      T* to = channel + tiles_.inner[r] + first;
      for (int64_t i = 0; i < count; i += kLanes<T>) {
        // What is no result is the border, which is zero.
        const Vec<T> result = keep<T>(norm.relu_of(load<T>(from + r * pitch + i), c), mask + i);
        if (count - i >= kLanes<T>) {
          store<T>(to + i, result);
        } else {
          store_partial(to + i, result, count - i);
        }
      }
    }
  }

  // The first layer, whose stride is free, in rows of the next one's tiles.
  void run_first(Range rows, const StemScratch<T>& scratch) const {
    const StemLayer<T>& layer = layers_[0];
    const Range own{kStep * rows.begin, std::min(kStep * rows.end, tiles_.height)};
    for_each_tile(Range{0, layer.outputs}, [&](auto outputs, int64_t channel) {
      constexpr int kOutputs = decltype(outputs)::value;
      convolve_planes<kOutputs, T, Numbers<T>>(
          read_, scratch.planes, layer.weight + channel * layer.inputs * kTaps, layer.inputs, {0, layer.inputs}, own,
          tiles_.width, nullptr, [&](const T* from, int64_t pitch, int64_t y, int64_t x, int64_t count) {
            T row[(kMostVectors + 2) * kLanes<T>];
            for (int64_t o = 0; o < kOutputs; ++o) {
              for (int64_t i = 0; i < count; i += kLanes<T>) {
                store<T>(row + i, layer.norm.relu_of(load<T>(from + o * pitch + i), channel + o));
              }
              put_row(tiles_.planes, row, y, x, count, map(scratch, 0, channel + o));
            }
          });
    });
  }

  // The largest element of each window of 3x3 of the last map. Around it lie zeros, and no element is smaller.
  void pool(int64_t n, Range rows, const StemScratch<T>& scratch) const {
    const StemLayer<T>& last = layers_[s_.layers - 1];
    const int64_t width = tiles_.columns;
    for (int64_t c = 0; c < last.outputs; ++c) {
      const T* channel = map(scratch, s_.layers - 1, c);
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        S* to = image_data<S>(args_.out, n) + c * args_.out.stride[1] + y * args_.out.stride[2];
        for (int64_t x = 0; x < width; x += kLanes<T>) {
          const T* at = channel + y * tiles_.planes.pitch + x;
          Vec<T> most{};
#pragma GCC unroll 9
          for (int k = 0; k < kTaps; ++k) most = larger(load<T>(at + tiles_.planes.tap[k]), most);
          put_pooled(most, std::min<int64_t>(width - x, kLanes<T>), to + x);
        }
      }
    }
  }

  static void put_pooled(Vec<T> v, int64_t count, S* to) {
    if constexpr (std::is_same_v<S, T>) {
      if (count == kLanes<T>) return store<T>(to, v);
    }
    store_partial(to, v, count);
  }

  // NaN where one is, as torch's max-pool has it.
  static Vec<T> larger(Vec<T> a, Vec<T> b) { return (a > b) | (a != a) ? a : b; }

  const ConvolutionStem& args_;
  const Host& host_;
  const cs::Sizes& s_;
  const Planes read_;  // of the image
  const Tiles tiles_;  // of every layer's map
  StemLayer<T>* layers_;
  int64_t maps_size_ = 0;
  const LaneMask<T>* inside_[kResults];
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
