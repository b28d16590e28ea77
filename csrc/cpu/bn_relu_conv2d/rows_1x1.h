// The 1x1 convolution of rows (rows.h), a matrix product, and its backward pass.
#pragma once

#include "cpu/bn_relu_conv2d/rows.h"
#include "cpu/product.h"

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

// Strips of dz = W^T dy, whose lanes are positions, from weights [output][kTileOutputs]. Not inlined, as all products:
// where callers' values take registers, the accumulators do not get them.
template <int Rows, typename T>
PYEXT_OWN_REGISTERS void spread_strip(const T* weight, const T* dy, int64_t outputs, T* dz, int64_t dz_pitch) {
  product_tile<T, Rows, kStripVectors>({weight, 1, kTileOutputs}, dy, kStripLength<T>, dz, dz_pitch, outputs,
                                       Result::kReplaced);
}

// dW^T of a chunk, z dy^T, whose lanes are output channels.
template <int Rows, typename T>
PYEXT_OWN_REGISTERS void multiply_panel(const T* z, int64_t z_pitch, const T* dy, int64_t positions, T* to,
                                        int64_t to_pitch, Result result) {
  product_tile<T, Rows, kStripVectors>({z, z_pitch, 1}, dy, kStripLength<T>, to, to_pitch, positions, result);
}

// A task has channels of x. A chunk of positions of dy lies in the second-level cache in both forms that the products
// read, while all of a task's channels meet it: strips of positions [strip][output], and panels of output channels
// [panel][position], as long as strips.
template <typename T>
class RowsBackward1x1 {
  static constexpr int64_t kStrip = kStripLength<T>;
  static constexpr int64_t kChunk = 128;  // whole strips
  static_assert(kChunk % kStrip == 0 && kFlushElements % kChunk == 0);

 public:
  RowsBackward1x1(const BNReLUConv2d& args, const Host& host)
      : call_(args, host),
        elements_(call_.s.batch * call_.s.positions()),
        panels_((call_.s.out_channels + kStrip - 1) / kStrip),
        x_(rows_of<const T>(args.x)),
        dy_(rows_of<const T>(args.grad_out)),
        grad_x_(rows_of<T>(args.grad_x)) {}

  void run() const {
    parallel_parts(call_.host, call_.s.in_channels, [&](Range channels) {
      const int64_t count = channels.end - channels.begin;
      run_channels(channels, carve_scratch<Memory>(call_.host, *this, count));
    });
  }

 private:
  // Whether there are positions enough for sums in double precision.
  bool flushed() const { return elements_ > kFlushElements; }

  struct Memory {
    T* weight;  // [tile][output][kTileOutputs]
    T* strips;
    T* panels;
    T* z;           // [kTileOutputs][kChunk]
    T* dz;          // the same
    T* sums;        // of dW^T since the last flush: [channel][pitch]
    double* total;  // the same, where there is more than one flush
    double* norm;   // sum of dz and of dz (x - mean): [channel][2]
    int64_t tiles, pitch;

    void carve(Arena& arena, const RowsBackward1x1& of, int64_t channels) {
      const int64_t outputs = of.call_.s.out_channels;
      tiles = (channels + kTileOutputs - 1) / kTileOutputs;
      pitch = of.panels_ * kStrip;
      weight = arena.take<T>(tiles * outputs * kTileOutputs + kLanes<T>);
      strips = arena.take<T>(kChunk * outputs);
      panels = arena.take<T>(kChunk * pitch);
      z = arena.take<T>(kTileOutputs * kChunk);
      dz = arena.take<T>(kTileOutputs * kChunk);
      sums = arena.take<T>(channels * pitch);
      total = arena.take<double>(of.flushed() ? channels * pitch : 0);
      norm = arena.take<double>(2 * channels);
    }
  };

  void run_channels(Range channels, const Memory& memory) const {
    const int64_t count = channels.end - channels.begin, outputs = call_.s.out_channels;
    const auto tile = [&](int64_t t) { return part_of(count, memory.tiles, t); };
    for (int64_t t = 0; t < memory.tiles; ++t) {
      pack_weight(channels.begin + tile(t).begin, memory.weight + t * outputs * kTileOutputs);
    }
    if (flushed()) std::memset(memory.total, 0, count * memory.pitch * sizeof(double));
    std::memset(memory.norm, 0, 2 * count * sizeof(double));
    for (int64_t chunk = 0; chunk < elements_; chunk += kChunk) {
      const Range positions{chunk, std::min(elements_, chunk + kChunk)};
      pack_gradient(positions, memory);
      for (int64_t t = 0; t < memory.tiles; ++t) {
        const Range some = tile(t);
        with_constant<kTileOutputs>(some.end - some.begin, [&](auto rows) {
          run_tile<decltype(rows)::value>(positions, channels.begin, some.begin,
                                          memory.weight + t * outputs * kTileOutputs, memory);
        });
      }
      const bool flushes = positions.end % kFlushElements == 0 || positions.end == elements_;
      if (flushed() && flushes) flush(count * memory.pitch, memory);
    }
    for (int64_t i = 0; i < count; ++i) finish_channel(channels.begin + i, memory.norm + 2 * i);
    store_grad_weight(channels, memory);
  }

  // Of kTileOutputs channels, of which there may be fewer, from `first` on.
  void pack_weight(int64_t first, T* to) const {
    const int64_t inputs = call_.s.in_channels;
    const T* from = call_.weight() + first;
    for (int64_t o = 0; o < call_.s.out_channels; ++o, from += inputs, to += kTileOutputs) {
      for (int64_t i = 0; i < kTileOutputs; i += kLanes<T>) {
        const int64_t left = inputs - first - i;
        store<T>(to + i, left > 0 ? load_first<T>(from + i, left) : Vec<T>{});
      }
    }
  }

  void pack_gradient(Range positions, const Memory& memory) const {
    const int64_t outputs = call_.s.out_channels, count = positions.end - positions.begin;
    for (int64_t o = 0; o < outputs; ++o) {
      const T* row = dy_.row(o) + positions.begin;
      for (int64_t p = 0; p < count; p += kStrip) {
        copy_into_strip(row + p, count - p, memory.strips + p * outputs + o * kStrip);
      }
    }
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t o = panel * kStrip, rows = std::min(outputs - o, kStrip);
      T* to = memory.panels + panel * kChunk * kStrip;
      if (rows < kStrip) std::memset(to, 0, kChunk * kStrip * sizeof(T));
      for (int64_t p = 0; p < count; p += kStrip) {
        const T* strip = memory.strips + p * outputs;
        transpose_matrix(strip + o * kStrip, kStrip, strip + outputs * kStrip, rows, kStrip, to + p * kStrip, kStrip);
      }
    }
  }

  // Rows channels from `first` of the task's, which begin at channel `task`, at a chunk of positions.
  template <int Rows>
  void run_tile(Range positions, int64_t task, int64_t first, const T* weight, const Memory& memory) const {
    const int64_t outputs = call_.s.out_channels, count = positions.end - positions.begin;
    prefetch_rows(positions, {task + first, task + first + Rows});
    for (int64_t p = 0; p < count; p += kStrip) {
      spread_strip<Rows>(weight, memory.strips + p * outputs, outputs, memory.dz + p, kChunk);
    }
    for (int64_t i = 0; i < Rows; ++i) {
      pass_back(positions, task + first + i, memory.dz + i * kChunk, memory.z + i * kChunk,
                memory.norm + 2 * (first + i));
    }
    const Result result = positions.begin % kFlushElements == 0 ? Result::kReplaced : Result::kAdded;
    for (int64_t panel = 0; panel < panels_; ++panel) {
      multiply_panel<Rows>(memory.z, kChunk, memory.panels + panel * kChunk * kStrip, count,
                           memory.sums + first * memory.pitch + panel * kStrip, memory.pitch, result);
    }
  }

  // What pass_back will read: rows lie in pages of their own, which no hardware foresees.
  void prefetch_rows(Range positions, Range channels) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      for (int64_t p = positions.begin; p < positions.end; p += kLine) {
        __builtin_prefetch(x_.row(c) + p);
        __builtin_prefetch(grad_x_.row(c) + p, 1);
      }
    }
  }

  // z of channel c, and scale * dz, for the way back through the normalisation not yet corrected.
  PYEXT_OWN_REGISTERS void pass_back(Range positions, int64_t c, const T* dz, T* z, double* norm_sums) const {
    // Constants of the function's own, which stores cannot reach, stay in registers.
    const Norm<T>& all = call_.norm();
    T mean = all.mean[c], bias = all.bias[c], scale = all.scale[c];
    const Norm<T> norm{&mean, &bias, &scale};
    const bool add = call_.args.add;
    const T* x = x_.row(c) + positions.begin;
    T* to = grad_x_.row(c) + positions.begin;
    NormSums<T> sums;
    for (int64_t left = positions.end - positions.begin; left > 0; left -= kLanes<T>) {
      const Vec<T> value = load_first<T>(x, left);
      store<T>(z, norm.relu_of(value, 0));
      const Vec<T> scaled = through_norm(norm, 0, value, load_first<T>(dz, left), sums);
      store_first(to, add ? load_first<T>(to, left) + scaled : scaled, left);
      x += kLanes<T>, dz += kLanes<T>, z += kLanes<T>, to += kLanes<T>;
    }
    norm_sums[0] += sum_lanes<T>(sums.gradient);
    norm_sums[1] += sum_lanes<T>(sums.product);
  }

  static void flush(int64_t numel, const Memory& memory) {
    for (int64_t i = 0; i < numel; ++i) memory.total[i] += memory.sums[i];
  }

  void finish_channel(int64_t c, const double* sums) const {
    const Correction correction = finish_parameters(call_, c, sums[0], sums[1]);
    if (!call_.args.training) return;
    if (double* to = call_.args.corrections) {
      to[2 * c] += correction.of_ones;
      to[2 * c + 1] += correction.of_centred;
    } else {
      correct_row(x_.row(c), elements_, call_.norm().mean[c], correction, grad_x_.row(c));
    }
  }

  void store_grad_weight(Range channels, const Memory& memory) const {
    const int64_t count = channels.end - channels.begin, outputs = call_.s.out_channels, inputs = call_.s.in_channels;
    const int64_t whole = count / kLanes<T> * kLanes<T>;
    if (flushed()) {
      for (int64_t i = 0; i < count * memory.pitch; ++i) memory.sums[i] = static_cast<T>(memory.total[i]);
    }
    T* to = static_cast<T*>(call_.args.grad_conv_weight) + channels.begin;
    transpose_matrix(memory.sums, memory.pitch, memory.sums + count * memory.pitch, whole, outputs, to, inputs);
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t i = whole; i < count; ++i) to[o * inputs + i] = memory.sums[i * memory.pitch + o];
    }
  }

  Convolution<T> call_;
  int64_t elements_, panels_;
  Image<const T> x_, dy_;
  Image<T> grad_x_;
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
