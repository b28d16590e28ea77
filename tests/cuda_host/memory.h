// The memory that a kernel can reach: its block's shared memory, dynamic and static; global memory, which is what
// tests allocate here and nothing else; to be read only, the launch's parameters and the library's constants; and the
// thread's own stack, which needs no check. Anything else is out of bounds.
#pragma once

#include <cstddef>
#include <cstdint>

#include "execution.h"
#include "shadow.h"

namespace cuda_host {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kMostSharedBytes = 256 * 1024;

// Checks an access of the thread that runs; does nothing while host code runs.
void access(uintptr_t address, size_t bytes, Access kind);

// Dynamic shared memory, the same stretch for every block.
unsigned char* shared_memory();

// From here on kernels may read the launch's parameters.
void enter_launch(const Launch& launch);

// Static and dynamic shared memory become those of a new block: NaN, and not written.
void enter_block();

}  // namespace cuda_host

// For tests in Python.
extern "C" {

// Global memory for `bytes` bytes, of which none is valid yet, or null where all is given out. Reports call it `name`.
void* device_allocate(const char* name, size_t bytes);

// Makes the bytes at `address` valid for which `mask` is not 0, and says whether kernels may read and write them.
void device_expose(void* address, const unsigned char* mask, size_t bytes, int written, int frozen);

// Bytes of static shared memory from `offset` on are out of bounds.
void add_static_gap(size_t offset, size_t bytes);

// Takes back all global memory.
void device_reset();
}
