// gated_excitation on the CPU: checks that memory safety needs, allocation, dispatch to an instruction set.
#include "cpu/gated_excitation.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "checks/shape.h"
#include "cpu/capability.h"
#include "cpu/host.h"
#include "cpu/tensors.h"

namespace pyext::cpu {
namespace {

using gated_excitation::kAllBias;
using gated_excitation::kForget1Bias;
using gated_excitation::kNumBranches;
using gated_excitation::kNumParameters;
using gated_excitation::kNumRunning;
using gated_excitation::parameter_numel;
using gated_excitation::parameter_shape;
using gated_excitation::running_shape;
using gated_excitation::Sizes;

DType dtype_of(const Tensor& tensor, const char* name) {
  const std::optional<DType> dtype = cpu::dtype_of(tensor.scalar_type());
  STD_TORCH_CHECK(dtype.has_value(), "gated_excitation: ", name,
                  " has an unsupported dtype, expected float32, float64, bfloat16 or float16");
  return *dtype;
}

Sizes sizes_of(const Tensor& u, const std::vector<Tensor>& parameters) {
  STD_TORCH_CHECK(u.dim() == 4, "gated_excitation: u has ", u.dim(), " dimensions, expected (N, C, H, W)");
  STD_TORCH_CHECK(parameters.size() == kNumParameters, "gated_excitation: ", parameters.size(),
                  " parameters, expected ", static_cast<int>(kNumParameters));
  const Sizes sizes{
      u.size(0), u.size(1), u.size(2), u.size(3), parameters[kForget1Bias].numel(), parameters[kAllBias].numel()};
  STD_TORCH_CHECK(sizes.channels > 0 && sizes.positions() > 0,
                  "gated_excitation: u is empty, expected at least one channel and position");
  return sizes;
}

void check_like(const Tensor& tensor, const Tensor& u, const char* name) {
  bool same = tensor.dim() == 4 && tensor.is_cpu() && tensor.scalar_type() == u.scalar_type();
  for (int64_t i = 0; same && i < 4; ++i) same = tensor.size(i) == u.size(i);
  STD_TORCH_CHECK(same, "gated_excitation: ", name, " differs from u in shape, dtype or device");
}

// Contiguous parameters: the caller's own memory, or copies that this object owns.
class Inputs {
 public:
  Inputs(const Tensor& u, const std::vector<Tensor>& parameters, const std::vector<Tensor>& running, bool training,
         double eps) {
    args.dtype = dtype_of(u, "u");
    args.sizes = sizes_of(u, parameters);
    args.u = map_of(u);
    args.training = training;
    args.eps = eps;
    STD_TORCH_CHECK(u.is_cpu(), "gated_excitation: u is not on the CPU");
    STD_TORCH_CHECK(training ? running.empty() : running.size() == kNumRunning, "gated_excitation: ", running.size(),
                    " running statistics, expected ", training ? 0 : static_cast<int>(kNumRunning));
    args.parameter_dtype = dtype_of(parameters[0], "parameters[0]");
    for (int k = 0; k < kNumParameters; ++k) {
      args.parameters[k] = data(parameters[k], parameter_shape(k, args.sizes), args.parameter_dtype, "parameters", k);
    }
    if (!training) args.running_dtype = dtype_of(running[0], "running[0]");
    for (int k = 0; k < static_cast<int>(running.size()); ++k) {
      args.running[k] = data(running[k], running_shape(k, args.sizes), args.running_dtype, "running", k);
    }
  }

  GatedExcitation args{};

 private:
  const void* data(const Tensor& tensor, const Shape& shape, DType dtype, const char* list, int index) {
    const DType found = dtype_of(tensor, list);
    STD_TORCH_CHECK(tensor.is_cpu(), "gated_excitation: ", list, "[", index, "] is not on the CPU");
    check_shape(tensor, shape, "gated_excitation", list, index);
    STD_TORCH_CHECK(found == dtype && (found == args.dtype || (found == DType::kFloat && args.dtype != DType::kDouble)),
                    "gated_excitation: ", list, "[", index, "] has another dtype than u or float32");
    return contiguous_.data(tensor);
  }

  Contiguous contiguous_;
};

const GatedExcitationKernels& kernels() {
#if defined(__x86_64__)
  return select(baseline::gated_excitation_kernels, avx2::gated_excitation_kernels, avx512::gated_excitation_kernels);
#else
  return baseline::gated_excitation_kernels;
#endif
}

Tensor new_buffer(const Tensor& u, std::initializer_list<int64_t> shape) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::new_empty(u, sizes, accumulate_type(dtype_of(u, "u")));
}

// A tensor without elements; by way of the dispatcher, which looks operators up by name, five of them would take a
// sixth of a small call's time.
Tensor no_buffer(const Tensor& u) {
  const int64_t size = 0, stride = 1;
  const bool is_double = accumulate_type(dtype_of(u, "u")) == ScalarType::Double;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride,
                                                  is_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Fills `out`; returns it with position, pooled, hidden and the statistics, empty where neither saved nor computed.
Forward run_forward(const Tensor& u, const std::vector<Tensor>& parameters, const std::vector<Tensor>& running,
                    bool training, double eps, bool save, const Tensor& out) {
  Inputs inputs(u, parameters, running, training, eps);
  GatedExcitation& args = inputs.args;
  const Sizes& s = args.sizes;
  const bool pooled_needed = save || training;
  // What is not needed is a tensor of its own all the same: an operator's results may not share memory.
  const auto buffer = [&](bool needed, std::initializer_list<int64_t> shape) {
    return needed ? new_buffer(u, shape) : no_buffer(u);
  };
  const Tensor position = buffer(save, {s.batch, kNumBranches, s.positions()});
  const Tensor pooled = buffer(pooled_needed, {s.batch, kNumBranches, s.channels});
  const Tensor hidden = buffer(pooled_needed, {s.batch, s.hidden()});
  const Tensor map_statistics = buffer(training, {2, s.channels});
  const Tensor hidden_statistics = buffer(training, {2, s.hidden()});
  args.out = map_of(out);
  args.position = save ? position.data_ptr() : nullptr;
  args.pooled = pooled_needed ? pooled.data_ptr() : nullptr;
  args.hidden = hidden.data_ptr();
  args.map_statistics = map_statistics.data_ptr();
  args.hidden_statistics = hidden_statistics.data_ptr();
  CallMemory memory;
  kernels().forward(args, memory.host());
  if (!save && training) return {out, position, no_buffer(u), no_buffer(u), map_statistics, hidden_statistics};
  return {out, position, pooled, hidden, map_statistics, hidden_statistics};
}

Forward forward(const Tensor& u, const std::vector<Tensor>& parameters, const std::vector<Tensor>& running,
                bool training, double eps, bool save) {
  return run_forward(u, parameters, running, training, eps, save, torch::stable::empty_like(u));
}

std::tuple<Tensor, Tensor> forward_out(const Tensor& u, const std::vector<Tensor>& parameters,
                                       const std::vector<Tensor>& running, bool training, double eps,
                                       const Tensor& out) {
  check_like(out, u, "out");
  const Forward result = run_forward(u, parameters, running, training, eps, /*save=*/false, out);
  return {std::get<4>(result), std::get<5>(result)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_into(const Tensor& u, const std::vector<Tensor>& parameters,
                                                                const std::vector<Tensor>& running, bool training,
                                                                double eps, const Tensor& out) {
  check_like(out, u, "out");
  const Forward result = run_forward(u, parameters, running, training, eps, /*save=*/true, out);
  return {std::get<1>(result), std::get<2>(result), std::get<3>(result), std::get<4>(result), std::get<5>(result)};
}

const void* saved_data(const Tensor& tensor, int64_t numel, DType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.numel() == numel &&
                      tensor.scalar_type() == accumulate_type(dtype),
                  "gated_excitation_backward: ", name, " is not what the forward pass saved for this u");
  return tensor.data_ptr();
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& u, const std::vector<Tensor>& parameters,
                                    const std::vector<Tensor>& running, const Tensor& position, const Tensor& pooled,
                                    const Tensor& hidden, const Tensor& map_statistics, const Tensor& hidden_statistics,
                                    bool training, double eps) {
  check_like(grad_out, u, "grad_out");
  Inputs inputs(u, parameters, running, training, eps);
  GatedExcitation& args = inputs.args;
  const Sizes& s = args.sizes;
  const auto saved = [&](const Tensor& tensor, int64_t numel, const char* name) {
    return const_cast<void*>(saved_data(tensor, numel, args.dtype, name));
  };
  args.position = saved(position, s.batch * kNumBranches * s.positions(), "position");
  args.pooled = saved(pooled, s.batch * kNumBranches * s.channels, "pooled");
  args.hidden = saved(hidden, s.batch * s.hidden(), "hidden");
  args.map_statistics = saved(map_statistics, training ? 2 * s.channels : 0, "map_statistics");
  args.hidden_statistics = saved(hidden_statistics, training ? 2 * s.hidden() : 0, "hidden_statistics");
  int64_t numel = 0;
  for (int k = 0; k < kNumParameters; ++k) numel += parameter_numel(k, s);
  const Tensor grad_u = torch::stable::empty_like(u), grad_parameters = new_buffer(u, {numel});
  args.grad_out = map_of(grad_out);
  args.grad_u = map_of(grad_u);
  args.grad_parameters = grad_parameters.data_ptr();
  CallMemory memory;
  kernels().backward(args, memory.host());
  return {grad_u, grad_parameters};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("gated_excitation", TORCH_BOX(&forward));
  m.impl("gated_excitation_out", TORCH_BOX(&forward_out));
  m.impl("gated_excitation_into", TORCH_BOX(&forward_into));
  m.impl("gated_excitation_backward", TORCH_BOX(&backward));
}

}  // namespace pyext::cpu
