// What is known of every byte that a kernel can reach: whether it exists, was written, may be written, and who
// accessed it last, so that two accesses that nothing orders are found.
//
// Time is counted in epochs: one per block and per stretch between two barriers of a block, over all launches. Blocks
// run one after the other, but those of one launch are unordered. Within an epoch, threads of one warp are ordered by
// __syncwarp alone: each thread has a clock that a __syncwarp advances, and knows for every lane the clock up to which
// that lane's accesses come before its own (a vector clock).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "execution.h"
#include "fences.h"

namespace cuda_host {

enum class Access { kRead, kWrite, kAtomic };

// The first epoch of the launch and of the block that run, and the present one.
struct Time {
  uint32_t launch = 1;
  uint32_t block = 1;
  uint32_t now = 1;
};
extern Time present;

// The thread that runs.
struct Actor {
  uint32_t thread;
  uint32_t clock = 1;
  uintptr_t stack;
  std::array<uint32_t, kWarp> known{};
  Fences fences;
};
extern Actor* actor;

// Who accessed, when. Epoch 0 is never.
struct Stamp {
  uint32_t epoch = 0;
  uint32_t thread : 10;
  uint32_t clock : 22;

  Stamp() : thread(0), clock(0) {}
  explicit Stamp(const Actor& a) : epoch(present.now), thread(a.thread), clock(a.clock) {}

  bool operator==(const Stamp& other) const {
    return epoch == other.epoch && thread == other.thread && clock == other.clock;
  }
  uint32_t warp() const { return thread / kWarp; }
  bool of_other_block() const { return epoch >= present.launch && epoch < present.block; }

  // Whether that access comes before whatever the thread that runs does now.
  bool ordered() const {
    if (epoch < present.launch) return true;
    if (epoch < present.block) return is_acquired(epoch, thread, clock);
    if (epoch < present.now || thread == actor->thread) return true;
    return warp() == actor->thread / kWarp && clock <= actor->known[thread % kWarp];
  }
};

// Accesses of one kind by several threads, of which none comes before another. Two are enough to convict a later
// access of any thread: whoever is in order with both is in order with those that were dropped (a third that no
// partial __syncwarp tells apart from them).
struct Witnesses {
  std::array<Stamp, 2> at;

  const Stamp* unordered() const {
    for (const Stamp& stamp : at) {
      if (!stamp.ordered()) return &stamp;
    }
    return nullptr;
  }

  void add(const Stamp& now) {
    for (Stamp& stamp : at) {
      if (stamp.ordered()) {
        stamp = now;
        return;
      }
    }
    const bool one_warp = !at[0].of_other_block() && !at[1].of_other_block() && at[0].warp() == at[1].warp();
    if (one_warp && now.warp() != at[0].warp()) at[1] = now;
  }
};

struct Cell {
  Stamp write;
  Witnesses reads;
  Witnesses atomics;

  // Notes an access of the thread that runs; returns the earlier one that nothing orders before it, if any.
  const Stamp* note(Access access);
};

// Sixteen bytes of memory, in cells as wide as the narrowest access to any of them.
struct Line {
  static constexpr unsigned kBytes = 16;
  uint32_t generation = 0;  // of shared memory: the block that it belongs to
  uint16_t valid = 0;       // one bit per byte, here and below
  uint16_t written = 0;
  uint16_t frozen = 0;
  uint8_t width = kBytes;
  std::array<Cell, kBytes> cells;

  void split(unsigned offset, unsigned bytes);
};

}  // namespace cuda_host
