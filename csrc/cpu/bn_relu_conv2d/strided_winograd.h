// The 3x3 convolution of stride two in tiles of 2x2 results, by 25 products a channel instead of 36. In each dimension
// the even elements of the padded input are convolved with two taps, by F(2, 2) (arXiv 1509.09308), and the odd ones
// with one. Of what a tile reads, d0 to d4, and w0, w1, w2:
//   y0 = [(d0 - d2) w0 + d1 w1] + d2 (w0 + w2),    y1 = d2 (w0 + w2) + [(d4 - d2) w2 + d3 w1].
// So there are five terms, four kernels, and three sums of terms, here in this order:
//   d0 - d2, d1 | d2 | d4 - d2, d3.
// The gradient of the elements d1 to d4, of dy0 to dy2, the third being the next tile's first, has five terms too:
//   dd1 = dy0 w1,    dd2 = (dy0 - dy1) w2 + dy1 (w0 + w2),    dd3 = dy1 w1,    dd4 = dy1 (w0 + w2) + (dy2 - dy1) w0.
// That of the kernels is, term by term, the term times the gradient of its sum: dy0, dy0 + dy1 or dy1.
//
// A tile's element at one place lies in a vector with those of other tiles. No element reaches a result that it does
// not reach in the plain convolution; but an infinite one makes differences that say no more than that, so that results
// which are not all finite are left to the direct form.
#pragma once

#include "cpu/bn_relu_conv2d/rows_winograd.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

constexpr int kTerms = 5, kSums = 3, kKernels = 4;  // in one dimension
constexpr int kAllTerms = kTerms * kTerms, kAllSums = kSums * kSums, kAllKernels = kKernels * kKernels;
constexpr int kResultRows = 2, kInputRows = 4;  // of a tile
constexpr int kSumOf[kTerms] = {0, 0, 1, 2, 2};
constexpr int kKernelOf[kTerms] = {0, 3, 1, 2, 3};  // w0, w0 + w2, w2, w1
constexpr int kFirstTerm[kSums] = {0, 2, 3}, kTermsOf[kSums] = {2, 1, 2};

// Terms of both dimensions, those of one sum together.
constexpr int term_place(int row, int column) {
  const int i = kSumOf[row], j = kSumOf[column];
  return kTerms * kFirstTerm[i] + kTermsOf[i] * kFirstTerm[j] + (row - kFirstTerm[i]) * kTermsOf[j] + column -
         kFirstTerm[j];
}
constexpr int first_place(int sum) { return term_place(kFirstTerm[sum / kSums], kFirstTerm[sum % kSums]); }
constexpr int places_of(int sum) { return kTermsOf[sum / kSums] * kTermsOf[sum % kSums]; }

// By place: the transformed kernel.
struct PlaceKernels {
  int kernel[kAllTerms];

  constexpr PlaceKernels() : kernel() {
    for (int row = 0; row < kTerms; ++row) {
      for (int column = 0; column < kTerms; ++column) {
        kernel[term_place(row, column)] = kKernels * kKernelOf[row] + kKernelOf[column];
      }
    }
  }
};
constexpr PlaceKernels kPlaceKernels;

// Of the gradient of the input: the four maps dy0 - dy1, dy1, dy2 - dy1, dy0, and each term's map and kernel.
constexpr int kMaps = 4, kAllMaps = kMaps * kMaps;
constexpr int kMapOf[kTerms] = {3, 1, 0, 1, 2}, kBackKernelOf[kTerms] = {3, 3, 2, 1, 0};

// The terms of a vector of tiles whose elements in row i and column j are at(i, j): put(row, column, term).
template <typename T, typename At, typename Put>
inline void make_terms(At at, Put put) {
#pragma GCC unroll 5
  for (int row = 0; row < kTerms; ++row) {
    constexpr int kElement[kTerms] = {0, 1, 2, 4, 3};
    const bool minus = row == 0 || row == 3;
    Vec<T> d[kTerms];
#pragma GCC unroll 5
    for (int j = 0; j < kTerms; ++j) d[j] = minus ? at(kElement[row], j) - at(2, j) : at(kElement[row], j);
    put(row, 0, d[0] - d[2]);
    put(row, 1, d[1]);
    put(row, 2, d[2]);
    put(row, 3, d[4] - d[2]);
    put(row, 4, d[3]);
  }
}

// The maps of a vector of tiles whose gradients in row i and column j are at(i, j): put(row, column, map).
template <typename T, typename At, typename Put>
inline void make_maps(At at, Put put) {
#pragma GCC unroll 4
  for (int row = 0; row < kMaps; ++row) {
    Vec<T> d[3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      d[j] = row == 1 ? at(1, j) : row == 3 ? at(0, j) : at(row, j) - at(1, j);
    }
    put(row, 0, d[0] - d[1]);
    put(row, 1, d[1]);
    put(row, 2, d[2] - d[1]);
    put(row, 3, d[0]);
  }
}

// The results of a vector of tiles from sum(row, column): put(row, column, result).
template <typename T, typename Sum, typename Put>
inline void make_results(Sum sum, Put put) {
#pragma GCC unroll 2
  for (int i = 0; i < kResultRows; ++i) {
    Vec<T> d[kSums];
#pragma GCC unroll 3
    for (int j = 0; j < kSums; ++j) d[j] = sum(i, j) + sum(i + 1, j);
    put(i, 0, d[0] + d[1]);
    put(i, 1, d[1] + d[2]);
  }
}

// The gradients of the elements d1 to d4, in both dimensions, from term(row, column): put(row, column, gradient).
template <typename T, typename Term, typename Put>
inline void make_back(Term term, Put put) {
#pragma GCC unroll 4
  for (int i = 0; i < kInputRows; ++i) {
    Vec<T> d[kTerms];
#pragma GCC unroll 5
    for (int j = 0; j < kTerms; ++j) {
      d[j] = i == 0 ? term(0, j) : i == 2 ? term(1, j) : i == 1 ? term(2, j) + term(3, j) : term(3, j) + term(4, j);
    }
    put(i, 0, d[0]);
    put(i, 1, d[2] + d[3]);
    put(i, 2, d[1]);
    put(i, 3, d[3] + d[4]);
  }
}

// The transformed kernels of a kernel of 3x3, in numbers or vectors.
template <typename V>
inline void make_kernels(const V (&w)[kTaps], V (&to)[kAllKernels]) {
#pragma GCC unroll 4
  for (int row = 0; row < kKernels; ++row) {
    V d[3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) d[j] = row == 0 ? w[j] : row == 1 ? w[j] + w[6 + j] : row == 2 ? w[6 + j] : w[3 + j];
    to[kKernels * row] = d[0];
    to[kKernels * row + 1] = d[0] + d[2];
    to[kKernels * row + 2] = d[2];
    to[kKernels * row + 3] = d[1];
  }
}

// The gradient of a kernel of 3x3 from those of the transformed kernels.
template <typename V>
inline void make_kernel_gradient(const V (&u)[kAllKernels], V (&to)[kTaps]) {
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    V d[kKernels];
#pragma GCC unroll 4
    for (int j = 0; j < kKernels; ++j) {
      d[j] = i == 0 ? u[j] + u[kKernels + j] : i == 1 ? u[3 * kKernels + j] : u[2 * kKernels + j] + u[kKernels + j];
    }
    to[3 * i] = d[0] + d[1];
    to[3 * i + 1] = d[3];
    to[3 * i + 2] = d[2] + d[1];
  }
}

constexpr int64_t kStripTiles = 64;  // at least, where an image or the next ones have so many

// Rows of tiles of all images, one after the other, in strips of whole rows. Tiles are numbered within a strip.
template <typename T>
struct StridedTiles {
  int64_t height, width, out_height, out_width;
  int64_t rows, columns;  // of an image's tiles
  int64_t strip_rows;
  int64_t pitch;  // of a strip's tiles, with room for a row of whole vectors behind them

  explicit StridedTiles(const ConvolutionSizes& s)
      : height(s.height),
        width(s.width),
        out_height(s.out_height()),
        out_width(s.out_width()),
        rows((out_height + 1) / 2),
        columns((out_width + 1) / 2),
        strip_rows(std::max<int64_t>(1, kStripTiles / columns)),
        pitch(round_up<T>((strip_rows + 1) * columns) + 2 * kLanes<T>) {}

  // Elements of a strip's panels, for each of their rows.
  int64_t most() const { return round_up<T>(strip_rows * columns); }
  // Of a row of the input, of whole vectors of tiles.
  int64_t row_size() const { return kInputRows * round_up<T>(columns); }

  // Strips of images: visit(rows).
  template <typename Visit>
  void visit_strips(Range images, Visit visit) const {
    for (int64_t first = images.begin * rows; first < images.end * rows; first += strip_rows) {
      visit(Range{first, std::min(first + strip_rows, images.end * rows)});
    }
  }

  // Rows of tiles: visit(image, row, first tile).
  template <typename Visit>
  void visit_rows(Range strip, Visit visit) const {
    int64_t tile = 0;
    for (int64_t row = strip.begin; row < strip.end; ++row, tile += columns) visit(row / rows, row % rows, tile);
  }
  int64_t tiles(Range strip) const { return (strip.end - strip.begin) * columns; }
};

// Zeros behind a strip's tiles, up to whole vectors.
template <typename T>
inline void clear_rest(int64_t count, T* plane) {
  for (int64_t i = count; i < round_up<T>(count); ++i) plane[i] = 0;
}

// Elements [p, p + kLanes) of a row of `count`, from make(p, elements left), with zeros behind it.
template <typename T, typename Make>
inline Vec<T> row_vector(int64_t p, int64_t count, Make make) {
  if (p >= count) return Vec<T>{};
  const Vec<T> v = make(p, count - p);
  return count - p < kLanes<T> ? first_lanes<T>(v, count - p) : v;
}

// Elements 4 t + j - 1 of a row of `count`, which is zero around them, to to[j * pitch + t], j from 0 to 4; whole
// vectors of t, and for the first j one element more.
template <typename T, typename Make>
inline void split_in_four(int64_t count, int64_t columns, Make make, T* to, int64_t pitch) {
  constexpr auto kOrder = std::make_integer_sequence<int, kLanes<T>>();
  to[0] = 0;
  for (int64_t t = 0; t < columns; t += kLanes<T>, to += kLanes<T>) {
    Vec<T> d[4], even[2], odd[2];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) d[v] = row_vector<T>(4 * t + v * kLanes<T>, count, make);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      even[half] = even_lanes<T>(d[2 * half], d[2 * half + 1], kOrder);
      odd[half] = odd_lanes<T>(d[2 * half], d[2 * half + 1], kOrder);
    }
    const Vec<T> last = odd_lanes<T>(odd[0], odd[1], kOrder);
    store<T>(to + 1, last);
    store<T>(to + pitch, even_lanes<T>(even[0], even[1], kOrder));
    store<T>(to + 2 * pitch, even_lanes<T>(odd[0], odd[1], kOrder));
    store<T>(to + 3 * pitch, odd_lanes<T>(even[0], even[1], kOrder));
    store<T>(to + 4 * pitch, last);
  }
}

// Elements 4 t + j of a row, j from 0 to 3, from from[j * pitch + t]; whole vectors of t.
template <typename T>
inline void join_four(const T* from, int64_t pitch, int64_t columns, T* to) {
  constexpr auto kOrder = std::make_integer_sequence<int, kLanes<T>>();
  constexpr int kHalf = kLanes<T> / 2;
  for (int64_t t = 0; t < columns; t += kLanes<T>, from += kLanes<T>, to += kInputRows * kLanes<T>) {
    const Vec<T> a = load<T>(from), b = load<T>(from + pitch), c = load<T>(from + 2 * pitch),
                 d = load<T>(from + 3 * pitch);
    const Vec<T> even[2] = {alternate<T, 0>(a, c, kOrder), alternate<T, kHalf>(a, c, kOrder)};
    const Vec<T> odd[2] = {alternate<T, 0>(b, d, kOrder), alternate<T, kHalf>(b, d, kOrder)};
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      store<T>(to + 2 * half * kLanes<T>, alternate<T, 0>(even[half], odd[half], kOrder));
      store<T>(to + (2 * half + 1) * kLanes<T>, alternate<T, kHalf>(even[half], odd[half], kOrder));
    }
  }
}

// What the tiles of a strip read of channel c of relu(BN(x)): element (i, j) of tile t to to[(i * kTerms + j) * pitch +
// t]. The last row that a tile reads is the first of the tile below.
template <typename T>
inline void gather_input(const Convolution<T>& call, const StridedTiles<T>& tiles, Range strip, int64_t c, T* to) {
  const Map& x = call.args.x;
  const int64_t row_size = kTerms * tiles.pitch;
  tiles.visit_rows(strip, [&](int64_t n, int64_t tile_row, int64_t tile) {
    const T* map = image_data<T>(x, n) + c * x.stride[1];
    const bool shared_above = tile_row > 0 && tile > 0;
    for (int i = shared_above ? 1 : 0; i < kTerms; ++i) {
      const int64_t y = tile_row * kInputRows + i - 1;
      T* planes = to + i * row_size + tile;
      if (y < 0 || y >= tiles.height) {
        for (int j = 0; j < kTerms; ++j) std::fill_n(planes + j * tiles.pitch, tiles.columns, T(0));
        continue;
      }
      const T* from = map + y * tiles.width;
      const auto make = [&](int64_t p, int64_t left) { return call.norm().relu_of(load_first<T>(from + p, left), c); };
      split_in_four<T>(tiles.width, tiles.columns, make, planes, tiles.pitch);
    }
    if (tile_row + 1 == tiles.rows) return;
    for (int j = 0; j < kTerms; ++j) {
      const T* from = to + kInputRows * row_size + j * tiles.pitch + tile;
      for (int64_t t = 0; t < tiles.columns; t += kLanes<T>) {
        store<T>(to + j * tiles.pitch + tile + tiles.columns + t, load<T>(from + t));
      }
    }
  });
  for (int k = 0; k < kAllTerms; ++k) clear_rest(tiles.tiles(strip), to + k * tiles.pitch);
}

// n rows in nearly equal tiles of kProductRows at most.
inline int64_t product_tiles(int64_t n) { return (n + kProductRows - 1) / kProductRows; }
inline Range product_rows(int64_t n, int64_t tile) { return part_of(n, product_tiles(n), tile); }

// Some of them: visit(constant rows, first row).
template <typename Visit>
inline void visit_tiles(int64_t n, Range tiles, Visit visit) {
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const Range own = product_rows(n, tile);
    with_constant<kProductRows>(own.end - own.begin, [&](auto count) { visit(count, own.begin); });
  }
}

// Rows of a strip's tiles, whole vectors of them, in panels of columns.
template <typename T>
struct StripPanels {
  T* data;
  int64_t rows, columns;

  int64_t width(int64_t column) const {
    return std::min(Panels<T>::kColumns, columns - column / Panels<T>::kColumns * Panels<T>::kColumns);
  }
  T* at(int64_t row, int64_t column) const {
    const int64_t within = column % Panels<T>::kColumns;
    return data + (column - within) * rows + row * width(column) + within;
  }
};

// out (a tile's rows x columns) = left (depth x rows of the tile) * the rows [first, first + depth) of the panels.
template <int Rows, typename T>
PYEXT_OWN_REGISTERS void multiply_packed(const T* left, const StripPanels<T>& right, int64_t first, int64_t depth,
                                         T* out, int64_t out_pitch) {
  for (int64_t column = 0; column < right.columns; column += Panels<T>::kColumns) {
    const int64_t width = right.width(column);
    with_constant<kPanelVectors>(width / kLanes<T>, [&](auto vectors) {
      product_tile<T, Rows, decltype(vectors)::value>({left, 1, Rows}, right.at(first, column), width, out + column,
                                                      out_pitch, depth, Result::kReplaced);
    });
  }
}

template <typename S>
constexpr bool has_strided_winograd = std::is_same_v<S, float>;

// Whether the maps of x and of the result (or its gradient) lie as these kernels read and write them, and whether they
// are faster than the direct form: by the multiply-adds of both, and those that a channel's transforms of a tile take
// the time of, measured on AVX2.
inline bool suits_strided_winograd(const BNReLUConv2d& args, const Map& result) {
  constexpr int64_t kTransform = 100;
  const ConvolutionSizes& s = args.sizes;
  if (s.kernel != 3 || s.stride != 2 || s.groups != 1 || s.batch == 0) return false;
  if (args.add || args.out_mean) return false;
  if (!has_plane_rows(args.x, {s.in_channels, s.height, s.width}) ||
      !has_plane_rows(result, {s.out_channels, s.out_height(), s.out_width()})) {
    return false;
  }
  const StridedTiles<float> tiles(s);
  const int64_t pairs = s.in_channels * s.out_channels, channels = s.in_channels + s.out_channels;
  return tiles.rows * tiles.columns * (kAllTerms * pairs + kTransform * channels) < kTaps * s.out_positions() * pairs;
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
