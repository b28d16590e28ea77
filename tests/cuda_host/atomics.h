// Atomic functions, relaxed as CUDA's are: they order no other access.
#pragma once

namespace cuda_host {

enum class Atomic { kAdd, kMin, kMax, kAnd, kOr, kExchange, kCompareAndSwap };

// Returns the value before. Defined for int, unsigned, unsigned long long, float and double.
template <typename T>
T atomic(Atomic operation, T* address, T operand, T expected = T());

// A parameter that takes no part in deducing T, so that atomicAdd(&some_unsigned, 1) is what it is in CUDA.
template <typename T>
struct Given {
  using Type = T;
};

}  // namespace cuda_host

#define CUDA_HOST_ATOMIC(name, operation)                                                     \
  template <typename T>                                                                       \
  T name(T* address, typename ::cuda_host::Given<T>::Type operand) {                          \
    return ::cuda_host::atomic<T>(::cuda_host::Atomic::operation, address, operand, operand); \
  }
CUDA_HOST_ATOMIC(atomicAdd, kAdd)
CUDA_HOST_ATOMIC(atomicMin, kMin)
CUDA_HOST_ATOMIC(atomicMax, kMax)
CUDA_HOST_ATOMIC(atomicAnd, kAnd)
CUDA_HOST_ATOMIC(atomicOr, kOr)
CUDA_HOST_ATOMIC(atomicExch, kExchange)
#undef CUDA_HOST_ATOMIC

template <typename T>
T atomicCAS(T* address, typename ::cuda_host::Given<T>::Type expected, typename ::cuda_host::Given<T>::Type value) {
  return ::cuda_host::atomic<T>(::cuda_host::Atomic::kCompareAndSwap, address, value, expected);
}
