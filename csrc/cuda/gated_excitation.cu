// Forward of gated_excitation: kernels and launchers.
#include "cuda/gated_excitation.h"

#include <algorithm>

#include "cuda/gated_excitation/gating.h"
#include "cuda/gated_excitation/host.h"
#include "cuda/gated_excitation/lanes.h"
#include "cuda/gated_excitation/passes.h"
#include "cuda/gated_excitation/plan.h"
#include "cuda/gated_excitation/tile.h"
#include "cuda/launch.h"

namespace pyext::gated_excitation {
namespace {

constexpr int kForwardThreads = 512;
// Partial results of the statistics of one channel; fixed, so that sums are the same on every device.
constexpr int kMaxSplits = 64;

template <typename T, typename P>
struct ExciteArguments {
  Geometry g;
  Network<P> net;
  Plan plan;
  View<const T> u;
  Traversal u_traversal;
  float* global_maps;
  float* position;  // may be null
  float* pooled;    // pooled and hidden: only where the kernel stops before the gates
  float* hidden;
  View<T> out;  // only where the kernel goes on to the output
  Traversal out_traversal;
};

// Vectors of excite_kernel in shared memory, for C channels and J hidden units.
struct ExciteVectors {
  float* context;  // (3, C)
  float* pooled;   // (3, C)
  float* f;        // (C)
  float* n;        // (C)
  float* hidden;   // (J)
  float* activation;
  float* scratch;

  static constexpr int kPerChannel = 8;
  static constexpr int kPerHidden = 2;

  __device__ ExciteVectors(float* base, int channels, int hidden_units) {
    context = base;
    pooled = context + 3 * channels;
    f = pooled + 3 * channels;
    n = f + channels;
    hidden = n + channels;
    activation = hidden + hidden_units;
    scratch = activation + hidden_units;
  }
};

__device__ void save_maps(const Geometry& g, const float* maps, float* position) {
  for (int p = threadIdx.x; p < g.positions; p += blockDim.x) {
    const int cell = g.cell(p);
#pragma unroll
    for (int b = 0; b < kNumBranches; ++b) position[int64_t{b} * g.positions + p] = maps[b * g.padded + cell];
  }
}

// Everything up to the hidden units, for one image in shared memory or in global memory.
template <typename T, typename P, typename Index>
__device__ void excite(const ExciteArguments<T, P>& a, const Image<const T, Index>& image, TableRow* table, float* maps,
                       const ExciteVectors& v) {
  position_dots(a.g, image, a.net, v.context, table, a.plan.table_rows, maps);
  softmax_maps(a.g, maps, v.scratch);
  if (a.position != nullptr) save_maps(a.g, maps, a.position + int64_t{blockIdx.x} * kNumBranches * a.g.positions);
  pool(a.g, image, a.net, maps, v.pooled);
  hidden_rows(a.net, v.pooled, v.hidden);
}

template <int V, bool kStaged, typename T, typename P>
__device__ void write_image(const ExciteArguments<T, P>& a, const T* u, const T* tile, const ExciteVectors& v) {
  const bool channels_fastest = a.out_traversal.channels_fastest;
  const auto load = [&](const Unit& unit) {
    if constexpr (kStaged) return load_from_tile<V>(tile, a.plan.tile_pitch, unit, channels_fastest);
    return load_pack<V>(u + a.u.offset(unit.channel, unit.y, unit.x));
  };
  write_output<V>(a.g, v.f, v.n, a.out, a.out.at(blockIdx.x), channels_fastest, threadIdx.x, blockDim.x, load);
}

// One block per image. kFused: inference, through to the output. Otherwise: stops at pooled and hidden, because
// training mode needs the batch's statistics of hidden next.
template <typename T, typename P, bool kStaged, bool kFused>
__global__ void __launch_bounds__(kForwardThreads, 1) excite_kernel(const ExciteArguments<T, P> a) {
  unsigned char* shared = dynamic_shared();
  const int64_t n = blockIdx.x;
  TableRow* table = reinterpret_cast<TableRow*>(shared);
  float* maps =
      a.plan.maps >= 0 ? reinterpret_cast<float*>(shared + a.plan.maps) : a.global_maps + n * a.plan.map_floats;
  const ExciteVectors v(reinterpret_cast<float*>(shared + a.plan.vectors), a.net.channels, a.net.hidden());
  T* tile = reinterpret_cast<T*>(shared + a.plan.tile);
  const T* u = a.u.at(n);

  load_context_weights(a.net, v.context);
  if constexpr (kStaged) {
    load_u(a.g, a.u, u, a.u_traversal, a.plan.tile_pitch, tile);
    excite(a, Image<const T, int>{tile, a.plan.tile_pitch, a.g.width, 1}, table, maps, v);
  } else {
    excite(a, Image<const T, int64_t>{u, a.u.channel, a.u.row, a.u.column}, table, maps, v);
  }

  if constexpr (kFused) {
    activate(a.net, v.hidden, v.activation);
    gates(a.net, v.activation, [&](int c, float f, float alpha) {
      v.f[c] = f;
      v.n[c] = mix(alpha, v.pooled, a.net.channels, c);
    });
    if (a.out_traversal.vector) {
      write_image<kVector<T>, kStaged>(a, u, tile, v);
    } else {
      write_image<1, kStaged>(a, u, tile, v);
    }
  } else {
    const int pooled = kNumBranches * a.net.channels;
    for (int i = threadIdx.x; i < pooled; i += blockDim.x) a.pooled[n * pooled + i] = v.pooled[i];
    for (int j = threadIdx.x; j < a.net.hidden(); j += blockDim.x) a.hidden[n * a.net.hidden() + j] = v.hidden[j];
  }
}

// Moments of up to kChunk values at once: one division for all of them.
constexpr int kChunk = 8;
__device__ Moments chunk_moments(const float (&values)[kChunk], int count) {
  float sum = 0.f;
  for (int i = 0; i < kChunk; ++i) sum += i < count ? values[i] : 0.f;
  Moments moments;
  moments.count = static_cast<float>(count);
  moments.mean = sum / moments.count;
  for (int i = 0; i < kChunk; ++i) {
    const float difference = i < count ? values[i] - moments.mean : 0.f;
    moments.deviation += difference * difference;
  }
  return moments;
}

struct StatisticsArguments {
  Geometry g;
  ChannelLanes shape;
  int64_t batch;
  int64_t images_per_split;
};

// Block (x, y): moments of the channels of tile x over the images of split y.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const StatisticsArguments a, const View<const T> u, Moments* partial) {
  const Lane lane(a.shape, blockIdx.x * a.shape.lanes);
  const int image_step = lane.slots / a.g.positions;
  const int position_step = lane.slots - image_step * a.g.positions;
  int64_t n = blockIdx.y * a.images_per_split + lane.slot / a.g.positions;
  int p = lane.slot % a.g.positions;
  const int64_t end = min(a.batch, (blockIdx.y + int64_t{1}) * a.images_per_split);

  Moments moments;
  while (lane.channel < a.g.channels && n < end) {
    float values[kChunk];
    int count = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (n >= end) continue;
      const int y = p / a.g.width;
      values[i] = to_float(u.at(n)[u.offset(lane.channel, y, p - y * a.g.width)]);
      count = i + 1;
      n += image_step;
      p += position_step;
      if (p >= a.g.positions) {
        p -= a.g.positions;
        ++n;
      }
    }
    moments.merge(chunk_moments(values, count));
  }
  moments = merge_slots(lane, moments, reinterpret_cast<Moments*>(dynamic_shared()));
  if (lane.slot == 0 && lane.channel < a.g.channels) {
    partial[blockIdx.y * int64_t{a.g.channels} + lane.channel] = moments;
  }
}

__global__ void __launch_bounds__(kThreads)
    merge_statistics_kernel(const Moments* partial, int splits, int channels, float* statistics) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  Moments moments;
  for (int split = 0; split < splits; ++split) moments.merge(partial[split * int64_t{channels} + c]);
  statistics[c] = moments.mean;
  statistics[channels + c] = moments.variance();
}

// Mean and variance of each hidden unit over the batch: one warp per unit, two passes.
__global__ void __launch_bounds__(kThreads)
    hidden_statistics_kernel(const float* hidden, int64_t batch, int units, float* statistics) {
  const int lane = threadIdx.x % kWarp;
  const int j = (blockIdx.x * blockDim.x + threadIdx.x) / kWarp;
  if (j >= units) return;
  const float count = batch > 0 ? batch : 1;
  float sum = 0.f;
  for (int64_t n = lane; n < batch; n += kWarp) sum += hidden[n * units + j];
  const float mean = warp_sum(sum) / count;
  float deviation = 0.f;
  for (int64_t n = lane; n < batch; n += kWarp) {
    const float difference = hidden[n * units + j] - mean;
    deviation += difference * difference;
  }
  deviation = warp_sum(deviation);
  if (lane == 0) {
    statistics[j] = mean;
    statistics[units + j] = deviation / count;
  }
}

// f and n of one image per block, into gate_values (N, 2, C).
template <typename P>
__global__ void __launch_bounds__(kThreads)
    gates_kernel(const Network<P> net, const float* pooled, const float* hidden, float* gate_values) {
  float* activation = reinterpret_cast<float*>(dynamic_shared());
  const int64_t n = blockIdx.x;
  const float* image_pooled = pooled + n * kNumBranches * net.channels;
  float* f = gate_values + n * 2 * net.channels;
  activate(net, hidden + n * net.hidden(), activation);
  gates(net, activation, [&](int c, float forget, float alpha) {
    f[c] = forget;
    f[net.channels + c] = mix(alpha, image_pooled, net.channels, c);
  });
}

// out = f u + n: block (n, y) takes every gridDim.y-th stretch of image n.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) output_kernel(const Geometry g, const View<const T> u, const View<T> out,
                                                          bool channels_fastest, const float* gate_values) {
  const int64_t n = blockIdx.x;
  const float* f = gate_values + n * 2 * g.channels;
  const T* source = u.at(n);
  write_output<V>(g, f, f + g.channels, out, out.at(n), channels_fastest, blockIdx.y * blockDim.x + threadIdx.x,
                  gridDim.y * blockDim.x,
                  [&](const Unit& unit) { return load_pack<V>(source + u.offset(unit.channel, unit.y, unit.x)); });
}

template <typename T>
Plan forward_plan(const Inputs& in, const Geometry& g) {
  const int64_t vectors =
      ExciteVectors::kPerChannel * in.sizes.channels + ExciteVectors::kPerHidden * in.sizes.hidden() + kScratchFloats;
  const int64_t maps = int64_t{channel_groups(kForwardThreads, g)} * kNumBranches * g.padded;
  return plan(g, vectors, maps, sizeof(T), channels_fastest(view<const T>(in.u, in.sizes), g));
}

struct ForwardWorkspace {
  float* maps;
  float* pooled;
  float* hidden;
  float* gates;
  Moments* partial;
  size_t bytes;

  ForwardWorkspace(void* base, const Inputs& in, const Plan& plan, bool save) {
    const Sizes& s = in.sizes;
    const bool fused = !save && in.training == 0;
    Arena arena(base);
    maps = arena.take<float>(plan.maps >= 0 ? 0 : s.batch * plan.map_floats);
    pooled = arena.take<float>(save || fused ? 0 : s.batch * kNumBranches * s.channels);
    hidden = arena.take<float>(save || fused ? 0 : s.batch * s.hidden());
    gates = arena.take<float>(fused ? 0 : s.batch * 2 * s.channels);
    partial = arena.take<Moments>(in.training != 0 ? kMaxSplits * s.channels : 0);
    bytes = arena.used();
  }
};

template <typename T>
void launch_statistics(const View<const T>& u, const Sizes& s, const Geometry& g, Moments* partial, float* statistics,
                       cudaStream_t stream) {
  const int64_t per_split = std::max<int64_t>(1, (s.batch + kMaxSplits - 1) / kMaxSplits);
  const int splits = static_cast<int>((s.batch + per_split - 1) / per_split);
  const StatisticsArguments a{g, channel_lanes(g, channels_fastest(u, g)), s.batch, per_split};
  launch("statistics", statistics_kernel<T>, dim3(blocks(g.channels, a.shape.lanes), splits), kThreads,
         kThreads * sizeof(Moments), stream, a, u, partial);
  launch("merge_statistics", merge_statistics_kernel, dim3(blocks(g.channels, kThreads)), kThreads, 0, stream, partial,
         splits, g.channels, statistics);
}

template <bool kFused, typename T, typename P>
void launch_excite(const ExciteArguments<T, P>& a, int64_t batch, cudaStream_t stream) {
  const auto kernel = a.plan.tile >= 0 ? excite_kernel<T, P, true, kFused> : excite_kernel<T, P, false, kFused>;
  launch("excite", kernel, dim3(static_cast<unsigned>(batch)), kForwardThreads, a.plan.bytes, stream, a);
}

template <typename T>
void launch_output(const Sizes& s, const Geometry& g, const View<const T>& u, const View<T>& out, const float* gates,
                   cudaStream_t stream) {
  const bool order = channels_fastest(out, g);
  const bool vector = vectorisable(u, g, order) && vectorisable(out, g, order);
  const dim3 grid(static_cast<unsigned>(s.batch), stretches(g, vector ? kVector<T> : 1));
  launch("output", vector ? output_kernel<T, kVector<T>> : output_kernel<T, 1>, grid, kThreads, 0, stream, g, u, out,
         order, gates);
}

template <typename T, typename P>
void forward_typed(const Inputs& in, bool save, const ImageTensor& out_tensor, const Saved& saved, void* base,
                   cudaStream_t stream) {
  const Sizes& s = in.sizes;
  const Geometry g = geometry(s);
  const View<const T> u = view<const T>(in.u, s);
  const View<T> out = view<T>(out_tensor, s);
  const Network<P> net = network<P>(in, saved);
  const Plan p = forward_plan<T>(in, g);
  const ForwardWorkspace workspace(base, in, p, save);
  ExciteArguments<T, P> a{g,
                          net,
                          p,
                          u,
                          traversal(u, g),
                          workspace.maps,
                          save ? saved.position : nullptr,
                          save ? saved.pooled : workspace.pooled,
                          save ? saved.hidden : workspace.hidden,
                          out,
                          traversal(out, g)};
  if (!save && in.training == 0) {
    if (p.tile < 0) a.out_traversal.vector &= vectorisable(u, g, a.out_traversal.channels_fastest);
    launch_excite<true>(a, s.batch, stream);
    return;
  }
  if (in.training != 0) launch_statistics(u, s, g, workspace.partial, saved.map_statistics, stream);
  launch_excite<false>(a, s.batch, stream);
  if (in.training != 0) {
    launch("hidden_statistics", hidden_statistics_kernel, dim3(blocks(s.hidden(), kThreads / kWarp)), kThreads, 0,
           stream, a.hidden, s.batch, static_cast<int>(s.hidden()), saved.hidden_statistics);
  }
  launch("gates", gates_kernel<P>, dim3(static_cast<unsigned>(s.batch)), kThreads, s.hidden() * sizeof(float), stream,
         net, a.pooled, a.hidden, workspace.gates);
  launch_output(s, g, u, out, workspace.gates, stream);
}

}  // namespace

size_t forward_workspace_bytes(const Inputs& in, bool save) {
  size_t bytes = 0;
  dispatch(in, [&](auto element, auto) {
    using T = typename decltype(element)::type;
    bytes = ForwardWorkspace(nullptr, in, forward_plan<T>(in, geometry(in.sizes)), save).bytes;
  });
  return bytes;
}

void forward(const Inputs& in, bool save, const ImageTensor& out, const Saved& saved, void* workspace,
             cudaStream_t stream) {
  dispatch(in, [&](auto element, auto parameter) {
    using T = typename decltype(element)::type;
    using P = typename decltype(parameter)::type;
    forward_typed<T, P>(in, save, out, saved, workspace, stream);
  });
}

}  // namespace pyext::gated_excitation
