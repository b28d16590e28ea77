// What the backward passes of both convolutions share: the way back through ReLU and BN, and the weights' gradient.
//
// With z = relu(scale (x - mean) + bias) and dz the gradient that reaches the normalised map, batch statistics give
//   dx = scale (dz - mean(dz) - (x - mean) inverse^2 mean(dz (x - mean))),
// whose two means are known when every image has been seen. So scale * dz is written at first and corrected afterwards.
#pragma once

#include "cpu/bn_relu_conv2d/call.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// sum dz and sum dz (x - mean) of one channel.
template <typename T>
struct NormSums {
  Vec<T> gradient{}, product{};
};

// The gradient `d` of z at a vector of positions: adds to the sums and returns scale * dz. As torch, a NaN passes.
template <typename T>
inline Vec<T> through_norm(const Norm<T>& norm, int64_t c, Vec<T> x, Vec<T> d, NormSums<T>& sums) {
  const Vec<T> centred = x - norm.mean[c], zero{};
  const Vec<T> dz = centred * norm.scale[c] + norm.bias[c] <= zero ? zero : d;
  sums.gradient += dz;
  sums.product += dz * centred;
  return dz * norm.scale[c];
}

template <typename T>
inline double sum_of_lanes(const T* v) {
  double sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

// The gradient of x while it is made: the tensor's own memory where its rows can be written as vectors, else memory of
// the call.
template <typename S>
class GradientMap {
  using T = Accumulate<S>;

 public:
  GradientMap(const Map& map, const Convolution<T>& call) : map_(map), extent_(call.in_extent()) {
    direct_ = is_image<S>(map, extent_);
    pitch_ = round_up<T>(extent_.positions());
    if (!direct_) memory_ = shared<T>(call.host, call.s.batch * extent_.channels * pitch_);
  }

  Image<T> image(int64_t n) const {
    if constexpr (std::is_same_v<S, T>) {
      if (direct_) return {image_data<S>(map_, n), map_.stride[1]};
    }
    return {memory_ + n * extent_.channels * pitch_, pitch_};
  }

  void finish(int64_t n) const {
    const Image<T> made = image(n);
    if (!direct_) store_image<S>(Image<const T>{made.data, made.pitch}, map_, n, extent_);
  }

  bool direct() const { return direct_; }

 private:
  const Map& map_;
  Extent extent_;
  int64_t pitch_;
  bool direct_;
  T* memory_ = nullptr;
};

// Sums of every image and channel, in double precision and merged in the order of images whoever computed them.
class ImageSums {
 public:
  ImageSums(const Host& host, int64_t batch, int64_t channels)
      : batch_(batch), channels_(channels), sums_(shared<double>(host, 2 * batch * channels)) {}

  void set(int64_t n, int64_t c, double gradient, double product) const {
    double* to = sums_ + 2 * (n * channels_ + c);
    to[0] = gradient;
    to[1] = product;
  }

  // {sum dz, sum dz (x - mean)} of channel c.
  std::pair<double, double> merged(int64_t c) const {
    std::pair<double, double> sum{0, 0};
    for (int64_t n = 0; n < batch_; ++n) {
      const double* image = sums_ + 2 * (n * channels_ + c);
      sum.first += image[0];
      sum.second += image[1];
    }
    return sum;
  }

 private:
  int64_t batch_, channels_;
  double* sums_;
};

// Writes the gradients of the normalisation's parameters, and corrects and delivers the gradient of x.
template <typename S, typename T>
inline void finish_norm(const Convolution<T>& call, const ImageSums& sums, const GradientMap<S>& grad_x) {
  const ConvolutionSizes& s = call.s;
  const double count = static_cast<double>(s.batch) * s.positions();
  T *of_ones = shared<T>(call.host, s.in_channels), *of_centred = shared<T>(call.host, s.in_channels);
  for (int64_t c = 0; c < s.in_channels; ++c) {
    const auto [gradient, product] = sums.merged(c);
    const double inverse = call.inverse[c], scale = call.norm().scale[c];
    static_cast<T*>(call.args.grad_norm_bias)[c] = static_cast<T>(gradient);
    static_cast<T*>(call.args.grad_norm_weight)[c] = static_cast<T>(product * inverse);
    of_ones[c] = static_cast<T>(scale * gradient / count);
    of_centred[c] = static_cast<T>(scale * inverse * inverse * product / count);
  }
  if (!call.args.training && grad_x.direct()) return;
  parallel_ranges(call.host, s.batch, [&](Range images, int64_t) {
    T* memory = static_cast<T*>(call.host.scratch(s.in_channels * round_up<T>(s.positions()) * sizeof(T)));
    for (int64_t n = images.begin; n < images.end; ++n) {
      if (call.args.training) {
        const Image<T> to = grad_x.image(n);
        const Image<const T> x = load_image<S>(call.args.x, n, s.batch, call.in_extent(), memory);
        for (int64_t c = 0; c < s.in_channels; ++c) {
          for (int64_t p = 0; p < s.positions(); p += kLanes<T>) {
            const Vec<T> centred = load<T>(x.row(c) + p) - call.norm().mean[c];
            store<T>(to.row(c) + p, load<T>(to.row(c) + p) - of_ones[c] - centred * of_centred[c]);
          }
        }
      }
      grad_x.finish(n);
    }
  });
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
