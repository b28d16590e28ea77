// Batch statistics, and the forward pass: an image's normalised map exists in strips or planes that stay in cache.
#pragma once

#include "cpu/bn_relu_conv2d/call.h"
#include "cpu/moments.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

template <typename S>
void run_batch_statistics(const BNReLUConv2d& args, const Host& host) {
  using T = Accumulate<S>;
  const ConvolutionSizes& s = args.sizes;
  const Extent extent{s.in_channels, s.height, s.width};
  const int64_t pitch = round_up<T>(s.in_channels);
  T *mean = static_cast<T*>(args.mean), *var = static_cast<T*>(args.var);
  if (s.batch == 0) {
    std::fill_n(mean, s.in_channels, T(0));
    std::fill_n(var, s.in_channels, T(0));
    return;
  }
  double* moments = shared<double>(host, 2 * s.batch * pitch);
  parallel_images(host, s.batch, [&](int64_t n) {
    T* scratch = static_cast<T*>(host.scratch(s.in_channels * round_up<T>(s.positions()) * sizeof(T)));
    image_moments(load_image<S>(args.x, n, s.batch, extent, scratch), extent, pitch, moments + 2 * n * pitch);
  });
  merge_moments(moments, s.batch, extent, pitch, mean, var);
}

template <typename T>
struct ForwardMemory {
  T* x;
  T* out;
  T* strip;   // of a 1x1 convolution
  T* planes;  // of a 3x3 one
  T* row;
  int64_t planes_size;

  void carve(Arena& arena, const ConvolutionSizes& s, const Planes& layout) {
    x = arena.take<T>(s.in_channels * round_up<T>(s.positions()));
    out = arena.take<T>(s.out_channels * round_up<T>(s.out_positions()));
    strip = arena.take<T>(s.kernel == 1 ? s.in_channels * kStripVectors * kLanes<T> : 0);
    planes_size = s.kernel == 1 ? 0 : s.in_channels * layout.channel + kMostVectors * kLanes<T>;
    planes = arena.take<T>(planes_size);
    row = arena.take<T>(round_up<T>(s.positions()) + 2 * kLanes<T>);
  }
};

template <typename S>
class ForwardPass {
  using T = Accumulate<S>;

 public:
  ForwardPass(const BNReLUConv2d& args, const Host& host)
      : call_(args, host), s_(args.sizes), planes_(separate_planes<T>(s_)) {
    if (s_.kernel == 1) pad_weight();
  }

  void run() const {
    parallel_ranges(call_.host, s_.batch, [&](Range images, int64_t) {
      const auto memory = carve_scratch<ForwardMemory<T>>(call_.host, s_, planes_);
      std::memset(memory.planes, 0, memory.planes_size * sizeof(T));
      for (int64_t n = images.begin; n < images.end; ++n) run_image(n, memory);
    });
  }

 private:
  void run_image(int64_t n, const ForwardMemory<T>& memory) const {
    const Map& to = call_.args.out;
    const Image<const T> x = load_image<S>(call_.args.x, n, s_.batch, call_.in_extent(), memory.x);
    Image<T> out{memory.out, round_up<T>(s_.out_positions())};
    bool direct = false;
    if constexpr (std::is_same_v<S, T>) {
      direct = is_image<S>(to, call_.out_extent());
      if (direct) out = {image_data<S>(to, n), to.stride[1]};
    }
    if (s_.kernel == 1) {
      project(x, memory.strip, out);
    } else {
      activate_planes(call_, planes_, x, Range{0, s_.in_channels}, memory.row, memory.planes);
      convolve_groups(block_sizes(s_), call_.cell, planes_, memory.planes, Range{0, s_.groups},
                      Range{0, s_.out_height()}, out);
    }
    if (!direct) store_image<S>(Image<const T>{out.data, out.pitch}, to, n, call_.out_extent());
  }

  // Whole tiles of output channels, so that one instance of the product serves all.
  void pad_weight() {
    const int64_t rows = round_up_to_tiles(s_.out_channels);
    padded_ = shared<T>(call_.host, rows * s_.in_channels);
    std::memcpy(padded_, call_.weight(), s_.weight_numel() * sizeof(T));
    std::fill(padded_ + s_.weight_numel(), padded_ + rows * s_.in_channels, T(0));
  }

  // The 1x1 convolution, strip by strip of positions.
  void project(const Image<const T>& x, T* strip, const Image<T>& out) const {
    for_each_strip<T>(s_.positions(), [&](auto vectors, int64_t first) {
      constexpr int kVectors = decltype(vectors)::value;
      activate<kVectors>(call_.cell, x, first, strip);
      const int64_t tiles = round_up_to_tiles(s_.out_channels) / kTileOutputs;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t channel = tile * kTileOutputs;
        // The next strip: rows lie pages apart, which no prefetcher follows.
        const Range rows = part_of(s_.in_channels, tiles, tile);
        for (int64_t c = rows.begin; c < rows.end; ++c) {
          prefetch<kVectors, false>(x.row(c) + first + kVectors * kLanes<T>);
        }
        Vec<T> sum[kTileOutputs][kVectors] = {};
        multiply<kVectors, kTileOutputs>(strip, padded_ + channel * s_.in_channels, s_.in_channels, sum);
#pragma GCC unroll 8
        for (int o = 0; o < kTileOutputs; ++o) {
          if (channel + o >= s_.out_channels) break;
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) store<T>(out.row(channel + o) + first + v * kLanes<T>, sum[o][v]);
        }
      }
    });
  }

  Convolution<T> call_;
  ConvolutionSizes s_;
  Planes planes_;
  T* padded_ = nullptr;  // the weight of a 1x1 convolution
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
