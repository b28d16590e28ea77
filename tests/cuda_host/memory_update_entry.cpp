// The launcher of memory_update for ctypes.
#include "cuda/memory_update.h"

#include "guarded.h"

extern "C" const char* memory_update(const pyext::memory_update::Inputs* inputs) {
  return guarded([&] { pyext::memory_update::update(*inputs, nullptr); });
}
