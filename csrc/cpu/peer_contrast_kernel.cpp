// peer_contrast on the CPU. Compiled once per instruction set (PYEXT_CAPABILITY is its namespace).
//
// With x = S/T, y = x/T_soft, a row's terms are
//   contrast  log sum_{c != r} exp x[c] - mean of x over positives
//   softened  sum_c p(c) (y(c) - y'(c)) for each student y' of the target p; the differences of the two log-sum-exps
//             cancel in the sum over ordered pairs of peers.
// For a target (i, i) the students' sum is M y_ii - sum_k y_kk, for (i, j) it is y_ij - y_ji: symmetric in row and
// column, like the similarities, so that one visit of S_ij[r, c] serves row r of (i, j) and row c of (j, i).
#include "cpu/peer_contrast.h"

#include <cmath>

#include "cpu/peer_contrast/blocks.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

template <typename T>
inline Vec<T> masked(Vec<T> v, IndexVec<T> mask) {
  return (Vec<T>)((IndexVec<T>)v & mask);
}

// Exponents up to this in size need no shift: their exponentials, and sums of 2^31 of them, are finite and normal.
template <typename T>
constexpr double kUnshifted = sizeof(T) == 4 ? 40 : 300;

template <typename T>
class Contrast {
 public:
  Contrast(const PeerContrast& args, const Host& host)
      : args_(args),
        s_(args.sizes),
        blocks_(args, host),
        scale_(static_cast<T>(1 / args.temperature)),
        soften_(static_cast<T>(1 / (args.temperature * args.soft_temperature))),
        classes_(blocks_.template zeros<LaneMask<T>>(blocks_.padded_batch())) {
    for (int64_t r = 0; r < blocks_.padded_batch(); ++r) {
      classes_[r] = r < s_.batch ? static_cast<LaneMask<T>>(args.classes[r]) : -1;
    }
    for (int64_t r = 0; r < s_.batch; ++r) counted_ += args.positives[r] > 0;
  }

  void forward() {
    for (T*& sums : sums_) sums = blocks_.template zeros<T>(s_.pairs() * blocks_.padded_batch());
    if (small_exponents()) {
      blocks_.visit([&](int64_t a, int64_t b, const T* x) { add_block<false>(a, b, x); });
    } else {
      for (T*& largest : largest_) {
        largest = blocks_.template zeros<T>(s_.pairs() * blocks_.padded_batch());
        for (int64_t k = 0; k < s_.pairs() * blocks_.padded_batch(); ++k) largest[k] = -INFINITY;
      }
      blocks_.visit([&](int64_t a, int64_t b, const T* x) { find_largest(a, b, x); });
      blocks_.visit([&](int64_t a, int64_t b, const T* x) { add_block<true>(a, b, x); });
    }
    write_terms();
  }

  void backward() {
    gradient_ = blocks_.template zeros<T>(blocks_.count() * blocks_.width() * blocks_.pitch());
    prepare_weights();
    if (small_exponents()) {
      blocks_.visit([&](int64_t a, int64_t b, T* x) { add_gradient<false>(a, b, x); });
    } else {
      blocks_.visit([&](int64_t a, int64_t b, T* x) { add_gradient<true>(a, b, x); });
    }
    write_gradient();
  }

 private:
  enum Sum { kHard, kSoft, kDifference, kPositive, kSums };

  // By |v . w| <= |v| |w|; false for NaN.
  bool small_exponents() const {
    double largest = 0;
    const T* v = static_cast<const T*>(args_.embeddings);
    for (int64_t row = 0; row < s_.peers * s_.batch; ++row, v += s_.features) {
      T square = 0;
      for (int64_t k = 0; k < s_.features; ++k) square += v[k] * v[k];
      if (!(square <= largest)) largest = static_cast<double>(square);
      if (std::isnan(square)) return false;
    }
    const double least = args_.soft_temperature < 1 ? args_.temperature * args_.soft_temperature : args_.temperature;
    return largest / least <= kUnshifted<T>;
  }

  // Where peers i and j keep what belongs to row 0 of a block.
  int64_t at(int64_t i, int64_t j, int64_t block) const {
    return (i * s_.peers + j) * blocks_.padded_batch() + block * blocks_.size();
  }

  const T* tile(const T* x, int64_t i, int64_t j, int64_t r) const {
    return x + (i * blocks_.size() + r) * blocks_.width() + j * blocks_.size();
  }
  T* tile(T* x, int64_t i, int64_t j, int64_t r) const {
    return x + (i * blocks_.size() + r) * blocks_.width() + j * blocks_.size();
  }

  // Columns from c on of block b that are not row r of block a itself.
  IndexVec<T> others(int64_t a, int64_t b, int64_t r, int64_t c) const {
    IndexVec<T> column;
    for (int lane = 0; lane < kLanes<T>; ++lane) column[lane] = static_cast<LaneMask<T>>(lane);
    const LaneMask<T> self = static_cast<LaneMask<T>>(a == b ? r - c : -1);
    return column != self;
  }

  IndexVec<T> classes(int64_t block, int64_t c) const {
    IndexVec<T> lanes;
    std::memcpy(&lanes, classes_ + block * blocks_.size() + c, sizeof(lanes));
    return lanes;
  }

  // Students of the target y_ij at row r and columns c.
  Vec<T> difference(const T* x, int64_t i, int64_t j, int64_t r, int64_t c) const {
    const Vec<T> own = load<T>(tile(x, i, j, r) + c);
    if (i != j) return own - load<T>(tile(x, j, i, r) + c);
    Vec<T> sum{};
    for (int64_t k = 0; k < s_.peers; ++k) sum += own - load<T>(tile(x, k, k, r) + c);
    return sum;
  }

  template <typename Work>
  void for_rows(int64_t a, Work work) const {
    for (int64_t i = 0; i < s_.peers; ++i) {
      for (int64_t j = 0; j < s_.peers; ++j) {
        for (int64_t r = 0; r < blocks_.valid(a); ++r) work(i, j, r);
      }
    }
  }

  void find_largest(int64_t a, int64_t b, const T* x) {
    for_rows(a, [&](int64_t i, int64_t j, int64_t r) {
      const Vec<T> none = splat<T>(-INFINITY);
      Vec<T> row[2] = {none, none};
      for (int64_t c = 0; c < blocks_.size(); c += kLanes<T>) {
        const Vec<T> value = load<T>(tile(x, i, j, r) + c);
        const IndexVec<T> valid = classes(b, c) >= 0, other = valid & others(a, b, r, c);
        const Vec<T> found[2] = {other ? value : none, valid ? value : none};
        for (int q = 0; q < 2; ++q) {
          row[q] = maximum<T>(row[q], found[q]);
          T* column = largest_[q] + at(j, i, b) + c;
          if (a != b) store<T>(column, maximum<T>(load<T>(column), found[q]));
        }
      }
      for (int q = 0; q < 2; ++q) {
        T& largest = largest_[q][at(i, j, a) + r];
        const T found = max_lanes<T>(row[q]);
        largest = found > largest ? found : largest;
      }
    });
  }

  // Shifted before it is scaled: the difference of two near similarities has no rounding error.
  template <bool Shifted, typename V>
  static V shifted(V similarity, V largest) {
    if constexpr (Shifted) return similarity - largest;
    return similarity;
  }

  template <bool Shifted>
  void add_block(int64_t a, int64_t b, const T* x) {
    for_rows(a, [&](int64_t i, int64_t j, int64_t r) { add_row<Shifted>(a, b, x, i, j, r); });
  }

  template <bool Shifted>
  void add_row(int64_t a, int64_t b, const T* x, int64_t i, int64_t j, int64_t r) {
    Vec<T> row[kSums] = {};
    const int64_t own = at(i, j, a) + r;
    Vec<T> largest[2] = {};
    if constexpr (Shifted) {
      for (int q = 0; q < 2; ++q) largest[q] = splat<T>(largest_[q][own]);
    }
    const LaneMask<T> same = classes_[a * blocks_.size() + r];
    for (int64_t c = 0; c < blocks_.size(); c += kLanes<T>) {
      const Vec<T> value = load<T>(tile(x, i, j, r) + c);
      const Vec<T> students = difference(x, i, j, r, c) * soften_;
      const IndexVec<T> valid = classes(b, c) >= 0, other = valid & others(a, b, r, c);
      const Vec<T> positive = masked<T>(value, other & (classes(b, c) == same));
      const auto add = [&](Vec<T>(&sum)[kSums], Vec<T> hard, Vec<T> soft) {
        sum[kHard] += masked<T>(hard, other);
        sum[kSoft] += masked<T>(soft, valid);
        sum[kDifference] += masked<T>(soft * students, valid);
        sum[kPositive] += positive;
      };
      Vec<T> hard = exp(shifted<Shifted>(value, largest[0]) * scale_);
      Vec<T> soft = exp(shifted<Shifted>(value, largest[1]) * soften_);
      add(row, hard, soft);
      if (a == b) continue;
      const int64_t column = at(j, i, b) + c;
      if constexpr (Shifted) {
        hard = exp((value - load<T>(largest_[0] + column)) * scale_);
        soft = exp((value - load<T>(largest_[1] + column)) * soften_);
      }
      Vec<T> sum[kSums];
      for (int q = 0; q < kSums; ++q) sum[q] = load<T>(sums_[q] + column);
      add(sum, hard, soft);
      for (int q = 0; q < kSums; ++q) store<T>(sums_[q] + column, sum[q]);
    }
    for (int q = 0; q < kSums; ++q) sums_[q][own] += sum_lanes<T>(row[q]);
  }

  // Of the rows of (i, j): the largest similarity (0 where exponents are small), and the sum of exponentials above it.
  T* largest(int q, int64_t i, int64_t j) const {
    return static_cast<T*>(args_.normalisers) + ((2 * q * s_.peers + i) * s_.peers + j) * s_.batch;
  }
  T* total(int q, int64_t i, int64_t j) const { return largest(q, i, j) + s_.pairs() * s_.batch; }

  void write_terms() {
    double sums[peer_contrast::kTerms] = {};
    for (int64_t i = 0; i < s_.peers; ++i) {
      for (int64_t j = 0; j < s_.peers; ++j) {
        for (int64_t r = 0; r < s_.batch; ++r) {
          const int64_t k = at(i, j, 0) + r;
          for (int q = 0; q < 2; ++q) {
            largest(q, i, j)[r] = largest_[q] ? largest_[q][k] : T(0);
            total(q, i, j)[r] = sums_[q][k];
          }
          if (!s_.active(r)) continue;
          sums[i == j ? peer_contrast::kSoftVcl : peer_contrast::kSoftIcl] +=
              static_cast<double>(sums_[kDifference][k]) / static_cast<double>(sums_[kSoft][k]);
          if (args_.positives[r] == 0) continue;
          const double log_sum =
              std::log(static_cast<double>(sums_[kHard][k])) + largest(0, i, j)[r] / args_.temperature;
          sums[i == j ? peer_contrast::kVcl : peer_contrast::kIcl] +=
              log_sum - sums_[kPositive][k] / (args_.temperature * static_cast<double>(args_.positives[r]));
        }
      }
    }
    const double square = args_.soft_temperature * args_.soft_temperature;
    T* terms = static_cast<T*>(args_.terms);
    for (int q = 0; q < peer_contrast::kTerms; ++q) {
      const bool soft = q == peer_contrast::kSoftVcl || q == peer_contrast::kSoftIcl;
      const double rows = static_cast<double>(soft ? s_.batch : counted_);
      terms[q] = rows > 0 ? static_cast<T>(sums[q] * (soft ? square : 1) / rows) : T(0);
    }
  }

  // Factors of the exponentials in the gradient by S.
  void prepare_weights() {
    const int64_t padded = blocks_.padded_batch();
    for (int q = 0; q < 2; ++q) {
      weights_[q] = blocks_.template zeros<T>(s_.pairs() * padded);
      shifts_[q] = blocks_.template zeros<T>(s_.pairs() * padded);
      positive_[q] = blocks_.template zeros<T>(padded);
    }
    const T* grad = static_cast<const T*>(args_.grad_terms);
    const double hard_factor = 1 / (args_.temperature * static_cast<double>(counted_ > 0 ? counted_ : 1));
    const double soft_factor = args_.soft_temperature / (args_.temperature * static_cast<double>(s_.batch));
    for (int64_t i = 0; i < s_.peers; ++i) {
      for (int64_t j = 0; j < s_.peers; ++j) {
        for (int64_t r = 0; r < s_.batch; ++r) {
          const bool active = s_.active(r), counted = active && args_.positives[r] > 0;
          const bool used[2] = {counted, active};
          const double factor[2] = {hard_factor * grad[i == j ? peer_contrast::kVcl : peer_contrast::kIcl],
                                    soft_factor * grad[i == j ? peer_contrast::kSoftVcl : peer_contrast::kSoftIcl]};
          if (counted) positive_[i != j][r] = static_cast<T>(factor[0] / static_cast<double>(args_.positives[r]));
          for (int q = 0; q < 2; ++q) {
            const int64_t k = at(i, j, 0) + r;
            // exp(x - infinity) = 0 where the weight is 0, instead of an exponential that may be infinite
            shifts_[q][k] = used[q] ? largest(q, i, j)[r] : static_cast<T>(INFINITY);
            weights_[q][k] = used[q] ? static_cast<T>(factor[q] / static_cast<double>(total(q, i, j)[r])) : T(0);
          }
        }
      }
    }
  }

  // Softmax of row r of (i, j) at columns c, plus that of rows c of (j, i) at column r, each by its weight; of x
  // (Q = 0) or softened (1).
  template <bool Shifted, int Q>
  Vec<T> probabilities(Vec<T> x, int64_t row, int64_t column) const {
    const auto exponential = [&](Vec<T> shifted) { return exp(shifted * (Q == 0 ? scale_ : soften_)); };
    const T weight = weights_[Q][row];
    const Vec<T> weights = load<T>(weights_[Q] + column);
    if constexpr (Shifted) {
      return exponential(x - shifts_[Q][row]) * weight + exponential(x - load<T>(shifts_[Q] + column)) * weights;
    }
    return exponential(x) * (weights + weight);
  }

  // Gradient by x_ij without the softened terms.
  template <bool Shifted>
  Vec<T> hard_gradient(int64_t a, int64_t b, Vec<T> x, int64_t i, int64_t j, int64_t r, int64_t c) const {
    const IndexVec<T> other = others(a, b, r, c);
    const LaneMask<T> same = classes_[a * blocks_.size() + r];
    const T* positive = positive_[i != j];
    const Vec<T> attraction = load<T>(positive + b * blocks_.size() + c) + positive[a * blocks_.size() + r];
    const Vec<T> repulsion = probabilities<Shifted, 0>(x, at(i, j, a) + r, at(j, i, b) + c);
    return masked<T>(repulsion, other) - masked<T>(attraction, other & (classes(b, c) == same));
  }

  // Similarities become the loss's gradients by them.
  template <bool Shifted>
  void to_gradients(int64_t a, int64_t b, T* x) const {
    for (int64_t r = 0; r < blocks_.size(); ++r) {
      for (int64_t c = 0; c < blocks_.size(); c += kLanes<T>) {
        Vec<T> sum{};
        for (int64_t i = 0; i < s_.peers; ++i) {
          T* own = tile(x, i, i, r) + c;
          const Vec<T> value = load<T>(own);
          const Vec<T> soft = probabilities<Shifted, 1>(value, at(i, i, a) + r, at(i, i, b) + c);
          sum += soft;
          store<T>(own, hard_gradient<Shifted>(a, b, value, i, i, r, c) + soft * static_cast<T>(s_.peers));
        }
        for (int64_t i = 0; i < s_.peers; ++i) store<T>(tile(x, i, i, r) + c, load<T>(tile(x, i, i, r) + c) - sum);
      }
      for (int64_t i = 0; i < s_.peers; ++i) {
        for (int64_t j = 0; j < i; ++j) pair_to_gradients<Shifted>(a, b, x, i, j, r);
      }
    }
  }

  template <bool Shifted>
  void pair_to_gradients(int64_t a, int64_t b, T* x, int64_t i, int64_t j, int64_t r) const {
    for (int64_t c = 0; c < blocks_.size(); c += kLanes<T>) {
      const Vec<T> one = load<T>(tile(x, i, j, r) + c), two = load<T>(tile(x, j, i, r) + c);
      const int64_t row[2] = {at(i, j, a) + r, at(j, i, a) + r}, column[2] = {at(j, i, b) + c, at(i, j, b) + c};
      const Vec<T> soft =
          probabilities<Shifted, 1>(one, row[0], column[0]) - probabilities<Shifted, 1>(two, row[1], column[1]);
      store<T>(tile(x, i, j, r) + c, hard_gradient<Shifted>(a, b, one, i, j, r, c) + soft);
      store<T>(tile(x, j, i, r) + c, hard_gradient<Shifted>(a, b, two, j, i, r, c) - soft);
    }
  }

  template <bool Shifted>
  void add_gradient(int64_t a, int64_t b, T* x) {
    const int64_t width = blocks_.width(), pitch = blocks_.pitch();
    to_gradients<Shifted>(a, b, x);
    product<T>({x, width, 1}, blocks_.rows(b), pitch, gradient_ + a * width * pitch, pitch, width, pitch, width, true);
    if (a == b) return;
    product<T>({x, 1, width}, blocks_.rows(a), pitch, gradient_ + b * width * pitch, pitch, width, pitch, width, true);
  }

  void write_gradient() const {
    T* out = static_cast<T*>(args_.grad_embeddings);
    for (int64_t peer = 0; peer < s_.peers; ++peer) {
      for (int64_t r = 0; r < s_.batch; ++r, out += s_.features) {
        const int64_t block = r / blocks_.size(), row = peer * blocks_.size() + r % blocks_.size();
        std::memcpy(out, gradient_ + (block * blocks_.width() + row) * blocks_.pitch(), s_.features * sizeof(T));
      }
    }
  }

  const PeerContrast& args_;
  const peer_contrast::Sizes& s_;
  const Blocks<T> blocks_;
  const T scale_, soften_;  // of similarities in the two exponents
  LaneMask<T>* classes_;    // of the padded batch
  int64_t counted_ = 0;     // rows with positives
  // For every pair of peers and row of the padded batch:
  T* sums_[kSums] = {};
  T* largest_[2] = {};  // similarity without the row itself, or with it; none where exponents are small
  T *weights_[2], *shifts_[2];
  T* positive_[2];  // weight of a positive, by row alone: within a peer, between peers
  T* gradient_ = nullptr;
};

void run_forward(const PeerContrast& args, const Host& host) {
  if (args.dtype == DType::kDouble) return Contrast<double>(args, host).forward();
  Contrast<float>(args, host).forward();
}

void run_backward(const PeerContrast& args, const Host& host) {
  if (args.dtype == DType::kDouble) return Contrast<double>(args, host).backward();
  Contrast<float>(args, host).backward();
}

}  // namespace

const PeerContrastKernels peer_contrast_kernels = {run_forward, run_backward};

}  // namespace pyext::cpu::PYEXT_CAPABILITY
