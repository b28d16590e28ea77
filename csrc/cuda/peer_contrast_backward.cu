// peer_contrast on CUDA, backward: a block owns a tile of rows. It computes similarities anew, turns them into the
// loss's gradients by them (for a row and, as x_ij[r, c] is x_ji[c, r], for a column at once), and multiplies these
// with the columns. Nothing is added to memory by two blocks; what stretches of columns give is added in a fixed order.
#include "cuda/peer_contrast.h"

#include "cuda/peer_contrast/prepare.h"
#include "cuda/peer_contrast/tile.h"

namespace pyext::peer_contrast {
namespace {

// Weights of exponentials in the gradient, and their shifts: the derivative of the term, divided by the row's sum.
enum Weight { kHard, kSoft, kHardShift, kSoftShift, kWeights };

struct Weights {
  float* of_rows;   // kWeights numbers side by side, of every two places, for every group and image
  float* positive;  // of every positive of a row: padded_batch x 2, within a peer and between peers

  Weights(Workspace& workspace, const Plan& plan)
      : of_rows(workspace.take<float>(kWeights * plan.grouped())),
        positive(workspace.take<float>(2 * plan.padded_batch)) {}
};

// What a gradient by a similarity is made of: the derivatives of a term, without the probability.
struct Factors {
  double hard, soft;  // times grad_terms, divided by the number of rows
  int64_t batch;
  bool sixteen_bits;

  Factors(const Inputs& in)
      : hard(1 / in.temperature),
        soft(in.soft_temperature / in.temperature),
        batch(in.sizes.batch),
        sixteen_bits(in.dtype != Dtype::kFloat) {}

  __device__ double of_term(const float* grad_terms, const Summary& summary, int term) const {
    if (term == kSoftVcl || term == kSoftIcl) return grad_terms[term] * soft / static_cast<double>(batch);
    return grad_terms[term] * hard / max(summary.counted, 1);
  }

  // Gradients by similarities are scaled by this while they are in the dtype of 16-bit embeddings: they fill its range
  // (float16 ends at 65504). A row's and a column's part are each at most one probability or positive for the contrast,
  // and `peers` for the divergence.
  __device__ double scale(const float* grad_terms, const Summary& summary, int64_t peers) const {
    if (!sixteen_bits) return 1;
    const double hard_part = max(fabs(of_term(grad_terms, summary, kVcl)), fabs(of_term(grad_terms, summary, kIcl)));
    const double soft_part =
        max(fabs(of_term(grad_terms, summary, kSoftVcl)), fabs(of_term(grad_terms, summary, kSoftIcl)));
    const double bound = 2 * (hard_part + static_cast<double>(peers) * soft_part);
    return bound > 0 ? 32768 / bound : 1;
  }
};

// Thread (x, y): weights of row x of places y; 0 where there is none, with a shift that makes the exponential 0 too:
// without, it may be infinite.
__global__ void __launch_bounds__(kThreads)
    weight_kernel(const Plan plan, const Factors factors, const Summary* summary, const int32_t* positives,
                  const float* normalisers, const float* grad_terms, const Weights to) {
  const GroupedRow own(plan);
  const Sizes& s = plan.sizes;
  if (own.row >= plan.padded_batch) return;
  const bool within = own.a == own.b, active = s.active(own.row), counted = active && positives[own.row] > 0;
  const double scale = factors.scale(grad_terms, *summary, s.peers);
  const double hard = factors.of_term(grad_terms, *summary, within ? kVcl : kIcl) * scale;
  const double soft = factors.of_term(grad_terms, *summary, within ? kSoftVcl : kSoftIcl) * scale;
  const float* of_row = normalisers + (own.i * s.peers + own.j) * s.batch + own.row;
  const int64_t kind = s.pairs() * s.batch;
  const int places = plan.places();
  float* out = to.of_rows + ((own.group * plan.padded_batch + own.row) * places + blockIdx.y % places) * kWeights;
  out[kHard] = counted && own.first ? static_cast<float>(hard / of_row[kind]) : 0.f;
  out[kHardShift] = counted && own.first ? of_row[0] : INFINITY;
  out[kSoft] = active ? static_cast<float>(soft / of_row[3 * kind]) : 0.f;
  out[kSoftShift] = active ? of_row[2 * kind] : INFINITY;
  if (blockIdx.y > 1) return;  // places (0, 0) are one peer, (0, 1) are not
  to.positive[2 * own.row + blockIdx.y] = counted ? static_cast<float>(hard / positives[own.row]) : 0.f;
}

// Probabilities of one similarity by the weights of its row, for places (a, b), and of its column, for (b, a).
template <bool kShifted>
__device__ __forceinline__ void weigh(const Exponents& exponents, float x, const float* of_row, const float* of_column,
                                      float& hard, float& soft) {
  constexpr int kRead = kShifted ? kWeights : kHardShift;
  const Pack<float, kRead> row = load_pack<kRead>(of_row), column = load_pack<kRead>(of_column);
  if constexpr (kShifted) {
    const auto sum = [&](float scale, int weight, int shift) {
      return exp2_flushed((x - row.at[shift]) * scale) * row.at[weight] +
             exp2_flushed((x - column.at[shift]) * scale) * column.at[weight];
    };
    hard = sum(exponents.hard, kHard, kHardShift);
    soft = sum(exponents.soft, kSoft, kSoftShift);
  } else {
    exponents.unshifted(x, hard, soft);
    hard *= row.at[kHard] + column.at[kHard];
    soft *= row.at[kSoft] + column.at[kSoft];
  }
}

// Similarities of a warp's part become the loss's gradients by them.
template <typename T, int P, bool kShifted>
class ToGradients {
 public:
  static constexpr int kSlots = Tile<P>::kSlots;

  __device__ ToGradients(const Plan& plan, const Exponents& exponents, const Weights& weights, const int32_t* classes,
                         const Lane& lane, int group, int row_image)
      : exponents_(exponents),
        weights_(weights.of_rows + group * plan.padded_batch * kStride),
        positive_(weights.positive),
        classes_(classes),
        row_(row_image + lane.row_warp * Tile<P>::kImagesOfPart + lane.layout.group),
        column_(lane.column_warp * Tile<P>::kImagesOfPart + 2 * lane.layout.member) {
    const Members members(plan.groups, group);
    for (int place = 0; place < 2; ++place) first_[place] = group == plan.groups.first(members[place]);
  }

  __device__ __forceinline__ void operator()(Part& x, int tile) const {
    const int first = tile * Tile<P>::kColumnImages + column_;
#pragma unroll
    for (int v = 0; v < kSlots; ++v) {
#pragma unroll
      for (int u = 0; u < kSlots; ++u) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          one(x, u, v, e, row_ + 8 * u, first + 8 * v + e);
          hold_loads();
        }
      }
    }
  }

 private:
  // All pairs of peers at one row and column. What is no column may have any probability, infinity too.
  __device__ __forceinline__ void one(Part& x, int u, int v, int e, int row, int column) const {
    const int32_t column_class = classes_[column];
    const bool valid = column_class >= 0, other = row != column, same = other && classes_[row] == column_class;
    const float *of_row = weights_ + int64_t{row} * kStride, *of_column = weights_ + int64_t{column} * kStride;
    constexpr int kKinds = P > 1 ? 2 : 1;  // within a peer and between peers
    auto positive = load_pack<kKinds>(positive_ + int64_t{2} * row);
    const auto column_positive = load_pack<kKinds>(positive_ + int64_t{2} * column);
#pragma unroll
    for (int k = 0; k < kKinds; ++k) positive.at[k] += column_positive.at[k];
    // The contrast's gradient by the similarity of places a and b, and the softened probability.
    const auto contrast = [&](int a, int b, float& soft) {
      float hard;
      weigh<kShifted>(exponents_, at(x, a * kSlots + u, b * kSlots + v, e), of_row + (a * P + b) * kWeights,
                      of_column + (b * P + a) * kWeights, hard, soft);
      const bool attracted = same && (a != b || is_first(a));
      return other ? hard - (attracted ? positive.at[a != b] : 0.f) : 0.f;
    };
    const auto put = [&](int a, int b, float gradient) {
      at(x, a * kSlots + u, b * kSlots + v, e) = valid ? gradient : 0.f;
    };
    float hard[P], soft[P], sum = 0;
#pragma unroll
    for (int a = 0; a < P; ++a) {
      hard[a] = contrast(a, a, soft[a]);
      sum += soft[a];
    }
#pragma unroll
    for (int a = 0; a < P; ++a) {
      hold_loads();
      put(a, a, hard[a] + (P * soft[a] - sum));
#pragma unroll
      for (int b = a + 1; b < P; ++b) {
        float soft_ab, soft_ba;
        const float hard_ab = contrast(a, b, soft_ab), hard_ba = contrast(b, a, soft_ba);
        put(a, b, hard_ab + (soft_ab - soft_ba));
        put(b, a, hard_ba + (soft_ba - soft_ab));
      }
    }
  }

  // Loads after this are not moved before it: shifts of four peers, fetched ahead, would spill.
  __device__ __forceinline__ static void hold_loads() {
    if constexpr (kShifted && P > 2) __syncwarp();
  }

  // Whether a peer's contrast with itself counts in this group; more than two are in one group alone.
  __device__ __forceinline__ bool is_first(int place) const { return P > 2 || first_[place]; }

  static constexpr int kStride = kWeights * P * P;
  const Exponents& exponents_;
  const float* weights_;
  const float* positive_;
  const int32_t* classes_;
  const int row_, column_;
  bool first_[2];
};

// The warp's part of the gradients by similarities, in the dtype of the embeddings, row by row.
template <typename T>
__device__ __forceinline__ void store_part(const Lane& lane, Part& x, T* gradients) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int row = lane.row_warp * kPart + 8 * q + lane.layout.group;
      const int column = lane.column_warp * kPart + 8 * s + 2 * lane.layout.member;
      const Pack<T, 2> pair{{from_float<T>(at(x, q, s, 0)), from_float<T>(at(x, q, s, 1))}};
      store_pack(gradients + row * kPitch<T> + column, pair);
    }
  }
}

// Where the gradient of a tile's position stands: groups x stretches x P x padded_batch x padded_features.
template <int P>
__device__ __forceinline__ int64_t gradient_of(const Plan& plan, int group, int64_t stretch, int place, int64_t image) {
  return (((group * plan.stretches + stretch) * P + place) * plan.padded_batch + image) * plan.padded_features;
}

template <int P>
__device__ __forceinline__ void write_gradient(const Plan& plan, const Lane& lane, int group, int64_t row_image,
                                               Part& sum, int chunk, float* partial) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int position = lane.row_warp * kPart + 8 * q + lane.layout.group;
    const int64_t image = row_image + Tile<P>::image(position);
    float* row = partial + gradient_of<P>(plan, group, blockIdx.y, Tile<P>::peer(position), image);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int feature = lane.column_warp * kPart + 8 * s + 2 * lane.layout.member;
      store_pack(row + int64_t{chunk} * kDepth + feature, Pack<float, 2>{{at(sum, q, s, 0), at(sum, q, s, 1)}});
    }
  }
}

// Block (x, y, z): what stretch y of columns gives to tile x of rows, for a group and kOutputs chunks of features. Of
// the two instances that are started one does the work.
template <typename T, int P, bool kShifted>
__global__ void __launch_bounds__(kThreads, 1)
    gradient_kernel(const Plan plan, const Exponents exponents, const T* panels, const int32_t* classes,
                    const Summary* summary, const Weights weights, float* partial) {
  if (kShifted == (summary->unshifted != 0)) return;
  const Lane lane;
  const int group = static_cast<int>(blockIdx.z) % plan.groups.count();
  const int first = static_cast<int>(blockIdx.z) / plan.groups.count() * kOutputs;
  const int outputs = min(kOutputs, plan.chunks() - first);
  Operands<T, P> operands(plan, panels, group, first, outputs);
  T* gradients = operands.rest();
  const ToGradients<T, P, kShifted> to_gradients(plan, exponents, weights, classes, lane, group, operands.row_image);
  Part sums[kOutputs] = {};
  for (int tile = operands.first_tile; tile < operands.last_tile; ++tile) {
    Part x = {};
    operands.similarities(lane, tile, x);
    to_gradients(x, tile);
    store_part(lane, x, gradients);
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      if (k == outputs) break;
      const T* columns = operands.columns(tile, plan.chunks() + k);  // its barrier comes after store_part
      multiply<true, kDepth>(sums[k], gradients + lane.row_warp * kPart * kPitch<T>,
                             columns + lane.column_warp * kPart);
    }
  }
#pragma unroll
  for (int k = 0; k < kOutputs; ++k) {
    if (k < outputs) write_gradient<P>(plan, lane, group, operands.row_image, sums[k], first + k, partial);
  }
}

// Thread (x, y): element x of peer y's gradient, from all groups and stretches.
template <typename T, int P>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const Plan plan, const Factors factors, const Summary* summary, const float* grad_terms,
                  const float* partial, T* grad_embeddings) {
  const Sizes& s = plan.sizes;
  const Groups& groups = plan.groups;
  const int64_t element = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (element >= s.batch * s.features) return;
  const int peer = static_cast<int>(blockIdx.y);
  const int64_t image = element / s.features, feature = element - image * s.features;
  float sum = 0;
  for (int other = 0; other < groups.peers; ++other) {
    if (groups.pairs() ? other == peer : other > 0) continue;
    for (int64_t stretch = 0; stretch < plan.stretches; ++stretch) {
      const int place = groups.place(peer, other);
      sum += partial[gradient_of<P>(plan, groups.of_pair(peer, other), stretch, place, image) + feature];
    }
  }
  const double scale = factors.scale(grad_terms, *summary, s.peers);
  grad_embeddings[peer * s.batch * s.features + element] = from_float<T>(static_cast<float>(sum / scale));
}

struct BackwardWorkspace {
  Workspace memory;
  Prepared prepared;
  Weights weights;
  float* partial;

  BackwardWorkspace(void* base, const Plan& p, size_t element)
      : memory(base),
        prepared(memory, p, element),
        weights(memory, p),
        partial(
            memory.take<float>(p.groups.count() * p.stretches * p.groups.size * p.padded_batch * p.padded_features)) {}
};

}  // namespace

size_t backward_workspace_bytes(const Inputs& in) {
  const size_t element = element_bytes(in);
  return BackwardWorkspace(nullptr, plan_for(in.sizes, element, true), element).memory.bytes();
}

void backward(const Inputs& in, const float* normalisers, const float* grad_terms, void* grad_embeddings, void* base,
              cudaStream_t stream) {
  const size_t element = element_bytes(in);
  const Plan plan = plan_for(in.sizes, element, true);
  const BackwardWorkspace to(base, plan, element);
  const Prepared& ready = to.prepared;
  const Factors factors(in);
  const dim3 tiles(to_grid(plan.row_tiles, kMaxGridX, "images"), to_grid(plan.stretches, kMaxGridY, "images"),
                   to_grid(plan.groups.count() * plan.output_blocks(), kMaxGridY, "peers and features"));
  const dim3 elements(to_grid(divided(in.sizes.batch * in.sizes.features, kThreads), kMaxGridX, "images"),
                      to_grid(in.sizes.peers, kMaxGridY, "peers"));
  const size_t shared = shared_bytes(plan, element, true);
  prepare(in, plan, ready, stream);
  launch("weight", weight_kernel, grouped_rows(plan), kThreads, 0, stream, plan, factors, ready.summary,
         ready.positives, normalisers, grad_terms, to.weights);
  dispatch(in, plan, [&](auto zero, auto together) {
    using T = decltype(zero);
    constexpr int P = together;
    for (const auto kernel : {gradient_kernel<T, P, false>, gradient_kernel<T, P, true>}) {
      launch("gradient", kernel, tiles, kThreads, shared, stream, plan, Exponents(in),
             static_cast<const T*>(ready.panels), ready.classes, ready.summary, to.weights, to.partial);
    }
    launch("gather", gather_kernel<T, P>, elements, kThreads, 0, stream, plan, factors, ready.summary, grad_terms,
           to.partial, static_cast<T*>(grad_embeddings));
  });
}

}  // namespace pyext::peer_contrast
