// The launchers of memory_contrast for ctypes.
#include "cuda/memory_contrast.h"

#include "guarded.h"

namespace mc = pyext::memory_contrast;

extern "C" {

const char* memory_contrast_forward_workspace_bytes(const mc::Inputs* inputs, size_t* bytes) {
  return guarded([&] { *bytes = mc::forward_workspace_bytes(inputs->sizes); });
}

const char* memory_contrast_forward(const mc::Inputs* inputs, const int64_t* indices, int32_t* rows, float* weights,
                                    float* loss, void* workspace) {
  return guarded([&] { mc::forward(*inputs, indices, rows, weights, loss, workspace, nullptr); });
}

const char* memory_contrast_backward_workspace_bytes(const mc::Inputs* inputs, size_t* bytes) {
  return guarded([&] { *bytes = mc::backward_workspace_bytes(inputs->sizes); });
}

const char* memory_contrast_backward(const mc::Inputs* inputs, const int32_t* rows, const float* weights,
                                     const float* grad_loss, float* grad_embeddings, void* workspace) {
  return guarded([&] { mc::backward(*inputs, rows, weights, grad_loss, grad_embeddings, workspace, nullptr); });
}
}
