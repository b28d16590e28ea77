// Noise-contrastive estimation on scores that are known, and what their normaliser needs.
#pragma once

#include "cpu/memory_contrast.h"
#include "cpu/vector.h"

namespace {

// As many doubles as Vec<T> has lanes.
template <typename T>
struct WideOf {
  typedef double type __attribute__((vector_size(kLanes<T> * sizeof(double))));
  typedef int64_t bits __attribute__((vector_size(kLanes<T> * sizeof(int64_t))));
};
template <typename T>
using Wide = typename WideOf<T>::type;

template <typename T>
inline Wide<T> widen(const Vec<T>& v) {
  return __builtin_convertvector(v, Wide<T>);
}

template <typename T>
inline double sum_wide(const Wide<T>& v) {
  double sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

// Sum of log(1 + y) over many y >= 0 without a logarithm for each: the factors 1 + y are multiplied, and the product's
// exponent is set aside after a few of them. In float64, so float32's y lose nothing.
template <typename T>
class LogSum {
 public:
  void add(const Vec<T>& y) {
    product_ *= widen<T>(y) + 1.0;
    // Infinity and NaN would not survive the removal of exponents.
    doubt_ += y * T(0);
    if (++factors_ == kFactors) set_exponent_aside();
  }

  double total() {
    set_exponent_aside();
    double sum = 0, doubt = 0;
    for (int i = 0; i < kLanes<T>; ++i) {
      sum += std::log(product_[i]) + static_cast<double>(exponent_[i]) * 0.693147180559945309417;
      doubt += doubt_[i];
    }
    return sum + doubt;
  }

 private:
  static constexpr int kFactors = 4;

  void set_exponent_aside() {
    using Bits = typename WideOf<T>::bits;
    Bits bits = (Bits)product_;
    exponent_ += (bits >> 52) - 1023;
    bits = (bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000;
    product_ = (Wide<T>)bits;
    factors_ = 0;
  }

  Wide<T> product_ = Wide<T>{} + 1.0;
  typename WideOf<T>::bits exponent_{};
  Vec<T> doubt_{};
  int factors_ = 0;
};

// Turns the exponentials of one image and pair into weights; returns the part of the loss that is theirs.
//
// With s = exponential / Z and c = K Pn, the positive's term is -log(s / (s + c + eps)) = log(1 + (c + eps) / s), a
// negative's is -log(c / (s + c + eps)) = log(1 + (s + eps) / c). As ds/dx = s for x = score / T, their derivatives by
// x are -(c + eps) / (s + c + eps) and s / (s + c + eps).
template <typename T>
inline double to_weights(T* weights, int64_t entries, double normaliser, double noise) {
  const double epsilon = pyext::memory_contrast::kEpsilon, shifted = noise + epsilon;
  const double positive = static_cast<double>(weights[0]) / normaliser;
  const T scale = static_cast<T>(1 / normaliser), per_noise = static_cast<T>(1 / noise);
  const T c = static_cast<T>(shifted), eps = static_cast<T>(epsilon);
  LogSum<T> logarithms;
  int64_t k = 1;
  for (; k + kLanes<T> <= entries; k += kLanes<T>) {
    const Vec<T> s = load<T>(weights + k) * scale;
    logarithms.add((s + eps) * per_noise);
    store<T>(weights + k, s / (s + c));
  }
  double loss = 0;
  for (; k < entries; ++k) {
    const T s = weights[k] * scale;
    loss += std::log1p(static_cast<double>((s + eps) * per_noise));
    weights[k] = s / (s + c);
  }
  weights[0] = static_cast<T>(-shifted / (positive + shifted));
  return loss + logarithms.total() + std::log1p(shifted / positive);
}

}  // namespace
