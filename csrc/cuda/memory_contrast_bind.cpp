// memory_contrast on CUDA: checks, allocation, the device and its stream, registration.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/memory_banks_bind.h"
#include "cuda/memory_contrast.h"

namespace pyext::memory_contrast {
namespace {

using namespace pyext::cuda;

Inputs inputs_of(const MemoryBanks& banks, const Tensor& embeddings, const Tensor& v, const Tensor& columns,
                 double temperature) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  const Sizes s{embeddings.size(0), embeddings.size(1), columns.dim() == 2 ? columns.size(1) : 0, banks.features,
                banks.rows};
  STD_TORCH_CHECK(s.peers > 1 && s.batch > 0 && s.features > 0 && s.rows > 0,
                  "memory_contrast: expected at least two peers, one image, one feature and one row");
  STD_TORCH_CHECK(on_device_of(columns, embeddings) && s.entries > 1 && columns.size(0) == s.batch,
                  "memory_contrast: indices must be of shape (batch, 1 + negatives) on the device of embeddings");
  STD_TORCH_CHECK(s.rows < kLimit && s.pairs() * s.batch < kLimit && s.features < kLimit,
                  "memory_contrast: too many rows, images or features");
  STD_TORCH_CHECK(temperature > 0, "memory_contrast: temperature is ", temperature, ", expected more than 0");
  return {s,
          banks.dtype,
          banks.data.data(),
          banks.pitch.data(),
          static_cast<const float*>(v.data_ptr()),
          static_cast<float>(temperature)};
}

std::tuple<Tensor, Tensor, Tensor> run_forward(const Tensor& embeddings, const std::vector<Tensor>& bank_list,
                                               const Tensor& indices, double temperature, std::optional<bool>) {
  const MemoryBanks banks("memory_contrast", bank_list, embeddings);
  const DeviceGuard guard(embeddings.get_device_index());
  const Tensor v = contiguous_floats(embeddings);
  const Inputs in = inputs_of(banks, embeddings, v, indices, temperature);
  const Sizes& s = in.sizes;
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, "memory_contrast: indices must be int64");
  const Tensor columns = packed(indices);
  const Tensor loss = torch::stable::new_empty(v, std::vector<int64_t>{});
  const Tensor rows = torch::stable::new_empty(v, {s.batch, s.entries}, ScalarType::Int);
  const Tensor weights = torch::stable::new_empty(v, {s.peers, s.others(), s.batch, s.entries});
  const Tensor space = workspace_like(v, forward_workspace_bytes(s));
  forward(in, static_cast<const int64_t*>(columns.data_ptr()), static_cast<int32_t*>(rows.data_ptr()),
          static_cast<float*>(weights.data_ptr()), static_cast<float*>(loss.data_ptr()), space.data_ptr(),
          stream_of(embeddings));
  return {loss, rows, weights};
}

Tensor run_backward(const Tensor& grad_loss, const Tensor& embeddings, const std::vector<Tensor>& bank_list,
                    const Tensor& rows, const Tensor& weights, double temperature) {
  const MemoryBanks banks("memory_contrast_backward", bank_list, embeddings);
  const DeviceGuard guard(embeddings.get_device_index());
  const Inputs in = inputs_of(banks, embeddings, embeddings, rows, temperature);
  const Sizes& s = in.sizes;
  STD_TORCH_CHECK(rows.is_contiguous() && rows.scalar_type() == ScalarType::Int && on_device_of(weights, embeddings) &&
                      weights.is_contiguous() && weights.scalar_type() == ScalarType::Float &&
                      weights.numel() == s.pairs() * s.batch * s.entries,
                  "memory_contrast_backward: rows or weights are not what the forward pass returned");
  STD_TORCH_CHECK(
      on_device_of(grad_loss, embeddings) && grad_loss.numel() == 1 && grad_loss.scalar_type() == ScalarType::Float,
      "memory_contrast_backward: grad_loss must be one float32 number on the device of embeddings");
  const Tensor grad = torch::stable::new_empty(weights, {s.peers, s.batch, s.features});
  const Tensor space = workspace_like(weights, backward_workspace_bytes(s));
  backward(in, static_cast<const int32_t*>(rows.data_ptr()), static_cast<const float*>(weights.data_ptr()),
           static_cast<const float*>(grad_loss.data_ptr()), static_cast<float*>(grad.data_ptr()), space.data_ptr(),
           stream_of(embeddings));
  const ScalarType type = embeddings.scalar_type();
  return type == ScalarType::Float ? grad : torch::stable::to(grad, type);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CUDA, m) {
  m.impl("memory_contrast", TORCH_BOX(&run_forward));
  m.impl("memory_contrast_backward", TORCH_BOX(&run_backward));
}

}  // namespace pyext::memory_contrast
