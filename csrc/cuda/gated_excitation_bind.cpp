// gated_excitation on CUDA: checks, allocation, the device and its stream, registration.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "checks/shape.h"
#include "cuda/bind.h"
#include "cuda/gated_excitation.h"

namespace pyext::gated_excitation {
namespace {

using namespace pyext::cuda;

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

DeviceGuard guard_device_of(const Tensor& u) {
  STD_TORCH_CHECK(u.is_cuda(), "gated_excitation: u is not on a CUDA device, but another tensor is");
  return DeviceGuard(u.get_device_index());
}

void check_like(const Tensor& tensor, const Tensor& u, const char* name) {
  bool same = tensor.dim() == 4 && on_device_of(tensor, u) && tensor.scalar_type() == u.scalar_type();
  for (int64_t i = 0; same && i < 4; ++i) same = tensor.size(i) == u.size(i);
  STD_TORCH_CHECK(same, "gated_excitation: ", name, " differs from u in shape, dtype or device");
}

// The launchers' inputs, and the tensors that own what they point to.
class CheckedInputs {
 public:
  CheckedInputs(const Tensor& u, const std::vector<Tensor>& parameters, const std::vector<Tensor>& running,
                bool training, double eps)
      : u_(u) {
    inputs.dtype = dtype_of(u.scalar_type(), "gated_excitation", "u");
    inputs.sizes = sizes_of(u, parameters);
    inputs.u = image_of(u);
    inputs.training = training;
    inputs.eps = static_cast<float>(eps);
    STD_TORCH_CHECK(training ? running.empty() : running.size() == kNumRunning, "gated_excitation: ", running.size(),
                    " running statistics, expected ", training ? 0 : static_cast<int>(kNumRunning));
    // The kernels know one dtype for both lists. Where they differ, the narrower one is converted.
    const ScalarType parameter_type = parameters[0].scalar_type();
    const bool mixed = !training && running[0].scalar_type() != parameter_type;
    const ScalarType kernel_type = mixed ? ScalarType::Float : parameter_type;
    inputs.parameter_dtype = mixed ? Dtype::kFloat : dtype_of(parameter_type, "gated_excitation", "parameters[0]");
    for (int k = 0; k < kNumParameters; ++k) {
      inputs.parameters[k] =
          data(parameters[k], parameter_shape(k, inputs.sizes), parameter_type, kernel_type, "parameters", k);
    }
    for (int k = 0; k < static_cast<int>(running.size()); ++k) {
      inputs.running[k] =
          data(running[k], running_shape(k, inputs.sizes), running[0].scalar_type(), kernel_type, "running", k);
    }
  }

  Inputs inputs{};

 private:
  const void* data(const Tensor& tensor, const Shape& shape, ScalarType list_type, ScalarType kernel_type,
                   const char* list, int index) {
    STD_TORCH_CHECK(on_device_of(tensor, u_), "gated_excitation: ", list, "[", index, "] is not on the device of u");
    check_shape(tensor, shape, "gated_excitation", list, index);
    const ScalarType type = tensor.scalar_type();
    STD_TORCH_CHECK(type == list_type && (type == u_.scalar_type() || type == ScalarType::Float),
                    "gated_excitation: ", list, "[", index,
                    "] has another dtype than u or float32, or than the others of its list");
    Tensor owned = packed(tensor);
    if (type != kernel_type) owned = torch::stable::to(owned, kernel_type);
    owned_.push_back(owned);
    return owned.data_ptr();
  }

  const Tensor& u_;
  std::vector<Tensor> owned_;
};

Tensor new_floats(const Tensor& u, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(u, shape, ScalarType::Float);
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Fills `out`; returns it with what was saved and the statistics, each empty where there is none.
Result run_forward(const Tensor& u, const std::vector<Tensor>& parameters, const std::vector<Tensor>& running,
                   bool training, double eps, bool save, const Tensor& out) {
  const DeviceGuard guard = guard_device_of(u);
  const CheckedInputs checked(u, parameters, running, training, eps);
  const Sizes& s = checked.inputs.sizes;
  // What is not needed is a tensor of its own all the same: an operator's results may not share memory.
  const auto buffer = [&](bool needed, const std::vector<int64_t>& shape) {
    return new_floats(u, needed ? shape : std::vector<int64_t>{0});
  };
  const Tensor position = buffer(save, {s.batch, kNumBranches, s.positions()});
  const Tensor pooled = buffer(save, {s.batch, kNumBranches, s.channels});
  const Tensor hidden = buffer(save, {s.batch, s.hidden()});
  const Tensor map_statistics = buffer(training, {2, s.channels});
  const Tensor hidden_statistics = buffer(training, {2, s.hidden()});
  const Tensor workspace = workspace_like(u, forward_workspace_bytes(checked.inputs, save));
  const Saved saved{floats(position), floats(pooled), floats(hidden), floats(map_statistics),
                    floats(hidden_statistics)};
  forward(checked.inputs, save, image_of(out), saved, workspace.data_ptr(), stream_of(u));
  return {out, position, pooled, hidden, map_statistics, hidden_statistics};
}

Result gated_excitation(const Tensor& u, const std::vector<Tensor>& parameters, const std::vector<Tensor>& running,
                        bool training, double eps, bool save) {
  return run_forward(u, parameters, running, training, eps, save, torch::stable::empty_like(u));
}

std::tuple<Tensor, Tensor> gated_excitation_out(const Tensor& u, const std::vector<Tensor>& parameters,
                                                const std::vector<Tensor>& running, bool training, double eps,
                                                const Tensor& out) {
  check_like(out, u, "out");
  const Result result = run_forward(u, parameters, running, training, eps, /*save=*/false, out);
  return {std::get<4>(result), std::get<5>(result)};
}

float* saved_floats(const Tensor& tensor, int64_t numel, const Tensor& u, const char* name) {
  STD_TORCH_CHECK(on_device_of(tensor, u) && tensor.is_contiguous() && tensor.numel() == numel &&
                      tensor.scalar_type() == ScalarType::Float,
                  "gated_excitation_backward: ", name, " is not what the forward pass saved for this u");
  return floats(tensor);
}

std::tuple<Tensor, Tensor> gated_excitation_backward(const Tensor& grad_out, const Tensor& u,
                                                     const std::vector<Tensor>& parameters,
                                                     const std::vector<Tensor>& running, const Tensor& position,
                                                     const Tensor& pooled, const Tensor& hidden,
                                                     const Tensor& map_statistics, const Tensor& hidden_statistics,
                                                     bool training, double eps) {
  const DeviceGuard guard = guard_device_of(u);
  const CheckedInputs checked(u, parameters, running, training, eps);
  check_like(grad_out, u, "grad_out");
  const Sizes& s = checked.inputs.sizes;
  const Saved saved{
      saved_floats(position, s.batch * kNumBranches * s.positions(), u, "position"),
      saved_floats(pooled, s.batch * kNumBranches * s.channels, u, "pooled"),
      saved_floats(hidden, s.batch * s.hidden(), u, "hidden"),
      saved_floats(map_statistics, training ? 2 * s.channels : 0, u, "map_statistics"),
      saved_floats(hidden_statistics, training ? 2 * s.hidden() : 0, u, "hidden_statistics"),
  };
  int64_t numel = 0;
  for (int k = 0; k < kNumParameters; ++k) numel += parameter_numel(k, s);
  const Tensor grad_u = torch::stable::empty_like(u);
  const Tensor grad_parameters = new_floats(u, {numel});
  const Tensor workspace = workspace_like(u, backward_workspace_bytes(checked.inputs));
  backward(checked.inputs, image_of(grad_out), saved, image_of(grad_u), floats(grad_parameters), workspace.data_ptr(),
           stream_of(u));
  return {grad_u, grad_parameters};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CUDA, m) {
  m.impl("gated_excitation", TORCH_BOX(&gated_excitation));
  m.impl("gated_excitation_out", TORCH_BOX(&gated_excitation_out));
  m.impl("gated_excitation_backward", TORCH_BOX(&gated_excitation_backward));
}

}  // namespace pyext::gated_excitation
