// hybrid_block on CUDA: checks, allocation, the device and its stream, registration.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "checks/hybrid_block.h"
#include "cuda/bind.h"
#include "cuda/hybrid_block.h"

namespace pyext::hybrid_block {
namespace {

using namespace pyext::cuda;

// All modules' tensors in the one dtype that the kernels take: x's, or float32 where a tensor has that.
class ModuleTensors {
 public:
  ModuleTensors(const Tensor& x, const std::vector<Tensor>& tensors) {
    dtype = x.scalar_type();
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& tensor = tensors[i];
      const ScalarType type = tensor.scalar_type();
      STD_TORCH_CHECK(on_device_of(tensor, x), "hybrid_block: tensors[", i, "] is not on the device of x");
      STD_TORCH_CHECK(type == x.scalar_type() || type == ScalarType::Float, "hybrid_block: tensors[", i,
                      "] has another dtype than x or float32");
      if (type == ScalarType::Float) dtype = type;
    }
    for (const Tensor& tensor : tensors) {
      Tensor owned = packed(tensor);
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
  STD_TORCH_CHECK(x.is_cuda(), "hybrid_block: x is not on a CUDA device, but another tensor is");
  const Sizes s = sizes_of(x, extents);
  check(tensors, s, eps);
  const Dtype dtype = dtype_of(x.scalar_type(), "hybrid_block", "x");
  const DeviceGuard guard(x.get_device_index());
  const ModuleTensors modules(x, tensors);
  Tensor out = torch::stable::new_empty(x, {s.batch, s.out_channels(), s.out_height(), s.out_width()});
  if (s.batch == 0) return out;
  if (s.dense) {
    Tensor prefix = torch::stable::narrow(out, 1, 0, s.channels);
    torch::stable::copy_(prefix, x);
  }
  const Block block{dtype,
                    dtype_of(modules.dtype, "hybrid_block", "tensors"),
                    s,
                    image_of(x),
                    modules.data.data(),
                    static_cast<float>(eps)};
  const Tensor workspace = workspace_like(x, workspace_bytes(block));
  forward(block, out.data_ptr(), workspace.data_ptr(), stream_of(x));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CUDA, m) { m.impl("hybrid_block", TORCH_BOX(&run)); }

}  // namespace pyext::hybrid_block
