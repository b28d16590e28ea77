// Means of relu(BN(x)) over windows of 2x2, and the backward pass: what a 1x1 convolution before such a pool may read,
// since both are linear.
#pragma once

#include "cpu/bn_relu_conv2d/gradients.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// Whole windows: a last row or column that fills none has no part.
inline Extent pooled_extent(const ConvolutionSizes& s) { return {s.in_channels, s.height / 2, s.width / 2}; }

template <typename T>
struct PoolMemory {
  T* x;
  T* pooled;  // the result or its gradient
  T* plane;   // one channel, unpooled

  void carve(Arena& arena, const ConvolutionSizes& s) {
    x = arena.take<T>(s.in_channels * round_up<T>(s.positions()));
    pooled = arena.take<T>(s.in_channels * round_up<T>(pooled_extent(s).positions()));
    plane = arena.take<T>(round_up<T>(s.positions()));
  }
};

template <typename S>
class PoolForward {
  using T = Accumulate<S>;

 public:
  PoolForward(const BNReLUConv2d& args, const Host& host)
      : call_(args, host), s_(args.sizes), extent_(pooled_extent(s_)) {}

  void run() const {
    parallel_ranges(call_.host, s_.batch, [&](Range images, int64_t) {
      const auto memory = carve_scratch<PoolMemory<T>>(call_.host, s_);
      const Image<T> to{memory.pooled, round_up<T>(extent_.positions())};
      for (int64_t n = images.begin; n < images.end; ++n) {
        const Image<const T> x = load_image<S>(call_.args.x, n, s_.batch, call_.in_extent(), memory.x);
        for (int64_t c = 0; c < s_.in_channels; ++c) {
          for (int64_t p = 0; p < s_.positions(); p += kLanes<T>) {
            store<T>(memory.plane + p, call_.norm().relu_of(load<T>(x.row(c) + p), c));
          }
          average(memory.plane, to.row(c));
        }
        store_image<S>(Image<const T>{to.data, to.pitch}, call_.args.out, n, extent_);
      }
    });
  }

 private:
  void average(const T* plane, T* to) const {
    for (int64_t y = 0; y < extent_.height; ++y, to += extent_.width) {
      const T *above = plane + 2 * y * s_.width, *below = above + s_.width;
      for (int64_t x = 0; x < extent_.width; ++x) {
        to[x] = T(0.25) * (above[2 * x] + above[2 * x + 1] + below[2 * x] + below[2 * x + 1]);
      }
    }
  }

  Convolution<T> call_;
  ConvolutionSizes s_;
  Extent extent_;
};

template <typename S>
class PoolBackward {
  using T = Accumulate<S>;

 public:
  PoolBackward(const BNReLUConv2d& args, const Host& host)
      : call_(args, host),
        s_(args.sizes),
        extent_(pooled_extent(s_)),
        grad_x_(args, call_),
        sums_(host, s_.batch, s_.in_channels) {}

  void run() const {
    parallel_ranges(call_.host, s_.batch, [&](Range images, int64_t) {
      const auto memory = carve_scratch<PoolMemory<T>>(call_.host, s_);
      std::memset(memory.plane, 0, round_up<T>(s_.positions()) * sizeof(T));
      for (int64_t n = images.begin; n < images.end; ++n) run_image(n, memory);
    });
    finish_norm<S>(call_, sums_, grad_x_);
  }

 private:
  void run_image(int64_t n, const PoolMemory<T>& memory) const {
    const Image<const T> x = load_image<S>(call_.args.x, n, s_.batch, call_.in_extent(), memory.x);
    const Image<const T> dy = load_image<S>(call_.args.grad_out, n, s_.batch, extent_, memory.pooled);
    const Image<T> dx = grad_x_.image(n);
    for (int64_t c = 0; c < s_.in_channels; ++c) {
      spread(dy.row(c), memory.plane);
      NormSums<T> sums;
      for (int64_t p = 0; p < s_.positions(); p += kLanes<T>) {
        store<T>(dx.row(c) + p, through_norm(call_.norm(), c, load<T>(x.row(c) + p), load<T>(memory.plane + p), sums));
      }
      sums_.set(n, c, sum_lanes<T>(sums.gradient), sum_lanes<T>(sums.product));
    }
  }

  void spread(const T* dy, T* plane) const {
    for (int64_t y = 0; y < extent_.height; ++y, dy += extent_.width) {
      T *above = plane + 2 * y * s_.width, *below = above + s_.width;
      for (int64_t x = 0; x < extent_.width; ++x) {
        above[2 * x] = above[2 * x + 1] = below[2 * x] = below[2 * x + 1] = T(0.25) * dy[x];
      }
    }
  }

  Convolution<T> call_;
  ConvolutionSizes s_;
  Extent extent_;
  GradientMap<S> grad_x_;
  ImageSums sums_;
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
