// One kernel per function of csrc/cuda/instructions.h, for tests/ops/test_cuda_instructions.py.
#include <cuda/instructions.h>
#include <cuda/launch.h>
#include <cuda/mma.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "guarded.h"

namespace {

template <typename T>
__device__ uint32_t neighbours(const T* x, int stride) {
  const T pair[2] = {x[0], x[stride]};
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

// d (16, 8) += a (16, 16) b (16, 8), all row by row; one warp.
template <typename T>
__global__ void multiply(const T* a, const T* b, float* d) {
  const pyext::cuda::MmaLayout layout(threadIdx.x);
  uint32_t left[4];
  uint32_t right[2];
  float sum[4];
  for (int r = 0; r < 4; ++r) left[r] = neighbours(a + layout.a_row(r) * 16 + layout.a_k(r), 1);
  for (int r = 0; r < 2; ++r) right[r] = neighbours(b + layout.b_k(r) * 8 + layout.b_column(), 8);
  for (int r = 0; r < 4; ++r) sum[r] = d[layout.d_row(r) * 8 + layout.d_column(r)];
  pyext::cuda::mma_16x8x16<T>(sum, left, right);
  for (int r = 0; r < 4; ++r) d[layout.d_row(r) * 8 + layout.d_column(r)] = sum[r];
}

__global__ void raise(const float* x, float* powers) {
  powers[threadIdx.x] = pyext::cuda::exp2_flushed(x[threadIdx.x]);
}

// Lane i copies the first i / 2 of its 16 bytes.
__global__ void copy(const unsigned char* x, unsigned char* copies) {
  unsigned char* own = pyext::cuda::dynamic_shared() + threadIdx.x * 16;
  pyext::cuda::copy_to_shared(own, x + threadIdx.x * 16, static_cast<int>(threadIdx.x / 2));
  pyext::cuda::wait_for_copies();
  for (int i = 0; i < 16; ++i) copies[threadIdx.x * 16 + i] = own[i];
}

template <typename T>
const char* run(const void* a, const void* b, float* d) {
  return guarded([&] {
    pyext::cuda::launch("multiply", multiply<T>, dim3(1), 32, 0, nullptr, static_cast<const T*>(a),
                        static_cast<const T*>(b), d);
  });
}

}  // namespace

extern "C" {

const char* multiply_bfloat16(const void* a, const void* b, float* d) { return run<__nv_bfloat16>(a, b, d); }
const char* raise_two(const float* x, float* powers) {
  return guarded([&] { pyext::cuda::launch("raise", raise, dim3(1), 32, 0, nullptr, x, powers); });
}
const char* copy_bytes(const unsigned char* x, unsigned char* copies) {
  return guarded([&] { pyext::cuda::launch("copy", copy, dim3(1), 32, 32 * 16, nullptr, x, copies); });
}
const char* multiply_float16(const void* a, const void* b, float* d) { return run<__half>(a, b, d); }
}
