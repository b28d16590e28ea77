// memory_contrast on the CPU: checks that memory safety needs, allocation, dispatch to an instruction set.
#include "cpu/memory_contrast.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/capability.h"
#include "cpu/host.h"
#include "cpu/memory_banks.h"

namespace pyext::cpu {
namespace {

constexpr int64_t kLimit = int64_t{1} << 31;

const MemoryContrastKernels& kernels() {
#if defined(__x86_64__)
  return select(baseline::memory_contrast_kernels, avx2::memory_contrast_kernels, avx512::memory_contrast_kernels);
#else
  return baseline::memory_contrast_kernels;
#endif
}

// What the indices or rows are checked against and described by; the same for both passes.
MemoryContrast arguments(const MemoryBanks& banks, const Tensor& embeddings, const Tensor& columns,
                         double temperature) {
  const memory_contrast::Sizes s{embeddings.size(0), embeddings.size(1), columns.dim() == 2 ? columns.size(1) : 0,
                                 banks.features, banks.rows};
  STD_TORCH_CHECK(s.peers > 1 && s.batch > 0 && s.features > 0 && s.rows > 0,
                  "memory_contrast: expected at least two peers, one image, one feature and one row");
  STD_TORCH_CHECK(columns.is_cpu() && s.entries > 1 && columns.size(0) == s.batch,
                  "memory_contrast: indices must be a CPU tensor of shape (batch, 1 + negatives)");
  STD_TORCH_CHECK(s.rows < kLimit && s.entries < kLimit, "memory_contrast: too many rows or indices");
  STD_TORCH_CHECK(temperature > 0, "memory_contrast: temperature is ", temperature, ", expected more than 0");
  MemoryContrast args{};
  args.sizes = s;
  args.dtype = banks.dtype;
  args.banks = banks.data.data();
  args.pitch = banks.pitch.data();
  args.temperature = temperature;
  // Once each row is read about once by somebody, the order by tiles reads the bank from memory once instead of once
  // per index; below that, sorting costs more than it saves.
  args.tiled = s.batch * s.entries >= s.rows;
  return args;
}

using Forward = std::tuple<Tensor, Tensor, Tensor>;

Forward forward(const Tensor& embeddings, const std::vector<Tensor>& bank_list, const Tensor& indices,
                double temperature, std::optional<bool> tiled) {
  const MemoryBanks banks("memory_contrast", bank_list, embeddings);
  MemoryContrast args = arguments(banks, embeddings, indices, temperature);
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, "memory_contrast: indices must be int64");
  if (tiled.has_value()) args.tiled = *tiled;
  const auto& s = args.sizes;
  const Tensor v = banks.in_accumulate_type(embeddings);
  const Tensor columns = indices.is_contiguous() ? indices : torch::stable::contiguous(indices);
  const Tensor loss = torch::stable::new_empty(v, std::vector<int64_t>{});
  const Tensor rows = torch::stable::new_empty(v, {s.batch, s.entries}, ScalarType::Int);
  const Tensor weights = torch::stable::new_empty(v, {s.peers, s.others(), s.batch, s.entries});
  args.embeddings = v.data_ptr();
  args.indices = static_cast<const int64_t*>(columns.data_ptr());
  args.rows = static_cast<int32_t*>(rows.data_ptr());
  args.weights = weights.data_ptr();
  args.loss = loss.data_ptr();
  CallMemory memory;
  STD_TORCH_CHECK(kernels().forward(args, memory.host()),
                  "memory_contrast: indices hold a number that is no row of the banks, expected 0 to ", s.rows - 1);
  return {loss, rows, weights};
}

Tensor backward(const Tensor& grad_loss, const Tensor& embeddings, const std::vector<Tensor>& bank_list,
                const Tensor& rows, const Tensor& weights, double temperature) {
  const MemoryBanks banks("memory_contrast_backward", bank_list, embeddings);
  MemoryContrast args = arguments(banks, embeddings, rows, temperature);
  const auto& s = args.sizes;
  const ScalarType type = accumulate_type(banks.type);
  STD_TORCH_CHECK(rows.is_contiguous() && rows.scalar_type() == ScalarType::Int && weights.is_cpu() &&
                      weights.is_contiguous() && weights.scalar_type() == type &&
                      weights.numel() == s.pairs() * s.batch * s.entries,
                  "memory_contrast_backward: rows or weights are not what the forward pass returned");
  STD_TORCH_CHECK(grad_loss.is_cpu() && grad_loss.numel() == 1 && grad_loss.scalar_type() == type,
                  "memory_contrast_backward: grad_loss must be one number of the loss's dtype");
  const Tensor grad = torch::stable::new_empty(embeddings, {s.peers, s.batch, s.features}, type);
  args.rows = static_cast<int32_t*>(rows.data_ptr());
  args.weights = weights.data_ptr();
  args.grad_loss = grad_loss.data_ptr();
  args.grad_embeddings = grad.data_ptr();
  CallMemory memory;
  STD_TORCH_CHECK(kernels().backward(args, memory.host()),
                  "memory_contrast_backward: rows hold a number that is no row of the banks");
  return embeddings.scalar_type() == type ? grad : torch::stable::to(grad, embeddings.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("memory_contrast", TORCH_BOX(&forward));
  m.impl("memory_contrast_backward", TORCH_BOX(&backward));
}

}  // namespace pyext::cpu
