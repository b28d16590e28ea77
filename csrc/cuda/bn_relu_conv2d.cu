// bn_relu_conv2d: batch statistics, forward and backward. Both passes are products of matrices (product.h) whose
// operand z = relu(BN(x)) is made from x as it is read, through the positions of all images one after the other.
//
//   out[o, p]       = sum over c, tap   w[o, c, tap] z[c, p shifted by tap]
//   grad_z[c, q]    = sum over o, tap   w[o, c, tap] grad_out[o, q shifted back]
//   grad_w[o, c, tap] = sum over p      grad_out[o, p] z[c, p shifted by tap]
//
// Floor, for n elements of x and m of out, of b bytes, with d multiply-adds for an element of out (H200: 4.3 TB/s, 770
// TFLOP/s bfloat16): statistics b n bytes; forward b (n + m) bytes, 2 d m operations; backward 4 d m operations and
// b (2 n + m) bytes in evaluation, b (3 n + 2 m) in training, whose sums over x must be known before grad_x. Done
// instead: b (3 n + 2 m) and b (6 n + 2 m), for the two gradients are two kernels and the correction reads and writes
// grad_x again; statistics read x twice, the second time from cache; and a tile of 64 channels of out reads x once per
// tap, from cache. One step on 64x108x32x32 to 48 in bfloat16: 90 MB and 2 GFLOP, floor 21 us, all of it memory; done
// 132 MB, 31 us. Not measured: no GPU has run this.
//
// Sums over blocks are written and then added in a fixed order, in double precision: no atomics.
#include "cuda/bn_relu_conv2d.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/bn_relu_conv2d/places.h"
#include "cuda/bn_relu_conv2d/product.h"
#include "cuda/launch.h"

namespace pyext::bn_relu_conv2d {
namespace {

constexpr int64_t kLimit = int64_t{1} << 30;  // of extents that are int in kernels
constexpr int kStretch = 4096;                // least positions of x that a block of moments_kernel reads
constexpr int kStretches = 128;
constexpr int kSummed = 512;           // rows that a block of row_sum_kernel adds up
constexpr int kWeightPositions = 512;  // least positions of a block of weight_gradient_kernel
constexpr int kWeightBlocks = 1024;    // that it aims at
constexpr int kCorrected = 8;          // elements of a thread of correct_kernel

// A channel's mean, less its very first value, and sum of squared distances from it, over a stretch of positions:
// moments[stretch, channel], and again behind all of them.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(const Arguments<T> a, int stretch, int stretches, float* moments) {
  __shared__ float scratch[kWarp];
  const int channel = blockIdx.x % a.channels;
  const int64_t part = blockIdx.x / a.channels;
  const int64_t first = part * stretch;
  const int64_t all = a.images * a.positions();
  const int count = static_cast<int>(all - first < stretch ? all - first : stretch);
  const Places places(first, a.height, a.width);
  const T* const data = a.x.data + channel * a.x.channel;
  const float origin = to_float(*data);
  const auto distance = [&](int i) {
    const Place at = places.at(i);
    return to_float(data[at.image * a.x.image + a.x.offset(0, at.y, at.x)]) - origin;
  };
  float sum[1] = {0.f};
  for (int i = threadIdx.x; i < count; i += kThreads) sum[0] += distance(i);
  block_sum(sum, scratch);
  const float mean = sum[0] / static_cast<float>(count);
  float squares[1] = {0.f};
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const float away = distance(i) - mean;
    squares[0] += away * away;
  }
  block_sum(squares, scratch);
  if (threadIdx.x != 0) return;
  moments[part * a.channels + channel] = mean;
  moments[(stretches + part) * a.channels + channel] = squares[0];
}

// Mean and biased variance from the moments of all stretches.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_moments_kernel(const Arguments<T> a, int stretch, int stretches,
                                                                 const float* moments, float* mean, float* var) {
  const int channel = blockIdx.x * kThreads + threadIdx.x;
  if (channel >= a.channels) return;
  const int64_t all = a.images * a.positions();
  const auto count = [&](int64_t part) {
    return static_cast<double>(all - part * stretch < stretch ? all - part * stretch : stretch);
  };
  double total = 0;
  for (int64_t part = 0; part < stretches; ++part) total += count(part) * moments[part * a.channels + channel];
  const double middle = total / all;
  double squares = 0;
  for (int64_t part = 0; part < stretches; ++part) {
    const double away = moments[part * a.channels + channel] - middle;
    squares += moments[(stretches + part) * a.channels + channel] + away * away * count(part);
  }
  mean[channel] = static_cast<float>(to_float(a.x.data[channel * a.x.channel]) + middle);
  var[channel] = static_cast<float>(squares / all);
}

__global__ void __launch_bounds__(kThreads) norm_kernel(const float* weight, const float* bias, const float* mean,
                                                        const float* var, int channels, float eps, Norm* norm) {
  const int channel = blockIdx.x * kThreads + threadIdx.x;
  if (channel >= channels) return;
  const float rstd = 1.f / sqrtf(var[channel] + eps);
  norm[channel] = {mean[channel], weight[channel] * rstd, bias[channel], rstd};
}

// Which tile of which group a block of threads has: tiles of rows fastest, so that those that read the same columns run
// at the same time.
struct Tile {
  int first_row;
  int64_t column_tile;
  int group;

  __device__ Tile(int rows, int64_t column_tiles) {
    const int row_tiles = (rows + kTile - 1) / kTile;
    const int64_t rest = blockIdx.x / row_tiles;
    first_row = blockIdx.x % row_tiles * kTile;
    column_tile = rest % column_tiles;
    group = static_cast<int>(rest / column_tiles);
  }
};

// Rows are channels of out, columns positions.
template <typename T, int kSide>
__global__ void __launch_bounds__(kThreads, 2) convolve_kernel(const Arguments<T> a, int64_t column_tiles, T* out) {
  constexpr int kTaps = kSide * kSide;
  __shared__ Operands<T> operands;
  const Tile tile(a.outputs(), column_tiles);
  const Places places(tile.column_tile * kTile, a.out_height, a.out_width);
  const int inputs = a.inputs();
  const int depth = inputs * kTaps;
  const Place at = places.at(threadIdx.x % kTile);
  const bool exists = at.image < a.images;
  const int top = at.y * a.stride - kSide / 2;
  const int left = at.x * a.stride - kSide / 2;
  const T* const image = a.x.at(at.image);
  const int64_t first_output = int64_t{tile.group} * a.outputs();
  float sum[kQuad][kQuad];
  multiply<Order::kDepth, Order::kSide>(
      depth,
      [&](int row, int k, int) {
        const int o = tile.first_row + row;
        return o < a.outputs() ? to_float(a.weight[(first_output + o) * depth + k]) : 0.f;
      },
      [&](int, int k, int) {
        const int channel = tile.group * inputs + k / kTaps;
        const int y = top + k % kTaps / kSide;
        const int x = left + k % kTaps % kSide;
        if (!exists || !is_inside(y, x, a.height, a.width)) return 0.f;
        return a.norm[channel].activated(to_float(image[a.x.offset(channel, y, x)]));
      },
      operands, sum);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const Place to = places.at(thread_column() + j);
    if (to.image >= a.images) continue;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const int o = tile.first_row + thread_row() + i;
      if (o >= a.outputs()) continue;
      const int64_t map = to.image * a.out_channels + first_output + o;
      out[map * a.out_positions() + to.y * a.out_width + to.x] = from_float<T>(sum[i][j]);
    }
  }
}

// The rows and columns of x of one parity, where the stride is 2, and the taps that they meet: first_y, first_y +
// stride, ... below kSide.
struct Parity {
  int y, x;
  int height, width;  // of those rows and columns
  int first_y, first_x;
  int taps_y, taps_x;
};

// Rows are channels of x, columns positions of x. In training grad_x receives the gradient of the normalised map, which
// correct_kernel completes. sums[first_tile + tile, channel]: a tile's part of norm_bias's gradient, and behind those
// of all `tiles`, of norm_weight's.
template <typename T, int kSide>
__global__ void __launch_bounds__(kThreads, 2)
    map_gradient_kernel(const Arguments<T> a, const Parity parity, int64_t column_tiles, int64_t first_tile,
                        int64_t tiles, bool training, T* grad_x, float* sums) {
  constexpr int kTaps = kSide * kSide;
  __shared__ Operands<T> operands;
  const Tile tile(a.inputs(), column_tiles);
  const Places places(tile.column_tile * kTile, parity.height, parity.width);
  const int taps = parity.taps_y * parity.taps_x;
  const Place at = places.at(threadIdx.x % kTile);
  const bool exists = at.image < a.images;
  // In rows and columns of out, for the first tap: the numerators are multiples of the stride, and later taps are one
  // less each.
  const int below = (at.y * a.stride + parity.y + kSide / 2 - parity.first_y) / a.stride;
  const int right = (at.x * a.stride + parity.x + kSide / 2 - parity.first_x) / a.stride;
  const T* const image = a.grad_out.at(at.image);
  const int64_t first_channel = int64_t{tile.group} * a.inputs();
  const int first_output = tile.group * a.outputs();
  float sum[kQuad][kQuad];
  multiply<Order::kSide, Order::kSide>(
      a.outputs() * taps,
      [&](int row, int k, int) {
        const int c = tile.first_row + row;
        const int tap = k % taps;
        const int place =
            (parity.first_y + tap / parity.taps_x * a.stride) * kSide + parity.first_x + tap % parity.taps_x * a.stride;
        const int64_t index = (int64_t{first_output + k / taps} * a.inputs() + c) * kTaps + place;
        return c < a.inputs() ? to_float(a.weight[index]) : 0.f;
      },
      [&](int, int k, int) {
        const int tap = k % taps;
        const int y = below - tap / parity.taps_x;
        const int x = right - tap % parity.taps_x;
        if (!exists || !is_inside(y, x, a.out_height, a.out_width)) return 0.f;
        return to_float(image[a.grad_out.offset(first_output + k / taps, y, x)]);
      },
      operands, sum);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const int c = tile.first_row + thread_row() + i;
    const int64_t channel = first_channel + c;
    const Norm norm = c < a.inputs() ? a.norm[channel] : Norm{};
    float of_bias = 0.f;
    float of_weight = 0.f;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const Place to = places.at(thread_column() + j);
      if (to.image >= a.images || c >= a.inputs()) continue;
      const int y = to.y * a.stride + parity.y;
      const int x = to.x * a.stride + parity.x;
      const float value = to_float(a.x.at(to.image)[a.x.offset(static_cast<int>(channel), y, x)]);
      // As torch's ReLU: no gradient where its result is 0, and NaN is no such place.
      const float g = norm.output(value) <= 0.f ? 0.f : sum[i][j];
      of_bias += g;
      of_weight += g * norm.normalised(value);
      const int64_t map = to.image * a.channels + channel;
      grad_x[map * a.positions() + y * a.width + x] = from_float<T>(training ? g : g * norm.scale);
    }
#pragma unroll
    for (int lane = kAcross / 2; lane > 0; lane /= 2) {
      of_bias += __shfl_xor_sync(kFullMask, of_bias, lane);
      of_weight += __shfl_xor_sync(kFullMask, of_weight, lane);
    }
    if (threadIdx.x % kAcross != 0 || c >= a.inputs()) continue;
    sums[(first_tile + tile.column_tile) * a.channels + channel] = of_bias;
    sums[(tiles + first_tile + tile.column_tile) * a.channels + channel] = of_weight;
  }
}

// grad_x = w / sqrt(var + eps) (g - mean(g) - n mean(g n)), for g in grad_x and n the normalised x.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    correct_kernel(const Arguments<T> a, int parts, const float* of_bias, const float* of_weight, T* grad_x) {
  const int64_t image = blockIdx.x / parts;
  const int elements = a.channels * a.positions();
  const float all = static_cast<float>(a.images * a.positions());
  T* const out = grad_x + image * elements;
  const int first = static_cast<int>(blockIdx.x % parts) * (kThreads * kCorrected) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kCorrected; ++i) {
    const int element = first + i * kThreads;
    if (element >= elements) return;
    const int channel = element / a.positions();
    const int position = element - channel * a.positions();
    const int y = position / a.width;
    const Norm norm = a.norm[channel];
    const float x = to_float(a.x.at(image)[a.x.offset(channel, y, position - y * a.width)]);
    const float g = to_float(out[element]) - of_bias[channel] / all - norm.normalised(x) * (of_weight[channel] / all);
    out[element] = from_float<T>(g * norm.scale);
  }
}

// Rows are channels of out, columns channels of x and taps, terms are the positions of a stretch: parts[stretch].
template <typename T, int kSide>
__global__ void __launch_bounds__(kThreads, 2) weight_gradient_kernel(const Arguments<T> a, int stretch, float* parts) {
  constexpr int kTaps = kSide * kSide;
  __shared__ Operands<T> operands;
  const int columns = a.inputs() * kTaps;
  const int column_tiles = (columns + kTile - 1) / kTile;
  const Tile tile(a.outputs(), column_tiles);
  const int group = tile.group % a.groups;
  const int64_t part = tile.group / a.groups;
  const int first_column = static_cast<int>(tile.column_tile) * kTile;
  const int64_t all = a.images * a.out_positions();
  const int64_t first = part * stretch;
  const int terms = static_cast<int>(all - first < stretch ? all - first : stretch);
  const Places places(first, a.out_height, a.out_width);
  const int first_output = group * a.outputs();
  const auto gradient = [&](int o, int k) {
    const Place at = places.at(k);
    return to_float(a.grad_out.at(at.image)[a.grad_out.offset(first_output + o, at.y, at.x)]);
  };
  // Of x, that a column meets.
  const auto place_of = [&](int column, int k) {
    const Place at = places.at(k);
    return Place{at.image, at.y * a.stride - kSide / 2 + column % kTaps / kSide,
                 at.x * a.stride - kSide / 2 + column % kTaps % kSide};
  };
  const auto x_at = [&](int column, const Place& at) {
    const int channel = group * a.inputs() + column / kTaps;
    return to_float(a.x.at(at.image)[a.x.offset(channel, at.y, at.x)]);
  };
  const Share<Order::kDepth> share;
  Norm norms[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int column = first_column + share.side[i];
    norms[i] = column < columns ? a.norm[group * a.inputs() + column / kTaps] : Norm{};
  }
  float sum[kQuad][kQuad];
  bool finite = true;
  multiply<Order::kDepth, Order::kDepth>(
      terms,
      [&](int row, int k, int) {
        const int o = tile.first_row + row;
        if (o >= a.outputs()) return 0.f;
        const float g = gradient(o, k);
        finite = finite && fabsf(g) < INFINITY;
        return g;
      },
      [&](int side, int k, int round) {
        const int column = first_column + side;
        const Place at = place_of(column, k);
        if (column >= columns || !is_inside(at.y, at.x, a.height, a.width)) return 0.f;
        return norms[round].activated(x_at(column, at));
      },
      operands, sum);
  float* const to = parts + (part * a.out_channels + first_output) * columns;
  // Times the 0 of a place outside of the map, infinity and NaN are NaN: such a tile is added up again without them.
  if (kSide > 1 && __syncthreads_or(!finite)) {
#pragma unroll 1
    for (int element = threadIdx.x; element < kTile * kTile; element += kThreads) {
      const int o = tile.first_row + element / kTile;
      const int column = first_column + element % kTile;
      if (o >= a.outputs() || column >= columns) continue;
      const Norm norm = a.norm[group * a.inputs() + column / kTaps];
      float inside = 0.f;
#pragma unroll 1
      for (int k = 0; k < terms; ++k) {
        const Place at = place_of(column, k);
        if (is_inside(at.y, at.x, a.height, a.width)) inside += gradient(o, k) * norm.activated(x_at(column, at));
      }
      to[int64_t{o} * columns + column] = inside;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const int o = tile.first_row + thread_row() + i;
    if (o >= a.outputs()) continue;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const int column = first_column + thread_column() + j;
      if (column < columns) to[int64_t{o} * columns + column] = sum[i][j];
    }
  }
}

// sums[chunk, column]: of kSummed rows of `values`, in double precision. Every eighth row is one warp's.
template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads) row_sum_kernel(const In* values, int64_t rows, int64_t columns, Out* sums) {
  __shared__ double partial[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t column = int64_t{blockIdx.x} * kWarp + lane;
  const int64_t first = int64_t{blockIdx.y} * kSummed;
  const int64_t last = rows - first < kSummed ? rows : first + kSummed;
  double sum = 0;
  if (column < columns) {
    for (int64_t row = first + warp; row < last; row += kWarps)
      sum += static_cast<double>(values[row * columns + column]);
  }
  partial[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (int i = 1; i < kWarps; ++i) sum += partial[i][lane];
  sums[blockIdx.y * columns + column] = static_cast<Out>(sum);
}

void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("bn_relu_conv2d (cuda): ") + message);
}

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

dim3 grid(int64_t blocks) {
  require(blocks < 2 * kLimit, "too many images, positions or channels for one launch");
  return dim3(static_cast<unsigned>(blocks));
}

void check(const Sizes& s) {
  require(s.in_channels < kLimit && s.positions() < kLimit && s.in_channels * s.positions() < kLimit,
          "an image must have fewer than 2^30 elements");
  require(s.out_channels < kLimit && s.weight_numel() < 2 * kLimit, "there are too many channels");
}

// Consecutive parts of a workspace, 16-byte aligned; without one, their sizes are added up all the same.
class Workspace {
 public:
  explicit Workspace(void* data) : data_(static_cast<char*>(data)) {}

  template <typename T>
  T* take(int64_t numel) {
    char* const at = data_ == nullptr ? nullptr : data_ + bytes_;
    bytes_ += quotient_up(numel * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return reinterpret_cast<T*>(at);
  }

  size_t bytes() const { return bytes_; }

 private:
  char* data_;
  int64_t bytes_ = 0;
};

template <typename T>
View<const T> view(const ImageTensor& map) {
  return {static_cast<const T*>(map.data), map.strides[0], map.strides[1], map.strides[2], map.strides[3]};
}

template <typename T>
Arguments<T> arguments(const Sizes& s, const ImageTensor& x) {
  Arguments<T> a{};
  a.x = view<T>(x);
  a.images = s.batch;
  a.channels = static_cast<int>(s.in_channels);
  a.height = static_cast<int>(s.height);
  a.width = static_cast<int>(s.width);
  a.out_channels = static_cast<int>(s.out_channels);
  a.out_height = static_cast<int>(s.out_height());
  a.out_width = static_cast<int>(s.out_width());
  a.groups = static_cast<int>(s.groups);
  a.stride = static_cast<int>(s.stride);
  return a;
}

// Calls `run` with the element's type.
template <typename Run>
void with_type(Dtype dtype, const Run& run) {
  if (dtype == Dtype::kFloat) return run(Identity<float>{});
  if (dtype == Dtype::kBFloat16) return run(Identity<__nv_bfloat16>{});
  run(Identity<__half>{});
}

template <typename T>
Arguments<T> prepared(const Call& call, Norm* norm, cudaStream_t stream) {
  Arguments<T> a = arguments<T>(call.sizes, call.x);
  a.weight = static_cast<const T*>(call.conv_weight);
  a.norm = norm;
  launch("norm", norm_kernel, grid(quotient_up(a.channels, kThreads)), kThreads, 0, stream, call.norm_weight,
         call.norm_bias, call.mean, call.var, a.channels, call.eps, norm);
  return a;
}

// How the positions of all images are cut into stretches.
struct Stretches {
  int length;
  int count;
};

Stretches stretches(int64_t positions, int64_t least, int64_t most) {
  const int64_t wanted = std::max<int64_t>(1, std::min(quotient_up(positions, least), most));
  const int64_t length = quotient_up(positions, wanted);
  require(length < kLimit, "there are too many positions");
  return {static_cast<int>(length), static_cast<int>(quotient_up(positions, length))};
}

Stretches moment_stretches(const Sizes& s) { return stretches(s.batch * s.positions(), kStretch, kStretches); }

int64_t weight_tiles(const Sizes& s) {
  return s.groups * quotient_up(s.group_outputs(), kTile) * quotient_up(s.group_inputs() * s.kernel * s.kernel, kTile);
}

Stretches weight_stretches(const Sizes& s) {
  return stretches(s.batch * s.out_positions(), kWeightPositions, quotient_up(kWeightBlocks, weight_tiles(s)));
}

// The first tap, of `kernel` taps, that rows of x of one parity meet, and how many `stride` apart: row + pad = tap
// modulo the stride.
int first_tap(int parity, int kernel, int stride) { return (parity + kernel / 2) % stride; }
int tap_count(int parity, int kernel, int stride) {
  return (kernel - first_tap(parity, kernel, stride) + stride - 1) / stride;
}

Parity parity_of(const Sizes& s, int y, int x) {
  const int kernel = static_cast<int>(s.kernel);
  const int stride = static_cast<int>(s.stride);
  return {y,
          x,
          static_cast<int>(quotient_up(s.height - y, stride)),
          static_cast<int>(quotient_up(s.width - x, stride)),
          first_tap(y, kernel, stride),
          first_tap(x, kernel, stride),
          tap_count(y, kernel, stride),
          tap_count(x, kernel, stride)};
}

int64_t column_tiles(const Sizes& s, const Parity& parity) {
  return quotient_up(s.batch * parity.height * parity.width, kTile);
}

template <typename Visit>
void for_each_parity(const Sizes& s, const Visit& visit) {
  for (int y = 0; y < s.stride; ++y) {
    for (int x = 0; x < s.stride; ++x) visit(parity_of(s, y, x));
  }
}

// The parts of backward's workspace.
struct Backward {
  Norm* norm;
  int64_t tiles = 0;  // of positions of x
  float* sums;        // [2, tiles, channels]
  double* chunks;     // [2, chunks, channels]
  float* weights;     // [stretches, outputs, inputs, taps]
  size_t bytes;

  Backward(const Sizes& s, void* data) {
    for_each_parity(s, [&](const Parity& parity) { tiles += column_tiles(s, parity); });
    Workspace workspace(data);
    norm = workspace.take<Norm>(s.in_channels);
    sums = workspace.take<float>(2 * tiles * s.in_channels);
    chunks = workspace.take<double>(2 * quotient_up(tiles, kSummed) * s.in_channels);
    weights = workspace.take<float>(weight_stretches(s).count * s.weight_numel());
    bytes = workspace.bytes();
  }
};

template <typename In, typename Out>
void sum_rows(const In* values, int64_t rows, int64_t columns, Out* sums, cudaStream_t stream) {
  dim3 blocks = grid(quotient_up(columns, kWarp));
  require(quotient_up(rows, kSummed) < 65536, "there are too many positions");
  blocks.y = static_cast<unsigned>(quotient_up(rows, kSummed));
  launch("row_sum", row_sum_kernel<In, Out>, blocks, kThreads, 0, stream, values, rows, columns, sums);
}

template <typename T, int kSide>
void map_gradient(const Call& call, const Arguments<T>& a, const Backward& parts, const Gradients& gradients,
                  cudaStream_t stream) {
  const Sizes& s = call.sizes;
  T* const grad_x = static_cast<T*>(gradients.x);
  int64_t first = 0;
  for_each_parity(s, [&](const Parity& parity) {
    const int64_t tiles = column_tiles(s, parity);
    launch("map_gradient", map_gradient_kernel<T, kSide>, grid(s.groups * tiles * quotient_up(s.group_inputs(), kTile)),
           kThreads, 0, stream, a, parity, tiles, first, parts.tiles, call.training != 0, grad_x, parts.sums);
    first += tiles;
  });
  const int64_t chunks = quotient_up(parts.tiles, kSummed);
  float* const to[2] = {gradients.norm_bias, gradients.norm_weight};
  for (int i = 0; i < 2; ++i) {
    double* const of_chunks = parts.chunks + i * chunks * s.in_channels;
    sum_rows(parts.sums + i * parts.tiles * s.in_channels, parts.tiles, s.in_channels, of_chunks, stream);
    sum_rows(of_chunks, chunks, s.in_channels, to[i], stream);
  }
  if (call.training == 0) return;
  const int64_t blocks = quotient_up(s.in_channels * s.positions(), kThreads * kCorrected);
  launch("correct", correct_kernel<T>, grid(s.batch * blocks), kThreads, 0, stream, a, static_cast<int>(blocks),
         gradients.norm_bias, gradients.norm_weight, grad_x);
}

template <typename T, int kSide>
void weight_gradient(const Sizes& s, const Arguments<T>& a, const Backward& parts, float* grad, cudaStream_t stream) {
  const Stretches cut = weight_stretches(s);
  launch("weight_gradient", weight_gradient_kernel<T, kSide>, grid(weight_tiles(s) * cut.count), kThreads, 0, stream, a,
         cut.length, parts.weights);
  sum_rows(parts.weights, cut.count, s.weight_numel(), grad, stream);
}

template <typename T, int kSide>
void convolve(const Sizes& s, const Arguments<T>& a, void* out, cudaStream_t stream) {
  const int64_t tiles = quotient_up(s.batch * s.out_positions(), kTile);
  launch("convolve", convolve_kernel<T, kSide>, grid(s.groups * tiles * quotient_up(s.group_outputs(), kTile)),
         kThreads, 0, stream, a, tiles, static_cast<T*>(out));
}

}  // namespace

size_t statistics_workspace_bytes(const Sizes& sizes) {
  check(sizes);
  Workspace workspace(nullptr);
  workspace.take<float>(2 * moment_stretches(sizes).count * sizes.in_channels);
  return workspace.bytes();
}

void statistics(Dtype dtype, const Sizes& sizes, const ImageTensor& x, float* mean, float* var, void* workspace,
                cudaStream_t stream) {
  check(sizes);
  const Stretches cut = moment_stretches(sizes);
  float* const moments = static_cast<float*>(workspace);
  with_type(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const Arguments<T> a = arguments<T>(sizes, x);
    launch("moments", moments_kernel<T>, grid(int64_t{cut.count} * a.channels), kThreads, 0, stream, a, cut.length,
           cut.count, moments);
    launch("merge_moments", merge_moments_kernel<T>, grid(quotient_up(a.channels, kThreads)), kThreads, 0, stream, a,
           cut.length, cut.count, moments, mean, var);
  });
}

size_t forward_workspace_bytes(const Sizes& sizes) {
  check(sizes);
  Workspace workspace(nullptr);
  workspace.take<Norm>(sizes.in_channels);
  return workspace.bytes();
}

void forward(const Call& call, void* out, void* workspace, cudaStream_t stream) {
  check(call.sizes);
  with_type(call.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const Arguments<T> a = prepared<T>(call, static_cast<Norm*>(workspace), stream);
    call.sizes.kernel == 1 ? convolve<T, 1>(call.sizes, a, out, stream) : convolve<T, 3>(call.sizes, a, out, stream);
  });
}

size_t backward_workspace_bytes(const Sizes& sizes) {
  check(sizes);
  return Backward(sizes, nullptr).bytes;
}

void backward(const Call& call, const ImageTensor& grad_out, const Gradients& gradients, void* workspace,
              cudaStream_t stream) {
  check(call.sizes);
  const Backward parts(call.sizes, workspace);
  with_type(call.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    Arguments<T> a = prepared<T>(call, parts.norm, stream);
    a.grad_out = view<T>(grad_out);
    if (call.sizes.kernel == 1) {
      map_gradient<T, 1>(call, a, parts, gradients, stream);
      weight_gradient<T, 1>(call.sizes, a, parts, gradients.conv_weight, stream);
    } else {
      map_gradient<T, 3>(call, a, parts, gradients, stream);
      weight_gradient<T, 3>(call.sizes, a, parts, gradients.conv_weight, stream);
    }
  });
}

}  // namespace pyext::bn_relu_conv2d
