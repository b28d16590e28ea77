// masked_conv2d on CUDA, backward. The gradient of v = scale * convolution + shift, before activation and gate, is
// written once (in x's dtype, where it is not grad_out itself); then come the gradient of x, which is the forward
// pass's product with inputs and outputs exchanged, and that of the weight, whose partial sums over chunks of positions
// are added in their order and spread over the whole layer's weight. No sum depends on the order in which blocks run.
//
// Floors: twice the forward pass's operations; bytes of grad_out, out and x, and of the whole weight's gradient, which
// is float32. Above that: the gradient of v is written and read once, in 16 bits x and that gradient are arranged, 4
// bytes per element each, and partial sums are written and read once per chunk. From arranged maps a warp issues 3
// copies per thread for 16 instructions of the tensor cores. Not measured.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/masked_conv2d.h"
#include "cuda/masked_conv2d/weights_arranged.h"

namespace pyext::masked_conv2d {
namespace {

// What the first pass over grad_out reads and writes; (batch x outputs) maps of `positions`, contiguous.
template <typename T, typename P>
struct Derivation {
  Lists outputs;
  Images images;
  Activation activation;
  int positions;
  int lanes;  // of a map: a power of two
  const T* grad_out;
  const T* out;
  const T* values;  // of v, where out does not tell them; or null
  const P* gate;
  T* grad;           // of v, or null
  float* sums;       // of the gradient of v: batch x outputs, or null
  float* grad_gate;  // or null
};

__device__ __forceinline__ bool is_active(Activation activation, float y) {
  if (activation == Activation::kNone) return true;
  return !(y <= 0.f) && !(activation == Activation::kRelu6 && y >= 6.f);
}

// Some lanes of a warp: one map.
template <typename T, typename P>
__global__ void __launch_bounds__(kThreads) derive_kernel(const Derivation<T, P> d) {
  const int64_t map = blockIdx.x * int64_t{kThreads / d.lanes} + threadIdx.x / d.lanes;
  const bool inside = map < int64_t{d.images.batch} * d.outputs.length;
  const int image = static_cast<int>(inside ? map / d.outputs.length : 0);
  const int place = static_cast<int>(inside ? map - int64_t{image} * d.outputs.length : 0);
  const bool kept = inside && d.outputs.channel(d.images.subnet(image), d.images.subnets, place) >= 0;
  const float gate = inside && d.gate != nullptr ? to_float(d.gate[map]) : 1.f;
  const int lane = threadIdx.x % d.lanes;
  float sum = 0.f, of_gate = 0.f;
  for (int64_t p = lane; kept && p < d.positions; p += d.lanes) {
    const int64_t at = map * d.positions + p;
    const float y = to_float(d.out[at]);
    const float grad = is_active(d.activation, y) ? to_float(d.grad_out[at]) : 0.f;
    sum += grad * gate;
    of_gate += grad * (d.values == nullptr ? y : to_float(d.values[at]));
    if (d.grad != nullptr) d.grad[at] = from_float<T>(grad * gate);
  }
  for (int other = d.lanes / 2; other > 0; other /= 2) {
    sum += __shfl_xor_sync(kFullMask, sum, other);
    of_gate += __shfl_xor_sync(kFullMask, of_gate, other);
  }
  if (!inside || lane != 0) return;
  if (d.sums != nullptr) d.sums[map] = sum;
  if (d.grad_gate == nullptr) return;
  // An activated output is gate times v where it has a gradient; a gate of 0 leaves none that has.
  const bool divided_by_gate = d.values == nullptr;
  d.grad_gate[map] = !divided_by_gate ? of_gate : gate == 0.f ? 0.f : of_gate / gate;
}

// Block: the gradient of one channel's shift.
__global__ void __launch_bounds__(kThreads)
    shift_gradient_kernel(const Lists outputs, const Images images, const float* sums, float* grad_shift) {
  float sum[1] = {};
  for (int image = threadIdx.x; image < images.batch; image += kThreads) {
    const int subnet = images.subnet(image);
    const int rank = outputs.rank(subnet, static_cast<int>(blockIdx.x));
    if (rank >= 0) sum[0] += sums[int64_t{image} * outputs.length + outputs.of(subnet)[rank].place];
  }
  block_sum(sum, reinterpret_cast<float*>(dynamic_shared()));
  if (threadIdx.x == 0) grad_shift[blockIdx.x] = sum[0];
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) tiled_weight_kernel(const WeightProduct<T> w) {
  tiled::multiply_weights(w);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) arranged_weight_kernel(const WeightProduct<T> w) {
  arranged::multiply_weights(w);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) single_weight_kernel(const WeightProduct<T> w) {
  single::multiply_weights(w);
}

// The sum over chunks of one element of the whole weight's gradient: input `nth` of the output's group.
__device__ float sum_of_chunks(const Layer& l, const Partial& partial, int output, int nth, int tap) {
  float sum = 0.f;
  if (partial.whole) {
    for (int64_t chunk = 0; chunk < partial.chunks; ++chunk) {
      sum += partial.data[partial.at(chunk, output, nth * l.taps() + tap)];
    }
    return sum;
  }
  const int group = output / l.outputs.group_channels();
  for (int subnet = 0; subnet < l.images.subnets; ++subnet) {
    const int row = l.outputs.rank(subnet, output);
    const int input = l.inputs.rank(subnet, group * l.inputs.group_channels() + nth);
    if (row < 0 || input < 0) continue;
    const int column = (input - l.inputs.start(subnet, group)) * l.taps() + tap;
    const int64_t begin = int64_t{l.images.starts[subnet]} * l.out_positions();
    const int64_t end = int64_t{l.images.starts[subnet + 1]} * l.out_positions();
    const int64_t first = (begin >> partial.chunk_shift) + subnet;
    for (int64_t chunk = 0; chunk << partial.chunk_shift < end - begin; ++chunk) {
      sum += partial.data[partial.at(first + chunk, row, column)];
    }
  }
  return sum;
}

// Block: the gradients of one output channel's weights, zeros where no sub-network keeps both channels, and scale.
template <typename P>
__global__ void __launch_bounds__(kThreads)
    spread_weight_kernel(const Layer l, const Partial partial, const P* weight, int64_t output_stride,
                         int64_t input_stride, int64_t row_stride, int64_t column_stride, const P* scale,
                         float* grad_weight, float* grad_scale) {
  const int output = static_cast<int>(blockIdx.x);
  const int elements = l.inputs.group_channels() * l.taps();
  const float factor = scale == nullptr ? 1.f : to_float(scale[output]);
  float product[1] = {};
  for (int i = threadIdx.x; i < elements; i += kThreads) {
    const int nth = i / l.taps(), tap = i - nth * l.taps();
    const int row = tap / l.columns.kernel, column = tap - row * l.columns.kernel;
    const float sum = sum_of_chunks(l, partial, output, nth, tap);
    grad_weight[int64_t{output} * elements + i] = sum * factor;
    if (grad_scale == nullptr) continue;
    product[0] +=
        sum * to_float(weight[output * output_stride + nth * input_stride + row * row_stride + column * column_stride]);
  }
  if (grad_scale == nullptr) return;
  block_sum(product, reinterpret_cast<float*>(dynamic_shared()));
  if (threadIdx.x == 0) grad_scale[output] = product[0];
}

constexpr int64_t kWantedBlocks = 528;  // enough for a large GPU, the same on each, so that results are
constexpr size_t kScratch = kWarp * sizeof(float);

struct WeightTiles {
  Partial partial{};
  int64_t rows = 0, columns = 0;
  bool arranged = false;

  explicit WeightTiles(const Inputs& in) {
    const Sizes& s = in.sizes;
    partial.whole = has_small_groups(s);
    if (partial.whole) {
      partial.rows = s.out_channels;
      partial.pitch = s.group_inputs * s.taps();
      const int64_t wanted = divided(kWantedBlocks, partial.rows * partial.pitch);
      partial.images = static_cast<int>(std::max<int64_t>(divided(s.batch, wanted), kWarps));
      partial.chunks = divided(s.batch, partial.images);
      return;
    }
    constexpr int kLeast = 8;  // a chunk has 2^8 positions or more
    partial.rows = s.outputs;
    partial.pitch = std::min(s.inputs, s.group_inputs) * s.taps();
    rows = tiles_for(s.outputs, kRows, s.groups);
    const int64_t channels = std::min(s.inputs, s.group_inputs);
    arranged = is_arranged(in) && channels >= arranged::kLeastInputs;
    columns = arranged ? divided(channels, kColumns) * s.taps() : divided(partial.pitch, kColumns);
    const int64_t positions = s.batch * s.conv_positions();
    const int64_t wanted = divided(kWantedBlocks, rows * columns);
    partial.chunk_shift = kLeast;
    while (int64_t{2} << partial.chunk_shift <= positions / wanted) ++partial.chunk_shift;
    partial.chunks = tiles_for(positions, int64_t{1} << partial.chunk_shift, in.subnets == nullptr ? 1 : s.subnets + 1);
  }
};

// Pieces of the workspace; those that a call has no use for are null.
struct Workspace {
  char* grad = nullptr;    // of v
  char* values = nullptr;  // of v
  float* sums = nullptr;
  float* partial = nullptr;
  char* maps = nullptr;  // for the products whose results are maps, one after the other
  char* arranged_x = nullptr;
  char* arranged_grad = nullptr;
  size_t bytes;

  Workspace(const Inputs& in, const Gradients& wanted, void* base) {
    const Sizes& s = in.sizes;
    const int64_t count = s.batch * s.outputs, element = in.dtype == Dtype::kFloat ? 4 : 2;
    char* const begin = static_cast<char*>(base);
    const Prepared prepared(in, base);
    size_t used = prepared.bytes;
    const auto take = [&](bool needed, int64_t size) {
      char* at = needed ? begin + used : nullptr;
      if (needed) used += (static_cast<size_t>(size) + 15) / 16 * 16;
      return at;
    };
    const bool gated = in.gate != nullptr, activated = s.activation != Activation::kNone;
    const bool needs_grad = (wanted.x != nullptr || wanted.weight != nullptr) && (gated || activated);
    grad = take(needs_grad, count * s.conv_positions() * element);
    values = take(wanted.gate != nullptr && !activated, count * s.conv_positions() * element);
    sums = reinterpret_cast<float*>(take(wanted.shift != nullptr, count * 4));
    partial = reinterpret_cast<float*>(take(wanted.weight != nullptr, WeightTiles(in).partial.numel() * 4));
    const size_t of_x = wanted.x != nullptr ? map_workspace_bytes(in, true, false) : 0;
    const size_t of_values = values != nullptr ? map_workspace_bytes(in, false, false) : 0;
    maps = take(true, static_cast<int64_t>(std::max(of_x, of_values)));
    const WeightTiles tiles(in);
    const bool for_weight = wanted.weight != nullptr && tiles.arranged;
    const auto arranged = [&](bool needed, const Lists& lists, int64_t positions) {
      return take(needed && is_arranged(in), static_cast<int64_t>(arranged_bytes(lists, s.batch, positions)));
    };
    arranged_x = arranged(values != nullptr || for_weight, prepared.inputs, s.rows.input * s.columns.input);
    arranged_grad = arranged(wanted.x != nullptr || for_weight, prepared.outputs, s.conv_positions());
    bytes = used;
  }
};

template <typename T, typename P>
void derive(const Inputs& in, const Prepared& prepared, const Workspace& space, const void* grad_out, const void* out,
            float* grad_gate, cudaStream_t stream) {
  const Sizes& s = in.sizes;
  Derivation<T, P> d{};
  d.outputs = prepared.outputs;
  d.images = prepared.images;
  d.activation = s.activation;
  d.positions = static_cast<int>(s.conv_positions());
  d.lanes = 1;
  while (d.lanes < kWarp && d.lanes < d.positions) d.lanes *= 2;
  d.grad_out = static_cast<const T*>(grad_out);
  d.out = static_cast<const T*>(out);
  d.values = reinterpret_cast<const T*>(space.values);
  d.gate = static_cast<const P*>(in.gate);
  d.grad = reinterpret_cast<T*>(space.grad);
  d.sums = space.sums;
  d.grad_gate = grad_gate;
  launch("derive", derive_kernel<T, P>, dim3(to_grid(divided(s.batch * s.outputs, kThreads / d.lanes))), kThreads, 0,
         stream, d);
}

template <typename T, typename P>
void derive_weight(const Inputs& in, const Prepared& prepared, const Workspace& space, const void* grad,
                   const Gradients& gradients, cudaStream_t stream) {
  const Sizes& s = in.sizes;
  const WeightTiles tiles(in);
  const int64_t* x = in.x.strides;
  WeightProduct<T> w{};
  w.layer = layer_of(s, prepared);
  w.x = static_cast<const T*>(in.x.data);
  w.grid = {x[0], x[1], x[2], x[3], w.layer.rows.input, w.layer.columns.input};
  w.grad = static_cast<const T*>(grad);
  w.grad_image = s.outputs * s.conv_positions();
  w.grad_position = 1;
  w.partial = tiles.partial;
  w.partial.data = space.partial;
  w.row_tiles = to_grid(tiles.rows);
  w.column_tiles = to_grid(tiles.columns);
  const int64_t of_chunk = w.partial.whole ? w.partial.rows * w.partial.pitch : tiles.rows * tiles.columns;
  const dim3 blocks(to_grid(w.partial.chunks * of_chunk));
  if (w.partial.whole) {
    launch("single_weight", single_weight_kernel<T>, blocks, kThreads, kScratch, stream, w);
  } else if (!tiles.arranged) {
    launch("tiled_weight", tiled_weight_kernel<T>, blocks, kThreads, sizeof(tiled::WeightShared<T>), stream, w);
  } else if constexpr (sizeof(T) == sizeof(uint16_t)) {
    w.x = reinterpret_cast<const T*>(space.arranged_x);
    w.grid = arranged_grid(w.layer.inputs, w.grid.height, w.grid.width);
    w.grad = reinterpret_cast<const T*>(space.arranged_grad);
    w.grad_position = w.layer.outputs.slots();
    w.grad_image = s.conv_positions() * w.grad_position;
    launch("arranged_weight", arranged_weight_kernel<T>, blocks, kThreads, sizeof(arranged::Shared<T>), stream, w);
  }
  const int64_t* strides = in.weight.strides;
  launch("spread_weight", spread_weight_kernel<P>, dim3(static_cast<unsigned>(s.out_channels)), kThreads, kScratch,
         stream, w.layer, w.partial, static_cast<const P*>(in.weight.data), strides[0], strides[1], strides[2],
         strides[3], static_cast<const P*>(in.scale), gradients.weight, gradients.scale);
}

}  // namespace

size_t backward_workspace_bytes(const Inputs& in, const Gradients& wanted) {
  check(in);
  return Workspace(in, wanted, nullptr).bytes;
}

void backward(const Inputs& in, const void* grad_out, const void* out, const Gradients& gradients, void* workspace,
              cudaStream_t stream) {
  check(in);
  require(in.sizes.pool == 1, "there is no gradient with pooling");
  const Sizes& s = in.sizes;
  const Prepared prepared(in, workspace);
  const Workspace space(in, gradients, workspace);
  prepare(prepared, stream);
  const Layer layer = layer_of(s, prepared);
  if (space.arranged_x != nullptr) {
    arrange(layer.inputs, layer.images, in.x, layer.rows.input, layer.columns.input, space.arranged_x, stream);
  }
  if (space.values != nullptr) {
    write_map(in, prepared, {false, false, in.x, space.arranged_x, space.values, space.maps}, stream);
  }
  const void* grad = space.grad != nullptr ? space.grad : grad_out;
  const int64_t positions = s.conv_positions();
  const ImageTensor of_grad{const_cast<void*>(grad), {s.outputs * positions, positions, s.columns.output(), 1}};
  dispatch(in, [&](auto element, auto parameter) {
    using T = typename decltype(element)::type;
    using P = typename decltype(parameter)::type;
    if (space.grad != nullptr || space.sums != nullptr || gradients.gate != nullptr) {
      derive<T, P>(in, prepared, space, grad_out, out, gradients.gate, stream);
    }
    if (space.arranged_grad != nullptr) {
      arrange(layer.outputs, layer.images, of_grad, layer.rows.output, layer.columns.output, space.arranged_grad,
              stream);
    }
    if (gradients.weight != nullptr) derive_weight<T, P>(in, prepared, space, grad, gradients, stream);
  });
  if (gradients.shift != nullptr) {
    launch("shift_gradient", shift_gradient_kernel, dim3(static_cast<unsigned>(s.out_channels)), kThreads, kScratch,
           stream, prepared.outputs, prepared.images, space.sums, gradients.shift);
  }
  if (gradients.x != nullptr) {
    write_map(in, prepared, {true, false, of_grad, space.arranged_grad, gradients.x, space.maps}, stream);
  }
}

}  // namespace pyext::masked_conv2d
