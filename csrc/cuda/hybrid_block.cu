// hybrid_block's squeeze cell: BN, ReLU, 1x1 convolution, BN, ReLU and grouped 3x3 convolution as one kernel.
//
// Floors of one cell that reads C channels of P positions and gives G of Q, with S channels between, in K groups:
// 2 (P C S + 9 Q G S / K) operations per image, (P C + Q G) elements of x and u, and the weights once. Of the S
// channels nothing is written. What the kernel does above that: the border of a tile is computed twice (180 positions
// for 128 in whole tiles of stride 1), and x is read once per kSlice channels between, from the second-level cache.
// Arithmetic is by FMA in float32 for all dtypes; tensor cores are not used yet.
#include "cuda/hybrid_block.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace pyext::hybrid_block {
namespace {

using namespace pyext::cuda;

constexpr int kThreads = 256;
constexpr int kSlice = 16;       // channels between the convolutions that are in shared memory at once
constexpr int kInputs = 16;      // channels of x that are
constexpr int kHaloCells = 256;  // positions of a tile with its border
constexpr int kCells = 128;      // positions of u in a tile
constexpr int kSlots = kThreads / kCells;
constexpr int kOutputs = 16;  // channels of u that a thread holds
constexpr int kBlockOutputs = kSlots * kOutputs;
constexpr int kLanes = 64;  // threads along positions in the product of the 1x1 convolution
constexpr int kRows = kSlice / (kThreads / kLanes);
constexpr int kColumns = kHaloCells / kLanes;
constexpr int kTaps = 9;
constexpr int64_t kLimit = int64_t{1} << 30;  // of extents that are int here

// The norm and convolution of one stage.
template <typename P>
struct Stage {
  const P* weight;
  const P* bias;
  const P* mean;
  const P* var;
  const P* conv;
};

template <typename T, typename P>
struct Arguments {
  View<const T> x;
  Stage<P> first;
  Stage<P> second;
  T* u;
  float eps;
  int channels, height, width;
  int out_channels, out_height, out_width;
  int squeeze, groups, stride;
  int tile_height, tile_width, tiles_down, tiles_across;

  __host__ __device__ int halo_height() const { return (tile_height - 1) * stride + 3; }
  __host__ __device__ int halo_width() const { return (tile_width - 1) * stride + 3; }
  __host__ __device__ int halo_cells() const { return halo_height() * halo_width(); }
  __host__ __device__ int group_squeeze() const { return squeeze / groups; }
  __host__ __device__ int group_outputs() const { return out_channels / groups; }
};

template <typename P>
__device__ float activated(float x, const Stage<P>& stage, int channel, float eps) {
  const float scale = to_float(stage.weight[channel]) / sqrtf(to_float(stage.var[channel]) + eps);
  const float y = (x - to_float(stage.mean[channel])) * scale + to_float(stage.bias[channel]);
  return y < 0.f ? 0.f : y;  // NaN stays
}

// What a block works on.
struct Place {
  int64_t image;
  int top, left;       // of the tile in u
  int halo_y, halo_x;  // of its border's first position in x; may be outside
  int group;
  int first_output;  // of the group's channels

  template <typename T, typename P>
  __device__ explicit Place(const Arguments<T, P>& a) {
    const int tiles = a.tiles_down * a.tiles_across;
    const int tile = blockIdx.x % tiles;
    const int blocks = (a.group_outputs() + kBlockOutputs - 1) / kBlockOutputs;
    image = blockIdx.x / tiles;
    top = tile / a.tiles_across * a.tile_height;
    left = tile % a.tiles_across * a.tile_width;
    halo_y = top * a.stride - 1;
    halo_x = left * a.stride - 1;
    group = blockIdx.y / blocks;
    first_output = blockIdx.y % blocks * kBlockOutputs;
  }
};

struct Shared {
  union {
    struct {
      float x[kInputs][kHaloCells];
      float weight[kInputs][kSlice];
    } first;
    float second[kSlice][kTaps][kBlockOutputs];
  };
  float squeezed[kSlice][kHaloCells];
};

// Some channels of x after BN and ReLU, and the weights from them to a slice; zeros where there is none.
template <typename T, typename P>
__device__ void load_first(const Arguments<T, P>& a, const Place& at, int start, int slice, int count, Shared& shared) {
  const int cells = a.halo_cells();
  const T* x = a.x.at(at.image);
  for (int i = threadIdx.x; i < kInputs * cells; i += kThreads) {
    const int row = i / cells;
    const int cell = i - row * cells;
    const int y = at.halo_y + cell / a.halo_width();
    const int column = at.halo_x + cell % a.halo_width();
    const int c = start + row;
    const bool inside = c < a.channels && y >= 0 && y < a.height && column >= 0 && column < a.width;
    shared.first.x[row][cell] = inside ? activated(to_float(x[a.x.offset(c, y, column)]), a.first, c, a.eps) : 0.f;
  }
  for (int i = threadIdx.x; i < kInputs * kSlice; i += kThreads) {
    const int row = i % kInputs;
    const int s = i / kInputs;
    const bool inside = start + row < a.channels && s < count;
    shared.first.weight[row][s] = inside ? to_float(a.first.conv[int64_t{slice + s} * a.channels + start + row]) : 0.f;
  }
}

// A slice of the map between the convolutions into shared memory; zero outside the map, as padding is.
template <typename T, typename P>
__device__ void squeeze_slice(const Arguments<T, P>& a, const Place& at, int slice, int count, Shared& shared) {
  const int lane = threadIdx.x % kLanes;
  const int first_row = threadIdx.x / kLanes * kRows;
  const int cells = a.halo_cells();
  float sum[kRows][kColumns] = {};
  for (int start = 0; start < a.channels; start += kInputs) {
    __syncthreads();
    load_first(a, at, start, slice, count, shared);
    __syncthreads();
#pragma unroll 4
    for (int c = 0; c < kInputs; ++c) {
      float x[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) x[j] = shared.first.x[c][min(lane + j * kLanes, cells - 1)];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float w = shared.first.weight[c][first_row + r];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[r][j] += w * x[j];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int cell = lane + j * kLanes;
    const int y = at.halo_y + cell / a.halo_width();
    const int x = at.halo_x + cell % a.halo_width();
    const bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int s = first_row + r;
      if (cell < cells && s < count) {
        shared.squeezed[s][cell] = inside ? activated(sum[r][j], a.second, slice + s, a.eps) : 0.f;
      }
    }
  }
}

// Weights of the 3x3 convolution from a slice, of which `start` is the first of the group's channels.
template <typename T, typename P>
__device__ void load_second(const Arguments<T, P>& a, const Place& at, int start, int count, Shared& shared) {
  for (int i = threadIdx.x; i < count * kTaps * kBlockOutputs; i += kThreads) {
    const int o = i / (count * kTaps);
    const int rest = i - o * count * kTaps;
    const int64_t row = int64_t{at.group} * a.group_outputs() + at.first_output + o;
    const bool inside = at.first_output + o < a.group_outputs();
    shared.second[rest / kTaps][rest % kTaps][o] =
        inside ? to_float(a.second.conv[(row * a.group_squeeze() + start) * kTaps + rest]) : 0.f;
  }
}

// Block (x, y): a tile of one image; kBlockOutputs channels of one group.
template <typename T, typename P>
__global__ void __launch_bounds__(kThreads, 1) squeeze_cell_kernel(const Arguments<T, P> a) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const Place at(a);
  const int cell = threadIdx.x % kCells;
  const int slot = threadIdx.x / kCells;
  const int y = cell / a.tile_width;
  const int x = cell - y * a.tile_width;
  const bool inside = y < a.tile_height && at.top + y < a.out_height && at.left + x < a.out_width;
  const int outputs = min(kBlockOutputs, a.group_outputs() - at.first_output);
  float sum[kOutputs] = {};
  for (int start = 0; start < a.group_squeeze(); start += kSlice) {
    const int count = min(kSlice, a.group_squeeze() - start);
    squeeze_slice(a, at, at.group * a.group_squeeze() + start, count, shared);
    __syncthreads();
    load_second(a, at, start, count, shared);
    __syncthreads();
    for (int i = 0; inside && i < count * kTaps; ++i) {
      const int s = i / kTaps;
      const int tap = i - s * kTaps;
      const int halo = (y * a.stride + tap / 3) * a.halo_width() + x * a.stride + tap % 3;
      const float value = shared.squeezed[s][halo];
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        if (slot + o * kSlots < outputs) sum[o] += value * shared.second[s][tap][slot + o * kSlots];
      }
    }
  }
  if (!inside) return;
  const int64_t channel = int64_t{at.group} * a.group_outputs() + at.first_output + slot;
  const int64_t positions = int64_t{a.out_height} * a.out_width;
  T* u = a.u + (at.image * a.out_channels + channel) * positions + int64_t{at.top + y} * a.out_width + at.left + x;
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    if (slot + o * kSlots < outputs) u[o * kSlots * positions] = from_float<T>(sum[o]);
  }
}

void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("hybrid_block (cuda): ") + message);
}

template <typename P>
Stage<P> stage(const void* const* tensors) {
  const auto at = [&](int i) { return static_cast<const P*>(tensors[i]); };
  return {at(kNorm1Weight), at(kNorm1Bias), at(kNorm1Mean), at(kNorm1Var), at(kConv1Weight)};
}

// Extents, strides and the tiles that they are cut into.
template <typename T, typename P>
Arguments<T, P> arguments(const Block& block, const ImageTensor& x, int64_t channels, const void* const* tensors,
                          void* u) {
  const Sizes& s = block.sizes;
  Arguments<T, P> a{};
  a.x = {static_cast<const T*>(x.data), x.strides[0], x.strides[1], x.strides[2], x.strides[3]};
  a.first = stage<P>(tensors);
  a.second = stage<P>(tensors + kNorm2Weight);
  a.u = static_cast<T*>(u);
  a.eps = block.eps;
  a.channels = static_cast<int>(channels);
  a.height = static_cast<int>(s.height);
  a.width = static_cast<int>(s.width);
  a.out_channels = static_cast<int>(s.growth);
  a.out_height = static_cast<int>(s.out_height());
  a.out_width = static_cast<int>(s.out_width());
  a.squeeze = static_cast<int>(s.squeeze);
  a.groups = static_cast<int>(s.groups);
  a.stride = static_cast<int>(s.stride);
  // With its border, a tile of stride 1 has at most 18 x 10 positions, of stride 2 33 x 7; kHaloCells hold either.
  a.tile_width = std::min(16, a.out_width);
  a.tile_height = std::min(a.stride == 1 ? 8 : 3, a.out_height);
  a.tiles_across = (a.out_width + a.tile_width - 1) / a.tile_width;
  a.tiles_down = (a.out_height + a.tile_height - 1) / a.tile_height;
  return a;
}

template <typename T, typename P>
void launch_squeeze(const Arguments<T, P>& a, int64_t batch, cudaStream_t stream) {
  const int64_t tiles = batch * a.tiles_across * a.tiles_down;
  const int64_t blocks = int64_t{a.groups} * ((a.group_outputs() + kBlockOutputs - 1) / kBlockOutputs);
  require(tiles < 2 * kLimit && blocks < 65536, "too many images, positions or groups for one launch");
  launch("squeeze_cell", squeeze_cell_kernel<T, P>, dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(blocks)),
         kThreads, sizeof(Shared), stream, a);
}

void squeeze(const Block& block, const ImageTensor& x, int64_t channels, const void* const* tensors, void* u,
             cudaStream_t stream) {
  const auto run = [&](auto element, auto parameter) {
    using T = typename decltype(element)::type;
    using P = typename decltype(parameter)::type;
    launch_squeeze(arguments<T, P>(block, x, channels, tensors, u), block.sizes.batch, stream);
  };
  const bool wide = block.parameter_dtype == Dtype::kFloat;
  using Float = Identity<float>;
  using BFloat16 = Identity<__nv_bfloat16>;
  using Half = Identity<__half>;
  if (block.dtype == Dtype::kFloat) {
    run(Float{}, Float{});
  } else if (block.dtype == Dtype::kBFloat16) {
    wide ? run(BFloat16{}, Float{}) : run(BFloat16{}, BFloat16{});
  } else {
    wide ? run(Half{}, Float{}) : run(Half{}, Half{});
  }
}

gated_excitation::Inputs gate_inputs(const Block& block, const void* const* tensors, void* u) {
  const gated_excitation::Sizes s = block.sizes.gates();
  gated_excitation::Inputs in{};
  in.dtype = block.dtype;
  in.parameter_dtype = block.parameter_dtype;
  in.sizes = s;
  in.u = {u, {s.channels * s.positions(), s.positions(), s.width, 1}};
  in.eps = block.eps;
  if (tensors != nullptr) {
    std::copy_n(tensors + kGateParameters, gated_excitation::kNumParameters, in.parameters);
    std::copy_n(tensors + kGateRunning, gated_excitation::kNumRunning, in.running);
  }
  return in;
}

size_t element_bytes(const Block& block) { return block.dtype == Dtype::kFloat ? sizeof(float) : sizeof(__half); }

// u is at the workspace's beginning; the gates' workspace follows.
size_t u_bytes(const Block& block) {
  const gated_excitation::Sizes s = block.sizes.gates();
  return (s.batch * s.channels * s.positions() * element_bytes(block) + 15) / 16 * 16;
}

void check(const Block& block) {
  const Sizes& s = block.sizes;
  require(s.inputs(s.modules) < kLimit && s.positions() < kLimit && s.squeeze < kLimit && s.growth < kLimit,
          "a map must have fewer than 2^30 channels and positions");
  require(block.parameter_dtype == Dtype::kFloat || block.parameter_dtype == block.dtype,
          "parameters must be float32 or of x's dtype");
}

}  // namespace

size_t workspace_bytes(const Block& block) {
  check(block);
  return u_bytes(block) + gated_excitation::forward_workspace_bytes(gate_inputs(block, nullptr, nullptr), false);
}

void forward(const Block& block, void* out, void* workspace, cudaStream_t stream) {
  check(block);
  const Sizes& s = block.sizes;
  const int64_t image = s.out_channels() * s.out_positions();
  const ImageTensor buffer{out, {image, s.out_positions(), s.out_width(), 1}};
  char* const rest = static_cast<char*>(workspace) + u_bytes(block);
  for (int64_t m = 0; m < s.modules; ++m) {
    const void* const* tensors = block.tensors + m * kNumTensors;
    squeeze(block, s.dense ? buffer : block.x, s.inputs(m), tensors, workspace, stream);
    ImageTensor result = buffer;
    if (s.dense) {
      result.data = static_cast<char*>(out) + s.inputs(m) * s.out_positions() * element_bytes(block);
    }
    gated_excitation::forward(gate_inputs(block, tensors, workspace), false, result, {}, rest, stream);
  }
}

}  // namespace pyext::hybrid_block
