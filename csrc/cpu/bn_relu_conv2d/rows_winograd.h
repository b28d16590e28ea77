// The 3x3 convolution of rows (rows.h), and its backward pass, by F(2x2, 3x3) (cpu/winograd.h). Of one row of tiles,
// columns and images are in vectors: each place's product has broadcast weights and long rows.
//
// An infinite input makes differences that say no more than that: where a result is not finite, what it belongs to is
// left to the kernels of rows_3x3.h. No other tile is reached by it.
#pragma once

#include "cpu/bn_relu_conv2d/rows_3x3.h"
#include "cpu/panels.h"
#include "cpu/winograd.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int64_t kStripPanels = 4;    // of tiles at once
constexpr int64_t kMostInputs = 64;    // channels that tiles are transformed of at once, in the forward pass
constexpr int64_t kMostChannels = 24;  // of dz and dW at once
constexpr int64_t kPlaceSlack = 16;    // keeps places that are met together in different sets of a cache

// All tiles of a map. Those of one row of tiles, by column and image, fill whole vectors.
template <typename T>
struct TileRows {
  int64_t height, width, batch;
  int64_t rows, row_elements, row_vectors;

  explicit TileRows(const ConvolutionSizes& s)
      : height(s.height),
        width(s.width),
        batch(s.batch),
        rows((s.height + kStep - 1) / kStep),
        row_elements((s.width + kStep - 1) / kStep * s.batch),
        row_vectors(round_up<T>(row_elements) / kLanes<T>) {}

  int64_t vectors() const { return rows * row_vectors; }
  int64_t elements() const { return vectors() * kLanes<T>; }
  int64_t panels() const { return (vectors() + kPanelVectors - 1) / kPanelVectors; }
  Range vectors_of(Range panels) const {
    return {panels.begin * kPanelVectors, std::min(panels.end * kPanelVectors, vectors())};
  }

  // Whether the map has an element there.
  bool holds(int64_t y, int64_t x) const { return y >= 0 && y < height && x >= 0 && x < width; }

  // Stretches of vectors that are of one row of tiles: visit(row, first element in it, elements, first vector).
  template <typename Visit>
  void visit_rows(Range of, Visit visit) const {
    for (int64_t v = of.begin; v < of.end;) {
      const int64_t first = v % row_vectors, count = std::min(row_vectors - first, of.end - v);
      visit(v / row_vectors, first * kLanes<T>, count * kLanes<T>, v);
      v += count;
    }
  }

  // Stretches of elements of a row of tiles that are of one column: visit(column, first image, images, elements
  // before).
  template <typename Visit>
  void visit_columns(int64_t first, int64_t count, Visit visit) const {
    int64_t column = first / batch, image = first % batch;
    for (int64_t at = 0; at < count; ++column, image = 0) {
      const int64_t images = std::min(batch - image, count - at);
      visit(column, image, images, at);
      at += images;
    }
  }
};

// What the tiles of a stretch of a row of tiles read of one channel, d, as B^T d: the even and the odd columns, counted
// from left of the tiles on, so that what tiles beside one another read is beside one another, too.
template <typename T>
struct Patch {
  static constexpr int64_t kMostElements = kStripPanels * kPanelVectors * kLanes<T>;
  T* data;
  int64_t batch;

  int64_t pitch() const { return kMostElements + batch + kLanes<T>; }
  static int64_t numel(int64_t batch) { return 2 * kTile * Patch{nullptr, batch}.pitch(); }
  // Row i of B^T d, of the even or the odd columns.
  T* row(int i, int64_t odd) const { return data + (odd * kTile + i) * pitch(); }

  // From make(offset), vectors of elements of the map.
  template <typename Make>
  void fill(const TileRows<T>& tiles, int64_t row_of_tiles, int64_t first, int64_t count, Make make) const {
    const int64_t column = first / batch, image = first % batch, length = count + batch, down = tiles.width * batch;
    const int64_t y = row_of_tiles * kStep - 1;
    const bool above = y >= 0, below[] = {y + 2 < tiles.height, y + 3 < tiles.height};
    for (int64_t odd = 0; odd < 2; ++odd) {
      int64_t x = column * kStep - 1 + odd, skipped = image;
      for (int64_t at = 0; at < length; x += kStep, skipped = 0) {
        const int64_t images = std::min(batch - skipped, length - at), offset = y * down + x * batch + skipped;
        T* to = row(0, odd) + at;
        const bool inside = x >= 0 && x < tiles.width;
        for (int64_t i = 0; i < images; i += kLanes<T>) {
          Vec<T> d[kTile] = {};
          if (inside) {
            if (above) d[0] = make(offset + i);
            d[1] = make(offset + down + i);
            if (below[0]) d[2] = make(offset + 2 * down + i);
            if (below[1]) d[3] = make(offset + 3 * down + i);
          }
          store_transform<T>(d, to + i, pitch());
        }
        at += images;
      }
    }
  }

  // B^T d B of the tiles of a vector, from the patch's element `first` on.
  void transform(int64_t first, T* to, int64_t place) const {
    const int64_t right = batch;
    const T *even = row(0, 0) + first, *odd = row(0, 1) + first;
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i, even += pitch(), odd += pitch(), to += kTile * place) {
      const Vec<T> d[kTile] = {load<T>(even), load<T>(odd), load<T>(even + right), load<T>(odd + right)};
      store_transform<T>(d, to, place);
    }
  }
};

// The transforms of one channel's tiles: vector v of `vectors` to to(v).
template <typename T, typename Make, typename To>
inline void transform_tiles(const TileRows<T>& tiles, const Patch<T>& patch, Range vectors, Make make, To to,
                            int64_t place) {
  tiles.visit_rows(vectors, [&](int64_t row, int64_t first, int64_t count, int64_t vector) {
    patch.fill(tiles, row, first, count, make);
    for (int64_t i = 0; i < count; i += kLanes<T>) patch.transform(i, to(vector + i / kLanes<T>), place);
  });
}

// Results of one channel at the tiles of `vectors`, from the products `m` to its map. Returns zeros, or a NaN where a
// result is not finite.
template <typename T>
inline Vec<T> write_results(const TileRows<T>& tiles, const Patch<T>& patch, Range vectors, const T* m, int64_t place,
                            T* to) {
  Vec<T> all{};
  tiles.visit_rows(vectors, [&](int64_t row, int64_t first, int64_t count, int64_t vector) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      Vec<T> results[kStep][kStep];
      transform_output(m + (vector - vectors.begin) * kLanes<T> + i, place, results);
#pragma GCC unroll 4
      for (int part = 0; part < kStep * kStep; ++part) {
        store<T>(patch.row(part, 0) + i, results[part / kStep][part % kStep]);
      }
      all += (results[0][0] + results[0][1] + (results[1][0] + results[1][1])) * 0;
    }
    const int64_t inside = std::min(count, tiles.row_elements - first);
    tiles.visit_columns(first, inside, [&](int64_t column, int64_t image, int64_t images, int64_t at) {
      for (int part = 0; part < kStep * kStep; ++part) {
        const int64_t y = row * kStep + part / kStep, x = column * kStep + part % kStep;
        if (!tiles.holds(y, x)) continue;
        copy_row(patch.row(part, 0) + at, to + (y * tiles.width + x) * tiles.batch + image, images);
      }
    });
  });
  return all;
}

// The transforms of all kernels: at each place (input channels, output channels).
template <typename T>
struct TransformedKernels {
  T* data;
  int64_t inputs, outputs, pitch;

  TransformedKernels(const ConvolutionSizes& s, const Host& host)
      : inputs(s.in_channels), outputs(s.out_channels), pitch(round_up<T>(s.out_channels)) {
    data = shared<T>(host, kPlaces * place());
  }
  int64_t place() const { return inputs * pitch + kPlaceSlack; }

  // As left factors of products over input channels, and over output channels: of the kernels turned around, whose
  // transforms are those of the kernels in another order.
  Left<T> forward(int place, int64_t output, int64_t input) const { return {at(place, input) + output, 1, pitch}; }
  Left<T> backward(int place, int64_t input) const {
    constexpr int kTurned[kTile] = {3, 1, 2, 0};
    return {at(kTurned[place / kTile] * kTile + kTurned[place % kTile], input), pitch, 1};
  }

  void make(const T* weight, Range channels, T* memory) const {
    for (int64_t c = channels.begin; c < channels.end; c += kAtOnce) {
      const int64_t count = std::min(channels.end - c, kAtOnce);
      transpose_matrix(weight + c * kTaps, inputs * kTaps, weight + outputs * inputs * kTaps, outputs, count * kTaps,
                       memory, pitch);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t o = 0; o < pitch; o += kLanes<T>) transform(memory + i * kTaps * pitch + o, at(0, c + i) + o);
      }
    }
  }
  int64_t memory_size() const { return kAtOnce * kTaps * pitch; }

 private:
  static constexpr int64_t kAtOnce = 8;  // channels, whose kernels stay in the first-level cache

  T* at(int place_index, int64_t input) const { return data + place_index * place() + input * pitch; }

  void transform(const T* from, T* to) const {
    Vec<T> kernel[kTaps], transformed[kPlaces];
#pragma GCC unroll 9
    for (int k = 0; k < kTaps; ++k) kernel[k] = load<T>(from + k * pitch);
    transform_kernel(kernel, transformed);
#pragma GCC unroll 16
    for (int k = 0; k < kPlaces; ++k) store<T>(to + k * place(), transformed[k]);
  }
};

// A channel of a map as transform_tiles reads it. What it reads of the next channel is called for.
template <typename T>
struct PlainRow {
  const T *x, *next;
  int64_t elements;

  PlainRow(const ConvolutionSizes& s, const Image<const T>& map, int64_t c, int64_t channels)
      : x(map.row(c)), next(map.row(std::min(c + 1, channels - 1))), elements(s.batch * s.positions()) {}

  Vec<T> operator()(int64_t offset) const {
    __builtin_prefetch(next + offset);
    return load_first<T>(x + offset, elements - offset);
  }
};

// relu(BN(x)).
template <typename T>
struct ActivatedRow {
  PlainRow<T> row;
  Vec<T> mean, scale, bias;

  ActivatedRow(const Convolution<T>& call, const Image<const T>& x, int64_t c)
      : row(call.s, x, c, call.s.in_channels),
        mean(splat<T>(call.norm().mean[c])),
        scale(splat<T>(call.norm().scale[c])),
        bias(splat<T>(call.norm().bias[c])) {}

  Vec<T> operator()(int64_t offset) const { return relu<T>((row(offset) - mean) * scale + bias); }
};

// Whether it is faster than the direct form, by the multiply-adds of both forward passes and those that the transforms
// take the time of: per channel and tile kTransform, measured on AVX2, more where vectors hold less than they could,
// and per kernel as many as a vector of tiles. The backward pass gains a little more.
template <typename T>
inline bool suits_winograd(const ConvolutionSizes& s) {
  constexpr int64_t kTransform = 100, kKernel = 16;
  const TileRows<T> tiles(s);
  const int64_t kernels = s.in_channels * s.out_channels, channels = s.in_channels + s.out_channels;
  const int64_t direct = kernels * 3 * (3 * s.height - 2) * s.width * s.batch;
  const int64_t transforms = kTransform * channels * tiles.elements() * round_up<T>(s.batch) / s.batch;
  return kernels * kPlaces * (tiles.elements() + kKernel) + transforms < direct;
}

template <typename T>
class RowsWinogradForward {
 public:
  RowsWinogradForward(const BNReLUConv2d& args, const Host& host)
      : call_(args, host),
        tiles_(call_.s),
        x_(rows_of<const T>(args.x)),
        out_(rows_of<T>(args.out)),
        kernels_(call_.s, host) {}

  // Whether all results are finite.
  bool run() const {
    const ConvolutionSizes& s = call_.s;
    const Host& host = call_.host;
    parallel_parts(host, s.in_channels, [&](Range channels) {
      T* memory = static_cast<T*>(host.scratch(kernels_.memory_size() * sizeof(T)));
      kernels_.make(call_.weight(), channels, memory);
    });
    // Strips of tiles, as many as threads where there are panels enough; else several parts of the output channels.
    const int64_t panels = tiles_.panels(), most = (panels + kStripPanels - 1) / kStripPanels;
    const int64_t strips = std::max(most, std::min(panels, host.threads));
    const int64_t parts = std::min(s.out_channels, (host.threads + strips - 1) / strips);
    const Units units{parts, strips};
    bool* finite = shared<bool>(host, units.count());
    parallel_parts(host, units.count(), [&](Range range) {
      const auto memory = carve_scratch<Memory>(host, *this);
      units.visit(
          range, [](int64_t) {},
          [&](int64_t strip, int64_t part) {
            finite[strip * parts + part] =
                run_unit(part_of(panels, strips, strip), part_of(s.out_channels, parts, part), memory);
          });
    });
    bool all = true;
    for (int64_t i = 0; i < units.count(); ++i) all = all && finite[i];
    return all;
  }

 private:
  struct Memory {
    T* patch;
    T* tiles;     // places x panels of a strip's tiles
    T* products;  // places x output channels x tiles
    int64_t tiles_place, products_place;

    void carve(Arena& arena, const RowsWinogradForward& of) {
      tiles_place = Patch<T>::kMostElements * std::min(of.call_.s.in_channels, kMostInputs) + kPlaceSlack;
      products_place = Patch<T>::kMostElements * of.call_.s.out_channels + kPlaceSlack;
      patch = arena.take<T>(Patch<T>::numel(of.call_.s.batch));
      tiles = arena.take<T>(kPlaces * tiles_place);
      products = arena.take<T>(kPlaces * products_place);
    }
  };

  bool run_unit(Range panels, Range outputs, const Memory& memory) const {
    const Range vectors = tiles_.vectors_of(panels);
    const int64_t count = (vectors.end - vectors.begin) * kLanes<T>, rows = outputs.end - outputs.begin;
    const Patch<T> patch{memory.patch, call_.s.batch};
    in_parts(call_.s.in_channels, kMostInputs, 1, [&](int64_t first, int64_t depth) {
      const Panels<T> transformed{memory.tiles, depth, count};
      for (int64_t i = 0; i < depth; ++i) {
        const int64_t c = first + i;
        transform_tiles(
            tiles_, patch, vectors, ActivatedRow<T>(call_, x_, c),
            [&](int64_t v) { return transformed.at(i, (v - vectors.begin) * kLanes<T>); }, memory.tiles_place);
      }
      for (int place = 0; place < kPlaces; ++place) {
        multiply_panels<T>(kernels_.forward(place, outputs.begin, first), transformed.moved(place * memory.tiles_place),
                           {0, panels.end - panels.begin}, 0, depth, memory.products + place * memory.products_place,
                           count, rows, first == 0 ? Result::kReplaced : Result::kAdded);
      }
    });
    Vec<T> all{};
    for (int64_t o = 0; o < rows; ++o) {
      all += write_results(tiles_, patch, vectors, memory.products + o * count, memory.products_place,
                           out_.row(outputs.begin + o));
    }
    return sum_lanes<T>(all) == 0;
  }

  Convolution<T> call_;
  TileRows<T> tiles_;
  Image<const T> x_;
  Image<T> out_;
  TransformedKernels<T> kernels_;
};

// Of the gradient of the result both transforms are made once: as the maps of dz's convolution, in panels of tiles, and
// as gradients of dW's, output channels in the lanes.
template <typename T>
class RowsWinogradBackward {
 public:
  RowsWinogradBackward(const BNReLUConv2d& args, const Host& host)
      : call_(args, host),
        tiles_(call_.s),
        elements_(call_.s.batch * call_.s.positions()),
        pitch_(round_up<T>(call_.s.out_channels)),
        x_(rows_of<const T>(args.x)),
        dy_(rows_of<const T>(args.grad_out)),
        grad_x_(rows_of<T>(args.grad_x)),
        kernels_(call_.s, host),
        maps_place_(call_.s.out_channels * tiles_.elements() + kPlaceSlack),
        gradients_place_(pitch_ * tiles_.elements() + kPlaceSlack),
        maps_(shared<T>(host, kPlaces * maps_place_)),
        gradients_(shared<T>(host, kPlaces * gradients_place_)) {}

  // Of each input channel whether its results were finite. They were written then.
  const bool* run() const {
    const Host& host = call_.host;
    const int64_t channels = call_.s.in_channels, panels = tiles_.panels();
    const int64_t strips = (panels + kStripPanels - 1) / kStripPanels;
    parallel(host, host.threads, [&](int64_t task) {
      const auto memory = carve_scratch<PackMemory>(host, *this);
      kernels_.make(call_.weight(), part_of(channels, host.threads, task), memory.kernels);
      const Range own = part_of(strips, host.threads, task);
      for (int64_t strip = own.begin; strip < own.end; ++strip) {
        const Range vectors = tiles_.vectors_of(part_of(panels, strips, strip));
        pack_maps(vectors, memory);
        pack_gradients(vectors, memory);
      }
    });
    bool* finite = shared<bool>(host, channels);
    const int64_t rounds = (channels + host.threads * kMostChannels - 1) / (host.threads * kMostChannels);
    const int64_t groups = std::min(channels, rounds * host.threads);
    parallel_parts(host, groups, [&](Range range) {
      const auto memory = carve_scratch<Memory>(host, *this);
      for (int64_t group = range.begin; group < range.end; ++group) {
        const Range own = part_of(channels, groups, group);
        const bool is_finite = run_group(own, memory);
        for (int64_t c = own.begin; c < own.end; ++c) finite[c] = is_finite;
      }
    });
    return finite;
  }

 private:
  static constexpr int64_t kMostElements = Patch<T>::kMostElements;

  struct PackMemory {
    T* kernels;
    T* patch;
    T* transposed;  // the elements of a tile's results x tiles x output channels

    void carve(Arena& arena, const RowsWinogradBackward& of) {
      kernels = arena.take<T>(of.kernels_.memory_size());
      patch = arena.take<T>(Patch<T>::numel(of.call_.s.batch));
      transposed = arena.take<T>(kStep * kStep * kMostElements * of.pitch_);
    }
  };

  struct Memory {
    T* patch;
    T* tiles;        // places x channels x tiles of a strip: of dz the products, of z the transforms
    T* dz;           // channels x elements
    T* sums;         // places x channels x pitch, since the last flush
    double* total;   // the same
    T* grad_weight;  // channels x taps x pitch
    T* turned;       // as store_taps has it
    int64_t place, dz_pitch, sums_place;

    void carve(Arena& arena, const RowsWinogradBackward& of) {
      const int64_t channels = std::min(of.call_.s.in_channels, kMostChannels);
      place = kMostElements * channels + kPlaceSlack;
      dz_pitch = round_up<T>(of.elements_) + kPlaceSlack;
      sums_place = channels * of.pitch_;
      patch = arena.take<T>(Patch<T>::numel(of.call_.s.batch));
      tiles = arena.take<T>(kPlaces * place);
      dz = arena.take<T>(channels * dz_pitch);
      sums = arena.take<T>(kPlaces * sums_place);
      total = arena.take<double>(of.flushed() ? kPlaces * sums_place : 0);
      grad_weight = arena.take<T>(channels * kTaps * of.pitch_);
      turned = arena.take<T>(turned_size<T>(of.call_.s.out_channels, channels));
    }
  };

  // Whether there are elements enough for sums in double precision.
  bool flushed() const { return tiles_.elements() > kFlushElements; }

  // The transforms at a place: as maps (output channels, tiles), as gradients (tiles, output channels).
  Panels<T> maps(int place) const { return {maps_ + place * maps_place_, call_.s.out_channels, tiles_.elements()}; }
  Panels<T> gradients(int place) const { return {gradients_ + place * gradients_place_, tiles_.elements(), pitch_}; }

  void pack_maps(Range vectors, const PackMemory& memory) const {
    const Patch<T> patch{memory.patch, tiles_.batch};
    for (int64_t o = 0; o < call_.s.out_channels; ++o) {
      transform_tiles(
          tiles_, patch, vectors, PlainRow<T>(call_.s, dy_, o, call_.s.out_channels),
          [&](int64_t v) { return maps(0).at(o, v * kLanes<T>); }, maps_place_);
    }
  }

  void pack_gradients(Range vectors, const PackMemory& memory) const {
    constexpr int kParts = kStep * kStep;
    const int64_t part_size = kMostElements * pitch_;
    tiles_.visit_rows(vectors, [&](int64_t row, int64_t first, int64_t count, int64_t vector) {
      for (int part = 0; part < kParts; ++part)
        transpose_part(row, first, count, part, memory.transposed + part * part_size);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t o = 0; o < pitch_; o += kLanes<T>) {
          Vec<T> dy[kStep][kStep];
#pragma GCC unroll 4
          for (int part = 0; part < kParts; ++part) {
            dy[part / kStep][part % kStep] = load<T>(memory.transposed + part * part_size + i * pitch_ + o);
          }
          transform_output_gradient<T>(dy, gradients(0).at(vector * kLanes<T> + i, o), gradients_place_);
        }
      }
    });
  }

  // Of the tiles of a stretch of a row of tiles one element each, output channels innermost; zeros beyond the map.
  void transpose_part(int64_t row, int64_t first, int64_t count, int part, T* to) const {
    const int64_t y = row * kStep + part / kStep;
    tiles_.visit_columns(first, count, [&](int64_t column, int64_t image, int64_t images, int64_t at) {
      const int64_t x = column * kStep + part % kStep;
      if (!tiles_.holds(y, x)) {
        std::memset(to + at * pitch_, 0, images * pitch_ * sizeof(T));
        return;
      }
      const int64_t offset = (y * tiles_.width + x) * tiles_.batch + image, outputs = call_.s.out_channels;
      transpose_matrix(dy_.row(0) + offset, dy_.pitch, dy_.row(outputs - 1) + elements_, outputs, images,
                       to + at * pitch_, pitch_);
    });
  }

  bool run_group(Range channels, const Memory& memory) const {
    add_grad_weight(channels, memory);
    if (!finish_grad_weight(channels, memory) || !spread_back(channels, memory)) return false;
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      finish_row(call_, c, elements_, x_.row(c), memory.dz + (c - channels.begin) * memory.dz_pitch, grad_x_.row(c));
    }
    return true;
  }

  // visit(panels, vectors) strip by strip.
  template <typename Visit>
  void visit_strips(Visit visit) const {
    in_parts(tiles_.panels(), kStripPanels, 1, [&](int64_t first, int64_t count) {
      visit(Range{first, first + count}, tiles_.vectors_of({first, first + count}));
    });
  }

  // dz. Returns whether it is finite.
  bool spread_back(Range channels, const Memory& memory) const {
    const int64_t rows = channels.end - channels.begin;
    const Patch<T> patch{memory.patch, tiles_.batch};
    Vec<T> all{};
    visit_strips([&](Range panels, Range vectors) {
      const int64_t count = (vectors.end - vectors.begin) * kLanes<T>;
      for (int place = 0; place < kPlaces; ++place) {
        const Panels<T> strip{maps(place).at(0, vectors.begin * kLanes<T>), call_.s.out_channels, count};
        multiply_panels<T>(kernels_.backward(place, channels.begin), strip, {0, panels.end - panels.begin}, 0,
                           call_.s.out_channels, memory.tiles + place * memory.place, count, rows, Result::kReplaced);
      }
      for (int64_t i = 0; i < rows; ++i) {
        all += write_results(tiles_, patch, vectors, memory.tiles + i * count, memory.place,
                             memory.dz + i * memory.dz_pitch);
      }
    });
    return sum_lanes<T>(all) == 0;
  }

  // The gradient of the transformed kernels to the sums.
  void add_grad_weight(Range channels, const Memory& memory) const {
    const Patch<T> patch{memory.patch, tiles_.batch};
    const int64_t size = kPlaces * memory.sums_place;
    std::memset(memory.sums, 0, size * sizeof(T));
    if (flushed()) std::memset(memory.total, 0, size * sizeof(double));
    int64_t unflushed = 0;
    visit_strips([&](Range, Range vectors) {
      const int64_t count = (vectors.end - vectors.begin) * kLanes<T>;
      if (unflushed + count > kFlushElements) {
        for (int64_t i = 0; i < size; ++i) memory.total[i] += memory.sums[i];
        std::memset(memory.sums, 0, size * sizeof(T));
        unflushed = 0;
      }
      unflushed += count;
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        T* to = memory.tiles + (c - channels.begin) * count;
        transform_tiles(
            tiles_, patch, vectors, ActivatedRow<T>(call_, x_, c),
            [&](int64_t v) { return to + (v - vectors.begin) * kLanes<T>; }, memory.place);
      }
      for (int place = 0; place < kPlaces; ++place) {
        const Panels<T> dy = gradients(place);
        multiply_panels<T>({memory.tiles + place * memory.place, count, 1}, dy, {0, dy.count()},
                           vectors.begin * kLanes<T>, count, memory.sums + place * memory.sums_place, pitch_,
                           channels.end - channels.begin, Result::kAdded);
      }
    });
    if (!flushed()) return;
    for (int64_t i = 0; i < size; ++i) memory.sums[i] = static_cast<T>(memory.total[i] + memory.sums[i]);
  }

  // dW from the sums. Returns whether it is finite; only then it is written.
  bool finish_grad_weight(Range channels, const Memory& memory) const {
    const int64_t size = (channels.end - channels.begin) * pitch_;
    for (int64_t at = 0; at < size; at += kLanes<T>) {
      Vec<T> transformed[kPlaces], kernel[kTaps];
#pragma GCC unroll 16
      for (int k = 0; k < kPlaces; ++k) transformed[k] = load<T>(memory.sums + k * memory.sums_place + at);
      transform_kernel_gradient(transformed, kernel);
      T* to = memory.grad_weight + (at / pitch_ * kTaps) * pitch_ + at % pitch_;
#pragma GCC unroll 9
      for (int k = 0; k < kTaps; ++k) store<T>(to + k * pitch_, kernel[k]);
    }
    if (!all_finite(memory.grad_weight, size * kTaps)) return false;
    store_taps(call_, channels, memory.grad_weight, pitch_, memory.turned);
    return true;
  }

  Convolution<T> call_;
  TileRows<T> tiles_;
  int64_t elements_, pitch_;
  Image<const T> x_, dy_;
  Image<T> grad_x_;
  TransformedKernels<T> kernels_;
  int64_t maps_place_, gradients_place_;
  T *maps_, *gradients_;
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
