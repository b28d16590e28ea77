// The launchers of gated_excitation for ctypes.
#include "cuda/gated_excitation.h"

#include "cuda/launch.h"
#include "guarded.h"

namespace ge = pyext::gated_excitation;

extern "C" {

void set_shared_memory_limit(size_t bytes) { pyext::cuda::shared_memory_limit_setting() = bytes; }

const char* gated_excitation_forward_workspace_bytes(const ge::Inputs* inputs, int save, size_t* bytes) {
  return guarded([&] { *bytes = ge::forward_workspace_bytes(*inputs, save != 0); });
}

const char* gated_excitation_forward(const ge::Inputs* inputs, int save, const ge::ImageTensor* out,
                                     const ge::Saved* saved, void* workspace) {
  return guarded([&] { ge::forward(*inputs, save != 0, *out, *saved, workspace, nullptr); });
}

const char* gated_excitation_backward_workspace_bytes(const ge::Inputs* inputs, size_t* bytes) {
  return guarded([&] { *bytes = ge::backward_workspace_bytes(*inputs); });
}

const char* gated_excitation_backward(const ge::Inputs* inputs, const ge::ImageTensor* grad_out, const ge::Saved* saved,
                                      const ge::ImageTensor* grad_u, float* grad_parameters, void* workspace) {
  return guarded([&] { ge::backward(*inputs, *grad_out, *saved, *grad_u, grad_parameters, workspace, nullptr); });
}
}
