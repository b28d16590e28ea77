// The two convolutions of a squeeze cell on tiles that stay in registers: Outputs channels x Vectors vectors of
// positions. Weights are read where they are: one lane is met by Vectors vectors. L: what lanes hold.
#pragma once

#include "cpu/hybrid_block/lanes.h"
#include "cpu/hybrid_block/planes.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// Accumulators of a tile; the registers left over hold a vector of weights and the positions that it meets.
constexpr int kTileRegisters = kVectorBytes == 64 ? 24 : 12;
constexpr int kTileOutputs = 6;
constexpr int kMostVectors = 6;

// Vectors of positions in a tile of `outputs` channels.
constexpr int tile_vectors(int outputs) {
  return kTileRegisters / outputs < kMostVectors ? kTileRegisters / outputs : kMostVectors;
}
constexpr int kStripVectors = tile_vectors(kTileOutputs);

// Calls work(std::integral_constant<int, n>) for n in [1, Most].
template <int Most, typename Work>
inline void with_constant(int64_t n, Work work) {
  if constexpr (Most > 1) {
    if (n < Most) return with_constant<Most - 1>(n, work);
  }
  work(std::integral_constant<int, Most>());
}

template <int Vectors, int Outputs, typename T, typename L = Numbers<T>>
inline void add_products(const T* x, const T* weight, int64_t weight_pitch, Vec<T> (&sum)[Outputs][Vectors]) {
  Vec<T> positions[Vectors];
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) positions[v] = load_once<T>(x + v * kLanes<T>);
#pragma GCC unroll 8
  for (int o = 0; o < Outputs; ++o) {
    const Vec<T> factor = in_register<T>(L::splat_of(weight + o * weight_pitch));
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) L::add_product(sum[o][v], factor, positions[v]);
  }
}

// sum[o][v] = sum over lanes of inputs of weight[o * inputs + i] * x[i * Vectors + v].
template <int Vectors, int Outputs, typename T, typename L = Numbers<T>>
inline void multiply(const T* x, const T* weight, int64_t inputs, Vec<T> (&sum)[Outputs][Vectors]) {
  for (int64_t i = 0; i < inputs; ++i) {
    add_products<Vectors, Outputs, T, L>(x + i * Vectors * kLanes<T>, weight + i, inputs, sum);
  }
}

// A tile of the 3x3 convolution of the lanes `own` of `inputs`, from `x` on, which is moved to the tile's first
// position: to[o * Vectors * kLanes + p], added to what is there unless they are the first.
template <int Vectors, int Outputs, typename T, typename L>
PYEXT_OWN_REGISTERS void convolve(const Planes& planes, const T* x, const T* weight, int64_t inputs, Range own, T* to) {
  Vec<T> sum[Outputs][Vectors] = {};
  if (own.begin > 0) {
#pragma GCC unroll 8
    for (int o = 0; o < Outputs; ++o) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[o][v] = load<T>(to + (o * Vectors + v) * kLanes<T>);
    }
  }
  for (int64_t i = own.begin; i < own.end; ++i) {
    for (int k = 0; k < kTaps; ++k) {
      add_products<Vectors, Outputs, T, L>(x + i * planes.channel + planes.tap[k], weight + i * kTaps + k,
                                           inputs * kTaps, sum);
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < Outputs; ++o) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store<T>(to + (o * Vectors + v) * kLanes<T>, sum[o][v]);
  }
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
