// What both passes know of a call.
#pragma once

#include <cmath>

#include "cpu/peer_contrast/blocks.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// Exponents up to this in size need no shift: their exponentials, and sums of 2^31 of them, are finite and normal, and
// so is a product of eight such sums in double.
constexpr double kUnshifted = 60;

// How exponentials are computed: of x / T from those of x / (3 T), each by itself, or each by itself of x less the
// largest x of its row.
enum class Exponents { kCubed, kPlain, kShifted };

template <typename T>
inline Vec<T> masked(Vec<T> v, IndexVec<T> mask) {
  return (Vec<T>)((IndexVec<T>)v & mask);
}

template <typename T>
struct Call {
  Call(const PeerContrast& given, const Host& caller)
      : args(given),
        s(given.sizes),
        host(caller),
        blocks(given, caller),
        scale(static_cast<T>(1 / given.temperature)),
        soften(static_cast<T>(1 / (given.temperature * given.soft_temperature))),
        positives(shared_zeros<int64_t>(caller, blocks.padded_batch())) {
    find_positives();
    find_exponents();
  }

  // Where peers i and j keep what belongs to row 0 of a block.
  int64_t at(int64_t i, int64_t j, int64_t block) const {
    return (i * s.peers + j) * blocks.padded_batch() + block * blocks.size();
  }
  int64_t padded_pairs() const { return s.pairs() * blocks.padded_batch(); }

  // Similarities of row r of peer i with the block's columns of peer j.
  template <typename E>
  E* tile(E* x, int64_t i, int64_t j, int64_t r) const {
    return x + (i * blocks.size() + r) * blocks.width() + j * blocks.size();
  }

  // Columns from c on of block b that are not row r of block a itself.
  IndexVec<T> others(int64_t a, int64_t b, int64_t r, int64_t c) const {
    return lanes() != static_cast<LaneMask<T>>(a == b ? r - c : -1);
  }
  // Columns from c on of block b that are images.
  IndexVec<T> valid(int64_t b, int64_t c) const { return lanes() < static_cast<LaneMask<T>>(blocks.valid(b) - c); }

  bool counts(int64_t r) const { return s.active(r) && positives[r] > 0; }

  // Of the rows of (i, j), without the row itself (q = 0) or softened (1): the largest similarity (0 where exponents
  // are not shifted), and the sum of exponentials above it.
  T* largest(int q, int64_t i, int64_t j) const {
    return static_cast<T*>(args.normalisers) + ((2 * q * s.peers + i) * s.peers + j) * s.batch;
  }
  T* total(int q, int64_t i, int64_t j) const { return largest(q, i, j) + s.pairs() * s.batch; }

  const PeerContrast& args;
  const peer_contrast::Sizes& s;
  const Host& host;
  const Blocks<T> blocks;
  const T scale, soften;  // of similarities in the two exponents
  int64_t* positives;     // of the padded batch
  int64_t counted = 0;    // rows with positives
  Exponents exponents;
  bool finite;  // all embeddings are, and their squares

 private:
  static IndexVec<T> lanes() {
    IndexVec<T> lane;
    for (int i = 0; i < kLanes<T>; ++i) lane[i] = static_cast<LaneMask<T>>(i);
    return lane;
  }

  void find_positives() {
    for (int64_t k = 0; k < args.classes; ++k) {
      const int64_t others = args.begins[k + 1] - args.begins[k] - 1;
      for (int64_t p = args.begins[k]; p < args.begins[k + 1]; ++p) positives[args.images[p]] = others;
      if (others > 0) counted += others + 1;
    }
  }

  // By |v . w| <= |v| |w|.
  void find_exponents() {
    Vec<T> most{}, zeros{};
    for (int64_t peer = 0; peer < s.peers; ++peer) {
      for (int64_t r = 0; r < blocks.padded_batch(); r += kLanes<T>) {
        const Vec<T> square = load<T>(blocks.squares(peer) + r);
        most = maximum<T>(most, square);
        zeros += square * 0;
      }
    }
    finite = sum_lanes<T>(zeros) == 0;
    const double least = args.soft_temperature < 1 ? args.temperature * args.soft_temperature : args.temperature;
    const bool small = static_cast<double>(max_lanes<T>(most)) <= kUnshifted * least;
    exponents = !small ? Exponents::kShifted : args.soft_temperature == 3 ? Exponents::kCubed : Exponents::kPlain;
  }
};

// Calls work(std::integral_constant<Exponents, ...>) for those of the call.
template <typename Work>
inline void with_exponents(Exponents exponents, Work work) {
  switch (exponents) {
    case Exponents::kCubed:
      return work(std::integral_constant<Exponents, Exponents::kCubed>());
    case Exponents::kPlain:
      return work(std::integral_constant<Exponents, Exponents::kPlain>());
    case Exponents::kShifted:
      return work(std::integral_constant<Exponents, Exponents::kShifted>());
  }
}

// Unshifted exponentials of similarities x.
template <Exponents kExponents, typename T>
struct Exponentials {
  Exponentials(const Call<T>& call, Vec<T> x) {
    soft = exp_within_range(x * call.soften);
    hard = kExponents == Exponents::kCubed ? soft * soft * soft : exp_within_range(x * call.scale);
  }
  Vec<T> hard, soft;
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
