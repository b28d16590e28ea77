// Kernels with one fault each, which the shim must report, and beside each a twin without it, which must pass.
// tests/ops/test_cuda_host_faults.py holds what is to be reported.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "probes.h"

namespace {

constexpr unsigned kFull = 0xffffffffu;

__device__ float* shared_floats() { return reinterpret_cast<float*>(pyext::cuda::dynamic_shared()); }

__global__ void exits_before_barrier(float* out, const float*) {
  if (threadIdx.x == 33) return;
  __syncthreads();
  out[threadIdx.x] = 1.f;
}

__global__ void exits_after_barrier(float* out, const float*) {
  out[threadIdx.x] = 1.f;
  __syncthreads();
  if (threadIdx.x == 33) return;
  out[threadIdx.x] = 2.f;
}

__global__ void exits_before_shuffle(float* out, const float*) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(kFull, 1.f, 1);
}

__global__ void shuffles_without_whom_exits(float* out, const float*) {
  out[threadIdx.x] = 1.f;
  if (threadIdx.x % 32 >= 16) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.f, 1);
}

__global__ void shuffles_from_who_exited(float* out, const float*) {
  if (threadIdx.x % 32 >= 16) return;
  out[threadIdx.x] = __shfl_sync(0xffffu, 1.f, 16);
}

__global__ void diverges_at_barrier(float* out, const float*) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = 1.f;
}

__global__ void diverges_in_kind_of_barrier(float* out, const float*) {
  out[threadIdx.x] = threadIdx.x < 32 ? __syncthreads_or(1) : __syncthreads_count(1);
}

__global__ void diverges_in_mask(float* out, const float*) {
  out[threadIdx.x] = __shfl_xor_sync(threadIdx.x == 3 ? 0xffffu : kFull, 1.f, 1);
}

__global__ void meets_by_halves(float* out, const float*) {
  const unsigned half = threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u;
  out[threadIdx.x] = 1.f;
  if (threadIdx.x % 32 < 16) {
    out[threadIdx.x] = __shfl_xor_sync(half, 1.f, 1);
  } else {
    __syncwarp(half);
  }
}

// 64 floats of shared memory; thread t writes float t + `beyond`.
__device__ void fill_shared(float* out, int beyond) {
  float* shared = shared_floats();
  shared[threadIdx.x + beyond] = 1.f;
  out[threadIdx.x] = 1.f;
}
__global__ void shared_one_past_end(float* out, const float*) { fill_shared(out, 1); }
__global__ void shared_far_past_end(float* out, const float*) { fill_shared(out, 1 << 20); }
__global__ void shared_to_the_end(float* out, const float*) { fill_shared(out, 0); }

__device__ void fill_static(float* out, int beyond) {
  __shared__ float shared[2][32];
  shared[threadIdx.x / 32][threadIdx.x % 32 + beyond] = 1.f;
  __syncthreads();
  out[threadIdx.x] = shared[1 - threadIdx.x / 32][threadIdx.x % 32];
}
__global__ void static_shared_past_row(float* out, const float*) { fill_static(out, 1); }
__global__ void static_shared_to_the_end(float* out, const float*) { fill_static(out, 0); }

__global__ void static_shared_far_past_end(float* out, const float*) {
  __shared__ float shared[64];
  float* volatile hidden_from_compiler = shared;
  hidden_from_compiler[(1 << 14) + threadIdx.x] = 1.f;
  out[threadIdx.x] = 1.f;
}

// Two arrays, of which the lower one is walked past its end, towards the other.
template <int kBeyond>
__device__ void walks_static(float* out) {
  __shared__ float first[64];
  __shared__ float second[64];
  first[threadIdx.x] = 1.f;
  second[threadIdx.x] = 1.f;
  __syncthreads();
  const float* volatile lower = &first[0] < &second[0] ? first : second;
  out[threadIdx.x] = lower[threadIdx.x + kBeyond];
}
__global__ void static_shared_into_neighbour(float* out, const float*) { walks_static<32>(out); }
__global__ void static_shared_beside_neighbour(float* out, const float*) { walks_static<0>(out); }

__device__ void copy_from(float* out, const float* in, int64_t beyond) {
  out[threadIdx.x] = in[static_cast<int64_t>(threadIdx.x) + beyond];
}
__global__ void reads_one_past_end(float* out, const float* in) { copy_from(out, in, 1); }
__global__ void reads_one_before(float* out, const float* in) { copy_from(out, in, -1); }
__global__ void reads_far_past_end(float* out, const float* in) { copy_from(out, in, int64_t{1} << 40); }
__global__ void writes_far_past_end(float* out, const float*) { out[threadIdx.x + (int64_t{1} << 40)] = 1.f; }
__global__ void writes_one_past_end(float* out, const float*) { out[threadIdx.x + 1] = 1.f; }
__global__ void writes_an_input(float* out, const float* in) {
  out[threadIdx.x] = in[threadIdx.x];
  const_cast<float*>(in)[threadIdx.x] = 1.f;
}
__global__ void reads_and_writes_all(float* out, const float* in) { copy_from(out, in, 0); }

__global__ void reads_past_local_array(float* out, const float* in) {
  float values[4];
  for (int i = 0; i < 4; ++i) values[i] = in[i];
  out[threadIdx.x] = values[threadIdx.x / 15];
}

__global__ void misaligned_vector(float* out, const float*) {
  if (threadIdx.x == 40) *reinterpret_cast<float4*>(out + 5) = make_float4(0.f, 0.f, 0.f, 0.f);
}

// Shared memory with something in it that every thread may read.
__device__ float* filled_shared() {
  float* shared = shared_floats();
  shared[threadIdx.x] = 0.f;
  __syncthreads();
  return shared;
}

// In every pair, threads of different warps meet in shared memory; kOrdered is the twin.
template <bool kOrdered>
__device__ void neighbours(float* out) {
  float* shared = filled_shared();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (kOrdered) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 32) % 64];
}
__global__ void shared_race(float* out, const float*) { neighbours<false>(out); }
__global__ void shared_without_race(float* out, const float*) { neighbours<true>(out); }

template <bool kOrdered>
__device__ void overwrites(float* out) {
  float* shared = shared_floats();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  const float neighbour = shared[(threadIdx.x + 1) % 64];
  if (kOrdered) __syncthreads();
  shared[threadIdx.x] = neighbour;
  out[threadIdx.x] = neighbour;
}
__global__ void shared_write_after_read_race(float* out, const float*) { overwrites<false>(out); }
__global__ void shared_write_after_read_in_order(float* out, const float*) { overwrites<true>(out); }

__global__ void shared_write_write_race(float* out, const float*) {
  shared_floats()[threadIdx.x / 2] = 1.f;
  out[threadIdx.x] = 1.f;
}

// Halves of one word belong to different threads: no race.
__global__ void shared_halves_of_a_word(float* out, const float*) {
  __nv_bfloat16* shared = reinterpret_cast<__nv_bfloat16*>(shared_floats());
  shared[threadIdx.x] = __float2bfloat16(1.f);
  __syncthreads();
  out[threadIdx.x] = __bfloat162float(shared[threadIdx.x ^ 1]);
}

template <bool kOrdered>
__device__ void warp_tree(float* out, const float* in) {
  float* shared = filled_shared();
  shared[threadIdx.x] = in[threadIdx.x];
  const unsigned lane = threadIdx.x % 32;
  for (unsigned half = 16; half > 0; half /= 2) {
    if (kOrdered) __syncwarp();
    const float other = lane < half ? shared[threadIdx.x + half] : 0.f;
    if (kOrdered) __syncwarp();
    shared[threadIdx.x] += other;
  }
  out[threadIdx.x] = shared[threadIdx.x];
}
__global__ void warp_tree_without_syncwarp(float* out, const float* in) { warp_tree<false>(out, in); }
__global__ void warp_tree_with_syncwarp(float* out, const float* in) { warp_tree<true>(out, in); }

// A shuffle meets a warp, but orders no memory.
__global__ void shuffle_as_barrier(float* out, const float* in) {
  float* shared = shared_floats();
  shared[threadIdx.x] = in[threadIdx.x];
  const float own = __shfl_sync(kFull, 1.f, 0);
  out[threadIdx.x] = own * shared[threadIdx.x ^ 1];
}

// Lanes 0 to 15 are synchronised, but lane 0 reads what lane 16 wrote.
template <bool kOrdered>
__device__ void half_warp(float* out) {
  float* shared = filled_shared();
  shared[threadIdx.x] = 1.f;
  __syncwarp(threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u);
  out[threadIdx.x] = shared[threadIdx.x ^ (kOrdered ? 8 : 16)];
}
__global__ void half_warp_reads_other_half(float* out, const float*) { half_warp<false>(out); }
__global__ void half_warp_reads_itself(float* out, const float*) { half_warp<true>(out); }

// Lane 0 hands on to lane 1 what lane 2 gave it: order passes from hand to hand.
__global__ void order_from_hand_to_hand(float* out, const float*) {
  float* shared = shared_floats();
  out[threadIdx.x] = 1.f;
  if (threadIdx.x == 2) shared[0] = 1.f;
  if (threadIdx.x == 0 || threadIdx.x == 2) __syncwarp(5);
  if (threadIdx.x == 0 || threadIdx.x == 1) __syncwarp(3);
  if (threadIdx.x == 1) out[1] = shared[0];
}

__global__ void global_race_in_a_block(float* out, const float*) {
  out[threadIdx.x] = 1.f;
  if (threadIdx.x == 40) out[0] = 2.f;
}
__global__ void global_race_between_blocks(float* out, const float*) {
  if (threadIdx.x == 7) out[7] = static_cast<float>(blockIdx.x);
}
__global__ void global_read_races_with_other_block(float* out, const float*) {
  if (blockIdx.x == 0) out[threadIdx.x] = 1.f;
  if (blockIdx.x == 1 && threadIdx.x == 3) out[threadIdx.x + 32] = out[threadIdx.x];
}
__global__ void blocks_write_apart(float* out, const float* in) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = in[threadIdx.x];
}

enum class Order { kFull, kNoFence, kNoBarrier };

// Blocks of 16 threads write their part of `out` each, of which the last element counts the blocks that are done; the
// last of them adds it all up into out[0]. On zeros.
template <Order kOrder>
__device__ void last_block_sums(float* out) {
  __shared__ bool last;
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1.f;
  if (kOrder != Order::kNoBarrier) __syncthreads();
  if (threadIdx.x == 15) {
    if (kOrder != Order::kNoFence) __threadfence();
    last = atomicAdd(reinterpret_cast<unsigned*>(out) + kProbeFloats - 1, 1) == gridDim.x - 1;
    if (kOrder != Order::kNoFence) __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x > 0) return;
  float sum = 0.f;
  for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) sum += out[i];
  out[0] = sum;
}
__global__ void last_block_sums_up(float* out, const float*) { last_block_sums<Order::kFull>(out); }
__global__ void last_block_without_fence_race(float* out, const float*) { last_block_sums<Order::kNoFence>(out); }
__global__ void last_block_without_barrier_race(float* out, const float*) { last_block_sums<Order::kNoBarrier>(out); }

// On zeros.
__global__ void write_races_with_reading_block(float* out, const float*) {
  if (blockIdx.x == 0) out[threadIdx.x] += out[40];
  if (blockIdx.x == 1 && threadIdx.x == 3) out[40] = 1.f;
}

template <bool kOrdered>
__device__ void counts(float* out) {
  unsigned* counter = reinterpret_cast<unsigned*>(shared_floats());
  if (threadIdx.x == 0) *counter = 0;
  __syncthreads();
  if (threadIdx.x == 0) *counter = 0;
  if (kOrdered) __syncthreads();
  atomicAdd(counter, 1);
  __syncthreads();
  out[threadIdx.x] = static_cast<float>(*counter);
}
__global__ void atomic_races_with_write(float* out, const float*) { counts<false>(out); }
__global__ void atomics_in_order(float* out, const float*) { counts<true>(out); }

__global__ void read_races_with_atomics(float* out, const float*) {
  unsigned* counter = reinterpret_cast<unsigned*>(shared_floats());
  if (threadIdx.x == 0) *counter = 0;
  __syncthreads();
  atomicAdd(counter, 1);
  out[threadIdx.x] = static_cast<float>(*counter);
}

__global__ void uninitialised_shared(float* out, const float*) {
  float* shared = shared_floats();
  if (threadIdx.x != 9) shared[threadIdx.x] = 1.f;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}
__global__ void uninitialised_static_shared(float* out, const float*) {
  __shared__ float shared[64];
  if (threadIdx.x > 0) shared[threadIdx.x] = 1.f;
  __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
}
// The first block's values are not the second's.
__global__ void uninitialised_in_second_block(float* out, const float*) {
  float* shared = shared_floats();
  if (blockIdx.x == 0) shared[threadIdx.x] = 1.f;
  __syncthreads();
  if (shared[threadIdx.x] > 0.f && blockIdx.x == 0) out[threadIdx.x] = 1.f;
}
__global__ void zeros(float* out, const float*) { out[threadIdx.x] = 0.f; }
__global__ void uninitialised_output(float* out, const float*) { out[threadIdx.x] += 1.f; }
__global__ void initialised_shared(float* out, const float*) {
  __shared__ float shared[64];
  shared[threadIdx.x] = 1.f;
  __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void race_in_a_3d_block(float* out, const float*) {
  if (threadIdx.x == 1 && threadIdx.z == 1) out[0] = 1.f;
}

const dim3 kOne(1);
const dim3 kTwo(2);
const dim3 kThreads(64);
const size_t kBytes = 64 * sizeof(float);

#define PROBE(kernel, grid, threads) {#kernel, kernel, grid, threads, kBytes}
const Probe kProbes[] = {
    PROBE(exits_before_barrier, kOne, kThreads),
    PROBE(exits_after_barrier, kOne, kThreads),
    PROBE(exits_before_shuffle, kOne, kThreads),
    PROBE(shuffles_without_whom_exits, kOne, kThreads),
    PROBE(shuffles_from_who_exited, kOne, kThreads),
    PROBE(diverges_at_barrier, kOne, kThreads),
    PROBE(diverges_in_kind_of_barrier, kOne, kThreads),
    PROBE(diverges_in_mask, kOne, kThreads),
    PROBE(meets_by_halves, kOne, kThreads),
    PROBE(shared_one_past_end, kOne, kThreads),
    PROBE(shared_far_past_end, kOne, kThreads),
    PROBE(shared_to_the_end, kOne, kThreads),
    PROBE(static_shared_past_row, kOne, kThreads),
    PROBE(static_shared_far_past_end, kOne, kThreads),
    PROBE(static_shared_to_the_end, kOne, kThreads),
    PROBE(static_shared_into_neighbour, kOne, kThreads),
    PROBE(static_shared_beside_neighbour, kOne, kThreads),
    PROBE(reads_one_past_end, kOne, kThreads),
    PROBE(reads_one_before, kOne, kThreads),
    PROBE(reads_far_past_end, kOne, kThreads),
    PROBE(writes_far_past_end, kOne, kThreads),
    PROBE(writes_one_past_end, kOne, kThreads),
    PROBE(writes_an_input, kOne, kThreads),
    PROBE(reads_and_writes_all, kOne, kThreads),
    PROBE(reads_past_local_array, kOne, kThreads),
    PROBE(misaligned_vector, kOne, kThreads),
    PROBE(shared_race, kOne, kThreads),
    PROBE(shared_without_race, kOne, kThreads),
    PROBE(shared_write_after_read_race, kOne, kThreads),
    PROBE(shared_write_after_read_in_order, kOne, kThreads),
    PROBE(shared_write_write_race, kOne, kThreads),
    PROBE(shared_halves_of_a_word, kOne, kThreads),
    PROBE(warp_tree_without_syncwarp, kOne, kThreads),
    PROBE(warp_tree_with_syncwarp, kOne, kThreads),
    PROBE(shuffle_as_barrier, kOne, kThreads),
    PROBE(half_warp_reads_other_half, kOne, kThreads),
    PROBE(half_warp_reads_itself, kOne, kThreads),
    PROBE(order_from_hand_to_hand, kOne, kThreads),
    PROBE(global_race_in_a_block, kOne, kThreads),
    PROBE(global_race_between_blocks, kTwo, kThreads),
    PROBE(global_read_races_with_other_block, kTwo, dim3(32)),
    PROBE(blocks_write_apart, kTwo, dim3(32)),
    PROBE(last_block_sums_up, dim3(3), dim3(16)),
    PROBE(last_block_without_fence_race, dim3(3), dim3(16)),
    PROBE(last_block_without_barrier_race, dim3(3), dim3(16)),
    PROBE(write_races_with_reading_block, kTwo, dim3(32)),
    PROBE(zeros, kOne, kThreads),
    PROBE(atomic_races_with_write, kOne, kThreads),
    PROBE(atomics_in_order, kOne, kThreads),
    PROBE(read_races_with_atomics, kOne, kThreads),
    PROBE(uninitialised_shared, kOne, kThreads),
    PROBE(uninitialised_static_shared, kOne, kThreads),
    PROBE(uninitialised_in_second_block, kTwo, kThreads),
    PROBE(uninitialised_output, kOne, kThreads),
    PROBE(initialised_shared, kOne, kThreads),
    PROBE(race_in_a_3d_block, kOne, dim3(2, 3, 4)),
};

}  // namespace

PYEXT_PROBES(broken)
