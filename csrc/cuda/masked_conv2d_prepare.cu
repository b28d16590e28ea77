// masked_conv2d on CUDA: the lists, put in order. One block per sub-network and list reads 8 bytes per entry and writes
// 8 per entry and 4 per channel, all of which stays in the second-level cache for the kernels that follow.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/masked_conv2d/lists.h"

namespace pyext::masked_conv2d {
namespace {

using namespace pyext::cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Deals places, in the threads' order, to the items of a block's passes over many of them.
class Placer {
 public:
  __device__ explicit Placer(int first) : next_(first) {}

  // The place of the thread's item, if it has one; called by all threads.
  __device__ int place(bool item) {
    __shared__ int counts[kWarps];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const unsigned items = __ballot_sync(kFullMask, item);
    __syncthreads();
    if (lane == 0) counts[warp] = __popc(items);
    __syncthreads();
    int place = next_ + __popc(items & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += counts[w];
      next_ += counts[w];
    }
    return place;
  }

  __device__ int next() const { return next_; }

 private:
  int next_;
};

// Of one sub-network's list; that of the one that keeps nothing is empty.
__device__ void prepare_list(const Lists& lists, int subnet, bool keeps) {
  const int64_t* numbers = lists.numbers + int64_t{subnet} * lists.length;
  Chosen* chosen = lists.chosen + int64_t{subnet} * lists.length;
  int* ranks = lists.ranks + int64_t{subnet} * lists.channels;
  int* starts = lists.starts + int64_t{subnet} * (lists.groups + 1);
  const auto channel_of = [&](int place) {
    const int64_t number = keeps && place < lists.length ? numbers[place] : -1;
    return number >= 0 && number < lists.channels ? static_cast<int>(number) : -1;
  };
  for (int c = threadIdx.x; c < lists.channels; c += kThreads) ranks[c] = -1;
  __syncthreads();
  for (int i = threadIdx.x; i < lists.length; i += kThreads) {
    const int channel = channel_of(i);
    if (channel >= 0) atomicMax(&ranks[channel], i);  // of a channel that is listed twice, which no list may, the last
  }
  __syncthreads();
  Placer placer(0);
  for (int first = 0; first < lists.channels; first += kThreads) {
    const int channel = first + static_cast<int>(threadIdx.x);
    const int place = channel < lists.channels ? ranks[channel] : -1;
    const int k = placer.place(place >= 0);
    if (place >= 0) chosen[k] = {place, channel};
    if (channel < lists.channels && channel % lists.group_channels() == 0) starts[channel / lists.group_channels()] = k;
  }
  const int kept = placer.next();
  if (threadIdx.x == 0) starts[lists.groups] = kept;
  for (int first = 0; first < lists.length; first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    const int channel = channel_of(i);
    const bool absent = i < lists.length && (channel < 0 || ranks[channel] != i);
    const int k = placer.place(absent);
    if (absent) chosen[k] = {i, -1};
  }
  __syncthreads();
  for (int k = threadIdx.x; k < kept; k += kThreads) ranks[chosen[k].channel] = k;
}

// Of the images of one sub-network.
__device__ void prepare_images(const Images& images, int subnet) {
  Placer before(0);
  for (int first = 0; first < images.batch; first += kThreads) {
    const int image = first + static_cast<int>(threadIdx.x);
    before.place(image < images.batch && images.subnet(image) < subnet);
  }
  Placer own(before.next());
  for (int first = 0; first < images.batch; first += kThreads) {
    const int image = first + static_cast<int>(threadIdx.x);
    const bool member = image < images.batch && images.subnet(image) == subnet;
    const int k = own.place(member);
    if (member) images.order[k] = image;
  }
  if (threadIdx.x != 0) return;
  images.starts[subnet] = before.next();
  if (subnet == images.subnets) images.starts[subnet + 1] = own.next();
}

// Block (x, y): inputs, outputs or images of sub-network x.
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const Lists inputs, const Lists outputs, const Images images) {
  const int subnet = static_cast<int>(blockIdx.x);
  if (blockIdx.y == 2) {
    prepare_images(images, subnet);
  } else if (blockIdx.y == 1) {
    prepare_list(outputs, subnet, subnet < images.subnets);
  } else {
    prepare_list(inputs, subnet, subnet < images.subnets);
  }
}

}  // namespace

Prepared::Prepared(const Inputs& in, void* workspace) {
  const Sizes& s = in.sizes;
  char* at = static_cast<char*>(workspace);
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
    at += count * static_cast<int64_t>(sizeof(*pointer));
  };
  const auto lists = [&](const int64_t* numbers, int64_t length, int64_t channels) {
    Lists result{numbers, static_cast<int>(length), static_cast<int>(channels), static_cast<int>(s.groups), {}, {}, {}};
    take(result.chosen, (s.subnets + 1) * length);
    take(result.ranks, (s.subnets + 1) * channels);
    take(result.starts, (s.subnets + 1) * (s.groups + 1));
    return result;
  };
  inputs = lists(in.inputs, s.inputs, s.group_inputs * s.groups);
  outputs = lists(in.outputs, s.outputs, s.out_channels);
  images = {in.subnets, static_cast<int>(s.batch), static_cast<int>(s.subnets), nullptr, nullptr};
  take(images.order, s.batch);
  take(images.starts, s.subnets + 2);
  bytes = (static_cast<size_t>(at - static_cast<char*>(workspace)) + 15) / 16 * 16;
}

void prepare(const Prepared& p, cudaStream_t stream) {
  launch("prepare", prepare_kernel, dim3(static_cast<unsigned>(p.images.subnets + 1), 3), kThreads, 0, stream, p.inputs,
         p.outputs, p.images);
}

}  // namespace pyext::masked_conv2d
