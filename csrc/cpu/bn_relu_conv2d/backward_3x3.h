// Backward pass of the 3x3 convolution. Some images at a time: their z = relu(BN(x)) is made again in padded planes; dz
// is a convolution of dy's planes with the weights turned around, plane by plane of the input; dW takes its sums over
// the positions of all these images before lanes are added up.
#pragma once

#include "cpu/bn_relu_conv2d/taps.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int64_t kSpatialVectors = 48;         // of positions that one sum of dW should see
constexpr int64_t kSpatialBytes = 2048 * 1024;  // what the planes of the images in work may take

template <typename T>
struct SpatialMemory {
  T* x;
  T* dy;
  T* z_planes;     // [images][in_channels]
  T* dy_planes;    // [images][out_channels]
  T* back_planes;  // of one tile of input channels
  T* row;          // a channel's map
  int64_t images, z_image, dy_image, tile_size;

  void carve(Arena& arena, const ConvolutionSizes& s, const Planes& planes, const GradientPlanes& gradient,
             int64_t most_images) {
    constexpr int64_t kMargin = kMostVectors * kLanes<T>;
    images = most_images;
    z_image = s.in_channels * planes.channel;
    dy_image = s.out_channels * gradient.channel;
    tile_size = kTileOutputs * (planes.channel + kMargin);
    x = arena.take<T>(s.in_channels * round_up<T>(s.positions()));
    dy = arena.take<T>(s.out_channels * round_up<T>(s.out_positions()));
    z_planes = arena.take<T>(images * z_image + kMargin);
    dy_planes = arena.take<T>(images * dy_image + gradient.origin + kMargin);
    back_planes = arena.take<T>(tile_size);
    row = arena.take<T>(round_up<T>(s.positions()) + 2 * kLanes<T>);
  }

  void clear(const GradientPlanes& gradient) const {
    constexpr int64_t kMargin = kMostVectors * kLanes<T>;
    std::memset(z_planes, 0, (images * z_image + kMargin) * sizeof(T));
    std::memset(dy_planes, 0, (images * dy_image + gradient.origin + kMargin) * sizeof(T));
    std::memset(back_planes, 0, tile_size * sizeof(T));
  }
};

template <typename S>
class SpatialBackward {
  using T = Accumulate<S>;

 public:
  SpatialBackward(const BNReLUConv2d& args, const Host& host)
      : call_(args, host),
        s_(args.sizes),
        planes_(separate_planes<T>(s_)),
        gradient_(GradientPlanes::of<T>(s_, planes_)),
        grad_x_(args.grad_x, call_),
        sums_(host, s_.batch, s_.in_channels),
        tiled_inputs_(round_up_to_tiles(s_.group_inputs())),
        turned_(shared<T>(host, s_.groups * tiled_inputs_ * s_.group_outputs() * kTaps)),
        tasks_(task_count(host, s_.batch)),
        grad_weight_(shared<double>(host, tasks_ * s_.weight_numel())) {
    const int64_t inputs = s_.group_inputs(), outputs = s_.group_outputs();
    std::fill_n(turned_, s_.groups * tiled_inputs_ * outputs * kTaps, T(0));
    for (int64_t channel = 0; channel < s_.out_channels; ++channel) {
      const int64_t group = channel / outputs, o = channel % outputs;
      for (int64_t i = 0; i < inputs; ++i) {
        std::memcpy(turned_ + ((group * tiled_inputs_ + i) * outputs + o) * kTaps,
                    call_.weight() + (channel * inputs + i) * kTaps, kTaps * sizeof(T));
      }
    }
  }

  void run() const {
    parallel_ranges(call_.host, s_.batch, [&](Range images, int64_t task) { run_images(images, task); });
    merge_grad_weight();
    finish_norm<S>(call_, sums_, grad_x_);
  }

 private:
  // How many images' sums of dW are taken together.
  int64_t images_at_once() const {
    const int64_t vectors = (gradient_.span + kLanes<T> - 1) / kLanes<T>;
    const int64_t bytes = (s_.in_channels * planes_.channel + s_.out_channels * gradient_.channel) * sizeof(T);
    return std::max<int64_t>(1, std::min(kSpatialVectors / vectors, kSpatialBytes / bytes));
  }

  void run_images(Range images, int64_t task) const {
    const int64_t at_once = std::min(images_at_once(), images.end - images.begin);
    const auto memory = carve_scratch<SpatialMemory<T>>(call_.host, s_, planes_, gradient_, at_once);
    memory.clear(gradient_);
    double* total = grad_weight_ + task * s_.weight_numel();
    std::memset(total, 0, s_.weight_numel() * sizeof(double));
    for (int64_t first = images.begin; first < images.end; first += at_once) {
      const int64_t count = std::min(at_once, images.end - first);
      for (int64_t i = 0; i < count; ++i) run_image(first + i, i, memory);
      add_grad_weight(memory, count, total);
    }
  }

  void run_image(int64_t n, int64_t slot, const SpatialMemory<T>& memory) const {
    const Image<const T> x = load_image<S>(call_.args.x, n, s_.batch, call_.in_extent(), memory.x);
    const Image<const T> dy = load_image<S>(call_.args.grad_out, n, s_.batch, call_.out_extent(), memory.dy);
    activate_planes(call_, planes_, x, memory.row, memory.z_planes + slot * memory.z_image);
    T* to = memory.dy_planes + gradient_.origin + slot * memory.dy_image;
    for (int64_t o = 0; o < s_.out_channels; ++o) {
      for (int64_t y = 0; y < s_.out_height(); ++y) {
        std::memcpy(to + o * gradient_.channel + y * gradient_.pitch, dy.row(o) + y * s_.out_width(),
                    s_.out_width() * sizeof(T));
      }
    }
    const int64_t inputs = s_.group_inputs();
    for (int64_t group = 0; group < s_.groups; ++group) {
      const T* from = to + group * s_.group_outputs() * gradient_.channel;
      for (int64_t i = 0; i < inputs; i += kTileOutputs) {
        spread_tile(from, turned_ + (group * tiled_inputs_ + i) * s_.group_outputs() * kTaps, memory.back_planes);
        for (int64_t r = 0; r < kTileOutputs && i + r < inputs; ++r) {
          read_planes(planes_, memory.back_planes + r * back_pitch(), s_.height, memory.row);
          normalise_back(n, group * inputs + i + r, x, memory.row);
        }
      }
    }
  }

  int64_t back_pitch() const { return planes_.channel + kMostVectors * kLanes<T>; }

  // dz of a tile of input channels in all their planes, by their weights.
  void spread_tile(const T* dy, const T* weight, T* to) const {
    constexpr int kVectors = tile_vectors(kTileOutputs);
    constexpr int64_t kLength = kVectors * kLanes<T>;
    for (int64_t plane = 0; plane < s_.stride * s_.stride; ++plane) {
      const int64_t row_parity = plane / s_.stride, column_parity = plane % s_.stride;
      const ReachingTaps taps(row_parity, column_parity, s_.stride, gradient_.pitch);
      // Rows y of the plane are rows y * stride + parity of the padded map, of which 1 to height are the map's.
      const int64_t begin = row_parity == 0 ? planes_.pitch : 0;
      const int64_t end = ((s_.height - row_parity) / s_.stride + 1) * planes_.pitch;
      for (int64_t first = begin; first < end; first += kLength) {
        const int64_t count = std::min(end - first, kLength);
        with_constant<kVectors>((count + kLanes<T> - 1) / kLanes<T>, [&](auto vectors) {
          spread_back<decltype(vectors)::value>(dy + first, gradient_.channel, s_.group_outputs(), taps, weight,
                                                to + plane * planes_.size + first, back_pitch());
        });
      }
    }
  }

  void normalise_back(int64_t n, int64_t c, const Image<const T>& x, T* dz) const {
    const int64_t positions = s_.positions();
    for (int64_t p = positions; p < round_up<T>(positions); ++p) dz[p] = 0;
    T* to = grad_x_.image(n).row(c);
    NormSums<T> sums;
    for (int64_t p = 0; p < positions; p += kLanes<T>) {
      store<T>(to + p, through_norm(call_.norm(), c, load<T>(x.row(c) + p), load<T>(dz + p), sums));
    }
    T lanes[2][kLanes<T>];
    store<T>(lanes[0], sums.gradient);
    store<T>(lanes[1], sums.product);
    sums_.set(n, c, sum_of_lanes(lanes[0]), sum_of_lanes(lanes[1]));
  }

  void add_grad_weight(const SpatialMemory<T>& memory, int64_t images, double* total) const {
    const int64_t inputs = s_.group_inputs(), outputs = s_.group_outputs();
    for (int64_t channel = 0; channel < s_.in_channels; ++channel) {
      const int64_t group = channel / inputs, i = channel % inputs;
      for (int64_t o = 0; o < outputs; o += kTapOutputs) {
        const int64_t out = group * outputs + o;
        const TapOperands<T> in{memory.z_planes + channel * planes_.channel,
                                memory.z_image,
                                memory.dy_planes + gradient_.origin + out * gradient_.channel,
                                memory.dy_image,
                                gradient_.channel,
                                images,
                                gradient_.span};
        with_constant<kTapOutputs>(std::min<int64_t>(outputs - o, kTapOutputs), [&](auto count) {
          add_tap_gradients<decltype(count)::value>(in, planes_.tap, total + (out * inputs + i) * kTaps,
                                                    inputs * kTaps);
        });
      }
    }
  }

  void merge_grad_weight() const {
    T* to = static_cast<T*>(call_.args.grad_conv_weight);
    for (int64_t i = 0; i < s_.weight_numel(); ++i) {
      double sum = 0;
      for (int64_t t = 0; t < tasks_; ++t) sum += grad_weight_[t * s_.weight_numel() + i];
      to[i] = static_cast<T>(sum);
    }
  }

  Convolution<T> call_;
  ConvolutionSizes s_;
  Planes planes_;
  GradientPlanes gradient_;
  GradientMap<S> grad_x_;
  ImageSums sums_;
  int64_t tiled_inputs_;  // of a group, in whole tiles
  T* turned_;             // the weight as [groups][tiled_inputs_][group_outputs][kTaps]
  int64_t tasks_;
  double* grad_weight_;  // of every task
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
