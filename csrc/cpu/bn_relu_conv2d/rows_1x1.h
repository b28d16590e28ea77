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
      for (int64_t tile = range.begin; tile < range.end; ++tile) {
        const Range channels{tile * kTileOutputs, std::min((tile + 1) * kTileOutputs, call_.s.in_channels)};
        run_tile(channels, memory);
      }
    });
  }

 private:
  struct Memory {
    T* weight;      // [out_channels][kTileOutputs]
    T* z;           // [kTileOutputs][pitch]
    T* dz;          // [kTileOutputs][pitch]
    T* sums;        // [kTileOutputs][kPanel]
    double* total;  // [kTileOutputs][panels * kPanel]
    int64_t pitch;

    void carve(Arena& arena, const RowsBackward1x1& of) {
      pitch = of.strips_ * kStripLength<T>;
      weight = arena.take<T>(of.call_.s.out_channels * kTileOutputs);
      z = arena.take<T>(kTileOutputs * pitch);
      dz = arena.take<T>(kTileOutputs * pitch);
      sums = arena.take<T>(kTileOutputs * kPanel);
      total = arena.take<double>(kTileOutputs * of.panels_ * kPanel);
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

  void run_tile(Range channels, const Memory& memory) const {
    const int64_t count = channels.end - channels.begin, outputs = call_.s.out_channels;
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t i = 0; i < kTileOutputs; ++i) {
        memory.weight[o * kTileOutputs + i] =
            i < count ? call_.weight()[o * call_.s.in_channels + channels.begin + i] : T(0);
      }
    }
    for (int64_t strip = 0; strip < strips_; ++strip) spread_strip(strip, memory);
    for (int64_t i = 0; i < kTileOutputs; ++i) {
      const int64_t c = std::min(channels.begin + i, channels.end - 1);  // a tile's rows beyond the last repeat it
      const T* x = x_.row(c);
      T* z = memory.z + i * memory.pitch;
      for (int64_t p = 0; p < elements_; p += kLanes<T>) {
        store<T>(z + p, call_.norm().relu_of(load_first<T>(x + p, elements_ - p), c));
      }
      if (i < count) finish_row(call_, c, x, memory.dz + i * memory.pitch, grad_x_.row(c));
    }
    add_grad_weight(memory);
    T* to = static_cast<T*>(call_.args.grad_conv_weight) + channels.begin;
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t i = 0; i < count; ++i) {
        to[o * call_.s.in_channels + i] = static_cast<T>(memory.total[i * panels_ * kPanel + o]);
      }
    }
  }

  // dz of a tile of channels at a strip.
  void spread_strip(int64_t strip, const Memory& memory) const {
    const T* dy = dy_strips_ + strip * kStripLength<T> * call_.s.out_channels;
    Vec<T> sum[kTileOutputs][kStripVectors] = {};
    for (int64_t o = 0; o < call_.s.out_channels; ++o) {
      add_products<kStripVectors, kTileOutputs>(dy + o * kStripLength<T>, memory.weight + o * kTileOutputs, 1, sum);
    }
    store_rows<T>(sum, kStripLength<T>, [&](int i) { return memory.dz + i * memory.pitch + strip * kStripLength<T>; });
  }

  void add_grad_weight(const Memory& memory) const {
    std::memset(memory.total, 0, kTileOutputs * panels_ * kPanel * sizeof(double));
    for (int64_t first = 0; first < elements_; first += kFlushElements) {
      const int64_t count = std::min(elements_ - first, kFlushElements);
      for (int64_t panel = 0; panel < panels_; ++panel) {
        std::memset(memory.sums, 0, kTileOutputs * kPanel * sizeof(T));
        add_outer_products<kOuterVectors>(memory.z + first, memory.pitch,
                                          dy_panels_ + (panel * elements_ + first) * kPanel, kPanel, count,
                                          memory.sums);
        for (int64_t i = 0; i < kTileOutputs; ++i) {
          double* to = memory.total + (i * panels_ + panel) * kPanel;
          for (int64_t o = 0; o < kPanel; ++o) to[o] += memory.sums[i * kPanel + o];
        }
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
