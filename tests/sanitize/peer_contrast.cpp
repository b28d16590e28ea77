// Calls the kernels of csrc/cpu/peer_contrast_kernel.cpp with threads and memory that sanitizers understand, and fails
// where an element of a result was not written. Its numbers are the operator tests' concern.
#include "cpu/peer_contrast.h"

#include <vector>

#include "cpu/vector.h"
#include "tensors.h"

namespace {

using namespace pyext::cpu;
using pyext::peer_contrast::Sizes;
using pyext::sanitize::CallMemory;
using pyext::sanitize::Tensors;

// peers, batch, features, first and last row; one block and several, several blocks to a group.
const Sizes kSizes[] = {{1, 0, 3, 0, 0},    {1, 1, 1, 0, 1},       {2, 130, 17, 0, 130},
                        {3, 70, 33, 5, 61}, {9, 300, 5, 100, 300}, {20, 20, 3, 0, 20}};

// Of some classes, one of them with one image.
struct Classes {
  explicit Classes(int64_t batch) {
    for (int64_t first = 0; first < batch; first += 1 + first) begins.push_back(first);
    begins.push_back(batch);
    for (int64_t r = 0; r < batch; ++r) images.push_back(batch - 1 - r);
  }
  std::vector<int64_t> images, begins;
};

// The name of the first result that holds a NaN; null if there is none.
template <typename S>
const char* run(const Sizes& s, DType dtype, double temperature, double soft_temperature, int64_t threads) {
  using T = Accumulate<S>;
  Tensors tensors;
  const Classes classes(s.batch);
  PeerContrast args{};
  args.sizes = s;
  args.dtype = dtype;
  args.embeddings = tensors.drawn<S>(s.peers * s.batch * s.features, -0.3, 0.3);
  args.images = classes.images.data();
  args.begins = classes.begins.data();
  args.classes = static_cast<int64_t>(classes.begins.size()) - 1;
  args.temperature = temperature;
  args.soft_temperature = soft_temperature;
  T* terms = tensors.blank<T>(pyext::peer_contrast::kTerms);
  T* normalisers = tensors.blank<T>(4 * s.pairs() * s.batch);
  S* gradient = tensors.blank<S>(s.peers * s.batch * s.features);
  args.terms = terms;
  args.normalisers = normalisers;
  args.grad_terms = terms;
  args.grad_embeddings = gradient;
  CallMemory forward, backward;
  PYEXT_CAPABILITY::peer_contrast_kernels.forward(args, forward.host(threads));
  PYEXT_CAPABILITY::peer_contrast_kernels.backward(args, backward.host(threads));
  if (!Tensors::written(terms, pyext::peer_contrast::kTerms)) return "terms";
  if (!Tensors::written(normalisers, 4 * s.pairs() * s.batch)) return "normalisers";
  return Tensors::written(gradient, s.peers * s.batch * s.features) ? nullptr : "grad_embeddings";
}

}  // namespace

int main() {
  // Exponents that are cubed, plain and shifted.
  constexpr double kTemperatures[][2] = {{0.1, 3}, {0.1, 2}, {0.001, 3}};
  const auto call = [&](const Sizes& s, auto zero, DType dtype, int variant, int64_t threads) {
    return run<decltype(zero)>(s, dtype, kTemperatures[variant][0], kTemperatures[variant][1], threads);
  };
  pyext::sanitize::run_all("forward and backward calls", kSizes, 3, call);
}
