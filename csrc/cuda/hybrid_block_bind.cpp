// hybrid_block on CUDA: checks, allocation, the device and its stream, registration.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cuda/hybrid_block.h"

namespace pyext::hybrid_block {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr size_t kNumExtents = 8;

Dtype dtype_of(ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "hybrid_block: x has a dtype without a CUDA kernel, expected float32, bfloat16 or float16");
  if (type == ScalarType::Float) return Dtype::kFloat;
  return type == ScalarType::BFloat16 ? Dtype::kBFloat16 : Dtype::kHalf;
}

// `extents`: modules, squeeze, growth, groups, attention, forget, stride, dense.
Sizes sizes_of(const Tensor& x, const std::vector<int64_t>& extents) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cuda(), "hybrid_block: x must be a CUDA tensor of shape (N, C, H, W)");
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

// All modules' tensors in the one dtype that the kernels take: x's, or float32 where a tensor has that.
class ModuleTensors {
 public:
  ModuleTensors(const Tensor& x, const std::vector<Tensor>& tensors, const Sizes& s) {
    STD_TORCH_CHECK(static_cast<int64_t>(tensors.size()) == s.modules * kNumTensors, "hybrid_block: ", tensors.size(),
                    " tensors, expected ", s.modules * kNumTensors);
    dtype = x.scalar_type();
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& tensor = tensors[i];
      const int64_t numel = tensor_numel(static_cast<int>(i % kNumTensors), s, static_cast<int64_t>(i / kNumTensors));
      const ScalarType type = tensor.scalar_type();
      STD_TORCH_CHECK(tensor.numel() == numel && tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(),
                      "hybrid_block: tensors[", i, "] has ", tensor.numel(), " elements, expected ", numel,
                      " on the device of x");
      STD_TORCH_CHECK(type == x.scalar_type() || type == ScalarType::Float, "hybrid_block: tensors[", i,
                      "] has another dtype than x or float32");
      if (type == ScalarType::Float) dtype = type;
    }
    for (const Tensor& tensor : tensors) {
      Tensor owned = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
      if (owned.scalar_type() != dtype) owned = torch::stable::to(owned, dtype);
      owned_.push_back(owned);
      data.push_back(owned.data_ptr());
    }
  }

  ScalarType dtype;
  std::vector<const void*> data;

 private:
  std::vector<Tensor> owned_;
};

Tensor run(const Tensor& x, const std::vector<Tensor>& tensors, const std::vector<int64_t>& extents, double eps) {
  const Sizes s = sizes_of(x, extents);
  const Dtype dtype = dtype_of(x.scalar_type());
  const DeviceGuard guard(x.get_device_index());
  const ModuleTensors modules(x, tensors, s);
  Tensor out = torch::stable::new_empty(x, {s.batch, s.out_channels(), s.out_height(), s.out_width()});
  if (s.batch == 0) return out;
  if (s.dense) {
    Tensor prefix = torch::stable::narrow(out, 1, 0, s.channels);
    torch::stable::copy_(prefix, x);
  }
  const Block block{dtype,
                    dtype_of(modules.dtype),
                    s,
                    {x.data_ptr(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}},
                    modules.data.data(),
                    static_cast<float>(eps)};
  const Tensor workspace =
      torch::stable::new_empty(x, {static_cast<int64_t>(workspace_bytes(block))}, ScalarType::Byte);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  forward(block, out.data_ptr(), workspace.data_ptr(), static_cast<cudaStream_t>(stream));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CUDA, m) { m.impl("hybrid_block", TORCH_BOX(&run)); }

}  // namespace pyext::hybrid_block
