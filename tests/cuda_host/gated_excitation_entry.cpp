// The launchers of gated_excitation for ctypes. Each function returns a message, or null where all went well.
#include "cuda/gated_excitation.h"

#include <exception>
#include <string>

#include "cuda/launch.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace ge = pyext::gated_excitation;

namespace {

template <typename Function>
const char* guarded(Function function) {
  static std::string message;
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

void returns_early(float* out) {
  if (threadIdx.x == 33) return;
  __syncthreads();
  out[threadIdx.x] = 1.f;
}

void shuffles_alone(float* out) {
  if (threadIdx.x != 5) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.f, 1);
}

void races(float* out) {
  out[threadIdx.x] = static_cast<float>(threadIdx.x + 100 * blockIdx.x);
  out[64 + threadIdx.x] = out[(threadIdx.x + 1) % 64];
}

void misaligns(float* out) {
  struct alignas(16) Four {
    float at[4];
  };
  *pyext::cuda::vector_at<Four>(out + 4 + threadIdx.x / 40) = Four{};
}

void shuffles_twice(float* out) {
  const float down = __shfl_down_sync(0xffffffffu, static_cast<float>(threadIdx.x), 3);
  out[threadIdx.x] = down + 1000.f * __shfl_xor_sync(0xffffffffu, static_cast<float>(threadIdx.x), 5);
}

}  // namespace

extern "C" {

void set_shared_memory_limit(size_t bytes) { pyext::cuda::shared_memory_limit_setting() = bytes; }

void set_descending_threads(int descending) { cuda_host::Block::descending() = descending != 0; }

const char* forward_workspace_bytes(const ge::Inputs* inputs, int save, size_t* bytes) {
  return guarded([&] { *bytes = ge::forward_workspace_bytes(*inputs, save != 0); });
}

const char* forward(const ge::Inputs* inputs, int save, const ge::ImageTensor* out, const ge::Saved* saved,
                    void* workspace) {
  return guarded([&] { ge::forward(*inputs, save != 0, *out, *saved, workspace, nullptr); });
}

const char* backward_workspace_bytes(const ge::Inputs* inputs, size_t* bytes) {
  return guarded([&] { *bytes = ge::backward_workspace_bytes(*inputs); });
}

const char* backward(const ge::Inputs* inputs, const ge::ImageTensor* grad_out, const ge::Saved* saved,
                     const ge::ImageTensor* grad_u, float* grad_parameters, void* workspace) {
  return guarded([&] { ge::backward(*inputs, *grad_out, *saved, *grad_u, grad_parameters, workspace, nullptr); });
}

// The shim's own tests.
const char* run_probe(int which, float* out) {
  void (*const probes[])(float*) = {returns_early, shuffles_alone, shuffles_twice, races, misaligns};
  const char* const names[] = {"returns_early", "shuffles_alone", "shuffles_twice", "races", "misaligns"};
  return guarded([&] { pyext::cuda::launch(names[which], probes[which], dim3(2), 64, 0, nullptr, out); });
}

void convert(const float* in, uint16_t* half, uint16_t* bfloat, float* from_half, float* from_bfloat, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    half[i] = __float2half(in[i]).bits;
    bfloat[i] = __float2bfloat16(in[i]).bits;
    from_half[i] = __half2float(__half{half[i]});
    from_bfloat[i] = __bfloat162float(__nv_bfloat16{bfloat[i]});
  }
}

}  // extern "C"
