#include "atomics.h"

#include <algorithm>
#include <type_traits>

#include "memory.h"

namespace cuda_host {

template <typename T>
T atomic(Atomic operation, T* address, T operand, T expected) {
  access(reinterpret_cast<uintptr_t>(address), sizeof(T), Access::kAtomic);
  meet_at_atomic(reinterpret_cast<uintptr_t>(address));
  const T before = *address;
  switch (operation) {
    case Atomic::kAdd:
      *address = before + operand;
      break;
    case Atomic::kMin:
      *address = std::min(before, operand);
      break;
    case Atomic::kMax:
      *address = std::max(before, operand);
      break;
    case Atomic::kExchange:
      *address = operand;
      break;
    case Atomic::kCompareAndSwap:
      if (before == expected) *address = operand;
      break;
    case Atomic::kAnd:
      if constexpr (std::is_integral_v<T>) *address = before & operand;
      break;
    case Atomic::kOr:
      if constexpr (std::is_integral_v<T>) *address = before | operand;
      break;
  }
  return before;
}

template int atomic(Atomic, int*, int, int);
template unsigned atomic(Atomic, unsigned*, unsigned, unsigned);
template unsigned long long atomic(Atomic, unsigned long long*, unsigned long long, unsigned long long);
template float atomic(Atomic, float*, float, float);
template double atomic(Atomic, double*, double, double);

}  // namespace cuda_host
