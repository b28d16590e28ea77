// Kernels of the shim's own tests, for ctypes by their names.
#pragma once

// In angle brackets, so that it is the include path that chooses between the shim's and the real one.
#include <cuda/launch.h>

#include "guarded.h"

struct Probe {
  const char* name;
  void (*kernel)(float* out, const float* in);
  dim3 grid;
  dim3 threads;
  size_t shared_bytes;
};

// Every probe gets 64 floats to write and 64 to read.
constexpr int kProbeFloats = 64;

// Functions for ctypes over the array kProbes: <set>_name, null from the first index on that has none, and run_<set>.
#define PYEXT_PROBES(set)                                                                                     \
  extern "C" const char* set##_name(size_t index) {                                                           \
    return index < sizeof(kProbes) / sizeof(kProbes[0]) ? kProbes[index].name : nullptr;                      \
  }                                                                                                           \
  extern "C" const char* run_##set(size_t index, float* out, const float* in) {                               \
    const Probe& p = kProbes[index];                                                                          \
    return guarded(                                                                                           \
        [&] { pyext::cuda::launch(p.name, p.kernel, p.grid, p.threads, p.shared_bytes, nullptr, out, in); }); \
  }
