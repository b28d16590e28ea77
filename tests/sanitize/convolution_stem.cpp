// Calls the kernel of csrc/cpu/convolution_stem_kernel.cpp with threads and memory that sanitizers understand, and
// fails where an element of the result was not written. Its numbers are the operator tests' concern.
#include "cpu/convolution_stem.h"

#include "cpu/vector.h"
#include "tensors.h"

namespace {

using namespace pyext::cpu;
using namespace pyext::convolution_stem;
using pyext::sanitize::CallMemory;
using pyext::sanitize::map_of;
using pyext::sanitize::Tensors;

const Sizes kSizes[] = {{3, 3, 20, 28, 3, 2}, {1, 3, 1, 1, 2, 1},  {2, 5, 7, 9, 2, 1}, {5, 1, 33, 17, 1, 2},
                        {1, 2, 1, 75, 3, 2},  {2, 4, 70, 1, 2, 1}, {0, 3, 4, 4, 1, 2}, {1, 3, 65, 40, 3, 2}};
const int64_t kOutputs[] = {5, 7, 13};

// The name of a result that holds a NaN; null if there is none.
template <typename S>
const char* run(const Sizes& s, DType dtype, bool channels_last, int64_t threads) {
  Tensors memory;
  std::vector<const void*> tensors;
  int64_t channels = s.channels;
  for (int64_t l = 0; l < s.layers; ++l) {
    for (int k = 0; k < kNumTensors; ++k) {
      tensors.push_back(memory.drawn<S>(tensor_shape(k, channels, kOutputs[l]).numel(), 0.5, 1.5));
    }
    channels = kOutputs[l];
  }
  const std::vector<DType> dtypes(tensors.size(), dtype);
  const int64_t out_numel = s.batch * channels * s.out_height() * s.out_width();
  ConvolutionStem args{s, dtype, 1e-5};
  args.x = map_of(memory.drawn<S>(s.batch * s.channels * s.height * s.width, -1, 1), s.channels, s.height, s.width,
                  channels_last);
  S* out = memory.blank<S>(out_numel);
  args.out = map_of(out, channels, s.out_height(), s.out_width(), false);
  args.outputs = kOutputs;
  args.tensors = tensors.data();
  args.tensor_dtypes = dtypes.data();
  CallMemory call;
  PYEXT_CAPABILITY::convolution_stem_kernels.forward(args, call.host(threads));
  return Tensors::written(out, out_numel) ? nullptr : "out";
}

}  // namespace

int main() {
  pyext::sanitize::run_all("calls", kSizes, 2,
                           [](const Sizes& s, auto zero, DType dtype, int variant, int64_t threads) {
                             return run<decltype(zero)>(s, dtype, variant == 1, threads);
                           });
}
