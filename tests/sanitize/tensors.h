// Memory of a kernel's arguments: of exactly their size, NaN until something is written.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
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

// A map of `channels`, each `height` x `width`, without gaps.
inline cpu::Map map_of(void* data, int64_t channels, int64_t height, int64_t width, bool channels_last) {
  const int64_t positions = height * width;
  if (channels_last) return {data, {channels * positions, 1, channels * width, channels}};
  return {data, {channels * positions, positions, width, 1}};
}

// Runs call(size, zero of a dtype, the dtype, variant, threads) for each of `sizes`, each dtype, variants from 0 to
// `variants` - 1 and one or several threads, and prints how many `calls` those are. What a call gives is null or the
// name of a result with an element that nobody wrote, which ends the program.
template <typename Size, size_t kSizes, typename Call>
void run_all(const char* calls, const Size (&sizes)[kSizes], int variants, Call call) {
  int count = 0;
  const auto run = [&](auto zero, cpu::DType dtype, const char* name) {
    for (const Size& size : sizes) {
      for (int variant = 0; variant < variants; ++variant) {
        for (const int64_t threads : {1, 3}) {
          if (const char* unwritten = call(size, zero, dtype, variant, threads)) {
            std::printf("%s: %s has an element that nobody wrote\n", name, unwritten);
            std::exit(1);
          }
          ++count;
        }
      }
    }
  };
  run(float{}, cpu::DType::kFloat, "float");
  run(double{}, cpu::DType::kDouble, "double");
  run(BFloat16{}, cpu::DType::kBFloat16, "bfloat16");
  run(Half{}, cpu::DType::kHalf, "half");
  std::printf("%d %s\n", count, calls);
}

}  // namespace pyext::sanitize
