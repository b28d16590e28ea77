// Copies of an image between global and shared memory, and the output.
#pragma once

#include "cuda/device.h"

namespace pyext::gated_excitation {

using namespace pyext::cuda;

// The order in which a block visits the elements of an image, and whether by 16 bytes at a time.
struct Traversal {
  bool channels_fastest;
  bool vector;
};

template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <int V, typename T>
__device__ void load_tile(const Geometry& g, const View<const T>& view, const T* image, bool channels_fastest,
                          int pitch, T* tile) {
  const unsigned units = static_cast<unsigned>(g.channels) * g.positions / V;
  for (unsigned i = threadIdx.x; i < units; i += blockDim.x) {
    const Unit unit = unit_at<V>(i, g, channels_fastest);
    const Pack<T, V> pack = load_pack<V>(image + view.offset(unit.channel, unit.y, unit.x));
    T* target = tile + unit.channel * pitch + unit.position;
    if (channels_fastest) {
#pragma unroll
      for (int v = 0; v < V; ++v) target[v * pitch] = pack.at[v];
    } else {
      store_pack<V>(target, pack);
    }
  }
}

template <typename T>
__device__ void load_u(const Geometry& g, const View<const T>& u, const T* image, Traversal traversal, int pitch,
                       T* tile) {
  if (traversal.vector) {
    load_tile<kVector<T>>(g, u, image, traversal.channels_fastest, pitch, tile);
  } else {
    load_tile<1>(g, u, image, traversal.channels_fastest, pitch, tile);
  }
}

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load_from_tile(const T* tile, int pitch, const Unit& unit,
                                                     bool channels_fastest) {
  const T* source = tile + unit.channel * pitch + unit.position;
  if (!channels_fastest && pitch % V == 0) return load_pack<V>(source);
  const int step = channels_fastest ? pitch : 1;
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.at[v] = source[v * step];
  return pack;
}

template <int V, typename T>
__device__ void store_tile(const Geometry& g, const T* tile, int pitch, const View<T>& view, T* image,
                           bool channels_fastest) {
  const unsigned units = static_cast<unsigned>(g.channels) * g.positions / V;
  for (unsigned i = threadIdx.x; i < units; i += blockDim.x) {
    const Unit unit = unit_at<V>(i, g, channels_fastest);
    store_pack<V>(image + view.offset(unit.channel, unit.y, unit.x),
                  load_from_tile<V>(tile, pitch, unit, channels_fastest));
  }
}

// out = f u + n, with u from `load(unit)`; units first, first + step, ... of the image.
template <int V, typename T, typename Load>
__device__ void write_output(const Geometry& g, const float* f, const float* n, const View<T>& view, T* out,
                             bool channels_fastest, unsigned first, unsigned step, Load load) {
  const unsigned units = static_cast<unsigned>(g.channels) * g.positions / V;
  for (unsigned i = first; i < units; i += step) {
    const Unit unit = unit_at<V>(i, g, channels_fastest);
    Pack<T, V> pack = load(unit);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int c = channels_fastest ? unit.channel + v : unit.channel;
      pack.at[v] = from_float<T>(f[c] * to_float(pack.at[v]) + n[c]);
    }
    store_pack<V>(out + view.offset(unit.channel, unit.y, unit.x), pack);
  }
}

}  // namespace pyext::gated_excitation
