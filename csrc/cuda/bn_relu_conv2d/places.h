// What the passes share: arguments, positions of all images one after the other, a channel's normalisation.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device.h"

namespace pyext::bn_relu_conv2d {

using namespace pyext::cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// BN of one channel, and ReLU.
struct alignas(16) Norm {
  float mean, scale, bias, rstd;

  __device__ __forceinline__ float output(float x) const { return (x - mean) * scale + bias; }
  __device__ __forceinline__ float activated(float x) const {
    const float y = output(x);
    return y < 0.f ? 0.f : y;  // NaN stays
  }
  __device__ __forceinline__ float normalised(float x) const { return (x - mean) * rstd; }
};

template <typename T>
struct Arguments {
  View<const T> x;
  View<const T> grad_out;  // in the backward pass
  const Norm* norm;
  const T* weight;
  int64_t images;
  int channels, height, width;
  int out_channels, out_height, out_width;
  int groups, stride;

  __host__ __device__ int inputs() const { return channels / groups; }
  __host__ __device__ int outputs() const { return out_channels / groups; }
  __host__ __device__ int positions() const { return height * width; }
  __host__ __device__ int out_positions() const { return out_height * out_width; }
};

struct Place {
  int64_t image;
  int y, x;
};

// Rows and columns of the maps of all images, from the position with index `first` on: one 64-bit division for all.
class Places {
 public:
  __device__ __forceinline__ Places(int64_t first, int height, int width)
      : image_(first / (height * width)), start_(first - image_ * (height * width)), height_(height), width_(width) {}

  // That of index first + `ahead`, which is below 2^30.
  __device__ __forceinline__ Place at(int ahead) const {
    const int place = start_ + ahead;
    const int image = place / (height_ * width_);
    const int position = place - image * (height_ * width_);
    const int y = position / width_;
    return {image_ + image, y, position - y * width_};
  }

 private:
  int64_t image_;
  int start_, height_, width_;
};

__device__ __forceinline__ bool is_inside(int y, int x, int height, int width) {
  return y >= 0 && y < height && x >= 0 && x < width;
}

}  // namespace pyext::bn_relu_conv2d
