// What a block that works on one image keeps in shared memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/gated_excitation/network.h"
#include "cuda/launch.h"

namespace pyext::gated_excitation {

using namespace pyext::cuda;

constexpr int kTableRows = 64;  // channels whose constants are in shared memory at a time
constexpr int kScratchFloats = kNumBranches * kWarp;

// Where things lie in the dynamic shared memory of a block that works on one image, in bytes from its start.
// The constants' table is at 0.
struct Plan {
  int table_rows;
  int vectors;  // floats per channel, hidden unit and warp
  int maps;     // bordered maps, or -1: in global memory
  int tile;     // the image, or -1: read from global memory each time
  int tile_pitch;
  int bytes;
  int64_t map_floats;
};

// Constants of one channel as position_dots uses them, with the channel's weights folded into the taps.
struct alignas(16) TableRow {
  float tap[kMixBranches][kTaps];
  float mean[kMixBranches];
  float scale[kMixBranches];
  float shift[kMixBranches];
  float forget;
};

// Threads are split into groups that share the channels when an image has fewer positions than the block has threads.
__host__ __device__ inline int channel_groups(int threads, const Geometry& g) {
  const int slots = (g.positions + kWarp - 1) / kWarp * kWarp;
  int groups = 1;
  while (2 * groups * slots <= threads && 2 * groups <= g.channels) groups *= 2;
  return groups;
}

inline void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("gated_excitation (cuda): ") + message);
}

// Decides what of an image's data is in shared memory: the image itself matters most, then the maps.
inline Plan plan(const Geometry& g, int64_t vector_floats, int64_t map_floats, int element_bytes,
                 bool channels_fastest) {
  const auto limit = static_cast<int64_t>(shared_memory_limit());
  Plan p;
  p.table_rows = std::min(g.channels, kTableRows);
  const int64_t table_bytes = p.table_rows * static_cast<int64_t>(sizeof(TableRow));
  const int64_t base = table_bytes + (vector_floats + 3) / 4 * 16;
  require(base <= limit, "too many channels for the shared memory of one block");
  p.vectors = static_cast<int>(table_bytes);
  // An odd pitch spreads the channels of one position over the banks.
  const int64_t pitch = channels_fastest ? g.positions | 1 : g.positions;
  const int64_t tile_bytes = (g.channels * pitch * element_bytes + 15) / 16 * 16;
  const int64_t map_bytes = (map_floats + 3) / 4 * 16;
  const bool staged = base + tile_bytes <= limit;
  const bool mapped = base + map_bytes + (staged ? tile_bytes : 0) <= limit;
  p.tile_pitch = static_cast<int>(pitch);
  p.tile = staged ? static_cast<int>(base) : -1;
  p.maps = mapped ? static_cast<int>(base + (staged ? tile_bytes : 0)) : -1;
  p.bytes = static_cast<int>(base + (staged ? tile_bytes : 0) + (mapped ? map_bytes : 0));
  p.map_floats = (map_floats + 3) / 4 * 4;
  return p;
}

}  // namespace pyext::gated_excitation
