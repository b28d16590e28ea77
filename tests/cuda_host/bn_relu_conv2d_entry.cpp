// The launchers of bn_relu_conv2d for ctypes.
#include "cuda/bn_relu_conv2d.h"

#include "guarded.h"

namespace bc = pyext::bn_relu_conv2d;

extern "C" {

const char* bn_relu_conv2d_workspace_bytes(const bc::Call* call, size_t (*bytes)[3]) {
  return guarded([&] {
    (*bytes)[0] = bc::statistics_workspace_bytes(call->sizes);
    (*bytes)[1] = bc::forward_workspace_bytes(call->sizes);
    (*bytes)[2] = bc::backward_workspace_bytes(call->sizes);
  });
}

const char* bn_relu_conv2d_statistics(const bc::Call* call, float* mean, float* var, void* workspace) {
  return guarded([&] { bc::statistics(call->dtype, call->sizes, call->x, mean, var, workspace, nullptr); });
}

const char* bn_relu_conv2d_forward(const bc::Call* call, void* out, void* workspace) {
  return guarded([&] { bc::forward(*call, out, workspace, nullptr); });
}

const char* bn_relu_conv2d_backward(const bc::Call* call, const bc::ImageTensor* grad_out,
                                    const bc::Gradients* gradients, void* workspace) {
  return guarded([&] { bc::backward(*call, *grad_out, *gradients, workspace, nullptr); });
}
}
