// masked_conv2d's extents as kernels have them, and how positions are gone through.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/device.h"
#include "cuda/masked_conv2d/lists.h"

namespace pyext::masked_conv2d {

using namespace pyext::cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kLimit = int64_t{1} << 30;  // of extents that are int in kernels

inline void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("masked_conv2d (cuda): ") + message);
}

inline unsigned to_grid(int64_t blocks) {
  require(blocks < 2 * kLimit, "too many images, positions or channels for one launch");
  return static_cast<unsigned>(blocks);
}

inline int64_t divided(int64_t count, int64_t by) { return (count + by - 1) / by; }

// Of rows or of columns.
struct Extent {
  int input, output, kernel, stride, padding, dilation;
};

// The way of a product along one dimension of a map. Position p, one of `count`, reads at read_step p + read_start,
// `move` further on for each of `taps` taps, which are kernel elements first_tap, first_tap + tap_step, ...; it writes
// at write_step p + write_start.
struct Line {
  int count, read_step, read_start, write_step, write_start;
  int taps, first_tap, tap_step, move;
};

// Of the results of windows of `pool` positions each.
__device__ inline Line forward_line(const Extent& e, int pool) {
  return {e.output / pool, e.stride, -e.padding, 1, 0, e.kernel, 0, 1, e.dilation};
}

// Of the gradient of x: of the positions y with y % stride == phase. y meets kernel element k at the output's position
// (y + padding - k dilation) / stride, where that is whole: the same elements for all y of a phase.
__device__ inline Line backward_line(const Extent& e, int phase) {
  const auto remainder = [&](int k) { return static_cast<int>(int64_t{k} * e.dilation % e.stride); };
  int first = 0, step = 1;
  while (first < e.kernel && remainder(first) != (phase + e.padding) % e.stride) ++first;
  while (step < e.kernel && remainder(step) != 0) ++step;
  const int taps = first < e.kernel ? (e.kernel - 1 - first) / step + 1 : 0;
  const int start = taps > 0 ? (phase + e.padding - first * e.dilation) / e.stride : 0;
  const int move = taps > 1 ? -static_cast<int>(int64_t{step} * e.dilation / e.stride) : 0;
  return {(e.input - phase + e.stride - 1) / e.stride, 1, start, e.stride, phase, taps, first, step, move};
}

// The positions that a product writes, those of a phase one after the other: phase (y % down, x % across).
struct Positions {
  int height, width, down, across;

  __device__ int phases() const { return down * across; }
  // Those of the phases before `phase`.
  __device__ int before(int phase) const {
    const int y = phase / across, x = phase - y * across;
    const int above = below(height, down, y);
    return above * width + (below(height, down, y + 1) - above) * below(width, across, x);
  }

 private:
  // How many of the first `count` numbers have a remainder below `phase` by `phases`.
  __device__ static int below(int count, int phases, int phase) {
    return count / phases * phase + min(count % phases, phase);
  }
};

// The strides of a map, in elements, and its extents.
struct Grid {
  int64_t image, channel, row, column;
  int height, width;
};

inline Extent extent_of(const Axis& a) {
  return {static_cast<int>(a.input),  static_cast<int>(a.output()), static_cast<int>(a.kernel),
          static_cast<int>(a.stride), static_cast<int>(a.padding),  static_cast<int>(a.dilation)};
}

// What all products know of a call.
struct Layer {
  Extent rows, columns;
  Lists inputs, outputs;
  Images images;
  Activation activation;

  __host__ __device__ int taps() const { return rows.kernel * columns.kernel; }
  __host__ __device__ int out_positions() const { return rows.output * columns.output; }
  // The segments of images that kernels may find: one where a call knows of no sub-networks.
  __host__ __device__ int segments() const { return images.numbers == nullptr ? 1 : images.subnets + 1; }
};

inline Layer layer_of(const Sizes& s, const Prepared& prepared) {
  return {extent_of(s.rows), extent_of(s.columns), prepared.inputs, prepared.outputs, prepared.images, s.activation};
}

// Groups of few channels fill no tiles of a product: their kernels take every result by itself.
inline bool has_small_groups(const Sizes& s) { return s.groups > 1 && s.group_inputs * s.group_outputs() < 256; }

// Tensor cores would wait for elements that are gathered one by one: maps in 16 bits are first arranged, unless groups
// are small. An arranged map is (batch, positions, slots): the kept channels of a position side by side, each group's
// from a multiple of 16 bytes on. Slots that are of no channel are neither written nor read.
inline bool is_arranged(const Inputs& in) { return in.dtype != Dtype::kFloat && !has_small_groups(in.sizes); }

// These three are in csrc/cuda/masked_conv2d_arrange.cu. `lists` are of the map's channels.
size_t arranged_bytes(const Lists& lists, int64_t batch, int64_t positions);
Grid arranged_grid(const Lists& lists, int height, int width);
void arrange(const Lists& lists, const Images& images, const ImageTensor& source, int height, int width, void* arranged,
             cudaStream_t stream);

// A product whose result is a map.
struct MapProduct {
  bool backward;         // the gradient of x from that of v; else v from x
  bool finished;         // with gate, activation and pooling
  ImageTensor source;    // of the map that is read
  const void* arranged;  // the same map, where maps are arranged
  void* result;
  void* workspace;  // of map_workspace_bytes, 16-byte aligned
};

// These are in csrc/cuda/masked_conv2d.cu. `prepared` is what `prepare` filled, of the same inputs.
void write_map(const Inputs& in, const Prepared& prepared, const MapProduct& product, cudaStream_t stream);

size_t map_workspace_bytes(const Inputs& in, bool backward, bool finished);

// Of what both launchers are given.
void check(const Inputs& in);

template <typename F>
void dispatch(const Inputs& in, F work) {
  using Float = Identity<float>;
  using BFloat16 = Identity<__nv_bfloat16>;
  using Half = Identity<__half>;
  const bool wide = in.parameter_dtype == Dtype::kFloat;
  if (in.dtype == Dtype::kFloat) {
    work(Float{}, Float{});
  } else if (in.dtype == Dtype::kBFloat16) {
    wide ? work(BFloat16{}, Float{}) : work(BFloat16{}, BFloat16{});
  } else {
    wide ? work(Half{}, Float{}) : work(Half{}, Half{});
  }
}

}  // namespace pyext::masked_conv2d
