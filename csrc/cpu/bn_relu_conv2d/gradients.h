// What the backward passes of both convolutions share: the way back through ReLU and BN, and the weights' gradient.
//
// With z = relu(scale (x - mean) + bias) and dz the gradient that reaches the normalised map, batch statistics give
//   dx = scale (dz - mean(dz) - (x - mean) inverse^2 mean(dz (x - mean))),
// whose two means are known when every image has been seen. So scale * dz is written at first and corrected afterwards.
#pragma once

#include "cpu/bn_relu_conv2d/call.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int kOuterVectors = kTileRegisters / kTileOutputs;

// Vectors of output channels in nearly equal tiles.
template <typename T>
struct OuterTiles {
  int64_t vectors, tiles;

  explicit OuterTiles(int64_t outputs)
      : vectors(round_up<T>(outputs) / kLanes<T>), tiles((vectors + kOuterVectors - 1) / kOuterVectors) {}
  int64_t outputs() const { return vectors * kLanes<T>; }

  // Calls work(constant vectors, first output channel) for every tile.
  template <typename Work>
  void for_each(Work work) const {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Range range = part_of(vectors, tiles, tile);
      with_constant<kOuterVectors>(range.end - range.begin, [&](auto count) { work(count, range.begin * kLanes<T>); });
    }
  }
};

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
  GradientMap(const BNReLUConv2d& args, const Convolution<T>& call)
      : map_(args.grad_x), extent_(call.in_extent()), adds_(args.add) {
    direct_ = is_image<S>(map_, extent_);
    pitch_ = round_up<T>(extent_.positions());
    if (!direct_) memory_ = shared<T>(call.host, call.s.batch * extent_.channels * pitch_);
  }

  Image<T> image(int64_t n) const {
    if constexpr (std::is_same_v<S, T>) {
      if (direct_) return {image_data<S>(map_, n), map_.stride[1]};
    }
    return {memory_ + n * extent_.channels * pitch_, pitch_};
  }

  // Image n, with what is added to. Nothing is read past it, where other threads may write.
  Image<T> begin(int64_t n) const {
    const Image<T> to = image(n);
    if (adds_ && !direct_) load_image<S>(map_, n, n + 1, extent_, to.data);
    return to;
  }

  // A vector of the gradient to its place in an image.
  void put(T* to, Vec<T> gradient) const { store<T>(to, adds_ ? load<T>(to) + gradient : gradient); }

  void finish(int64_t n) const {
    const Image<T> made = image(n);
    if (!direct_) store_image<S>(Image<const T>{made.data, made.pitch}, map_, n, extent_);
  }

  bool direct() const { return direct_; }

 private:
  const Map& map_;
  Extent extent_;
  int64_t pitch_;
  bool direct_, adds_;
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

// What batch statistics take from scale * dz: of_ones + of_centred (x - mean).
struct Correction {
  double of_ones, of_centred;
};

// Writes the gradients of the normalisation's parameters of channel c from the sums of dz and of dz (x - mean).
template <typename T>
Correction finish_parameters(const Convolution<T>& call, int64_t c, double gradient, double product) {
  const double inverse = call.inverse[c], scale = call.norm().scale[c];
  const double count = static_cast<double>(call.s.batch) * call.s.positions();
  static_cast<T*>(call.args.grad_norm_bias)[c] = static_cast<T>(gradient);
  static_cast<T*>(call.args.grad_norm_weight)[c] = static_cast<T>(product * inverse);
  return {scale * gradient / count, scale * inverse * inverse * product / count};
}

// Takes the corrections, one for each channel, from the gradient of an image's x.
template <typename T>
void correct_image(const double* corrections, const T* mean, const Extent& e, const Image<const T>& x,
                   const Image<T>& grad_x) {
  for (int64_t c = 0; c < e.channels; ++c) {
    const T of_ones = static_cast<T>(corrections[2 * c]), of_centred = static_cast<T>(corrections[2 * c + 1]);
    for (int64_t p = 0; p < e.positions(); p += kLanes<T>) {
      const Vec<T> centred = load<T>(x.row(c) + p) - mean[c];
      store<T>(grad_x.row(c) + p, load<T>(grad_x.row(c) + p) - of_ones - centred * of_centred);
    }
  }
}

// Writes the gradients of the normalisation's parameters, and delivers the gradient of x, corrected unless that is left
// for later.
template <typename S, typename T>
inline void finish_norm(const Convolution<T>& call, const ImageSums& sums, const GradientMap<S>& grad_x) {
  const ConvolutionSizes& s = call.s;
  const bool training = call.args.training, later = call.args.corrections;
  double* corrections = later ? call.args.corrections : shared_zeros<double>(call.host, 2 * s.in_channels);
  for (int64_t c = 0; c < s.in_channels; ++c) {
    const auto [gradient, product] = sums.merged(c);
    const Correction correction = finish_parameters(call, c, gradient, product);
    if (!training) continue;
    corrections[2 * c] += correction.of_ones;
    corrections[2 * c + 1] += correction.of_centred;
  }
  const bool corrects = training && !later;
  if (!corrects && grad_x.direct()) return;
  parallel_ranges(call.host, s.batch, [&](Range images, int64_t) {
    T* memory = static_cast<T*>(call.host.scratch(s.in_channels * round_up<T>(s.positions()) * sizeof(T)));
    for (int64_t n = images.begin; n < images.end; ++n) {
      if (corrects) {
        const Image<const T> x = load_image<S>(call.args.x, n, s.batch, call.in_extent(), memory);
        correct_image(corrections, call.norm().mean, call.in_extent(), x, grad_x.image(n));
      }
      grad_x.finish(n);
    }
  });
}

// Takes from grad_x the corrections that calls of the backward pass have left.
template <typename S>
void run_corrections(const BNReLUConv2d& args, const Host& host) {
  using T = Accumulate<S>;
  const ConvolutionSizes& s = args.sizes;
  const Extent extent{s.in_channels, s.height, s.width};
  const int64_t map = s.in_channels * round_up<T>(s.positions());
  parallel_images(host, s.batch, [&](int64_t n) {
    T* scratch = static_cast<T*>(host.scratch(2 * map * sizeof(T)));
    const Image<const T> x = load_image<S>(args.x, n, s.batch, extent, scratch);
    const Image<const T> grad_x = load_image<S>(args.grad_x, n, n + 1, extent, scratch + map);
    correct_image(args.corrections, static_cast<const T*>(args.mean), extent, x,
                  Image<T>{const_cast<T*>(grad_x.data), grad_x.pitch});
    if (!is_image<S>(args.grad_x, extent)) store_image<S>(grad_x, args.grad_x, n, extent);
  });
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
