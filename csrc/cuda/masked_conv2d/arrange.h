// A map of 16-bit elements with the kept channels of a position one after the other, each group's from a multiple of 16
// bytes on, so that a product fetches 8 of them at once: batch x positions x slots. Slots that are of no channel are
// neither written nor read.
#pragma once

#include "cuda/masked_conv2d/plan.h"

namespace pyext::masked_conv2d {

struct Arrangement {
  Lists lists;
  Images images;
  const uint16_t* source;
  Grid grid;
  bool channels_inside;  // whether the source's channels lie closer together than its columns
  uint16_t* arranged;
  unsigned position_tiles, channel_tiles;
};

namespace arranging {

constexpr int kPositions = 64;  // of a block
constexpr int kChannels = 64;

struct Shared {
  int64_t position[kPositions];  // what is added for it where the source is read
  int64_t channel[kChannels];    // likewise; -1 for none
  int slot[kChannels];
  uint16_t elements[kPositions][kChannels + 2];
};

__device__ inline void fill(const Arrangement& a, int image, int first_position, int first_channel, Shared& shared) {
  const int i = threadIdx.x, position = first_position + i, nth = first_channel + i;
  if (i < kPositions) {
    const int y = position / a.grid.width;
    shared.position[i] = image * a.grid.image + y * a.grid.row + (position - y * a.grid.width) * a.grid.column;
  }
  if (i >= kChannels) return;
  const int subnet = a.images.subnet(image);
  const Chosen chosen = nth < a.lists.length ? a.lists.of(subnet)[nth] : Chosen{0, -1};
  shared.channel[i] = chosen.channel < 0 ? -1 : chosen.place * a.grid.channel;
  const int group = max(chosen.channel, 0) / a.lists.group_channels();
  shared.slot[i] = a.lists.slot(subnet, group) + nth - a.lists.start(subnet, group);
}

// Block: some positions of one image, and some of its channels.
__device__ inline void arrange(const Arrangement& a) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const unsigned tile = blockIdx.x / a.channel_tiles;
  const int first_channel = static_cast<int>(blockIdx.x % a.channel_tiles) * kChannels;
  const int first_position = static_cast<int>(tile % a.position_tiles) * kPositions;
  const int image = static_cast<int>(tile / a.position_tiles);
  const int positions = min(a.grid.height * a.grid.width - first_position, kPositions);
  fill(a, image, first_position, first_channel, shared);
  __syncthreads();
  for (int i = threadIdx.x; i < kPositions * kChannels; i += kThreads) {
    const int position = a.channels_inside ? i / kChannels : i % kPositions;
    const int channel = a.channels_inside ? i % kChannels : i / kPositions;
    if (position >= positions || shared.channel[channel] < 0) continue;
    shared.elements[position][channel] = a.source[shared.position[position] + shared.channel[channel]];
  }
  __syncthreads();
  const int64_t first = int64_t{image} * a.grid.height * a.grid.width + first_position;
  for (int i = threadIdx.x; i < positions * kChannels; i += kThreads) {
    const int position = i / kChannels, channel = i % kChannels;
    if (shared.channel[channel] < 0) continue;
    a.arranged[(first + position) * a.lists.slots() + shared.slot[channel]] = shared.elements[position][channel];
  }
}

}  // namespace arranging

}  // namespace pyext::masked_conv2d
