// CUDA's language on the host: enough of it to run the kernels of csrc/cuda with g++, one fibre per thread. Found
// before the toolkit's header of the same name, so kernels are compiled as they are; vector types, half and bfloat16
// are CUDA's own headers, which can be compiled for the host.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "atomics.h"
#include "execution.h"
#include "fences.h"
#include "warp.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
// The library's thread-local storage is the static shared memory of the block that runs (see memory.h). Dynamic
// shared memory comes from pyext::cuda::dynamic_shared().
#undef __shared__
#define __shared__ CUDA_HOST_SHARED(__COUNTER__)
#define CUDA_HOST_SHARED(number) CUDA_HOST_SHARED_AFTER(number)
// The gap, which library.py finds by its name, is out of bounds: it parts neighbouring arrays.
#define CUDA_HOST_SHARED_AFTER(number)                                                             \
  static thread_local __attribute__((used, aligned(16))) unsigned char cuda_host_gap_##number[64]; \
  static thread_local

using std::max;
using std::min;

#define threadIdx (::cuda_host::current_thread())
#define blockIdx (::cuda_host::current_block())
#define blockDim (::cuda_host::current_threads())
#define gridDim (::cuda_host::current_grid())

inline void __syncthreads() { ::cuda_host::meet_block(::cuda_host::BlockMeeting::kSync, 0); }
inline int __syncthreads_count(int predicate) {
  return ::cuda_host::meet_block(::cuda_host::BlockMeeting::kCount, predicate != 0);
}
inline int __syncthreads_or(int predicate) {
  return ::cuda_host::meet_block(::cuda_host::BlockMeeting::kOr, predicate != 0);
}
inline int __syncthreads_and(int predicate) {
  return ::cuda_host::meet_block(::cuda_host::BlockMeeting::kAnd, predicate != 0);
}

inline void __threadfence() { ::cuda_host::fence(); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }

template <typename To, typename From>
To cuda_host_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline int __float_as_int(float x) { return cuda_host_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_host_bits<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_host_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_host_bits<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
