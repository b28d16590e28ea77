// masked_conv2d on CUDA: checks, allocation, the device and its stream, registration.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "checks/masked_conv2d.h"
#include "cuda/bind.h"
#include "cuda/masked_conv2d.h"

namespace pyext::masked_conv2d {
namespace {

using namespace pyext::cuda;
using OptionalTensor = std::optional<Tensor>;

// The arguments that both operators have, and copies of those that are not contiguous.
class Call {
 public:
  Call(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& shift,
       const Tensor& inputs, const Tensor& outputs, const OptionalTensor& subnets, const OptionalTensor& gate,
       const std::vector<int64_t>& numbers, int64_t pool)
      : x_(x), weight_(weight) {
    in.sizes = sizes_of(x, weight, inputs, outputs, numbers, pool);
    const Sizes& s = in.sizes;
    in.dtype = dtype_of(x.scalar_type(), "masked_conv2d", "x");
    in.parameter_dtype = dtype_of(weight.scalar_type(), "masked_conv2d", "weight");
    STD_TORCH_CHECK(on_device_of(weight, x) && (in.parameter_dtype == in.dtype || in.parameter_dtype == Dtype::kFloat),
                    "masked_conv2d: weight is on another device than x, or has another dtype than x or float32");
    in.x = image_of(x);
    in.weight = image_of(weight);
    in.scale = parameter(scale, channel_shape(s), "scale");
    in.shift = parameter(shift, channel_shape(s), "shift");
    in.gate = parameter(gate, gate_shape(s), "gate");
    in.inputs = integers(inputs, input_list_shape(s), "inputs");
    in.outputs = integers(outputs, output_list_shape(s), "outputs");
    check_subnets(subnets.has_value(), s);
    if (subnets.has_value()) in.subnets = integers(*subnets, image_shape(s), "subnets");
  }

  // A map of the result's shape, contiguous.
  const void* map(const Tensor& tensor, const char* name) {
    const Sizes& s = in.sizes;
    const Shape shape{4, {s.batch, s.outputs, s.out_height(), s.out_width()}};
    STD_TORCH_CHECK(on_device_of(tensor, x_) && tensor.scalar_type() == x_.scalar_type() && has_shape(tensor, shape),
                    "masked_conv2d_backward: ", name, " must be of x's dtype, on its device, and of shape ",
                    shape_text(shape.extents, shape.dims));
    return own(tensor);
  }

  Inputs in{};

 private:
  const void* own(const Tensor& tensor) {
    owned_.push_back(packed(tensor));
    return owned_.back().data_ptr();
  }

  const void* parameter(const OptionalTensor& tensor, const Shape& shape, const char* name) {
    if (!tensor.has_value()) return nullptr;
    STD_TORCH_CHECK(
        on_device_of(*tensor, x_) && has_shape(*tensor, shape) && tensor->scalar_type() == weight_.scalar_type(),
        "masked_conv2d: ", name, " must be of weight's dtype, on the device of x, and of shape ",
        shape_text(shape.extents, shape.dims));
    return own(*tensor);
  }

  const int64_t* integers(const Tensor& tensor, const Shape& shape, const char* name) {
    STD_TORCH_CHECK(on_device_of(tensor, x_) && tensor.scalar_type() == ScalarType::Long && has_shape(tensor, shape),
                    "masked_conv2d: ", name, " must be int64, on the device of x, and of shape ",
                    shape_text(shape.extents, shape.dims));
    return static_cast<const int64_t*>(own(tensor));
  }

  const Tensor& x_;
  const Tensor& weight_;
  std::vector<Tensor> owned_;
};

// `packed` is the CPU kernel's.
Tensor run_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& shift,
                   const Tensor& inputs, const Tensor& outputs, const OptionalTensor& subnets,
                   const OptionalTensor& gate, const std::vector<int64_t>& numbers, const OptionalTensor&,
                   int64_t pool) {
  STD_TORCH_CHECK(x.is_cuda(), "masked_conv2d: x is not on a CUDA device, but another tensor is");
  const DeviceGuard guard(x.get_device_index());
  const Call call(x, weight, scale, shift, inputs, outputs, subnets, gate, numbers, pool);
  const Sizes& s = call.in.sizes;
  const Tensor out = torch::stable::new_empty(x, {s.batch, s.outputs, s.out_height(), s.out_width()});
  if (s.batch == 0) return out;
  const Tensor space = workspace_like(x, forward_workspace_bytes(call.in));
  forward(call.in, out.data_ptr(), space.data_ptr(), stream_of(x));
  return out;
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results run_backward(const Tensor& grad_out, const Tensor& out, const Tensor& x, const Tensor& weight,
                     const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& inputs,
                     const Tensor& outputs, const OptionalTensor& subnets, const OptionalTensor& gate,
                     const std::vector<int64_t>& numbers, bool for_x, bool for_parameters) {
  STD_TORCH_CHECK(x.is_cuda(), "masked_conv2d_backward: x is not on a CUDA device, but another tensor is");
  const DeviceGuard guard(x.get_device_index());
  Call call(x, weight, scale, shift, inputs, outputs, subnets, gate, numbers, 1);
  const auto like = [&](const OptionalTensor& tensor, bool wanted, ScalarType type) {
    const bool needed = wanted && tensor.has_value();
    std::vector<int64_t> shape{0};
    if (needed) shape.assign(tensor->sizes().begin(), tensor->sizes().end());
    return torch::stable::new_empty(x, shape, type);
  };
  const auto address = [](const Tensor& tensor) { return tensor.numel() > 0 ? tensor.data_ptr() : nullptr; };
  const auto floats = [&](const Tensor& tensor) { return static_cast<float*>(address(tensor)); };
  const Results results{like(x, for_x, x.scalar_type()), like(weight, for_parameters, ScalarType::Float),
                        like(scale, for_parameters, ScalarType::Float), like(shift, for_parameters, ScalarType::Float),
                        like(gate, true, ScalarType::Float)};
  const auto& [grad_x, grad_weight, grad_scale, grad_shift, grad_gate] = results;
  const Gradients gradients{address(grad_x), floats(grad_weight), floats(grad_scale), floats(grad_shift),
                            floats(grad_gate)};
  const void* incoming = call.map(grad_out, "grad_out");
  const void* result = call.map(out, "out");
  const Tensor space = workspace_like(x, backward_workspace_bytes(call.in, gradients));
  backward(call.in, incoming, result, gradients, space.data_ptr(), stream_of(x));
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CUDA, m) {
  m.impl("masked_conv2d", TORCH_BOX(&run_forward));
  m.impl("masked_conv2d_backward", TORCH_BOX(&run_backward));
}

}  // namespace pyext::masked_conv2d
