// masked_conv2d on CUDA: a map of 16-bit elements is read and written once, through tiles in shared memory, so that
// both are in rows: 4 bytes per element, for products that would gather it element by element 9 times (of a 3x3
// kernel).
#include "cuda/launch.h"
#include "cuda/masked_conv2d/plan.h"

namespace pyext::masked_conv2d {
namespace {

struct Arrangement {
  Lists lists;
  Images images;
  const uint16_t* source;
  Grid grid;
  bool channels_inside;  // whether the source's channels lie closer together than its columns
  uint16_t* arranged;
  unsigned position_tiles, channel_tiles;
};

constexpr int kPositions = 64;  // of a block
constexpr int kChannels = 64;

struct Shared {
  int64_t position[kPositions];  // what is added for it where the source is read
  int64_t channel[kChannels];    // likewise; -1 for none
  int slot[kChannels];
  uint16_t elements[kPositions][kChannels + 2];
};

__device__ void fill(const Arrangement& a, int image, int first_position, int first_channel, Shared& shared) {
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
__global__ void __launch_bounds__(kThreads) arrange_kernel(const Arrangement a) {
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

}  // namespace

size_t arranged_bytes(const Lists& lists, int64_t batch, int64_t positions) {
  const int64_t elements = batch * positions * lists.slots();
  return (static_cast<size_t>(elements) * sizeof(uint16_t) + 15) / 16 * 16;
}

Grid arranged_grid(const Lists& lists, int height, int width) {
  const int64_t slots = lists.slots();
  return {height * width * slots, 1, width * slots, slots, height, width};
}

void arrange(const Lists& lists, const Images& images, const ImageTensor& source, int height, int width, void* arranged,
             cudaStream_t stream) {
  const int64_t* strides = source.strides;
  const Arrangement a{lists,
                      images,
                      static_cast<const uint16_t*>(source.data),
                      {strides[0], strides[1], strides[2], strides[3], height, width},
                      strides[1] < strides[3],
                      static_cast<uint16_t*>(arranged),
                      to_grid(divided(int64_t{height} * width, kPositions)),
                      to_grid(divided(lists.length, kChannels))};
  const int64_t blocks = images.batch * (int64_t{a.position_tiles} * a.channel_tiles);
  launch("arrange", arrange_kernel, dim3(to_grid(blocks)), kThreads, sizeof(Shared), stream, a);
}

}  // namespace pyext::masked_conv2d
