// masked_conv2d on the CPU: checks that memory safety needs, allocation, dispatch to an instruction set.
#include "cpu/masked_conv2d.h"

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

using masked_conv2d::Activation;
using masked_conv2d::Axis;
using masked_conv2d::Sizes;
using OptionalTensor = std::optional<Tensor>;

const MaskedConv2dKernels& kernels() {
#if defined(__x86_64__)
  return select(baseline::masked_conv2d_kernels, avx2::masked_conv2d_kernels, avx512::masked_conv2d_kernels);
#else
  return baseline::masked_conv2d_kernels;
#endif
}

constexpr size_t kNumbers = 8;

bool is_list(const int64_t* list, int64_t longest, int64_t channels) {
  int64_t length = 0;
  for (int64_t previous = -1; length < longest && list[length] != -1; previous = list[length++]) {
    if (list[length] <= previous || list[length] >= channels) return false;
  }
  return length > 0 && std::all_of(list + length, list + longest, [](int64_t absent) { return absent == -1; });
}

// The arguments that both operators have, and copies of those that are not contiguous.
class Inputs {
 public:
  Inputs() = default;

  Inputs(const Tensor& weight, const Tensor& inputs, const Tensor& outputs, int64_t groups) {
    const std::optional<DType> dtype = dtype_of(weight.scalar_type());
    STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 4 && weight.numel() > 0 && dtype.has_value(),
                    "masked_conv2d: weight must be a CPU tensor (channels, inputs, k, k) of floating point numbers");
    STD_TORCH_CHECK(groups > 0 && weight.size(0) % groups == 0, "masked_conv2d: groups is ", groups,
                    ", expected a divisor of weight's channels");
    STD_TORCH_CHECK(inputs.dim() == 2 && outputs.dim() == 2 && inputs.size(0) == outputs.size(0),
                    "masked_conv2d: inputs and outputs must be lists of the same sub-networks");
    args.dtype = args.parameter_dtype = *dtype;
    Sizes& s = args.sizes;
    s.subnets = inputs.size(0);
    s.inputs = inputs.size(1);
    s.outputs = outputs.size(1);
    s.out_channels = weight.size(0);
    s.group_inputs = weight.size(1);
    s.groups = groups;
    s.pool = 1;
    s.rows.kernel = weight.size(2);
    s.columns.kernel = weight.size(3);
    args.weight = contiguous(weight).data_ptr();
    args.inputs = list(inputs, s.group_inputs * groups, "inputs");
    args.outputs = list(outputs, s.out_channels, "outputs");
  }

  void set_map(const Tensor& x) {
    const std::optional<DType> dtype = dtype_of(x.scalar_type());
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && dtype.has_value(),
                    "masked_conv2d: x must be a CPU tensor (N, C, H, W) of floating point numbers");
    args.dtype = *dtype;
    args.sizes.batch = x.size(0);
    args.x = map_of(x);
  }

  void set_maps(const Tensor& x, const std::vector<int64_t>& numbers, int64_t pool) {
    set_map(x);
    STD_TORCH_CHECK(
        args.parameter_dtype == args.dtype || (args.parameter_dtype == DType::kFloat && args.dtype != DType::kDouble),
        "masked_conv2d: weight has another dtype than x or float32");
    STD_TORCH_CHECK(numbers.size() == kNumbers && numbers[7] >= 0 && numbers[7] <= 2, "masked_conv2d: expected ",
                    kNumbers, " numbers");
    Sizes& s = args.sizes;
    STD_TORCH_CHECK(x.size(1) == s.inputs, "masked_conv2d: x does not have the channels of inputs");
    STD_TORCH_CHECK(numbers[6] == s.groups, "masked_conv2d: groups differ");
    set_axis(s.rows, x.size(2), numbers, 0);
    set_axis(s.columns, x.size(3), numbers, 1);
    s.activation = static_cast<Activation>(numbers[7]);
    s.pool = pool;
    STD_TORCH_CHECK(pool >= 1 && pool <= 2 && s.out_height() > 0 && s.out_width() > 0, "masked_conv2d: pool is ", pool,
                    ", expected 1, or 2 where the result has two rows and columns");
  }

  // Of the weight's dtype.
  const void* optional(const OptionalTensor& tensor, const Shape& shape, const char* name) {
    if (!tensor.has_value()) return nullptr;
    STD_TORCH_CHECK(
        tensor->is_cpu() && has_shape(*tensor, shape) && dtype_of(tensor->scalar_type()) == args.parameter_dtype,
        "masked_conv2d: ", name, " must be a CPU tensor ", shape_text(shape.extents, shape.dims), " of weight's dtype");
    return contiguous(*tensor).data_ptr();
  }

  const int64_t* subnets(const OptionalTensor& tensor) {
    const Sizes& s = args.sizes;
    if (!tensor.has_value()) {
      STD_TORCH_CHECK(s.subnets == 1, "masked_conv2d: subnets is None, but the lists are of several sub-networks");
      return nullptr;
    }
    const int64_t* data = integers(*tensor, Shape{1, {s.batch}}, "subnets");
    const auto inside = [&](int64_t subnet) { return subnet >= 0 && subnet < s.subnets; };
    STD_TORCH_CHECK(std::all_of(data, data + s.batch, inside), "masked_conv2d: subnets, expected numbers from 0 to ",
                    s.subnets - 1);
    return data;
  }

  MaskedConv2d args{};

 private:
  const Tensor& contiguous(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor;
    owned_.push_back(torch::stable::contiguous(tensor));
    return owned_.back();
  }

  const int64_t* integers(const Tensor& tensor, const Shape& shape, const char* name) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Long && has_shape(tensor, shape),
                    "masked_conv2d: ", name, " must be a CPU tensor ", shape_text(shape.extents, shape.dims),
                    " of int64");
    return static_cast<const int64_t*>(contiguous(tensor).data_ptr());
  }

  const int64_t* list(const Tensor& tensor, int64_t channels, const char* name) {
    const int64_t longest = tensor.size(1);
    const int64_t* data = integers(tensor, Shape{2, {args.sizes.subnets, longest}}, name);
    for (int64_t i = 0; i < args.sizes.subnets; ++i) {
      STD_TORCH_CHECK(is_list(data + i * longest, longest, channels), "masked_conv2d: ", name,
                      ", expected ascending channels below ", channels, ", then -1");
    }
    return data;
  }

  static void set_axis(Axis& axis, int64_t input, const std::vector<int64_t>& numbers, int64_t index) {
    axis.input = input;
    axis.stride = numbers[index];
    axis.padding = numbers[2 + index];
    axis.dilation = numbers[4 + index];
    STD_TORCH_CHECK(input > 0 && axis.stride > 0 && axis.padding >= 0 && axis.dilation > 0 && axis.output() > 0,
                    "masked_conv2d: x is smaller than the kernel, or stride, padding or dilation is out of range");
  }

  std::vector<Tensor> owned_;
};

// A call that is checked, with its result, not yet computed.
struct Prepared {
  Inputs inputs;
  Tensor out;
};

Prepared prepare(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& shift,
                 const Tensor& inputs, const Tensor& outputs, const OptionalTensor& subnets, const OptionalTensor& gate,
                 const std::vector<int64_t>& numbers, const OptionalTensor& packed, int64_t pool) {
  Inputs call(weight, inputs, outputs, numbers.size() == kNumbers ? numbers[6] : 0);
  call.set_maps(x, numbers, pool);
  MaskedConv2d& args = call.args;
  const Sizes& s = args.sizes;
  args.image_subnets = call.subnets(subnets);
  args.scale = call.optional(scale, Shape{1, {s.out_channels}}, "scale");
  args.shift = call.optional(shift, Shape{1, {s.out_channels}}, "shift");
  args.gate = call.optional(gate, Shape{2, {s.batch, s.outputs}}, "gate");
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
  Inputs call;
  call.set_map(x);
  MaskedConv2d& args = call.args;
  args.sizes.subnets = 1;
  args.sizes.inputs = args.sizes.outputs = x.size(1);
  args.sizes.rows.input = x.size(2);
  args.sizes.columns.input = x.size(3);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), 1, 1});
  args.out = map_of(out);
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
  const auto run = [&] { kernels().forward(args.data(), layers, host); };
  // Fewer images than threads: several regions for every layer.
  if (x.size(0) < host.threads) {
    memory.with_team(run);
  } else {
    run();
  }
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
