// The launchers of memory_contrast and memory_update for ctypes. Each returns a message, or null where all went well.
#include "cuda/memory_contrast.h"

#include <exception>
#include <string>

#include "cuda/launch.h"
#include "cuda/memory_update.h"

namespace mc = pyext::memory_contrast;
namespace mu = pyext::memory_update;

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

}  // namespace

extern "C" {

void set_descending_threads(int descending) { cuda_host::Block::descending() = descending != 0; }

size_t forward_workspace_bytes(const mc::Inputs* inputs) { return mc::forward_workspace_bytes(inputs->sizes); }

size_t backward_workspace_bytes(const mc::Inputs* inputs) { return mc::backward_workspace_bytes(inputs->sizes); }

const char* forward(const mc::Inputs* inputs, const int64_t* indices, int32_t* rows, float* weights, float* loss,
                    void* workspace) {
  return guarded([&] { mc::forward(*inputs, indices, rows, weights, loss, workspace, nullptr); });
}

const char* backward(const mc::Inputs* inputs, const int32_t* rows, const float* weights, const float* grad_loss,
                     float* grad_embeddings, void* workspace) {
  return guarded([&] { mc::backward(*inputs, rows, weights, grad_loss, grad_embeddings, workspace, nullptr); });
}

const char* update(const mu::Inputs* inputs) {
  return guarded([&] { mu::update(*inputs, nullptr); });
}

}  // extern "C"
