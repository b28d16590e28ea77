// The batch in blocks of rows, and the pairs of groups of blocks in rounds in which no group occurs twice.
//
// The similarities of two blocks of rows, for all pairs of peers, hold S_ij[r, c] and, since S_ij[r, c] = S_ji[c, r],
// all that row c needs of row r: a pair of blocks is computed once. Tasks of one round write to different rows, and
// rounds follow each other, so results do not depend on the number of threads.
#pragma once

#include <cstring>

#include "cpu/peer_contrast.h"
#include "cpu/peer_contrast/product.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

template <typename Work>
void run(const Host& host, int64_t tasks, Work work) {
  host.parallel(tasks, [](void* context, int64_t task) { (*static_cast<Work*>(context))(task); }, &work);
}

template <typename T>
class Blocks {
 public:
  Blocks(const PeerContrast& args, const Host& host)
      : s_(args.sizes), host_(host), size_(block_size(s_)), pitch_(round_up<T>(s_.features)) {
    count_ = (s_.batch + size_ - 1) / size_;
    rows_ = zeros<T>(count_ * width() * pitch_);
    columns_ = zeros<T>(count_ * width() * pitch_);
    run(host_, count_, [&](int64_t block) { pack(static_cast<const T*>(args.embeddings), block); });
  }

  int64_t size() const { return size_; }              // rows of a block
  int64_t width() const { return s_.peers * size_; }  // rows of all peers in a block
  int64_t padded_batch() const { return count_ * size_; }
  int64_t count() const { return count_; }
  int64_t pitch() const { return pitch_; }
  // Embeddings of a block, peer by peer: (width, pitch).
  const T* rows(int64_t block) const { return rows_ + block * width() * pitch_; }
  int64_t valid(int64_t block) const { return s_.batch - block * size_ < size_ ? s_.batch - block * size_ : size_; }

  // Calls work(a, b, similarities) once for each pair a <= b of blocks with an active row: (width, width), the rows
  // those of a.
  template <typename Work>
  void visit(Work work) const {
    const int64_t groups = count_ < kGroups ? (count_ + 1) / 2 * 2 : kGroups;
    run(host_, groups, [&](int64_t group) { visit_groups(group, group, groups, work); });
    for (int64_t round = 0; round < groups - 1; ++round) {
      run(host_, groups / 2, [&](int64_t task) {
        // The circle method: the last group stays, the others turn.
        const int64_t a = task == 0 ? groups - 1 : (round + task) % (groups - 1);
        const int64_t b = (round - task + groups - 1) % (groups - 1);
        visit_groups(a < b ? a : b, a < b ? b : a, groups, work);
      });
    }
  }

  template <typename E>
  E* zeros(int64_t count) const {
    E* data = static_cast<E*>(host_.shared(host_.self, count * sizeof(E)));
    if (count > 0) std::memset(data, 0, count * sizeof(E));
    return data;
  }

 private:
  // Of blocks, an even number: more let more threads work, fewer have fewer rounds to wait for.
  static constexpr int64_t kGroups = 16;

  // About 128 rows of all peers together, so that similarities and embeddings of a pair stay in the second-level
  // cache; fewer where the batch would not give two threads something to do.
  static int64_t block_size(const peer_contrast::Sizes& s) {
    constexpr int64_t unit = kLanes<T> < kTileRows ? kTileRows : kLanes<T>;
    const int64_t wanted = 128 / s.peers / unit * unit;
    const int64_t quarter = (s.batch + 4 * unit - 1) / (4 * unit) * unit;
    const int64_t size = wanted < quarter ? wanted : quarter;
    return size < unit ? unit : size;
  }

  void pack(const T* embeddings, int64_t block) const {
    T* rows = rows_ + block * width() * pitch_;
    T* columns = columns_ + block * width() * pitch_;
    for (int64_t peer = 0; peer < s_.peers; ++peer) {
      const T* from = embeddings + (peer * s_.batch + block * size_) * s_.features;
      for (int64_t r = 0; r < valid(block); ++r) {
        std::memcpy(rows + (peer * size_ + r) * pitch_, from + r * s_.features, s_.features * sizeof(T));
      }
    }
    for (int64_t k = 0; k < pitch_; ++k) {
      for (int64_t r = 0; r < width(); ++r) columns[k * width() + r] = rows[r * pitch_ + k];
    }
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
    T* similarities = static_cast<T*>(host_.scratch(width() * width() * sizeof(T)));
    product<T>({rows(a), pitch_, 1}, columns_ + b * width() * pitch_, width(), similarities, width(), width(), width(),
               s_.features, false);
    work(a, b, similarities);
  }

  const peer_contrast::Sizes& s_;
  const Host& host_;
  const int64_t size_, pitch_;
  int64_t count_;
  T *rows_, *columns_;  // the same numbers, the second transposed
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
