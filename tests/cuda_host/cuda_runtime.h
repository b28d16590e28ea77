// CUDA's language on the host: enough of it to run the kernels of csrc/cuda with g++, one fibre per thread.
// Found before the toolkit's header of the same name, so kernels are compiled as they are.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibres.h"

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = void*;

using std::max;
using std::min;

#define threadIdx (::cuda_host::current_thread())
#define blockIdx (::cuda_host::current_block())
#define blockDim (::cuda_host::current_launch().threads)
#define gridDim (::cuda_host::current_launch().grid)

inline void __syncthreads() { ::cuda_host::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::cuda_host::exchange(mask, 0, 0); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = ::cuda_host::exchange(mask, bits, threadIdx.x % ::cuda_host::kWarp ^ static_cast<unsigned>(lanes));
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// A lane that would read beyond the warp keeps its own value.
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned lane = threadIdx.x % ::cuda_host::kWarp;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = ::cuda_host::exchange(mask, bits, lane + lanes < ::cuda_host::kWarp ? lane + lanes : lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
