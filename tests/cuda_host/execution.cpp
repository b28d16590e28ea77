#include "execution.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <vector>

#include "memory.h"
#include "shadow.h"

namespace cuda_host {
namespace {

std::string text(uint3 at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

uint3 unflattened(uint32_t index, dim3 extent) {
  return {index % extent.x, index / extent.x % extent.y, index / extent.x / extent.y};
}

size_t volume(dim3 extent) { return size_t{extent.x} * extent.y * extent.z; }

// One stack per thread, each with a page below that nobody may touch.
unsigned char* stack_of(size_t thread) {
  constexpr size_t kGuard = 4096;
  constexpr size_t kStride = kStackBytes + kGuard;
  static unsigned char* const stacks = [] {
    void* memory = mmap(nullptr, kMaxThreads * kStride, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a block's threads");
    unsigned char* first = static_cast<unsigned char*>(memory);
    for (size_t i = 0; i < kMaxThreads; ++i) mprotect(first + i * kStride, kGuard, PROT_NONE);
    return first;
  }();
  return stacks + thread * kStride + kGuard;
}

const char* name(BlockMeeting kind) {
  const char* const names[] = {"__syncthreads", "__syncthreads_count", "__syncthreads_or", "__syncthreads_and"};
  return names[static_cast<int>(kind)];
}

const char* name(WarpMeeting kind) {
  const char* const names[] = {"__syncwarp", "a shuffle", "a vote", "a sum over the warp"};
  return names[static_cast<int>(kind)];
}

enum class State { kReady, kAtBlock, kAtWarp, kDone };

// ucontext starts a fibre on its own stack; after that _setjmp and _longjmp switch, without a system call each.
struct Fibre {
  ucontext_t context;
  jmp_buf resume_at;
  bool started = false;
  State state = State::kReady;
  uint3 index;
  Actor actor;
  BlockMeeting block_meeting = BlockMeeting::kSync;
  int predicate = 0;
  WarpMeeting warp_meeting = WarpMeeting::kSync;
  unsigned mask = 0;
  unsigned from = 0;
  uint64_t offered = 0;
  uint64_t received = 0;

  bool meets(const Fibre& other) const {
    return state == State::kAtWarp && warp_meeting == other.warp_meeting && mask == other.mask;
  }
};

class Block {
 public:
  Block(const Launch& launch, uint3 index) : launch_(launch), index_(index), fibres_(volume(launch.threads)) {
    for (size_t i = 0; i < fibres_.size(); ++i) {
      Fibre& fibre = fibres_[i];
      fibre.index = unflattened(static_cast<uint32_t>(i), launch.threads);
      fibre.actor.thread = static_cast<uint32_t>(i);
      fibre.actor.stack = reinterpret_cast<uintptr_t>(stack_of(i));
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = stack_of(i);
      fibre.context.uc_stack.ss_size = kStackBytes;
      fibre.context.uc_link = nullptr;
      makecontext(&fibre.context, &Block::enter, 0);
    }
  }

  void run() {
    const size_t warps = (fibres_.size() + kWarp - 1) / kWarp;
    for (;;) {
      for (size_t turn = 0; turn < warps; ++turn) run_warp(descending() ? warps - 1 - turn : turn);
      if (std::all_of(fibres_.begin(), fibres_.end(), [](const Fibre& f) { return f.state == State::kDone; })) return;
      release_block();
    }
  }

  const Launch& launch() const { return launch_; }
  uint3 index() const { return index_; }
  const Fibre& fibre() const { return *running_; }
  std::string who(size_t thread) const { return "thread " + text(unflattened(thread, launch_.threads)); }

  [[noreturn]] void fail(const std::string& what) {
    error_ = where(index_of(*running_)) + ": " + what;
    leave();
  }

  int meet_block(BlockMeeting kind, int predicate) {
    running_->block_meeting = kind;
    running_->predicate = predicate;
    wait(State::kAtBlock);
    return block_result_;
  }

  uint64_t meet_warp(WarpMeeting kind, unsigned mask, uint64_t offered, unsigned from) {
    Fibre& own = *running_;
    if ((mask >> own.actor.thread % kWarp & 1) == 0) fail(std::string("is not in the mask of ") + name(kind));
    own.warp_meeting = kind;
    own.mask = mask;
    own.offered = offered;
    own.from = from;
    own.state = State::kAtWarp;
    if (!release_warp(own)) wait(State::kAtWarp);
    return own.received;
  }

 private:
  static void enter();

  size_t index_of(const Fibre& fibre) const { return static_cast<size_t>(&fibre - fibres_.data()); }

  std::string where(size_t thread) const {
    return std::string("kernel ") + launch_.name + ", block " + text(index_) + ", " + who(thread);
  }

  // Runs the threads of a warp until each waits for the block or has returned.
  void run_warp(size_t warp) {
    const size_t first = warp * kWarp;
    const size_t count = std::min<size_t>(kWarp, fibres_.size() - first);
    for (bool any = true; any;) {
      any = false;
      for (size_t turn = 0; turn < count; ++turn) {
        Fibre& fibre = fibres_[first + (descending() ? count - 1 - turn : turn)];
        if (fibre.state != State::kReady) continue;
        any = true;
        resume(fibre);
        if (!error_.empty()) throw std::runtime_error(error_);
      }
    }
  }

  void resume(Fibre& fibre) {
    running_ = &fibre;
    actor = &fibre.actor;
    if (_setjmp(scheduler_) == 0) {
      if (fibre.started) _longjmp(fibre.resume_at, 1);
      fibre.started = true;
      setcontext(&fibre.context);
    }
    actor = nullptr;
  }

  [[noreturn]] void leave() { _longjmp(scheduler_, 1); }

  void wait(State state) {
    Fibre& fibre = *running_;
    fibre.state = state;
    if (_setjmp(fibre.resume_at) == 0) leave();
  }

  // Calls function(fibre) for each thread that `own` meets.
  template <typename Function>
  void for_partners(const Fibre& own, Function function) {
    const size_t first = index_of(own) / kWarp * kWarp;
    for (size_t lane = 0; lane < kWarp && first + lane < fibres_.size(); ++lane) {
      if (own.mask >> lane & 1) function(fibres_[first + lane]);
    }
  }

  // If all that `own` waits for have come, gives each its result and lets it go on.
  bool release_warp(const Fibre& own) {
    bool all = true;
    for_partners(own, [&](const Fibre& other) { all = all && other.meets(own); });
    if (!all) return false;
    uint64_t votes = 0;
    uint64_t sum = 0;
    for_partners(own, [&](const Fibre& other) {
      votes |= uint64_t{other.offered != 0} << other.actor.thread % kWarp;
      sum += other.offered;
    });
    const size_t first = index_of(own) / kWarp * kWarp;
    for_partners(own, [&](Fibre& other) {
      if (own.warp_meeting == WarpMeeting::kVote) other.received = votes;
      if (own.warp_meeting == WarpMeeting::kSum) other.received = sum;
      if (own.warp_meeting != WarpMeeting::kShuffle) return;
      const size_t source = first + other.from;
      const bool takes_part = source < fibres_.size() && (own.mask >> other.from & 1);
      if (!takes_part) error_ = where(index_of(other)) + ": shuffles from a lane that takes no part in the shuffle";
      if (takes_part) other.received = fibres_[source].offered;
    });
    if (!error_.empty()) leave();
    if (own.warp_meeting == WarpMeeting::kSync) order(own);
    for_partners(own, [](Fibre& other) { other.state = State::kReady; });
    return true;
  }

  // What each partner did so far comes before what each of them does from here on.
  void order(const Fibre& own) {
    std::array<uint32_t, kWarp> known{};
    for_partners(own, [&](Fibre& other) {
      Actor& partner = other.actor;
      uint32_t& its = partner.known[partner.thread % kWarp];
      its = partner.clock++;
      for (size_t lane = 0; lane < kWarp; ++lane) known[lane] = std::max(known[lane], partner.known[lane]);
    });
    for_partners(own, [&](Fibre& other) { other.actor.known = known; });
  }

  // Lets the block go on if every thread has come to the same barrier; otherwise nobody ever can.
  void release_block() {
    const BlockMeeting kind = fibres_[0].block_meeting;
    int count = 0;
    for (size_t i = 0; i < fibres_.size(); ++i) {
      const Fibre& fibre = fibres_[i];
      if (fibre.state != State::kAtBlock || fibre.block_meeting != kind) report_stuck();
      count += fibre.predicate;
    }
    const int all = static_cast<int>(fibres_.size());
    const int results[] = {0, count, count > 0, count == all};
    block_result_ = results[static_cast<int>(kind)];
    for (Fibre& fibre : fibres_) {
      fibre.state = State::kReady;
      share_acquired(fibre.actor.fences);
      fibre.actor.fences.acquired.clear();
    }
    ++present.now;
  }

  [[noreturn]] void report_stuck() {
    for (const Fibre& fibre : fibres_) {
      if (fibre.state == State::kAtWarp) report_missed_warp(fibre);
    }
    const auto waiting =
        std::find_if(fibres_.begin(), fibres_.end(), [](const Fibre& f) { return f.state == State::kAtBlock; });
    for (size_t i = 0; i < fibres_.size(); ++i) {
      if (fibres_[i].state == State::kDone) {
        throw std::runtime_error(where(i) + ": has returned, but other threads wait for it at " +
                                 name(waiting->block_meeting));
      }
      if (fibres_[i].block_meeting != waiting->block_meeting) report_divergence(*waiting, fibres_[i]);
    }
    std::abort();
  }

  [[noreturn]] void report_missed_warp(const Fibre& own) {
    const Fibre* missing = nullptr;
    for_partners(own, [&](const Fibre& other) {
      if (missing == nullptr && !other.meets(own)) missing = &other;
    });
    if (missing->state != State::kDone) report_divergence(own, *missing);
    throw std::runtime_error(where(index_of(*missing)) + ": has returned, but " + who(index_of(own)) +
                             " waits for it at " + name(own.warp_meeting));
  }

  [[noreturn]] void report_divergence(const Fibre& own, const Fibre& other) {
    throw std::runtime_error(where(index_of(own)) + ": waits at " + point(own) + " for " + who(index_of(other)) +
                             ", which waits at " + point(other));
  }

  static std::string point(const Fibre& fibre) {
    if (fibre.state == State::kAtBlock) return name(fibre.block_meeting);
    char mask[40];
    std::snprintf(mask, sizeof(mask), " with mask 0x%08x", fibre.mask);
    return name(fibre.warp_meeting) + std::string(mask);
  }

  const Launch& launch_;
  uint3 index_;
  std::vector<Fibre> fibres_;
  Fibre* running_ = nullptr;
  int block_result_ = 0;
  jmp_buf scheduler_;
  std::string error_;
};

Block* active = nullptr;
// The first epoch of every block of the launch that runs.
std::vector<uint32_t> block_epochs;

std::set<const void*> launched;

void Block::enter() {
  active->launch_.body(active->launch_.parameters);
  active->running_->state = State::kDone;
  active->leave();
}

void check(const Launch& launch) {
  const auto refuse = [&](const char* why) { throw std::runtime_error(std::string(launch.name) + ": " + why); };
  if (volume(launch.threads) == 0 || volume(launch.threads) > kMaxThreads) refuse("a block has 1 to 1024 threads");
  if (launch.threads.z > 64) refuse("a block has at most 64 threads in z");
  if (launch.grid.x > 0x7fffffffu || launch.grid.y > 65535 || launch.grid.z > 65535) refuse("the grid is too large");
  if (launch.shared_bytes > kMostSharedBytes) refuse("too much shared memory");
}

}  // namespace

bool& descending() {
  static bool setting = false;
  return setting;
}

uint3 current_thread() { return active->fibre().index; }
uint3 current_block() { return active->index(); }
dim3 current_threads() { return active->launch().threads; }
dim3 current_grid() { return active->launch().grid; }
unsigned current_lane() { return active->fibre().actor.thread % kWarp; }
unsigned char* current_shared() { return shared_memory(); }
int meet_block(BlockMeeting kind, int predicate) { return active->meet_block(kind, predicate); }
uint64_t meet_warp(WarpMeeting kind, unsigned mask, uint64_t offered, unsigned from) {
  return active->meet_warp(kind, mask, offered, from);
}

void fail(const std::string& what) {
  if (actor != nullptr) active->fail(what);
  std::fprintf(stderr, "host code of a launcher: %s\n", what.c_str());
  std::abort();
}

std::string who(uint32_t epoch, uint32_t thread) {
  const size_t block = std::upper_bound(block_epochs.begin(), block_epochs.end(), epoch) - block_epochs.begin() - 1;
  const std::string name = active->who(thread);
  if (epoch >= present.block) return name;
  return name + " of block " + text(unflattened(static_cast<uint32_t>(block), active->launch().grid));
}

void run(const Launch& launch) {
  check(launch);
  enter_launch(launch);
  launched.insert(launch.kernel);
  block_epochs.clear();
  forget_published();
  present.launch = present.now + 1;
  for (size_t i = 0; i < volume(launch.grid); ++i) {
    present.block = ++present.now;
    block_epochs.push_back(present.now);
    enter_block();
    forget_acquired();
    Block block(launch, unflattened(static_cast<uint32_t>(i), launch.grid));
    active = &block;
    block.run();
  }
}

}  // namespace cuda_host

extern "C" {

void set_descending_threads(int descending) { cuda_host::descending() = descending != 0; }

size_t take_launched(uintptr_t* offsets, size_t capacity) {
  Dl_info library;
  dladdr(&cuda_host::launched, &library);
  size_t count = 0;
  for (const void* kernel : cuda_host::launched) {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(library.dli_fbase);
    if (count < capacity) offsets[count] = offset;
    ++count;
  }
  cuda_host::launched.clear();
  return count;
}
}
