// peer_contrast on CUDA, forward: sums of a row's exponentials, tile by tile, then the terms. Only where exponentials
// could overflow does a pass over the tiles look for the largest similarities first. Sums have a fixed order: partial
// results per stretch of columns, then one thread or block adds them.
#include "cuda/peer_contrast.h"

#include "cuda/peer_contrast/prepare.h"
#include "cuda/peer_contrast/tile.h"

namespace pyext::peer_contrast {
namespace {

enum Sum { kHard, kSoft, kDifference, kPositive, kSums };
enum Largest { kOfOthers, kOfAll, kLargest };
// Order of normalisers: the largest and its sum, without the row's own image and softened with it.
__device__ __forceinline__ int64_t normaliser_of(const Sizes& s, int q, int i, int j, int64_t row) {
  return ((q * s.peers + i) * s.peers + j) * s.batch + row;
}

// A block's walk through its tiles, for one thread.
template <typename T, int P>
struct Walk {
  static constexpr int kSlots = Tile<P>::kSlots;
  const Lane lane;
  Operands<T, P> operands;
  int rows[kSlots];  // the thread's images

  __device__ Walk(const Plan& plan, const T* panels) : operands(plan, panels, static_cast<int>(blockIdx.z), 0, 0) {
#pragma unroll
    for (int u = 0; u < kSlots; ++u) {
      rows[u] = operands.row_image + lane.row_warp * Tile<P>::kImagesOfPart + 8 * u + lane.layout.group;
    }
  }

  // Calls visit(x, column, u, v, e, a, b) for every similarity of the thread, of its row u and `column`, peers a and b:
  // x has it at (a * kSlots + u, b * kSlots + v, e).
  template <typename Visit>
  __device__ __forceinline__ void visit(Visit visit) {
    for (int tile = operands.first_tile; tile < operands.last_tile; ++tile) {
      Part x = {};
      operands.similarities(lane, tile, x);
      const int first =
          tile * Tile<P>::kColumnImages + lane.column_warp * Tile<P>::kImagesOfPart + 2 * lane.layout.member;
#pragma unroll
      for (int v = 0; v < kSlots; ++v) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
          for (int u = 0; u < kSlots; ++u) {
#pragma unroll
            for (int a = 0; a < P; ++a) {
#pragma unroll
              for (int b = 0; b < P; ++b) visit(x, first + 8 * v + e, u, v, e, a, b);
            }
          }
        }
      }
    }
  }
};

// Where partial result q of places a and b and `row` stands, of `kinds` results.
template <int P>
__device__ __forceinline__ int64_t partial_of(const Plan& plan, int kinds, int64_t part, int group, int q, int a, int b,
                                              int64_t row) {
  return ((((part * plan.groups.count() + group) * kinds + q) * P + a) * P + b) * plan.padded_batch + row;
}

// Results of the four lanes that share rows become one, and are written by one of them.
template <int P, int kKinds, typename Reduce>
__device__ void write_partial(const Plan& plan, const Lane& lane, const int (&rows)[Tile<P>::kSlots],
                              float (&values)[P][P][Tile<P>::kSlots][kKinds], float* partial, Reduce reduce) {
  const int64_t part = blockIdx.y * int64_t{kColumnWarps} + lane.column_warp;
#pragma unroll
  for (int a = 0; a < P; ++a) {
#pragma unroll
    for (int b = 0; b < P; ++b) {
#pragma unroll
      for (int u = 0; u < Tile<P>::kSlots; ++u) {
#pragma unroll
        for (int q = 0; q < kKinds; ++q) {
          float x = values[a][b][u][q];
          x = reduce(x, __shfl_xor_sync(kFullMask, x, 1));
          x = reduce(x, __shfl_xor_sync(kFullMask, x, 2));
          if (lane.layout.member == 0) {
            partial[partial_of<P>(plan, kKinds, part, static_cast<int>(blockIdx.z), q, a, b, rows[u])] = x;
          }
        }
      }
    }
  }
}

// Block (x, y, z): largest similarities of tile x of rows in stretch y of columns, for group z. NaN is left to the
// sums.
template <typename T, int P>
__global__ void __launch_bounds__(kThreads, 2)
    largest_kernel(const Plan plan, const T* panels, const Summary* summary, float* partial) {
  if (summary->unshifted) return;
  constexpr int kSlots = Tile<P>::kSlots;
  Walk<T, P> walk(plan, panels);
  float largest[P][P][kSlots][kLargest];
  for (float& x : reinterpret_cast<float (&)[P * P * kSlots * kLargest]>(largest)) x = -INFINITY;
  walk.visit([&](Part& x, int column, int u, int v, int e, int a, int b) {
    const float value = column < plan.sizes.batch ? at(x, a * kSlots + u, b * kSlots + v, e) : -INFINITY;
    float (&own)[kLargest] = largest[a][b][u];
    own[kOfAll] = fmaxf(own[kOfAll], value);
    own[kOfOthers] = fmaxf(own[kOfOthers], walk.rows[u] != column ? value : -INFINITY);
  });
  write_partial<P, kLargest>(plan, walk.lane, walk.rows, largest, partial,
                             [](float x, float y) { return fmaxf(x, y); });
}

// Shifts of a group and an image: kLargest numbers of every two places.
template <int P>
__device__ __forceinline__ int64_t shift_of(const Plan& plan, int group, int64_t image) {
  return (group * plan.padded_batch + image) * kLargest * P * P;
}

// Thread (x, y): the shifts of row x of places y, 0 where none are needed, and as normalisers.
template <int P>
__global__ void __launch_bounds__(kThreads)
    shift_kernel(const Plan plan, const Summary* summary, const float* partial, float* shifts, float* normalisers) {
  const GroupedRow own(plan);
  const Sizes& s = plan.sizes;
  if (own.row >= plan.padded_batch) return;
  for (int q = 0; q < kLargest; ++q) {
    float largest = -INFINITY;
    if (!summary->unshifted && s.active(own.row)) {
      for (int64_t part = 0; part < plan.parts(); ++part) {
        largest = fmaxf(largest, partial[partial_of<P>(plan, kLargest, part, own.group, q, own.a, own.b, own.row)]);
      }
    }
    if (largest == -INFINITY) largest = 0;  // also of a row alone in its batch, which has no other
    shifts[shift_of<P>(plan, own.group, own.row) + (q * P + own.a) * P + own.b] = largest;
    if (own.first && own.row < s.batch) normalisers[normaliser_of(s, 2 * q, own.i, own.j, own.row)] = largest;
  }
}

// What the students of the target of places a and b fall short of it, at one row and column.
template <int P>
__device__ __forceinline__ float difference(Part& x, int a, int b, int u, int v, int e) {
  constexpr int kSlots = Tile<P>::kSlots;
  const float own = at(x, a * kSlots + u, b * kSlots + v, e);
  if (a != b) return own - at(x, b * kSlots + u, a * kSlots + v, e);
  float sum = 0;
#pragma unroll
  for (int k = 0; k < P; ++k) sum += own - at(x, k * kSlots + u, k * kSlots + v, e);
  return sum;
}

// Block (x, y, z): sums of tile x of rows over stretch y of columns, for group z. Of the two instances that are started
// one does the work: exponentials are shifted where the summary says so.
template <typename T, int P, bool kShifted>
__global__ void __launch_bounds__(kThreads, P <= 2 ? 2 : 1)
    sum_kernel(const Plan plan, const Exponents exponents, const T* panels, const int32_t* classes,
               const Summary* summary, const float* shifts, float* partial) {
  if (kShifted == (summary->unshifted != 0)) return;
  constexpr int kSlots = Tile<P>::kSlots;
  Walk<T, P> walk(plan, panels);
  int32_t row_class[kSlots];
#pragma unroll
  for (int u = 0; u < kSlots; ++u) row_class[u] = classes[walk.rows[u]];
  float sums[P][P][kSlots][kSums] = {};
  walk.visit([&](Part& x, int column, int u, int v, int e, int a, int b) {
    const int32_t column_class = classes[column];
    const bool valid = column_class >= 0, other = valid && walk.rows[u] != column;
    const float value = at(x, a * kSlots + u, b * kSlots + v, e);
    float hard, soft;
    if constexpr (!kShifted) {
      exponents.unshifted(value, hard, soft);
    } else {
      const float* shift = shifts + shift_of<P>(plan, static_cast<int>(blockIdx.z), walk.rows[u]) + a * P + b;
      hard = exp2_flushed((value - shift[0]) * exponents.hard);
      soft = exp2_flushed((value - shift[P * P]) * exponents.soft);
    }
    soft = valid ? soft : 0.f;
    float (&own)[kSums] = sums[a][b][u];
    own[kHard] += other ? hard : 0.f;
    own[kSoft] += soft;
    own[kDifference] += soft * difference<P>(x, a, b, u, v, e);
    own[kPositive] += other && row_class[u] == column_class ? value : 0.f;
  });
  write_partial<P, kSums>(plan, walk.lane, walk.rows, sums, partial, [](float x, float y) { return x + y; });
}

template <int P>
__device__ double total_of(const Plan& plan, const float* partial, int q, int group, int a, int b, int64_t row) {
  double sum = 0;
  for (int64_t part = 0; part < plan.parts(); ++part) {
    sum += partial[partial_of<P>(plan, kSums, part, group, q, a, b, row)];
  }
  return sum;
}

// Of a target (i, j), over all students.
template <int P>
__device__ double difference_of(const Plan& plan, const float* partial, int i, int j, int64_t row) {
  const Groups& groups = plan.groups;
  if (i != j) {
    return total_of<P>(plan, partial, kDifference, groups.of_pair(i, j), groups.place(i, j), groups.place(j, i), row);
  }
  double sum = 0;
  for (int k = 0; k < groups.peers; ++k) {
    if (k == i || (!groups.pairs() && k != groups.first_other(i))) continue;
    const int place = groups.place(i, k);
    sum += total_of<P>(plan, partial, kDifference, groups.of_pair(i, k), place, place, row);
  }
  return sum;
}

struct Temperatures {
  double hard, soft;
};

// Block (x, y): rows [x, x + 1) * kThreads of the ordered pair y: their normalisers; of_rows[y][x] is the sum of their
// contrasts and of their divergences, without the factors that are the same for all rows.
template <int P>
__global__ void __launch_bounds__(kThreads, 1)
    row_kernel(const Plan plan, const Temperatures temperatures, const int32_t* positives, const float* partial,
               float* normalisers, double* of_rows) {
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  const Sizes& s = plan.sizes;
  const Groups& groups = plan.groups;
  const int64_t row = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int i = static_cast<int>(blockIdx.y) / groups.peers, j = static_cast<int>(blockIdx.y) % groups.peers;
  const int other = i == j ? groups.first_other(i) : j;
  const int group = groups.of_pair(i, other), a = groups.place(i, other), b = i == j ? a : groups.place(j, i);
  double contrast = 0, divergence = 0, hard = 0, soft = 0;
  if (s.active(row)) {
    hard = total_of<P>(plan, partial, kHard, group, a, b, row);
    soft = total_of<P>(plan, partial, kSoft, group, a, b, row);
    const double shift = normalisers[normaliser_of(s, 0, i, j, row)];
    if (positives[row] > 0) {
      const double positive = total_of<P>(plan, partial, kPositive, group, a, b, row) / positives[row];
      contrast = log(hard) + (shift - positive) / temperatures.hard;
    }
    if (s.peers > 1) divergence = difference_of<P>(plan, partial, i, j, row) / soft;
  }
  if (row < s.batch) {
    normalisers[normaliser_of(s, 1, i, j, row)] = static_cast<float>(hard);
    normalisers[normaliser_of(s, 3, i, j, row)] = static_cast<float>(soft);
  }
  contrast = block_sum(contrast, scratch);
  divergence = block_sum(divergence, scratch);
  if (threadIdx.x == 0) {
    double* out = of_rows + 2 * (blockIdx.y * int64_t{gridDim.x} + blockIdx.x);
    out[0] = contrast;
    out[1] = divergence;
  }
}

// One block: the terms, from `blocks` sums of every ordered pair.
__global__ void __launch_bounds__(kThreads)
    term_kernel(const Sizes s, const Temperatures temperatures, const Summary* summary, const double* of_rows,
                int64_t blocks, float* terms) {
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  double sums[kTerms] = {};
  for (int64_t k = threadIdx.x; k < s.pairs() * blocks; k += kThreads) {
    const int64_t pair = k / blocks;
    const bool own = pair / s.peers == pair % s.peers;
    const double contrast = of_rows[2 * k], divergence = of_rows[2 * k + 1];
    // An index that is not known here would put the sums into memory.
    sums[kVcl] += own ? contrast : 0;
    sums[kIcl] += own ? 0 : contrast;
    sums[kSoftVcl] += own ? divergence : 0;
    sums[kSoftIcl] += own ? 0 : divergence;
  }
#pragma unroll
  for (int q = 0; q < kTerms; ++q) {
    const double sum = block_sum(sums[q], scratch);
    const bool softened = q == kSoftVcl || q == kSoftIcl;
    const double count = static_cast<double>(softened ? s.batch : summary->counted);
    const double factor = softened ? temperatures.soft / temperatures.hard : 1;
    if (threadIdx.x == 0) terms[q] = count > 0 ? static_cast<float>(sum * factor / count) : 0.f;
  }
}

struct ForwardWorkspace {
  Workspace memory;
  Prepared prepared;
  float* partial;
  float* shifts;
  double* of_rows;

  ForwardWorkspace(void* base, const Plan& p, size_t element)
      : memory(base),
        prepared(memory, p, element),
        partial(
            memory.take<float>(p.parts() * p.groups.count() * kSums * p.groups.size * p.groups.size * p.padded_batch)),
        shifts(memory.take<float>(kLargest * p.grouped())),
        of_rows(memory.take<double>(2 * p.sizes.pairs() * row_blocks(p))) {}

  static int64_t row_blocks(const Plan& p) { return divided(p.sizes.batch, kThreads); }
};

}  // namespace

size_t forward_workspace_bytes(const Inputs& in) {
  const size_t element = element_bytes(in);
  return ForwardWorkspace(nullptr, plan_for(in.sizes, element, false), element).memory.bytes();
}

void forward(const Inputs& in, float* terms, float* normalisers, void* base, cudaStream_t stream) {
  const size_t element = element_bytes(in);
  const Plan plan = plan_for(in.sizes, element, false);
  const ForwardWorkspace to(base, plan, element);
  const Prepared& ready = to.prepared;
  const Temperatures temperatures{in.temperature, in.soft_temperature};
  const unsigned pairs = to_grid(in.sizes.pairs(), kMaxGridY, "peers");
  const int64_t row_blocks = ForwardWorkspace::row_blocks(plan);
  const dim3 tiles(to_grid(plan.row_tiles, kMaxGridX, "images"), to_grid(plan.stretches, kMaxGridY, "images"),
                   to_grid(plan.groups.count(), kMaxGridY, "peers"));
  const dim3 rows(to_grid(row_blocks, kMaxGridX, "images"), pairs);
  const dim3 places = grouped_rows(plan);
  const size_t shared = shared_bytes(plan, element, false);
  prepare(in, plan, ready, stream);
  dispatch(in, plan, [&](auto zero, auto together) {
    using T = decltype(zero);
    constexpr int P = together;
    const T* panels = static_cast<const T*>(ready.panels);
    launch("largest", largest_kernel<T, P>, tiles, kThreads, shared, stream, plan, panels, ready.summary, to.partial);
    launch("shift", shift_kernel<P>, places, kThreads, 0, stream, plan, ready.summary, to.partial, to.shifts,
           normalisers);
    for (const auto kernel : {sum_kernel<T, P, false>, sum_kernel<T, P, true>}) {
      launch("sum", kernel, tiles, kThreads, shared, stream, plan, Exponents(in), panels, ready.classes, ready.summary,
             to.shifts, to.partial);
    }
    launch("row", row_kernel<P>, rows, kThreads, kScratch, stream, plan, temperatures, ready.positives, to.partial,
           normalisers, to.of_rows);
  });
  launch("term", term_kernel, dim3(1), kThreads, kScratch, stream, in.sizes, temperatures, ready.summary, to.of_rows,
         row_blocks, terms);
}

}  // namespace pyext::peer_contrast
