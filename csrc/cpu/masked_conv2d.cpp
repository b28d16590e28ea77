// masked_conv2d on the CPU: checks that memory safety needs, allocation, dispatch to an instruction set.
#include "cpu/masked_conv2d.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "checks/masked_conv2d.h"
#include "cpu/capability.h"
#include "cpu/host.h"
#include "cpu/tensors.h"

namespace pyext::cpu {
namespace {

using masked_conv2d::kNumbers;
using masked_conv2d::Sizes;
using OptionalTensor = std::optional<Tensor>;

const MaskedConv2dKernels& kernels() {
#if defined(__x86_64__)
  return select(baseline::masked_conv2d_kernels, avx2::masked_conv2d_kernels, avx512::masked_conv2d_kernels);
#else
  return baseline::masked_conv2d_kernels;
#endif
}

bool is_list(const int64_t* list, int64_t longest, int64_t channels) {
  int64_t length = 0;
  for (int64_t previous = -1; length < longest && list[length] != -1; previous = list[length++]) {
    if (list[length] <= previous || list[length] >= channels) return false;
  }
  return length > 0 && std::all_of(list + length, list + longest, [](int64_t absent) { return absent == -1; });
}

// A call's arguments, and copies of those that are not contiguous.
class Inputs {
 public:
  // To pack the weight.
  Inputs(const Tensor& weight, const Tensor& inputs, const Tensor& outputs, int64_t groups) {
    args.sizes = masked_conv2d::layer_sizes(weight, inputs, outputs, groups);
    args.dtype = args.parameter_dtype = float_type(weight, "weight");
    set_layer(weight, inputs, outputs);
  }

  // To run it.
  Inputs(const Tensor& x, const Tensor& weight, const Tensor& inputs, const Tensor& outputs,
         const std::vector<int64_t>& numbers, int64_t pool) {
    args.sizes = masked_conv2d::sizes_of(x, weight, inputs, outputs, numbers, pool);
    args.dtype = float_type(x, "x");
    args.parameter_dtype = float_type(weight, "weight");
    STD_TORCH_CHECK(
        args.parameter_dtype == args.dtype || (args.parameter_dtype == DType::kFloat && args.dtype != DType::kDouble),
        "masked_conv2d: weight has another dtype than x or float32");
    set_layer(weight, inputs, outputs);
    args.x = map_of(x);
  }

  // To take the mean of its maps.
  explicit Inputs(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 4, "masked_conv2d: x must be (N, C, H, W)");
    args.dtype = float_type(x, "x");
    Sizes& s = args.sizes;
    s.batch = x.size(0);
    s.subnets = 1;
    s.inputs = s.outputs = x.size(1);
    s.rows.input = x.size(2);
    s.columns.input = x.size(3);
    args.x = map_of(x);
  }

  // Of the weight's dtype.
  const void* optional(const OptionalTensor& tensor, const Shape& shape, const char* name) {
    if (!tensor.has_value()) return nullptr;
    STD_TORCH_CHECK(
        tensor->is_cpu() && has_shape(*tensor, shape) && dtype_of(tensor->scalar_type()) == args.parameter_dtype,
        "masked_conv2d: ", name, " must be a CPU tensor ", shape_text(shape.extents, shape.dims), " of weight's dtype");
    return contiguous_.data(*tensor);
  }

  const int64_t* subnets(const OptionalTensor& tensor) {
    const Sizes& s = args.sizes;
    masked_conv2d::check_subnets(tensor.has_value(), s);
    if (!tensor.has_value()) return nullptr;
    const int64_t* data = integers(*tensor, masked_conv2d::image_shape(s), "subnets");
    const auto inside = [&](int64_t subnet) { return subnet >= 0 && subnet < s.subnets; };
    STD_TORCH_CHECK(std::all_of(data, data + s.batch, inside), "masked_conv2d: subnets, expected numbers from 0 to ",
                    s.subnets - 1);
    return data;
  }

  MaskedConv2d args{};

 private:
  static DType float_type(const Tensor& tensor, const char* name) {
    const std::optional<DType> dtype = dtype_of(tensor.scalar_type());
    STD_TORCH_CHECK(tensor.is_cpu() && dtype.has_value(), "masked_conv2d: ", name,
                    " must be a CPU tensor of floating point numbers");
    return *dtype;
  }

  void set_layer(const Tensor& weight, const Tensor& inputs, const Tensor& outputs) {
    const Sizes& s = args.sizes;
    args.weight = contiguous_.data(weight);
    args.inputs = list(inputs, masked_conv2d::input_list_shape(s), s.group_inputs * s.groups, "inputs");
    args.outputs = list(outputs, masked_conv2d::output_list_shape(s), s.out_channels, "outputs");
  }

  const int64_t* integers(const Tensor& tensor, const Shape& shape, const char* name) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Long && has_shape(tensor, shape),
                    "masked_conv2d: ", name, " must be a CPU tensor ", shape_text(shape.extents, shape.dims),
                    " of int64");
    return static_cast<const int64_t*>(contiguous_.data(tensor));
  }

  const int64_t* list(const Tensor& tensor, const Shape& shape, int64_t channels, const char* name) {
    const int64_t* data = integers(tensor, shape, name);
    const int64_t longest = shape.extents[1];
    for (int64_t i = 0; i < shape.extents[0]; ++i) {
      STD_TORCH_CHECK(is_list(data + i * longest, longest, channels), "masked_conv2d: ", name,
                      ", expected ascending channels below ", channels, ", then -1");
    }
    return data;
  }

  Contiguous contiguous_;
};

// A call that is checked, with its result, not yet computed.
struct Prepared {
  Inputs inputs;
  Tensor out;
};

Prepared prepare(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& shift,
                 const Tensor& inputs, const Tensor& outputs, const OptionalTensor& subnets, const OptionalTensor& gate,
                 const std::vector<int64_t>& numbers, const OptionalTensor& packed, int64_t pool) {
  Inputs call(x, weight, inputs, outputs, numbers, pool);
  MaskedConv2d& args = call.args;
  const Sizes& s = args.sizes;
  args.image_subnets = call.subnets(subnets);
  args.scale = call.optional(scale, masked_conv2d::channel_shape(s), "scale");
  args.shift = call.optional(shift, masked_conv2d::channel_shape(s), "shift");
  args.gate = call.optional(gate, masked_conv2d::gate_shape(s), "gate");
  if (packed.has_value()) {
    STD_TORCH_CHECK(packed->is_cpu() && packed->is_contiguous() &&
                        packed->scalar_type() == accumulate_type(args.dtype) &&
                        packed->numel() == kernels().packed_numel(args),
                    "masked_conv2d: packed is not of this weight and these lists");
    args.packed = packed->data_ptr();
  }
  Tensor out = torch::stable::new_empty(x, {s.batch, s.outputs, s.out_height(), s.out_width()});
  args.out = map_of(out);
  return {std::move(call), std::move(out)};
}

Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& shift,
               const Tensor& inputs, const Tensor& outputs, const OptionalTensor& subnets, const OptionalTensor& gate,
               const std::vector<int64_t>& numbers, const OptionalTensor& packed, int64_t pool) {
  const Prepared call = prepare(x, weight, scale, shift, inputs, outputs, subnets, gate, numbers, packed, pool);
  CallMemory memory;
  if (x.size(0) > 0) kernels().forward(&call.inputs.args, 1, memory.host());
  return call.out;
}

// The mean of each channel of x: (N, C, 1, 1).
Prepared prepare_mean(const Tensor& x) {
  Inputs call(x);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), 1, 1});
  call.args.out = map_of(out);
  return {std::move(call), std::move(out)};
}

// Layers one after another, each with six tensors, of which an empty scale or shift stands for none, and its numbers
// and pool; an empty weight stands for the mean over positions. One call for all: at batch size 1 a layer takes less
// time than its call, and less than threads take to meet.
Tensor chain(const Tensor& x, const std::vector<Tensor>& tensors, const std::vector<int64_t>& numbers,
             const OptionalTensor& subnets) {
  constexpr size_t kTensors = 6;
  const size_t layers = tensors.size() / kTensors;
  STD_TORCH_CHECK(layers > 0 && tensors.size() % kTensors == 0 && numbers.size() == layers * (kNumbers + 1),
                  "masked_conv2d: a chain has ", kTensors, " tensors and ", kNumbers + 1, " numbers for each layer");
  const auto optional = [](const Tensor& tensor) {
    return tensor.numel() > 0 ? OptionalTensor(tensor) : OptionalTensor();
  };
  std::vector<Prepared> calls;
  std::vector<MaskedConv2d> args;
  for (size_t layer = 0; layer < layers; ++layer) {
    const Tensor* own = &tensors[layer * kTensors];
    const auto first = numbers.begin() + layer * (kNumbers + 1);
    const Tensor& from = layer == 0 ? x : calls.back().out;
    calls.push_back(own[0].numel() == 0
                        ? prepare_mean(from)
                        : prepare(from, own[0], optional(own[1]), optional(own[2]), own[3], own[4], subnets,
                                  std::nullopt, {first, first + kNumbers}, own[5], first[kNumbers]));
    args.push_back(calls.back().inputs.args);
  }
  const Tensor out = calls.back().out;
  if (x.size(0) == 0) return out;
  CallMemory memory;
  const Host host = memory.host();
  memory.run_images(x.size(0), [&] { kernels().forward(args.data(), layers, host); });
  return out;
}

Tensor pack(const Tensor& weight, const Tensor& inputs, const Tensor& outputs, int64_t groups) {
  const Inputs call(weight, inputs, outputs, groups);
  const Tensor packed =
      torch::stable::new_empty(weight, {kernels().packed_numel(call.args)}, accumulate_type(call.args.dtype));
  CallMemory memory;
  kernels().pack(call.args, packed.data_ptr(), memory.host());
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("masked_conv2d", TORCH_BOX(&forward));
  m.impl("masked_conv2d_chain", TORCH_BOX(&chain));
  m.impl("masked_conv2d_pack", TORCH_BOX(&pack));
}

}  // namespace pyext::cpu
