// What the lists of kept channels and of images' sub-networks say, put in order on the device: kernels then find a
// sub-network's images, and a group's channels, one after the other. Sub-network number `subnets`, which keeps nothing,
// has the images whose number is none.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/masked_conv2d.h"

namespace pyext::masked_conv2d {

// A channel of a compact map: its place there, and its number in the layer, -1 where the list has none.
struct Chosen {
  int place;
  int channel;
};

constexpr int kSlots = 8;  // 16-bit elements of 16 bytes

// Of one kind, inputs or outputs.
struct Lists {
  const int64_t* numbers;  // as the operator was given them
  int length;
  int channels;  // of the whole layer
  int groups;
  Chosen* chosen;  // (subnets + 1) x length: kept channels, ascending, then the places without one
  int* ranks;      // (subnets + 1) x channels: where `chosen` has the channel, or -1
  int* starts;     // (subnets + 1) x (groups + 1): where `chosen` has a group's first channel

  __device__ const Chosen* of(int subnet) const { return chosen + int64_t{subnet} * length; }
  __device__ int rank(int subnet, int channel) const { return ranks[int64_t{subnet} * channels + channel]; }
  __device__ int start(int subnet, int group) const { return starts[int64_t{subnet} * (groups + 1) + group]; }
  // Where an arranged map has a group's channels: from a multiple of kSlots on, one after the other.
  __device__ int slot(int subnet, int group) const {
    return (start(subnet, group) + kSlots - 1) / kSlots * kSlots + kSlots * group;
  }
  // Channels of an arranged map, those that are none included.
  __host__ __device__ int slots() const {
    return (length + kSlots - 1) / kSlots * kSlots + (groups > 1 ? kSlots * groups : 0);
  }
  __host__ __device__ int group_channels() const { return channels / groups; }
  // The channel at a place, or -1; `subnet` may be that which keeps nothing.
  __device__ int channel(int subnet, int subnets, int place) const {
    const int64_t number = subnet < subnets ? numbers[int64_t{subnet} * length + place] : -1;
    return number >= 0 && number < channels ? static_cast<int>(number) : -1;
  }
};

struct Images {
  const int64_t* numbers;  // of sub-networks, as the operator was given them; null: all images are of the first
  int batch;
  int subnets;
  int* order;   // batch: images by sub-network, then by number
  int* starts;  // subnets + 2: where `order` has a sub-network's first image

  __device__ int subnet(int image) const {
    if (numbers == nullptr) return 0;
    const int64_t number = numbers[image];
    return number >= 0 && number < subnets ? static_cast<int>(number) : subnets;
  }
};

// Items of several segments, one after the other, cut into tiles of `size`, none of which has items of two. Only the
// device knows where segments end, so there are as many tiles as that can need; some may be empty.
inline int64_t tiles_for(int64_t items, int64_t size, int64_t segments) {
  return segments == 1 ? (items + size - 1) / size : items / size + segments;
}

// A tile's segment, and its items [first, first + count) of the segment's.
struct Cut {
  int segment;
  int64_t first;
  int64_t count;
};

// `start(segment)` gives a segment's first item, and that after the last one for the number behind all segments.
template <typename Start>
__device__ Cut cut_at(int64_t tile, int64_t size, int segments, Start start) {
  int low = 0, high = segments;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (start(middle) / size + middle <= tile ? low : high) = middle;
  }
  const int64_t begin = start(low), first = (tile - begin / size - low) * size;
  const int64_t left = start(low + 1) - begin - first;
  return {low, first, left < size ? left : size};
}

struct Prepared {
  Lists inputs;
  Lists outputs;
  Images images;

  // Lies at the beginning of a workspace of `in`.
  Prepared(const Inputs& in, void* workspace);

  size_t bytes;
};

// Fills the workspace.
void prepare(const Prepared& prepared, cudaStream_t stream);

}  // namespace pyext::masked_conv2d
