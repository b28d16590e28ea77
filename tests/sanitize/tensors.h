// Memory of a kernel's arguments: of exactly their size, NaN until something is written.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/vector.h"
#include "host.h"

namespace pyext::sanitize {

class Tensors {
 public:
  template <typename E>
  E* blank(int64_t n) {
    memory_.push_back(allocate(n * sizeof(E)));
    return static_cast<E*>(memory_.back().get());
  }

  // Uniform in [least, limit).
  template <typename S>
  S* drawn(int64_t n, double least, double limit) {
    std::uniform_real_distribution<double> numbers(least, limit);
    S* to = blank<S>(n);
    for (int64_t i = 0; i < n; ++i) from_accumulate(static_cast<Accumulate<S>>(numbers(random_)), to[i]);
    return to;
  }

  // Integers in [0, limit).
  int64_t* drawn_below(int64_t n, int64_t limit) {
    std::uniform_int_distribution<int64_t> numbers(0, limit - 1);
    int64_t* to = blank<int64_t>(n);
    for (int64_t i = 0; i < n; ++i) to[i] = numbers(random_);
    return to;
  }

  template <typename E>
  static bool written(const E* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      if (std::isnan(to_accumulate(x[i]))) return false;
    }
    return true;
  }

 private:
  std::mt19937 random_{0};
  std::vector<Memory> memory_;
};

// Prints how many calls run(S{}, dtype, its name) has made with each dtype together.
template <typename F>
void run_each_dtype(const char* calls, F run) {
  const int count = run(float{}, cpu::DType::kFloat, "float") + run(double{}, cpu::DType::kDouble, "double") +
                    run(BFloat16{}, cpu::DType::kBFloat16, "bfloat16") + run(Half{}, cpu::DType::kHalf, "half");
  std::printf("%d %s\n", count, calls);
}

}  // namespace pyext::sanitize
