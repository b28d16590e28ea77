// Passes of one block over one image.
//
// The two depthwise convolutions a_k are never formed. With r_k = relu(norm_k(u)) and kernel K_k,
//   sum_c v[c] a_k[c,p] = sum_tap (sum_c v[c] K_k[c,tap] r_k[c, p+tap])    (position_dots: logits and their gradient)
//   sum_p m[p] a_k[c,p] = sum_q r_k[c,q] (sum_tap K_k[c,tap] m[q-tap])     (pool, and the context gradient)
// so each pass reads an element of u exactly once and without neighbours; the stencil acts on maps over positions,
// which are few (one per branch), kept with a zero border.
#pragma once

#include "cuda/gated_excitation/plan.h"

namespace pyext::gated_excitation {

using namespace pyext::cuda;

template <typename P>
__device__ void load_context_weights(const Network<P>& net, float* context) {
  for (int c = threadIdx.x; c < net.channels; c += blockDim.x) {
    context[kForget * net.channels + c] = net.at(kForgetContextWeight, c);
    context[kMix3 * net.channels + c] = net.at(kContext3Weight, c);
    context[kMix5 * net.channels + c] = net.at(kContext5Weight, c);
  }
}

template <typename P>
__device__ void fill_table(const Network<P>& net, const float* vectors, int first, int rows, TableRow* table) {
  for (int r = threadIdx.x; r < rows; r += blockDim.x) {
    const int c = first + r;
    const BranchChannel channels[kMixBranches] = {load_branch_channel<0>(net, c), load_branch_channel<1>(net, c)};
    TableRow row;
    row.forget = vectors[kForget * net.channels + c];
#pragma unroll
    for (int k = 0; k < kMixBranches; ++k) {
      const float weight = vectors[(kMix3 + k) * net.channels + c];
      for (int tap = 0; tap < kTaps; ++tap) row.tap[k][tap] = weight * channels[k].tap[tap];
      row.mean[k] = channels[k].norm.mean;
      row.scale[k] = channels[k].norm.scale();
      row.shift[k] = channels[k].norm.bias;
    }
    table[r] = row;
  }
}

// What one position contributes to the dot products of its neighbourhood.
struct PositionDots {
  float tap[kMixBranches][kTaps] = {};
  float forget = 0.f;

  __device__ __forceinline__ void add(const TableRow& row, float u) {
    forget += row.forget * u;
#pragma unroll
    for (int k = 0; k < kMixBranches; ++k) {
      const float r = relu((u - row.mean[k]) * row.scale[k] + row.shift[k]);
#pragma unroll
      for (int t = 0; t < kTaps; ++t) tap[k][t] += row.tap[k][t] * r;
    }
  }
};

// Adds contributions to the maps tap by tap: within one tap no two threads of a group meet in a cell.
__device__ inline void scatter(const PositionDots& dots, bool active, int cell, const Geometry& g, float* maps) {
  if (active) maps[kForget * g.padded + cell] = dots.forget;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    if (active) {
      maps[kMix3 * g.padded + cell - tap_offset<0>(tap, g.pitch)] += dots.tap[0][tap];
      maps[kMix5 * g.padded + cell - tap_offset<1>(tap, g.pitch)] += dots.tap[1][tap];
    }
    __syncthreads();
  }
}

__device__ inline void sum_groups(int groups, const Geometry& g, float* maps) {
  const int floats = kNumBranches * g.padded;
  for (int i = threadIdx.x; i < floats; i += blockDim.x) {
    for (int group = 1; group < groups; ++group) maps[i] += maps[group * floats + i];
  }
  __syncthreads();
}

// maps[b][p] = sum_c vectors[b][c] x_b[c,p], where x is u for the forget branch and a_k for the others. Border cells
// are left with sums that mean nothing. `maps` has room for one set of maps per group.
template <typename P, typename T, typename Index>
__device__ void position_dots(const Geometry& g, const Image<const T, Index>& image, const Network<P>& net,
                              const float* vectors, TableRow* table, int table_rows, float* maps) {
  const int groups = channel_groups(blockDim.x, g);
  const int slots = blockDim.x / groups;
  const int group = threadIdx.x / slots;
  float* group_maps = maps + group * kNumBranches * g.padded;
  for (int i = threadIdx.x; i < groups * kNumBranches * g.padded; i += blockDim.x) maps[i] = 0.f;

  Walk<Index> walk(g, image, threadIdx.x - group * slots, slots);
  for (int base = 0; base < g.positions; base += slots, walk.advance()) {
    PositionDots dots;
    for (int first = 0; first < g.channels; first += table_rows) {
      const int rows = min(table_rows, g.channels - first);
      if (base == 0 || table_rows < g.channels) {
        __syncthreads();
        fill_table(net, vectors, first, rows, table);
        __syncthreads();
      }
      if (!walk.inside()) continue;
      const T* element = image.data + first * image.channel + walk.offset;
      for (int r = group; r < rows; r += groups) dots.add(table[r], to_float(element[r * image.channel]));
    }
    scatter(dots, walk.inside(), walk.cell, g, group_maps);
  }
  if (groups > 1) sum_groups(groups, g, maps);
}

// Turns logits into probabilities over the positions, and clears the borders.
__device__ inline void softmax_maps(const Geometry& g, float* maps, float* scratch) {
  float peak[kNumBranches] = {-INFINITY, -INFINITY, -INFINITY};
  for (int cell = threadIdx.x; cell < g.padded; cell += blockDim.x) {
    if (!g.interior(cell)) continue;
#pragma unroll
    for (int b = 0; b < kNumBranches; ++b) peak[b] = fmaxf(peak[b], maps[b * g.padded + cell]);
  }
  block_max(peak, scratch);
  float total[kNumBranches] = {};
  for (int cell = threadIdx.x; cell < g.padded; cell += blockDim.x) {
    const bool interior = g.interior(cell);
#pragma unroll
    for (int b = 0; b < kNumBranches; ++b) {
      float& value = maps[b * g.padded + cell];
      value = interior ? expf(value - peak[b]) : 0.f;
      total[b] += value;
    }
  }
  block_sum(total, scratch);
  for (int cell = threadIdx.x; cell < g.padded; cell += blockDim.x) {
#pragma unroll
    for (int b = 0; b < kNumBranches; ++b) maps[b * g.padded + cell] /= total[b];
  }
  __syncthreads();
}

// sum_tap K[tap] m[q - tap] around `cell` of a bordered map.
template <int kBranch>
__device__ __forceinline__ float gather(const float* cell, int pitch, const float (&kernel)[kTaps]) {
  float sum = 0.f;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) sum += kernel[tap] * cell[-tap_offset<kBranch>(tap, pitch)];
  return sum;
}

// pooled[b][c] = sum_p maps[b][p] x_b[c,p]: one warp per channel.
template <typename P, typename T, typename Index>
__device__ void pool(const Geometry& g, const Image<const T, Index>& image, const Network<P>& net, const float* maps,
                     float* pooled) {
  const int lane = threadIdx.x % kWarp;
  for (int c = threadIdx.x / kWarp; c < g.channels; c += blockDim.x / kWarp) {
    const BranchChannel mix3 = load_branch_channel<0>(net, c);
    const BranchChannel mix5 = load_branch_channel<1>(net, c);
    const T* channel = image.data + c * image.channel;
    float sums[kNumBranches] = {};
    for (Walk<Index> walk(g, image, lane, kWarp); walk.inside(); walk.advance()) {
      const float u = to_float(channel[walk.offset]);
      const float* cell = maps + walk.cell;
      sums[kForget] += u * cell[kForget * g.padded];
      sums[kMix3] += relu(mix3.norm(u)) * gather<0>(cell + kMix3 * g.padded, g.pitch, mix3.tap);
      sums[kMix5] += relu(mix5.norm(u)) * gather<1>(cell + kMix5 * g.padded, g.pitch, mix5.tap);
    }
#pragma unroll
    for (int b = 0; b < kNumBranches; ++b) {
      const float sum = warp_sum(sums[b]);
      if (lane == 0) pooled[b * g.channels + c] = sum;
    }
  }
  __syncthreads();
}

}  // namespace pyext::gated_excitation
