// The one place where kernels start, and what else the host shim needs to see: tests/cuda_host/cuda/launch.h replaces
// this file to run kernels on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace pyext::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Bytes of dynamic shared memory that one block may ask for on the current device.
inline size_t shared_memory_limit() {
  int device = 0;
  int bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return static_cast<size_t>(bytes);
}

// The block's dynamic shared memory, aligned for 16-byte accesses.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

template <typename T>
struct Identity {
  using type = T;
};

// Starts `kernel`; `name` is what an error message calls it. An empty grid is no launch.
template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared,
            cudaStream_t stream, typename Identity<Parameters>::type... arguments) {
  constexpr size_t kSharedWithoutOptIn = 48 * 1024;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > kSharedWithoutOptIn) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
  }
  kernel<<<grid, threads, shared, stream>>>(arguments...);
  check(cudaGetLastError(), name);
}

}  // namespace pyext::cuda
