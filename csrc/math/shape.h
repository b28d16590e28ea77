// A tensor's shape as a contract tells it.
#pragma once

#include <cstdint>

namespace pyext {

struct Shape {
  static constexpr int kMost = 4;
  int dims;
  int64_t extents[kMost];

  int64_t numel() const {
    int64_t numel = 1;
    for (int i = 0; i < dims; ++i) numel *= extents[i];
    return numel;
  }
};

}  // namespace pyext
