// What a lane of the convolutions' inputs and weights holds: one number, or a pair of bfloat16 numbers of two channels
// of the input. A lane is one position either way, so that planes, taps and tiles are the same for both.
#pragma once

#include "cpu/image.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

template <typename T>
struct Numbers {
  static constexpr int kDepth = 1;  // channels in a lane
  static constexpr int64_t lanes(int64_t channels) { return channels; }
  static Vec<T> splat_of(const T* weight) { return splat<T>(*weight); }
  static void add_product(Vec<T>& sum, Vec<T> a, Vec<T> b) { sum += a * b; }
  static Vec<T> joined(Vec<T> (&channels)[1]) { return channels[0]; }
};

// The even channel in the lower half of 32 bits, zero for a channel behind the last one. Planes, strips and weights
// hold the bits in memory of floats, which moves them and never computes with them.
struct Pairs {
  static constexpr int kDepth = 2;
  static constexpr int64_t lanes(int64_t channels) { return (channels + 1) / 2; }

  static Vec<float> splat_of(const float* weight) {
    uint32_t bits;
    std::memcpy(&bits, weight, sizeof(bits));
    return (Vec<float>)(bits | Bits{});
  }

  static void add_product(Vec<float>& sum, Vec<float> a, Vec<float> b) {
#if defined(__AVX512BF16__)
    sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += high(a) * high(b);
    sum += low(a) * low(b);
#endif
  }

  static Vec<float> joined(Vec<float> (&channels)[2]) { return pair_of(channels[0], channels[1]); }

 private:
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));

#if defined(__AVX512BF16__)
  static Vec<float> pair_of(Vec<float> even, Vec<float> odd) {
    typedef int16_t Words __attribute__((vector_size(kVectorBytes)));
    const Words order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512bh rounded = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);  // the second one's come first
    return (Vec<float>)_mm512_permutexvar_epi16((__m512i)order, (__m512i)rounded);
  }
#else
  static Vec<float> low(Vec<float> pair) { return (Vec<float>)((Bits)pair << 16); }
  static Vec<float> high(Vec<float> pair) { return (Vec<float>)((Bits)pair & 0xFFFF0000u); }

  static Vec<float> pair_of(Vec<float> even, Vec<float> odd) {
    return (Vec<float>)(rounded(even) >> 16 | (rounded(odd) & 0xFFFF0000u));
  }

  // To bfloat16 in the upper half, as from_accumulate rounds; what is left in the lower half means nothing.
  static Bits rounded(Vec<float> x) {
    const Bits bits = (Bits)x;
    return x == x ? bits + 0x7FFFu + (bits >> 16 & 1u) : bits | 0x400000u;
  }
#endif
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
