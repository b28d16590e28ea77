// Sums over the similarities of each row, and the terms.
//
// With x = S / T and y = x / T_soft, a row's terms are
//   contrast  log sum_{c != r} exp x[c] - mean of x over positives
//   softened  sum_c p(c) (y(c) - y'(c)) for each student y' of the target p; the differences of the two log-sum-exps
//             cancel in the sum over ordered pairs of peers.
// For a target (i, i) the students' part is sum_k (y_ii - y_kk), for (i, j) it is y_ij - y_ji: symmetric in row and
// column, like the similarities, so that one visit of S_ij[r, c] serves row r of (i, j) and row c of (j, i).
#pragma once

#include "cpu/peer_contrast/positives.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

template <typename T>
class Forward {
 public:
  explicit Forward(const Call<T>& call) : call_(call), s_(call.s), blocks_(call.blocks) {}

  void operator()() {
    find_references();
    for (double*& sums : sums_) sums = shared_zeros<double>(call_.host, call_.padded_pairs());
    if (call_.finite) {
      if (call_.exponents == Exponents::kShifted) find_largest();
      with_exponents(call_.exponents, [&](auto exponents) {
        blocks_.visit([&](int64_t a, int64_t b, const T* x) { add_block<exponents()>(a, b, x); });
      });
    }
    write_normalisers();
    call_.finite ? write_terms() : write_not_finite();
  }

 private:
  enum Sum { kHard, kSoft, kDifference, kSums };
  static constexpr int kRows = kLanes<T> < 4 ? kLanes<T> : 4;  // whose sums are in registers
  static constexpr int64_t kMostColumns = Blocks<T>::kMostRows;

  // A constant may be taken from all of a row's differences when those of the row's targets add up to 0. The one at the
  // row itself is taken, where a peer's own distribution is largest: without it, sharp distributions that hardly differ
  // would leave the rounding error of that large summand. Between peers it is 0 already.
  void find_references() {
    const int64_t padded = blocks_.padded_batch();
    references_ = shared<T>(call_.host, s_.peers * padded);
    for (int64_t i = 0; i < s_.peers; ++i) {
      for (int64_t r = 0; r < padded; r += kLanes<T>) {
        const auto square = [&](int64_t peer) { return load<T>(blocks_.squares(peer) + r); };
        store<T>(references_ + i * padded + r, differences(i, square));
      }
    }
  }

  template <typename Of>
  Vec<T> differences(int64_t i, Of of_peer) const {
    Vec<T> sum{};
    const Vec<T> own = of_peer(i);
    for (int64_t k = 0; k < s_.peers; ++k) sum += own - of_peer(k);
    return sum;
  }

  void find_largest() {
    for (T*& largest : largest_) {
      largest = shared<T>(call_.host, call_.padded_pairs());
      for (int64_t k = 0; k < call_.padded_pairs(); ++k) largest[k] = -INFINITY;
    }
    blocks_.visit([&](int64_t a, int64_t b, const T* x) {
      for_rows(a, [&](int64_t i, int64_t j, int64_t r) { find_largest(a, b, x, i, j, r); });
    });
  }

  template <typename Work>
  void for_rows(int64_t a, Work work) const {
    for (int64_t i = 0; i < s_.peers; ++i) {
      for (int64_t j = 0; j < s_.peers; ++j) {
        for (int64_t r = 0; r < blocks_.valid(a); ++r) work(i, j, r);
      }
    }
  }

  void find_largest(int64_t a, int64_t b, const T* x, int64_t i, int64_t j, int64_t r) {
    const Vec<T> none = splat<T>(-INFINITY);
    Vec<T> row[2] = {none, none};
    for (int64_t c = 0; c < blocks_.size(); c += kLanes<T>) {
      const Vec<T> value = load<T>(call_.tile(x, i, j, r) + c);
      const IndexVec<T> valid = call_.valid(b, c), other = valid & call_.others(a, b, r, c);
      const Vec<T> found[2] = {other ? value : none, valid ? value : none};
      for (int q = 0; q < 2; ++q) {
        row[q] = maximum<T>(row[q], found[q]);
        T* column = largest_[q] + call_.at(j, i, b) + c;
        if (a != b) store<T>(column, maximum<T>(load<T>(column), found[q]));
      }
    }
    for (int q = 0; q < 2; ++q) {
      T& largest = largest_[q][call_.at(i, j, a) + r];
      const T found = max_lanes<T>(row[q]);
      largest = found > largest ? found : largest;
    }
  }

  template <Exponents kExponents>
  void add_block(int64_t a, int64_t b, const T* x) {
    const bool whole = a != b && blocks_.valid(b) == blocks_.size();
    for (int64_t i = 0; i < s_.peers; ++i) {
      for (int64_t j = 0; j < s_.peers; ++j) {
        const Pair pair{a, b, i, j, x};
        if (i == j) {
          whole ? add_pair<kExponents, true, false>(pair) : add_pair<kExponents, true, true>(pair);
        } else {
          whole ? add_pair<kExponents, false, false>(pair) : add_pair<kExponents, false, true>(pair);
        }
      }
    }
  }

  struct Pair {
    int64_t a, b, i, j;
    const T* x;
  };
  struct ColumnSums {
    alignas(kVectorBytes) T of[kSums][kMostColumns];
  };

  template <Exponents kExponents, bool Own, bool Masked>
  void add_pair(const Pair& pair) {
    ColumnSums columns{};
    for (int64_t first = 0; first < blocks_.size(); first += kLanes<T>) {
      Vec<T> rows[kSums][kLanes<T>];
      for (int r = 0; r < kLanes<T>; r += kRows) add_rows<kExponents, Own, Masked>(pair, first, r, rows, columns);
      for (int q = 0; q < kSums; ++q)
        add_to(q, call_.at(pair.i, pair.j, pair.a) + first, sum_lanes_of_each<T>(rows[q]));
    }
    if (pair.a == pair.b) return;
    for (int q = 0; q < kSums; ++q) {
      for (int64_t c = 0; c < blocks_.size(); c += kLanes<T>) {
        add_to(q, call_.at(pair.j, pair.i, pair.b) + c, load<T>(columns.of[q] + c));
      }
    }
  }

  void add_to(int q, int64_t first, Vec<T> sums) {
    for (int lane = 0; lane < kLanes<T>; ++lane) sums_[q][first + lane] += static_cast<double>(sums[lane]);
  }

  // Rows first + offset and the kRows - 1 next ones.
  template <Exponents kExponents, bool Own, bool Masked>
  void add_rows(const Pair& pair, int64_t first, int offset, Vec<T> (&rows)[kSums][kLanes<T>], ColumnSums& columns) {
    Vec<T> row[kSums][kRows] = {};
    for (int64_t c = 0; c < blocks_.size(); c += kLanes<T>) {
      Vec<T> column[kSums];
#pragma GCC unroll 4
      for (int q = 0; q < kSums; ++q) column[q] = load<T>(columns.of[q] + c);
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) {
        add_value<kExponents, Own, Masked>(pair, first + offset + k, c,
                                           {&row[kHard][k], &row[kSoft][k], &row[kDifference][k]}, column);
      }
#pragma GCC unroll 4
      for (int q = 0; q < kSums; ++q) store<T>(columns.of[q] + c, column[q]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < kSums; ++q) {
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) rows[q][offset + k] = row[q][k];
    }
  }

  struct RowSums {
    Vec<T>*hard, *soft, *difference;
  };

  template <Exponents kExponents, bool Own, bool Masked>
  inline void add_value(const Pair& pair, int64_t r, int64_t c, RowSums row, Vec<T> (&column)[kSums]) const {
    const auto [a, b, i, j, x] = pair;
    const Vec<T> value = load<T>(call_.tile(x, i, j, r) + c);
    Vec<T> for_row, for_column;  // differences of targets and students
    if constexpr (Own) {
      const Vec<T> all = differences(i, [&](int64_t k) { return load<T>(call_.tile(x, k, k, r) + c); });
      const T* reference = references_ + i * blocks_.padded_batch();
      for_row = all - reference[a * blocks_.size() + r];
      for_column = all - load<T>(reference + b * blocks_.size() + c);
    } else {
      for_row = for_column = value - load<T>(call_.tile(x, j, i, r) + c);
    }
    Vec<T> hard, soft;
    if constexpr (kExponents == Exponents::kShifted) {
      const int64_t at = call_.at(j, i, b) + c;
      const Vec<T> column_soft = exp((value - load<T>(largest_[1] + at)) * call_.soften);
      column[kHard] += exp((value - load<T>(largest_[0] + at)) * call_.scale);
      column[kSoft] += column_soft;
      column[kDifference] += column_soft * for_column;
      const int64_t own = call_.at(i, j, a) + r;
      hard = exp((value - largest_[0][own]) * call_.scale);
      soft = exp((value - largest_[1][own]) * call_.soften);
    } else {
      const Exponentials<kExponents, T> e(call_, value);
      hard = e.hard;
      soft = e.soft;
      column[kHard] += hard;
      column[kSoft] += soft;
      column[kDifference] += soft * for_column;
    }
    if constexpr (Masked) {
      const IndexVec<T> valid = call_.valid(b, c);
      hard = masked<T>(hard, valid & call_.others(a, b, r, c));
      soft = masked<T>(soft, valid);
    }
    *row.hard += hard;
    *row.soft += soft;
    *row.difference += soft * for_row;
  }

  void write_normalisers() const {
    for (int64_t i = 0; i < s_.peers; ++i) {
      for (int64_t j = 0; j < s_.peers; ++j) {
        for (int q = 0; q < 2; ++q) {
          T *largest = call_.largest(q, i, j), *total = call_.total(q, i, j);
          const double* sums = sums_[q == 0 ? kHard : kSoft] + call_.at(i, j, 0);
          for (int64_t r = 0; r < s_.batch; ++r) {
            largest[r] = largest_[q] ? largest_[q][call_.at(i, j, 0) + r] : T(0);
            total[r] = static_cast<T>(sums[r]);
          }
        }
      }
    }
  }

  // The sum of log(sum) + largest / T over the counted rows of (i, j). Eight sums share a logarithm.
  double log_sums(int64_t i, int64_t j) const {
    const double* sums = sums_[kHard] + call_.at(i, j, 0);
    double logarithms = 0, product = 1, largest = 0;
    int factors = 0;
    for (int64_t r = 0; r < s_.batch; ++r) {
      if (!call_.counts(r)) continue;
      product *= sums[r];
      largest += static_cast<double>(call_.largest(0, i, j)[r]);
      if (++factors % 8 > 0) continue;
      logarithms += std::log(product);
      product = 1;
    }
    return logarithms + std::log(product) + largest / call_.args.temperature;
  }

  double differences(int64_t i, int64_t j) const {
    const double *difference = sums_[kDifference] + call_.at(i, j, 0), *soft = sums_[kSoft] + call_.at(i, j, 0);
    double sum = 0;
    for (int64_t r = s_.start; r < s_.stop; ++r) sum += difference[r] / soft[r];
    return sum;
  }

  void write_terms() const {
    const auto means = Positives<T>(call_).means();
    double sums[peer_contrast::kTerms] = {-means.within / call_.args.temperature,
                                          -means.between / call_.args.temperature};
    for (int64_t i = 0; i < s_.peers; ++i) {
      for (int64_t j = 0; j < s_.peers; ++j) {
        sums[i == j ? peer_contrast::kVcl : peer_contrast::kIcl] += log_sums(i, j);
        sums[i == j ? peer_contrast::kSoftVcl : peer_contrast::kSoftIcl] += differences(i, j);
      }
    }
    T* terms = static_cast<T*>(call_.args.terms);
    for (int q = 0; q < peer_contrast::kTerms; ++q) terms[q] = static_cast<T>(sums[q] * factor(q));
  }

  // A value that is not finite is in every row's similarities with its peer, whichever the row.
  void write_not_finite() const {
    bool counted = false;
    for (int64_t r = s_.start; r < s_.stop; ++r) counted |= call_.counts(r);
    T* terms = static_cast<T*>(call_.args.terms);
    for (int q = 0; q < peer_contrast::kTerms; ++q) {
      const bool has_rows = is_soft(q) ? s_.start < s_.stop : counted,
                 has_pairs = q == peer_contrast::kVcl || s_.peers > 1;
      terms[q] = has_rows && has_pairs ? static_cast<T>(NAN) : T(0);
    }
  }

  static bool is_soft(int term) { return term == peer_contrast::kSoftVcl || term == peer_contrast::kSoftIcl; }

  // Differences are of similarities.
  double factor(int term) const {
    const int64_t rows = is_soft(term) ? s_.batch : call_.counted;
    if (rows == 0) return 0;
    return (is_soft(term) ? call_.args.soft_temperature / call_.args.temperature : 1) / static_cast<double>(rows);
  }

  const Call<T>& call_;
  const peer_contrast::Sizes& s_;
  const Blocks<T>& blocks_;
  // For every pair of peers and row of the padded batch:
  double* sums_[kSums] = {};
  T* largest_[2] = {};       // similarity without the row itself, or with it; none where exponents are not shifted
  T* references_ = nullptr;  // by peer alone
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
