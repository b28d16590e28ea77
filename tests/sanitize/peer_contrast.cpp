// Calls the kernels of csrc/cpu/peer_contrast_kernel.cpp with threads and memory that sanitizers understand, and fails
// where an element of a result was not written. Its numbers are the operator tests' concern.
#include "cpu/peer_contrast.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

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

template <typename T>
bool call(const Sizes& s, DType dtype, double temperature, int64_t threads) {
  Tensors tensors;
  PeerContrast args{};
  args.sizes = s;
  args.dtype = dtype;
  args.embeddings = tensors.drawn<T>(s.peers * s.batch * s.features, -0.3, 0.3);
  const int64_t* classes = tensors.drawn_below(s.batch, 3);
  int64_t* positives = tensors.blank<int64_t>(s.batch);
  for (int64_t r = 0; r < s.batch; ++r) positives[r] = std::count(classes, classes + s.batch, classes[r]) - 1;
  args.classes = classes;
  args.positives = positives;
  args.temperature = temperature;
  args.soft_temperature = 3;
  T* terms = tensors.blank<T>(pyext::peer_contrast::kTerms);
  T* normalisers = tensors.blank<T>(4 * s.pairs() * s.batch);
  T* gradient = tensors.blank<T>(s.peers * s.batch * s.features);
  args.terms = terms;
  args.normalisers = normalisers;
  args.grad_terms = terms;
  args.grad_embeddings = gradient;
  CallMemory forward, backward;
  PYEXT_CAPABILITY::peer_contrast_kernels.forward(args, forward.host(threads));
  PYEXT_CAPABILITY::peer_contrast_kernels.backward(args, backward.host(threads));
  return Tensors::written(terms, pyext::peer_contrast::kTerms) &&
         Tensors::written(normalisers, 4 * s.pairs() * s.batch) &&
         Tensors::written(gradient, s.peers * s.batch * s.features);
}

}  // namespace

int main() {
  int calls = 0;
  for (const Sizes& sizes : kSizes) {
    for (const double temperature : {0.1, 0.001}) {
      for (const int64_t threads : {1, 3}) {
        if (!call<float>(sizes, DType::kFloat, temperature, threads) ||
            !call<double>(sizes, DType::kDouble, temperature, threads)) {
          std::printf("a result has an element that nobody wrote, or NaN\n");
          std::exit(1);
        }
        calls += 2;
      }
    }
  }
  std::printf("%d forward and backward calls\n", calls);
}
