// Calls the kernels of csrc/cpu/memory_contrast_kernel.cpp with threads and memory that sanitizers understand, and
// fails where an element of a result was not written. Its numbers are the operator tests' concern.
#include "cpu/memory_contrast.h"

#include "cpu/vector.h"
#include "tensors.h"

namespace {

using namespace pyext::cpu;
using pyext::memory_contrast::Sizes;
using pyext::sanitize::CallMemory;
using pyext::sanitize::Tensors;

// peers, batch, entries, features, rows; the last has several tiles and several blocks of rows.
const Sizes kSizes[] = {
    {2, 1, 2, 1, 1}, {3, 4, 6, 7, 11}, {4, 3, 91, 130, 20}, {6, 5, 17, 33, 30}, {3, 2, 300, 65, 5000}};

template <typename S>
class Call {
  using T = Accumulate<S>;

 public:
  // Rows of a bank are apart by `gap` elements.
  Call(const Sizes& s, DType dtype, bool tiled, int64_t gap) {
    args_.sizes = s;
    args_.dtype = dtype;
    args_.temperature = 0.1;
    args_.tiled = tiled;
    for (int64_t i = 0; i < s.peers; ++i) {
      banks_.push_back(tensors_.drawn<S>((s.rows - 1) * (s.features + gap) + s.features, -0.2, 0.2));
      pitch_.push_back(s.features + gap);
    }
    args_.banks = banks_.data();
    args_.pitch = pitch_.data();
    args_.embeddings = tensors_.drawn<T>(s.peers * s.batch * s.features, -0.2, 0.2);
    args_.indices = tensors_.drawn_below(s.batch * s.entries, s.rows);
    args_.rows = tensors_.blank<int32_t>(s.batch * s.entries);
    weights_ = tensors_.blank<T>(s.pairs() * s.batch * s.entries);
    loss_ = tensors_.blank<T>(1);
    gradient_ = tensors_.blank<T>(s.peers * s.batch * s.features);
    args_.weights = weights_;
    args_.loss = loss_;
    args_.grad_loss = loss_;
    args_.grad_embeddings = gradient_;
  }

  // The name of the first result that holds a NaN; null if there is none.
  const char* run(int64_t threads) {
    const Sizes& s = args_.sizes;
    CallMemory forward, backward;
    const auto& kernels = PYEXT_CAPABILITY::memory_contrast_kernels;
    if (!kernels.forward(args_, forward.host(threads))) return "rows, refused by forward,";
    if (!kernels.backward(args_, backward.host(threads))) return "rows, refused by backward,";
    if (!Tensors::written(loss_, 1)) return "loss";
    if (!Tensors::written(weights_, s.pairs() * s.batch * s.entries)) return "weights";
    if (!Tensors::written(gradient_, s.peers * s.batch * s.features)) return "grad_embeddings";
    return nullptr;
  }

 private:
  MemoryContrast args_{};
  Tensors tensors_;
  std::vector<const void*> banks_;
  std::vector<int64_t> pitch_;
  T *weights_, *loss_, *gradient_;
};

}  // namespace

int main() {
  const auto call = [](const Sizes& s, auto zero, DType dtype, int variant, int64_t threads) {
    return Call<decltype(zero)>(s, dtype, variant % 2 == 1, 3 * (variant / 2)).run(threads);
  };
  pyext::sanitize::run_all("forward and backward calls", kSizes, 4, call);
}
