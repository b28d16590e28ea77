// bfloat16 as the kernels use it: storage, and conversion with round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}

inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, sizeof(wide));
  if (x != x) return {0x7fff};
  wide += 0x7fff + ((wide >> 16) & 1);
  return {static_cast<uint16_t>(wide >> 16)};
}
