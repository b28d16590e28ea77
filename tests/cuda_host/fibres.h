// Runs the threads of a CUDA block as fibres of one host thread. Fibres of a block take turns; each runs until it
// waits (for the block at a barrier, for its warp at a shuffle) or returns.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x;
  unsigned y;
  unsigned z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_host {

constexpr unsigned kWarp = 32;

struct Launch {
  std::string name;
  dim3 grid;
  dim3 threads;
  std::function<void()> body;
};

class Block {
 public:
  // Runs block `index` of `launch`; `shared` is its dynamic shared memory.
  Block(const Launch& launch, dim3 index, unsigned char* shared) : launch_(launch), index_(index), shared_(shared) {}

  void run() {
    start();
    while (!finished()) {
      for (size_t turn = 0; turn < fibres_.size(); ++turn) {
        current_ = descending() ? fibres_.size() - 1 - turn : turn;
        Fibre& fibre = fibres_[current_];
        if (fibre.state == State::kReady) resume(fibre);
        if (!error_.empty()) throw std::runtime_error(error_);
      }
      const bool warp_released = release_warps();
      if (!warp_released && !finished()) release_block();
    }
  }

  // Whether the last thread has the first turn. A kernel whose result depends on it lacks a barrier.
  static bool& descending() {
    static bool setting = false;
    return setting;
  }

  static Block*& active() {
    static Block* block = nullptr;
    return block;
  }

  dim3 thread() const { return {static_cast<unsigned>(current_), 0, 0}; }
  dim3 index() const { return index_; }
  const Launch& launch() const { return launch_; }
  unsigned char* shared() const { return shared_; }

  void wait_for_block() { wait(State::kAtBarrier); }

  // Ends the launch with an error of the current thread.
  [[noreturn]] void fail(const std::string& what) {
    error_ = where(current_) + ": " + what;
    _longjmp(scheduler_, 1);
  }

  // Offers `bits` to the warp and returns what lane `from` offered. Two slots per fibre are enough: to come to the
  // exchange after the next, a fibre needs all of its warp at the next, where all have read this one's slot.
  uint64_t exchange(unsigned mask, uint64_t bits, unsigned from) {
    if (mask != 0xffffffffu) fail("a shuffle with a partial mask, which is not supported");
    Fibre& fibre = fibres_[current_];
    const unsigned slot = fibre.exchanges++ % 2;
    fibre.offered[slot] = bits;
    wait(State::kAtShuffle);
    return fibres_[current_ / kWarp * kWarp + from].offered[slot];
  }

 private:
  enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

  // ucontext starts a fibre on its own stack; after that _setjmp and _longjmp switch, without a system call each.
  struct Fibre {
    ucontext_t context;
    jmp_buf resume_at;
    bool started = false;
    State state = State::kReady;
    unsigned exchanges = 0;
    uint64_t offered[2] = {};
  };

  static constexpr size_t kStackBytes = 64 * 1024;

  void start() {
    const size_t count = launch_.threads.x;
    static std::vector<unsigned char> stacks;
    if (stacks.size() < count * kStackBytes) stacks.resize(count * kStackBytes);
    fibres_.resize(count);
    for (size_t i = 0; i < count; ++i) {
      ucontext_t& context = fibres_[i].context;
      getcontext(&context);
      context.uc_stack.ss_sp = stacks.data() + i * kStackBytes;
      context.uc_stack.ss_size = kStackBytes;
      context.uc_link = nullptr;
      makecontext(&context, &Block::enter, 0);
    }
    active() = this;
  }

  static void enter() {
    Block& block = *active();
    block.launch_.body();
    block.fibres_[block.current_].state = State::kDone;
    _longjmp(block.scheduler_, 1);
  }

  void resume(Fibre& fibre) {
    if (_setjmp(scheduler_) != 0) return;
    if (fibre.started) _longjmp(fibre.resume_at, 1);
    fibre.started = true;
    setcontext(&fibre.context);
  }

  void wait(State state) {
    Fibre& fibre = fibres_[current_];
    fibre.state = state;
    if (_setjmp(fibre.resume_at) == 0) _longjmp(scheduler_, 1);
  }

  std::string where(size_t thread) const {
    return "kernel " + launch_.name + ", block (" + std::to_string(index_.x) + ", " + std::to_string(index_.y) + ", " +
           std::to_string(index_.z) + "), thread " + std::to_string(thread);
  }

  bool finished() const {
    for (const Fibre& fibre : fibres_) {
      if (fibre.state != State::kDone) return false;
    }
    return true;
  }

  // Lets each warp go on of which every thread has come to the shuffle.
  bool release_warps() {
    bool released = false;
    for (size_t first = 0; first < fibres_.size(); first += kWarp) {
      bool all = true;
      for (size_t i = first; i < first + kWarp; ++i) all &= fibres_[i].state == State::kAtShuffle;
      for (size_t i = first; all && i < first + kWarp; ++i) fibres_[i].state = State::kReady;
      released |= all;
    }
    return released;
  }

  // Lets the block go on if every thread has come to the barrier; otherwise nobody ever can.
  void release_block() {
    for (size_t i = 0; i < fibres_.size(); ++i) {
      const State state = fibres_[i].state;
      if (state == State::kAtShuffle) {
        throw std::runtime_error(where(i) + ": waits at a shuffle that not all threads of its warp come to");
      }
      if (state == State::kDone) {
        throw std::runtime_error(where(i) + ": has returned, but other threads wait for it at __syncthreads");
      }
    }
    for (Fibre& fibre : fibres_) fibre.state = State::kReady;
  }

  const Launch& launch_;
  dim3 index_;
  unsigned char* shared_;
  std::vector<Fibre> fibres_;
  size_t current_ = 0;
  jmp_buf scheduler_;
  std::string error_;
};

inline dim3 current_thread() { return Block::active()->thread(); }
inline dim3 current_block() { return Block::active()->index(); }
inline const Launch& current_launch() { return Block::active()->launch(); }
inline void wait_for_block() { Block::active()->wait_for_block(); }
inline uint64_t exchange(unsigned mask, uint64_t bits, unsigned from) {
  return Block::active()->exchange(mask, bits, from);
}

// Runs every block of a launch. Shared memory starts as NaN, so that a read before a write shows.
inline void run(const Launch& launch, size_t shared_bytes) {
  if (launch.threads.x == 0 || launch.threads.x > 1024 || launch.threads.x % kWarp != 0) {
    throw std::runtime_error("kernel " + launch.name + ": a block must have whole warps, and at most 1024 threads");
  }
  constexpr size_t kAlignment = 16;
  std::vector<unsigned char> memory(shared_bytes + kAlignment);
  unsigned char* shared = memory.data() + (kAlignment - reinterpret_cast<uintptr_t>(memory.data()) % kAlignment);
  for (unsigned z = 0; z < launch.grid.z; ++z) {
    for (unsigned y = 0; y < launch.grid.y; ++y) {
      for (unsigned x = 0; x < launch.grid.x; ++x) {
        memory.assign(memory.size(), 0xff);
        Block(launch, dim3(x, y, z), shared).run();
      }
    }
  }
}

}  // namespace cuda_host
