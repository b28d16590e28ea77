// Replaces csrc/cuda/launch.h: a launch runs the kernel on the host, to its end, in fibres.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace pyext::cuda {

// Set by tests to drive kernels into the forms that they have for little shared memory.
inline size_t& shared_memory_limit_setting() {
  static size_t bytes = 227 * 1024;
  return bytes;
}

inline size_t shared_memory_limit() { return shared_memory_limit_setting(); }

inline unsigned char* dynamic_shared() { return cuda_host::Block::active()->shared(); }

template <typename Vector, typename T>
Vector* vector_at(T* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(Vector) != 0) {
    cuda_host::Block::active()->fail("a vector access to an address that is not aligned for it");
  }
  return reinterpret_cast<Vector*>(address);
}

template <typename T>
struct Identity {
  using type = T;
};

template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, cudaStream_t,
            typename Identity<Parameters>::type... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > shared_memory_limit()) throw std::runtime_error(std::string(name) + ": too much shared memory");
  cuda_host::run({name, grid, dim3(threads), [=] { kernel(arguments...); }}, shared);
}

}  // namespace pyext::cuda
