// What both passes of peer_contrast begin with: embeddings in whole tiles, classes of the labels.
#pragma once

#include "cuda/instructions.h"
#include "cuda/peer_contrast/plan.h"

namespace pyext::peer_contrast {

// Of all embeddings and labels.
struct Summary {
  int32_t unshifted;  // exponentials need no shift: they are finite and normal, and so are sums of 2^31 of them
  int32_t counted;    // rows with positives
};

// Where the parts of a workspace begin.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <typename U>
  U* take(int64_t count) {
    U* const start = reinterpret_cast<U*>(base_ + bytes_);
    bytes_ += (static_cast<size_t>(count) * sizeof(U) + 15) / 16 * 16;
    return start;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

struct Prepared {
  void* panels;        // peers x padded_batch x padded_features, in the dtype of embeddings, zeros where there are none
  int32_t* classes;    // padded_batch: the first row of the same label; -1 beyond the batch
  int32_t* positives;  // padded_batch: other rows of the same label
  float* squares;      // largest squared norms, one per block that looked for them
  Summary* summary;

  Prepared(Workspace& workspace, const Plan& plan, size_t element)
      : panels(workspace.take<char>(plan.rows() * plan.padded_features * static_cast<int64_t>(element))),
        classes(workspace.take<int32_t>(plan.padded_batch)),
        positives(workspace.take<int32_t>(plan.padded_batch)),
        squares(workspace.take<float>(divided(plan.rows(), kThreads / kWarp))),
        summary(workspace.take<Summary>(1)) {}
};

void prepare(const Inputs& inputs, const Plan& plan, const Prepared& prepared, cudaStream_t stream);

// How similarities enter the exponents, to base 2.
struct Exponents {
  float hard, soft;
  bool cube;  // the first exponential is the third power of the second

  explicit Exponents(const Inputs& in)
      : hard(static_cast<float>(M_LOG2E / in.temperature)),
        soft(static_cast<float>(M_LOG2E / (in.temperature * in.soft_temperature))),
        cube(in.soft_temperature == 3) {}

  // Both exponentials of a similarity that needs no shift.
  __device__ __forceinline__ void unshifted(float x, float& hard_exponential, float& soft_exponential) const {
    soft_exponential = exp2_flushed(x * soft);
    hard_exponential = cube ? soft_exponential * soft_exponential * soft_exponential : exp2_flushed(x * hard);
  }
};

inline size_t element_bytes(const Inputs& in) { return in.dtype == Dtype::kFloat ? 4 : 2; }

// Calls work with a zero of the dtype and an integral constant of the number of peers of a group.
template <typename F>
void dispatch(const Inputs& in, const Plan& plan, F work) {
  const auto with_peers = [&](auto zero) {
    switch (plan.groups.size) {
      case 1:
        return work(zero, std::integral_constant<int, 1>{});
      case 2:
        return work(zero, std::integral_constant<int, 2>{});
      default:
        return work(zero, std::integral_constant<int, kMaxPeersTogether>{});
    }
  };
  switch (in.dtype) {
    case Dtype::kFloat:
      return with_peers(float{});
    case Dtype::kBFloat16:
      return with_peers(__nv_bfloat16{});
    case Dtype::kHalf:
      return with_peers(__half{});
  }
}

inline unsigned to_grid(int64_t blocks, int64_t limit, const char* what) {
  if (blocks > limit) throw std::runtime_error(std::string("peer_contrast: too many ") + what);
  return static_cast<unsigned>(blocks);
}
constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1, kMaxGridY = 65535;

// The launch whose threads are GroupedRows.
inline dim3 grouped_rows(const Plan& plan) {
  return dim3(to_grid(divided(plan.padded_batch, kThreads), kMaxGridX, "images"),
              to_grid(int64_t{plan.groups.count()} * plan.places(), kMaxGridY, "peers"));
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kFullMask, x, lane);
  return x;
}

// Sum over a block of kThreads, for thread 0. `scratch` is shared memory of a double per warp.
__device__ inline double block_sum(double x, double* scratch) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += scratch[warp];
  return sum;
}
constexpr size_t kScratch = kThreads / kWarp * sizeof(double);

}  // namespace pyext::peer_contrast
