// The order in which a bank's rows are visited: tile by tile, so that what one image fetched into the second-level
// cache serves the others, or as the indices come. An image's results depend on its own order alone, so they are the
// same for any number of threads.
#pragma once

#include "cpu/memory_contrast.h"
#include "cpu/services.h"

namespace {

using pyext::cpu::Host;
using pyext::cpu::MemoryContrast;

constexpr int64_t kTileBytes = 512 * 1024;

// log2 of the rows in a tile, which fill half of a small second-level cache.
inline int tile_shift(int64_t row_bytes) {
  int shift = 0;
  while ((row_bytes << (shift + 1)) <= kTileBytes) ++shift;
  return shift;
}

struct Tiles {
  int shift;  // a row's tile is row >> shift
  int64_t count;
};

inline Tiles tiles_of(const MemoryContrast& args, int64_t element_bytes) {
  const int shift = tile_shift(args.sizes.features * element_bytes);
  return {shift, ((args.sizes.rows - 1) >> shift) + 1};
}

inline bool are_rows(const int64_t* indices, int64_t count, int64_t rows) {
  uint64_t largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    const uint64_t index = static_cast<uint64_t>(indices[k]);
    largest = index > largest ? index : largest;
  }
  return largest < static_cast<uint64_t>(rows);
}

// One image's row numbers: as they come, or (the positive stays first) sorted by tile, equal tiles in their order.
inline void order_image(const MemoryContrast& args, const Tiles& tiles, const int64_t* indices, int32_t* rows,
                        int32_t* next) {
  const int64_t entries = args.sizes.entries;
  if (!args.tiled) {
    for (int64_t k = 0; k < entries; ++k) rows[k] = static_cast<int32_t>(indices[k]);
    return;
  }
  for (int64_t t = 0; t < tiles.count; ++t) next[t] = 0;
  for (int64_t k = 1; k < entries; ++k) ++next[indices[k] >> tiles.shift];
  int32_t start = 1;
  for (int64_t t = 0; t < tiles.count; ++t) {
    const int32_t size = next[t];
    next[t] = start;
    start += size;
  }
  rows[0] = static_cast<int32_t>(indices[0]);
  for (int64_t k = 1; k < entries; ++k) rows[next[indices[k] >> tiles.shift]++] = static_cast<int32_t>(indices[k]);
}

// Fills args.rows; false where an index is no row.
inline bool order_rows(const MemoryContrast& args, const Tiles& tiles, const Host& host) {
  const auto& s = args.sizes;
  bool* valid = static_cast<bool*>(host.shared(host.self, s.batch * sizeof(bool)));
  parallel(host, s.batch, [&](int64_t b) {
    const int64_t* indices = args.indices + b * s.entries;
    valid[b] = are_rows(indices, s.entries, s.rows);
    if (!valid[b]) return;
    int32_t* next = static_cast<int32_t*>(host.scratch(args.tiled ? tiles.count * sizeof(int32_t) : 1));
    order_image(args, tiles, indices, args.rows + b * s.entries, next);
  });
  for (int64_t b = 0; b < s.batch; ++b) {
    if (!valid[b]) return false;
  }
  return true;
}

// Whether every number is a row of the banks, as the forward pass saw to: backward is an operator that anyone can call.
inline bool rows_are_valid(const MemoryContrast& args) {
  uint32_t largest = 0;
  const int64_t count = args.sizes.batch * args.sizes.entries;
  for (int64_t k = 0; k < count; ++k) {
    const uint32_t row = static_cast<uint32_t>(args.rows[k]);
    largest = row > largest ? row : largest;
  }
  return largest < static_cast<uint64_t>(args.sizes.rows);
}

struct Images {
  int64_t begin, end;
};

// Calls visit(b, first, count) for stretches that cover the entries of each image in order, those of all images in one
// tile before those in the next. `cursor` has an element per image.
template <typename Visit>
inline void visit_stretches(const MemoryContrast& args, const Tiles& tiles, Images images, int64_t* cursor,
                            Visit visit) {
  const int64_t entries = args.sizes.entries;
  if (!args.tiled) {
    for (int64_t b = images.begin; b < images.end; ++b) visit(b, 0, entries);
    return;
  }
  for (int64_t b = images.begin; b < images.end; ++b) {
    visit(b, 0, 1);
    cursor[b] = 1;
  }
  for (int64_t t = 0; t < tiles.count; ++t) {
    for (int64_t b = images.begin; b < images.end; ++b) {
      const int32_t* rows = args.rows + b * entries;
      const int64_t first = cursor[b];
      while (cursor[b] < entries && rows[cursor[b]] >> tiles.shift <= t) ++cursor[b];
      if (cursor[b] > first) visit(b, first, cursor[b] - first);
    }
  }
}

// Calls visit(bank, b, first, count), bank after bank, on several threads.
template <typename Visit>
inline void visit_all(const MemoryContrast& args, const Tiles& tiles, const Host& host, Visit visit) {
  const auto& s = args.sizes;
  const int64_t tasks = s.batch < host.threads ? s.batch : host.threads;
  int64_t* cursor = static_cast<int64_t*>(host.shared(host.self, s.batch * sizeof(int64_t)));
  parallel(host, tasks, [&](int64_t task) {
    const Images images{s.batch * task / tasks, s.batch * (task + 1) / tasks};
    for (int64_t bank = 0; bank < s.peers; ++bank) {
      visit_stretches(args, tiles, images, cursor,
                      [&](int64_t b, int64_t first, int64_t count) { visit(bank, b, first, count); });
    }
  });
}

}  // namespace
