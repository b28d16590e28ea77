// Calls the kernels of csrc/cpu/dense_block_kernel.cpp with threads and memory that sanitizers understand, and fails
// where an element of a result was not written. Their numbers are the operator tests' concern.
#include "cpu/dense_block.h"

#include "cpu/vector.h"
#include "tensors.h"

namespace {

using namespace pyext::cpu;
using namespace pyext::dense_block;
using pyext::sanitize::CallMemory;
using pyext::sanitize::map_of;
using pyext::sanitize::Tensors;

const Sizes kSizes[] = {{3, 5, 7, 9, 2, 8, 4},       {1, 3, 1, 1, 2, 4, 2},    {2, 70, 8, 8, 2, 128, 32},
                        {2, 4, 1, 75, 3, 14, 7},     {1, 9, 20, 20, 2, 0, 12}, {70, 300, 2, 2, 2, 33, 5},
                        {0, 3, 4, 4, 1, 4, 2},       {4, 150, 6, 5, 1, 0, 40}, {3, 70, 6, 7, 0, 0, 0, 33},
                        {1, 300, 2, 3, 0, 0, 0, 40}, {2, 7, 8, 9, 2, 5, 3, 12}};

// The name of the first result that holds a NaN; null if there is none.
template <typename S>
const char* run(const Sizes& s, DType dtype, bool channels_last, int64_t threads) {
  using T = Accumulate<S>;
  const auto& kernels = PYEXT_CAPABILITY::dense_block_kernels;
  const DType wide = std::is_same_v<T, double> ? DType::kDouble : DType::kFloat;
  Tensors memory;
  CallMemory call;
  std::vector<const void*> tensors;
  for (int64_t i = 0; i < s.tensors(); ++i) tensors.push_back(memory.drawn<T>(tensor_shape(i, s).numel(), 0.5, 1.5));
  const int64_t packed_numel = kernels.packed_numel(s, wide);
  T* packed = memory.blank<T>(packed_numel);
  kernels.pack({s, wide, 1e-5, tensors.data()}, packed, call.host(threads));
  S* x = memory.drawn<S>(s.batch * s.channels * s.positions(), -1e-3, 1e-3);
  const int64_t out_numel = s.batch * s.out_channels() * s.out_positions();
  S* out = memory.blank<S>(out_numel);
  if (s.batch > 0) {
    const Map from = map_of(x, s.channels, s.height, s.width, channels_last);
    kernels.forward({s, dtype, from, map_of(out, s.out_channels(), s.height, s.width, true), packed},
                    call.host(threads));
  }
  if (!Tensors::written(packed, packed_numel)) return "packed";
  return Tensors::written(out, out_numel) ? nullptr : "out";
}

}  // namespace

int main() {
  pyext::sanitize::run_all("calls", kSizes, 2,
                           [](const Sizes& s, auto zero, DType dtype, int variant, int64_t threads) {
                             return run<decltype(zero)>(s, dtype, variant == 1, threads);
                           });
}
