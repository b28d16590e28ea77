// The launchers of masked_conv2d for ctypes.
#include "cuda/masked_conv2d.h"

#include "guarded.h"

namespace mc = pyext::masked_conv2d;

extern "C" {

const char* masked_conv2d_forward_workspace_bytes(const mc::Inputs* inputs, size_t* bytes) {
  return guarded([&] { *bytes = mc::forward_workspace_bytes(*inputs); });
}

const char* masked_conv2d_forward(const mc::Inputs* inputs, void* out, void* workspace) {
  return guarded([&] { mc::forward(*inputs, out, workspace, nullptr); });
}

const char* masked_conv2d_backward_workspace_bytes(const mc::Inputs* inputs, const mc::Gradients* wanted,
                                                   size_t* bytes) {
  return guarded([&] { *bytes = mc::backward_workspace_bytes(*inputs, *wanted); });
}

const char* masked_conv2d_backward(const mc::Inputs* inputs, const void* grad_out, const void* out,
                                   const mc::Gradients* gradients, void* workspace) {
  return guarded([&] { mc::backward(*inputs, grad_out, out, *gradients, workspace, nullptr); });
}
}
