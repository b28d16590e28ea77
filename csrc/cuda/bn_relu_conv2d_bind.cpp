// bn_relu_conv2d on CUDA: checks, allocation, the device and its stream, registration.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks/bn_relu_conv2d.h"
#include "cuda/bind.h"
#include "cuda/bn_relu_conv2d.h"

namespace pyext::bn_relu_conv2d {
namespace {

using namespace pyext::cuda;

Tensor in_type(const Tensor& tensor, ScalarType type) {
  const Tensor dense = packed(tensor);
  return dense.scalar_type() == type ? dense : torch::stable::to(dense, type);
}

// The arguments that both passes have, and the tensors that they point into.
class Inputs {
 public:
  Inputs(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& conv_weight,
         const Tensor& mean, const Tensor& var, bool training, double eps, int64_t stride, int64_t groups)
      : call{} {
    STD_TORCH_CHECK(x.is_cuda(), "bn_relu_conv2d: x is not on a CUDA device, but another tensor is");
    check_eps(eps);
    call.sizes = sizes_of(x, conv_weight, stride, groups);
    const Shape vector = vector_shape(call.sizes);
    const Shape weight = weight_shape(call.sizes);
    check_tensor(norm_weight, x, vector, "norm_weight");
    check_tensor(norm_bias, x, vector, "norm_bias");
    check_tensor(conv_weight, x, weight, "conv_weight");
    check_tensor(mean, x, vector, "mean");
    check_tensor(var, x, vector, "var");
    norm_weight_ = in_type(norm_weight, ScalarType::Float);
    norm_bias_ = in_type(norm_bias, ScalarType::Float);
    conv_weight_ = in_type(conv_weight, x.scalar_type());
    mean_ = in_type(mean, ScalarType::Float);
    var_ = in_type(var, ScalarType::Float);
    const auto vector_of = [](const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); };
    call.dtype = dtype_of(x.scalar_type(), "bn_relu_conv2d", "x");
    call.x = image_of(x);
    call.norm_weight = vector_of(norm_weight_);
    call.norm_bias = vector_of(norm_bias_);
    call.conv_weight = conv_weight_.data_ptr();
    call.mean = vector_of(mean_);
    call.var = vector_of(var_);
    call.training = training;
    call.eps = static_cast<float>(eps);
  }

  Call call;

 private:
  static void check_tensor(const Tensor& tensor, const Tensor& x, const Shape& shape, const char* name) {
    const ScalarType type = tensor.scalar_type();
    STD_TORCH_CHECK(on_device_of(tensor, x), "bn_relu_conv2d: ", name, " is not on the device of x");
    STD_TORCH_CHECK(type == x.scalar_type() || type == ScalarType::Float, "bn_relu_conv2d: ", name,
                    " has another dtype than x or float32");
    STD_TORCH_CHECK(has_shape(tensor, shape), "bn_relu_conv2d: ", name, " has shape ",
                    shape_text(tensor.sizes(), static_cast<int>(tensor.dim())), ", expected ",
                    shape_text(shape.extents, shape.dims));
  }

  Tensor norm_weight_, norm_bias_, conv_weight_, mean_, var_;
};

std::tuple<Tensor, Tensor> run_statistics(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "bn_relu_conv2d: x has ", x.dim(), " dimensions, expected (N, C, H, W)");
  const Sizes s{x.size(0), x.size(1), x.size(2), x.size(3), 1, 1, 1, 1};
  STD_TORCH_CHECK(s.in_channels > 0 && s.positions() > 0,
                  "bn_relu_conv2d: x is empty, expected at least one channel and position");
  const Dtype dtype = dtype_of(x.scalar_type(), "bn_relu_conv2d", "x");
  const DeviceGuard guard(x.get_device_index());
  const Tensor mean = torch::stable::new_empty(x, {s.in_channels}, ScalarType::Float);
  const Tensor var = torch::stable::new_empty(x, {s.in_channels}, ScalarType::Float);
  if (s.batch == 0) return {torch::stable::fill_(mean, 0), torch::stable::fill_(var, 0)};
  const Tensor workspace = workspace_like(x, statistics_workspace_bytes(s));
  statistics(dtype, s, image_of(x), static_cast<float*>(mean.data_ptr()), static_cast<float*>(var.data_ptr()),
             workspace.data_ptr(), stream_of(x));
  return {mean, var};
}

Tensor run_forward(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& conv_weight,
                   const Tensor& mean, const Tensor& var, bool training, double eps, int64_t stride, int64_t groups) {
  const Inputs inputs(x, norm_weight, norm_bias, conv_weight, mean, var, training, eps, stride, groups);
  const Sizes& s = inputs.call.sizes;
  const DeviceGuard guard(x.get_device_index());
  const Tensor out = torch::stable::new_empty(x, {s.batch, s.out_channels, s.out_height(), s.out_width()});
  if (s.batch == 0) return out;
  const Tensor workspace = workspace_like(x, forward_workspace_bytes(s));
  forward(inputs.call, out.data_ptr(), workspace.data_ptr(), stream_of(x));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(const Tensor& grad_out, const Tensor& x,
                                                        const Tensor& norm_weight, const Tensor& norm_bias,
                                                        const Tensor& conv_weight, const Tensor& mean,
                                                        const Tensor& var, bool training, double eps, int64_t stride,
                                                        int64_t groups) {
  const Inputs inputs(x, norm_weight, norm_bias, conv_weight, mean, var, training, eps, stride, groups);
  const Sizes& s = inputs.call.sizes;
  STD_TORCH_CHECK(on_device_of(grad_out, x), "bn_relu_conv2d: grad_out is not on the device of x");
  check_gradient(grad_out, x, s);
  const DeviceGuard guard(x.get_device_index());
  const Tensor grad_x = torch::stable::new_empty(x, {s.batch, s.in_channels, s.height, s.width});
  const Tensor grad_norm_weight = torch::stable::new_empty(x, {s.in_channels}, ScalarType::Float);
  const Tensor grad_norm_bias = torch::stable::new_empty(x, {s.in_channels}, ScalarType::Float);
  const Tensor grad_conv_weight =
      torch::stable::new_empty(x, {s.out_channels, s.group_inputs(), s.kernel, s.kernel}, ScalarType::Float);
  if (s.batch == 0) {
    for (const Tensor& grad : {grad_norm_weight, grad_norm_bias, grad_conv_weight}) torch::stable::fill_(grad, 0);
    return {grad_x, grad_norm_weight, grad_norm_bias, grad_conv_weight};
  }
  const auto float_of = [](const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); };
  const Gradients gradients{grad_x.data_ptr(), float_of(grad_norm_weight), float_of(grad_norm_bias),
                            float_of(grad_conv_weight)};
  const Tensor workspace = workspace_like(x, backward_workspace_bytes(s));
  backward(inputs.call, image_of(grad_out), gradients, workspace.data_ptr(), stream_of(x));
  return {grad_x, grad_norm_weight, grad_norm_bias, grad_conv_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CUDA, m) {
  m.impl("bn_relu_conv2d", TORCH_BOX(&run_forward));
  m.impl("bn_relu_conv2d_statistics", TORCH_BOX(&run_statistics));
  m.impl("bn_relu_conv2d_backward", TORCH_BOX(&run_backward));
}

}  // namespace pyext::bn_relu_conv2d
