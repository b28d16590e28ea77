// What every memory_contrast kernel shares: extents and the constants of noise-contrastive estimation.
#pragma once

#include <cstdint>

#include "math/gates.h"

namespace pyext::memory_contrast {

struct Sizes {
  int64_t peers;
  int64_t batch;
  int64_t entries;   // columns of the indices: the positive and the negatives
  int64_t features;  // of an embedding and of a row of a bank
  int64_t rows;      // of one bank

  PYEXT_HOST_DEVICE int64_t others() const { return peers - 1; }
  PYEXT_HOST_DEVICE int64_t pairs() const { return peers * others(); }
};

constexpr double kEpsilon = 1e-7;

// K * Pn: the number of negatives times the probability of each under uniform noise.
PYEXT_HOST_DEVICE double noise(const Sizes& s) {
  return static_cast<double>(s.entries - 1) / static_cast<double>(s.rows);
}

// The peer whose embedding is the `other`-th that meets bank `bank`: all peers in order, but the bank's own.
PYEXT_HOST_DEVICE int64_t peer_of(int64_t bank, int64_t other) { return other < bank ? other : other + 1; }

}  // namespace pyext::memory_contrast
