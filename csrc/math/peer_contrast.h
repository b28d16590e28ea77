// What every peer_contrast kernel shares: extents and the order of the terms.
#pragma once

#include <cstdint>

#include "math/gates.h"

namespace pyext::peer_contrast {

struct Sizes {
  int64_t peers;
  int64_t batch;
  int64_t features;
  int64_t start, stop;  // rows whose terms are computed

  PYEXT_HOST_DEVICE int64_t pairs() const { return peers * peers; }
  PYEXT_HOST_DEVICE bool active(int64_t row) const { return start <= row && row < stop; }
};

enum Term { kVcl, kIcl, kSoftVcl, kSoftIcl, kTerms };

}  // namespace pyext::peer_contrast
