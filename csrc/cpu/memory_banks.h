// The list of memory banks as the operators' bindings check it: one (rows, features) tensor per peer.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cpu/tensors.h"

namespace pyext::cpu {

// Addresses and strides of the banks.
class MemoryBanks {
 public:
  MemoryBanks(const char* op, const std::vector<Tensor>& banks, const Tensor& embeddings) : op_(op) {
    STD_TORCH_CHECK(embeddings.dim() == 3 && embeddings.is_cpu(), op,
                    ": embeddings must be a CPU tensor of shape (peers, batch, features)");
    STD_TORCH_CHECK(!banks.empty() && static_cast<int64_t>(banks.size()) == embeddings.size(0), op, ": ", banks.size(),
                    " banks for ", embeddings.size(0), " peers in embeddings");
    features = embeddings.size(2);
    rows = banks[0].dim() == 2 ? banks[0].size(0) : 0;
    type = banks[0].scalar_type();
    dtype = checked_dtype(type);
    for (const Tensor& bank : banks) add(bank);
    const ScalarType given = embeddings.scalar_type();
    checked_dtype(given);
    STD_TORCH_CHECK((given == ScalarType::Double) == (type == ScalarType::Double), op,
                    ": embeddings and banks must both be float64, or neither");
  }

  // The embeddings as kernels read them.
  Tensor in_accumulate_type(const Tensor& tensor) const {
    const ScalarType wanted = accumulate_type(type);
    const Tensor converted = tensor.scalar_type() == wanted ? tensor : torch::stable::to(tensor, wanted);
    return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
  }

  int64_t rows, features;
  ScalarType type;
  DType dtype;
  std::vector<void*> data;
  std::vector<int64_t> pitch;

 private:
  DType checked_dtype(ScalarType scalar_type) const {
    const std::optional<DType> found = dtype_of(scalar_type);
    STD_TORCH_CHECK(found.has_value(), op_, ": an unsupported dtype, expected float32, float64, bfloat16 or float16");
    return *found;
  }

  void add(const Tensor& bank) {
    STD_TORCH_CHECK(bank.is_cpu() && bank.dim() == 2 && bank.size(0) == rows && bank.size(1) == features &&
                        bank.scalar_type() == type,
                    op_, ": banks[", data.size(), "] differs from the others or from embeddings in shape or dtype");
    STD_TORCH_CHECK(features == 1 || bank.stride(1) == 1, op_, ": banks[", data.size(), "] has rows with gaps");
    data.push_back(bank.data_ptr());
    pitch.push_back(bank.stride(0));
  }

  const char* op_;
};

}  // namespace pyext::cpu
