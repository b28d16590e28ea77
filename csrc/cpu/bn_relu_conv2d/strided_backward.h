// The backward pass of the 3x3 convolution of stride two by strided_winograd.h: strip by strip of tiles, and of a strip
// some input channels after the others.
#pragma once

#include "cpu/bn_relu_conv2d/strided_winograd.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int64_t kStridedRows = 24 / kProductRows;  // tiles of channels of dz and dW at once
constexpr int64_t kFlushTiles = 512;  // summed in the accumulate type before they are added in double precision

template <typename T>
class StridedBackward {
  static constexpr int kGradients = 3;  // rows and columns of dy that a tile's gradients need

 public:
  StridedBackward(const BNReLUConv2d& args, const Host& host)
      : call_(args, host),
        s_(args.sizes),
        tiles_(s_),
        pitch_(round_up<T>(s_.out_channels)),
        grad_x_(args, call_),
        sums_(host, s_.batch, s_.in_channels),
        weight_(shared<T>(host, kAllKernels * s_.in_channels * s_.out_channels)),
        tasks_(task_count(host, s_.batch)),
        grad_weight_(shared<double>(host, tasks_ * total_size())),
        finite_(shared<bool>(host, tasks_)) {}

  // Whether all results are finite; else some were not written.
  bool run() const {
    const Host& host = call_.host;
    parallel_parts(host, product_tiles(s_.in_channels), [&](Range tiles) {
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) pack_weight(tile);
    });
    parallel_ranges(host, s_.batch, [&](Range images, int64_t task) { finite_[task] = run_images(images, task); });
    if (!std::all_of(finite_, finite_ + tasks_, [](bool own) { return own; })) return false;
    parallel_parts(host, s_.in_channels, [&](Range channels) { merge_grad_weight(channels); });
    if (!all_finite(static_cast<const T*>(call_.args.grad_conv_weight), s_.weight_numel())) return false;
    finish_norm<T>(call_, sums_, grad_x_);
    return true;
  }

 private:
  struct Memory {
    T* row;
    T* planes;      // of one channel
    T* dy;          // the elements of a tile's results x output channels x tiles
    T* maps;        // panels of maps x output channels
    T* transposed;  // the elements of a tile's results x tiles x output channels
    T* gradients;   // of each sum, in panels of output channels
    T* terms;       // terms x input channels at once x tiles
    T* back;        // the same, of dz
    T* kernels;     // kernels x input channels x output channels: since the last flush
    T* norm_sums;   // input channels x 2 vectors
    int64_t terms_pitch, gradients_place, dy_place;

    void carve(Arena& arena, const StridedBackward& of) {
      const ConvolutionSizes& s = of.s_;
      const StridedTiles<T>& tiles = of.tiles_;
      const int64_t channels = std::min(kStridedRows * kProductRows, s.in_channels);
      terms_pitch = tiles.most();
      gradients_place = tiles.most() * of.pitch_ + kPlaceSlack;
      dy_place = s.out_channels * tiles.pitch;
      row = arena.take<T>(tiles.row_size());
      planes = arena.take<T>(kAllTerms * tiles.pitch);
      dy = arena.take<T>(kResultRows * kResultRows * dy_place);
      maps = arena.take<T>(kAllMaps * s.out_channels * tiles.most());
      transposed = arena.take<T>(kResultRows * kResultRows * gradients_place);
      gradients = arena.take<T>(kAllSums * gradients_place);
      terms = arena.take<T>(kAllTerms * channels * terms_pitch);
      back = arena.take<T>(kAllTerms * channels * terms_pitch);
      kernels = arena.take<T>(of.kernels_size());
      norm_sums = arena.take<T>(2 * s.in_channels * kLanes<T>);
    }
  };

  int64_t kernels_size() const { return kAllKernels * s_.in_channels * pitch_; }
  int64_t total_size() const { return s_.in_channels * kTaps * pitch_; }
  double* total(int64_t task) const { return grad_weight_ + task * total_size(); }
  // Of the input channels from `channel` on, which begin a tile: output channels x channels of the tile.
  T* weight(int kernel, int64_t channel) const {
    return weight_ + (kernel * s_.in_channels + channel) * s_.out_channels;
  }

  void pack_weight(int64_t tile) const {
    const int64_t inputs = s_.in_channels, place = inputs * s_.out_channels;
    const Range own = product_rows(inputs, tile);
    T* to = weight(0, own.begin);
    for (int64_t o = 0; o < s_.out_channels; ++o) {
      for (int64_t i = own.begin; i < own.end; ++i, ++to) {
        T kernel[kTaps], kernels[kAllKernels];
        std::memcpy(kernel, call_.weight() + (o * inputs + i) * kTaps, sizeof(kernel));
        make_kernels(kernel, kernels);
#pragma GCC unroll 16
        for (int k = 0; k < kAllKernels; ++k) to[k * place] = kernels[k];
      }
    }
  }

  bool run_images(Range images, int64_t task) const {
    const auto memory = carve_scratch<Memory>(call_.host, *this);
    std::memset(memory.kernels, 0, kernels_size() * sizeof(T));
    std::memset(memory.transposed, 0, kResultRows * kResultRows * memory.gradients_place * sizeof(T));
    std::memset(total(task), 0, total_size() * sizeof(double));
    Vec<T> all{};
    int64_t unflushed = 0;
    tiles_.visit_strips(images, [&](Range strip) {
      if (unflushed + tiles_.tiles(strip) > kFlushTiles && unflushed > 0) {
        flush(memory.kernels, total(task));
        unflushed = 0;
      }
      unflushed += tiles_.tiles(strip);
      gather_gradients(strip, memory);
      transpose_gradients(strip, memory);
      const int64_t tiles = product_tiles(s_.in_channels);
      for (int64_t tile = 0; tile < tiles; tile += kStridedRows) {
        const Range some{tile, std::min(tile + kStridedRows, tiles)};
        const Range channels{product_rows(s_.in_channels, tile).begin, product_rows(s_.in_channels, some.end - 1).end};
        add_grad_weight(strip, channels, memory);
        spread_back(strip, some, channels, memory);
        all += finish_back(strip, channels, memory);
      }
    });
    flush(memory.kernels, total(task));
    return sum_lanes<T>(all) == 0;
  }

  // dy at the tiles of a strip, and the maps of them.
  void gather_gradients(Range strip, const Memory& memory) const {
    const Map& map = call_.args.grad_out;
    const int64_t count = tiles_.tiles(strip);
    const StripPanels<T> maps{memory.maps, kAllMaps * s_.out_channels, round_up<T>(count)};
    for (int64_t o = 0; o < s_.out_channels; ++o) {
      const auto at = [&](int i, int j) {
        return i < kResultRows && j < kResultRows
                   ? memory.dy + (kResultRows * i + j) * memory.dy_place + o * tiles_.pitch
                   : memory.planes + (kGradients * i + j) * tiles_.pitch;
      };
      tiles_.visit_rows(strip, [&](int64_t n, int64_t tile_row, int64_t tile) {
        const T* from = image_data<T>(map, n) + o * map.stride[1];
        for (int i = 0; i < kGradients; ++i) {
          gather_row(from, tile_row * kResultRows + i, at(i, 0) + tile, at(i, 1) + tile, at(i, 2) + tile);
        }
      });
      for (int k = 0; k < kGradients * kGradients; ++k) clear_rest(count, at(k / kGradients, k % kGradients));
      for (int64_t t = 0; t < count; t += kLanes<T>) {
        T* to = maps.at(o, t);
        const int64_t place = s_.out_channels * maps.width(t);
        make_maps<T>([&](int i, int j) { return load<T>(at(i, j) + t); },
                     [&](int i, int j, Vec<T> v) { store<T>(to + (kMaps * i + j) * place, v); });
      }
    }
  }

  // Elements 2 t, 2 t + 1 and 2 t + 2 of row y of a map of dy.
  void gather_row(const T* map, int64_t y, T* first, T* second, T* third) const {
    const int64_t width = tiles_.out_width, columns = tiles_.columns;
    if (y >= tiles_.out_height) {
      for (T* to : {first, second, third}) std::fill_n(to, columns, T(0));
      return;
    }
    constexpr auto kOrder = std::make_integer_sequence<int, kLanes<T>>();
    const auto make = [&](int64_t p, int64_t left) { return load_first<T>(map + y * width + p, left); };
    Vec<T> a = row_vector<T>(0, width, make), b = row_vector<T>(kLanes<T>, width, make);
    for (int64_t t = 0; t < columns; t += kLanes<T>) {
      const int64_t p = 2 * (t + kLanes<T>);
      const Vec<T> c = row_vector<T>(p, width, make), d = row_vector<T>(p + kLanes<T>, width, make);
      const Vec<T> even = even_lanes<T>(a, b, kOrder), next = even_lanes<T>(c, d, kOrder);
      store<T>(first + t, even);
      store<T>(second + t, odd_lanes<T>(a, b, kOrder));
      store<T>(third + t, from_second_lane<T>(even, next, kOrder));
      a = c;
      b = d;
    }
  }

  template <typename V, int... I>
  static Vec<V> from_second_lane(Vec<V> a, Vec<V> b, std::integer_sequence<int, I...>) {
    return __builtin_shuffle(a, b, IndexVec<V>{(I + 1)...});
  }

  // The gradients of the sums, output channels innermost.
  void transpose_gradients(Range strip, const Memory& memory) const {
    const int64_t count = tiles_.tiles(strip);
    for (int k = 0; k < kResultRows * kResultRows; ++k) {
      const T* from = memory.dy + k * memory.dy_place;
      transpose_matrix(from, tiles_.pitch, from + memory.dy_place, s_.out_channels, count,
                       memory.transposed + k * memory.gradients_place, pitch_);
    }
    const Panels<T> to = gradients(0, memory);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t o = 0; o < pitch_; o += kLanes<T>) {
        const T* from = memory.transposed + t * pitch_ + o;
        T* sums = to.at(t, o);
        const auto put = [&](int sum, Vec<T> v) { store<T>(sums + sum * memory.gradients_place, v); };
        const Vec<T> a = load<T>(from), b = load<T>(from + memory.gradients_place),
                     c = load<T>(from + 2 * memory.gradients_place), d = load<T>(from + 3 * memory.gradients_place);
        put(0, a);
        put(1, a + b);
        put(2, b);
        put(3, a + c);
        put(4, (a + b) + (c + d));
        put(5, b + d);
        put(6, c);
        put(7, c + d);
        put(8, d);
      }
    }
  }

  Panels<T> gradients(int sum, const Memory& memory) const {
    return {memory.gradients + sum * memory.gradients_place, tiles_.most(), pitch_};
  }

  void add_grad_weight(Range strip, Range channels, const Memory& memory) const {
    const int64_t rows = channels.end - channels.begin, count = tiles_.tiles(strip), pitch = tiles_.pitch;
    const int64_t place = rows * memory.terms_pitch;
    for (int64_t c = 0; c < rows; ++c) {
      gather_input(call_, tiles_, strip, channels.begin + c, memory.planes);
      for (int64_t t = 0; t < count; t += kLanes<T>) {
        T* to = memory.terms + c * memory.terms_pitch + t;
        make_terms<T>([&](int i, int j) { return load<T>(memory.planes + (i * kTerms + j) * pitch + t); },
                      [&](int row, int column, Vec<T> v) { store<T>(to + term_place(row, column) * place, v); });
      }
    }
    for (int row = 0; row < kTerms; ++row) {
      for (int column = 0; column < kTerms; ++column) {
        const Panels<T> dy = gradients(kSums * kSumOf[row] + kSumOf[column], memory);
        const int64_t kernel = kKernels * kKernelOf[row] + kKernelOf[column];
        multiply_panels<T>({memory.terms + term_place(row, column) * place, memory.terms_pitch, 1}, dy, {0, dy.count()},
                           0, count, memory.kernels + (kernel * s_.in_channels + channels.begin) * pitch_, pitch_, rows,
                           Result::kAdded);
      }
    }
  }

  // The terms of dz of tiles of the channels.
  void spread_back(Range strip, Range tiles, Range channels, const Memory& memory) const {
    const int64_t pitch = memory.terms_pitch, place = (channels.end - channels.begin) * pitch;
    const StripPanels<T> maps{memory.maps, kAllMaps * s_.out_channels, round_up<T>(tiles_.tiles(strip))};
    for (int row = 0; row < kTerms; ++row) {
      for (int column = 0; column < kTerms; ++column) {
        const int kernel = kKernels * kBackKernelOf[row] + kBackKernelOf[column];
        const int64_t map = kMaps * kMapOf[row] + kMapOf[column];
        T* to = memory.back + (kTerms * row + column) * place;
        visit_tiles(s_.in_channels, tiles, [&](auto own, int64_t channel) {
          multiply_packed<decltype(own)::value>(weight(kernel, channel), maps, map * s_.out_channels, s_.out_channels,
                                                to + (channel - channels.begin) * pitch, pitch);
        });
      }
    }
  }

  // dz of the channels from its terms, and through the normalisation. Returns zeros, or a NaN where dz is not finite.
  Vec<T> finish_back(Range strip, Range channels, const Memory& memory) const {
    const int64_t rows = channels.end - channels.begin, place = rows * memory.terms_pitch;
    Vec<T> all{};
    for (int64_t c = 0; c < rows; ++c) {
      const T* back = memory.back + c * memory.terms_pitch;
      for (int64_t t = 0; t < tiles_.tiles(strip); t += kLanes<T>) {
        make_back<T>([&](int i, int j) { return load<T>(back + (kTerms * i + j) * place + t); },
                     [&](int i, int j, Vec<T> v) {
                       store<T>(memory.planes + (kInputRows * i + j) * tiles_.pitch + t, v);
                       all += v * 0;
                     });
      }
      normalise_back(strip, channels.begin + c, memory);
    }
    return all;
  }

  void normalise_back(Range strip, int64_t c, const Memory& memory) const {
    T* at = memory.norm_sums + 2 * c * kLanes<T>;
    NormSums<T> sums{load<T>(at), load<T>(at + kLanes<T>)};
    T* row = memory.row;
    tiles_.visit_rows(strip, [&](int64_t n, int64_t tile_row, int64_t tile) {
      if (tile_row == 0) sums = NormSums<T>{};
      const T* x = image_data<T>(call_.args.x, n) + c * call_.args.x.stride[1];
      T* to = grad_x_.image(n).row(c);
      for (int i = 0; i < kInputRows; ++i) {
        const int64_t y = tile_row * kInputRows + i;
        if (y >= s_.height) break;
        join_four(memory.planes + kInputRows * i * tiles_.pitch + tile, tiles_.pitch, tiles_.columns, row);
        for (int64_t p = 0; p < s_.width; p += kLanes<T>) {
          const int64_t some = s_.width - p, offset = y * s_.width + p;
          const Vec<T> dz = some < kLanes<T> ? first_lanes<T>(load<T>(row + p), some) : load<T>(row + p);
          const Vec<T> dx = through_norm(call_.norm(), c, load_first<T>(x + offset, some), dz, sums);
          store_first(to + offset, dx, some);
        }
      }
      if (tile_row + 1 < tiles_.rows) return;
      T lanes[2][kLanes<T>];
      store<T>(lanes[0], sums.gradient);
      store<T>(lanes[1], sums.product);
      sums_.set(n, c, sum_of_lanes(lanes[0]), sum_of_lanes(lanes[1]));
    });
    store<T>(at, sums.gradient);
    store<T>(at + kLanes<T>, sums.product);
  }

  // The gradients of the transformed kernels, as those of the kernels, to the total (input channels x taps x output
  // channels).
  void flush(T* kernels, double* total) const {
    const int64_t place = s_.in_channels * pitch_;
    for (int64_t at = 0; at < place; at += kLanes<T>) {
      Vec<T> transformed[kAllKernels], kernel[kTaps];
#pragma GCC unroll 16
      for (int k = 0; k < kAllKernels; ++k) transformed[k] = load<T>(kernels + k * place + at);
      make_kernel_gradient(transformed, kernel);
      double* to = total + at / pitch_ * kTaps * pitch_ + at % pitch_;
      for (int k = 0; k < kTaps; ++k) {
        T lanes[kLanes<T>];
        store<T>(lanes, kernel[k]);
        for (int i = 0; i < kLanes<T>; ++i) to[k * pitch_ + i] += lanes[i];
      }
    }
    std::memset(kernels, 0, kernels_size() * sizeof(T));
  }

  void merge_grad_weight(Range channels) const {
    constexpr int64_t kAtOnce = 8;
    const int64_t size = kAtOnce * kTaps * pitch_;
    T* sums = static_cast<T*>(call_.host.scratch((size + turned_size<T>(s_.out_channels, kAtOnce)) * sizeof(T)));
    for (int64_t c = channels.begin; c < channels.end; c += kAtOnce) {
      const Range some{c, std::min(c + kAtOnce, channels.end)};
      const int64_t first = c * kTaps * pitch_, count = (some.end - c) * kTaps * pitch_;
      for (int64_t i = 0; i < count; ++i) {
        double sum = 0;
        for (int64_t task = 0; task < tasks_; ++task) sum += total(task)[first + i];
        sums[i] = static_cast<T>(sum);
      }
      store_taps(call_, some, sums, pitch_, sums + size);
    }
  }

  Convolution<T> call_;
  ConvolutionSizes s_;
  StridedTiles<T> tiles_;
  int64_t pitch_;
  GradientMap<T> grad_x_;
  ImageSums sums_;
  T* weight_;
  int64_t tasks_;
  double* grad_weight_;
  bool* finite_;
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
