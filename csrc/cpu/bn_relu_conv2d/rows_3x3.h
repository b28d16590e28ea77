// The 3x3 convolution of rows (rows.h), and its backward pass, on frames: a map with a row of zeros above and below and
// an element's images of zeros left and right, so that every tap is an offset. For small layers, and for what
// rows_winograd.h leaves.
#pragma once

#include "cpu/bn_relu_conv2d/rows.h"
#include "cpu/bn_relu_conv2d/taps.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// Frames of several channels lie row by row, so that what a tile reads is in few pages: element (y, x, n) of channel c,
// y and x counted with the frame's border, is at (y * channels + c) * pitch + x * batch + n.
template <typename T>
struct Frames {
  T* data;
  int64_t channels, height, batch, width;  // width: elements of a row of the map, all images together
  int64_t pitch;

  Frames(T* data, const ConvolutionSizes& s, int64_t channels)
      : data(data),
        channels(channels),
        height(s.height),
        batch(s.batch),
        width(s.width * s.batch),
        pitch(width + 2 * batch) {}

  // With a margin for the last vector of the last row.
  static int64_t numel(const ConvolutionSizes& s, int64_t channels) {
    return (s.height + 2) * channels * (s.width + 2) * s.batch + kMostVectors * kLanes<T>;
  }

  int64_t row_pitch() const { return channels * pitch; }
  T* row(int64_t y, int64_t c) const { return data + (y * channels + c) * pitch; }

  // Row y of channel c from make(offset, count): vectors of elements of the map.
  template <typename Make>
  void write_row(int64_t y, int64_t c, Make make) const {
    T* to = row(y + 1, c);
    std::memset(to, 0, batch * sizeof(T));
    to += batch;
    for (int64_t p = 0; p < width; p += kLanes<T>) store_first(to + p, make(p, width - p), width - p);
    std::memset(to + width, 0, batch * sizeof(T));
  }

  void clear_border(Range of) const {
    for (const int64_t y : {int64_t(0), height + 1}) {
      std::memset(row(y, of.begin), 0, (of.end - of.begin) * pitch * sizeof(T));
    }
  }
};

// Which rows of taps meet rows of the map. All, where a product with the zeros around it is not zero.
struct TapRows {
  bool all;
  int64_t height;
  Range at(int64_t y) const { return {!all && y == 0 ? 1 : 0, !all && y == height - 1 ? 2 : 3}; }
};

template <typename T>
inline bool all_finite(const T* x, int64_t n) {
  Vec<T> sum{};
  for (int64_t i = 0; i < n; i += kLanes<T>) sum += load_first<T>(x + i, n - i) * T(0);
  return sum_lanes<T>(sum) == 0;
}

// Where a tile's channels of the result have their weights: that of input channel c and tap k for channel o of the tile
// is row(c, k / 3)[k % 3 * kTap + o * pitch()].
template <typename T>
struct WeightsInPlace {
  static constexpr int64_t kTap = 1;
  const T* data;
  int64_t inputs;
  const T* row(int64_t c, int64_t ky) const { return data + c * kTaps + 3 * ky; }
  int64_t pitch() const { return inputs * kTaps; }
};

template <typename T>
struct PackedWeights {
  static constexpr int64_t kTap = kTileOutputs;
  const T* data;
  const T* row(int64_t c, int64_t ky) const { return data + (c * kTaps + 3 * ky) * kTileOutputs; }
  static constexpr int64_t pitch() { return 1; }
};

// Vectors of a row of Outputs channels of the result, from `x` in the frames' row of the first tap on.
template <int Vectors, int Outputs, typename T, typename Weights>
PYEXT_OWN_REGISTERS void convolve_rows(const Frames<T>& frames, const T* x, const Weights weights, Range taps,
                                       int64_t count, T* to, int64_t to_pitch) {
  Vec<T> sum[Outputs][Vectors] = {};
  for (int64_t c = 0; c < frames.channels; ++c) {
    for (int64_t ky = taps.begin; ky < taps.end; ++ky) {
      const T *from = x + ky * frames.row_pitch() + c * frames.pitch, *factors = weights.row(c, ky);
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx) {
        add_products<Vectors, Outputs>(from + kx * frames.batch, factors + kx * Weights::kTap, weights.pitch(), sum);
      }
    }
  }
  store_rows<T>(sum, count, [&](int o) { return to + o * to_pitch; });
}

// Row y of Outputs channels of the result.
template <int Outputs, typename T, typename Weights>
inline void convolve_row(const Frames<T>& frames, int64_t y, const Weights& weights, Range taps, T* to,
                         int64_t to_pitch) {
  constexpr int kVectors = tile_vectors(Outputs);
  const int64_t vectors = (frames.width + kLanes<T> - 1) / kLanes<T>, strips = (vectors + kVectors - 1) / kVectors;
  for (int64_t strip = 0; strip < strips; ++strip) {
    const Range part = part_of(vectors, strips, strip);
    const int64_t first = part.begin * kLanes<T>;
    with_constant<kVectors>(part.end - part.begin, [&](auto count) {
      convolve_rows<decltype(count)::value, Outputs>(frames, frames.row(y, 0) + first, weights, taps,
                                                     frames.width - first, to + first, to_pitch);
    });
  }
}

template <typename T>
class RowsForward3x3 {
 public:
  RowsForward3x3(const BNReLUConv2d& args, const Host& host)
      : call_(args, host),
        x_(rows_of<const T>(args.x)),
        out_(rows_of<T>(args.out)),
        frames_(shared<T>(host, Frames<T>::numel(call_.s, call_.s.in_channels)), call_.s, call_.s.in_channels),
        tap_rows_{!all_finite(call_.weight(), call_.s.weight_numel()), call_.s.height} {}

  void run() const {
    const ConvolutionSizes& s = call_.s;
    parallel_parts(call_.host, s.in_channels, [&](Range channels) {
      frames_.clear_border(channels);
      for (int64_t y = 0; y < s.height; ++y) {
        for (int64_t c = channels.begin; c < channels.end; ++c) {
          const T* row = x_.row(c) + y * frames_.width;
          frames_.write_row(y, c,
                            [&](int64_t p, int64_t n) { return call_.norm().relu_of(load_first<T>(row + p, n), c); });
        }
      }
    });
    const Units units{(s.out_channels + kTileOutputs - 1) / kTileOutputs, s.height};
    parallel_parts(call_.host, units.count(), [&](Range range) {
      units.visit(
          range, [](int64_t) {},
          [&](int64_t y, int64_t tile) { run_tile(y, part_of(s.out_channels, units.tiles, tile)); });
    });
  }

 private:
  void run_tile(int64_t y, Range channels) const {
    const int64_t inputs = call_.s.in_channels;
    with_constant<kTileOutputs>(channels.end - channels.begin, [&](auto outputs) {
      convolve_row<decltype(outputs)::value>(
          frames_, y, WeightsInPlace<T>{call_.weight() + channels.begin * inputs * kTaps, inputs}, tap_rows_.at(y),
          out_.row(channels.begin) + y * frames_.width, out_.pitch);
    });
  }

  Convolution<T> call_;
  Image<const T> x_;
  Image<T> out_;
  Frames<T> frames_;
  TapRows tap_rows_;
};

// A tile of dW in registers: taps in whole rows, input channels, vectors of output channels.
constexpr int kGradientTaps = kVectorBytes == 64 ? kTaps : 3;
constexpr int kGradientChannels = kVectorBytes == 64 ? 1 : 2;
constexpr int kGradientVectors = 2;
constexpr int64_t kGradientElements = 64;  // whose gradients stay in cache while all channels of a tile meet them

// Channels' rows of frames, and rows of sums by output channels for each channel and tap.
template <typename T>
struct TapTile {
  const T* z;
  int64_t z_channel, z_row, batch;
  const T* dy;
  T* sums;
  int64_t pitch;  // of dy, of the sums, and of a channel's taps
};

// sums[i][k][v] += sum over elements of z[i][element + tap k] dy[element][v].
template <int Channels, int Vectors, typename T>
PYEXT_OWN_REGISTERS void add_tap_products(const TapTile<T>& of, int64_t elements) {
  constexpr int kRows = Channels * kGradientTaps;
  Vec<T> sum[kRows][Vectors];
  const auto at = [&](int row) { return of.sums + (row / kGradientTaps * kTaps + row % kGradientTaps) * of.pitch; };
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[row][v] = load<T>(at(row) + v * kLanes<T>);
  }
  const T *z = of.z, *dy = of.dy, *end = z + elements;
  for (; z < end; ++z, dy += of.pitch) {
    Vec<T> gradient[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) gradient[v] = load_once<T>(dy + v * kLanes<T>);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const int channel = row / kGradientTaps, k = row % kGradientTaps;
      const Vec<T> factor = in_register<T>(splat<T>(z[channel * of.z_channel + k / 3 * of.z_row + k % 3 * of.batch]));
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[row][v] += factor * gradient[v];
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store<T>(at(row) + v * kLanes<T>, sum[row][v]);
  }
}

// What store_taps takes for `channels` input channels.
template <typename T>
constexpr int64_t turned_size(int64_t outputs, int64_t channels) {
  return round_up<T>(outputs) * round_up<T>(channels * kTaps);
}

// Writes the gradient of the weights of `channels` from sums [channel][kTaps][pitch], whose rows are output channels.
template <typename T>
inline void store_taps(const Convolution<T>& call, Range channels, const T* sums, int64_t pitch, T* turned) {
  const int64_t rows = (channels.end - channels.begin) * kTaps, turned_pitch = round_up<T>(rows);
  transpose_matrix(sums, pitch, sums + rows * pitch, rows, call.s.out_channels, turned, turned_pitch);
  T* to = static_cast<T*>(call.args.grad_conv_weight) + channels.begin * kTaps;
  for (int64_t o = 0; o < call.s.out_channels; ++o) {
    std::memcpy(to + o * call.s.in_channels * kTaps, turned + o * turned_pitch, rows * sizeof(T));
  }
}

// dz is a convolution of the frames of dy with the weights turned around. dW takes its sums with output channels in the
// lanes, so that it multiplies no border and adds up no lanes.
template <typename T>
class RowsBackward3x3 {
 public:
  RowsBackward3x3(const BNReLUConv2d& args, const Host& host)
      : call_(args, host),
        elements_(call_.s.batch * call_.s.positions()),
        pitch_(round_up<T>(call_.s.out_channels)),
        x_(rows_of<const T>(args.x)),
        dy_(rows_of<const T>(args.grad_out)),
        grad_x_(rows_of<T>(args.grad_x)),
        dy_frames_(shared<T>(host, Frames<T>::numel(call_.s, call_.s.out_channels)), call_.s, call_.s.out_channels),
        dy_transposed_(shared<T>(host, elements_ * pitch_)),
        tap_rows_{!all_finite(call_.weight(), call_.s.weight_numel()), call_.s.height} {}

  // For some of the input channels.
  void run(Range channels) const {
    parallel_parts(call_.host, call_.s.height, [&](Range rows) {
      for (int64_t y = rows.begin; y < rows.end; ++y) pack(y);
    });
    const int64_t tiles = (channels.end - channels.begin + kTileOutputs - 1) / kTileOutputs;
    parallel_parts(call_.host, tiles, [&](Range range) {
      const auto memory = carve_scratch<Memory>(call_.host, *this);
      for (int64_t tile = range.begin; tile < range.end; ++tile) {
        const int64_t first = channels.begin + tile * kTileOutputs;
        run_tile({first, std::min(first + kTileOutputs, channels.end)}, memory);
      }
    });
  }

 private:
  struct Memory {
    T* dz;          // [kTileOutputs][elements]
    T* z;           // frames of kTileOutputs channels
    T* sums;        // [kTileOutputs][kTaps][pitch], since the last flush
    double* total;  // the same
    T* weight;      // as PackedWeights
    T* turned;      // as store_taps has it
    int64_t dz_pitch, sums_size;

    void carve(Arena& arena, const RowsBackward3x3& of) {
      dz_pitch = round_up<T>(of.elements_);
      sums_size = kTileOutputs * kTaps * of.pitch_;
      dz = arena.take<T>(kTileOutputs * dz_pitch);
      z = arena.take<T>(Frames<T>::numel(of.call_.s, kTileOutputs));
      sums = arena.take<T>(sums_size);
      total = arena.take<double>(sums_size);
      weight = arena.take<T>(of.call_.s.out_channels * kTaps * kTileOutputs);
      turned = arena.take<T>(turned_size<T>(of.call_.s.out_channels, kTileOutputs));
    }
  };

  void pack(int64_t y) const {
    const int64_t outputs = call_.s.out_channels, first = y * dy_frames_.width;
    if (y == 0) dy_frames_.clear_border({0, outputs});
    for (int64_t o = 0; o < outputs; ++o) {
      const T* row = dy_.row(o) + first;
      dy_frames_.write_row(y, o, [&](int64_t p, int64_t n) { return load_first<T>(row + p, n); });
    }
    const T* from = dy_frames_.row(y + 1, 0) + dy_frames_.batch;
    transpose_matrix(from, dy_frames_.pitch, dy_frames_.row(y + 2, 0), outputs, dy_frames_.width,
                     dy_transposed_ + first * pitch_, pitch_);
  }

  void run_tile(Range channels, const Memory& memory) const {
    const int64_t count = channels.end - channels.begin;
    const Frames<T> z(memory.z, call_.s, kTileOutputs);
    z.clear_border({0, count});
    pack_weight(channels, memory.weight);
    with_constant<kTileOutputs>(count, [&](auto outputs) {
      for (int64_t y = 0; y < call_.s.height; ++y) {
        convolve_row<decltype(outputs)::value>(dy_frames_, y, PackedWeights<T>{memory.weight}, tap_rows_.at(y),
                                               memory.dz + y * dy_frames_.width, memory.dz_pitch);
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = channels.begin + i;
      const T* x = x_.row(c);
      for (int64_t y = 0; y < call_.s.height; ++y) {
        const T* row = x + y * z.width;
        z.write_row(y, i, [&](int64_t p, int64_t n) { return call_.norm().relu_of(load_first<T>(row + p, n), c); });
      }
      finish_row(call_, c, elements_, x, memory.dz + i * memory.dz_pitch, grad_x_.row(c));
    }
    add_grad_weight(z, count, memory);
    store_grad_weight(channels, memory);
  }

  // Of a tile's channels, turned around: tap k of the weights meets tap 8 - k of the frames.
  void pack_weight(Range channels, T* to) const {
    const int64_t count = channels.end - channels.begin;
    for (int64_t o = 0; o < call_.s.out_channels; ++o, to += kTaps * kTileOutputs) {
      const T* from = call_.weight() + (o * call_.s.in_channels + channels.begin) * kTaps;
      for (int64_t i = 0; i < count; ++i) {
        for (int k = 0; k < kTaps; ++k) to[(kTaps - 1 - k) * kTileOutputs + i] = from[i * kTaps + k];
      }
    }
  }

  void add_grad_weight(const Frames<T>& z, int64_t count, const Memory& memory) const {
    std::memset(memory.total, 0, memory.sums_size * sizeof(double));
    std::memset(memory.sums, 0, memory.sums_size * sizeof(T));
    int64_t unflushed = 0;
    for (int64_t y = 0; y < call_.s.height; ++y) {
      for (int64_t p = 0; p < z.width; p += kGradientElements) {
        const int64_t elements = std::min(z.width - p, kGradientElements);
        for (int64_t i = 0; i < count; i += kGradientChannels) {
          with_constant<kGradientChannels>(std::min<int64_t>(count - i, kGradientChannels), [&](auto some) {
            add_stretch<decltype(some)::value>(z, y, p, elements, i, memory);
          });
        }
        unflushed += elements;
        if (unflushed < kFlushElements) continue;
        flush(memory);
        unflushed = 0;
      }
    }
    flush(memory);
  }

  template <int Channels>
  void add_stretch(const Frames<T>& z, int64_t y, int64_t p, int64_t elements, int64_t i, const Memory& memory) const {
    const T* dy = dy_transposed_ + (y * z.width + p) * pitch_;
    const int64_t vectors = pitch_ / kLanes<T>;
    for (int first = 0; first < kTaps; first += kGradientTaps) {
      for (int64_t v = 0; v < vectors; v += kGradientVectors) {
        const TapTile<T> tile{z.row(y + first / 3, i) + p,
                              z.pitch,
                              z.row_pitch(),
                              z.batch,
                              dy + v * kLanes<T>,
                              memory.sums + (i * kTaps + first) * pitch_ + v * kLanes<T>,
                              pitch_};
        with_constant<kGradientVectors>(std::min<int64_t>(vectors - v, kGradientVectors), [&](auto some) {
          add_tap_products<Channels, decltype(some)::value>(tile, elements);
        });
      }
    }
  }

  static void flush(const Memory& memory) {
    for (int64_t i = 0; i < memory.sums_size; ++i) memory.total[i] += memory.sums[i];
    std::memset(memory.sums, 0, memory.sums_size * sizeof(T));
  }

  void store_grad_weight(Range channels, const Memory& memory) const {
    for (int64_t i = 0; i < memory.sums_size; ++i) memory.sums[i] = static_cast<T>(memory.total[i]);
    store_taps(call_, channels, memory.sums, pitch_, memory.turned);
  }

  Convolution<T> call_;
  int64_t elements_, pitch_;
  Image<const T> x_, dy_;
  Image<T> grad_x_;
  Frames<T> dy_frames_;
  T* dy_transposed_;
  TapRows tap_rows_;
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
