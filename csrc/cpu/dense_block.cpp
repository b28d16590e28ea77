// dense_block on the CPU: checks that memory safety needs, allocation, dispatch to an instruction set.
#include "cpu/dense_block.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "checks/shape.h"
#include "cpu/capability.h"
#include "cpu/host.h"
#include "cpu/tensors.h"

namespace pyext::cpu {
namespace {

using dense_block::Sizes;

const DenseBlockKernels& kernels() {
#if defined(__x86_64__)
  return select(baseline::dense_block_kernels, avx2::dense_block_kernels, avx512::dense_block_kernels);
#else
  return baseline::dense_block_kernels;
#endif
}

// `extents`: channels, layers, squeeze, growth, transition.
Sizes sizes_of(const std::vector<int64_t>& extents) {
  STD_TORCH_CHECK(extents.size() == 5, "dense_block: ", extents.size(), " extents, expected 5");
  const Sizes s{0, extents[0], 0, 0, extents[1], extents[2], extents[3], extents[4]};
  STD_TORCH_CHECK(s.channels > 0 && s.layers >= 0 && s.squeeze >= 0 && s.growth >= 0 && s.transition >= 0,
                  "dense_block: extents must not be negative");
  STD_TORCH_CHECK(s.layers > 0 ? s.growth > 0 : s.transition > 0,
                  "dense_block: expected layers that add channels, or a transition");
  return s;
}

Tensor pack(const std::vector<Tensor>& tensors, const std::vector<int64_t>& extents, double eps) {
  const Sizes s = sizes_of(extents);
  STD_TORCH_CHECK(static_cast<int64_t>(tensors.size()) == s.tensors(), "dense_block: ", tensors.size(),
                  " tensors, expected ", s.tensors());
  STD_TORCH_CHECK(eps >= 0, "dense_block: eps is ", eps, ", expected at least 0");
  const ScalarType dtype = tensors[0].scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "dense_block: tensors must be of float32 or float64 to be packed");
  Contiguous contiguous;
  std::vector<const void*> data;
  for (int64_t i = 0; i < static_cast<int64_t>(tensors.size()); ++i) {
    const Tensor& tensor = tensors[i];
    check_shape(tensor, tensor_shape(i, s), "dense_block", "tensors", i);
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype, "dense_block: tensors[", i,
                    "] is not on the CPU or has another dtype than the first");
    data.push_back(contiguous.data(tensor));
  }
  const DenseBlockTensors args{s, *dtype_of(dtype), eps, data.data()};
  const Tensor packed = torch::stable::new_empty(tensors[0], {kernels().packed_numel(s, args.dtype)}, dtype);
  CallMemory memory;
  kernels().pack(args, packed.data_ptr(), memory.host());
  return packed;
}

Tensor forward(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& extents) {
  DenseBlock args{};
  Sizes& s = args.sizes = sizes_of(extents);
  const std::optional<DType> dtype = dtype_of(x.scalar_type());
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && dtype.has_value(),
                  "dense_block: x must be a CPU tensor (N, C, H, W) of float32, float64, bfloat16 or float16");
  s.batch = x.size(0);
  s.height = x.size(2);
  s.width = x.size(3);
  STD_TORCH_CHECK(x.size(1) == s.channels && s.out_positions() > 0,
                  "dense_block: x does not have the extents' channels, or too few positions");
  args.dtype = *dtype;
  const ScalarType wide = accumulate_type(args.dtype);
  STD_TORCH_CHECK(packed.is_cpu() && packed.is_contiguous() && packed.scalar_type() == wide &&
                      packed.numel() == kernels().packed_numel(s, *dtype_of(wide)),
                  "dense_block: packed is not of a block of these extents and x's dtype");
  args.packed = packed.data_ptr();
  args.x = map_of(x);
  const Tensor maps = torch::stable::new_empty(x, {s.batch, s.out_height(), s.out_width(), s.out_channels()});
  const Tensor out = torch::stable::transpose(torch::stable::transpose(maps, 1, 3), 2, 3);
  args.out = map_of(out);
  if (s.batch == 0) return out;
  CallMemory memory;
  const Host host = memory.host();
  memory.run_images(s.batch, [&] { kernels().forward(args, host); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("dense_block", TORCH_BOX(&forward));
  m.impl("dense_block_pack", TORCH_BOX(&pack));
}

}  // namespace pyext::cpu
