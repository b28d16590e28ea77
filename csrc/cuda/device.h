// Pieces of device code that kernels share: conversions, vector accesses, reductions, image geometry.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"

namespace pyext::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half(x);
}

// V adjacent elements, moved by one access.
template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T at[V];
};

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load_pack(const T* address) {
  return *reinterpret_cast<const Pack<T, V>*>(address);
}

template <int V, typename T>
__device__ __forceinline__ void store_pack(T* address, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(address) = pack;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kFullMask, x, lane);
  return x;
}

// NaN does not win a maximum: it must reach the result another way (through the sum of a softmax).
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, lane));
  return x;
}

// Reduces each of `values` over the block; all threads get the results. `scratch` is shared memory of K * kWarp floats.
template <int K, typename Reduce>
__device__ void block_reduce(float (&values)[K], float identity, float* scratch, Reduce reduce) {
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int warps = blockDim.x / kWarp;
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = reduce(values[k]);
  __syncthreads();
  if (lane == 0) {
    for (int k = 0; k < K; ++k) scratch[k * kWarp + warp] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = reduce(lane < warps ? scratch[k * kWarp + lane] : identity);
}

template <int K>
__device__ void block_sum(float (&values)[K], float* scratch) {
  block_reduce(values, 0.f, scratch, [](float x) { return warp_sum(x); });
}

template <int K>
__device__ void block_max(float (&values)[K], float* scratch) {
  block_reduce(values, -INFINITY, scratch, [](float x) { return warp_max(x); });
}

// A tensor (batch, channels, height, width) with any strides, in elements.
template <typename T>
struct View {
  T* data;
  int64_t image;
  int64_t channel;
  int64_t row;
  int64_t column;

  __device__ __forceinline__ T* at(int64_t n) const { return data + n * image; }
  __device__ __forceinline__ int64_t offset(int c, int y, int x) const { return c * channel + y * row + x * column; }
};

// One image's extents. Maps over positions are stored with a border of kHalo cells, so that a 3x3 stencil of
// dilation up to kHalo needs no bounds check.
struct Geometry {
  static constexpr int kHalo = 2;
  int channels;
  int height;
  int width;
  int positions;
  int pitch;   // cells in a row of a bordered map
  int padded;  // cells in a bordered map

  __device__ __forceinline__ int cell(int y, int x) const { return (y + kHalo) * pitch + x + kHalo; }
  __device__ __forceinline__ int cell(int position) const {
    return cell(position / width, position - position / width * width);
  }
  __device__ __forceinline__ bool interior(int padded_cell) const {
    const int y = padded_cell / pitch;
    const int x = padded_cell - y * pitch;
    return y >= kHalo && y < height + kHalo && x >= kHalo && x < width + kHalo;
  }
};

// One image, read or written element by element: in shared memory (Index = int) or global memory (Index = int64_t).
template <typename T, typename Index>
struct Image {
  T* data;
  Index channel;
  Index row;
  Index column;
};

// A thread's way through the positions of an image in steps of a fixed size, without divisions in the loop.
template <typename Index>
class Walk {
 public:
  template <typename T>
  __device__ Walk(const Geometry& g, const Image<T, Index>& image, int start, int step)
      : position(start), positions_(g.positions), width_(g.width), step_(step) {
    const int y = start / width_;
    x_ = start - y * width_;
    cell = g.cell(y, x_);
    offset = y * image.row + x_ * image.column;
    const int dy = step / width_;
    dx_ = step - dy * width_;
    dcell_ = dy * g.pitch + dx_;
    doffset_ = dy * image.row + dx_ * image.column;
    wrap_ = image.row - width_ * image.column;
  }

  __device__ __forceinline__ bool inside() const { return position < positions_; }

  __device__ __forceinline__ void advance() {
    position += step_;
    x_ += dx_;
    cell += dcell_;
    offset += doffset_;
    if (x_ >= width_) {
      x_ -= width_;
      cell += 2 * Geometry::kHalo;
      offset += wrap_;
    }
  }

  int position;
  int cell;      // in a bordered map
  Index offset;  // in a channel of the image

 private:
  int positions_, width_, step_, x_, dx_, dcell_;
  Index doffset_, wrap_;
};

// V elements along the fastest dimension of a traversal of one image.
struct Unit {
  int channel;
  int position;
  int y;
  int x;
};

template <int V>
__device__ __forceinline__ Unit unit_at(unsigned index, const Geometry& g, bool channels_fastest) {
  Unit unit;
  if (channels_fastest) {
    const unsigned per_position = g.channels / V;
    unit.position = index / per_position;
    unit.channel = (index - unit.position * per_position) * V;
  } else {
    const unsigned per_channel = g.positions / V;
    unit.channel = index / per_channel;
    unit.position = (index - unit.channel * per_channel) * V;
  }
  unit.y = unit.position / g.width;
  unit.x = unit.position - unit.y * g.width;
  return unit;
}

}  // namespace pyext::cuda
