// peer_contrast on CUDA: embeddings into whole tiles, classes of the labels, and whether exponentials need a shift.
#include "cuda/peer_contrast/prepare.h"

namespace pyext::peer_contrast {
namespace {

constexpr int kWarps = kThreads / kWarp;
// Exponents up to this in size need no shift.
constexpr double kUnshifted = 40;

// A warp copies a row, and block x writes the largest squared norm of its rows to squares[x]. NaN and infinity need no
// care: a sum of their exponentials is NaN with any shift.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    panel_kernel(const Plan plan, const T* embeddings, int64_t peer_stride, int64_t row_stride, int64_t column_stride,
                 T* panels, float* squares) {
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  float square[1] = {};
  if (row < plan.rows()) {
    const int64_t peer = row / plan.padded_batch, image = row - peer * plan.padded_batch;
    const T* from = embeddings + peer * peer_stride + image * row_stride;
    for (int64_t k = threadIdx.x % kWarp; k < plan.padded_features; k += kWarp) {
      const bool valid = image < plan.sizes.batch && k < plan.sizes.features;
      const T x = valid ? from[k * column_stride] : from_float<T>(0.f);
      panels[row * plan.padded_features + k] = x;
      square[0] += to_float(x) * to_float(x);
    }
  }
  square[0] = cuda::warp_sum(square[0]);
  block_max(square, scratch);
  if (threadIdx.x == 0) squares[blockIdx.x] = square[0];
}

// A thread finds its row's class among all labels, a block's worth at a time.
__global__ void __launch_bounds__(kThreads)
    class_kernel(const Plan plan, const int64_t* labels, int32_t* classes, int32_t* positives) {
  int64_t* shared = reinterpret_cast<int64_t*>(dynamic_shared());
  const int64_t batch = plan.sizes.batch, row = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t own = row < batch ? labels[row] : 0;
  int32_t first = -1, same = 0;
  for (int64_t begin = 0; begin < batch; begin += kThreads) {
    __syncthreads();
    if (begin + threadIdx.x < batch) shared[threadIdx.x] = labels[begin + threadIdx.x];
    __syncthreads();
    const int count = static_cast<int>(min(batch - begin, int64_t{kThreads}));
    for (int k = 0; k < count; ++k) {
      if (shared[k] != own) continue;
      if (same++ == 0) first = static_cast<int32_t>(begin + k);
    }
  }
  if (row >= plan.padded_batch) return;
  classes[row] = row < batch ? first : -1;
  positives[row] = row < batch ? same - 1 : 0;
}

// One block. `largest_unshifted` is the squared norm up to which |v w| <= |v| |w| keeps exponents small.
__global__ void __launch_bounds__(kThreads)
    summary_kernel(const Plan plan, const float* squares, int64_t count, const int32_t* positives,
                   float largest_unshifted, Summary* summary) {
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  float square[1] = {};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) square[0] = fmaxf(square[0], squares[i]);
  block_max(square, scratch);
  double counted = 0;
  for (int64_t row = threadIdx.x; row < plan.sizes.batch; row += kThreads) counted += positives[row] > 0;
  counted = block_sum(counted, reinterpret_cast<double*>(dynamic_shared()));
  if (threadIdx.x == 0) *summary = {square[0] <= largest_unshifted, static_cast<int32_t>(counted)};
}

}  // namespace

void prepare(const Inputs& in, const Plan& plan, const Prepared& to, cudaStream_t stream) {
  const int64_t blocks = divided(plan.rows(), kWarps);
  constexpr size_t kReduction = kWarp * sizeof(float);
  const auto copy = [&](auto zero) {
    using T = decltype(zero);
    launch("panel", panel_kernel<T>, dim3(to_grid(blocks, kMaxGridX, "images")), kThreads, kReduction, stream, plan,
           static_cast<const T*>(in.embeddings), in.peer, in.row, in.column, static_cast<T*>(to.panels), to.squares);
  };
  switch (in.dtype) {
    case Dtype::kFloat:
      copy(float{});
      break;
    case Dtype::kBFloat16:
      copy(__nv_bfloat16{});
      break;
    case Dtype::kHalf:
      copy(__half{});
      break;
  }
  launch("class", class_kernel, dim3(to_grid(divided(plan.padded_batch, kThreads), kMaxGridX, "images")), kThreads,
         kThreads * sizeof(int64_t), stream, plan, in.labels, to.classes, to.positives);
  const double least = in.temperature * std::min(1.0, in.soft_temperature);
  launch("summary", summary_kernel, dim3(1), kThreads, kReduction, stream, plan, to.squares, blocks, to.positives,
         static_cast<float>(kUnshifted * least), to.summary);
}

}  // namespace pyext::peer_contrast
