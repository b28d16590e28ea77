// Runs the threads of a CUDA block as fibres of one host thread. Each runs until it waits (for the block at a barrier,
// for its warp at a shuffle) or returns; a block in which nobody can go on is an error.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace cuda_host {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;

struct Launch {
  const char* name;
  const void* kernel;
  dim3 grid;
  dim3 threads;
  size_t shared_bytes;
  void (*body)(const void* parameters);
  const void* parameters;
  size_t parameter_bytes;
};

// Runs every block of a launch to its end; throws std::runtime_error with what a thread did wrong.
void run(const Launch& launch);

// Whether the last thread of the last warp has the first turn.
bool& descending();

// Of the thread that runs.
uint3 current_thread();
uint3 current_block();
dim3 current_threads();
dim3 current_grid();
unsigned current_lane();
unsigned char* current_shared();

// How reports name the thread that accessed memory in `epoch`.
std::string who(uint32_t epoch, uint32_t thread);

// Ends the launch with an error of the thread that runs.
[[noreturn]] void fail(const std::string& what);

enum class BlockMeeting { kSync, kCount, kOr, kAnd };
int meet_block(BlockMeeting kind, int predicate);

// Meets the lanes of `mask` and returns: for a shuffle what lane `from` offered, for a vote the lanes that offered
// anything but 0, for a sum the sum. Of these, just kSync orders accesses to memory, as CUDA has it.
enum class WarpMeeting { kSync, kShuffle, kVote, kSum };
uint64_t meet_warp(WarpMeeting kind, unsigned mask, uint64_t offered, unsigned from);

}  // namespace cuda_host

// For tests in Python.
extern "C" {

void set_descending_threads(int descending);

// Writes where in the library the kernels are that ran since the last call, up to `capacity`; returns their number.
size_t take_launched(uintptr_t* offsets, size_t capacity);
}
