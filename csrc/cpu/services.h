// A Host's services with types, and the choice of an element type, for kernels (csrc/cpu/*_kernel.cpp). Internal
// linkage, as in vector.h.
#pragma once

#include <cstring>

#include "cpu/kernel.h"
#include "cpu/vector.h"

namespace {

// Calls work(task) for every task in [0, tasks), on several threads.
template <typename F>
void parallel(const pyext::cpu::Host& host, int64_t tasks, F work) {
  host.parallel(host.self, tasks, [](void* context, int64_t task) { (*static_cast<F*>(context))(task); }, &work);
}

// Memory for n elements, for the whole call.
template <typename E>
E* shared(const pyext::cpu::Host& host, int64_t n) {
  return static_cast<E*>(host.shared(host.self, n * sizeof(E)));
}

template <typename E>
E* shared_zeros(const pyext::cpu::Host& host, int64_t n) {
  E* data = shared<E>(host, n);
  if (n > 0) std::memset(data, 0, n * sizeof(E));
  return data;
}

// work(S{}) with S the elements' type.
template <typename F>
auto with_element_type(pyext::cpu::DType dtype, F work) {
  switch (dtype) {
    case pyext::cpu::DType::kFloat:
      return work(float{});
    case pyext::cpu::DType::kDouble:
      return work(double{});
    case pyext::cpu::DType::kBFloat16:
      return work(BFloat16{});
    case pyext::cpu::DType::kHalf:
      break;
  }
  return work(Half{});
}

}  // namespace
