// Order between blocks of one launch by __threadfence and atomics: what a thread did, or its block before the last
// barrier, before a fence and then an atomic comes before what another does after an atomic on the same place and then
// a fence. (A kernel whose last block sums up what all have written does that.)
#pragma once

#include <cstdint>
#include <vector>

namespace cuda_host {

// Accesses of one block: all before `epoch`, and in `epoch` those of `thread` up to `clock`.
struct Release {
  uint32_t block;
  uint32_t epoch;
  uint32_t thread;
  uint32_t clock;

  bool covers(uint32_t its_epoch, uint32_t its_thread, uint32_t its_clock) const {
    if (its_epoch < block || its_epoch > epoch) return false;
    return its_epoch < epoch || (its_thread == thread && its_clock <= clock);
  }
};
using Releases = std::vector<Release>;

// Of a thread: what its next atomic publishes, what it saw in atomics, and what it has acquired by a fence after that.
struct Fences {
  Releases published;
  Releases seen;
  Releases acquired;
};

// Of the thread that runs.
void fence();
void meet_at_atomic(uintptr_t address);
bool is_acquired(uint32_t epoch, uint32_t thread, uint32_t clock);

// At a barrier of a block, what one thread has acquired all have. Blocks and launches begin with nothing.
void share_acquired(const Fences& fences);
void forget_acquired();
void forget_published();

}  // namespace cuda_host
