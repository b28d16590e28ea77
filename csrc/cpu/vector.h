// SIMD for kernels that are compiled once per instruction set (csrc/cpu/*_kernel.cpp): the compiler's own vector
// types, so that one source serves AVX-512, AVX2, SSE and NEON. Everything here has internal linkage: the same
// function compiled for two instruction sets must never be merged by the linker.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Of a function whose sums are to stay in registers: inlined into a larger one, some of them are kept in memory.
#define PYEXT_OWN_REGISTERS [[gnu::noinline]]

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VectorOf {
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  typedef T type __attribute__((vector_size(kVectorBytes)));
  using integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef integer index __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
using IndexVec = typename VectorOf<T>::index;
template <typename T>
constexpr int kLanes = VectorOf<T>::kLanes;

template <typename T>
constexpr int64_t round_up(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

// One element of a mask that keeps (all bits) or clears (none) a lane of Vec<T>.
template <typename T>
using LaneMask = typename VectorOf<T>::integer;

template <typename T>
inline Vec<T> keep(Vec<T> v, const LaneMask<T>* mask) {
  IndexVec<T> bits;
  std::memcpy(&bits, mask, sizeof(bits));
  return (Vec<T>)((IndexVec<T>)v & bits);
}

// The first n lanes of v, 0 <= n <= kLanes; the others zero.
template <typename T>
inline Vec<T> first_lanes(Vec<T> v, int64_t n) {
  alignas(kVectorBytes) LaneMask<T> mask[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) mask[i] = i < n ? -1 : 0;
  return keep<T>(v, mask);
}

// min(n, kLanes) elements, n > 0, the other lanes zero; nothing is read past them.
template <typename T>
inline Vec<T> load_first(const T* p, int64_t n) {
  if (n >= kLanes<T>) return load<T>(p);
#if defined(__AVX512F__)
  const auto mask = static_cast<unsigned>((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  if constexpr (std::is_same_v<T, double>) return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
#else
  Vec<T> v{};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
#endif
}

template <typename T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // unlike x + 0 this is x for -0 too, which the compiler knows
}

// `v` in a register: the compiler does not read or make it again in each instruction that uses it.
template <typename T>
inline Vec<T> in_register(Vec<T> v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#endif
  return v;
}

// A load that is not folded into each instruction that uses it: one access of memory, where it may be unaligned.
template <typename T>
inline Vec<T> load_once(const T* p) {
  return in_register<T>(load<T>(p));
}

// max(0, x) with NaN kept, as torch's relu: x86's maximum returns its second operand when either is NaN. The compiler
// does not find that instruction by itself when one operand is a constant.
template <typename T>
inline Vec<T> relu(Vec<T> x) {
  const Vec<T> zero{};
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return (Vec<T>)_mm512_max_ps((__m512)zero, (__m512)x);
  if constexpr (std::is_same_v<T, double>) return (Vec<T>)_mm512_max_pd((__m512d)zero, (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) return (Vec<T>)_mm256_max_ps((__m256)zero, (__m256)x);
  if constexpr (std::is_same_v<T, double>) return (Vec<T>)_mm256_max_pd((__m256d)zero, (__m256d)x);
#elif defined(__SSE2__)
  if constexpr (std::is_same_v<T, float>) return (Vec<T>)_mm_max_ps((__m128)zero, (__m128)x);
  if constexpr (std::is_same_v<T, double>) return (Vec<T>)_mm_max_pd((__m128d)zero, (__m128d)x);
#else
  return zero > x ? zero : x;
#endif
}

template <typename T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <typename T, int... I>
inline Vec<T> even_lanes(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(a, b, IndexVec<T>{(2 * I)...});
}

template <typename T, int... I>
inline Vec<T> odd_lanes(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(a, b, IndexVec<T>{(2 * I + 1)...});
}

// Lanes of a and b in turn, from lane First of both on.
template <typename T, int First, int... I>
inline Vec<T> alternate(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(a, b, IndexVec<T>{(First + I / 2 + (I & 1) * kLanes<T>)...});
}

// Lane i of the result is the sum of the lanes of v[i]; v is overwritten.
template <typename T, int Count = kLanes<T>>
inline Vec<T> sum_lanes_of_each(Vec<T> (&v)[kLanes<T>]) {
  if constexpr (Count > 1) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>();
#pragma GCC unroll 8
    for (int i = 0; i < Count / 2; ++i) {
      v[i] = even_lanes<T>(v[2 * i], v[2 * i + 1], lanes) + odd_lanes<T>(v[2 * i], v[2 * i + 1], lanes);
    }
    return sum_lanes_of_each<T, Count / 2>(v);
  }
  return v[0];
}

template <typename T, int First, int... I>
inline Vec<T> window(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(a, b, IndexVec<T>{(First + I)...});
}

// Every lane of `v` moves up by Distance lanes; the last ones of `before` come in.
template <typename T, int Distance>
inline Vec<T> shifted_up(Vec<T> before, Vec<T> v) {
  return window<T, kLanes<T> - Distance>(before, v, std::make_integer_sequence<int, kLanes<T>>());
}

// Every lane of `v` moves down by Distance lanes; the first ones of `after` come in.
template <typename T, int Distance>
inline Vec<T> shifted_down(Vec<T> v, Vec<T> after) {
  return window<T, Distance>(v, after, std::make_integer_sequence<int, kLanes<T>>());
}

template <typename T, int Distance, int... I>
inline Vec<T> rotate_lanes(Vec<T> v, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(v, IndexVec<T>{((I + Distance) % kLanes<T>)...});
}

// combine over all lanes, in log2(kLanes) rounds.
template <typename T, int Distance = kLanes<T> / 2, typename Combine>
inline T reduce_lanes(Vec<T> v, Combine combine) {
  if constexpr (Distance == 0) {
    return v[0];
  } else {
    const Vec<T> other = rotate_lanes<T, Distance>(v, std::make_integer_sequence<int, kLanes<T>>());
    return reduce_lanes<T, Distance / 2>(combine(v, other), combine);
  }
}

template <typename T>
inline T sum_lanes(Vec<T> v) {
  return reduce_lanes<T>(v, [](Vec<T> a, Vec<T> b) { return a + b; });
}

template <typename T>
inline T max_lanes(Vec<T> v) {
  return reduce_lanes<T>(v, [](Vec<T> a, Vec<T> b) { return maximum<T>(a, b); });
}

// exp(x) = 2^n * polynomial(r): range reduction by ln 2 in two parts and degree 6, relative error below 2 ulp.
struct Exponential {
  Vec<float> polynomial;
  IndexVec<float> n;  // with more bits above the lower nine
};

inline Exponential reduced_exponential(Vec<float> x) {
  const Vec<float> magic = splat<float>(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec<float> shifted = x * 1.44269504f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = splat<float>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return {p, (IndexVec<float>)shifted};
}

// exp of float lanes. Arguments below -87.3 give 0 within 1e-38, above 88.7 infinity; NaN stays NaN.
inline Vec<float> exp(Vec<float> x) {
  const Vec<float> low = splat<float>(-87.33654f), high = splat<float>(88.72283f);
  const Vec<float> clamped = x < low ? low : (x > high ? high : x);
  const Exponential e = reduced_exponential(clamped);
  // n reaches 128 just below the overflow threshold, so the power is applied in two factors.
  const IndexVec<float> k = e.n - 0x4B400000;
  const IndexVec<float> half = k >> 1;
  const Vec<float> scale_a = (Vec<float>)((half + 127) << 23), scale_b = (Vec<float>)((k - half + 127) << 23);
  const Vec<float> result = e.polynomial * scale_a * scale_b;
  const Vec<float> zero{}, infinity = splat<float>(INFINITY);
  return x < low ? zero : (x > high ? infinity : (x == x ? result : x));
}

// exp of float lanes that are known to lie within -87 and 87.
inline Vec<float> exp_within_range(Vec<float> x) {
  const Exponential e = reduced_exponential(x);
  return (Vec<float>)((IndexVec<float>)e.polynomial + (e.n << 23));
}

inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

inline Vec<double> exp_within_range(Vec<double> x) { return exp(x); }

template <typename T>
inline Vec<T> sigmoid(Vec<T> x) {
  return splat<T>(1) / (splat<T>(1) + exp(-x));
}

inline Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

// tanh of float lanes: an odd polynomial near zero, where 1 - 2/(exp(2x)+1) would cancel.
inline Vec<float> tanh(Vec<float> x) {
  const Vec<float> zero{};
  const Vec<float> magnitude = x < zero ? -x : x;
  const Vec<float> z = x * x;
  Vec<float> p = splat<float>(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec<float> small = p * z * x + x;
  const Vec<float> far = 1.0f - 2.0f / (exp(magnitude + magnitude) + 1.0f);
  const Vec<float> large = x < zero ? -far : far;
  return magnitude < splat<float>(0.625f) ? small : large;
}

// --- storage types ------------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float to_accumulate(float x) { return x; }
inline double to_accumulate(double x) { return x; }
inline float to_accumulate(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float to_accumulate(Half x) {
  _Float16 value;
  std::memcpy(&value, &x, sizeof(value));
  return static_cast<float>(value);
}

inline void from_accumulate(float x, float& y) { y = x; }
inline void from_accumulate(double x, double& y) { y = x; }
inline void from_accumulate(float x, BFloat16& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  // Round to nearest even; a NaN keeps its top bits and is made quiet, since the addition could carry it to infinity.
  y.bits = x == x ? static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
                  : static_cast<uint16_t>((bits >> 16) | 0x40);
}
inline void from_accumulate(float x, Half& y) {
  const _Float16 value = static_cast<_Float16>(x);
  std::memcpy(&y, &value, sizeof(y));
}

template <typename S>
using Accumulate = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Contiguous conversions; the compiler vectorises all but the half-precision ones, which have instructions of their
// own.
template <typename S, typename T>
inline void convert(const S* from, T* to, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, Half>) {
    for (; i + 16 <= n; i += 16) {
      _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
    }
  } else if constexpr (std::is_same_v<T, Half>) {
    for (; i + 16 <= n; i += 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), 0));
    }
  }
#elif defined(__F16C__)
  if constexpr (std::is_same_v<S, Half>) {
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
  } else if constexpr (std::is_same_v<T, Half>) {
    for (; i + 8 <= n; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
    }
  }
#endif
  for (; i < n; ++i) {
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
      to[i] = to_accumulate(from[i]);
    } else {
      from_accumulate(from[i], to[i]);
    }
  }
}

// --- transposition --------------------------------------------------------------------------------------------------

template <typename T, int Distance, int... I>
inline void exchange_blocks(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, I...>) {
  const Vec<T> low = a, high = b;
  a = __builtin_shuffle(low, high, IndexVec<T>{((I & Distance) ? (I - Distance + kLanes<T>) : I)...});
  b = __builtin_shuffle(low, high, IndexVec<T>{((I & Distance) ? (I + kLanes<T>) : (I + Distance))...});
}

// Transposes a square of kLanes x kLanes elements held in registers: log2(kLanes) rounds of block exchanges.
template <typename T, int Distance = kLanes<T> / 2>
inline void transpose_square(Vec<T> (&v)[kLanes<T>]) {
  if constexpr (Distance > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if (!(i & Distance)) {
        exchange_blocks<T, Distance>(v[i], v[i + Distance], std::make_integer_sequence<int, kLanes<T>>());
      }
    }
    transpose_square<T, Distance / 2>(v);
  }
}

}  // namespace
