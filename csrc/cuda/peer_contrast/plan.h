// How peer_contrast's work is cut into blocks: groups of peers, tiles of rows and columns, stretches of columns.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/device.h"
#include "cuda/peer_contrast.h"
#include "cuda/product.h"

namespace pyext::peer_contrast {

using namespace pyext::cuda;

// A tile of columns is fetched once per product and met by kRows rows: 128 operations per byte of 16-bit embeddings, 64
// of float32. sm_90 holds two blocks of the sums at a time (one, of four peers) and one of the gradients: 16 and 8
// warps of 64. At 128 features in 16 bits a warp issues about 900 instructions per part of the sums and 1,200 of the
// gradients, by the machine code, for 2^18 and 2^19 operations: issue alone bounds these at 0.3 and 0.4 of the tensor
// cores' rate.
constexpr int kThreads = 256;
constexpr int kPart = 32;        // rows and columns of a warp in a tile
constexpr int kRowWarps = 4;     // a tile's warps, along its rows
constexpr int kColumnWarps = 2;  // and along its columns
constexpr int kRows = kPart * kRowWarps;
constexpr int kColumns = kPart * kColumnWarps;
constexpr int kDepth = 64;   // features of a chunk, which is what is fetched at once
constexpr int kOutputs = 2;  // chunks of the gradient that one block adds up
constexpr int kMaxPeersTogether = 4;
static_assert(kThreads == kWarp * kRowWarps * kColumnWarps);

inline int64_t divided(int64_t count, int64_t by) { return (count + by - 1) / by; }

// All similarities of one image pair that a softened term needs are met by one thread: those within and between the
// peers of a group. Groups are all peers, where a tile has room for them, or else every two.
struct Groups {
  int peers;
  int size;

  static Groups of(int64_t peers) {
    const bool together = peers <= 2 || peers == kMaxPeersTogether;
    return {static_cast<int>(peers), together ? static_cast<int>(peers) : 2};
  }

  PYEXT_HOST_DEVICE bool pairs() const { return size < peers; }
  PYEXT_HOST_DEVICE int count() const { return pairs() ? peers * (peers - 1) / 2 : 1; }

  // The group of i < j among pairs (0, 1), (0, 2), ..., (1, 2), ...
  PYEXT_HOST_DEVICE int of_pair(int i, int j) const {
    const int low = i < j ? i : j, high = i < j ? j : i;
    return pairs() ? low * (2 * peers - low - 1) / 2 + high - low - 1 : 0;
  }
  // The number of `peer` among the peers of a group with `other`.
  PYEXT_HOST_DEVICE int place(int peer, int other) const { return pairs() ? peer > other : peer; }
  // The first group with `peer`: there, what is the peer's alone counts.
  PYEXT_HOST_DEVICE int first_other(int peer) const { return peer == 0 && peers > 1 ? 1 : 0; }
  PYEXT_HOST_DEVICE int first(int peer) const { return of_pair(peer, first_other(peer)); }
};

// The peers of a group, by their place in it.
struct Members {
  bool pair;
  int low, high;

  PYEXT_HOST_DEVICE Members(const Groups& groups, int group) : pair(groups.pairs()), low(0) {
    while (pair && group >= groups.peers - 1 - low) group -= groups.peers - 1 - low++;
    high = low + 1 + group;
  }
  PYEXT_HOST_DEVICE int operator[](int place) const { return !pair ? place : place == 0 ? low : high; }
};

// Where a row or column of a tile comes from. The 32 of a warp are `size` peers in turn, each with the same images:
// then a thread that holds (peer i, image r) and (peer j, image c) of a product has all pairs of peers of r and c.
template <int P>
struct Tile {
  static constexpr int kSlots = kPart / 8 / P;  // runs of 8 images of one peer in a warp's part
  static constexpr int kImagesOfPart = 8 * kSlots;
  static constexpr int kRowImages = kRowWarps * kImagesOfPart;
  static constexpr int kColumnImages = kColumnWarps * kImagesOfPart;

  __device__ static int peer(int position) { return position % kPart / kImagesOfPart; }
  __device__ static int image(int position) { return position / kPart * kImagesOfPart + position % kImagesOfPart; }
};

template <typename T>
constexpr int kPitch = kChunkPitch<T, kDepth>;

struct Plan {
  Sizes sizes;
  Groups groups;
  int64_t padded_batch;     // images of a peer, whole tiles; those beyond the batch are zeros
  int64_t padded_features;  // whole chunks
  int row_chunks;           // chunks of a tile's rows in shared memory: all of them, or the one in use
  int64_t first_tile, row_tiles, column_tiles, tiles_per_stretch, stretches;

  PYEXT_HOST_DEVICE int chunks() const { return static_cast<int>(padded_features / kDepth); }
  // One chunk of columns is fetched while another is in use if there is room for all chunks of the rows.
  PYEXT_HOST_DEVICE bool ahead() const { return row_chunks == chunks(); }
  PYEXT_HOST_DEVICE int64_t rows() const { return sizes.peers * padded_batch; }
  PYEXT_HOST_DEVICE int places() const { return groups.size * groups.size; }
  // Numbers of which there is one for every group, image and ordered pair of the group's places.
  PYEXT_HOST_DEVICE int64_t grouped() const { return groups.count() * padded_batch * places(); }
  int64_t output_blocks() const { return divided(chunks(), kOutputs); }
  // Partial results of a row: one per stretch and warp along the columns.
  PYEXT_HOST_DEVICE int64_t parts() const { return stretches * kColumnWarps; }
};

// A thread's share of work on rows: one row of places a and b of a group, which are peers i and j.
struct GroupedRow {
  int64_t row;
  int group, a, b, i, j;
  bool first;  // of the groups with this pair: an (i, i) is in several

  __device__ explicit GroupedRow(const Plan& plan)
      : row(blockIdx.x * int64_t{kThreads} + threadIdx.x), group(static_cast<int>(blockIdx.y) / plan.places()) {
    const int place = static_cast<int>(blockIdx.y) % plan.places();
    a = place / plan.groups.size;
    b = place % plan.groups.size;
    const Members members(plan.groups, group);
    i = members[a];
    j = members[b];
    first = a != b || group == plan.groups.first(i);
  }
};

// Enough blocks for a large GPU, the same on each, so that results are.
constexpr int64_t kWantedBlocks = 512;
constexpr int64_t kLeastTiles = 4;  // of a stretch

inline size_t shared_bytes(const Plan& p, size_t element, bool gradient) {
  const size_t pitch = kDepth + 16 / element;
  const int64_t positions = int64_t{p.row_chunks} * kRows + (p.ahead() ? 2 : 1) * kColumns + (gradient ? kRows : 0);
  return static_cast<size_t>(positions) * pitch * element;
}

// For rows [start, stop), all of the batch in the backward pass.
inline Plan plan_for(const Sizes& s, size_t element, bool gradient) {
  Plan p{};
  p.sizes = s;
  p.groups = Groups::of(s.peers);
  p.padded_batch = divided(std::max<int64_t>(s.batch, 1), kRows) * kRows;
  p.padded_features = divided(std::max<int64_t>(s.features, 1), kDepth) * kDepth;
  const int64_t start = gradient ? 0 : s.start, stop = gradient ? s.batch : s.stop;
  const int64_t row_images = kRows / p.groups.size, column_images = kColumns / p.groups.size;
  p.first_tile = start / row_images;
  p.row_tiles = stop > start ? divided(stop, row_images) - p.first_tile : 0;
  p.column_tiles = divided(s.batch, column_images);
  const int64_t blocks = std::max<int64_t>(1, p.row_tiles * p.groups.count());
  const int64_t stretches = std::min(divided(kWantedBlocks, blocks), divided(p.column_tiles, kLeastTiles));
  p.tiles_per_stretch = divided(p.column_tiles, std::max<int64_t>(1, stretches));
  p.stretches = p.column_tiles == 0 ? 0 : divided(p.column_tiles, p.tiles_per_stretch);
  p.row_chunks = p.chunks();
  if (shared_bytes(p, element, gradient) > shared_memory_limit()) p.row_chunks = 1;
  return p;
}

}  // namespace pyext::peer_contrast
