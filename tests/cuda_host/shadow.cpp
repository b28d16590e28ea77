#include "shadow.h"

namespace cuda_host {

Time present;
Actor* actor = nullptr;

const Stamp* Cell::note(Access access) {
  const Stamp now(*actor);
  if (access == Access::kRead) {
    if (reads.at[0] == now) return nullptr;
    if (!write.ordered()) return &write;
    if (const Stamp* other = atomics.unordered()) return other;
    reads.add(now);
    return nullptr;
  }
  if (!write.ordered()) return &write;
  if (const Stamp* other = reads.unordered()) return other;
  if (access == Access::kAtomic) {
    atomics.add(now);
    return nullptr;
  }
  if (const Stamp* other = atomics.unordered()) return other;
  // What comes after this write comes after all that it was checked against.
  *this = Cell();
  write = now;
  return nullptr;
}

void Line::split(unsigned offset, unsigned bytes) {
  const unsigned all = offset | bytes | width;
  const unsigned narrow = all & (~all + 1);
  if (narrow == width) return;
  for (unsigned i = kBytes / narrow; i-- > 0;) cells[i] = cells[i * narrow / width];
  width = static_cast<uint8_t>(narrow);
}

}  // namespace cuda_host
