// A stem on rows of one image after another: convolutions with normalisation and ReLU, then the pool. All layers go
// down the image together, each a little ahead of the next, so that of what lies between them a window of a few rows is
// kept.
#pragma once

#include <algorithm>
#include <new>

#include "cpu/convolution_stem.h"
#include "cpu/hybrid_block/squeeze.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

namespace cs = convolution_stem;

constexpr int64_t kBandRows = 6;                // of tiles, which a layer goes down at a time
constexpr int64_t kWindowRows = kBandRows + 2;  // of a layer's planes: a band, the row above it and the one below

// Behind the planes of all channels: tiles read on there.
template <typename T>
constexpr int64_t kStemSlack = kMostVectors * kLanes<T>;

template <typename T>
struct StemLayer {
  Norm<T> norm;
  const T* weight;
  T* tiled;  // kPlaces x outputs x inputs; of all layers but the first
  int64_t inputs, outputs;
  int64_t window;  // where its result's lies among the windows
};

// How far a layer has come with an image, in rows of tiles.
struct StemProgress {
  int64_t done;   // the next row
  int64_t first;  // of the image's planes, at the top of the window
};

// Memory of a thread.
template <typename T>
struct StemScratch {
  T* image;    // where the tensor's own memory cannot serve
  T* planes;   // of a window of the image
  T* windows;  // of all layers' results
  StemProgress* progress;
  T* tiles;

  void carve(Arena& arena, const StemLayer<T>* layers, int64_t count, int64_t positions, int64_t planes_size,
             int64_t windows_size) {
    image = arena.take<T>(layers[0].inputs * round_up<T>(positions));
    planes = arena.take<T>(planes_size);
    windows = arena.take<T>(windows_size);
    progress = arena.take<StemProgress>(count);
    int64_t most_inputs = 0, most_outputs = 0;
    for (int64_t l = 1; l < count; ++l) {
      most_inputs = std::max(most_inputs, layers[l].inputs);
      most_outputs = std::max(most_outputs, layers[l].outputs);
    }
    tiles = arena.take<T>(TileScratch<T>::elements(most_inputs, most_outputs));
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
        rows_(s_.out_height()),
        read_(s_.stride * (kStep * kBandRows - 1) + 1, s_.width, s_.stride),
        tiles_(kStep * (kWindowRows - 1), s_.map_width()) {
    layers_ = static_cast<StemLayer<T>*>(host.shared(host.self, s_.layers * sizeof(StemLayer<T>)));
    for (int64_t l = 0; l < s_.layers; ++l) prepare(l);
    for (int j = 0; j < kStep; ++j) inside_[j] = inside(j);
  }

  // Threads share the rows of all images: of one that several work on, each does those above its own again.
  void forward() {
    parallel(host_, host_.threads, [&](int64_t thread) {
      const Range own = part_of(s_.batch * rows_, host_.threads, thread);
      if (own.begin == own.end) return;
      const StemScratch<T> scratch = carve();
      for (int64_t row = own.begin; row < own.end;) {
        const int64_t n = row / rows_, first = n * rows_, end = std::min(own.end, first + rows_);
        run(n, {row - first, end - first}, scratch);
        row = end;
      }
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
    layer.window = windows_size_;
    windows_size_ += layer.outputs * tiles_.planes.channel + kStemSlack<T>;
    layer.norm = {tensor(l, cs::kNormMean), tensor(l, cs::kNormBias), scale};
    if (l == 0) return;
    const int64_t kernels = layer.outputs * layer.inputs;
    layer.tiled = shared<T>(host_, kPlaces * kernels);
    transform_kernels(layer.weight, kernels, layer.tiled);
  }

  // Of the lanes of a window's tiles, those whose results in column j lie in the map.
  const LaneMask<T>* inside(int j) const {
    const int64_t length = kWindowRows * tiles_.planes.pitch + kMostVectors * kLanes<T>;
    auto* mask = shared_zeros<LaneMask<T>>(host_, length);
    for (int64_t y = 0; y < kWindowRows; ++y) {
      for (int64_t x = 0; kStep * x + j < tiles_.width; ++x) mask[y * tiles_.planes.pitch + x] = -1;
    }
    return mask;
  }

  StemScratch<T> carve() const {
    const int64_t planes_size = layers_[0].inputs * read_.channel + kStemSlack<T>;
    const auto scratch =
        carve_scratch<StemScratch<T>>(host_, layers_, s_.layers, s_.height * s_.width, planes_size, windows_size_);
    // The columns around the maps, and what vectors read behind a window.
    std::memset(scratch.planes, 0, planes_size * sizeof(T));
    std::memset(scratch.windows, 0, windows_size_ * sizeof(T));
    return scratch;
  }

  // The planes of a channel of layer l's result.
  T* window(const StemScratch<T>& scratch, int64_t l, int64_t c) const {
    return scratch.windows + layers_[l].window + c * tiles_.planes.channel;
  }

  // Rows of pooled results of image n. A row of tiles reads the first row of results of the next one, and the pool the
  // last one of the row above.
  void run(int64_t n, Range rows, const StemScratch<T>& scratch) const {
    const Image<const T> image = image_of(n, scratch);
    StemProgress* progress = scratch.progress;
    for (int64_t l = 0; l < s_.layers; ++l) {
      const int64_t first = std::max<int64_t>(rows.begin - (s_.layers - l), 0);
      progress[l] = {first, first};
      if (first == 0) clear_row(l, 0, scratch);
    }
    for (int64_t pooled = rows.begin; pooled < rows.end;) {
      for (int64_t l = 0; l < s_.layers; ++l) {
        const int64_t read = l + 1 < s_.layers ? progress[l + 1].done : pooled;
        move_window(l, std::min(read, progress[l].done), scratch);
        int64_t end = std::min({progress[l].done + kBandRows, rows.end + s_.layers - 1 - l, rows_});
        if (l > 0 && progress[l - 1].done < rows_) end = std::min(end, progress[l - 1].done - 1);
        run_layer(l, image, {progress[l].done, end}, scratch);
        progress[l].done = end;
      }
      const int64_t end = std::min(progress[s_.layers - 1].done, rows.end);
      if (pooled < end) pool(n, {pooled, end}, scratch);
      pooled = std::max(pooled, end);
    }
  }

  // Row y of the padded map, which lies in layer l's window, is zero.
  void clear_row(int64_t l, int64_t y, const StemScratch<T>& scratch) const {
    const Planes& planes = tiles_.planes;
    for (int64_t c = 0; c < layers_[l].outputs; ++c) {
      for (int64_t x = 0; x < kStep; ++x) {
        T* to = window(scratch, l, c) + planes.place(y - kStep * scratch.progress[l].first, x);
        std::memset(to, 0, planes.pitch * sizeof(T));
      }
    }
  }

  // Layer l's window begins with row `first` of its planes.
  void move_window(int64_t l, int64_t first, const StemScratch<T>& scratch) const {
    StemProgress& progress = scratch.progress[l];
    const int64_t distance = (first - progress.first) * tiles_.planes.pitch;
    const int64_t count = (progress.done - first + 1) * tiles_.planes.pitch;
    progress.first = first;
    if (distance == 0) return;
    T* plane = window(scratch, l, 0);
    for (int64_t i = 0; i < kResults * layers_[l].outputs; ++i, plane += tiles_.planes.size) {
      std::memmove(plane, plane + distance, count * sizeof(T));
    }
  }

  Image<const T> image_of(int64_t n, const StemScratch<T>& scratch) const {
    return load_image<S>(args_.x, n, s_.batch, Extent{s_.channels, s_.height, s_.width}, scratch.image);
  }

  // What rows of the first map read, into the planes' window.
  void write_image(const Image<const T>& image, Range rows, const StemScratch<T>& scratch) const {
    const int64_t first = s_.stride * rows.begin - 1, end = s_.stride * (rows.end - 1) + 2;
    for (int64_t c = 0; c < s_.channels; ++c) {
      T* channel = scratch.planes + c * read_.channel;
      for (int64_t y = first; y < end; ++y) {
        if (y >= 0 && y < s_.height) {
          write_row(image.row(c) + y * s_.width, y - first - 1, s_.width, channel);
        } else {
          for (int64_t x = 0; x < s_.stride; ++x) {
            std::memset(channel + read_.place(y - first, x), 0, read_.pitch * sizeof(T));
          }
        }
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

  void run_layer(int64_t l, const Image<const T>& image, Range rows, const StemScratch<T>& scratch) const {
    if (rows.begin >= rows.end) return;
    if (l == 0) {
      run_first(image, rows, scratch);
    } else {
      run_tiles(l, rows, scratch);
    }
    if (rows.end == rows_) clear_row(l, s_.map_height() + 1, scratch);
  }

  void run_tiles(int64_t l, Range rows, const StemScratch<T>& scratch) const {
    const StemLayer<T>& layer = layers_[l];
    const TileScratch<T> own(scratch.tiles, layer.inputs, layer.outputs);
    const TiledWeights<T> weights{layer.weight, layer.tiled, layer.inputs, layer.outputs};
    const int64_t first_read = scratch.progress[l - 1].first;
    const int64_t moved = (first_read - scratch.progress[l].first) * tiles_.planes.pitch;
    convolve_tiles(tiles_, window(scratch, l - 1, 0), weights, {rows.begin - first_read, rows.end - first_read}, own,
                   [&](int64_t first, int64_t count, Range channels, int64_t pitch) {
                     for (int64_t c = channels.begin; c < channels.end; ++c) {
                       const T* from = own.results + (c - channels.begin) * kResults * pitch;
                       put_tiles(layer.norm, c, from, pitch, first, count, window(scratch, l, c) + moved);
                     }
                   });
  }

  // Results of tiles from lane `first` on, through BN and ReLU into a channel's planes.
  void put_tiles(const Norm<T>& norm, int64_t c, const T* from, int64_t pitch, int64_t first, int64_t count,
                 T* channel) const {
    for (int r = 0; r < kResults; ++r) {
      const LaneMask<T>* mask = inside_[r % kStep] + first;
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
  void run_first(const Image<const T>& image, Range rows, const StemScratch<T>& scratch) const {
    const StemLayer<T>& layer = layers_[0];
    const Range own{kStep * rows.begin, std::min(kStep * rows.end, s_.map_height())};
    const int64_t first = own.begin - kStep * scratch.progress[0].first;
    write_image(image, own, scratch);
    for_each_tile(Range{0, layer.outputs}, [&](auto outputs, int64_t channel) {
      constexpr int kOutputs = decltype(outputs)::value;
      convolve_planes<kOutputs, T, Numbers<T>>(
          read_, scratch.planes, layer.weight + channel * layer.inputs * kTaps, layer.inputs, {0, layer.inputs},
          {0, own.end - own.begin}, tiles_.width, nullptr,
          [&](const T* from, int64_t pitch, int64_t y, int64_t x, int64_t count) {
            T row[(kMostVectors + 2) * kLanes<T>];
            for (int64_t o = 0; o < kOutputs; ++o) {
              for (int64_t i = 0; i < count; i += kLanes<T>) {
                store<T>(row + i, layer.norm.relu_of(load<T>(from + o * pitch + i), channel + o));
              }
              put_row(tiles_.planes, row, first + y, x, count, window(scratch, 0, channel + o));
            }
          });
    });
  }

  // The largest element of each window of 3x3 of the last map. Around it lie zeros, and no element is smaller.
  void pool(int64_t n, Range rows, const StemScratch<T>& scratch) const {
    const StemLayer<T>& last = layers_[s_.layers - 1];
    const int64_t width = tiles_.columns;
    for (int64_t c = 0; c < last.outputs; ++c) {
      const T* channel =
          window(scratch, s_.layers - 1, c) - scratch.progress[s_.layers - 1].first * tiles_.planes.pitch;
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
  const int64_t rows_;  // of tiles of every layer's map, and of the pooled one
  const Planes read_;   // of a window of the image
  const Tiles tiles_;   // of a window of every layer's map
  StemLayer<T>* layers_;
  int64_t windows_size_ = 0;
  const LaneMask<T>* inside_[kStep];
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
