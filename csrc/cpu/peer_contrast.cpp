// peer_contrast on the CPU: checks that memory safety needs, allocation, dispatch to an instruction set.
#include "cpu/peer_contrast.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/capability.h"
#include "cpu/host.h"
#include "cpu/memory_banks.h"

namespace pyext::cpu {
namespace {

const PeerContrastKernels& kernels() {
#if defined(__x86_64__)
  return select(baseline::peer_contrast_kernels, avx2::peer_contrast_kernels, avx512::peer_contrast_kernels);
#else
  return baseline::peer_contrast_kernels;
#endif
}

// Both passes' arguments, and the images by class.
class Arguments {
 public:
  Arguments(const Tensor& x, const Tensor& labels, double temperature, double soft_temperature, int64_t start,
            int64_t stop) {
    const std::optional<DType> dtype = dtype_of(x.scalar_type());
    STD_TORCH_CHECK(x.dim() == 3 && x.is_cpu() && x.size(0) > 0 && x.size(2) > 0,
                    "peer_contrast: embeddings must be a CPU tensor of shape (peers, batch, features)");
    STD_TORCH_CHECK(dtype.has_value(), "peer_contrast: embeddings must be float32, float64, bfloat16 or float16");
    STD_TORCH_CHECK(
        labels.is_cpu() && labels.dim() == 1 && labels.size(0) == x.size(1) && labels.scalar_type() == ScalarType::Long,
        "peer_contrast: labels must be an int64 CPU tensor of shape (batch)");
    STD_TORCH_CHECK(
        std::isfinite(temperature) && temperature > 0 && std::isfinite(soft_temperature) && soft_temperature > 0,
        "peer_contrast: temperatures must be more than 0");
    STD_TORCH_CHECK(0 <= start && start <= stop && stop <= x.size(1), "peer_contrast: rows are not in the batch");
    STD_TORCH_CHECK(x.size(1) < (int64_t{1} << 31), "peer_contrast: too many images");
    embeddings_ = x.is_contiguous() ? x : torch::stable::contiguous(x);
    find_classes(labels);
    values.sizes = {x.size(0), x.size(1), x.size(2), start, stop};
    values.dtype = *dtype;
    values.embeddings = embeddings_.data_ptr();
    values.images = images_.data();
    values.begins = begins_.data();
    values.classes = static_cast<int64_t>(begins_.size()) - 1;
    values.temperature = temperature;
    values.soft_temperature = soft_temperature;
  }

  PeerContrast values{};

 private:
  void find_classes(const Tensor& given) {
    const Tensor labels = given.is_contiguous() ? given : torch::stable::contiguous(given);
    const int64_t* label = static_cast<const int64_t*>(labels.data_ptr());
    std::vector<std::pair<int64_t, int64_t>> sorted;
    for (int64_t r = 0; r < labels.numel(); ++r) sorted.emplace_back(label[r], r);
    std::sort(sorted.begin(), sorted.end());
    for (size_t k = 0; k < sorted.size(); ++k) {
      if (k == 0 || sorted[k].first != sorted[k - 1].first) begins_.push_back(static_cast<int64_t>(k));
      images_.push_back(sorted[k].second);
    }
    begins_.push_back(labels.numel());
  }

  Tensor embeddings_;
  std::vector<int64_t> images_, begins_;
};

std::tuple<Tensor, Tensor> forward(const Tensor& embeddings, const Tensor& labels, double temperature,
                                   double soft_temperature, int64_t start, int64_t stop) {
  Arguments arguments(embeddings, labels, temperature, soft_temperature, start, stop);
  PeerContrast& args = arguments.values;
  const auto& s = args.sizes;
  const ScalarType type = accumulate_type(embeddings.scalar_type());
  const Tensor terms = torch::stable::new_empty(embeddings, {peer_contrast::kTerms}, type);
  const Tensor normalisers = torch::stable::new_empty(embeddings, {4, s.peers, s.peers, s.batch}, type);
  args.terms = terms.data_ptr();
  args.normalisers = normalisers.data_ptr();
  CallMemory memory;
  kernels().forward(args, memory.host());
  return {terms, normalisers};
}

Tensor backward(const Tensor& grad_terms, const Tensor& embeddings, const Tensor& labels, const Tensor& normalisers,
                double temperature, double soft_temperature, int64_t start, int64_t stop) {
  Arguments arguments(embeddings, labels, temperature, soft_temperature, start, stop);
  PeerContrast& args = arguments.values;
  const auto& s = args.sizes;
  const ScalarType type = accumulate_type(embeddings.scalar_type());
  STD_TORCH_CHECK(normalisers.is_cpu() && normalisers.is_contiguous() && normalisers.scalar_type() == type &&
                      normalisers.numel() == 4 * s.pairs() * s.batch,
                  "peer_contrast_backward: normalisers is not what the forward pass returned");
  STD_TORCH_CHECK(
      grad_terms.is_cpu() && grad_terms.numel() == peer_contrast::kTerms && grad_terms.scalar_type() == type,
      "peer_contrast_backward: grad_terms must be four numbers of the terms' dtype");
  const Tensor grads = grad_terms.is_contiguous() ? grad_terms : torch::stable::contiguous(grad_terms);
  const Tensor grad = torch::stable::new_empty(embeddings, {s.peers, s.batch, s.features});
  args.normalisers = normalisers.data_ptr();
  args.grad_terms = grads.data_ptr();
  args.grad_embeddings = grad.data_ptr();
  CallMemory memory;
  kernels().backward(args, memory.host());
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("peer_contrast", TORCH_BOX(&forward));
  m.impl("peer_contrast_backward", TORCH_BOX(&backward));
}

}  // namespace pyext::cpu
