// Calls the kernels of csrc/cpu/gated_excitation_kernel.cpp with threads and memory that sanitizers understand, and
// fails where an element of a result was not written. Its numbers are the operator tests' concern.
#include "cpu/gated_excitation.h"

#include "cpu/vector.h"
#include "tensors.h"

namespace {

using namespace pyext::cpu;
using namespace pyext::gated_excitation;
using pyext::sanitize::CallMemory;
using pyext::sanitize::Tensors;

const Sizes kSizes[] = {{1, 1, 1, 1, 1, 1},   {3, 3, 1, 41, 2, 2},  {3, 4, 37, 1, 2, 5},  {5, 7, 9, 11, 3, 5},
                        {4, 18, 8, 8, 17, 9}, {2, 5, 53, 23, 3, 4}, {3, 2, 3, 600, 2, 2}, {0, 3, 4, 5, 2, 2}};

template <typename S>
class Call {
  using T = Accumulate<S>;

 public:
  Call(const Sizes& sizes, DType dtype, bool training, bool channels_last)
      : map_numel_(sizes.batch * sizes.channels * sizes.positions()), channels_last_(channels_last) {
    args_.sizes = sizes;
    args_.dtype = args_.parameter_dtype = args_.running_dtype = dtype;
    args_.training = training;
    args_.eps = 1e-5;
    args_.u = map(drawn(map_numel_));
    args_.grad_out = map(drawn(map_numel_));
    args_.out = map(tensors_.blank<S>(map_numel_));
    args_.grad_u = map(tensors_.blank<S>(map_numel_));
    int64_t parameters = 0;
    for (int k = 0; k < kNumParameters; ++k) {
      args_.parameters[k] = drawn(parameter_numel(k, sizes));
      parameters += parameter_numel(k, sizes);
    }
    const int64_t lengths[] = {sizes.channels, sizes.channels, sizes.attention, sizes.forget};
    for (int k = 0; k < kNumRunning && !training; ++k) {
      args_.running[k] = tensors_.drawn<S>(lengths[k / 2], k % 2 ? 0.5 : -1, 1.5);
    }
    args_.position = tensors_.blank<T>(sizes.batch * kNumBranches * sizes.positions());
    args_.pooled = tensors_.blank<T>(sizes.batch * kNumBranches * sizes.channels);
    args_.hidden = tensors_.blank<T>(sizes.batch * sizes.hidden());
    args_.map_statistics = tensors_.blank<T>(training ? 2 * sizes.channels : 0);
    args_.hidden_statistics = tensors_.blank<T>(training ? 2 * sizes.hidden() : 0);
    args_.grad_parameters = tensors_.blank<T>(parameters);
    num_parameters_ = parameters;
  }

  // The name of the first result that holds a NaN; null if there is none.
  const char* run(int64_t threads) {
    CallMemory forward, backward;
    const auto& kernels = PYEXT_CAPABILITY::gated_excitation_kernels;
    kernels.forward(args_, forward.host(threads));
    kernels.backward(args_, backward.host(threads));
    if (!Tensors::written(static_cast<const S*>(args_.out.data), map_numel_)) return "out";
    if (!Tensors::written(static_cast<const S*>(args_.grad_u.data), map_numel_)) return "grad_u";
    if (!Tensors::written(static_cast<const T*>(args_.grad_parameters), num_parameters_)) return "grad_parameters";
    return nullptr;
  }

 private:
  S* drawn(int64_t n) { return tensors_.drawn<S>(n, -1, 1); }
  Map map(void* data) const {
    const Sizes& s = args_.sizes;
    const int64_t c = s.channels, p = s.positions(), w = s.width;
    if (channels_last_) return {data, {c * p, 1, c * w, c}};
    return {data, {c * p, p, w, 1}};
  }

  GatedExcitation args_{};
  int64_t map_numel_, num_parameters_;
  bool channels_last_;
  Tensors tensors_;
};

}  // namespace

int main() {
  const auto call = [](const Sizes& s, auto zero, DType dtype, int variant, int64_t threads) {
    const bool training = variant % 2 == 1 && s.batch > 1;
    return Call<decltype(zero)>(s, dtype, training, variant / 2 == 1).run(threads);
  };
  pyext::sanitize::run_all("forward and backward calls", kSizes, 4, call);
}
