// The batch in blocks of rows, and the pairs of groups of blocks in rounds in which no group occurs twice.
//
// The similarities of two blocks of rows, for all pairs of peers, hold S_ij[r, c] and, since S_ij[r, c] = S_ji[c, r],
// all that row c needs of row r: a pair of blocks is computed once. Tasks of one round write to different rows, and
// rounds follow each other, so results do not depend on the number of threads.
#pragma once

#include <cstring>

#include "cpu/peer_contrast.h"
#include "cpu/peer_contrast/product.h"
#include "cpu/services.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// n elements of dtype `from`, whose accumulation type is T, from the element at `first` on.
template <typename T>
inline void read_row(const void* from, DType dtype, int64_t first, int64_t n, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    if (dtype == DType::kBFloat16) return convert(static_cast<const BFloat16*>(from) + first, to, n);
    if (dtype == DType::kHalf) return convert(static_cast<const Half*>(from) + first, to, n);
  }
  std::memcpy(to, static_cast<const T*>(from) + first, n * sizeof(T));
}

template <typename T>
inline void write_row(const T* from, void* to, DType dtype, int64_t first, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    if (dtype == DType::kBFloat16) return convert(from, static_cast<BFloat16*>(to) + first, n);
    if (dtype == DType::kHalf) return convert(from, static_cast<Half*>(to) + first, n);
  }
  std::memcpy(static_cast<T*>(to) + first, from, n * sizeof(T));
}

template <typename T>
class Blocks {
 public:
  Blocks(const PeerContrast& args, const Host& host)
      : s_(args.sizes), host_(host), size_(block_size(s_)), pitch_(round_up<T>(s_.features)) {
    count_ = (s_.batch + size_ - 1) / size_;
    rows_ = shared<T>(host_, count_ * width() * pitch_);
    columns_ = shared<T>(host_, count_ * width() * pitch_);
    squares_ = shared<T>(host_, s_.peers * padded_batch());
    places_ = shared<int64_t>(host_, s_.batch);
    parallel(host_, count_, [&](int64_t block) { pack(args, block); });
  }

  // Rows of all peers together, with as few peers as fill a block.
  static constexpr int64_t kMostRows = 128;

  int64_t size() const { return size_; }              // rows of a block
  int64_t width() const { return s_.peers * size_; }  // rows of all peers in a block
  int64_t padded_batch() const { return count_ * size_; }
  int64_t count() const { return count_; }
  int64_t pitch() const { return pitch_; }
  int64_t valid(int64_t block) const { return s_.batch - block * size_ < size_ ? s_.batch - block * size_ : size_; }

  // Embeddings of a block, peer by peer: (width, pitch). Zeros pad them.
  const T* rows(int64_t block) const { return rows_ + block * width() * pitch_; }
  // Where an image stands in arrays of all blocks with rows as above.
  int64_t place(int64_t peer, int64_t image) const { return places_[image] + peer * size_ * pitch_; }
  const T* row(int64_t peer, int64_t image) const { return rows_ + place(peer, image); }

  // S_ii[r, r] of a peer for all images, with the rounding errors of similarities.
  const T* squares(int64_t peer) const { return squares_ + peer * padded_batch(); }

  // Calls work(a, b, similarities) once for each pair a <= b of blocks with an active row: (width, width), the rows
  // those of a. Behind the similarities, a row of `width` elements is free.
  template <typename Work>
  void visit(Work work) const {
    const int64_t groups = count_ < kGroups ? (count_ + 1) / 2 * 2 : kGroups;
    for (int64_t round = 0; round < groups - 1; ++round) {
      parallel(host_, groups / 2, [&](int64_t task) {
        // The circle method: the last group stays, the others turn.
        const int64_t p = task == 0 ? groups - 1 : (round + task) % (groups - 1);
        const int64_t q = (round - task + groups - 1) % (groups - 1);
        if (round == 0) {
          visit_groups(p, p, groups, work);
          visit_groups(q, q, groups, work);
        }
        visit_groups(p < q ? p : q, p < q ? q : p, groups, work);
      });
    }
  }

 private:
  // Of blocks, an even number: more let more threads work, fewer have fewer rounds to wait for.
  static constexpr int64_t kGroups = 16;

  // As many rows that similarities and embeddings of a pair stay in the second-level cache; fewer where the batch would
  // not give two threads something to do.
  static int64_t block_size(const peer_contrast::Sizes& s) {
    constexpr int64_t unit = kLanes<T> < kTileRows ? kTileRows : kLanes<T>;
    const int64_t wanted = kMostRows / s.peers / unit * unit;
    const int64_t quarter = (s.batch + 4 * unit - 1) / (4 * unit) * unit;
    const int64_t size = wanted < quarter ? wanted : quarter;
    return size < unit ? unit : size;
  }

  void pack(const PeerContrast& args, int64_t block) const {
    T* to = rows_ + block * width() * pitch_;
    for (int64_t r = 0; r < valid(block); ++r) places_[block * size_ + r] = (block * width() + r) * pitch_;
    for (int64_t peer = 0; peer < s_.peers; ++peer) {
      for (int64_t r = 0; r < size_; ++r, to += pitch_) {
        const int64_t features = r < valid(block) ? s_.features : 0;
        const int64_t first = (peer * s_.batch + block * size_ + r) * s_.features;
        if (features > 0) read_row<T>(args.embeddings, args.dtype, first, features, to);
        std::memset(to + features, 0, (pitch_ - features) * sizeof(T));
      }
    }
    for (int64_t r = 0; r < width(); r += kLanes<T>) transpose(block, r);
  }

  // kLanes rows to columns, and their squares in the order of a product.
  void transpose(int64_t block, int64_t first) const {
    T* columns = columns_ + block * width() * pitch_ + first;
    for (int64_t k = 0; k < pitch_; k += kLanes<T>) {
      Vec<T> square[kLanes<T>];
      for (int r = 0; r < kLanes<T>; ++r) square[r] = load<T>(rows(block) + (first + r) * pitch_ + k);
      transpose_square<T>(square);
      for (int c = 0; c < kLanes<T>; ++c) store<T>(columns + (k + c) * width(), square[c]);
    }
    Vec<T> sum{};
    for (int64_t k = 0; k < s_.features; ++k) {
      const Vec<T> x = load<T>(columns + k * width());
      sum += x * x;
    }
    store<T>(squares_ + first / size_ * padded_batch() + block * size_ + first % size_, sum);
  }

  // Groups hold successive blocks, the last ones perhaps none.
  template <typename Work>
  void visit_groups(int64_t a, int64_t b, int64_t groups, Work& work) const {
    for (int64_t p = a * count_ / groups; p < (a + 1) * count_ / groups; ++p) {
      for (int64_t q = a == b ? p : b * count_ / groups; q < (b + 1) * count_ / groups; ++q) visit_pair(p, q, work);
    }
  }

  bool active(int64_t block) const { return block * size_ < s_.stop && s_.start < (block + 1) * size_; }

  template <typename Work>
  void visit_pair(int64_t a, int64_t b, Work& work) const {
    if (!active(a) && !active(b)) return;
    T* similarities = static_cast<T*>(host_.scratch((width() + 1) * width() * sizeof(T)));
    product<T>({rows(a), pitch_, 1}, columns_ + b * width() * pitch_, width(), similarities, width(), width(), width(),
               s_.features, Result::kReplaced);
    work(a, b, similarities);
  }

  const peer_contrast::Sizes& s_;
  const Host& host_;
  const int64_t size_, pitch_;
  int64_t count_;
  T *rows_, *columns_;  // the same numbers, the second transposed block by block
  T* squares_;
  int64_t* places_;  // of the first peer's rows: a division for each would take longer than the arithmetic on it
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
