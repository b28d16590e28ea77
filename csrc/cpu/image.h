// One image of a strided tensor as a matrix of accumulate-type rows (channels) of positions, and back.
// Included by kernels that are compiled once per instruction set: internal linkage throughout.
#pragma once

#include "cpu/kernel.h"
#include "cpu/vector.h"

namespace {

using pyext::cpu::Map;

// Row c holds the positions of channel c; readable up to round_up(positions) elements.
template <typename T>
struct Image {
  T* data;
  int64_t pitch;
  T* row(int64_t c) const { return data + c * pitch; }
};

struct Extent {
  int64_t channels, height, width;
  int64_t positions() const { return height * width; }
};

inline bool has_plane_rows(const Map& m, const Extent& e) {
  return (e.width == 1 || m.stride[3] == 1) && (e.height == 1 || m.stride[2] == e.width);
}

inline bool has_channel_rows(const Map& m, const Extent& e) {
  return m.stride[1] == 1 && (e.height == 1 || m.stride[2] == e.width * m.stride[3]);
}

// Whether the tensor's own memory can serve as an Image: right type, dense planes, no partial vector at their end.
template <typename S>
inline bool is_image(const Map& m, const Extent& e) {
  return std::is_same_v<S, Accumulate<S>> && has_plane_rows(m, e) && e.positions() % kLanes<Accumulate<S>> == 0;
}

template <typename S>
inline S* image_data(const Map& m, int64_t n) {
  return static_cast<S*>(m.data) + n * m.stride[0];
}

template <typename S, typename T>
inline Vec<T> load_converted(const S* p) {
  if constexpr (std::is_same_v<S, T>) {
    return load<T>(p);
  } else {
    T lanes[kLanes<T>];
    convert(p, lanes, kLanes<T>);
    return load<T>(lanes);
  }
}

// The first n lanes, converted; nothing is written past them.
template <typename S, typename V>
inline void store_partial(S* p, V v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
    return;
  }
#elif defined(__AVX2__)
  // By halves: a masked store takes longer here.
  if constexpr (std::is_same_v<S, float>) {
    if (n >= 8) return store<S>(p, v);
    __m128 rest = _mm256_castps256_ps128((__m256)v);
    if (n & 4) {
      _mm_storeu_ps(p, rest);
      rest = _mm256_extractf128_ps((__m256)v, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
      rest = _mm_movehl_ps(rest, rest);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, rest);
    return;
  }
#endif
  Accumulate<S> lanes[kLanes<Accumulate<S>>];
  std::memcpy(lanes, &v, sizeof(v));
  convert(lanes, p, n);
}

// rows x columns of a matrix, transposed block by block; `to` has rows of `to_pitch` >= round_up(rows) elements.
// Source elements beyond the matrix are read only below `end`.
template <typename S, typename T>
inline void transpose_matrix(const S* from, int64_t from_pitch, const S* end, int64_t rows, int64_t columns, T* to,
                             int64_t to_pitch) {
  constexpr int kL = kLanes<T>;
  for (int64_t r = 0; r < rows; r += kL) {
    for (int64_t c = 0; c < columns; c += kL) {
      const S* corner = from + r * from_pitch + c;
      const int64_t height = rows - r < kL ? rows - r : kL, width = columns - c < kL ? columns - c : kL;
      Vec<T> v[kL];
      if (height == kL && corner + (kL - 1) * from_pitch + kL <= end) {
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i) v[i] = load_converted<S, T>(corner + i * from_pitch);
      } else {
        for (int i = 0; i < kL; ++i) {
          T lanes[kL] = {};
          if (i < height) convert(corner + i * from_pitch, lanes, width);
          v[i] = load<T>(lanes);
        }
      }
      transpose_square<T>(v);
#pragma GCC unroll 16
      for (int j = 0; j < kL; ++j) {
        if (j < width) store<T>(to + (c + j) * to_pitch + r, v[j]);
      }
    }
  }
}

// Image n of m. The tensor's own memory where that is possible, else `scratch` of channels x round_up(positions).
template <typename S, typename T>
inline Image<const T> load_image(const Map& m, int64_t n, int64_t batch, const Extent& e, T* scratch) {
  const S* from = image_data<S>(m, n);
  if constexpr (std::is_same_v<S, T>) {
    if (is_image<S>(m, e)) return {from, m.stride[1]};
  }
  const int64_t positions = e.positions(), pitch = round_up<T>(positions);
  if (has_plane_rows(m, e)) {
    for (int64_t c = 0; c < e.channels; ++c) convert(from + c * m.stride[1], scratch + c * pitch, positions);
  } else if (has_channel_rows(m, e)) {
    const S* end = image_data<S>(m, batch - 1) + (positions - 1) * m.stride[3] + e.channels;
    transpose_matrix(from, m.stride[3], end, positions, e.channels, scratch, pitch);
  } else {
    for (int64_t c = 0; c < e.channels; ++c) {
      for (int64_t p = 0; p < positions; ++p) {
        const int64_t y = p / e.width, x = p % e.width;
        scratch[c * pitch + p] = to_accumulate(from[c * m.stride[1] + y * m.stride[2] + x * m.stride[3]]);
      }
    }
  }
  for (int64_t c = 0; c < e.channels; ++c) {
    for (int64_t p = positions; p < pitch; ++p) scratch[c * pitch + p] = 0;
  }
  return {scratch, pitch};
}

// Writes an image (rows readable up to round_up(positions)) into image n of m.
template <typename S, typename T>
inline void store_image(const Image<const T>& image, const Map& m, int64_t n, const Extent& e) {
  S* to = image_data<S>(m, n);
  const int64_t positions = e.positions();
  if (has_plane_rows(m, e)) {
    for (int64_t c = 0; c < e.channels; ++c) convert(image.row(c), to + c * m.stride[1], positions);
    return;
  }
  if (!has_channel_rows(m, e)) {
    for (int64_t c = 0; c < e.channels; ++c) {
      for (int64_t p = 0; p < positions; ++p) {
        const int64_t y = p / e.width, x = p % e.width;
        from_accumulate(image.row(c)[p], to[c * m.stride[1] + y * m.stride[2] + x * m.stride[3]]);
      }
    }
    return;
  }
  constexpr int kL = kLanes<T>;
  for (int64_t p = 0; p < positions; p += kL) {
    const int64_t height = positions - p < kL ? positions - p : kL;
    for (int64_t c = 0; c < e.channels; c += kL) {
      const int64_t width = e.channels - c < kL ? e.channels - c : kL;
      Vec<T> v[kL];
#pragma GCC unroll 16
      for (int i = 0; i < kL; ++i) v[i] = i < width ? load<T>(image.row(c + i) + p) : Vec<T>{};
      transpose_square<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < kL; ++i) {
        if (i < height) store_partial(to + (p + i) * m.stride[3] + c, v[i], width);
      }
    }
  }
}

}  // namespace
