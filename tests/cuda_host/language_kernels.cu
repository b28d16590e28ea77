// Kernels that use what the shim offers of CUDA's language. tests/ops/test_cuda_host_language.py knows the results.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "guarded.h"
#include "probes.h"

namespace {

constexpr unsigned kFull = 0xffffffffu;

// A block of (8, 4, 2) threads in a grid of (1, 1, 1): its linear order, through static shared memory.
__global__ void threads_in_3d(float* out, const float*) {
  __shared__ float order[2][4][8];
  order[threadIdx.z][threadIdx.y][threadIdx.x] =
      static_cast<float>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
  __syncthreads();
  const unsigned i = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[i] = order[i / 32][i / 8 % 4][i % 8];
}

// A grid of (2, 4, 8) blocks of one thread.
__global__ void blocks_in_3d(float* out, const float*) {
  const unsigned i = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[i] = static_cast<float>(100 * blockIdx.x + 10 * blockIdx.y + blockIdx.z);
}

__global__ void shuffles(float* out, const float* in) { out[threadIdx.x] = __shfl_sync(kFull, in[threadIdx.x], 35); }
__global__ void shuffles_in_parts(float* out, const float* in) {
  out[threadIdx.x] = __shfl_sync(kFull, in[threadIdx.x], 3, 8);
}
__global__ void shuffles_up(float* out, const float* in) {
  out[threadIdx.x] = __shfl_up_sync(kFull, in[threadIdx.x], 3, 16);
}
__global__ void shuffles_down(float* out, const float* in) {
  out[threadIdx.x] = __shfl_down_sync(kFull, in[threadIdx.x], 3, 16);
}
__global__ void shuffles_xor(float* out, const float* in) {
  out[threadIdx.x] = __shfl_xor_sync(kFull, in[threadIdx.x], 5);
}
__global__ void shuffles_doubles(float* out, const float* in) {
  out[threadIdx.x] = static_cast<float>(__shfl_xor_sync(kFull, static_cast<double>(in[threadIdx.x]), 1));
}

__global__ void votes(float* out, const float*) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned even = __ballot_sync(kFull, lane % 2 == 0);
  const int any = __any_sync(kFull, threadIdx.x == 40);
  const int all = __all_sync(kFull, threadIdx.x < 32);
  out[threadIdx.x] = static_cast<float>((even == 0x55555555u) + 2 * any + 4 * all + 8 * __popc(even >> lane));
}

// Even and odd lanes each among themselves.
__global__ void votes_of_some(float* out, const float*) {
  const unsigned mask = threadIdx.x % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;
  out[threadIdx.x] = static_cast<float>(__popc(__ballot_sync(mask, threadIdx.x % 32 < 10)));
}

__global__ void sums_of_a_warp(float* out, const float*) {
  out[threadIdx.x] = static_cast<float>(__reduce_add_sync(kFull, static_cast<int>(threadIdx.x) - 20));
}

__global__ void barriers_with_predicate(float* out, const float*) {
  const int count = __syncthreads_count(threadIdx.x % 3 == 0);
  const int any = __syncthreads_or(threadIdx.x == 63);
  const int all = __syncthreads_and(threadIdx.x != 63);
  out[threadIdx.x] = static_cast<float>(count + 100 * (any != 0) + 1000 * (all != 0));
}

__global__ void atomics(float* out, const float* in) {
  __shared__ unsigned counts[6];
  __shared__ float sum;
  if (threadIdx.x < 6) counts[threadIdx.x] = threadIdx.x == 2 ? 1000 : 0;
  if (threadIdx.x == 0) sum = 0.f;
  __syncthreads();
  atomicAdd(&counts[0], 2);
  atomicMax(&counts[1], threadIdx.x);
  atomicMin(&counts[2], threadIdx.x + 5);
  atomicOr(&counts[3], 1u << threadIdx.x % 8);
  atomicExch(&counts[4], 7);
  atomicCAS(&counts[5], 0, 9);
  atomicAdd(&sum, in[threadIdx.x]);
  __syncthreads();
  out[threadIdx.x] = threadIdx.x < 6 ? static_cast<float>(counts[threadIdx.x]) : sum;
}

__global__ void vectors(float* out, const float* in) {
  if (threadIdx.x >= 16) return;
  const float4 four = __ldg(reinterpret_cast<const float4*>(in) + threadIdx.x);
  reinterpret_cast<float2*>(out)[2 * threadIdx.x] = make_float2(four.w, four.z);
  reinterpret_cast<float2*>(out)[2 * threadIdx.x + 1] = make_float2(four.y, four.x);
}

__global__ void halves(float* out, const float* in) {
  const __half2 pair = __floats2half2_rn(in[threadIdx.x], 0.5f);
  const __half2 sum = __hadd2(pair, __hmul2(pair, pair));
  out[threadIdx.x] = __low2float(sum) + __high2float(sum);
}

__global__ void bfloats(float* out, const float* in) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(in[threadIdx.x], 0.5f);
  const __nv_bfloat162 sum = __hadd2(pair, __hmul2(pair, pair));
  out[threadIdx.x] = __low2float(sum) + __high2float(sum);
}

// A warp of 16 threads in a block of 48.
__global__ void block_of_part_of_a_warp(float* out, const float* in) {
  const float sum = __shfl_xor_sync(kFull, in[threadIdx.x], 1);
  __syncthreads();
  out[threadIdx.x] = sum;
  if (threadIdx.x < 16) out[48 + threadIdx.x] = 0.f;
}

const dim3 kOne(1);
const dim3 kThreads(kProbeFloats);

#define PROBE(kernel, grid, threads) {#kernel, kernel, grid, threads, 0}
const Probe kProbes[] = {
    PROBE(threads_in_3d, kOne, dim3(8, 4, 2)),
    PROBE(blocks_in_3d, dim3(2, 4, 8), kOne),
    PROBE(shuffles, kOne, kThreads),
    PROBE(shuffles_in_parts, kOne, kThreads),
    PROBE(shuffles_up, kOne, kThreads),
    PROBE(shuffles_down, kOne, kThreads),
    PROBE(shuffles_xor, kOne, kThreads),
    PROBE(shuffles_doubles, kOne, kThreads),
    PROBE(votes, kOne, kThreads),
    PROBE(votes_of_some, kOne, kThreads),
    PROBE(sums_of_a_warp, kOne, kThreads),
    PROBE(barriers_with_predicate, kOne, kThreads),
    PROBE(atomics, kOne, kThreads),
    PROBE(vectors, kOne, kThreads),
    PROBE(halves, kOne, kThreads),
    PROBE(bfloats, kOne, kThreads),
    PROBE(block_of_part_of_a_warp, kOne, dim3(48)),
};

}  // namespace

PYEXT_PROBES(language)
