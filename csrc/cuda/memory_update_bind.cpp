// memory_update on CUDA: checks, the device and its stream, registration.
#include "cuda/memory_update.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "cuda/memory_banks_bind.h"

namespace pyext::memory_update {
namespace {

using namespace pyext::cuda;

void run(const std::vector<Tensor>& bank_list, const Tensor& embeddings, const Tensor& index, double momentum) {
  const MemoryBanks banks("memory_update", bank_list, embeddings);
  const DeviceGuard guard(embeddings.get_device_index());
  const int64_t batch = embeddings.size(1);
  STD_TORCH_CHECK(on_device_of(index, embeddings) && index.scalar_type() == ScalarType::Long && index.dim() == 1 &&
                      index.size(0) == batch && batch < (int64_t{1} << 31),
                  "memory_update: index must be int64 of shape (batch,) on the device of embeddings");
  const Tensor rows = packed(index);
  const Tensor v = contiguous_floats(embeddings);
  update({embeddings.size(0), batch, banks.features, banks.rows, banks.dtype, banks.data.data(), banks.pitch.data(),
          static_cast<const float*>(v.data_ptr()), static_cast<const int64_t*>(rows.data_ptr()),
          static_cast<float>(momentum)},
         stream_of(embeddings));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CUDA, m) { m.impl("memory_update", TORCH_BOX(&run)); }

}  // namespace pyext::memory_update
