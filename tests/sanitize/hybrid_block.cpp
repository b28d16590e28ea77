// Calls the kernel of csrc/cpu/hybrid_block_kernel.cpp with threads and memory that sanitizers understand, and fails
// where an element of the result was not written. Its numbers are the operator tests' concern.
#include "cpu/hybrid_block.h"

#include "cpu/vector.h"
#include "tensors.h"

namespace {

using namespace pyext::cpu;
using namespace pyext::hybrid_block;
using pyext::sanitize::CallMemory;
using pyext::sanitize::map_of;
using pyext::sanitize::Tensors;

const Sizes kSizes[] = {{3, 5, 7, 9, 2, 8, 4, 2, 3, 2, 1, true},    {1, 3, 1, 1, 2, 4, 2, 1, 1, 1, 1, true},
                        {2, 6, 8, 8, 2, 13, 11, 1, 5, 4, 1, true},  {2, 4, 1, 75, 1, 14, 7, 7, 2, 2, 1, true},
                        {1, 9, 20, 20, 1, 9, 7, 1, 3, 3, 2, false}, {3, 4, 5, 70, 1, 7, 3, 1, 2, 2, 2, false},
                        {0, 3, 4, 4, 1, 4, 2, 1, 1, 1, 1, true},    {2, 3, 16, 16, 1, 6, 6, 3, 2, 2, 1, false}};

// The name of a result that holds a NaN; null if there is none.
template <typename S>
const char* run(const Sizes& s, DType dtype, bool packed, bool channels_last, int64_t threads) {
  Tensors memory;
  std::vector<const void*> tensors;
  for (int64_t m = 0; m < s.modules; ++m) {
    for (int k = 0; k < kNumTensors; ++k) {
      const bool pairs = packed && is_convolution(k);
      tensors.push_back(pairs ? static_cast<void*>(memory.drawn<BFloat16>(2 * packed_shape(k, s, m).numel(), 0.5, 1.5))
                              : memory.drawn<S>(tensor_numel(k, s, m), 0.5, 1.5));
    }
  }
  const std::vector<DType> dtypes(tensors.size(), dtype);
  const int64_t out_numel = s.batch * s.out_channels() * s.out_positions();
  HybridBlock args{s, dtype, 1e-5};
  args.x = map_of(memory.drawn<S>(s.batch * s.channels * s.positions(), -1, 1), s.channels, s.height, s.width,
                  channels_last);
  S* out = memory.blank<S>(out_numel);
  args.out = map_of(out, s.out_channels(), s.out_height(), s.out_width(), channels_last);
  args.tensors = tensors.data();
  args.tensor_dtypes = dtypes.data();
  args.packed = packed;
  CallMemory call;
  PYEXT_CAPABILITY::hybrid_block_kernels.forward(args, call.host(threads));
  return Tensors::written(out, out_numel) ? nullptr : "out";
}

}  // namespace

int main() {
  const auto call = [](const Sizes& s, auto zero, DType dtype, int variant, int64_t threads) {
    const bool packed = variant % 2 == 1 && (dtype == DType::kFloat || dtype == DType::kBFloat16);
    return run<decltype(zero)>(s, dtype, packed, variant / 2 == 1, threads);
  };
  pyext::sanitize::run_all("calls", kSizes, 4, call);
}
