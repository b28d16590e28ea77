// Memory, threads and the constants of one call, for both passes.
#pragma once

#include "cpu/gated_excitation.h"
#include "cpu/image.h"
#include "cpu/services.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

using namespace pyext::gated_excitation;

constexpr int kTaps = 9;

// Hands out pieces of one block; the first pass, with a null base, measures the block.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <typename T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += (n * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

template <typename Buffers, typename... Args>
Buffers carve_scratch(const Host& host, const Args&... args) {
  Buffers buffers;
  Arena measure(nullptr);
  buffers.carve(measure, args...);
  Arena arena(static_cast<char*>(host.scratch(measure.used())));
  buffers.carve(arena, args...);
  return buffers;
}

// Splits [0, n) into `tasks` runs of nearly equal length; returns the first index of run `task`.
inline int64_t split(int64_t n, int64_t tasks, int64_t task) { return n * task / tasks; }

inline int64_t task_count(const Host& host, int64_t n) { return n < host.threads ? n : host.threads; }

// Calls work(n) for every image, in runs of one per thread.
template <typename F>
void parallel_images(const Host& host, int64_t batch, F work) {
  const int64_t tasks = task_count(host, batch);
  parallel(host, tasks, [&](int64_t task) {
    for (int64_t n = split(batch, tasks, task); n < split(batch, tasks, task + 1); ++n) work(n);
  });
}

// Per channel, in the order in which the inner loops read them.
template <typename T>
struct Channel {
  // BN of branches 3 and 5 as (u - mean) * scale + bias: as part of a shift, a mean that is large against the deviation
  // would cancel.
  T mean[2], scale[2], bias[2];
  T inverse[2];  // reciprocal standard deviation
  T kernel[2][kTaps];
};

template <typename T>
struct Call {
  const GatedExcitation& args;
  const Host& host;
  Sizes sizes;
  Extent extent;
  int64_t pitch = 0;          // round_up(P)
  int64_t channel_pitch = 0;  // round_up(C)
  int64_t forget_pitch = 0;   // round_up(F): where the attention part of a hidden vector starts
  int64_t hidden_pitch = 0;   // round_up(F) + round_up(R)
  const T* parameters[kNumParameters] = {};
  const T* running[kNumRunning] = {};
  Channel<T>* channels = nullptr;
  LaneMask<T>* column_mask[5] = {};  // [dx + 2][p], dx not 0: all bits where column(p) + dx is inside
};

// A parameter in the accumulate type: its own memory, or a converted copy.
template <typename T>
const T* as_accumulate(const Host& host, const void* data, DType dtype, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    if (dtype == DType::kBFloat16 || dtype == DType::kHalf) {
      T* to = shared<T>(host, n);
      if (dtype == DType::kHalf) {
        convert(static_cast<const Half*>(data), to, n);
      } else {
        convert(static_cast<const BFloat16*>(data), to, n);
      }
      return to;
    }
  }
  return static_cast<const T*>(data);
}

// One row is computed and repeated; strips read vectors that start at any row.
template <typename T>
LaneMask<T>* column_mask(const Host& host, const Sizes& s, int64_t dx) {
  const int64_t length = round_up<T>(s.positions()) + kLanes<T>;
  auto* mask = shared<LaneMask<T>>(host, length);
  for (int64_t p = 0; p < length; ++p) {
    mask[p] = p >= s.width ? mask[p - s.width] : (p + dx >= 0 && p + dx < s.width ? -1 : 0);
  }
  return mask;
}

template <typename T>
Call<T> begin_call(const GatedExcitation& args, const Host& host) {
  const Sizes& s = args.sizes;
  Call<T> call{args, host, s, {s.channels, s.height, s.width}};
  call.pitch = round_up<T>(s.positions());
  call.channel_pitch = round_up<T>(s.channels);
  call.forget_pitch = round_up<T>(s.forget);
  call.hidden_pitch = call.forget_pitch + round_up<T>(s.attention);
  for (int k = 0; k < kNumParameters; ++k) {
    call.parameters[k] = as_accumulate<T>(host, args.parameters[k], args.parameter_dtype, parameter_numel(k, s));
  }
  const int64_t lengths[4] = {s.channels, s.channels, s.attention, s.forget};
  for (int k = 0; k < kNumRunning && !args.training; ++k) {
    call.running[k] = as_accumulate<T>(host, args.running[k], args.running_dtype, lengths[k / 2]);
  }
  for (const int dx : {-2, -1, 1, 2}) call.column_mask[dx + 2] = column_mask<T>(host, s, dx);
  return call;
}

// Plain torch multiplies the zeros around the map too, so that a tap which is not finite makes NaN of the branch, even
// where the map is so small that the tap meets nothing else. The kernels clear what lies outside instead of multiplying
// it; the tap in the middle is the one that always lies inside.
template <typename T>
void poison(T (&kernel)[kTaps]) {
  T zero = 0;
  for (const T tap : kernel) zero += tap - tap;
  if (zero != 0) kernel[kTaps / 2] = zero;
}

// From the batch's statistics or the running ones.
template <typename T>
void prepare_channels(Call<T>& call) {
  const int64_t channels = call.sizes.channels;
  call.channels = shared<Channel<T>>(call.host, channels);
  const T* batch = static_cast<const T*>(call.args.map_statistics);
  for (int b = 0; b < 2; ++b) {
    const T* mean = call.args.training ? batch : call.running[b ? kNorm5Mean : kNorm3Mean];
    const T* var = call.args.training ? batch + channels : call.running[b ? kNorm5Var : kNorm3Var];
    const T* weight = call.parameters[b ? kNorm5Weight : kNorm3Weight];
    const T* bias = call.parameters[b ? kNorm5Bias : kNorm3Bias];
    const T* kernel = call.parameters[b ? kConv5Weight : kConv3Weight];
    for (int64_t c = 0; c < channels; ++c) {
      Channel<T>& channel = call.channels[c];
      const T deviation = std::sqrt(var[c] + static_cast<T>(call.args.eps));
      channel.mean[b] = mean[c];
      channel.scale[b] = weight[c] / deviation;
      channel.bias[b] = bias[c];
      channel.inverse[b] = 1 / deviation;
      for (int k = 0; k < kTaps; ++k) channel.kernel[b][k] = kernel[c * kTaps + k];
      poison(channel.kernel[b]);
    }
  }
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
