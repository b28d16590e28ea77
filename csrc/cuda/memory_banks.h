// The dtypes of memory banks as launchers see them.
#pragma once

#include <cstdint>

namespace pyext::cuda {

enum class BankDtype : int32_t { kFloat, kBFloat16, kHalf };

}  // namespace pyext::cuda
