// hybrid_block's squeeze cell: BN, ReLU, 1x1 convolution, BN, ReLU and grouped 3x3 convolution as one kernel, which
// keeps the map between the convolutions in shared memory; the gates are gated_excitation's kernel. A module is two
// launches, and a dense block's input is copied in front of them.
//
// Floors of one cell that reads C channels of P positions and gives G of Q, with S channels between, in K groups:
// 2 (P C S + 9 Q G S / K) operations per image, (P C + Q G) elements of x and u, and the weights once. Above that: the
// border of a tile is computed twice (180 positions for 128 in whole tiles of stride 1), and x is read once per slice
// of channels between (48 in float32, else 64) and block of outputs, from the second-level cache.
#include "cuda/hybrid_block.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/gated_excitation.h"
#include "cuda/hybrid_block/cell.h"
#include "cuda/hybrid_block/scalar.h"
#include "cuda/hybrid_block/tensor_core.h"
#include "cuda/launch.h"

namespace pyext::hybrid_block {
namespace {

constexpr int64_t kLimit = int64_t{1} << 30;  // of extents that are int in kernels

template <typename T, typename P>
__global__ void __launch_bounds__(kThreads, 2) squeeze_cell_kernel(const Arguments<T, P> a) {
  scalar::squeeze_cell(a);
}

template <typename T, typename P>
__global__ void __launch_bounds__(kThreads, 2) squeeze_cell_mma_kernel(const Arguments<T, P> a) {
  tensor_core::squeeze_cell(a);
}

void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("hybrid_block (cuda): ") + message);
}

int quotient_up(int a, int b) { return (a + b - 1) / b; }

template <typename P>
Stage<P> stage(const void* const* tensors) {
  const auto at = [&](int i) { return static_cast<const P*>(tensors[i]); };
  return {at(kNorm1Weight), at(kNorm1Bias), at(kNorm1Mean), at(kNorm1Var), at(kConv1Weight)};
}

// Extents, strides and the tiles that they are cut into.
template <typename T, typename P>
Arguments<T, P> arguments(const Block& block, const ImageTensor& x, int64_t channels, const void* const* tensors,
                          void* u) {
  const Sizes& s = block.sizes;
  Arguments<T, P> a{};
  a.x = {static_cast<const T*>(x.data), x.strides[0], x.strides[1], x.strides[2], x.strides[3]};
  a.first = stage<P>(tensors);
  a.second = stage<P>(tensors + kNorm2Weight);
  a.u = static_cast<T*>(u);
  a.eps = block.eps;
  a.channels = static_cast<int>(channels);
  a.height = static_cast<int>(s.height);
  a.width = static_cast<int>(s.width);
  a.out_channels = static_cast<int>(s.growth);
  a.out_height = static_cast<int>(s.out_height());
  a.out_width = static_cast<int>(s.out_width());
  a.squeeze = static_cast<int>(s.squeeze);
  a.groups = static_cast<int>(s.groups);
  a.stride = static_cast<int>(s.stride);
  a.tile_width = std::min(16, a.out_width);
  a.tile_height = std::min(kCells / a.tile_width, a.out_height);
  while (a.bordered_cells() > kBordered) --a.tile_height;
  a.tiles_across = quotient_up(a.out_width, a.tile_width);
  a.tiles_down = quotient_up(a.out_height, a.tile_height);
  return a;
}

// Deals channels to blocks of at most `outputs` of u, whole groups (at most `groups`) where they fit, in equal shares;
// and cuts the channels between the convolutions into equal slices of at most `slice`, a multiple of `rounding`.
template <typename T, typename P>
void deal_channels(Arguments<T, P>& a, int groups, int outputs, int slice, int rounding) {
  const int most = std::min({groups, a.groups, std::max(1, outputs / a.group_outputs())});
  a.block_groups = quotient_up(a.groups, quotient_up(a.groups, most));
  a.parts = quotient_up(a.block_groups * a.group_outputs(), outputs);
  a.block_outputs = quotient_up(a.block_groups * a.group_outputs(), a.parts);
  a.blocks = quotient_up(a.groups, a.block_groups) * a.parts;
  const int squeezed = a.block_groups * a.group_squeeze();
  const int share = quotient_up(squeezed, quotient_up(squeezed, slice));
  a.slice = quotient_up(share, rounding) * rounding;
}

template <typename Shared, typename T, typename P>
void launch_squeeze(void (*kernel)(Arguments<T, P>), const Arguments<T, P>& a, int64_t batch, cudaStream_t stream) {
  const int64_t blocks = batch * a.tiles_across * a.tiles_down * a.blocks;
  require(blocks < 2 * kLimit, "too many images, positions or groups for one launch");
  launch("squeeze_cell", kernel, dim3(static_cast<unsigned>(blocks)), kThreads,
         Shared::bytes(a.slice, a.bordered_cells()), stream, a);
}

template <typename T, typename P>
void squeeze_typed(Arguments<T, P> a, int64_t batch, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>) {
    deal_channels(a, 1, scalar::kBlockOutputs, scalar::kSlice, scalar::kRounding);
    launch_squeeze<scalar::Shared>(squeeze_cell_kernel<T, P>, a, batch, stream);
  } else {
    using tensor_core::Shared;
    deal_channels(a, a.groups, tensor_core::kBlockOutputs, tensor_core::kSlice, tensor_core::kRounding);
    launch_squeeze<Shared<T>>(squeeze_cell_mma_kernel<T, P>, a, batch, stream);
  }
}

void squeeze(const Block& block, const ImageTensor& x, int64_t channels, const void* const* tensors, void* u,
             cudaStream_t stream) {
  const auto run = [&](auto element, auto parameter) {
    using T = typename decltype(element)::type;
    using P = typename decltype(parameter)::type;
    squeeze_typed(arguments<T, P>(block, x, channels, tensors, u), block.sizes.batch, stream);
  };
  const bool wide = block.parameter_dtype == Dtype::kFloat;
  using Float = Identity<float>;
  using BFloat16 = Identity<__nv_bfloat16>;
  using Half = Identity<__half>;
  if (block.dtype == Dtype::kFloat) {
    run(Float{}, Float{});
  } else if (block.dtype == Dtype::kBFloat16) {
    wide ? run(BFloat16{}, Float{}) : run(BFloat16{}, BFloat16{});
  } else {
    wide ? run(Half{}, Float{}) : run(Half{}, Half{});
  }
}

gated_excitation::Inputs gate_inputs(const Block& block, const void* const* tensors, void* u) {
  const gated_excitation::Sizes s = block.sizes.gates();
  gated_excitation::Inputs in{};
  in.dtype = block.dtype;
  in.parameter_dtype = block.parameter_dtype;
  in.sizes = s;
  in.u = {u, {s.channels * s.positions(), s.positions(), s.width, 1}};
  in.eps = block.eps;
  if (tensors != nullptr) {
    std::copy_n(tensors + kGateParameters, gated_excitation::kNumParameters, in.parameters);
    std::copy_n(tensors + kGateRunning, gated_excitation::kNumRunning, in.running);
  }
  return in;
}

size_t element_bytes(const Block& block) { return block.dtype == Dtype::kFloat ? sizeof(float) : sizeof(__half); }

// u is at the workspace's beginning; the gates' workspace follows.
size_t u_bytes(const Block& block) {
  const gated_excitation::Sizes s = block.sizes.gates();
  return (s.batch * s.channels * s.positions() * element_bytes(block) + 15) / 16 * 16;
}

void check(const Block& block) {
  const Sizes& s = block.sizes;
  require(s.inputs(s.modules) < kLimit && s.positions() < kLimit && s.squeeze < kLimit && s.growth < kLimit,
          "a map must have fewer than 2^30 channels and positions");
  require(block.parameter_dtype == Dtype::kFloat || block.parameter_dtype == block.dtype,
          "parameters must be float32 or of x's dtype");
}

}  // namespace

size_t workspace_bytes(const Block& block) {
  check(block);
  return u_bytes(block) + gated_excitation::forward_workspace_bytes(gate_inputs(block, nullptr, nullptr), false);
}

void forward(const Block& block, void* out, void* workspace, cudaStream_t stream) {
  check(block);
  const Sizes& s = block.sizes;
  const int64_t image = s.out_channels() * s.out_positions();
  const ImageTensor buffer{out, {image, s.out_positions(), s.out_width(), 1}};
  char* const rest = static_cast<char*>(workspace) + u_bytes(block);
  for (int64_t m = 0; m < s.modules; ++m) {
    const void* const* tensors = block.tensors + m * kNumTensors;
    squeeze(block, s.dense ? buffer : block.x, s.inputs(m), tensors, workspace, stream);
    ImageTensor result = buffer;
    if (s.dense) {
      result.data = static_cast<char*>(out) + s.inputs(m) * s.out_positions() * element_bytes(block);
    }
    gated_excitation::forward(gate_inputs(block, tensors, workspace), false, result, {}, rest, stream);
  }
}

}  // namespace pyext::hybrid_block
