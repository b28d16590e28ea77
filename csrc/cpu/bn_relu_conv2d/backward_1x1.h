// Backward pass of the 1x1 convolution. For a chunk of positions, z = relu(BN(x)) is made again; then, in tiles that
// stay in registers, dz = W^T dy, strip by strip, whose lanes are positions, and dW^T += z dy^T, whose lanes are output
// channels and which sums over the chunk before it meets memory.
#pragma once

#include "cpu/bn_relu_conv2d/gradients.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int64_t kFlushPositions = 512;  // summed in the accumulate type before they are added in double precision
constexpr int kChunkStrips = kVectorBytes == 64 ? 2 : 4;
template <typename T>
constexpr int64_t kChunkPositions = kChunkStrips * kStripVectors * kLanes<T>;

// to[c][o] += sum_p z[c][p] dy[p][o] for kTileOutputs channels c and Vectors vectors of o.
template <int Vectors, typename T>
PYEXT_OWN_REGISTERS void add_outer_products(const T* z, int64_t z_pitch, const T* dy, int64_t dy_pitch,
                                            int64_t positions, T* to) {
  Vec<T> sum[kTileOutputs][Vectors];
#pragma GCC unroll 8
  for (int c = 0; c < kTileOutputs; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[c][v] = load<T>(to + c * dy_pitch + v * kLanes<T>);
  }
  for (int64_t p = 0; p < positions; ++p) {
    Vec<T> gradient[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) gradient[v] = load_once<T>(dy + p * dy_pitch + v * kLanes<T>);
#pragma GCC unroll 8
    for (int c = 0; c < kTileOutputs; ++c) {
      const Vec<T> factor = in_register<T>(splat<T>(z[c * z_pitch + p]));
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[c][v] += factor * gradient[v];
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kTileOutputs; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store<T>(to + c * dy_pitch + v * kLanes<T>, sum[c][v]);
  }
}

template <typename T>
struct PointwiseMemory {
  T* x;
  T* dy;
  T* z;              // [rows][chunk]
  T* dy_strip;       // [out_channels][strip]
  T* dy_transposed;  // of every tile of outputs: [chunk][outputs]
  T* sums;           // [in_channels][2] vectors
  T* grad_weight;    // of every tile of outputs: [rows][outputs], since the last flush
  int64_t rows;

  void carve(Arena& arena, const ConvolutionSizes& s, const OuterTiles<T>& tiles) {
    rows = round_up_to_tiles(s.in_channels);
    x = arena.take<T>(s.in_channels * round_up<T>(s.positions()));
    dy = arena.take<T>(s.out_channels * round_up<T>(s.positions()));
    z = arena.take<T>(rows * kChunkPositions<T>);
    dy_strip = arena.take<T>(s.out_channels * kStripVectors * kLanes<T>);
    dy_transposed = arena.take<T>(kChunkPositions<T> * tiles.outputs());
    sums = arena.take<T>(2 * s.in_channels * kLanes<T>);
    grad_weight = arena.take<T>(rows * tiles.outputs());
  }
};

template <typename S>
class PointwiseBackward {
  using T = Accumulate<S>;
  static constexpr int64_t kL = kLanes<T>;

 public:
  PointwiseBackward(const BNReLUConv2d& args, const Host& host)
      : call_(args, host),
        s_(args.sizes),
        tiles_(s_.out_channels),
        grad_x_(args, call_),
        sums_(host, s_.batch, s_.in_channels),
        transposed_(shared<T>(host, round_up_to_tiles(s_.in_channels) * s_.out_channels)),
        tasks_(task_count(host, s_.batch)),
        grad_weight_(shared<double>(host, tasks_ * s_.weight_numel())) {}

  void run() const {
    const int64_t tiles = round_up_to_tiles(s_.in_channels) / kTileOutputs;
    parallel_ranges(call_.host, tiles, [&](Range some, int64_t) {
      for (int64_t tile = some.begin; tile < some.end; ++tile) transpose_weight(tile * kTileOutputs);
    });
    parallel_ranges(call_.host, s_.batch, [&](Range images, int64_t task) { run_images(images, task); });
    parallel_ranges(call_.host, s_.out_channels, [&](Range outputs, int64_t) { merge_grad_weight(outputs); });
    finish_norm<S>(call_, sums_, grad_x_);
  }

 private:
  // Of a tile of input channels.
  void transpose_weight(int64_t channel) const {
    T* to = transposed_ + channel * s_.out_channels;
    const int64_t count = std::min<int64_t>(s_.in_channels - channel, kTileOutputs);
    for (int64_t o = 0; o < s_.out_channels; ++o, to += kTileOutputs) {
      const T* from = call_.weight() + o * s_.in_channels + channel;
      for (int64_t r = 0; r < kTileOutputs; ++r) to[r] = r < count ? from[r] : T(0);
    }
  }

  void run_images(Range images, int64_t task) const {
    const auto memory = carve_scratch<PointwiseMemory<T>>(call_.host, s_, tiles_);
    double* total = grad_weight_ + task * s_.weight_numel();
    std::memset(total, 0, s_.weight_numel() * sizeof(double));
    std::memset(memory.grad_weight, 0, memory.rows * tiles_.outputs() * sizeof(T));
    std::memset(memory.z, 0, memory.rows * kChunkPositions<T> * sizeof(T));
    int64_t unflushed = 0;
    for (int64_t n = images.begin; n < images.end; ++n) {
      run_image(n, memory);
      unflushed += s_.positions();
      if (unflushed < kFlushPositions && n + 1 < images.end) continue;
      flush(memory, total);
      unflushed = 0;
    }
  }

  void run_image(int64_t n, const PointwiseMemory<T>& memory) const {
    const Image<const T> x = load_image<S>(call_.args.x, n, s_.batch, call_.in_extent(), memory.x);
    const Image<const T> dy = load_image<S>(call_.args.grad_out, n, s_.batch, call_.out_extent(), memory.dy);
    const Image<T> dx = grad_x_.begin(n);
    std::memset(memory.sums, 0, 2 * s_.in_channels * kL * sizeof(T));
    for (int64_t begin = 0; begin < s_.positions(); begin += kChunkPositions<T>) {
      const int64_t count = std::min(round_up<T>(s_.positions()) - begin, kChunkPositions<T>);
      activate_chunk(x, begin, count, memory.z);
      for_each_strip<T>(count, [&](auto vectors, int64_t first) {
        constexpr int kVectors = decltype(vectors)::value;
        copy_strip<kVectors>(dy, begin + first, memory.dy_strip);
        for (int64_t channel = 0; channel < s_.in_channels; channel += kTileOutputs) {
          add_grad_input<kVectors>(x, begin + first, channel, memory, dx);
        }
        transpose_strip(memory, kVectors * kL, first);
      });
      add_grad_weight(memory, count);
    }
    for (int64_t c = 0; c < s_.in_channels; ++c) {
      const T* sums = memory.sums + 2 * c * kL;
      sums_.set(n, c, sum_of_lanes(sums), sum_of_lanes(sums + kL));
    }
  }

  void activate_chunk(const Image<const T>& x, int64_t begin, int64_t count, T* z) const {
    for (int64_t c = 0; c < s_.in_channels; ++c) {
      for (int64_t p = 0; p < count; p += kL) {
        store<T>(z + c * kChunkPositions<T> + p, call_.norm().relu_of(load<T>(x.row(c) + begin + p), c));
      }
    }
  }

  template <int Vectors>
  void copy_strip(const Image<const T>& dy, int64_t first, T* to) const {
    for (int64_t o = 0; o < s_.out_channels; ++o) {
      prefetch<Vectors, false>(dy.row(o) + first + Vectors * kL);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) store<T>(to + (o * Vectors + v) * kL, load<T>(dy.row(o) + first + v * kL));
    }
  }

  // The strip at `first` of the chunk.
  void transpose_strip(const PointwiseMemory<T>& memory, int64_t positions, int64_t first) const {
    const T* end = memory.dy_strip + s_.out_channels * positions;
    tiles_.for_each([&](auto vectors, int64_t o) {
      constexpr int64_t kOutputs = decltype(vectors)::value * kL;
      T* to = memory.dy_transposed + o * kChunkPositions<T> + first * kOutputs;
      transpose_matrix(memory.dy_strip + o * positions, positions, end, std::min(s_.out_channels - o, kOutputs),
                       positions, to, kOutputs);
    });
  }

  template <int Vectors>
  void add_grad_input(const Image<const T>& x, int64_t first, int64_t channel, const PointwiseMemory<T>& memory,
                      const Image<T>& dx) const {
#pragma GCC unroll 8
    for (int r = 0; r < kTileOutputs; ++r) {
      // What the next tile ends with, and the next chunk begins with: rows lie pages apart, which no prefetcher
      // follows.
      prefetch<Vectors, false>(x.row(channel + kTileOutputs + r) + first);
      prefetch<Vectors, true>(dx.row(channel + kTileOutputs + r) + first);
      prefetch<Vectors, false>(x.row(channel + r) + first + kChunkPositions<T>);
    }
    Vec<T> d[kTileOutputs][Vectors] = {};
    const T* weight = transposed_ + channel * s_.out_channels;
    for (int64_t o = 0; o < s_.out_channels; ++o) {
      add_products<Vectors, kTileOutputs>(memory.dy_strip + o * Vectors * kL, weight + o * kTileOutputs, 1, d);
    }
    alignas(64) T tile[kTileOutputs][Vectors * kL];
    store_tile(d, tile[0], Vectors * kL);
    for (int64_t c = channel; c < std::min(channel + kTileOutputs, s_.in_channels); ++c) {
      T* at = memory.sums + 2 * c * kL;
      NormSums<T> sums{load<T>(at), load<T>(at + kL)};
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const Vec<T> from = load<T>(x.row(c) + first + v * kL), dz = load<T>(tile[c - channel] + v * kL);
        grad_x_.put(dx.row(c) + first + v * kL, through_norm(call_.norm(), c, from, dz, sums));
      }
      store<T>(at, sums.gradient);
      store<T>(at + kL, sums.product);
    }
  }

  void add_grad_weight(const PointwiseMemory<T>& memory, int64_t positions) const {
    tiles_.for_each([&](auto vectors, int64_t o) {
      constexpr int64_t kOutputs = decltype(vectors)::value * kL;
      for (int64_t c = 0; c < memory.rows; c += kTileOutputs) {
        add_outer_products<decltype(vectors)::value>(memory.z + c * kChunkPositions<T>, kChunkPositions<T>,
                                                     memory.dy_transposed + o * kChunkPositions<T>, kOutputs, positions,
                                                     memory.grad_weight + o * memory.rows + c * kOutputs);
      }
    });
  }

  void flush(const PointwiseMemory<T>& memory, double* total) const {
    tiles_.for_each([&](auto vectors, int64_t first) {
      constexpr int64_t kOutputs = decltype(vectors)::value * kL;
      const int64_t count = std::min(s_.out_channels - first, kOutputs);
      for (int64_t c = 0; c < s_.in_channels; ++c) {
        const T* from = memory.grad_weight + first * memory.rows + c * kOutputs;
        for (int64_t o = 0; o < count; ++o) total[c * s_.out_channels + first + o] += from[o];
      }
    });
    std::memset(memory.grad_weight, 0, memory.rows * tiles_.outputs() * sizeof(T));
  }

  void merge_grad_weight(Range outputs) const {
    constexpr int64_t kAtOnce = 8;  // rows of the result, of which lines stay in cache
    T* to = static_cast<T*>(call_.args.grad_conv_weight);
    for (int64_t first = outputs.begin; first < outputs.end; first += kAtOnce) {
      const int64_t end = std::min(first + kAtOnce, outputs.end);
      for (int64_t c = 0; c < s_.in_channels; ++c) {
        for (int64_t o = first; o < end; ++o) {
          double sum = 0;
          for (int64_t t = 0; t < tasks_; ++t) sum += grad_weight_[t * s_.weight_numel() + c * s_.out_channels + o];
          to[o * s_.in_channels + c] = static_cast<T>(sum);
        }
      }
    }
  }

  Convolution<T> call_;
  ConvolutionSizes s_;
  OuterTiles<T> tiles_;
  GradientMap<S> grad_x_;
  ImageSums sums_;
  T* transposed_;  // the weight as [tile of in_channels][out_channels][kTileOutputs]
  int64_t tasks_;
  double* grad_weight_;  // of every task: in_channels x out_channels
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
