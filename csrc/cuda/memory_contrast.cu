// memory_contrast on CUDA: kernels and launchers. A warp reads a gathered row once and meets it with the embeddings of
// up to kGroup other peers. Sums have a fixed order: partial results per block, then one thread or block adds them.
#include "cuda/memory_contrast.h"

#include <algorithm>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace pyext::memory_contrast {
namespace {

using namespace pyext::cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kGroup = 4;           // peers that meet a row while it is in registers
constexpr int kScoreRows = 256;     // entries of one block of score_kernel
constexpr int kGradientRows = 512;  // entries of one block of gradient_kernel
constexpr int kLaneColumns = 4;     // columns of one lane of gradient_kernel
constexpr int kColumns = kLaneColumns * kWarp;

template <typename S>
struct Bank {
  const S* data;
  int64_t pitch;
  int number;
  __device__ __forceinline__ const S* row(int64_t row) const { return data + row * pitch; }
};

__device__ __forceinline__ double warp_sum_double(double x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kFullMask, x, lane);
  return x;
}

// Sum over the block, for thread 0. `scratch` is shared memory of kWarps doubles.
__device__ double block_sum_double(double x, double* scratch) {
  x = warp_sum_double(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += scratch[warp];
  return sum;
}

// Peers of one launch: those that the kernel meets in this pass over the rows.
struct Group {
  int first;
  int count;
};

__device__ __forceinline__ int64_t vector_of(const Sizes& s, int bank, int other, int64_t image) {
  return (static_cast<int64_t>(bank) * s.others() + other) * s.batch + image;
}

__device__ __forceinline__ int64_t embedding_of(const Sizes& s, int bank, int other, int64_t image) {
  return (peer_of(bank, other) * s.batch + image) * s.features;
}

// Block (x, y): entries [y, y + 1) * kScoreRows of image x. Exponentials into weights, their sums into
// sums[vector * gridDim.y + y].
template <typename S>
__global__ void __launch_bounds__(kThreads)
    score_kernel(const Sizes s, const Bank<S> bank, const Group group, const float* embeddings, const int64_t* indices,
                 int32_t* rows, float per_temperature, float* weights, double* sums) {
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  float* embedding = reinterpret_cast<float*>(scratch + kWarps);  // kGroup x features
  const int64_t image = blockIdx.x;
  const int features = static_cast<int>(s.features);
  for (int i = threadIdx.x; i < group.count * features; i += kThreads) {
    const int p = i / features;
    embedding[i] = embeddings[embedding_of(s, bank.number, group.first + p, image) + i - p * features];
  }
  __syncthreads();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t begin = blockIdx.y * int64_t{kScoreRows}, end = min(s.entries, begin + kScoreRows);
  double sum[kGroup] = {};
  for (int64_t k = begin + warp; k < end; k += kWarps) {
    const int64_t index = indices[image * s.entries + k];
    const bool known = index >= 0 && index < s.rows;
    const S* row = bank.row(known ? index : 0);
    float score[kGroup] = {};
#pragma unroll 4  // all loads of a row of 128 features in flight; without it sm_100's compiler spills
    for (int c = lane; c < features; c += kWarp) {
      const float x = to_float(row[c]);
#pragma unroll
      for (int p = 0; p < kGroup; ++p) {
        if (p < group.count) score[p] += x * embedding[p * features + c];
      }
    }
#pragma unroll
    for (int p = 0; p < kGroup; ++p) {
      const float exponential = known ? expf(warp_sum(score[p]) * per_temperature) : NAN;
      if (lane != 0 || p >= group.count) continue;
      weights[vector_of(s, bank.number, group.first + p, image) * s.entries + k] = exponential;
      sum[p] += exponential;
    }
    if (lane == 0 && rows != nullptr) rows[image * s.entries + k] = known ? static_cast<int32_t>(index) : -1;
  }
#pragma unroll
  for (int p = 0; p < kGroup; ++p) {
    const double total = block_sum_double(sum[p], scratch);
    if (threadIdx.x == 0 && p < group.count) {
      sums[vector_of(s, bank.number, group.first + p, image) * gridDim.y + blockIdx.y] = total;
    }
  }
}

// Block x: the reciprocal of Z of pair x from the `count` sums of its exponentials.
__global__ void __launch_bounds__(kThreads)
    normaliser_kernel(const Sizes s, const double* sums, int64_t count, float* per_normaliser) {
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += sums[blockIdx.x * count + i];
  sum = block_sum_double(sum, scratch);
  const double entries = static_cast<double>(s.batch) * static_cast<double>(s.entries);
  if (threadIdx.x == 0) per_normaliser[blockIdx.x] = static_cast<float>(entries / (sum * static_cast<double>(s.rows)));
}

// Block x: exponentials of pair and image x become weights; losses[x].
__global__ void __launch_bounds__(kThreads)
    weight_kernel(const Sizes s, const float* per_normaliser, float noise, float* weights, double* losses) {
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  const float scale = per_normaliser[blockIdx.x / s.batch];
  const float epsilon = static_cast<float>(kEpsilon), shifted = noise + epsilon;
  float* of_image = weights + blockIdx.x * s.entries;
  double loss = 0;
  for (int64_t k = threadIdx.x; k < s.entries; k += kThreads) {
    const float x = of_image[k] * scale;
    loss += log1pf(k == 0 ? shifted / x : (x + epsilon) / noise);
    of_image[k] = (k == 0 ? -shifted : x) / (x + shifted);
  }
  loss = block_sum_double(loss, scratch);
  if (threadIdx.x == 0) losses[blockIdx.x] = loss;
}

// One block: the loss.
__global__ void __launch_bounds__(kThreads)
    loss_kernel(const double* losses, int64_t count, int64_t batch, float* loss) {
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += losses[i];
  sum = block_sum_double(sum, scratch);
  if (threadIdx.x == 0) loss[0] = static_cast<float>(sum / static_cast<double>(batch));
}

// Block (x, y, z): columns [z, z + 1) * kColumns of the weighted sum of rows [y, y + 1) * kGradientRows of image x, for
// the pairs of a bank and a group; partial[(vector * gridDim.y + y) * features + column].
template <typename S>
__global__ void __launch_bounds__(kThreads) gradient_kernel(const Sizes s, const Bank<S> bank, const Group group,
                                                            const int32_t* rows, const float* weights, float* partial) {
  float* of_warps = reinterpret_cast<float*>(dynamic_shared());  // kWarps x kGroup x kColumns
  const int64_t image = blockIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t begin = blockIdx.y * int64_t{kGradientRows}, end = min(s.entries, begin + kGradientRows);
  const int64_t first = blockIdx.z * int64_t{kColumns};
  float sum[kGroup][kLaneColumns] = {};
  for (int64_t k = begin + warp; k < end; k += kWarps) {
    // What is no row has weights of NaN.
    const S* row = bank.row(max(rows[image * s.entries + k], 0));
    float x[kLaneColumns];
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      const int64_t column = first + c * kWarp + lane;
      x[c] = column < s.features ? to_float(row[column]) : 0.f;
    }
#pragma unroll
    for (int p = 0; p < kGroup; ++p) {
      if (p >= group.count) continue;
      const float weight = weights[vector_of(s, bank.number, group.first + p, image) * s.entries + k];
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) sum[p][c] += weight * x[c];
    }
  }
#pragma unroll
  for (int p = 0; p < kGroup; ++p) {
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) of_warps[(warp * kGroup + p) * kColumns + c * kWarp + lane] = sum[p][c];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < group.count * kColumns; i += kThreads) {
    const int p = i / kColumns;
    const int64_t column = first + i - p * kColumns;
    if (column >= s.features) continue;
    float total = 0.f;
    for (int w = 0; w < kWarps; ++w) total += of_warps[w * kGroup * kColumns + i];
    const int64_t vector = vector_of(s, bank.number, group.first + p, image);
    partial[(vector * gridDim.y + blockIdx.y) * s.features + column] = total;
  }
}

// Block (x, y): gradient of peer y's embedding of image x, from all banks and stretches of rows.
__global__ void __launch_bounds__(kThreads)
    gather_gradient_kernel(const Sizes s, const float* partial, int64_t stretches, const float* grad_loss, float factor,
                           float* grad_embeddings) {
  const int64_t image = blockIdx.x;
  const int peer = blockIdx.y;
  for (int64_t c = threadIdx.x; c < s.features; c += kThreads) {
    float sum = 0.f;
    for (int bank = 0; bank < s.peers; ++bank) {
      if (bank == peer) continue;
      const int64_t vector = vector_of(s, bank, peer < bank ? peer : peer - 1, image);
      for (int64_t i = 0; i < stretches; ++i) sum += partial[(vector * stretches + i) * s.features + c];
    }
    grad_embeddings[(peer * s.batch + image) * s.features + c] = sum * (grad_loss[0] * factor);
  }
}

int64_t blocks_for(int64_t count, int64_t per_block) { return (count + per_block - 1) / per_block; }

struct ForwardWorkspace {
  double* sums;
  double* losses;
  float* per_normaliser;
  size_t bytes;

  ForwardWorkspace(void* base, const Sizes& s) {
    const int64_t vectors = s.pairs() * s.batch;
    sums = static_cast<double*>(base);
    losses = sums + vectors * blocks_for(s.entries, kScoreRows);
    per_normaliser = reinterpret_cast<float*>(losses + vectors);
    bytes = static_cast<size_t>(reinterpret_cast<char*>(per_normaliser + s.pairs()) - static_cast<char*>(base));
  }
};

template <typename F>
void dispatch(Dtype dtype, F work) {
  switch (dtype) {
    case Dtype::kFloat:
      return work(float{});
    case Dtype::kBFloat16:
      return work(__nv_bfloat16{});
    case Dtype::kHalf:
      return work(__half{});
  }
}

// Calls work(bank, group) for every bank and every group of other peers.
template <typename S, typename F>
void for_each_pass(const Inputs& in, F work) {
  for (int i = 0; i < in.sizes.peers; ++i) {
    const Bank<S> bank{static_cast<const S*>(in.banks[i]), in.pitch[i], i};
    for (int first = 0; first < in.sizes.others(); first += kGroup) {
      work(bank, Group{first, static_cast<int>(std::min<int64_t>(kGroup, in.sizes.others() - first))});
    }
  }
}

unsigned to_grid(int64_t blocks, const char* what) {
  constexpr int64_t kLimit = 65535;
  if (blocks > kLimit) throw std::runtime_error(std::string("memory_contrast: too many ") + what);
  return static_cast<unsigned>(blocks);
}

constexpr size_t kScratch = kWarps * sizeof(double);

}  // namespace

size_t forward_workspace_bytes(const Sizes& s) { return ForwardWorkspace(nullptr, s).bytes; }

void forward(const Inputs& in, const int64_t* indices, int32_t* rows, float* weights, float* loss, void* base,
             cudaStream_t stream) {
  const Sizes& s = in.sizes;
  const ForwardWorkspace workspace(base, s);
  const int64_t blocks = blocks_for(s.entries, kScoreRows);
  const dim3 grid(static_cast<unsigned>(s.batch), to_grid(blocks, "indices"));
  const size_t shared = kScratch + kGroup * s.features * sizeof(float);
  dispatch(in.dtype, [&](auto zero) {
    using S = decltype(zero);
    for_each_pass<S>(in, [&](const Bank<S>& bank, const Group& group) {
      int32_t* out = bank.number == 0 && group.first == 0 ? rows : nullptr;
      launch("score", score_kernel<S>, grid, kThreads, shared, stream, s, bank, group, in.embeddings, indices, out,
             1 / in.temperature, weights, workspace.sums);
    });
  });
  launch("normaliser", normaliser_kernel, dim3(static_cast<unsigned>(s.pairs())), kThreads, kScratch, stream, s,
         workspace.sums, s.batch * blocks, workspace.per_normaliser);
  launch("weight", weight_kernel, dim3(static_cast<unsigned>(s.pairs() * s.batch)), kThreads, kScratch, stream, s,
         workspace.per_normaliser, static_cast<float>(noise(s)), weights, workspace.losses);
  launch("loss", loss_kernel, dim3(1), kThreads, kScratch, stream, workspace.losses, s.pairs() * s.batch, s.batch,
         loss);
}

size_t backward_workspace_bytes(const Sizes& s) {
  return s.pairs() * s.batch * blocks_for(s.entries, kGradientRows) * s.features * sizeof(float);
}

void backward(const Inputs& in, const int32_t* rows, const float* weights, const float* grad_loss,
              float* grad_embeddings, void* base, cudaStream_t stream) {
  const Sizes& s = in.sizes;
  float* partial = static_cast<float*>(base);
  const int64_t stretches = blocks_for(s.entries, kGradientRows);
  const dim3 grid(static_cast<unsigned>(s.batch), to_grid(stretches, "indices"),
                  to_grid(blocks_for(s.features, kColumns), "features"));
  constexpr size_t kShared = kWarps * kGroup * kColumns * sizeof(float);
  dispatch(in.dtype, [&](auto zero) {
    using S = decltype(zero);
    for_each_pass<S>(in, [&](const Bank<S>& bank, const Group& group) {
      launch("gradient", gradient_kernel<S>, grid, kThreads, kShared, stream, s, bank, group, rows, weights, partial);
    });
  });
  const float factor = static_cast<float>(1 / (static_cast<double>(in.temperature) * static_cast<double>(s.batch)));
  launch("gather_gradient", gather_gradient_kernel,
         dim3(static_cast<unsigned>(s.batch), static_cast<unsigned>(s.peers)), kThreads, 0, stream, s, partial,
         stretches, grad_loss, factor, grad_embeddings);
}

}  // namespace pyext::memory_contrast
