// How the operands of a matrix product lie in the registers of a warp's lanes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda/device.h"

namespace pyext::cuda {

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type". Register r of a lane holds two elements of a
// (or of b) that are neighbours along k: (row, k) and (row, k + 1) of a, (k, column) and (k + 1, column) of b. Register
// r of d is one element.
struct MmaLayout {
  int group;
  int member;

  __host__ __device__ explicit MmaLayout(int lane) : group(lane / 4), member(lane % 4) {}

  __host__ __device__ int a_row(int r) const { return group + r % 2 * 8; }
  __host__ __device__ int a_k(int r) const { return 2 * member + r / 2 * 8; }
  __host__ __device__ int b_k(int r) const { return 2 * member + r * 8; }
  __host__ __device__ int b_column() const { return group; }
  __host__ __device__ int d_row(int r) const { return group + r / 2 * 8; }
  __host__ __device__ int d_column(int r) const { return 2 * member + r % 2; }
};

// Two neighbours along a product's inner dimension, as a register of an operand.
template <typename T>
__device__ __forceinline__ uint32_t operand(const T* address) {
  const Pack<T, 2> pair = load_pack<2>(address);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

}  // namespace pyext::cuda
