// The 1x1 convolution of rows (rows.h), a matrix product, and its backward pass.
#pragma once

#include "cpu/bn_relu_conv2d/rows.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

template <typename T>
constexpr int64_t kStripLength = kStripVectors * kLanes<T>;

// `count` elements at `from` into a whole strip, zeros behind them.
template <typename T>
inline void copy_into_strip(const T* from, int64_t count, T* to) {
#pragma GCC unroll 8
  for (int v = 0; v < kStripVectors; ++v) {
    const int64_t left = count - v * kLanes<T>;
    store<T>(to + v * kLanes<T>, left > 0 ? load_first<T>(from + v * kLanes<T>, left) : Vec<T>{});
  }
}

template <typename T>
class RowsForward1x1 {
 public:
  RowsForward1x1(const BNReLUConv2d& args, const Host& host)
      : call_(args, host),
        elements_(call_.s.batch * call_.s.positions()),
        x_(rows_of<const T>(args.x)),
        out_(rows_of<T>(args.out)) {}

  void run() const {
    const ConvolutionSizes& s = call_.s;
    const Units units{(s.out_channels + kTileOutputs - 1) / kTileOutputs,
                      (elements_ + kStripLength<T> - 1) / kStripLength<T>};
    parallel_parts(call_.host, units.count(), [&](Range range) {
      T* strip = static_cast<T*>(call_.host.scratch(s.in_channels * kStripLength<T> * sizeof(T)));
      units.visit(
          range, [&](int64_t at) { activate_strip(at * kStripLength<T>, strip); },
          [&](int64_t at, int64_t tile) { multiply_tile(at * kStripLength<T>, tile, strip); });
    });
  }

 private:
  void activate_strip(int64_t first, T* strip) const {
    const int64_t count = elements_ - first;
    for (int64_t c = 0; c < call_.s.in_channels; ++c, strip += kStripLength<T>) {
      copy_into_strip(x_.row(c) + first, count, strip);
#pragma GCC unroll 8
      for (int v = 0; v < kStripVectors; ++v) {
        T* at = strip + v * kLanes<T>;
        store<T>(at, call_.norm().relu_of(load<T>(at), c));
      }
    }
  }

  void multiply_tile(int64_t first, int64_t tile, const T* strip) const {
    const ConvolutionSizes& s = call_.s;
    const int64_t tiles = (s.out_channels + kTileOutputs - 1) / kTileOutputs;
    const Range channels = part_of(s.out_channels, tiles, tile);
    with_constant<kTileOutputs>(channels.end - channels.begin, [&](auto outputs) {
      constexpr int kOutputs = decltype(outputs)::value;
      Vec<T> sum[kOutputs][kStripVectors] = {};
      multiply<kStripVectors, kOutputs>(strip, call_.weight() + channels.begin * s.in_channels, s.in_channels, sum);
      store_rows<T>(sum, elements_ - first, [&](int o) { return out_.row(channels.begin + o) + first; });
    });
  }

  Convolution<T> call_;
  int64_t elements_;
  Image<const T> x_;
  Image<T> out_;
};

// Of the gradient of the result both forms that the products read: strips of positions [strip][channel], and panels of
// kOuterVectors vectors of channels [panel][position].
template <typename T>
class RowsBackward1x1 {
  static constexpr int64_t kPanel = kOuterVectors * kLanes<T>;
  static constexpr int64_t kGroupTiles = 4, kGroup = kGroupTiles * kTileOutputs;
  static constexpr int64_t kChunk = 256;  // whole strips

 public:
  RowsBackward1x1(const BNReLUConv2d& args, const Host& host)
      : call_(args, host),
        elements_(call_.s.batch * call_.s.positions()),
        strips_((elements_ + kStripLength<T> - 1) / kStripLength<T>),
        panels_((call_.s.out_channels + kPanel - 1) / kPanel),
        x_(rows_of<const T>(args.x)),
        dy_(rows_of<const T>(args.grad_out)),
        grad_x_(rows_of<T>(args.grad_x)),
        dy_strips_(shared<T>(host, strips_ * kStripLength<T> * call_.s.out_channels)),
        dy_panels_(shared<T>(host, panels_ * kPanel * elements_)) {}

  void run() const {
    parallel_parts(call_.host, strips_, [&](Range strips) {
      for (int64_t strip = strips.begin; strip < strips.end; ++strip) pack(strip);
    });
    const int64_t tiles = (call_.s.in_channels + kTileOutputs - 1) / kTileOutputs;
    parallel_parts(call_.host, tiles, [&](Range range) {
      const auto memory = carve_scratch<Memory>(call_.host, *this);
      for (int64_t tile = range.begin; tile < range.end; tile += kGroupTiles) {
        const int64_t end = std::min(tile + kGroupTiles, range.end);
        run_group({tile * kTileOutputs, std::min(end * kTileOutputs, call_.s.in_channels)}, memory);
      }
    });
  }

 private:
  struct Memory {
    T* weight;      // [tile][out_channels][kTileOutputs]
    T* z;           // [kTileOutputs][kChunk]
    T* dz;          // [channel][pitch]
    T* sums;        // [kTileOutputs][kPanel]
    double* total;  // [channel][panels * kPanel]
    int64_t pitch;

    void carve(Arena& arena, const RowsBackward1x1& of) {
      pitch = of.strips_ * kStripLength<T>;
      weight = arena.take<T>(kGroup * of.call_.s.out_channels);
      z = arena.take<T>(kTileOutputs * kChunk);
      dz = arena.take<T>(kGroup * pitch);
      sums = arena.take<T>(kTileOutputs * kPanel);
      total = arena.take<double>(kGroup * of.panels_ * kPanel);
    }
  };

  void pack(int64_t strip) const {
    const int64_t outputs = call_.s.out_channels, first = strip * kStripLength<T>;
    const int64_t count = std::min(elements_ - first, kStripLength<T>);
    T* to = dy_strips_ + first * outputs;
    for (int64_t o = 0; o < outputs; ++o) copy_into_strip(dy_.row(o) + first, count, to + o * kStripLength<T>);
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t o = panel * kPanel, rows = std::min(outputs - o, kPanel);
      T* panel_to = dy_panels_ + (panel * elements_ + first) * kPanel;
      if (rows < kPanel) std::memset(panel_to, 0, count * kPanel * sizeof(T));
      transpose_matrix(to + o * kStripLength<T>, kStripLength<T>, to + outputs * kStripLength<T>, rows, count, panel_to,
                       kPanel);
    }
  }

  // All of a group's tiles meet a chunk of positions while its gradients are in cache.
  void run_group(Range channels, const Memory& memory) const {
    const int64_t count = channels.end - channels.begin, outputs = call_.s.out_channels;
    for (int64_t first = 0; first < count; first += kTileOutputs) pack_weight(channels, first, memory);
    std::memset(memory.total, 0, kGroup * panels_ * kPanel * sizeof(double));
    for (int64_t chunk = 0; chunk < elements_; chunk += kChunk) {
      for (int64_t first = 0; first < count; first += kTileOutputs) {
        spread_chunk(chunk, first, memory);
        activate_chunk(chunk, {channels.begin + first, channels.end}, memory.z);
        add_grad_weight(chunk, first, memory);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = channels.begin + i;
      finish_row(call_, c, x_.row(c), memory.dz + i * memory.pitch, grad_x_.row(c));
    }
    T* to = static_cast<T*>(call_.args.grad_conv_weight) + channels.begin;
    for (int64_t o = 0; o < outputs; ++o, to += call_.s.in_channels) {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(memory.total[i * panels_ * kPanel + o]);
    }
  }

  void pack_weight(Range channels, int64_t first, const Memory& memory) const {
    const int64_t count = std::min(channels.end - channels.begin - first, int64_t(kTileOutputs));
    const T* from = call_.weight() + channels.begin + first;
    T* to = memory.weight + first * call_.s.out_channels;
    for (int64_t o = 0; o < call_.s.out_channels; ++o, from += call_.s.in_channels, to += kTileOutputs) {
      for (int64_t i = 0; i < kTileOutputs; ++i) to[i] = i < count ? from[i] : T(0);
    }
  }

  // z at a chunk of positions; a tile's rows beyond the last channel repeat it.
  void activate_chunk(int64_t chunk, Range channels, T* z) const {
    const int64_t count = std::min(elements_ - chunk, kChunk);
    for (int64_t i = 0; i < kTileOutputs; ++i, z += kChunk) {
      const int64_t c = std::min(channels.begin + i, channels.end - 1);
      const T* x = x_.row(c) + chunk;
      for (int64_t p = 0; p < count; p += kLanes<T>) {
        store<T>(z + p, call_.norm().relu_of(load_first<T>(x + p, count - p), c));
      }
    }
  }

  // dz of a tile of channels.
  void spread_chunk(int64_t chunk, int64_t first, const Memory& memory) const {
    const int64_t outputs = call_.s.out_channels, end = std::min(elements_, chunk + kChunk);
    const T* weight = memory.weight + first * outputs;
    for (int64_t p = chunk; p < end; p += kStripLength<T>) {
      const T* dy = dy_strips_ + p * outputs;
      Vec<T> sum[kTileOutputs][kStripVectors] = {};
      for (int64_t o = 0; o < outputs; ++o) {
        add_products<kStripVectors, kTileOutputs>(dy + o * kStripLength<T>, weight + o * kTileOutputs, 1, sum);
      }
      store_rows<T>(sum, kStripLength<T>, [&](int i) { return memory.dz + (first + i) * memory.pitch + p; });
    }
  }

  void add_grad_weight(int64_t chunk, int64_t first, const Memory& memory) const {
    const int64_t count = std::min(elements_ - chunk, kChunk);
    for (int64_t panel = 0; panel < panels_; ++panel) {
      std::memset(memory.sums, 0, kTileOutputs * kPanel * sizeof(T));
      add_outer_products<kOuterVectors>(memory.z, kChunk, dy_panels_ + (panel * elements_ + chunk) * kPanel, kPanel,
                                        count, memory.sums);
      for (int64_t i = 0; i < kTileOutputs; ++i) {
        double* to = memory.total + ((first + i) * panels_ + panel) * kPanel;
        for (int64_t o = 0; o < kPanel; ++o) to[o] += memory.sums[i * kPanel + o];
      }
    }
  }

  Convolution<T> call_;
  int64_t elements_, strips_, panels_;
  Image<const T> x_, dy_;
  Image<T> grad_x_;
  T *dy_strips_, *dy_panels_;
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
