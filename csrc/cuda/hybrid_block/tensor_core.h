// The squeeze cell in bfloat16 and float16 on tensor cores, with float32 sums. Both convolutions are products of
// matrices whose operands lie in shared memory, inner dimension first:
//   squeezed[s, cell] = sum_c weight[s, c] x[cell, c]
//   u[o, cell]       += sum_s second[tap, o, s] squeezed[cell + tap, s]
// In the second, `second` holds zeros where o and s are of different groups, so groups of any size fill its tiles;
// tiles that are zeros alone are left out.
#pragma once

#include <cstddef>

#include "cuda/hybrid_block/cell.h"
#include "cuda/instructions.h"
#include "cuda/launch.h"
#include "cuda/mma.h"

namespace pyext::hybrid_block::tensor_core {

constexpr int kRows = 16;    // of a product's tile, and its inner extent
constexpr int kColumns = 8;  // of a product's tile
constexpr int kSlice = 64;
constexpr int kBlockOutputs = 32;
constexpr int kRounding = kRows;
constexpr int kSliceTiles = kSlice / kRows;
constexpr int kBorderedTiles = kBordered / kColumns / kWarps;  // of one warp
constexpr int kOutputTiles = kBlockOutputs / kRows;
constexpr int kCellTiles = kCells / kColumns / kWarps;  // of one warp
// In shared memory a row is 20 or 36 words long, so that 8 rows of 4 words, which a warp reads at once, lie in
// different banks.
constexpr int kInputPitch = kInputs + 8;
constexpr int kSlicePitch = kSlice + 8;

template <typename T>
struct Shared {
  union {
    struct {
      T x[kBordered][kInputPitch];
      T weight[kSlice][kInputPitch];
      Norm norm[kWarps][kInputs];
    } first;
    T second[kTaps][kBlockOutputs][kSlicePitch];
  };
  Place place;  // here, it takes no registers
  Norm norm[kSlice];
  bool inside[kBordered];
  T squeezed[kBordered][kSlicePitch];

  static size_t bytes(int, int cells) { return offsetof(Shared, squeezed) + cells * kSlicePitch * sizeof(T); }
};

template <typename T>
__device__ __forceinline__ void load_rows(const T* rows, int pitch, const MmaLayout& layout, uint32_t (&a)[4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) a[r] = operand(rows + layout.a_row(r) * pitch + layout.a_k(r));
}

template <typename T>
__device__ __forceinline__ void load_columns(const T* column, const MmaLayout& layout, uint32_t (&b)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) b[r] = operand(column + layout.b_k(r));
}

// kInputs channels of x after BN and ReLU, and the 1x1 convolution's weights from them to a slice; zeros beyond.
template <typename T, typename P>
__device__ void load_first(const Arguments<T, P>& a, const Source<T>& source, int start, int slice, int count,
                           Shared<T>& shared) {
  constexpr int kAhead = 8;
  constexpr int kPack = 8;
  const Norm* norms = shared.first.norm[threadIdx.x / kWarp];
  load_norms(a, start, shared.first.norm[threadIdx.x / kWarp]);
  __syncwarp();
#pragma unroll 1
  for (int part = 0; threadIdx.x < kBordered && part < kInputs; part += kAhead) {
    float x[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) x[i] = source.load(a, start + part + i);
#pragma unroll
    for (int i = 0; i < kAhead; i += kPack) {
      Pack<T, kPack> pack;
#pragma unroll
      for (int j = 0; j < kPack; ++j) pack.at[j] = from_float<T>(norms[part + i + j].activated(x[i + j]));
      store_pack(&shared.first.x[threadIdx.x][part + i], pack);
    }
  }
  const int c = threadIdx.x % kInputs;
  for (int s = threadIdx.x / kInputs; s < (count + kRows - 1) / kRows * kRows; s += kThreads / kInputs) {
    const bool inside = start + c < a.channels && s < count;
    const float weight = inside ? to_float(a.first.conv[int64_t{slice + s} * a.channels + start + c]) : 0.f;
    shared.first.weight[s][c] = from_float<T>(weight);
  }
}

// The product of what `load_first` loaded; tiles of columns are dealt to warps in turn.
template <typename T>
__device__ void add_inputs(const MmaLayout& layout, int cells, int count, const Shared<T>& shared,
                           float (&sum)[kSliceTiles][kBorderedTiles][4]) {
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int k = 0; k < kInputs; k += kRows) {
    uint32_t b[kBorderedTiles][2] = {};
#pragma unroll
    for (int n = 0; n < kBorderedTiles; ++n) {
      const int first = (warp + n * kWarps) * kColumns;
      if (first < cells) load_columns(&shared.first.x[first + layout.b_column()][k], layout, b[n]);
    }
#pragma unroll
    for (int m = 0; m < kSliceTiles; ++m) {
      if (m * kRows >= count) continue;
      uint32_t rows[4];
      load_rows(&shared.first.weight[m * kRows][k], kInputPitch, layout, rows);
#pragma unroll
      for (int n = 0; n < kBorderedTiles; ++n) {
        if ((warp + n * kWarps) * kColumns < cells) mma_16x8x16<T>(sum[m][n], rows, b[n]);
      }
    }
  }
}

// BN and ReLU of a slice, into shared memory; zero outside the map and in rows that only fill a tile.
template <typename T>
__device__ void store_squeezed(const MmaLayout& layout, int cells, int count, Shared<T>& shared,
                               const float (&sum)[kSliceTiles][kBorderedTiles][4]) {
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int m = 0; m < kSliceTiles; ++m) {
    if (m * kRows >= count) continue;
#pragma unroll
    for (int n = 0; n < kBorderedTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int s = m * kRows + layout.d_row(r);
        const int cell = (warp + n * kWarps) * kColumns + layout.d_column(r);
        if (cell >= cells) continue;
        const bool inside = shared.inside[cell] && s < count;
        shared.squeezed[cell][s] = from_float<T>(inside ? shared.norm[s].activated(sum[m][n][r]) : 0.f);
      }
    }
  }
}

// `count` channels of the map between the convolutions from `slice` on, into shared memory.
template <typename T, typename P>
__device__ void squeeze_slice(const Arguments<T, P>& a, const Source<T>& source, const MmaLayout& layout, int slice,
                              int count, Shared<T>& shared) {
  const int thread = threadIdx.x;
  const int cells = a.bordered_cells();
  float sum[kSliceTiles][kBorderedTiles][4] = {};
  for (int start = 0; start < a.channels; start += kInputs) {
    __syncthreads();
    if (start == 0 && thread < count) shared.norm[thread] = norm_of(a.second, slice + thread, a.eps);
    load_first(a, source, start, slice, count, shared);
    __syncthreads();
    add_inputs(layout, cells, count, shared, sum);
  }
  store_squeezed(layout, cells, count, shared, sum);
}

// Weights of the 3x3 convolution from the block's `count` channels from `start` on; zeros between groups.
template <typename T, typename P>
__device__ void load_second(const Arguments<T, P>& a, const Place& at, int start, int count, Shared<T>& shared) {
  const int rows = (at.outputs + kRows - 1) / kRows * kRows;
  const int columns = (count + kRows - 1) / kRows * kRows;
  for (int o = threadIdx.x / kWarp; o < rows; o += kWarps) {
    const int output = at.first_output + o;
    const int skipped = at.first_squeezed + start - output / a.group_outputs() * a.group_squeeze();
    const P* weight = a.second.conv + (int64_t{output} * a.group_squeeze() + skipped) * kTaps;
    for (int s = threadIdx.x % kWarp; s < columns; s += kWarp) {
      const int c = skipped + s;  // of the group's
      const bool inside = o < at.outputs && s < count && c >= 0 && c < a.group_squeeze();
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        shared.second[tap][o][s] = from_float<T>(inside ? to_float(weight[s * kTaps + tap]) : 0.f);
      }
    }
  }
}

// Whether the outputs of a tile that begins with `output` depend on channels [s, s + kRows); both count from the
// block's first.
template <typename T, typename P>
__device__ bool depends(const Arguments<T, P>& a, const Place& at, int output, int s) {
  if (output >= at.outputs) return false;
  if (a.block_groups == 1) return true;
  const int last = min(output + kRows, at.outputs) - 1;
  return s + kRows > output / a.group_outputs() * a.group_squeeze() &&
         s < (last / a.group_outputs() + 1) * a.group_squeeze();
}

// The 3x3 convolution of a slice whose first channel is `start` of the block's.
template <typename T, typename P>
__device__ void add_taps(const Arguments<T, P>& a, const Place& at, const MmaLayout& layout, int start, int count,
                         const Shared<T>& shared, float (&sum)[kOutputTiles][kCellTiles][4]) {
  const int warp = threadIdx.x / kWarp;
  const int cells = a.tile_height * a.tile_width;
  int border[kCellTiles];
#pragma unroll
  for (int n = 0; n < kCellTiles; ++n) {
    // A column that only fills a tile reads the last one's values.
    const int cell = (warp + n * kWarps) * kColumns + layout.b_column();
    border[n] = Cell(a, at, min(cell, cells - 1)).border;
  }
#pragma unroll 1
  for (int tap = 0; tap < kTaps; ++tap) {
    const int shift = tap / 3 * a.bordered_width() + tap % 3;
#pragma unroll 1
    for (int k = 0; k < count; k += kRows) {
      uint32_t b[kCellTiles][2];
#pragma unroll
      for (int n = 0; n < kCellTiles; ++n) load_columns(&shared.squeezed[border[n] + shift][k], layout, b[n]);
#pragma unroll
      for (int m = 0; m < kOutputTiles; ++m) {
        if (!depends(a, at, m * kRows, start + k)) continue;
        uint32_t rows[4];
        load_rows(&shared.second[tap][m * kRows][k], kSlicePitch, layout, rows);
#pragma unroll
        for (int n = 0; n < kCellTiles; ++n) mma_16x8x16<T>(sum[m][n], rows, b[n]);
      }
    }
  }
}

template <typename T, typename P>
__device__ void store_outputs(const Arguments<T, P>& a, const Place& at, const MmaLayout& layout,
                              const float (&sum)[kOutputTiles][kCellTiles][4]) {
#pragma unroll
  for (int n = 0; n < kCellTiles; ++n) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const Cell cell(a, at, (threadIdx.x / kWarp + n * kWarps) * kColumns + layout.d_column(r));
      if (!cell.inside) continue;
#pragma unroll
      for (int m = 0; m < kOutputTiles; ++m) {
        const int output = m * kRows + layout.d_row(r);
        if (output < at.outputs) a.u[cell.offset(a, at, output)] = from_float<T>(sum[m][n][r]);
      }
    }
  }
}

// Block: a tile of one image; whole groups, or some channels of one.
template <typename T, typename P>
__device__ void squeeze_cell(const Arguments<T, P>& a) {
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(dynamic_shared());
  if (threadIdx.x == 0) shared.place = Place(a);
  __syncthreads();
  const Place& at = shared.place;
  const Source<T> source(a, at);
  const MmaLayout layout(threadIdx.x % kWarp);
  if (threadIdx.x < kBordered) shared.inside[threadIdx.x] = source.inside;
  float sum[kOutputTiles][kCellTiles][4] = {};
  for (int start = 0; start < at.squeezed; start += a.slice) {
    const int count = min(a.slice, at.squeezed - start);
    squeeze_slice(a, source, layout, at.first_squeezed + start, count, shared);
    __syncthreads();
    load_second(a, at, start, count, shared);
    __syncthreads();
    add_taps(a, at, layout, start, count, shared, sum);
  }
  store_outputs(a, at, layout, sum);
}

}  // namespace pyext::hybrid_block::tensor_core
