// memory_update on the CPU. Compiled once per instruction set (PYEXT_CAPABILITY is its namespace). One task per bank
// goes through the batch in order, so a row that occurs twice moves twice, the first image first.
#include "cpu/memory_update.h"
#include "cpu/services.h"
#include "math/memory_update.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

template <typename S>
void move_row(S* row, const Accumulate<S>* embedding, int64_t features, double momentum, Accumulate<S>* moved) {
  using T = Accumulate<S>;
  const T keep = static_cast<T>(momentum), take = static_cast<T>(1 - momentum);
  convert(row, moved, features);
  double squares = 0;
  for (int64_t c = 0; c < features; ++c) {
    moved[c] = keep * moved[c] + take * embedding[c];
    squares += static_cast<double>(moved[c]) * static_cast<double>(moved[c]);
  }
  const T norm = static_cast<T>(memory_update::nonzero_norm(std::sqrt(squares)));
  for (int64_t c = 0; c < features; ++c) moved[c] /= norm;
  convert(moved, row, features);
}

template <typename S>
void update(const MemoryUpdate& args, const Host& host) {
  using T = Accumulate<S>;
  parallel(host, args.peers, [&](int64_t bank) {
    T* moved = static_cast<T*>(host.scratch(args.features * sizeof(T)));
    const T* embeddings = static_cast<const T*>(args.embeddings) + bank * args.batch * args.features;
    for (int64_t b = 0; b < args.batch; ++b) {
      S* row = static_cast<S*>(args.banks[bank]) + args.index[b] * args.pitch[bank];
      move_row(row, embeddings + b * args.features, args.features, args.momentum, moved);
    }
  });
}

void run(const MemoryUpdate& args, const Host& host) {
  with_element_type(args.dtype, [&](auto zero) { update<decltype(zero)>(args, host); });
}

}  // namespace

const MemoryUpdateKernels memory_update_kernels = {run};

}  // namespace pyext::cpu::PYEXT_CAPABILITY
