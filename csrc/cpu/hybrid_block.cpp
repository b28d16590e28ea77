// hybrid_block on the CPU: checks that memory safety needs, allocation, dispatch to an instruction set.
#include "cpu/hybrid_block.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/capability.h"
#include "cpu/host.h"
#include "cpu/tensors.h"

namespace pyext::cpu {
namespace {

using hybrid_block::kNumTensors;
using hybrid_block::Sizes;
using hybrid_block::tensor_numel;

constexpr size_t kNumExtents = 8;

// `extents`: modules, squeeze, growth, groups, attention, forget, stride, dense.
Sizes sizes_of(const Tensor& x, const std::vector<int64_t>& extents) {
  STD_TORCH_CHECK(x.dim() == 4, "hybrid_block: x has ", x.dim(), " dimensions, expected (N, C, H, W)");
  STD_TORCH_CHECK(extents.size() == kNumExtents, "hybrid_block: ", extents.size(), " extents, expected ",
                  static_cast<int>(kNumExtents));
  for (size_t i = 0; i + 1 < kNumExtents; ++i)
    STD_TORCH_CHECK(extents[i] > 0, "hybrid_block: extents must be positive");
  const Sizes s{x.size(0),  x.size(1),  x.size(2),  x.size(3),  extents[0], extents[1],
                extents[2], extents[3], extents[4], extents[5], extents[6], extents[7] != 0};
  STD_TORCH_CHECK(s.channels > 0 && s.positions() > 0,
                  "hybrid_block: x is empty, expected at least one channel and position");
  STD_TORCH_CHECK(s.squeeze % s.groups == 0 && s.growth % s.groups == 0,
                  "hybrid_block: squeeze and growth must be multiples of groups");
  STD_TORCH_CHECK(s.stride <= 2 && (s.dense ? s.stride == 1 : s.modules == 1),
                  "hybrid_block: a dense block has stride 1; another has one module and a stride of 1 or 2");
  return s;
}

const HybridBlockKernels& kernels() {
#if defined(__x86_64__)
  return select(baseline::hybrid_block_kernels, avx2::hybrid_block_kernels, avx512::hybrid_block_kernels);
#else
  return baseline::hybrid_block_kernels;
#endif
}

Tensor forward(const Tensor& x, const std::vector<Tensor>& tensors, const std::vector<int64_t>& extents, double eps) {
  HybridBlock args{};
  const Sizes& s = args.sizes = sizes_of(x, extents);
  const std::optional<DType> dtype = dtype_of(x.scalar_type());
  STD_TORCH_CHECK(x.is_cpu() && dtype.has_value(),
                  "hybrid_block: x must be a CPU tensor of float32, float64, bfloat16 or float16");
  STD_TORCH_CHECK(eps >= 0, "hybrid_block: eps is ", eps, ", expected at least 0");
  args.dtype = *dtype;
  args.eps = eps;
  args.x = map_of(x);
  STD_TORCH_CHECK(static_cast<int64_t>(tensors.size()) == s.modules * kNumTensors, "hybrid_block: ", tensors.size(),
                  " tensors, expected ", s.modules * kNumTensors);
  std::vector<const void*> data;
  std::vector<DType> dtypes;
  std::vector<Tensor> copies;  // of the few that are not contiguous
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    const int64_t numel = tensor_numel(static_cast<int>(i % kNumTensors), s, static_cast<int64_t>(i / kNumTensors));
    const std::optional<DType> found = dtype_of(tensor.scalar_type());
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == numel, "hybrid_block: tensors[", i, "] has ", tensor.numel(),
                    " elements, expected ", numel, " on the CPU");
    STD_TORCH_CHECK(found == dtype || (found == DType::kFloat && args.dtype != DType::kDouble),
                    "hybrid_block: tensors[", i, "] has another dtype than x or float32");
    if (!tensor.is_contiguous()) copies.push_back(torch::stable::contiguous(tensor));
    data.push_back(tensor.is_contiguous() ? tensor.data_ptr() : copies.back().data_ptr());
    dtypes.push_back(*found);
  }
  args.tensors = data.data();
  args.tensor_dtypes = dtypes.data();
  const Tensor out = torch::stable::new_empty(x, {s.batch, s.out_channels(), s.out_height(), s.out_width()});
  args.out = map_of(out);
  CallMemory memory;
  kernels().forward(args, memory.host());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) { m.impl("hybrid_block", TORCH_BOX(&forward)); }

}  // namespace pyext::cpu
