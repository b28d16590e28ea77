#include "fences.h"

#include <algorithm>
#include <unordered_map>

#include "shadow.h"

namespace cuda_host {
namespace {

Releases block_acquired;
std::unordered_map<uintptr_t, Releases> published_at;

void append(Releases& to, const Releases& from) { to.insert(to.end(), from.begin(), from.end()); }

bool covered(const Releases& releases, uint32_t epoch, uint32_t thread, uint32_t clock) {
  return std::any_of(releases.begin(), releases.end(),
                     [&](const Release& release) { return release.covers(epoch, thread, clock); });
}

}  // namespace

void fence() {
  Fences& own = actor->fences;
  append(own.acquired, own.seen);
  own.seen.clear();
  own.published = own.acquired;
  append(own.published, block_acquired);
  own.published.push_back({present.block, present.now, actor->thread, actor->clock++});
}

void meet_at_atomic(uintptr_t address) {
  Releases& here = published_at[address];
  append(actor->fences.seen, here);
  append(here, actor->fences.published);
}

bool is_acquired(uint32_t epoch, uint32_t thread, uint32_t clock) {
  return covered(block_acquired, epoch, thread, clock) || covered(actor->fences.acquired, epoch, thread, clock);
}

void share_acquired(const Fences& fences) { append(block_acquired, fences.acquired); }

void forget_acquired() { block_acquired.clear(); }

void forget_published() { published_at.clear(); }

}  // namespace cuda_host
