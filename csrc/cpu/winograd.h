// The 3x3 convolution by F(2x2, 3x3) (arXiv 1509.09308): of each tile of 4x4 positions, 2x2 results by 16 products a
// channel, instead of 36:
//   y = A^T [(G g G^T) * (B^T d B)] A,    and its gradient    dg = G^T [(A dy A^T) * (B^T d B)] G.
// The same element, a place, of many tiles' or kernels' transforms lies in vectors, so that transforms are sums of
// whole vectors.
#pragma once

#include "cpu/hybrid_block/planes.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int kTile = 4;                // rows and columns of a tile
constexpr int kStep = 2;                // from one tile to the next, and rows and columns of its results
constexpr int kPlaces = kTile * kTile;  // of a transform

// B^T d of four vectors, with B^T = (1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1), each to a place of its own.
template <typename T>
inline void store_transform(const Vec<T> (&d)[kTile], T* to, int64_t place) {
  store<T>(to, d[0] - d[2]);
  store<T>(to + place, d[1] + d[2]);
  store<T>(to + 2 * place, d[2] - d[1]);
  store<T>(to + 3 * place, d[1] - d[3]);
}

// B^T d B of tiles whose row i and column j are at(i, j).
template <typename T, typename At>
inline void transform_input(At at, T* to, int64_t place) {
  // Row i of B^T d is the sum of rows first and second of d, the latter perhaps negative.
  const auto sums = [&](int first, int second, bool minus, T* to) {
    Vec<T> t[kTile];
#pragma GCC unroll 4
    for (int j = 0; j < kTile; ++j) {
      const Vec<T> a = at(first, j), b = at(second, j);
      t[j] = minus ? a - b : a + b;
    }
    store_transform<T>(t, to, place);
  };
  sums(0, 2, true, to);
  sums(1, 2, false, to + kTile * place);
  sums(2, 1, true, to + 2 * kTile * place);
  sums(1, 3, true, to + 3 * kTile * place);
}

// The same, for loads that cost more than registers: each element is read once, before anything is written.
template <typename T, typename At>
inline void transform_input_read_once(At at, T* to, int64_t place) {
  Vec<T> t[kTile][kTile];
#pragma GCC unroll 4
  for (int j = 0; j < kTile; ++j) {
    const Vec<T> a = at(0, j), b = at(1, j), c = at(2, j), d = at(3, j);
    t[0][j] = a - c;
    t[1][j] = b + c;
    t[2][j] = c - b;
    t[3][j] = b - d;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTile; ++i) store_transform<T>(t[i], to + i * kTile * place, place);
}

// A^T m A of vectors of results, with A^T = (1 1 1 0; 0 1 -1 -1).
template <typename T>
inline void transform_output(const T* m, int64_t place, Vec<T> (&to)[kStep][kStep]) {
  Vec<T> rows[kStep][kTile];
#pragma GCC unroll 4
  for (int j = 0; j < kTile; ++j) {
    const Vec<T> a = load<T>(m + j * place), b = load<T>(m + (kTile + j) * place),
                 c = load<T>(m + (2 * kTile + j) * place), d = load<T>(m + (3 * kTile + j) * place);
    rows[0][j] = a + b + c;
    rows[1][j] = b - c - d;
  }
#pragma GCC unroll 2
  for (int i = 0; i < kStep; ++i) {
    to[i][0] = rows[i][0] + rows[i][1] + rows[i][2];
    to[i][1] = rows[i][1] - rows[i][2] - rows[i][3];
  }
}

// A dy A^T of vectors of gradients of results.
template <typename T>
inline void transform_output_gradient(const Vec<T> (&dy)[kStep][kStep], T* to, int64_t place) {
  const auto row = [&](Vec<T> a, Vec<T> b, T* to) {
    store<T>(to, a);
    store<T>(to + place, a + b);
    store<T>(to + 2 * place, a - b);
    store<T>(to + 3 * place, -b);
  };
  row(dy[0][0], dy[0][1], to);
  row(dy[0][0] + dy[1][0], dy[0][1] + dy[1][1], to + kTile * place);
  row(dy[0][0] - dy[1][0], dy[0][1] - dy[1][1], to + 2 * kTile * place);
  row(-dy[1][0], -dy[1][1], to + 3 * kTile * place);
}

// G g G^T of a kernel g of 3x3, in numbers or vectors: with G = (1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1).
template <typename V>
inline void transform_kernel(const V (&g)[kTaps], V (&to)[kPlaces]) {
  V rows[kTile][3];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const V a = g[j], b = g[3 + j], c = g[6 + j];
    rows[0][j] = a;
    rows[1][j] = (a + c + b) / 2;
    rows[2][j] = (a + c - b) / 2;
    rows[3][j] = c;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTile; ++i) {
    const V a = rows[i][0], b = rows[i][1], c = rows[i][2];
    to[kTile * i] = a;
    to[kTile * i + 1] = (a + c + b) / 2;
    to[kTile * i + 2] = (a + c - b) / 2;
    to[kTile * i + 3] = c;
  }
}

// G^T u G of the gradient u of a transformed kernel.
template <typename V>
inline void transform_kernel_gradient(const V (&u)[kPlaces], V (&to)[kTaps]) {
  V rows[3][kTile];
#pragma GCC unroll 4
  for (int j = 0; j < kTile; ++j) {
    const V a = u[j], b = u[kTile + j], c = u[2 * kTile + j], d = u[3 * kTile + j];
    rows[0][j] = a + (b + c) / 2;
    rows[1][j] = (b - c) / 2;
    rows[2][j] = (b + c) / 2 + d;
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const V a = rows[i][0], b = rows[i][1], c = rows[i][2], d = rows[i][3];
    to[3 * i] = a + (b + c) / 2;
    to[3 * i + 1] = (b - c) / 2;
    to[3 * i + 2] = (b + c) / 2 + d;
  }
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
