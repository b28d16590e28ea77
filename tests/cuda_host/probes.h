// A kernel of the shim's own tests, for ctypes by its name.
#pragma once

#include "cuda/launch.h"

struct Probe {
  const char* name;
  void (*kernel)(float* out, const float* in);
  dim3 grid;
  dim3 threads;
  size_t shared_bytes;
};

// Every probe gets 64 floats to write and 64 to read.
constexpr int kProbeFloats = 64;
