#include "memory.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace cuda_host {
namespace {

template <typename T>
T* reserve(size_t count) {
  void* memory =
      mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the CUDA host shim");
  return static_cast<T*>(memory);
}

// A stretch of memory and what is known of it. Lines of shared memory belong to one block; a line of an earlier one
// is new to this.
struct Region {
  uintptr_t begin;
  size_t capacity;
  size_t valid;  // of shared memory: bytes from the beginning that the block has
  Line* lines;
  bool shared;
  std::vector<uint16_t> gaps;  // by line: bits of bytes that are out of bounds, for the first lines

  bool holds(uintptr_t address) const { return address - begin < capacity; }

  Line& line(size_t index) {
    Line& line = lines[index];
    if (shared && line.generation != present.block) {
      const size_t offset = index * Line::kBytes;
      const size_t here = valid > offset ? std::min<size_t>(valid - offset, Line::kBytes) : 0;
      line = Line();
      line.generation = present.block;
      line.valid = static_cast<uint16_t>((1u << here) - 1);
      if (index < gaps.size()) line.valid &= static_cast<uint16_t>(~gaps[index]);
    }
    return line;
  }
};

Region region_of(unsigned char* begin, size_t bytes, bool shared) {
  return {reinterpret_cast<uintptr_t>(begin),      bytes,  shared ? bytes : 0,
          reserve<Line>(bytes / Line::kBytes + 1), shared, {}};
}

Region& dynamic_region() {
  static Region region = region_of(reserve<unsigned char>(kMostSharedBytes), kMostSharedBytes, true);
  return region;
}

constexpr size_t kGlobalBytes = 64 * 1024 * 1024;
Region& global_region() {
  static Region region = region_of(reserve<unsigned char>(kGlobalBytes), kGlobalBytes, false);
  return region;
}

// Makes sure that the library has thread-local storage, and that this thread's is there.
thread_local volatile unsigned char anchor;

// This library in memory: its constants, and its thread-local storage, which is the static shared memory.
struct Library {
  uintptr_t begin = UINTPTR_MAX;
  uintptr_t end = 0;
  unsigned char* thread_local_storage = nullptr;
  size_t thread_local_bytes = 0;

  Library() {
    anchor = 1;
    dl_iterate_phdr(&Library::find, this);
  }

  bool holds(uintptr_t address) const { return address >= begin && address < end; }

 private:
  static int find(dl_phdr_info* info, size_t, void* result) {
    Library& library = *static_cast<Library*>(result);
    Library found(*info);
    if (!found.holds(reinterpret_cast<uintptr_t>(&present))) return 0;
    library = found;
    return 1;
  }

  explicit Library(const dl_phdr_info& info) {
    for (int i = 0; i < info.dlpi_phnum; ++i) {
      const ElfW(Phdr) & part = info.dlpi_phdr[i];
      if (part.p_type == PT_LOAD) {
        begin = std::min<uintptr_t>(begin, info.dlpi_addr + part.p_vaddr);
        end = std::max<uintptr_t>(end, info.dlpi_addr + part.p_vaddr + part.p_memsz);
      } else if (part.p_type == PT_TLS) {
        thread_local_storage = static_cast<unsigned char*>(info.dlpi_tls_data);
        thread_local_bytes = part.p_memsz;
      }
    }
  }
};

const Library& library() {
  static const Library found;
  return found;
}

Region& static_region() {
  static Region region = region_of(library().thread_local_storage, library().thread_local_bytes, true);
  return region;
}

struct Allocation {
  std::string name;
  uintptr_t begin;
  size_t bytes;
};
std::vector<Allocation> allocations;
size_t used = 0;
const Launch* current_launch = nullptr;

std::string global_place(uintptr_t address) {
  const Allocation* last = nullptr;
  for (const Allocation& allocation : allocations) {
    if (allocation.begin <= address) last = &allocation;
  }
  if (last == nullptr) return "global memory before all buffers";
  return "byte " + std::to_string(address - last->begin) + " of " + last->name + " (" + std::to_string(last->bytes) +
         " bytes of global memory)";
}

std::string place(const Region& region, uintptr_t address) {
  if (!region.shared) return global_place(address);
  return "byte " + std::to_string(address - region.begin) + " of " +
         (&region == &dynamic_region() ? "dynamic" : "static") + " shared memory (" + std::to_string(region.valid) +
         " bytes)";
}

std::string verb(Access kind, size_t bytes) {
  const char* const verbs[] = {"reads ", "writes ", "atomically updates "};
  return verbs[static_cast<int>(kind)] + std::to_string(bytes) + (bytes == 1 ? " byte at " : " bytes at ");
}

// Bits of `line` for the bytes that are accessed; those of the wrong kind are the result.
const char* wrong(const Line& line, uint16_t mask, Access kind) {
  if (mask & ~line.valid) return "out of bounds";
  if (kind != Access::kWrite && (mask & ~line.written)) return "uninitialised";
  if (kind != Access::kRead && (mask & line.frozen)) return "write to what is only to be read";
  return nullptr;
}

void access_line(Region& region, uintptr_t address, unsigned bytes, Access kind) {
  const size_t at = address - region.begin;
  Line& line = region.line(at / Line::kBytes);
  const unsigned offset = at % Line::kBytes;
  const uint16_t mask = static_cast<uint16_t>(((1u << bytes) - 1) << offset);
  if (const char* what = wrong(line, mask, kind)) {
    fail(std::string(what) + ": " + verb(kind, bytes) + place(region, address));
  }
  if (kind != Access::kRead) line.written |= mask;
  if ((offset | bytes) % line.width != 0) line.split(offset, bytes);
  for (unsigned i = offset / line.width; i < (offset + bytes) / line.width; ++i) {
    const Stamp* other = line.cells[i].note(kind);
    if (other == nullptr) continue;
    const bool reading = other != &line.cells[i].write && other < line.cells[i].atomics.at.data();
    fail("data race: " + verb(kind, bytes) + place(region, address) + ", which " + who(other->epoch, other->thread) +
         (reading ? " reads" : " writes") + " with nothing to order the two");
  }
}

void access_region(Region& region, uintptr_t address, size_t bytes, Access kind) {
  while (bytes > 0) {
    if (!region.holds(address)) fail("out of bounds: " + verb(kind, bytes) + place(region, address));
    const size_t rest = Line::kBytes - (address - region.begin) % Line::kBytes;
    const size_t now = std::min(rest, bytes);
    access_line(region, address, static_cast<unsigned>(now), kind);
    address += now;
    bytes -= now;
  }
}

bool is_parameter(uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(current_launch->parameters) < current_launch->parameter_bytes;
}

}  // namespace

void access(uintptr_t address, size_t bytes, Access kind) {
  if (actor == nullptr || address - actor->stack < kStackBytes) return;
  for (Region* region : {&dynamic_region(), &global_region(), &static_region()}) {
    if (region->holds(address)) return access_region(*region, address, bytes, kind);
  }
  if (kind == Access::kRead && (is_parameter(address) || library().holds(address))) return;
  fail("out of bounds: " + verb(kind, bytes) + "an address that is neither shared nor global memory");
}

unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(dynamic_region().begin); }

void enter_launch(const Launch& launch) {
  current_launch = &launch;
  dynamic_region().valid = launch.shared_bytes;
}

void enter_block() {
  for (const Region* region : {&dynamic_region(), &static_region()}) {
    std::memset(reinterpret_cast<void*>(region->begin), 0xff, region->valid);
  }
}

}  // namespace cuda_host

extern "C" {

using namespace cuda_host;

void* device_allocate(const char* name, size_t bytes) {
  constexpr size_t kAlignment = 256;
  constexpr size_t kRedZone = 1024;
  const size_t begin = used + kRedZone;
  const size_t end = begin + (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (end + kRedZone > kGlobalBytes) return nullptr;
  used = end;
  unsigned char* memory = reinterpret_cast<unsigned char*>(global_region().begin) + begin;
  std::memset(memory, 0xff, bytes);
  allocations.push_back({name, reinterpret_cast<uintptr_t>(memory), bytes});
  return memory;
}

void device_expose(void* address, const unsigned char* mask, size_t bytes, int written, int frozen) {
  Region& region = global_region();
  for (size_t i = 0; i < bytes; ++i) {
    if (mask[i] == 0) continue;
    const size_t at = reinterpret_cast<uintptr_t>(address) + i - region.begin;
    Line& line = region.lines[at / Line::kBytes];
    const uint16_t bit = static_cast<uint16_t>(1u << at % Line::kBytes);
    // Pages that were never touched are 0.
    if (line.width == 0) line.width = Line::kBytes;
    line.valid |= bit;
    line.written = static_cast<uint16_t>(written ? line.written | bit : line.written & ~bit);
    line.frozen = static_cast<uint16_t>(frozen ? line.frozen | bit : line.frozen & ~bit);
  }
}

void add_static_gap(size_t offset, size_t bytes) {
  Region& region = static_region();
  region.gaps.resize(region.capacity / Line::kBytes + 1);
  for (size_t i = offset; i < offset + bytes; ++i) {
    region.gaps[i / Line::kBytes] |= static_cast<uint16_t>(1u << i % Line::kBytes);
  }
}

void device_reset() {
  Region& region = global_region();
  madvise(region.lines, used / Line::kBytes * sizeof(Line) + sizeof(Line), MADV_DONTNEED);
  allocations.clear();
  used = 0;
}
}
