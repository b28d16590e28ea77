// Reductions over positions, one result per channel, in either memory format.
#pragma once

#include <algorithm>

#include "cuda/device.h"

namespace pyext::gated_excitation {

using namespace pyext::cuda;

constexpr int kThreads = 256;  // of every kernel but excite_kernel

// How a block's threads share channels and positions: `lanes` channels side by side, the rest over positions, with
// adjacent threads on adjacent elements of memory. Both counts are powers of two.
struct ChannelLanes {
  int lanes;
  bool channels_fastest;
};

struct Lane {
  int channel;
  int slot;
  int slots;
  int cell;  // in a (slots, lanes) array

  __device__ Lane(const ChannelLanes& shape, int first_channel) {
    slots = blockDim.x / shape.lanes;
    const int lane = shape.channels_fastest ? threadIdx.x % shape.lanes : threadIdx.x / slots;
    slot = shape.channels_fastest ? threadIdx.x / shape.lanes : threadIdx.x % slots;
    channel = first_channel + lane;
    cell = slot * shape.lanes + lane;
  }
};

// Merges `value` over the slots of each channel; slot 0 returns the result. `scratch` holds one value per thread.
template <typename Value>
__device__ Value merge_slots(const Lane& lane, Value value, Value* scratch) {
  __syncthreads();
  scratch[lane.cell] = value;
  const int lanes = blockDim.x / lane.slots;
  for (int half = lane.slots / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane.slot < half) {
      value.merge(scratch[lane.cell + half * lanes]);
      scratch[lane.cell] = value;
    }
  }
  return value;
}

inline ChannelLanes channel_lanes(const Geometry& g, bool channels_fastest) {
  if (channels_fastest) return {kWarp, true};
  int lanes = 1;
  while (kThreads / (2 * lanes) >= std::max(kWarp, g.positions)) lanes *= 2;
  return {lanes, false};
}

}  // namespace pyext::gated_excitation
