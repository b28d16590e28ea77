// Replaces csrc/cuda/launch.h: a launch runs the kernel on the host, to its end, in fibres.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <tuple>

namespace pyext::cuda {

// Set by tests to drive kernels into the forms that they have for little shared memory.
inline size_t& shared_memory_limit_setting() {
  static size_t bytes = 227 * 1024;
  return bytes;
}

inline size_t shared_memory_limit() { return shared_memory_limit_setting(); }

inline unsigned char* dynamic_shared() { return cuda_host::current_shared(); }

template <typename T>
struct Identity {
  using type = T;
};

template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared, cudaStream_t,
            typename Identity<Parameters>::type... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > shared_memory_limit()) throw std::runtime_error(std::string(name) + ": too much shared memory");
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call{kernel, {arguments...}};
  const auto body = [](const void* parameters) {
    const Call& c = *static_cast<const Call*>(parameters);
    std::apply(c.kernel, c.arguments);
  };
  cuda_host::run({name, reinterpret_cast<const void*>(kernel), grid, threads, shared, body, &call, sizeof(call)});
}

}  // namespace pyext::cuda
