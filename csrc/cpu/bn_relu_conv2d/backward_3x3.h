// Backward pass of the 3x3 convolution. Some images at a time, and of them the input channels of one group, or as many
// as stay in cache: z = relu(BN(x)) is made again in padded planes; dz is a convolution of dy's planes with the weights
// turned around, plane by plane of the input; dW takes its sums over the positions of all these images before they
// leave the registers.
#pragma once

#include "cpu/bn_relu_conv2d/taps.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int64_t kSpatialVectors = 160;  // of positions that one sum of dW should see

// How the work is divided.
struct SpatialBlocks {
  int64_t images;  // whose sums of dW are taken together
  int64_t inputs;  // channels of a group, in whole tiles
  bool outer;      // whether dW's lanes are output channels: where they fill vectors

  template <typename T>
  static SpatialBlocks of(const ConvolutionSizes& s, const Planes& planes, const GradientPlanes& gradient) {
    const int64_t vectors = (gradient.span + kLanes<T> - 1) / kLanes<T>, outputs = s.group_outputs();
    const int64_t inputs = channels_in_cache<T>(planes, s.group_inputs());
    const bool outer = round_up<T>(outputs) > kLanes<T> && 4 * outputs >= 3 * round_up<T>(outputs);
    const int64_t bytes = inputs * planes.channel * sizeof(T);
    return {std::max<int64_t>(1, std::min(kSpatialVectors / vectors, kPlaneBytes / bytes)), inputs, outer};
  }
};

template <typename T>
struct SpatialMemory {
  T* x;
  T* dy;
  T* z_planes;       // [images][inputs of a block]
  T* dy_planes;      // [images][outputs of a group]
  T* dy_transposed;  // [images], of every tile of outputs: [span][outputs]
  T* back_planes;    // of one tile of input channels
  T* row;            // a channel's map
  int64_t images, z_image, dy_image, outer_image, tile_size;

  void carve(Arena& arena, const ConvolutionSizes& s, const Planes& planes, const GradientPlanes& gradient,
             const SpatialBlocks& blocks) {
    constexpr int64_t kMargin = kMostVectors * kLanes<T>;
    images = blocks.images;
    z_image = blocks.inputs * planes.channel;
    dy_image = s.group_outputs() * gradient.channel;
    outer_image = blocks.outer ? gradient.span * OuterTiles<T>(s.group_outputs()).outputs() : 0;
    tile_size = kTileOutputs * (planes.channel + kMargin);
    x = arena.take<T>(blocks.inputs * round_up<T>(s.positions()));
    dy = arena.take<T>(s.group_outputs() * round_up<T>(s.out_positions()));
    z_planes = arena.take<T>(images * z_image + kMargin);
    dy_planes = arena.take<T>(images * dy_image + gradient.origin + kMargin);
    dy_transposed = arena.take<T>(images * outer_image);
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
  static constexpr int64_t kL = kLanes<T>;
  static constexpr int kVectors = tile_vectors(kTileOutputs);

 public:
  SpatialBackward(const BNReLUConv2d& args, const Host& host)
      : call_(args, host),
        s_(args.sizes),
        planes_(separate_planes<T>(s_)),
        gradient_(GradientPlanes::of<T>(s_, planes_)),
        blocks_(SpatialBlocks::of<T>(s_, planes_, gradient_)),
        tiles_(s_.group_outputs()),
        grad_x_(args, call_),
        sums_(host, s_.batch, s_.in_channels),
        tiled_inputs_(round_up_to_tiles(s_.group_inputs())),
        turned_(shared_zeros<T>(host, s_.groups * tiled_inputs_ * s_.group_outputs() * kTaps)),
        tasks_(task_count(host, s_.batch)),
        group_weight_(s_.group_inputs() * kTaps * (blocks_.outer ? tiles_.outputs() : s_.group_outputs())),
        grad_weight_(shared<double>(host, tasks_ * s_.groups * group_weight_)) {
    const int64_t inputs = s_.group_inputs(), outputs = s_.group_outputs();
    for (int64_t channel = 0; channel < s_.out_channels; ++channel) {
      const int64_t group = channel / outputs, o = channel % outputs;
      for (int64_t i = 0; i < inputs; ++i) {
        T* to = turned_tile(group, i) + o * kTileOutputs + i % kTileOutputs;
        for (int k = 0; k < kTaps; ++k) {
          to[k * outputs * kTileOutputs] = call_.weight()[(channel * inputs + i) * kTaps + k];
        }
      }
    }
  }

  void run() const {
    parallel_ranges(call_.host, s_.batch, [&](Range images, int64_t task) { run_images(images, task); });
    merge_grad_weight();
    finish_norm<S>(call_, sums_, grad_x_);
  }

 private:
  // The weight of input i's tile.
  T* turned_tile(int64_t group, int64_t i) const {
    return turned_ + (group * tiled_inputs_ + i / kTileOutputs * kTileOutputs) * s_.group_outputs() * kTaps;
  }

  void run_images(Range images, int64_t task) const {
    const auto memory = carve_scratch<SpatialMemory<T>>(call_.host, s_, planes_, gradient_, blocks_);
    memory.clear(gradient_);
    double* total = grad_weight_ + task * s_.groups * group_weight_;
    std::memset(total, 0, s_.groups * group_weight_ * sizeof(double));
    for (int64_t first = images.begin; first < images.end; first += blocks_.images) {
      const Range some{first, std::min(first + blocks_.images, images.end)};
      for (int64_t n = some.begin; n < some.end; ++n) grad_x_.begin(n);
      for (int64_t group = 0; group < s_.groups; ++group) run_group(some, group, memory, total + group * group_weight_);
    }
  }

  void run_group(Range images, int64_t group, const SpatialMemory<T>& memory, double* total) const {
    const int64_t inputs = s_.group_inputs();
    for (int64_t n = images.begin; n < images.end; ++n) load_gradient(n, n - images.begin, group, memory);
    for (int64_t begin = 0; begin < inputs; begin += blocks_.inputs) {
      const Range block{begin, std::min(begin + blocks_.inputs, inputs)};
      for (int64_t n = images.begin; n < images.end; ++n) run_block(n, n - images.begin, group, block, memory);
      add_grad_weight(memory, images.end - images.begin, block, total);
    }
  }

  // dy of a group in planes, and with the channels innermost.
  void load_gradient(int64_t n, int64_t slot, int64_t group, const SpatialMemory<T>& memory) const {
    const int64_t outputs = s_.group_outputs();
    const Map from = channels_from<S>(call_.args.grad_out, group * outputs);
    const Image<const T> dy = load_image<S>(from, n, s_.batch, {outputs, s_.out_height(), s_.out_width()}, memory.dy);
    T* to = memory.dy_planes + gradient_.origin + slot * memory.dy_image;
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t y = 0; y < s_.out_height(); ++y) {
        std::memcpy(to + o * gradient_.channel + y * gradient_.pitch, dy.row(o) + y * s_.out_width(),
                    s_.out_width() * sizeof(T));
      }
    }
    if (!blocks_.outer) return;
    T* transposed = memory.dy_transposed + slot * memory.outer_image;
    tiles_.for_each([&](auto vectors, int64_t o) {
      constexpr int64_t kOutputs = decltype(vectors)::value * kL;
      transpose_matrix(to + o * gradient_.channel, gradient_.channel, to + memory.dy_image,
                       std::min(outputs - o, kOutputs), gradient_.span, transposed + o * gradient_.span, kOutputs);
    });
  }

  // z of a block of a group's inputs in planes, and the gradients of x there.
  void run_block(int64_t n, int64_t slot, int64_t group, Range block, const SpatialMemory<T>& memory) const {
    const int64_t first = group * s_.group_inputs() + block.begin, count = block.end - block.begin;
    const Image<const T> x =
        load_image<S>(channels_from<S>(call_.args.x, first), n, s_.batch, {count, s_.height, s_.width}, memory.x);
    activate_planes(call_, planes_, x, {first, first + count}, memory.row, memory.z_planes + slot * memory.z_image);
    const T* dy = memory.dy_planes + gradient_.origin + slot * memory.dy_image;
    const Image<T> made = grad_x_.image(n);
    for (int64_t i = 0; i < count; i += kTileOutputs) {
      const T* weight = turned_tile(group, block.begin + i);
      const TileOfInputs tile{
          n, first + i, std::min<int64_t>(count - i, kTileOutputs), x.row(i), x.pitch, made.row(first + i), made.pitch};
      if (s_.stride == 1 && s_.width % kL == 0) {
        spread_in_rows(dy, weight, tile);
      } else {
        spread_planes(dy, weight, memory.back_planes);
        for (int64_t r = 0; r < tile.count; ++r) {
          read_planes(planes_, memory.back_planes + r * back_pitch(), s_.height, memory.row);
          normalise_back(tile, r, memory.row);
        }
      }
    }
  }

  // Channels [channel, channel + count) of image n.
  struct TileOfInputs {
    int64_t n, channel, count;
    const T* x;
    int64_t x_pitch;
    T* grad_x;
    int64_t grad_pitch;
  };

  // dz of a tile of input channels, straight through ReLU and BN: a row of the map is whole vectors.
  void spread_in_rows(const T* dy, const T* weight, const TileOfInputs& tile) const {
    const int64_t weight_pitch = s_.group_outputs() * kTileOutputs;
    const TapOffsets taps = reaching_taps(0, 0, 1, gradient_.pitch);
    NormSums<T> sums[kTileOutputs];
    for (int64_t first = 0; first < s_.positions(); first += kVectors * kL) {
      with_constant<kVectors>(std::min<int64_t>((s_.positions() - first) / kL, kVectors), [&](auto vectors) {
        constexpr int kCount = decltype(vectors)::value;
        int64_t at[kCount];
        for (int v = 0; v < kCount; ++v) {
          const int64_t p = first + v * kL;
          at[v] = (p / s_.width + 1) * gradient_.pitch + p % s_.width + 1;
        }
        alignas(64) T made[kTileOutputs][kCount * kL];
        convolve_taps<kCount, kTileOutputs>(dy, gradient_.channel, s_.group_outputs(), at, taps, weight, weight_pitch,
                                            made[0], kCount * kL, false);
        for (int64_t r = 0; r < tile.count; ++r) put<kCount>(tile, r, first, made[r], sums[r]);
      });
    }
    for (int64_t r = 0; r < tile.count; ++r) set_sums(tile, r, sums[r]);
  }

  template <int Vectors>
  void put(const TileOfInputs& tile, int64_t r, int64_t first, const T* dz, NormSums<T>& sums) const {
    const T* x = tile.x + r * tile.x_pitch + first;
    T* to = tile.grad_x + r * tile.grad_pitch + first;
    NormSums<T> own = sums;
    Vec<T> made[Vectors];  // before any is stored, which for all that the compiler knows changes the norm
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      made[v] = through_norm(call_.norm(), tile.channel + r, load<T>(x + v * kL), load<T>(dz + v * kL), own);
    }
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) grad_x_.put(to + v * kL, made[v]);
    sums = own;
  }

  void set_sums(const TileOfInputs& tile, int64_t r, const NormSums<T>& sums) const {
    T lanes[2][kL];
    store<T>(lanes[0], sums.gradient);
    store<T>(lanes[1], sums.product);
    sums_.set(tile.n, tile.channel + r, sum_of_lanes(lanes[0]), sum_of_lanes(lanes[1]));
  }

  int64_t back_pitch() const { return planes_.channel + kMostVectors * kL; }

  // dz of a tile of input channels in all their planes.
  void spread_planes(const T* dy, const T* weight, T* to) const {
    const int64_t weight_pitch = s_.group_outputs() * kTileOutputs;
    for (int64_t plane = 0; plane < s_.stride * s_.stride; ++plane) {
      const int64_t row_parity = plane / s_.stride, column_parity = plane % s_.stride;
      const TapOffsets taps = reaching_taps(row_parity, column_parity, s_.stride, gradient_.pitch);
      // Rows y of the plane are rows y * stride + parity of the padded map, of which 1 to height are the map's.
      const int64_t begin = row_parity == 0 ? planes_.pitch : 0;
      const int64_t end = ((s_.height - row_parity) / s_.stride + 1) * planes_.pitch;
      for (int64_t first = begin; first < end; first += kVectors * kL) {
        const int64_t left = (end - first + kL - 1) / kL;
        with_constant<kVectors>(std::min<int64_t>(left, kVectors), [&](auto vectors) {
          constexpr int kCount = decltype(vectors)::value;
          int64_t at[kCount];
          for (int v = 0; v < kCount; ++v) at[v] = first + v * kL;
          convolve_taps<kCount, kTileOutputs>(dy, gradient_.channel, s_.group_outputs(), at, taps, weight, weight_pitch,
                                              to + plane * planes_.size + first, back_pitch(), false);
        });
      }
    }
  }

  void normalise_back(const TileOfInputs& tile, int64_t r, T* dz) const {
    const int64_t positions = s_.positions();
    for (int64_t p = positions; p < round_up<T>(positions); ++p) dz[p] = 0;
    NormSums<T> sums;
    for (int64_t p = 0; p < positions; p += kL) put<1>(tile, r, p, dz + p, sums);
    set_sums(tile, r, sums);
  }

  // Of a block of a group's inputs, to the group's weight.
  void add_grad_weight(const SpatialMemory<T>& memory, int64_t images, Range block, double* total) const {
    if (blocks_.outer) {
      add_outer_weight(memory, images, block, total);
    } else {
      add_tap_weight(memory, images, block, total);
    }
  }

  void add_outer_weight(const SpatialMemory<T>& memory, int64_t images, Range block, double* total) const {
    const int64_t rows = s_.group_inputs() * kTaps, last = (block.end - block.begin) * kTaps - 1;
    tiles_.for_each([&](auto vectors, int64_t o) {
      constexpr int kCount = decltype(vectors)::value;
      const OuterOperands<T> in{memory.z_planes,    memory.z_image, memory.dy_transposed + o * gradient_.span,
                                memory.outer_image, images,         s_.out_height(),
                                s_.out_width(),     gradient_.pitch};
      for (int64_t first = 0; first <= last; first += kTileOutputs) {
        int64_t row[kTileOutputs];
        for (int r = 0; r < kTileOutputs; ++r) {
          const int64_t at = std::min(first + r, last);
          row[r] = at / kTaps * planes_.channel + planes_.tap[at % kTaps];
        }
        add_outer_taps<kCount>(in, row, static_cast<int>(std::min<int64_t>(last + 1 - first, kTileOutputs)),
                               total + o * rows + (block.begin * kTaps + first) * kCount * kL);
      }
    });
  }

  void add_tap_weight(const SpatialMemory<T>& memory, int64_t images, Range block, double* total) const {
    const int64_t inputs = s_.group_inputs(), outputs = s_.group_outputs();
    for (int64_t i = block.begin; i < block.end; ++i) {
      for (int64_t o = 0; o < outputs; o += kTapOutputs) {
        const TapOperands<T> in{memory.z_planes + (i - block.begin) * planes_.channel,
                                memory.z_image,
                                memory.dy_planes + gradient_.origin + o * gradient_.channel,
                                memory.dy_image,
                                gradient_.channel,
                                images,
                                gradient_.span};
        with_constant<kTapOutputs>(std::min<int64_t>(outputs - o, kTapOutputs), [&](auto count) {
          add_tap_gradients<decltype(count)::value>(in, planes_.tap, total + (o * inputs + i) * kTaps, inputs * kTaps);
        });
      }
    }
  }

  // A group's sum, of output o and row r of inputs and taps.
  int64_t weight_place(int64_t o, int64_t r) const {
    const int64_t rows = s_.group_inputs() * kTaps;
    if (!blocks_.outer) return o * rows + r;
    int64_t place = 0;
    tiles_.for_each([&](auto vectors, int64_t first) {
      constexpr int64_t kOutputs = decltype(vectors)::value * kL;
      if (o >= first) place = first * rows + r * kOutputs + o - first;
    });
    return place;
  }

  void merge_grad_weight() const {
    T* to = static_cast<T*>(call_.args.grad_conv_weight);
    const int64_t rows = s_.group_inputs() * kTaps, outputs = s_.group_outputs();
    for (int64_t channel = 0; channel < s_.out_channels; ++channel) {
      const double* group = grad_weight_ + channel / outputs * group_weight_;
      const int64_t step = weight_place(channel % outputs, 1) - weight_place(channel % outputs, 0);
      const double* from = group + weight_place(channel % outputs, 0);
      for (int64_t r = 0; r < rows; ++r) {
        double sum = 0;
        for (int64_t t = 0; t < tasks_; ++t) sum += from[t * s_.groups * group_weight_ + r * step];
        to[channel * rows + r] = static_cast<T>(sum);
      }
    }
  }

  Convolution<T> call_;
  ConvolutionSizes s_;
  Planes planes_;
  GradientPlanes gradient_;
  SpatialBlocks blocks_;
  OuterTiles<T> tiles_;  // of a group's outputs
  GradientMap<S> grad_x_;
  ImageSums sums_;
  int64_t tiled_inputs_;  // of a group, in whole tiles
  T* turned_;             // the weight as [groups][tile of inputs][kTaps][group_outputs][kTileOutputs]
  int64_t tasks_;
  int64_t group_weight_;  // sums of a group
  double* grad_weight_;   // of every task and group
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
