// Calls the kernel of csrc/cpu/memory_update_kernel.cpp with threads and memory that sanitizers understand, and fails
// where it wrote a NaN. Its numbers are the operator tests' concern.
#include "cpu/memory_update.h"

#include "cpu/vector.h"
#include "tensors.h"

namespace {

using namespace pyext::cpu;
using pyext::sanitize::CallMemory;
using pyext::sanitize::Tensors;

struct Sizes {
  int64_t peers, batch, features, rows;
};

// The last batches are longer than their banks, so rows occur several times.
const Sizes kSizes[] = {{2, 0, 3, 4}, {2, 1, 1, 1}, {3, 4, 130, 20}, {4, 9, 33, 5}, {3, 40, 64, 7}};

// The name of a result that holds a NaN after an update of banks, null if there is none; their rows are apart by `gap`
// elements.
template <typename S>
const char* run(const Sizes& s, DType dtype, int64_t gap, int64_t threads) {
  Tensors tensors;
  const int64_t pitch = s.features + gap, numel = (s.rows - 1) * pitch + s.features;
  std::vector<void*> banks;
  for (int64_t i = 0; i < s.peers; ++i) banks.push_back(tensors.drawn<S>(numel, -1, 1));
  const std::vector<int64_t> pitches(s.peers, pitch);
  const Accumulate<S>* embeddings = tensors.drawn<Accumulate<S>>(s.peers * s.batch * s.features, -1, 1);
  const MemoryUpdate args{s.peers,      s.batch,        s.features, dtype,
                          banks.data(), pitches.data(), embeddings, tensors.drawn_below(s.batch, s.rows),
                          0.5};
  CallMemory memory;
  PYEXT_CAPABILITY::memory_update_kernels.run(args, memory.host(threads));
  for (void* bank : banks) {
    if (!Tensors::written(static_cast<const S*>(bank), numel)) return "a bank";
  }
  return nullptr;
}

}  // namespace

int main() {
  pyext::sanitize::run_all("calls", kSizes, 2,
                           [](const Sizes& s, auto zero, DType dtype, int variant, int64_t threads) {
                             return run<decltype(zero)>(s, dtype, 3 * variant, threads);
                           });
}
