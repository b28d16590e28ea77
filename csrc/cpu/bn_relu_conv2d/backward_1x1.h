// Backward pass of the 1x1 convolution. For a strip of positions, z = relu(BN(x)) is made again; then, in tiles that
// stay in registers, dz = W^T dy, whose lanes are positions, and dW^T += z dy^T, whose lanes are output channels.
#pragma once

#include "cpu/bn_relu_conv2d/gradients.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int kOuterVectors = kTileRegisters / kTileOutputs;
constexpr int64_t kFlushPositions = 512;  // summed in the accumulate type before they are added in double precision

// to[c][o] += sum_p z[c][p] dy[p][o] for kTileOutputs channels c and Vectors vectors of o.
template <int Vectors, typename T>
inline void add_outer_products(const T* z, int64_t z_pitch, const T* dy, int64_t dy_pitch, int64_t positions, T* to) {
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
  T* z_strip;        // [rows][strip]
  T* dy_strip;       // [out_channels][strip]
  T* dy_transposed;  // [strip][pitch]
  T* sums;           // [in_channels][2] vectors
  T* grad_weight;    // [rows][pitch], since the last flush
  int64_t rows, pitch;

  void carve(Arena& arena, const ConvolutionSizes& s) {
    constexpr int64_t kStrip = kStripVectors * kLanes<T>;
    rows = round_up_to_tiles(s.in_channels);
    pitch = round_up<T>(s.out_channels);
    x = arena.take<T>(s.in_channels * round_up<T>(s.positions()));
    dy = arena.take<T>(s.out_channels * round_up<T>(s.positions()));
    z_strip = arena.take<T>(rows * kStrip);
    dy_strip = arena.take<T>(s.out_channels * kStrip);
    dy_transposed = arena.take<T>(kStrip * pitch);
    sums = arena.take<T>(2 * s.in_channels * kLanes<T>);
    grad_weight = arena.take<T>(rows * pitch);
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
        grad_x_(args.grad_x, call_),
        sums_(host, s_.batch, s_.in_channels),
        transposed_(shared<T>(host, round_up_to_tiles(s_.in_channels) * s_.out_channels)),
        tasks_(task_count(host, s_.batch)),
        grad_weight_(shared<double>(host, tasks_ * s_.weight_numel())) {
    for (int64_t c = 0; c < s_.in_channels; ++c) {
      for (int64_t o = 0; o < s_.out_channels; ++o) {
        transposed_[c * s_.out_channels + o] = call_.weight()[o * s_.in_channels + c];
      }
    }
    std::fill(transposed_ + s_.weight_numel(), transposed_ + round_up_to_tiles(s_.in_channels) * s_.out_channels, T(0));
  }

  void run() const {
    parallel_ranges(call_.host, s_.batch, [&](Range images, int64_t task) { run_images(images, task); });
    merge_grad_weight();
    finish_norm<S>(call_, sums_, grad_x_);
  }

 private:
  void run_images(Range images, int64_t task) const {
    const auto memory = carve_scratch<PointwiseMemory<T>>(call_.host, s_);
    double* total = grad_weight_ + task * s_.weight_numel();
    std::memset(total, 0, s_.weight_numel() * sizeof(double));
    std::memset(memory.grad_weight, 0, memory.rows * memory.pitch * sizeof(T));
    std::memset(memory.dy_transposed, 0, kStripVectors * kL * memory.pitch * sizeof(T));
    std::memset(memory.z_strip, 0, memory.rows * kStripVectors * kL * sizeof(T));
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
    const Image<T> dx = grad_x_.image(n);
    std::memset(memory.sums, 0, 2 * s_.in_channels * kL * sizeof(T));
    for_each_strip<T>(s_.positions(), [&](auto vectors, int64_t first) {
      constexpr int kVectors = decltype(vectors)::value;
      activate<kVectors>(call_.cell, x, first, memory.z_strip);
      copy_strip<kVectors>(dy, first, memory.dy_strip);
      for (int64_t channel = 0; channel < s_.in_channels; channel += kTileOutputs) {
        add_grad_input<kVectors>(x, first, channel, memory, dx);
      }
      const T* end = memory.dy_strip + s_.out_channels * kVectors * kL;
      transpose_matrix(memory.dy_strip, kVectors * kL, end, s_.out_channels, kVectors * kL, memory.dy_transposed,
                       memory.pitch);
      add_grad_weight(memory, kVectors * kL);
    });
    for (int64_t c = 0; c < s_.in_channels; ++c) {
      const T* sums = memory.sums + 2 * c * kL;
      sums_.set(n, c, sum_of_lanes(sums), sum_of_lanes(sums + kL));
    }
  }

  template <int Vectors>
  void copy_strip(const Image<const T>& dy, int64_t first, T* to) const {
    for (int64_t o = 0; o < s_.out_channels; ++o) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) store<T>(to + (o * Vectors + v) * kL, load<T>(dy.row(o) + first + v * kL));
    }
  }

  template <int Vectors>
  void add_grad_input(const Image<const T>& x, int64_t first, int64_t channel, const PointwiseMemory<T>& memory,
                      const Image<T>& dx) const {
    Vec<T> d[kTileOutputs][Vectors] = {};
    multiply<Vectors, kTileOutputs>(memory.dy_strip, transposed_ + channel * s_.out_channels, s_.out_channels, d);
#pragma GCC unroll 8
    for (int r = 0; r < kTileOutputs; ++r) {
      const int64_t c = channel + r;
      if (c >= s_.in_channels) break;
      T* at = memory.sums + 2 * c * kL;
      NormSums<T> sums{load<T>(at), load<T>(at + kL)};
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const Vec<T> from = load<T>(x.row(c) + first + v * kL);
        store<T>(dx.row(c) + first + v * kL, through_norm(call_.norm(), c, from, d[r][v], sums));
      }
      store<T>(at, sums.gradient);
      store<T>(at + kL, sums.product);
    }
  }

  void add_grad_weight(const PointwiseMemory<T>& memory, int64_t positions) const {
    const int64_t vectors = memory.pitch / kL, tiles = (vectors + kOuterVectors - 1) / kOuterVectors;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Range range = part_of(vectors, tiles, tile);
      with_constant<kOuterVectors>(range.end - range.begin, [&](auto count) {
        for (int64_t c = 0; c < memory.rows; c += kTileOutputs) {
          add_outer_products<decltype(count)::value>(memory.z_strip + c * positions, positions,
                                                     memory.dy_transposed + range.begin * kL, memory.pitch, positions,
                                                     memory.grad_weight + c * memory.pitch + range.begin * kL);
        }
      });
    }
  }

  void flush(const PointwiseMemory<T>& memory, double* total) const {
    for (int64_t c = 0; c < s_.in_channels; ++c) {
      const T* from = memory.grad_weight + c * memory.pitch;
      for (int64_t o = 0; o < s_.out_channels; ++o) total[c * s_.out_channels + o] += from[o];
    }
    std::memset(memory.grad_weight, 0, memory.rows * memory.pitch * sizeof(T));
  }

  void merge_grad_weight() const {
    T* to = static_cast<T*>(call_.args.grad_conv_weight);
    for (int64_t c = 0; c < s_.in_channels; ++c) {
      for (int64_t o = 0; o < s_.out_channels; ++o) {
        double sum = 0;
        for (int64_t t = 0; t < tasks_; ++t) sum += grad_weight_[t * s_.weight_numel() + c * s_.out_channels + o];
        to[o * s_.in_channels + c] = static_cast<T>(sum);
      }
    }
  }

  Convolution<T> call_;
  ConvolutionSizes s_;
  GradientMap<S> grad_x_;
  ImageSums sums_;
  T* transposed_;  // the weight as in_channels x out_channels, in whole tiles of rows
  int64_t tasks_;
  double* grad_weight_;  // of every task: in_channels x out_channels
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
