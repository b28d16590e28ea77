// masked_conv2d on CUDA: the convolution of kept channels, and the gradient of x, as a product whose operands are
// gathered: rows are positions of the images of one sub-network, columns kept channels, the depth kept channels on the
// other side times taps. The weight is read where it lies. So is x in float32, by plain FMA; in 16 bits it is first
// arranged with the channels of a position side by side, for tensor cores that take 16 bytes of it at once.
//
// Floors of I kept inputs and O kept outputs of `positions` results of all images, K taps: 2 positions O I K operations
// and (x + out + O I K of the weight) elements once; on an H200, 4.3 TB/s and 770 TFLOP/s in bfloat16 (60 in float32).
// A tile of 128 x 64 reads (128 + 64) elements of depth for 128 x 64 products of it: 43 operations per byte in 16 bits,
// 21 in float32, from the caches. Above the floor: x arranged is written and read once, 2 I elements per position of x;
// a split of the depth adds 32 KB per tile, written and read once. By the machine code a warp issues about 30 memory
// instructions per chunk for its 16 of the tensor cores: half of their rate is what to expect at most. Not measured.
#include "cuda/masked_conv2d.h"

#include "cuda/launch.h"
#include "cuda/masked_conv2d/convolve.h"

namespace pyext::masked_conv2d {
namespace {

template <typename T, typename P>
__global__ void __launch_bounds__(kThreads, 2) tiled_convolution_kernel(const Convolution<T, P> c) {
  tiled::convolve(c);
}

template <typename T, typename P>
__global__ void __launch_bounds__(kThreads) join_convolution_kernel(const Convolution<T, P> c) {
  tiled::join(c);
}

template <typename T, typename P>
__global__ void __launch_bounds__(kThreads, 2) single_convolution_kernel(const Convolution<T, P> c) {
  single::convolve(c);
}

template <typename T, typename P>
Convolution<T, P> convolution_of(const Inputs& in, const Prepared& prepared, const MapProduct& m) {
  const Sizes& s = in.sizes;
  const auto parameter = [](const void* data, bool wanted) { return wanted ? static_cast<const P*>(data) : nullptr; };
  const auto count = [](int64_t a, int64_t b) { return static_cast<int>(std::min(a, b)); };
  Convolution<T, P> c{};
  c.layer = layer_of(s, prepared);
  c.backward = m.backward;
  c.source = static_cast<const T*>(m.source.data);
  const int64_t* strides = m.source.strides;
  const Extent &rows = c.layer.rows, &columns = c.layer.columns;
  c.grid = {strides[0],
            strides[1],
            strides[2],
            strides[3],
            m.backward ? rows.output : rows.input,
            m.backward ? columns.output : columns.input};
  c.result = static_cast<T*>(m.result);
  c.pool = m.finished ? static_cast<int>(s.pool) : 1;
  c.positions = m.backward ? Positions{rows.input, columns.input, count(rows.stride, rows.input),
                                       count(columns.stride, columns.input)}
                           : Positions{rows.output / c.pool, columns.output / c.pool, 1, 1};
  c.weight = static_cast<const P*>(in.weight.data);
  std::copy_n(in.weight.strides, 4, c.weight_strides);
  c.factors = parameter(in.scale, m.backward);
  c.scale = parameter(in.scale, !m.backward);
  c.shift = parameter(in.shift, !m.backward);
  c.gate = parameter(in.gate, m.finished);
  if (!m.finished) c.layer.activation = Activation::kNone;
  c.channels_inside = strides[1] < strides[3];
  return c;
}

// How a product is cut into tiles, and the depth into splits where there are too few tiles for a large GPU: the same
// for each, so that results are.
struct Tiles {
  int64_t rows, columns, splits = 1;

  Tiles(const Inputs& in, bool backward, bool finished) {
    constexpr int64_t kWantedBlocks = 264, kLeastChunks = 4;
    const Sizes& s = in.sizes;
    const int64_t phases =
        backward ? std::min(s.rows.stride, s.rows.input) * std::min(s.columns.stride, s.columns.input) : 1;
    const int64_t pool = finished ? s.pool : 1;
    const int64_t positions =
        backward ? s.rows.input * s.columns.input : s.rows.output() / pool * (s.columns.output() / pool) * pool * pool;
    const int64_t segments = in.subnets == nullptr ? 1 : s.subnets + 1;
    rows = tiles_for(s.batch * positions, kRows, segments * phases);
    columns = tiles_for(backward ? s.inputs : s.outputs, kColumns, s.groups);
    const int64_t channels = backward ? std::min(s.outputs, s.group_outputs()) : std::min(s.inputs, s.group_inputs);
    const int64_t depth = divided(channels * s.taps(), phases);
    const int64_t chunks = depth / (in.dtype == Dtype::kFloat ? kDepth<float> : kDepth<__half>);
    if (rows * columns > 0)
      splits = std::max<int64_t>(1, std::min(kWantedBlocks / (rows * columns), chunks / kLeastChunks));
  }

  size_t partial_bytes() const {
    return splits == 1 ? 0 : static_cast<size_t>(splits * rows * columns) * kRows * kColumns * sizeof(float);
  }
};

template <typename T, typename P>
void launch_convolution(const Inputs& in, const MapProduct& m, Convolution<T, P> c, cudaStream_t stream) {
  const Sizes& s = in.sizes;
  if (has_small_groups(s)) {
    const int64_t elements = c.results().length * int64_t{c.result_positions()};
    require(elements < 2 * kLimit, "one image's map must have fewer than 2^31 elements");
    c.row_tiles = to_grid(divided(elements, kThreads));
    launch("single_convolution", single_convolution_kernel<T, P>, dim3(to_grid(s.batch * c.row_tiles)), kThreads, 0,
           stream, c);
    return;
  }
  const Tiles tiles(in, m.backward, m.finished);
  c.row_tiles = to_grid(tiles.rows);
  c.column_tiles = to_grid(tiles.columns);
  c.splits = to_grid(tiles.splits);
  c.partial = tiles.splits == 1 ? nullptr : static_cast<float*>(m.workspace);
  if constexpr (tiled::kArranged<T>) {
    c.source = static_cast<const T*>(m.arranged);
    c.grid = arranged_grid(c.sources(), c.grid.height, c.grid.width);
    c.channels_inside = true;
  }
  const size_t shared = sizeof(tiled::Shared<T>);
  launch("tiled_convolution", tiled_convolution_kernel<T, P>, dim3(to_grid(tiles.rows * tiles.columns * tiles.splits)),
         kThreads, shared, stream, c);
  if (tiles.splits == 1) return;
  launch("join_convolution", join_convolution_kernel<T, P>, dim3(to_grid(tiles.rows * tiles.columns)), kThreads, shared,
         stream, c);
}

}  // namespace

void check(const Inputs& in) {
  const Sizes& s = in.sizes;
  const auto fits = [](const Axis& a) {
    return a.output() > 0 && a.input < kLimit && a.padding < kLimit && a.input + 2 * a.padding < kLimit &&
           a.stride < kLimit && a.kernel < kLimit && a.dilation < kLimit;
  };
  require(fits(s.rows) && fits(s.columns), "a map, its padding, or the kernel's extents are too large");
  require(s.rows.input * s.columns.input < kLimit && s.conv_positions() < kLimit,
          "a map must have fewer than 2^30 positions");
  require(s.pool == 1 || s.pool == 2, "pool must be 1 or 2");
  require(s.batch < kLimit && (s.subnets + 1) * s.rows.stride * s.columns.stride < kLimit,
          "too many images, sub-networks or strides");
  require(s.group_inputs * s.groups < kLimit && s.out_channels < kLimit && s.inputs < kLimit && s.outputs < kLimit &&
              s.groups < kLimit,
          "a layer must have fewer than 2^30 channels");
  require(s.taps() < kLimit && (s.inputs + kSlots) * s.taps() < kLimit && (s.outputs + kSlots) * s.taps() < kLimit,
          "channels times taps must be fewer than 2^30");
  require(in.parameter_dtype == Dtype::kFloat || in.parameter_dtype == in.dtype,
          "parameters must be float32 or of x's dtype");
}

void write_map(const Inputs& in, const Prepared& prepared, const MapProduct& product, cudaStream_t stream) {
  dispatch(in, [&](auto element, auto parameter) {
    using T = typename decltype(element)::type;
    using P = typename decltype(parameter)::type;
    launch_convolution(in, product, convolution_of<T, P>(in, prepared, product), stream);
  });
}

size_t map_workspace_bytes(const Inputs& in, bool backward, bool finished) {
  return has_small_groups(in.sizes) ? 0 : Tiles(in, backward, finished).partial_bytes();
}

size_t forward_workspace_bytes(const Inputs& in) {
  check(in);
  const Sizes& s = in.sizes;
  const Prepared prepared(in, nullptr);
  const size_t of_x =
      is_arranged(in) ? arranged_bytes(prepared.inputs, s.batch, s.rows.input * s.columns.input) : size_t{0};
  return prepared.bytes + map_workspace_bytes(in, false, true) + of_x;
}

void forward(const Inputs& in, void* out, void* workspace, cudaStream_t stream) {
  check(in);
  const Prepared prepared(in, workspace);
  prepare(prepared, stream);
  char* const rest = static_cast<char*>(workspace) + prepared.bytes;
  char* const arranged = rest + map_workspace_bytes(in, false, true);
  if (is_arranged(in)) {
    const Layer layer = layer_of(in.sizes, prepared);
    arrange(layer.inputs, layer.images, in.x, layer.rows.input, layer.columns.input, arranged, stream);
  }
  write_map(in, prepared, {false, true, in.x, arranged, out, rest}, stream);
}

}  // namespace pyext::masked_conv2d
