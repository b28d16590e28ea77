// The 3x3 convolution of stride one by F(2x2, 3x3) (arXiv 1509.09308): of each tile of 4x4 positions, 2x2 results by 16
// products a pair of channels, instead of 36. The input lies in the four planes of even and odd rows and columns, as
// for a stride of two: there the elements at one place of all tiles lie beside one another, so that lanes are tiles,
// and the transforms are sums of whole vectors.
#pragma once

#include "cpu/hybrid_block/convolution.h"
#include "cpu/winograd.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int kResults = kStep * kStep;

// The tiles of a map. Tile (y, x) is lane y * planes.pitch + x; a lane at the end of each row is no tile.
struct Tiles {
  int64_t height, width;  // of the map
  int64_t rows, columns;
  Planes planes;
  int64_t inner[kResults];  // of row i and column j of its results, in the planes of another map of these extents
  Planes plain[kResults];   // taps of those results

  Tiles(int64_t height, int64_t width)
      : height(height),
        width(width),
        rows((height + 1) / kStep),
        columns((width + 1) / kStep),
        planes(height, width, kStep),
        plain{planes, planes, planes, planes} {
    for (int r = 0; r < kResults; ++r) {
      inner[r] = planes.place(r / kStep + 1, r % kStep + 1);
      for (int k = 0; k < kTaps; ++k) plain[r].tap[k] = planes.place(r / kStep + k / 3, r % kStep + k % 3);
    }
  }

  Range lanes(Range rows) const {
    return {rows.begin * planes.pitch, rows.begin < rows.end ? (rows.end - 1) * planes.pitch + columns : 0};
  }
};

// B^T d B, d Vectors vectors of tiles from x on, of `channels` channels: to[place * pitch + (c * Vectors + v) *
// kLanes].
template <int Vectors, typename T>
inline void transform_inputs(const Planes& planes, const T* x, int64_t channels, T* to, int64_t pitch) {
  const int64_t row[kTile] = {0, 2 * planes.size, planes.pitch, 2 * planes.size + planes.pitch};
  const int64_t column[kTile] = {0, planes.size, 1, planes.size + 1};
  for (int64_t c = 0; c < channels; ++c, x += planes.channel) {
    for (int v = 0; v < Vectors; ++v, to += kLanes<T>) {
      transform_input_read_once<T>([&](int i, int j) { return load<T>(x + row[i] + column[j] + v * kLanes<T>); }, to,
                                   pitch);
    }
  }
}

// G g G^T of `kernels` kernels, place by place: to[place * kernels + k].
template <typename T>
inline void transform_kernels(const T* weight, int64_t kernels, T* to) {
  for (int64_t first = 0; first < kernels; first += kLanes<T>) {
    const int64_t count = kernels - first < kLanes<T> ? kernels - first : kLanes<T>;
    T taps[kTaps][kLanes<T>] = {};
    for (int64_t k = 0; k < count; ++k) {
      for (int tap = 0; tap < kTaps; ++tap) taps[tap][k] = weight[(first + k) * kTaps + tap];
    }
    Vec<T> plain[kTaps], transformed[kPlaces];
    for (int tap = 0; tap < kTaps; ++tap) plain[tap] = load<T>(taps[tap]);
    transform_kernel(plain, transformed);
    for (int place = 0; place < kPlaces; ++place) {
      T* row = to + place * kernels + first;
      if (count == kLanes<T>) {
        store<T>(row, transformed[place]);
      } else {
        store_partial(row, transformed[place], count);
      }
    }
  }
}

// A group of the convolution.
template <typename T>
struct TiledWeights {
  const T* plain;        // outputs x inputs x kTaps
  const T* transformed;  // kPlaces x outputs x inputs
  int64_t inputs, outputs;

  int64_t output_tiles() const { return (outputs + kTileOutputs - 1) / kTileOutputs; }
  // Vectors of tiles that are worked on together: as many as its widest tile of outputs leaves room for.
  int64_t vectors() const {
    const int64_t widest = (outputs + output_tiles() - 1) / output_tiles();
    int64_t vectors = 1;
    with_constant<kTileOutputs>(widest, [&](auto n) { vectors = tile_vectors(decltype(n)::value); });
    return vectors;
  }
};

// A thread's memory for some vectors of tiles: `elements` from `memory` on, aligned to 64 bytes.
template <typename T>
struct TileScratch {
  T* transformed;  // inputs
  T* products;     // of all outputs
  T* results;      // [(output * kResults + result) * vectors]

  TileScratch(T* memory, int64_t most_inputs, int64_t most_outputs)
      : transformed(memory),
        products(transformed + kPlaces * pitch(most_inputs, kMostVectors)),
        results(products + kPlaces * pitch(most_outputs, kMostVectors)) {}

  static int64_t elements(int64_t most_inputs, int64_t most_outputs) {
    // Rows of results are read up to two whole vectors.
    return kPlaces * (pitch(most_inputs, kMostVectors) + pitch(most_outputs, kMostVectors)) +
           (kResults * kTileOutputs * kMostVectors + 2) * kLanes<T>;
  }

  // From one place to the next. Not a power of two: the places of a vector would share few sets of the first-level
  // cache.
  static int64_t pitch(int64_t channels, int64_t vectors) { return channels * vectors * kLanes<T> + 64 / sizeof(T); }
};

// Calls work(constant outputs, channels) in nearly equal tiles of the outputs.
template <int Vectors, typename T, typename Work>
inline void for_each_output_tile(const TiledWeights<T>& weights, Work work) {
  const int64_t tiles = weights.output_tiles();
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const Range channels = part_of(weights.outputs, tiles, tile);
    with_constant<kTileOutputs>(channels.end - channels.begin, [&](auto outputs) {
      if constexpr (decltype(outputs)::value * Vectors <= kTileRegisters) work(outputs, channels);
    });
  }
}

// Of one place, Outputs channels' sums over the transformed inputs.
template <int Vectors, int Outputs, typename T>
PYEXT_OWN_REGISTERS void multiply_place(const T* transformed, const T* weight, int64_t inputs, T* to) {
  Vec<T> sum[Outputs][Vectors] = {};
  multiply<Vectors, Outputs>(transformed, weight, inputs, sum);
#pragma GCC unroll 8
  for (int o = 0; o < Outputs; ++o) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store<T>(to + (o * Vectors + v) * kLanes<T>, sum[o][v]);
  }
}

// Place by place, whose inputs stay in the first-level cache for all outputs.
template <int Vectors, typename T>
inline void multiply_places(const TiledWeights<T>& weights, const TileScratch<T>& scratch) {
  const int64_t inputs = weights.inputs, from = TileScratch<T>::pitch(inputs, Vectors),
                to = TileScratch<T>::pitch(weights.outputs, Vectors);
  for (int place = 0; place < kPlaces; ++place) {
    for_each_output_tile<Vectors>(weights, [&](auto outputs, Range channels) {
      multiply_place<Vectors, decltype(outputs)::value>(
          scratch.transformed + place * from, weights.transformed + (place * weights.outputs + channels.begin) * inputs,
          inputs, scratch.products + place * to + channels.begin * Vectors * kLanes<T>);
    });
  }
}

// Results that are not finite, once more: of an infinite input, differences of sums know no more than that it is one.
template <int Vectors, int Outputs, typename T>
inline void convolve_plainly(const Tiles& tiles, const T* x, const TiledWeights<T>& weights, int64_t channel,
                             T* results) {
  alignas(64) T plain[Outputs * Vectors * kLanes<T>];
  for (int r = 0; r < kResults; ++r) {
    convolve<Vectors, Outputs, T, Numbers<T>>(tiles.plain[r], x, weights.plain + channel * weights.inputs * kTaps,
                                              weights.inputs, {0, weights.inputs}, plain);
    for (int o = 0; o < Outputs; ++o) {
      for (int v = 0; v < Vectors; ++v) {
        T* to = results + ((o * kResults + r) * Vectors + v) * kLanes<T>;
        const Vec<T> found = load<T>(to);
        store<T>(to, found - found == 0 ? found : load<T>(plain + (o * Vectors + v) * kLanes<T>));
      }
    }
  }
}

// Outputs channels from `channel` on at tiles whose inputs lie from x on and whose products are there, to
// scratch.results.
template <int Vectors, int Outputs, typename T>
inline void convolve_outputs(const Tiles& tiles, const T* x, const TiledWeights<T>& weights, int64_t channel,
                             const TileScratch<T>& scratch) {
  const int64_t pitch = TileScratch<T>::pitch(weights.outputs, Vectors);
  const T* products = scratch.products + channel * Vectors * kLanes<T>;
  Vec<T> all{};
  for (int o = 0; o < Outputs; ++o) {
    for (int v = 0; v < Vectors; ++v) {
      Vec<T> results[kStep][kStep];
      transform_output(products + (o * Vectors + v) * kLanes<T>, pitch, results);
#pragma GCC unroll 4
      for (int r = 0; r < kResults; ++r) {
        store<T>(scratch.results + ((o * kResults + r) * Vectors + v) * kLanes<T>, results[r / kStep][r % kStep]);
        all += results[r / kStep][r % kStep];
      }
    }
  }
  if (sum_lanes<T>(all * 0) != 0) convolve_plainly<Vectors, Outputs>(tiles, x, weights, channel, scratch.results);
}

// The convolution of the planes `x` in rows of tiles, piece by piece: put(first lane, lanes, channel, channels, results
// of a channel, elements from one of its kResults results to the next), in scratch.results.
template <typename T, typename Put>
inline void convolve_tiles(const Tiles& tiles, const T* x, const TiledWeights<T>& weights, Range rows,
                           const TileScratch<T>& scratch, Put put) {
  const Range lanes = tiles.lanes(rows);
  const int64_t length = weights.vectors() * kLanes<T>;
  for (int64_t first = lanes.begin; first < lanes.end; first += length) {
    const int64_t count = lanes.end - first < length ? lanes.end - first : length;
    with_constant<kMostVectors>((count + kLanes<T> - 1) / kLanes<T>, [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      transform_inputs<kVectors>(tiles.planes, x + first, weights.inputs, scratch.transformed,
                                 TileScratch<T>::pitch(weights.inputs, kVectors));
      multiply_places<kVectors>(weights, scratch);
      for_each_output_tile<kVectors>(weights, [&](auto outputs, Range channels) {
        convolve_outputs<kVectors, decltype(outputs)::value>(tiles, x + first, weights, channels.begin, scratch);
        put(first, count, channels, kVectors * kLanes<T>);
      });
    });
  }
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
