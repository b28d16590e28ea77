// What the memory_update kernels share.
#pragma once

#include "math/gates.h"

namespace pyext::memory_update {

// Rows are divided by at least this, as torch's normalize does: a row of zeros stays one. NaN passes.
template <typename T>
PYEXT_HOST_DEVICE T nonzero_norm(T norm) {
  constexpr T kLeast = static_cast<T>(1e-12);
  return norm < kLeast ? kLeast : norm;
}

}  // namespace pyext::memory_update
