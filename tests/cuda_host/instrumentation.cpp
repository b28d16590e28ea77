// What g++ calls before each load and store of code compiled with -fsanitize=thread, and where it finds a fault with
// -fsanitize=bounds-strict,alignment. Neither runtime library is linked: these are the functions.
#include <cstdint>
#include <cstring>
#include <string>

#include "memory.h"

namespace {

using cuda_host::Access;

void check(void* address, size_t bytes, Access kind) {
  cuda_host::access(reinterpret_cast<uintptr_t>(address), bytes, kind);
}

// The compiler's description of a fault; its layout is part of the interface between compiler and runtime.
struct Place {
  const char* file;
  uint32_t line;
  uint32_t column;
};
struct TypeName {
  uint16_t kind;
  uint16_t info;
  char name[1];
};
struct IndexFault {
  Place place;
  const TypeName* array;
  const TypeName* index;
};
struct AddressFault {
  Place place;
  const TypeName* type;
  unsigned char log_alignment;
  unsigned char check;
};

std::string describe(const Place& place) { return std::string(place.file) + ":" + std::to_string(place.line); }

}  // namespace

extern "C" {

void __tsan_init() {}

#define CUDA_HOST_ACCESSES(bytes)                                                            \
  void __tsan_read##bytes(void* address) { check(address, bytes, Access::kRead); }           \
  void __tsan_write##bytes(void* address) { check(address, bytes, Access::kWrite); }         \
  void __tsan_unaligned_read##bytes(void* address) { check(address, bytes, Access::kRead); } \
  void __tsan_unaligned_write##bytes(void* address) { check(address, bytes, Access::kWrite); }
CUDA_HOST_ACCESSES(1)
CUDA_HOST_ACCESSES(2)
CUDA_HOST_ACCESSES(4)
CUDA_HOST_ACCESSES(8)
CUDA_HOST_ACCESSES(16)
#undef CUDA_HOST_ACCESSES

void __tsan_read_range(void* address, size_t bytes) { check(address, bytes, Access::kRead); }
void __tsan_write_range(void* address, size_t bytes) { check(address, bytes, Access::kWrite); }
void __tsan_vptr_read(void* address) { check(address, sizeof(void*), Access::kRead); }
void __tsan_vptr_update(void* address, void*) { check(address, sizeof(void*), Access::kWrite); }

// The build renames memcpy and its like to these in the objects that are checked: the compiler does not instrument
// calls.
void* checked_memcpy(void* to, const void* from, size_t bytes) {
  check(const_cast<void*>(from), bytes, Access::kRead);
  check(to, bytes, Access::kWrite);
  return std::memcpy(to, from, bytes);
}

void* checked_memmove(void* to, const void* from, size_t bytes) {
  check(const_cast<void*>(from), bytes, Access::kRead);
  check(to, bytes, Access::kWrite);
  return std::memmove(to, from, bytes);
}

void* checked_memset(void* to, int value, size_t bytes) {
  check(to, bytes, Access::kWrite);
  return std::memset(to, value, bytes);
}

void __ubsan_handle_out_of_bounds(const IndexFault* fault, uintptr_t index) {
  cuda_host::fail("out of bounds: index " + std::to_string(static_cast<intptr_t>(index)) + " of an array " +
                  fault->array->name + " at " + describe(fault->place));
}

void __ubsan_handle_type_mismatch_v1(const AddressFault* fault, uintptr_t address) {
  cuda_host::fail("misaligned: an access as " + std::string(fault->type->name) + " to an address " +
                  std::to_string(address % (uintptr_t{1} << fault->log_alignment)) + " bytes off its alignment, at " +
                  describe(fault->place));
}
}
