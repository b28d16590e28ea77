// The squeeze cell in float32: a thread has one position, whose channels between the convolutions it keeps in registers
// while it goes once over x; then half the threads have one position of u each.
#pragma once

#include <cstddef>

#include "cuda/hybrid_block/cell.h"
#include "cuda/launch.h"

namespace pyext::hybrid_block::scalar {

constexpr int kQuad = 4;  // values of one 16-byte access
constexpr int kSlice = 48;
constexpr int kAhead = 4;  // channels of x that a thread loads before it uses them
constexpr int kSlots = kThreads / kCells;
constexpr int kOutputs = 16;  // channels of u that a thread holds
constexpr int kBlockOutputs = kSlots * kOutputs;
constexpr int kStep = 16;  // channels between the convolutions whose 3x3 weights are in shared memory at once
constexpr int kRounding = kQuad;

struct Shared {
  union {
    struct {
      Norm norm[kWarps][kInputs];
      float weight[kInputs][kSlice];
    } first;
    float second[kBlockOutputs][kTaps][kStep];
  };
  Place place;  // here, it takes no registers
  Norm norm[kSlice];
  float squeezed[kSlice][kBordered];

  static size_t bytes(int slice, int) { return offsetof(Shared, squeezed) + slice * kBordered * sizeof(float); }
};

// Weights of the 1x1 convolution from kInputs channels to a slice; zeros where there is none.
template <typename T, typename P>
__device__ void load_first(const Arguments<T, P>& a, int start, int slice, int count, Shared& shared) {
  load_norms(a, start, shared.first.norm[threadIdx.x / kWarp]);
  const int c = threadIdx.x % kInputs;
  for (int s = threadIdx.x / kInputs; s < kSlice; s += kThreads / kInputs) {
    const bool inside = start + c < a.channels && s < count;
    shared.first.weight[c][s] = inside ? to_float(a.first.conv[int64_t{slice + s} * a.channels + start + c]) : 0.f;
  }
}

// sum[s] += weight[s, c] x[c] over kAhead channels of the thread's position.
__device__ __forceinline__ void add_inputs(const float (&x)[kAhead], const float (*weight)[kSlice], int count,
                                           float (&sum)[kSlice]) {
#pragma unroll
  for (int s = 0; s < kSlice; s += kQuad) {
    if (s >= count) continue;
#pragma unroll
    for (int c = 0; c < kAhead; ++c) {
      const Pack<float, kQuad> w = load_pack<kQuad>(&weight[c][s]);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) sum[s + i] += w.at[i] * x[c];
    }
  }
}

// `count` channels of the map between the convolutions from `slice` on, into shared memory; zero outside the map.
template <typename T, typename P>
__device__ void squeeze_slice(const Arguments<T, P>& a, const Source<T>& source, int slice, int count, Shared& shared) {
  const int thread = threadIdx.x;
  const Norm* norms = shared.first.norm[thread / kWarp];
  float sum[kSlice] = {};
  for (int start = 0; start < a.channels; start += kInputs) {
    __syncthreads();
    if (start == 0 && thread < count) shared.norm[thread] = norm_of(a.second, slice + thread, a.eps);
    load_first(a, start, slice, count, shared);
    __syncthreads();
    if (!source.inside) continue;
#pragma unroll 1
    for (int part = 0; part < kInputs; part += kAhead) {
      float x[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) x[i] = source.load(a, start + part + i);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) x[i] = norms[part + i].activated(x[i]);
      add_inputs(x, shared.first.weight + part, count, sum);
    }
  }
#pragma unroll
  for (int s = 0; s < kSlice; ++s) {
    if (s / kQuad * kQuad >= count || thread >= kBordered) continue;
    shared.squeezed[s][thread] = source.inside && s < count ? shared.norm[s].activated(sum[s]) : 0.f;
  }
}

// Weights of the 3x3 convolution from `count` channels, of which `start` is the first of the group's.
template <typename T, typename P>
__device__ void load_second(const Arguments<T, P>& a, const Place& at, int start, int count, Shared& shared) {
  for (int o = threadIdx.x / kWarp; o < at.outputs; o += kWarps) {
    const P* weight = a.second.conv + (int64_t{at.first_output + o} * a.group_squeeze() + start) * kTaps;
    for (int i = threadIdx.x % kWarp; i < kStep * kTaps; i += kWarp) {
      shared.second[o][i % kTaps][i / kTaps] = i < count * kTaps ? to_float(weight[i]) : 0.f;
    }
  }
}

// The 3x3 convolution from `count` channels, which are in shared memory from row `first` on.
template <typename T, typename P>
__device__ void add_taps(const Arguments<T, P>& a, const Place& at, const Cell& cell, int first, int count,
                         const Shared& shared, float (&sum)[kOutputs]) {
  const int slot = threadIdx.x / kCells;
#pragma unroll 1
  for (int tap = 0; tap < kTaps; ++tap) {
    const int border = cell.border + tap / 3 * a.bordered_width() + tap % 3;
#pragma unroll 1
    for (int s = 0; s < count; s += kQuad) {
      float x[kQuad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) x[i] = shared.squeezed[first + s + i][border];
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        if (slot + o * kSlots >= at.outputs) continue;
        const Pack<float, kQuad> w = load_pack<kQuad>(&shared.second[slot + o * kSlots][tap][s]);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) sum[o] += w.at[i] * x[i];
      }
    }
  }
}

// Block: a tile of one image, some channels of one group.
template <typename T, typename P>
__device__ void squeeze_cell(const Arguments<T, P>& a) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  if (threadIdx.x == 0) shared.place = Place(a);
  __syncthreads();
  const Place& at = shared.place;
  const Source<T> source(a, at);
  const Cell cell(a, at, threadIdx.x % kCells);
  float sum[kOutputs] = {};
  for (int start = 0; start < at.squeezed; start += a.slice) {
    const int count = min(a.slice, at.squeezed - start);
    squeeze_slice(a, source, at.first_squeezed + start, count, shared);
    for (int step = 0; step < count; step += kStep) {
      const int some = min(kStep, count - step);
      __syncthreads();
      load_second(a, at, start + step, some, shared);
      __syncthreads();
      if (cell.inside) add_taps(a, at, cell, step, some, shared, sum);
    }
  }
  if (!cell.inside) return;
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const int output = threadIdx.x / kCells + o * kSlots;
    if (output < at.outputs) a.u[cell.offset(a, at, output)] = from_float<T>(sum[o]);
  }
}

}  // namespace pyext::hybrid_block::scalar
