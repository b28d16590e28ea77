// The list of memory banks as the CUDA bindings check it: one (rows, features) tensor per peer.
#pragma once

#include <vector>

#include "cuda/bind.h"

namespace pyext::cuda {

inline Tensor contiguous_floats(const Tensor& tensor) {
  const Tensor floats =
      tensor.scalar_type() == ScalarType::Float ? tensor : torch::stable::to(tensor, ScalarType::Float);
  return packed(floats);
}

// Addresses and strides of the banks.
class MemoryBanks {
 public:
  MemoryBanks(const char* op, const std::vector<Tensor>& banks, const Tensor& embeddings) {
    STD_TORCH_CHECK(embeddings.dim() == 3 && embeddings.is_cuda(), op,
                    ": embeddings must be a CUDA tensor of shape (peers, batch, features)");
    STD_TORCH_CHECK(!banks.empty() && static_cast<int64_t>(banks.size()) == embeddings.size(0), op, ": ", banks.size(),
                    " banks for ", embeddings.size(0), " peers in embeddings");
    features = embeddings.size(2);
    rows = banks[0].dim() == 2 ? banks[0].size(0) : 0;
    dtype = dtype_of(banks[0].scalar_type(), op, "banks[0]");
    dtype_of(embeddings.scalar_type(), op, "embeddings");
    for (const Tensor& bank : banks) {
      STD_TORCH_CHECK(on_device_of(bank, embeddings) && bank.dim() == 2 && bank.size(0) == rows &&
                          bank.size(1) == features && bank.scalar_type() == banks[0].scalar_type(),
                      op, ": banks[", data.size(),
                      "] differs from the others or from embeddings in shape, dtype or device");
      STD_TORCH_CHECK(features == 1 || bank.stride(1) == 1, op, ": banks[", data.size(), "] has rows with gaps");
      data.push_back(bank.data_ptr());
      pitch.push_back(bank.stride(0));
    }
  }

  int64_t rows, features;
  Dtype dtype;
  std::vector<void*> data;
  std::vector<int64_t> pitch;
};

}  // namespace pyext::cuda
