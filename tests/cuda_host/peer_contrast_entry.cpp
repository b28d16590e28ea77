// The launchers of peer_contrast for ctypes.
#include "cuda/peer_contrast.h"

#include "guarded.h"

namespace pc = pyext::peer_contrast;

extern "C" {

const char* peer_contrast_forward_workspace_bytes(const pc::Inputs* inputs, size_t* bytes) {
  return guarded([&] { *bytes = pc::forward_workspace_bytes(*inputs); });
}

const char* peer_contrast_forward(const pc::Inputs* inputs, float* terms, float* normalisers, void* workspace) {
  return guarded([&] { pc::forward(*inputs, terms, normalisers, workspace, nullptr); });
}

const char* peer_contrast_backward_workspace_bytes(const pc::Inputs* inputs, size_t* bytes) {
  return guarded([&] { *bytes = pc::backward_workspace_bytes(*inputs); });
}

const char* peer_contrast_backward(const pc::Inputs* inputs, const float* normalisers, const float* grad_terms,
                                   void* grad_embeddings, void* workspace) {
  return guarded([&] { pc::backward(*inputs, normalisers, grad_terms, grad_embeddings, workspace, nullptr); });
}
}
