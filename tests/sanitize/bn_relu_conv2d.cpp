// Calls the kernels of csrc/cpu/bn_relu_conv2d_kernel.cpp with threads and memory that sanitizers understand, and fails
// where an element of a result was not written. Their numbers are the operator tests' concern.
#include "cpu/bn_relu_conv2d.h"

#include "cpu/vector.h"
#include "tensors.h"

namespace {

using namespace pyext::cpu;
using namespace pyext::bn_relu_conv2d;
using pyext::sanitize::CallMemory;
using pyext::sanitize::Tensors;

const Sizes kSizes[] = {{3, 13, 7, 9, 11, 1, 1, 1},   {1, 3, 1, 1, 2, 1, 1, 1},     {2, 7, 1, 75, 70, 1, 1, 1},
                        {5, 24, 8, 8, 20, 1, 1, 1},   {0, 3, 4, 4, 2, 1, 1, 1},     {3, 8, 7, 9, 6, 2, 3, 1},
                        {2, 12, 16, 16, 9, 3, 3, 1},  {2, 6, 1, 1, 4, 1, 3, 1},     {2, 5, 20, 21, 7, 1, 3, 2},
                        {3, 4, 1, 70, 3, 1, 3, 2},    {5, 13, 3, 7, 35, 1, 3, 1},   {16, 8, 2, 2, 32, 1, 3, 1},
                        {2, 14, 16, 16, 8, 2, 3, 2},  {0, 3, 4, 4, 2, 1, 3, 2},     {16, 40, 12, 11, 33, 1, 3, 1},
                        {11, 48, 9, 10, 40, 1, 3, 1}, {5, 40, 23, 19, 36, 1, 3, 2}, {2, 24, 70, 300, 24, 1, 3, 2}};

enum class Layout { kDense, kChannelsLast, kImagesInnermost };

Map map_of(void* data, int64_t batch, int64_t channels, int64_t height, int64_t width, Layout layout) {
  if (layout == Layout::kImagesInnermost) return {data, {1, height * width * batch, width * batch, batch}};
  return pyext::sanitize::map_of(data, channels, height, width, layout == Layout::kChannelsLast);
}

template <typename S>
class Call {
  using T = Accumulate<S>;

 public:
  Call(const Sizes& s, DType dtype, Layout layout) : s_(s) {
    args_.sizes = s;
    args_.dtype = args_.parameter_dtype = dtype;
    args_.training = true;
    args_.eps = 1e-5;
    // As the binding decides it.
    args_.rows =
        layout == Layout::kImagesInnermost && std::is_same_v<S, T> && s.groups == 1 && s.stride == 1 && s.batch > 1;
    const int64_t in = s.batch * s.in_channels * s.positions(), out = s.batch * s.out_channels * s.out_positions();
    args_.x = in_map(memory_.drawn<S>(in, -1, 1), layout);
    args_.norm_weight = memory_.drawn<S>(s.in_channels, 0.5, 1.5);
    args_.norm_bias = memory_.drawn<S>(s.in_channels, -0.5, 0.5);
    args_.conv_weight = memory_.drawn<S>(s.weight_numel(), -1, 1);
    args_.mean = mean_ = memory_.blank<T>(s.in_channels);
    args_.var = var_ = memory_.blank<T>(s.in_channels);
    args_.out = out_map(out_ = memory_.blank<S>(out), layout);
    args_.grad_out = out_map(memory_.drawn<S>(out, -1, 1), layout);
    args_.grad_x = in_map(grad_x_ = memory_.blank<S>(in), layout);
    args_.grad_norm_weight = grad_norm_[0] = memory_.blank<T>(s.in_channels);
    args_.grad_norm_bias = grad_norm_[1] = memory_.blank<T>(s.in_channels);
    args_.grad_conv_weight = grad_weight_ = memory_.blank<T>(s.weight_numel());
  }

  // The result with an element that nobody wrote; null if there is none.
  const char* run(int64_t threads) {
    for (const auto kernel : {kernels().statistics, kernels().forward, kernels().backward}) {
      CallMemory call;
      kernel(args_, call.host(threads));
    }
    if (!args_.rows) {
      args_.out_mean = memory_.blank<T>(s_.out_channels);
      args_.out_var = memory_.blank<T>(s_.out_channels);
      CallMemory call;
      kernels().forward(args_, call.host(threads));
      for (const void* noted : {args_.out_mean, args_.out_var}) {
        if (!Tensors::written(static_cast<const T*>(noted), s_.out_channels)) return "statistics of the result";
      }
      args_.add = true;
      args_.corrections = memory_.drawn<double>(2 * s_.in_channels, -1, 1);
      for (const auto kernel : {kernels().backward, kernels().correct}) {
        CallMemory call;
        kernel(args_, call.host(threads));
      }
    }
    const int64_t in = s_.batch * s_.in_channels * s_.positions(),
                  out = s_.batch * s_.out_channels * s_.out_positions();
    if (!Tensors::written(mean_, s_.in_channels) || !Tensors::written(var_, s_.in_channels)) return "statistics";
    if (!Tensors::written(out_, out)) return "out";
    if (!Tensors::written(grad_x_, in)) return "grad_x";
    for (const T* grad : grad_norm_) {
      if (!Tensors::written(grad, s_.in_channels)) return "grad_norm";
    }
    if (!Tensors::written(grad_weight_, s_.weight_numel())) return "grad_conv_weight";
    if (const char* unwritten = args_.rows ? run_addition(threads) : nullptr) return unwritten;
    if (s_.kernel != 1) return nullptr;
    args_.add = false;
    args_.corrections = nullptr;
    const char* unwritten = s_.height > 1 && s_.width > 1 ? run_pool(threads) : nullptr;
    return unwritten || !std::is_same_v<S, T> ? unwritten : run_max_pool(threads);
  }

 private:
  // As a dense block asks for it: gradients that are added to what is there, and corrected in the end.
  const char* run_addition(int64_t threads) {
    args_.add = true;
    args_.corrections = memory_.drawn<double>(2 * s_.in_channels, -1, 1);
    for (const auto kernel : {kernels().backward, kernels().correct}) {
      CallMemory call;
      kernel(args_, call.host(threads));
    }
    const bool written = Tensors::written(grad_x_, s_.batch * s_.in_channels * s_.positions()) &&
                         Tensors::written(args_.corrections, 2 * s_.in_channels);
    return written ? nullptr : "grad_x, added to";
  }

  const char* run_pool(int64_t threads) {
    const Layout layout = args_.rows ? Layout::kImagesInnermost : Layout::kDense;
    return run_pools({kernels().pool, kernels().pool_backward}, s_.height / 2, s_.width / 2, layout, threads);
  }

  const char* run_max_pool(int64_t threads) {
    const int64_t numel = s_.batch * s_.in_channels * s_.positions();
    args_.x = in_map(memory_.drawn<S>(numel, -1, 1), Layout::kDense);
    args_.grad_x = in_map(grad_x_ = memory_.blank<S>(numel), Layout::kDense);
    return run_pools({kernels().max_pool, kernels().max_pool_backward}, (s_.height + 1) / 2, (s_.width + 1) / 2,
                     Layout::kImagesInnermost, threads);
  }

  using Kernel = void (*)(const BNReLUConv2d&, const Host&);

  // The result, height x width, in `layout`.
  const char* run_pools(std::initializer_list<Kernel> pools, int64_t height, int64_t width, Layout layout,
                        int64_t threads) {
    const int64_t pooled = s_.batch * s_.in_channels * height * width;
    args_.sizes.out_channels = s_.in_channels;
    args_.sizes.kernel = 0;
    S* to = memory_.blank<S>(pooled);
    args_.out = map_of(to, s_.batch, s_.in_channels, height, width, layout);
    args_.grad_out = map_of(memory_.drawn<S>(pooled, -1, 1), s_.batch, s_.in_channels, height, width, layout);
    for (const Kernel kernel : pools) {
      CallMemory call;
      kernel(args_, call.host(threads));
    }
    const bool written = Tensors::written(grad_x_, s_.batch * s_.in_channels * s_.positions());
    return written && Tensors::written(to, pooled) ? nullptr : "pooled map or its gradient";
  }

  static const BNReLUConv2dKernels& kernels() { return PYEXT_CAPABILITY::bn_relu_conv2d_kernels; }
  Map in_map(S* data, Layout layout) const {
    return map_of(data, s_.batch, s_.in_channels, s_.height, s_.width, layout);
  }
  Map out_map(S* data, Layout layout) const {
    return map_of(data, s_.batch, s_.out_channels, s_.out_height(), s_.out_width(), layout);
  }

  Sizes s_;
  Tensors memory_;
  BNReLUConv2d args_{};
  T *mean_, *var_, *grad_norm_[2], *grad_weight_;
  S *out_, *grad_x_;
};

}  // namespace

int main() {
  pyext::sanitize::run_all("calls", kSizes, 3,
                           [](const Sizes& s, auto zero, DType dtype, int variant, int64_t threads) {
                             return Call<decltype(zero)>(s, dtype, static_cast<Layout>(variant)).run(threads);
                           });
}
