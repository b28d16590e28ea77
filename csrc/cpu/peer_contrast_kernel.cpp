// peer_contrast on the CPU. Compiled once per instruction set (PYEXT_CAPABILITY is its namespace).
#include "cpu/peer_contrast.h"

#include "cpu/peer_contrast/backward.h"
#include "cpu/peer_contrast/forward.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

template <template <typename> class Pass>
void run_pass(const PeerContrast& args, const Host& host) {
  if (args.dtype == DType::kDouble) return Pass<double>(Call<double>(args, host))();
  Pass<float>(Call<float>(args, host))();
}

}  // namespace

const PeerContrastKernels peer_contrast_kernels = {run_pass<Forward>, run_pass<Backward>};

}  // namespace pyext::cpu::PYEXT_CAPABILITY
