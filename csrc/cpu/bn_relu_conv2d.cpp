// bn_relu_conv2d on the CPU: checks that memory safety needs, allocation, dispatch to an instruction set.
#include "cpu/bn_relu_conv2d.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "checks/bn_relu_conv2d.h"
#include "cpu/capability.h"
#include "cpu/host.h"
#include "cpu/tensors.h"

namespace pyext::cpu {

const BNReLUConv2dKernels& selected_bn_relu_conv2d() {
#if defined(__x86_64__)
  return select(baseline::bn_relu_conv2d_kernels, avx2::bn_relu_conv2d_kernels, avx512::bn_relu_conv2d_kernels);
#else
  return baseline::bn_relu_conv2d_kernels;
#endif
}

namespace {

using bn_relu_conv2d::Sizes;

DType map_type(const Tensor& map, const char* name) {
  const std::optional<DType> dtype = dtype_of(map.scalar_type());
  STD_TORCH_CHECK(map.is_cpu() && map.dim() == 4 && dtype.has_value(), "bn_relu_conv2d: ", name,
                  " must be a CPU tensor (N, C, H, W) of float32, float64, bfloat16 or float16");
  return *dtype;
}

// Whether the kernels of csrc/cpu/bn_relu_conv2d/rows.h have x, of `sizes` and `dtype`.
bool in_rows(const Map& x, DType dtype, const Sizes& s) {
  return (dtype == DType::kFloat || dtype == DType::kDouble) && s.groups == 1 && s.stride == 1 &&
         images_innermost(x, s.batch, s.height, s.width);
}

// Uninitialised (N, C, H, W), with images innermost where `rows`.
Tensor new_map(const Tensor& x, bool rows, int64_t n, int64_t channels, int64_t height, int64_t width) {
  if (!rows) return torch::stable::new_empty(x, {n, channels, height, width});
  const Tensor made = torch::stable::new_empty(x, {channels, height, width, n});
  return torch::stable::transpose(torch::stable::transpose(torch::stable::transpose(made, 0, 3), 1, 3), 2, 3);
}

// `map`, or a copy of it, with images innermost.
Tensor with_images_innermost(const Tensor& map) {
  const int64_t n = map.size(0), channels = map.size(1), height = map.size(2), width = map.size(3);
  if (images_innermost(map_of(map), n, height, width)) return map;
  Tensor copy = new_map(map, true, n, channels, height, width);
  torch::stable::copy_(copy, map);
  return copy;
}

constexpr int64_t kPoolWindow = 2;  // of the means; the maximum has windows of 3x3, which need not be whole

// The arguments that both passes have, and copies of those that are not contiguous.
class Inputs {
 public:
  Inputs(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& conv_weight,
         const Tensor& mean, const Tensor& var, bool training, double eps, int64_t stride, int64_t groups)
      : Inputs(x, bn_relu_conv2d::sizes_of(x, conv_weight, stride, groups), norm_weight, norm_bias, mean, var, training,
               eps) {
    STD_TORCH_CHECK(args.sizes.kernel == 3 || (groups == 1 && stride == 1),
                    "bn_relu_conv2d: the kernels have 3x3 convolutions, and 1x1 ones without groups and stride");
    args.rows = in_rows(args.x, args.dtype, args.sizes);
    const Shape weight = bn_relu_conv2d::weight_shape(args.sizes);
    args.conv_weight = data(conv_weight, weight, args.parameter_dtype, "conv_weight");
  }

  // Of a normalisation with a pool behind it, whose windows take maps of `window` rows and columns at least.
  Inputs(const Tensor& x, int64_t window, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& mean,
         const Tensor& var, bool training, double eps)
      : Inputs(x, pool_sizes(x, window), norm_weight, norm_bias, mean, var, training, eps) {}

  BNReLUConv2d args{};

 private:
  Inputs(const Tensor& x, const Sizes& s, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& mean,
         const Tensor& var, bool training, double eps) {
    args.dtype = map_type(x, "x");
    args.parameter_dtype = parameter_type(norm_weight);
    bn_relu_conv2d::check_eps(eps);
    args.training = training;
    args.eps = eps;
    args.x = map_of(x);
    args.sizes = s;
    const Shape vector = bn_relu_conv2d::vector_shape(s);
    args.norm_weight = data(norm_weight, vector, args.parameter_dtype, "norm_weight");
    args.norm_bias = data(norm_bias, vector, args.parameter_dtype, "norm_bias");
    const DType wide = args.dtype == DType::kDouble ? DType::kDouble : DType::kFloat;
    args.mean = data(mean, vector, wide, "mean");
    args.var = data(var, vector, wide, "var");
  }

  static Sizes pool_sizes(const Tensor& x, int64_t window) {
    STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) >= window && x.size(3) >= window,
                    "bn_relu_conv2d: x has no window of ", window, "x", window);
    return {x.size(0), x.size(1), x.size(2), x.size(3), x.size(1), 1, 0, 1};
  }

  DType parameter_type(const Tensor& tensor) const {
    const std::optional<DType> found = dtype_of(tensor.scalar_type());
    STD_TORCH_CHECK(found == args.dtype || (found == DType::kFloat && args.dtype != DType::kDouble),
                    "bn_relu_conv2d: norm_weight has another dtype than x or float32");
    return *found;
  }

  void* data(const Tensor& tensor, const Shape& shape, DType dtype, const char* name) {
    STD_TORCH_CHECK(tensor.is_cpu() && has_shape(tensor, shape) && dtype_of(tensor.scalar_type()) == dtype,
                    "bn_relu_conv2d: ", name, " has shape ", shape_text(tensor.sizes(), static_cast<int>(tensor.dim())),
                    ", expected ", shape_text(shape.extents, shape.dims),
                    " on the CPU, of the other parameters' dtype");
    return contiguous_.data(tensor);
  }

  Contiguous contiguous_;
};

Tensor new_vector(const Tensor& x, int64_t numel) {
  return torch::stable::new_empty(x, {numel}, accumulate_type(map_type(x, "x")));
}

std::tuple<Tensor, Tensor> statistics(const Tensor& x) {
  BNReLUConv2d args{};
  args.dtype = map_type(x, "x");
  args.sizes = {x.size(0), x.size(1), x.size(2), x.size(3), 1, 1, 1, 1};
  STD_TORCH_CHECK(args.sizes.in_channels > 0 && args.sizes.positions() > 0,
                  "bn_relu_conv2d: x is empty, expected at least one channel and position");
  args.x = map_of(x);
  args.rows = in_rows(args.x, args.dtype, args.sizes);
  const Tensor mean = new_vector(x, x.size(1)), var = new_vector(x, x.size(1));
  args.mean = mean.data_ptr();
  args.var = var.data_ptr();
  CallMemory memory;
  selected_bn_relu_conv2d().statistics(args, memory.host());
  return {mean, var};
}

Tensor forward(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& conv_weight,
               const Tensor& mean, const Tensor& var, bool training, double eps, int64_t stride, int64_t groups) {
  Inputs inputs(x, norm_weight, norm_bias, conv_weight, mean, var, training, eps, stride, groups);
  const Sizes& s = inputs.args.sizes;
  const Tensor out = new_map(x, inputs.args.rows, s.batch, s.out_channels, s.out_height(), s.out_width());
  inputs.args.out = map_of(out);
  CallMemory memory;
  selected_bn_relu_conv2d().forward(inputs.args, memory.host());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> forward_moments(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                                                   const Tensor& conv_weight, const Tensor& mean, const Tensor& var,
                                                   bool training, double eps, int64_t stride, int64_t groups) {
  Inputs inputs(x, norm_weight, norm_bias, conv_weight, mean, var, training, eps, stride, groups);
  const Sizes& s = inputs.args.sizes;
  const Tensor out = new_map(x, false, s.batch, s.out_channels, s.out_height(), s.out_width());
  const Tensor out_mean = new_vector(x, s.out_channels), out_var = new_vector(x, s.out_channels);
  inputs.args.rows = false;
  inputs.args.out = map_of(out);
  inputs.args.out_mean = out_mean.data_ptr();
  inputs.args.out_var = out_var.data_ptr();
  CallMemory memory;
  selected_bn_relu_conv2d().forward(inputs.args, memory.host());
  return {out, out_mean, out_var};
}

// The gradients of the parameters: norm_weight, norm_bias, conv_weight.
using ParameterGradients = std::tuple<Tensor, Tensor, Tensor>;

ParameterGradients run_backward(BNReLUConv2d& args, const Tensor& grad_out, const Tensor& x) {
  const Sizes& s = args.sizes;
  const Tensor grad_norm_weight = new_vector(x, s.in_channels), grad_norm_bias = new_vector(x, s.in_channels);
  const Tensor grad_conv_weight =
      torch::stable::new_empty(x, {s.out_channels, s.group_inputs(), s.kernel, s.kernel}, accumulate_type(args.dtype));
  args.grad_out = map_of(grad_out);
  args.grad_norm_weight = grad_norm_weight.data_ptr();
  args.grad_norm_bias = grad_norm_bias.data_ptr();
  args.grad_conv_weight = grad_conv_weight.data_ptr();
  CallMemory memory;
  selected_bn_relu_conv2d().backward(args, memory.host());
  return {grad_norm_weight, grad_norm_bias, grad_conv_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& x, const Tensor& norm_weight,
                                                    const Tensor& norm_bias, const Tensor& conv_weight,
                                                    const Tensor& mean, const Tensor& var, bool training, double eps,
                                                    int64_t stride, int64_t groups) {
  Inputs inputs(x, norm_weight, norm_bias, conv_weight, mean, var, training, eps, stride, groups);
  const Sizes& s = inputs.args.sizes;
  STD_TORCH_CHECK(grad_out.is_cpu(), "bn_relu_conv2d: grad_out is not on the CPU, but x is");
  bn_relu_conv2d::check_gradient(grad_out, x, s);
  const bool rows = inputs.args.rows;
  const Tensor dy = rows ? with_images_innermost(grad_out) : grad_out;
  const Tensor grad_x = new_map(x, rows, s.batch, s.in_channels, s.height, s.width);
  inputs.args.grad_x = map_of(grad_x);
  return std::tuple_cat(std::tuple(grad_x), run_backward(inputs.args, dy, x));
}

void check_added(const Tensor& grad_x, const Tensor& x, const Tensor& corrections) {
  const Shape map{4, {x.size(0), x.size(1), x.size(2), x.size(3)}}, pairs{2, {x.size(1), 2}};
  STD_TORCH_CHECK(grad_x.is_cpu() && grad_x.scalar_type() == x.scalar_type() && has_shape(grad_x, map),
                  "bn_relu_conv2d: grad_x differs from x in shape, dtype or device");
  STD_TORCH_CHECK(corrections.is_cpu() && corrections.scalar_type() == ScalarType::Double &&
                      has_shape(corrections, pairs) && corrections.is_contiguous(),
                  "bn_relu_conv2d: corrections has shape ",
                  shape_text(corrections.sizes(), static_cast<int>(corrections.dim())), ", expected (", x.size(1),
                  ", 2), contiguous float64 on the CPU");
}

ParameterGradients backward_add(const Tensor& grad_out, const Tensor& x, const Tensor& norm_weight,
                                const Tensor& norm_bias, const Tensor& conv_weight, const Tensor& mean,
                                const Tensor& var, bool training, double eps, int64_t stride, int64_t groups,
                                const Tensor& grad_x, const Tensor& corrections) {
  Inputs inputs(x, norm_weight, norm_bias, conv_weight, mean, var, training, eps, stride, groups);
  STD_TORCH_CHECK(grad_out.is_cpu(), "bn_relu_conv2d: grad_out is not on the CPU, but x is");
  bn_relu_conv2d::check_gradient(grad_out, x, inputs.args.sizes);
  check_added(grad_x, x, corrections);
  inputs.args.rows = false;
  inputs.args.grad_x = map_of(grad_x);
  inputs.args.add = true;
  inputs.args.corrections = static_cast<double*>(corrections.data_ptr());
  return run_backward(inputs.args, grad_out, x);
}

void correct(const Tensor& grad_x, const Tensor& x, const Tensor& mean, const Tensor& corrections) {
  BNReLUConv2d args{};
  args.dtype = map_type(x, "x");
  args.sizes = {x.size(0), x.size(1), x.size(2), x.size(3), 1, 1, 1, 1};
  check_added(grad_x, x, corrections);
  STD_TORCH_CHECK(mean.is_cpu() && mean.is_contiguous() && mean.scalar_type() == accumulate_type(args.dtype) &&
                      has_shape(mean, {1, {x.size(1)}}),
                  "bn_relu_conv2d: mean has another shape, dtype or device than x's channels");
  args.x = map_of(x);
  args.grad_x = map_of(grad_x);
  args.mean = mean.data_ptr();
  args.corrections = static_cast<double*>(corrections.data_ptr());
  CallMemory memory;
  selected_bn_relu_conv2d().correct(args, memory.host());
}

Tensor pool(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& mean, const Tensor& var,
            bool training, double eps) {
  Inputs inputs(x, kPoolWindow, norm_weight, norm_bias, mean, var, training, eps);
  const Sizes& s = inputs.args.sizes;
  const bool rows = inputs.args.rows = in_rows(inputs.args.x, inputs.args.dtype, s);
  const Tensor out = new_map(x, rows, s.batch, s.in_channels, s.height / 2, s.width / 2);
  inputs.args.out = map_of(out);
  CallMemory memory;
  selected_bn_relu_conv2d().pool(inputs.args, memory.host());
  return out;
}

// Those of x, which gets the memory of a map in rows or not, and of the normalisation's parameters.
using PoolGradients = std::tuple<Tensor, Tensor, Tensor>;

PoolGradients run_pool_backward(void (*kernel)(const BNReLUConv2d&, const Host&), BNReLUConv2d& args, const Tensor& x,
                                bool x_rows, const Tensor& grad_out, int64_t height, int64_t width) {
  const Sizes& s = args.sizes;
  STD_TORCH_CHECK(grad_out.is_cpu() && grad_out.scalar_type() == x.scalar_type() &&
                      has_shape(grad_out, Shape{4, {s.batch, s.in_channels, height, width}}),
                  "bn_relu_conv2d: grad_out differs from the result in shape, dtype or device");
  const Tensor dy = args.rows ? with_images_innermost(grad_out) : grad_out;
  const Tensor grad_x = new_map(x, x_rows, s.batch, s.in_channels, s.height, s.width);
  const Tensor grad_norm_weight = new_vector(x, s.in_channels), grad_norm_bias = new_vector(x, s.in_channels);
  args.grad_out = map_of(dy);
  args.grad_x = map_of(grad_x);
  args.grad_norm_weight = grad_norm_weight.data_ptr();
  args.grad_norm_bias = grad_norm_bias.data_ptr();
  CallMemory memory;
  kernel(args, memory.host());
  return {grad_x, grad_norm_weight, grad_norm_bias};
}

PoolGradients pool_backward(const Tensor& grad_out, const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                            const Tensor& mean, const Tensor& var, bool training, double eps) {
  Inputs inputs(x, kPoolWindow, norm_weight, norm_bias, mean, var, training, eps);
  BNReLUConv2d& args = inputs.args;
  args.rows = in_rows(args.x, args.dtype, args.sizes);
  return run_pool_backward(selected_bn_relu_conv2d().pool_backward, args, x, args.rows, grad_out, x.size(2) / 2,
                           x.size(3) / 2);
}

// x as the kernels of the maximum read it.
Tensor with_planes(const Tensor& x) {
  const DType dtype = map_type(x, "x");
  STD_TORCH_CHECK(dtype == DType::kFloat || dtype == DType::kDouble,
                  "bn_relu_conv2d: the maximum has kernels for float32 and float64");
  const bool planes = x.stride(3) == 1 && x.stride(2) == x.size(3);
  return planes ? x : torch::stable::contiguous(x);
}

Tensor max_pool(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& mean,
                const Tensor& var, bool training, double eps) {
  const Tensor planes = with_planes(x);
  Inputs inputs(planes, 1, norm_weight, norm_bias, mean, var, training, eps);
  const Sizes& s = inputs.args.sizes;
  inputs.args.rows = true;
  const Tensor out = new_map(x, true, s.batch, s.in_channels, (s.height + 1) / 2, (s.width + 1) / 2);
  inputs.args.out = map_of(out);
  CallMemory memory;
  selected_bn_relu_conv2d().max_pool(inputs.args, memory.host());
  return out;
}

PoolGradients max_pool_backward(const Tensor& grad_out, const Tensor& x, const Tensor& norm_weight,
                                const Tensor& norm_bias, const Tensor& mean, const Tensor& var, bool training,
                                double eps) {
  const Tensor planes = with_planes(x);
  Inputs inputs(planes, 1, norm_weight, norm_bias, mean, var, training, eps);
  inputs.args.rows = true;
  return run_pool_backward(selected_bn_relu_conv2d().max_pool_backward, inputs.args, x, false, grad_out,
                           (x.size(2) + 1) / 2, (x.size(3) + 1) / 2);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("bn_relu_conv2d", TORCH_BOX(&forward));
  m.impl("bn_relu_conv2d_statistics", TORCH_BOX(&statistics));
  m.impl("bn_relu_conv2d_backward", TORCH_BOX(&backward));
  m.impl("bn_relu_conv2d_moments", TORCH_BOX(&forward_moments));
  m.impl("bn_relu_conv2d_pool", TORCH_BOX(&pool));
  m.impl("bn_relu_conv2d_pool_backward", TORCH_BOX(&pool_backward));
  m.impl("bn_relu_conv2d_max_pool", TORCH_BOX(&max_pool));
  m.impl("bn_relu_conv2d_max_pool_backward", TORCH_BOX(&max_pool_backward));
  m.impl("bn_relu_conv2d_backward_add", TORCH_BOX(&backward_add));
  m.impl("bn_relu_conv2d_correct", TORCH_BOX(&correct));
}

}  // namespace pyext::cpu
