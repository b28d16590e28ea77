// hybrid_block on the CPU: checks that memory safety needs, allocation, dispatch to an instruction set.
#include "cpu/hybrid_block.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "checks/hybrid_block.h"
#include "cpu/capability.h"
#include "cpu/host.h"
#include "cpu/tensors.h"

namespace pyext::cpu {
namespace {

using hybrid_block::Sizes;

const HybridBlockKernels& kernels() {
#if defined(__x86_64__)
  if (capability() == Capability::kAvx512Bf16) return avx512_bf16::hybrid_block_kernels;
  return select(baseline::hybrid_block_kernels, avx2::hybrid_block_kernels, avx512::hybrid_block_kernels);
#else
  return baseline::hybrid_block_kernels;
#endif
}

bool is_packed(const std::vector<Tensor>& tensors) {
  constexpr size_t kFirst = hybrid_block::kConv1Weight;
  return tensors.size() > kFirst && tensors[kFirst].scalar_type() == ScalarType::Int;
}

Tensor forward(const Tensor& x, const std::vector<Tensor>& tensors, const std::vector<int64_t>& extents, double eps) {
  HybridBlock args{};
  const Sizes& s = args.sizes = hybrid_block::sizes_of(x, extents);
  const std::optional<DType> dtype = dtype_of(x.scalar_type());
  STD_TORCH_CHECK(x.is_cpu() && dtype.has_value(),
                  "hybrid_block: x must be a CPU tensor of float32, float64, bfloat16 or float16");
  args.dtype = *dtype;
  args.packed = is_packed(tensors);
  STD_TORCH_CHECK(!args.packed || args.dtype == DType::kFloat || args.dtype == DType::kBFloat16,
                  "hybrid_block: x must be float32 or bfloat16 where the convolutions' weights are packed");
  hybrid_block::check(tensors, s, eps, args.packed);
  args.eps = eps;
  args.x = map_of(x);
  std::vector<const void*> data;
  std::vector<DType> dtypes;
  Contiguous contiguous;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    STD_TORCH_CHECK(tensor.is_cpu(), "hybrid_block: tensors[", i, "] is not on the CPU");
    const bool pairs = args.packed && hybrid_block::is_convolution(static_cast<int>(i % hybrid_block::kNumTensors));
    const std::optional<DType> found = dtype_of(tensor.scalar_type());
    const bool fits = pairs ? tensor.scalar_type() == ScalarType::Int
                            : found == dtype || (found == DType::kFloat && args.dtype != DType::kDouble);
    STD_TORCH_CHECK(fits, "hybrid_block: tensors[", i, "] has another dtype than ",
                    pairs ? "the first weight" : "x or float32");
    data.push_back(contiguous.data(tensor));
    dtypes.push_back(found.value_or(args.dtype));
  }
  args.tensors = data.data();
  args.tensor_dtypes = dtypes.data();
  const Tensor out = torch::stable::new_empty(x, {s.batch, s.out_channels(), s.out_height(), s.out_width()});
  args.out = map_of(out);
  CallMemory memory;
  const Host host = memory.host();
  memory.run_images(s.batch, [&] { kernels().forward(args, host); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) { m.impl("hybrid_block", TORCH_BOX(&forward)); }

}  // namespace pyext::cpu
