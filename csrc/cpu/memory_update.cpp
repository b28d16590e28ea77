// memory_update on the CPU: checks that memory safety needs, dispatch to an instruction set.
#include "cpu/memory_update.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cpu/capability.h"
#include "cpu/host.h"
#include "cpu/memory_banks.h"

namespace pyext::cpu {
namespace {

const MemoryUpdateKernels& kernels() {
#if defined(__x86_64__)
  return select(baseline::memory_update_kernels, avx2::memory_update_kernels, avx512::memory_update_kernels);
#else
  return baseline::memory_update_kernels;
#endif
}

void update(const std::vector<Tensor>& bank_list, const Tensor& embeddings, const Tensor& index, double momentum) {
  const MemoryBanks banks("memory_update", bank_list, embeddings);
  const int64_t batch = embeddings.size(1);
  STD_TORCH_CHECK(
      index.is_cpu() && index.scalar_type() == ScalarType::Long && index.dim() == 1 && index.size(0) == batch,
      "memory_update: index must be an int64 CPU tensor of shape (batch,)");
  const Tensor rows = index.is_contiguous() ? index : torch::stable::contiguous(index);
  const int64_t* row = static_cast<const int64_t*>(rows.data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(row[b] >= 0 && row[b] < banks.rows, "memory_update: index[", b, "] is ", row[b],
                    ", expected a row of the banks, 0 to ", banks.rows - 1);
  }
  const Tensor v = banks.in_accumulate_type(embeddings);
  const MemoryUpdate args{embeddings.size(0), batch, banks.features, banks.dtype, banks.data.data(), banks.pitch.data(),
                          v.data_ptr(),       row,   momentum};
  CallMemory memory;
  kernels().run(args, memory.host());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) { m.impl("memory_update", TORCH_BOX(&update)); }

}  // namespace pyext::cpu
