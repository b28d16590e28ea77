// peer_contrast on CUDA: checks, allocation, the device and its stream, registration.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cuda/memory_banks_bind.h"
#include "cuda/peer_contrast.h"

namespace pyext::peer_contrast {
namespace {

using namespace pyext::cuda;

// `labels` is contiguous and lives as long as what is returned.
Inputs inputs_of(const Tensor& x, const Tensor& labels, double temperature, double soft_temperature, int64_t start,
                 int64_t stop) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  STD_TORCH_CHECK(x.dim() == 3 && x.is_cuda() && x.size(0) > 0 && x.size(2) > 0,
                  "peer_contrast: embeddings must be a CUDA tensor of shape (peers, batch, features)");
  STD_TORCH_CHECK(on_device_of(labels, x) && labels.dim() == 1 && labels.size(0) == x.size(1) &&
                      labels.scalar_type() == ScalarType::Long,
                  "peer_contrast: labels must be an int64 tensor of shape (batch) on the device of embeddings");
  STD_TORCH_CHECK(temperature > 0 && soft_temperature > 0, "peer_contrast: temperatures must be more than 0");
  STD_TORCH_CHECK(0 <= start && start <= stop && stop <= x.size(1), "peer_contrast: rows are not in the batch");
  STD_TORCH_CHECK(x.size(0) < 256 && x.size(1) < kLimit && x.size(2) < kLimit,
                  "peer_contrast: too many peers, images or features");
  return {{x.size(0), x.size(1), x.size(2), start, stop},
          dtype_of(x.scalar_type(), "peer_contrast", "embeddings"),
          x.data_ptr(),
          x.stride(0),
          x.stride(1),
          x.stride(2),
          static_cast<const int64_t*>(labels.data_ptr()),
          temperature,
          soft_temperature};
}

std::tuple<Tensor, Tensor> run_forward(const Tensor& embeddings, const Tensor& labels, double temperature,
                                       double soft_temperature, int64_t start, int64_t stop) {
  const DeviceGuard guard(embeddings.get_device_index());
  const Tensor classes = packed(labels);
  const Inputs in = inputs_of(embeddings, classes, temperature, soft_temperature, start, stop);
  const Sizes& s = in.sizes;
  const Tensor terms = torch::stable::new_empty(embeddings, {kTerms}, ScalarType::Float);
  const Tensor normalisers = torch::stable::new_empty(embeddings, {4, s.peers, s.peers, s.batch}, ScalarType::Float);
  const Tensor space = workspace_like(embeddings, forward_workspace_bytes(in));
  forward(in, static_cast<float*>(terms.data_ptr()), static_cast<float*>(normalisers.data_ptr()), space.data_ptr(),
          stream_of(embeddings));
  return {terms, normalisers};
}

Tensor run_backward(const Tensor& grad_terms, const Tensor& embeddings, const Tensor& labels, const Tensor& normalisers,
                    double temperature, double soft_temperature, int64_t start, int64_t stop) {
  const DeviceGuard guard(embeddings.get_device_index());
  const Tensor classes = packed(labels);
  const Inputs in = inputs_of(embeddings, classes, temperature, soft_temperature, start, stop);
  const Sizes& s = in.sizes;
  STD_TORCH_CHECK(on_device_of(normalisers, embeddings) && normalisers.is_contiguous() &&
                      normalisers.scalar_type() == ScalarType::Float && normalisers.numel() == 4 * s.pairs() * s.batch,
                  "peer_contrast_backward: normalisers is not what the forward pass returned");
  STD_TORCH_CHECK(on_device_of(grad_terms, embeddings) && grad_terms.numel() == kTerms &&
                      grad_terms.scalar_type() == ScalarType::Float,
                  "peer_contrast_backward: grad_terms must be four float32 numbers on the device of embeddings");
  const Tensor grads = packed(grad_terms);
  const Tensor grad = torch::stable::new_empty(embeddings, {s.peers, s.batch, s.features});
  const Tensor space = workspace_like(embeddings, backward_workspace_bytes(in));
  backward(in, static_cast<const float*>(normalisers.data_ptr()), static_cast<const float*>(grads.data_ptr()),
           grad.data_ptr(), space.data_ptr(), stream_of(embeddings));
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CUDA, m) {
  m.impl("peer_contrast", TORCH_BOX(&run_forward));
  m.impl("peer_contrast_backward", TORCH_BOX(&run_backward));
}

}  // namespace pyext::peer_contrast
