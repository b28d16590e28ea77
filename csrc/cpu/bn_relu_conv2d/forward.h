// Batch statistics, and the forward pass: an image's normalised map exists in strips or planes that stay in cache.
#pragma once

#include "cpu/bn_relu_conv2d/call.h"
#include "cpu/moments.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// Of every image of a map, and merged.
template <typename T>
class BatchMoments {
 public:
  BatchMoments(const Host& host, int64_t batch, const Extent& extent)
      : batch_(batch),
        extent_(extent),
        pitch_(round_up<T>(extent.channels)),
        moments_(shared<double>(host, 2 * batch * pitch_)) {}

  void set(int64_t n, const Image<const T>& image) const {
    image_moments(image, extent_, pitch_, moments_ + 2 * n * pitch_);
  }

  // Zeros where there is no image.
  void merge(void* mean, void* var) const {
    T *means = static_cast<T*>(mean), *vars = static_cast<T*>(var);
    if (batch_ > 0) return merge_moments(moments_, batch_, extent_, pitch_, means, vars);
    std::fill_n(means, extent_.channels, T(0));
    std::fill_n(vars, extent_.channels, T(0));
  }

 private:
  int64_t batch_;
  Extent extent_;
  int64_t pitch_;
  double* moments_;
};

template <typename S>
void run_batch_statistics(const BNReLUConv2d& args, const Host& host) {
  using T = Accumulate<S>;
  const ConvolutionSizes& s = args.sizes;
  const Extent extent{s.in_channels, s.height, s.width};
  const BatchMoments<T> moments(host, s.batch, extent);
  parallel_images(host, s.batch, [&](int64_t n) {
    T* scratch = static_cast<T*>(host.scratch(s.in_channels * round_up<T>(s.positions()) * sizeof(T)));
    moments.set(n, load_image<S>(args.x, n, s.batch, extent, scratch));
  });
  moments.merge(args.mean, args.var);
}

template <typename T>
struct ForwardMemory {
  T* x;
  T* out;
  T* strip;   // of a 1x1 convolution
  T* planes;  // of a 3x3 one: of all channels, or of those in work
  T* row;
  int64_t planes_size;

  void carve(Arena& arena, const ConvolutionSizes& s, const Planes& layout, int64_t channels) {
    x = arena.take<T>(s.in_channels * round_up<T>(s.positions()));
    out = arena.take<T>(s.out_channels * round_up<T>(s.out_positions()));
    strip = arena.take<T>(s.kernel == 1 ? s.in_channels * kStripVectors * kLanes<T> : 0);
    planes_size = s.kernel == 1 ? 0 : channels * layout.channel + kMostVectors * kLanes<T>;
    planes = arena.take<T>(planes_size);
    row = arena.take<T>(round_up<T>(s.positions()) + 2 * kLanes<T>);
  }
};

template <typename S>
class ForwardPass {
  using T = Accumulate<S>;

 public:
  ForwardPass(const BNReLUConv2d& args, const Host& host)
      : call_(args, host),
        s_(args.sizes),
        planes_(separate_planes<T>(s_)),
        moments_(host, args.out_mean ? s_.batch : 0, call_.out_extent()),
        in_rows_(s_.kernel == 3 && s_.out_width() % kLanes<T> == 0),
        block_(in_rows_ ? channels_in_cache<T>(planes_, s_.group_inputs()) : s_.in_channels) {
    if (s_.kernel == 1) pad_weight();
    if (in_rows_) arrange_weight();
  }

  void run() const {
    parallel_ranges(call_.host, s_.batch, [&](Range images, int64_t) {
      const auto memory = carve_scratch<ForwardMemory<T>>(call_.host, s_, planes_, block_);
      std::memset(memory.planes, 0, memory.planes_size * sizeof(T));
      for (int64_t n = images.begin; n < images.end; ++n) {
        run_image(n, memory);
        // Nothing is read past the image, where another thread may write.
        if (noted()) moments_.set(n, load_image<S>(call_.args.out, n, n + 1, call_.out_extent(), memory.out));
      }
    });
    if (noted()) moments_.merge(call_.args.out_mean, call_.args.out_var);
  }

 private:
  bool noted() const { return call_.args.out_mean; }

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
    } else if (in_rows_) {
      for (int64_t group = 0; group < s_.groups; ++group) convolve_in_rows(x, group, memory, out);
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

  // Calls work(constant outputs, first channel of all) for nearly equal tiles of a group's output channels.
  template <typename Work>
  void for_each_group_tile(int64_t group, Work work) const {
    const int64_t outputs = s_.group_outputs(), tiles = round_up_to_tiles(outputs) / kTileOutputs;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Range range = part_of(outputs, tiles, tile);
      with_constant<kTileOutputs>(range.end - range.begin,
                                  [&](auto count) { work(count, group * outputs + range.begin); });
    }
  }

  // The weight of a 3x3 convolution as [tile of outputs][kTaps][group_inputs][outputs of the tile].
  void arrange_weight() {
    const int64_t inputs = s_.group_inputs();
    arranged_ = shared<T>(call_.host, s_.weight_numel());
    for (int64_t group = 0; group < s_.groups; ++group) {
      for_each_group_tile(group, [&](auto outputs, int64_t channel) {
        constexpr int kRows = decltype(outputs)::value;
        T* to = arranged_ + channel * inputs * kTaps;
        for (int r = 0; r < kRows; ++r) {
          const T* from = call_.weight() + (channel + r) * inputs * kTaps;
          for (int64_t i = 0; i < inputs; ++i) {
            for (int k = 0; k < kTaps; ++k) to[(k * inputs + i) * kRows + r] = from[i * kTaps + k];
          }
        }
      });
    }
  }

  // A group of the 3x3 convolution, whose result's rows are whole vectors, a block of inputs after the other.
  void convolve_in_rows(const Image<const T>& x, int64_t group, const ForwardMemory<T>& memory,
                        const Image<T>& out) const {
    const int64_t inputs = s_.group_inputs();
    TapOffsets taps;
    for (int k = 0; k < kTaps; ++k) taps.add(k, planes_.tap[k]);
    for (int64_t begin = 0; begin < inputs; begin += block_) {
      const int64_t first = group * inputs + begin, depth = std::min(block_, inputs - begin);
      activate_planes(call_, planes_, Image<const T>{x.row(first), x.pitch}, Range{first, first + depth}, memory.row,
                      memory.planes);
      for_each_group_tile(group, [&](auto outputs, int64_t channel) {
        constexpr int kRows = decltype(outputs)::value;
        convolve_tile<kRows>(memory.planes, depth, taps, arranged_ + channel * inputs * kTaps + begin * kRows,
                             {out.row(channel), out.pitch}, begin > 0);
      });
    }
  }

  template <int Rows>
  void convolve_tile(const T* planes, int64_t depth, const TapOffsets& taps, const T* weight, const Image<T>& out,
                     bool adds) const {
    constexpr int kVectors = tile_vectors(Rows);
    const int64_t vectors = s_.out_positions() / kLanes<T>;
    for (int64_t first = 0; first < vectors; first += kVectors) {
      with_constant<kVectors>(std::min<int64_t>(vectors - first, kVectors), [&](auto some) {
        constexpr int kCount = decltype(some)::value;
        int64_t at[kCount];
        for (int v = 0; v < kCount; ++v) {
          const int64_t p = (first + v) * kLanes<T>;
          at[v] = p / s_.out_width() * planes_.pitch + p % s_.out_width();
        }
        convolve_taps<kCount, Rows>(planes, planes_.channel, depth, at, taps, weight, s_.group_inputs() * Rows,
                                    out.data + first * kLanes<T>, out.pitch, adds);
      });
    }
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
  BatchMoments<T> moments_;  // of the result, where they are noted
  bool in_rows_;             // whether each row of a 3x3 convolution's result is whole vectors
  int64_t block_;            // channels whose planes there are at a time
  T* padded_ = nullptr;      // the weight of a 1x1 convolution
  T* arranged_ = nullptr;    // the weight where in_rows_
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
