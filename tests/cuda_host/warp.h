// Functions of a warp.
#pragma once

#include <cstring>

#include "execution.h"

namespace cuda_host {

template <typename T>
T shuffle(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(WarpMeeting::kShuffle, mask, bits, from);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_host

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  ::cuda_host::meet_warp(::cuda_host::WarpMeeting::kSync, mask, 0, 0);
}

// `width`, a power of two, splits the warp into parts that shuffle each for itself. A lane that would read beyond its
// part keeps its own value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const unsigned own = ::cuda_host::current_lane();
  return ::cuda_host::shuffle(mask, value, own / width * width + static_cast<unsigned>(lane) % width);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const unsigned own = ::cuda_host::current_lane();
  return ::cuda_host::shuffle(mask, value, own % width >= lanes ? own - lanes : own);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const unsigned own = ::cuda_host::current_lane();
  return ::cuda_host::shuffle(mask, value, own % width + lanes < static_cast<unsigned>(width) ? own + lanes : own);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const unsigned own = ::cuda_host::current_lane();
  const unsigned other = own ^ static_cast<unsigned>(lanes);
  return ::cuda_host::shuffle(mask, value, other / width <= own / width ? other : own);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(::cuda_host::meet_warp(::cuda_host::WarpMeeting::kVote, mask, predicate != 0, 0));
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(::cuda_host::meet_warp(::cuda_host::WarpMeeting::kSum, mask, value, 0));
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(value)));
}
