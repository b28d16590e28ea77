// The launchers of hybrid_block for ctypes.
#include "cuda/hybrid_block.h"

#include "guarded.h"

namespace hb = pyext::hybrid_block;

extern "C" {

const char* hybrid_block_workspace_bytes(const hb::Block* block, size_t* bytes) {
  return guarded([&] { *bytes = hb::workspace_bytes(*block); });
}

const char* hybrid_block_forward(const hb::Block* block, void* out, void* workspace) {
  return guarded([&] { hb::forward(*block, out, workspace, nullptr); });
}
}
