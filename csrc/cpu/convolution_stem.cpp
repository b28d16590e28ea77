// convolution_stem on the CPU: checks that memory safety needs, allocation, dispatch to an instruction set.
#include "cpu/convolution_stem.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "checks/shape.h"
#include "cpu/capability.h"
#include "cpu/host.h"
#include "cpu/tensors.h"

namespace pyext::cpu {
namespace {

using namespace convolution_stem;

const ConvolutionStemKernels& kernels() {
#if defined(__x86_64__)
  return select(baseline::convolution_stem_kernels, avx2::convolution_stem_kernels, avx512::convolution_stem_kernels);
#else
  return baseline::convolution_stem_kernels;
#endif
}

Tensor forward(const Tensor& x, const std::vector<Tensor>& tensors, int64_t stride, double eps) {
  ConvolutionStem args{};
  const std::optional<DType> dtype = dtype_of(x.scalar_type());
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && dtype.has_value(),
                  "convolution_stem: x must be a CPU tensor (N, C, H, W) of float32, float64, bfloat16 or float16");
  const int64_t count = static_cast<int64_t>(tensors.size());
  Sizes& s = args.sizes = {x.size(0), x.size(1), x.size(2), x.size(3), count / kNumTensors, stride};
  STD_TORCH_CHECK(count > 0 && count % kNumTensors == 0, "convolution_stem: ", count, " tensors, expected ",
                  static_cast<int>(kNumTensors), " for each layer, at least one");
  STD_TORCH_CHECK(s.channels > 0 && s.height > 0 && s.width > 0,
                  "convolution_stem: x is empty, expected at least one channel and position");
  STD_TORCH_CHECK(stride == 1 || stride == 2, "convolution_stem: stride is ", stride, ", expected 1 or 2");
  STD_TORCH_CHECK(eps >= 0, "convolution_stem: eps is ", eps, ", expected at least 0");
  args.dtype = *dtype;
  args.eps = eps;
  args.x = map_of(x);
  std::vector<int64_t> outputs;
  std::vector<const void*> data;
  std::vector<DType> dtypes;
  Contiguous contiguous;
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& tensor = tensors[i];
    const int index = static_cast<int>(i % kNumTensors);
    const int64_t inputs = outputs.empty() ? s.channels : outputs.back();
    if (index == kConvWeight) {
      check_shape(tensor, tensor_shape(index, inputs, tensor.dim() > 0 ? tensor.size(0) : 0), "convolution_stem",
                  "tensors", i);
      STD_TORCH_CHECK(tensor.size(0) > 0, "convolution_stem: tensors[", i, "] has no output channel");
      outputs.push_back(tensor.size(0));
    } else {
      check_shape(tensor, tensor_shape(index, inputs, outputs.back()), "convolution_stem", "tensors", i);
    }
    const std::optional<DType> found = dtype_of(tensor.scalar_type());
    STD_TORCH_CHECK(tensor.is_cpu(), "convolution_stem: tensors[", i, "] is not on the CPU");
    STD_TORCH_CHECK(found == dtype || (found == DType::kFloat && args.dtype != DType::kDouble),
                    "convolution_stem: tensors[", i, "] has another dtype than x or float32");
    data.push_back(contiguous.data(tensor));
    dtypes.push_back(*found);
  }
  args.outputs = outputs.data();
  args.tensors = data.data();
  args.tensor_dtypes = dtypes.data();
  const Tensor out = torch::stable::new_empty(x, {s.batch, outputs.back(), s.out_height(), s.out_width()});
  args.out = map_of(out);
  CallMemory memory;
  const Host host = memory.host();
  memory.run_images(s.batch, [&] { kernels().forward(args, host); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) { m.impl("convolution_stem", TORCH_BOX(&forward)); }

}  // namespace pyext::cpu
