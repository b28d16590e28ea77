// Calls the kernels of csrc/cpu/masked_conv2d_kernel.cpp with threads and memory that sanitizers understand, and fails
// where an element of a result was not written. Their numbers are the operator tests' concern.
#include "cpu/masked_conv2d.h"

#include <vector>

#include "cpu/vector.h"
#include "tensors.h"

namespace {

using namespace pyext::cpu;
using namespace pyext::masked_conv2d;
using pyext::sanitize::CallMemory;
using pyext::sanitize::map_of;
using pyext::sanitize::Tensors;

struct Layer {
  int64_t batch, height, width, kernel, stride, padding, dilation;
  int64_t group_inputs, group_outputs, groups, subnets, pool;
  bool gated;
};

const Layer kLayers[] = {{3, 32, 32, 3, 1, 1, 1, 9, 14, 1, 1, 1, false},  {70, 2, 2, 3, 1, 1, 1, 12, 20, 1, 1, 1, true},
                         {9, 4, 4, 3, 1, 1, 1, 8, 9, 1, 4, 2, true},      {3, 15, 11, 3, 2, 1, 1, 3, 4, 3, 2, 1, false},
                         {2, 9, 8, 5, 1, 2, 1, 1, 1, 10, 1, 1, true},     {2, 20, 21, 3, 2, 2, 2, 6, 7, 1, 1, 2, false},
                         {1, 1, 1, 1, 1, 0, 1, 40, 30, 1, 1, 1, false},   {2, 3, 3, 2, 3, 5, 1, 4, 5, 1, 1, 1, true},
                         {1, 90, 100, 3, 1, 1, 1, 16, 24, 1, 1, 2, true}, {5, 7, 7, 1, 2, 0, 1, 6, 8, 1, 3, 1, false}};

// Every second channel, of sub-network s one less from the end on.
std::vector<int64_t> lists(int64_t subnets, int64_t channels) {
  const int64_t longest = (channels + 1) / 2;
  std::vector<int64_t> all;
  for (int64_t s = 0; s < subnets; ++s) {
    for (int64_t i = 0; i < longest; ++i) all.push_back(i == 0 || i < longest - s ? 2 * i : -1);
  }
  return all;
}

template <typename S>
class Call {
  using T = Accumulate<S>;

 public:
  Call(const Layer& layer, DType dtype, bool channels_last, bool packed)
      : inputs_(lists(layer.subnets, layer.group_inputs * layer.groups)),
        outputs_(lists(layer.subnets, layer.group_outputs * layer.groups)),
        packed_(packed) {
    Sizes& s = args_.sizes;
    s.batch = layer.batch;
    s.subnets = layer.subnets;
    s.inputs = static_cast<int64_t>(inputs_.size()) / layer.subnets;
    s.outputs = static_cast<int64_t>(outputs_.size()) / layer.subnets;
    s.rows = {layer.height, layer.kernel, layer.stride, layer.padding, layer.dilation};
    s.columns = {layer.width, layer.kernel, layer.stride, layer.padding, layer.dilation};
    s.group_inputs = layer.group_inputs;
    s.groups = layer.groups;
    s.out_channels = layer.group_outputs * layer.groups;
    s.activation = Activation::kRelu6;
    s.pool = layer.pool;
    args_.dtype = args_.parameter_dtype = dtype;
    for (int64_t n = 0; n < s.batch; ++n) subnets_.push_back(n % layer.subnets);
    args_.inputs = inputs_.data();
    args_.outputs = outputs_.data();
    args_.image_subnets = layer.subnets > 1 ? subnets_.data() : nullptr;
    args_.weight = memory_.drawn<S>(s.out_channels * s.group_inputs * s.taps(), -1, 1);
    args_.scale = memory_.drawn<S>(s.out_channels, 0.5, 1.5);
    args_.shift = memory_.drawn<S>(s.out_channels, -0.5, 0.5);
    args_.gate = layer.gated ? memory_.drawn<S>(s.batch * s.outputs, 0, 2) : nullptr;
    S* x = memory_.drawn<S>(s.batch * s.inputs * layer.height * layer.width, -1, 1);
    args_.x = map_of(x, s.inputs, layer.height, layer.width, channels_last);
    numel_ = s.batch * s.outputs * s.out_height() * s.out_width();
    out_ = memory_.blank<S>(numel_);
    args_.out = map_of(out_, s.outputs, s.out_height(), s.out_width(), false);
  }

  // The result with an element that nobody wrote; null if there is none.
  const char* run(int64_t threads) {
    CallMemory call;
    const Host host = call.host(threads);
    if (packed_) {
      const int64_t numel = kernels().packed_numel(args_);
      T* packed = memory_.blank<T>(numel);
      kernels().pack(args_, packed, host);
      if (!Tensors::written(packed, numel)) return "packed";
      args_.packed = packed;
    }
    S* means = memory_.blank<S>(args_.sizes.batch * args_.sizes.outputs);
    const MaskedConv2d layers[] = {args_, mean(means)};
    kernels().forward(layers, 2, host);
    if (!Tensors::written(means, args_.sizes.batch * args_.sizes.outputs)) return "means";
    kernels().forward(layers, 1, host);
    return Tensors::written(out_, numel_) ? nullptr : "out";
  }

 private:
  // That of the result, as a second layer.
  MaskedConv2d mean(S* to) const {
    const Sizes& s = args_.sizes;
    MaskedConv2d layer{};
    layer.dtype = layer.parameter_dtype = args_.dtype;
    layer.sizes.batch = s.batch;
    layer.sizes.subnets = 1;
    layer.sizes.inputs = layer.sizes.outputs = s.outputs;
    layer.sizes.rows.input = s.out_height();
    layer.sizes.columns.input = s.out_width();
    layer.x = args_.out;
    layer.out = map_of(to, s.outputs, 1, 1, false);
    return layer;
  }

  static const MaskedConv2dKernels& kernels() { return PYEXT_CAPABILITY::masked_conv2d_kernels; }

  std::vector<int64_t> inputs_, outputs_, subnets_;
  bool packed_;
  Tensors memory_;
  MaskedConv2d args_{};
  S* out_;
  int64_t numel_;
};

}  // namespace

int main() {
  const auto call = [](const Layer& layer, auto zero, DType dtype, int variant, int64_t threads) {
    return Call<decltype(zero)>(layer, dtype, variant == 1, variant == 1).run(threads);
  };
  pyext::sanitize::run_all("calls", kLayers, 2, call);
}
