// float16 as the kernels use it: storage, and conversion with round to nearest even.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31;
  const int fraction = x.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  }
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

// Rounds to a whole number of units in the last place of the result (std::nearbyint: to nearest even); a fraction
// that rounds up to the next power of two carries into the exponent by itself.
inline __half __float2half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude != magnitude) return {0x7fff};
  if (magnitude >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int unit = magnitude < 0x1p-14f ? -24 : exponent - 11;
  const int fraction = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));
  if (unit == -24) return {static_cast<uint16_t>(sign | fraction)};
  return {static_cast<uint16_t>(sign | ((unit + 24) * 1024 + fraction))};
}
