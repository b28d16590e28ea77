// Products with gathered rows: scores of a block of rows with the embeddings of up to kMaxPeers peers, and the weighted
// sums of rows that are their gradients. Included by kernels that are compiled once per instruction set.
#pragma once

#include "cpu/vector.h"

namespace {

// More accumulators than registers would hold are of no use: peers beyond these take another pass over the row.
constexpr int kMaxPeers = 3;
// Enough chains of additions for the latency of one.
constexpr int kScoreAccumulators = 12;
// All of a row of 128 features stays in flight where there are 32 registers of 64 bytes.
constexpr int kGradientAccumulators = kVectorBytes == 64 ? 24 : 12;
constexpr int64_t kPrefetchRows = 16;

template <typename S, typename T>
inline Vec<T> load_row(const S* p) {
  if constexpr (std::is_same_v<S, T>) {
    return load_once<T>(p);  // else each peer's product loads the row again
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    typedef uint16_t Bits __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
    Bits bits;
    std::memcpy(&bits, p, sizeof(bits));
    return (Vec<T>)(__builtin_convertvector(bits, Wide) << 16);
  } else {
    T lanes[kLanes<T>];
    convert(p, lanes, kLanes<T>);
    return load<T>(lanes);
  }
}

template <typename S, typename T>
inline Vec<T> load_row_end(const S* p, int64_t n) {
  T lanes[kLanes<T>] = {};
  convert(p, lanes, n);
  return load<T>(lanes);
}

template <typename S>
inline void prefetch_row(const S* row, int64_t features) {
  const char* bytes = reinterpret_cast<const char*>(row);
  const int64_t size = features * static_cast<int64_t>(sizeof(S));
  for (int64_t at = 0; at < size; at += 64) __builtin_prefetch(bytes + at);
}

constexpr int power_below(int n) { return n < 2 ? 1 : 2 * power_below(n / 2); }

// Rows whose products with Peers embeddings are accumulated in registers at once.
template <typename T, int Peers>
constexpr int kRowsAtOnce =
    power_below(kScoreAccumulators / Peers) < kLanes<T> ? power_below(kScoreAccumulators / Peers) : kLanes<T>;

// partial[p][r]: lanes whose sum is the product of row r with embedding p.
template <int Peers, typename S, typename T, int Rows = kRowsAtOnce<T, Peers>>
inline void multiply_rows(const S* const* row, const T* const* embedding, int64_t features,
                          Vec<T> (*partial)[kLanes<T>]) {
  Vec<T> sum[Peers][Rows] = {};
  const auto step = [&](int64_t column, auto load_from) {
    Vec<T> factor[Peers];
#pragma GCC unroll 4
    for (int p = 0; p < Peers; ++p) factor[p] = load<T>(embedding[p] + column);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> x = load_from(row[r] + column);
#pragma GCC unroll 4
      for (int p = 0; p < Peers; ++p) sum[p][r] += x * factor[p];
    }
  };
  const int64_t whole = features / kLanes<T> * kLanes<T>;
  for (int64_t column = 0; column < whole; column += kLanes<T>) step(column, load_row<S, T>);
  if (whole < features) step(whole, [&](const S* p) { return load_row_end<S, T>(p, features - whole); });
#pragma GCC unroll 4
  for (int p = 0; p < Peers; ++p) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) partial[p][r] = sum[p][r];
  }
}

// scores[p] = the products of embedding p with the first `count` of kLanes rows; those of the others are arbitrary.
template <int Peers, typename S, typename T>
inline void score_rows(const S* const* row, int64_t count, const T* const* embedding, int64_t features,
                       Vec<T> (&scores)[Peers]) {
  constexpr int kRows = kRowsAtOnce<T, Peers>;
  Vec<T> partial[Peers][kLanes<T>] = {};
#pragma GCC unroll 16
  for (int first = 0; first < kLanes<T>; first += kRows) {
    if (first < count) {
      Vec<T> block[Peers][kLanes<T>];
      multiply_rows<Peers>(row + first, embedding, features, block);
      for (int p = 0; p < Peers; ++p) {
        for (int r = 0; r < kRows; ++r) partial[p][first + r] = block[p][r];
      }
    }
  }
  for (int p = 0; p < Peers; ++p) scores[p] = sum_lanes_of_each<T>(partial[p]);
}

// gradient[p] += sum over rows of weight[p][row] * row, for Vectors vectors of columns. The sum is done before it is
// added: rounding then grows with the number of blocks instead of rows. Behind the rows are the addresses of as many
// more as are prefetched ahead.
template <int Peers, int Vectors, typename S, typename T>
inline void add_columns(const S* const* row, int64_t count, int64_t column, const T* const* weight,
                        T* const* gradient) {
  Vec<T> sum[Peers][Vectors] = {};
  for (int64_t r = 0; r < count; ++r) {
    const S* from = row[r] + column;
    prefetch_row(row[r + kPrefetchRows] + column, Vectors * kLanes<T>);
    Vec<T> factor[Peers];
#pragma GCC unroll 4
    for (int p = 0; p < Peers; ++p) factor[p] = splat<T>(weight[p][r]);
#pragma GCC unroll 32
    for (int c = 0; c < Vectors; ++c) {
      const Vec<T> x = load_row<S, T>(from + c * kLanes<T>);
#pragma GCC unroll 4
      for (int p = 0; p < Peers; ++p) sum[p][c] += factor[p] * x;
    }
  }
  for (int p = 0; p < Peers; ++p) {
    for (int c = 0; c < Vectors; ++c) {
      T* to = gradient[p] + column + c * kLanes<T>;
      store<T>(to, load<T>(to) + sum[p][c]);
    }
  }
}

template <int Peers, typename S, typename T>
inline void add_last_columns(const S* const* row, int64_t count, int64_t column, int64_t n, const T* const* weight,
                             T* const* gradient) {
  Vec<T> sum[Peers] = {};
  for (int64_t r = 0; r < count; ++r) {
    const Vec<T> x = load_row_end<S, T>(row[r] + column, n);
    for (int p = 0; p < Peers; ++p) sum[p] += weight[p][r] * x;
  }
  for (int p = 0; p < Peers; ++p) store<T>(gradient[p] + column, load<T>(gradient[p] + column) + sum[p]);
}

// Gradients are readable and writable up to round_up(features) elements.
template <int Peers, typename S, typename T>
inline void add_weighted_rows(const S* const* row, int64_t count, int64_t features, const T* const* weight,
                              T* const* gradient) {
  constexpr int kWide = power_below(kGradientAccumulators / Peers);
  int64_t column = 0;
  for (; column + kWide * kLanes<T> <= features; column += kWide * kLanes<T>) {
    add_columns<Peers, kWide>(row, count, column, weight, gradient);
  }
  for (; column + kLanes<T> <= features; column += kLanes<T>) {
    add_columns<Peers, 1>(row, count, column, weight, gradient);
  }
  if (column < features) add_last_columns<Peers>(row, count, column, features - column, weight, gradient);
}

}  // namespace
