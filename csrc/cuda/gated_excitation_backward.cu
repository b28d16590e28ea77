// Backward of gated_excitation: kernels and launchers.
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

// Per image, in the workspace: what the gates' backward hands to the kernels after it.
struct GateRecord {
  enum Vector { kF, kForgetLogit, kSelectLogit, kPooled3, kPooled5, kNumVectors };  // each C floats
  int channels;
  int hidden;

  __host__ __device__ int64_t floats() const { return int64_t{kNumVectors} * channels + 2 * int64_t{hidden}; }
  __host__ __device__ int64_t vector(Vector which) const { return int64_t{which} * channels; }
  __host__ __device__ int64_t activation() const { return int64_t{kNumVectors} * channels; }
  // Gradient of the normalised hidden units; batch_coupling_kernel replaces it by that of hidden itself.
  __host__ __device__ int64_t hidden_grad() const { return activation() + hidden; }
};

struct GradSums {
  float n = 0.f;  // sum of G
  float f = 0.f;  // sum of G u

  __device__ void merge(const GradSums& other) {
    n += other.n;
    f += other.f;
  }
};

// Backward of one gate value per channel, given the sums over positions.
template <typename P>
__device__ void gate_gradients(const Network<P>& net, const GateRecord& layout, const float* pooled,
                               const float* activation, const GradSums* sums, float* record) {
  gates(net, activation, [&](int c, float f, float alpha) {
    const float difference = pooled[kMix3 * net.channels + c] - pooled[kMix5 * net.channels + c];
    record[layout.vector(GateRecord::kF) + c] = f;
    record[layout.vector(GateRecord::kForgetLogit) + c] = sums[c].f * f * (1.f - f);
    record[layout.vector(GateRecord::kSelectLogit) + c] = sums[c].n * difference * alpha * (1.f - alpha);
    record[layout.vector(GateRecord::kPooled3) + c] = sums[c].n * alpha;
    record[layout.vector(GateRecord::kPooled5) + c] = sums[c].n * (1.f - alpha);
  });
}

// Through the second linear maps and tanh: one thread per hidden unit.
template <typename P>
__device__ void activation_gradients(const Network<P>& net, const GateRecord& layout, const float* activation,
                                     float* record) {
  const float* forget_logit = record + layout.vector(GateRecord::kForgetLogit);
  const float* select_logit = record + layout.vector(GateRecord::kSelectLogit);
  for (int j = threadIdx.x; j < net.hidden(); j += blockDim.x) {
    float grad = 0.f;
    if (j < net.forget) {
      for (int c = 0; c < net.channels; ++c) {
        grad += net.at(kForget2Weight, int64_t{c} * net.forget + j) * forget_logit[c];
      }
    } else {
      for (int c = 0; c < net.channels; ++c) {
        const int64_t at = int64_t{c} * net.attention + j - net.forget;
        grad += (net.at(kSelect3Weight, at) - net.at(kSelect5Weight, at)) * select_logit[c];
      }
    }
    record[layout.activation() + j] = activation[j];
    record[layout.hidden_grad() + j] = grad * (1.f - activation[j] * activation[j]);
  }
}

template <typename T, typename P>
struct GateBackwardArguments {
  Geometry g;
  Network<P> net;
  ChannelLanes shape;
  View<const T> u;
  View<const T> grad_out;
  const float* pooled;
  const float* hidden;
  GateRecord layout;
  float* records;
};

// One block per image. Shared memory: GradSums (threads), GradSums (C), activation (J).
template <typename T, typename P>
__global__ void __launch_bounds__(kThreads) gate_backward_kernel(const GateBackwardArguments<T, P> a) {
  GradSums* scratch = reinterpret_cast<GradSums*>(dynamic_shared());
  GradSums* sums = scratch + blockDim.x;
  float* activation = reinterpret_cast<float*>(sums + a.g.channels);
  const int64_t n = blockIdx.x;
  const T* u = a.u.at(n);
  const T* grad_out = a.grad_out.at(n);

  activate(a.net, a.hidden + n * a.net.hidden(), activation);
  for (int first = 0; first < a.g.channels; first += a.shape.lanes) {
    const Lane lane(a.shape, first);
    GradSums sum;
    for (int p = lane.slot; p < a.g.positions && lane.channel < a.g.channels; p += lane.slots) {
      const int y = p / a.g.width;
      const int x = p - y * a.g.width;
      const float grad = to_float(grad_out[a.grad_out.offset(lane.channel, y, x)]);
      sum.n += grad;
      sum.f += grad * to_float(u[a.u.offset(lane.channel, y, x)]);
    }
    sum = merge_slots(lane, sum, scratch);
    if (lane.slot == 0 && lane.channel < a.g.channels) sums[lane.channel] = sum;
  }
  __syncthreads();

  float* record = a.records + n * a.layout.floats();
  gate_gradients(a.net, a.layout, a.pooled + n * kNumBranches * a.net.channels, activation, sums, record);
  activation_gradients(a.net, a.layout, activation, record);
}

// Backward of both BN1d, which in training mode couple the images: one warp per hidden unit.
template <typename P>
__global__ void __launch_bounds__(kThreads)
    batch_coupling_kernel(const Network<P> net, const float* hidden, int64_t batch, const GateRecord layout,
                          float* records, float* grad_weight_forget, float* grad_bias_forget,
                          float* grad_weight_attention, float* grad_bias_attention) {
  const int lane = threadIdx.x % kWarp;
  const int j = (blockIdx.x * blockDim.x + threadIdx.x) / kWarp;
  const int units = net.hidden();
  if (j >= units) return;
  float* grad = records + layout.hidden_grad() + j;
  const int64_t stride = layout.floats();
  float weight_sum = 0.f;
  float bias_sum = 0.f;
  if (batch > 0) {
    const Normalization norm = hidden_normalization(net, j);
    for (int64_t n = lane; n < batch; n += kWarp) {
      bias_sum += grad[n * stride];
      weight_sum += grad[n * stride] * norm.standardized(hidden[n * units + j]);
    }
    weight_sum = warp_sum(weight_sum);
    bias_sum = warp_sum(bias_sum);
    for (int64_t n = lane; n < batch; n += kWarp) {
      const float coupled = bias_sum + norm.standardized(hidden[n * units + j]) * weight_sum;
      grad[n * stride] = norm.scale() * (grad[n * stride] - (net.training ? coupled / batch : 0.f));
    }
  }
  if (lane == 0) {
    const bool forget = j < net.forget;
    const int unit = forget ? j : j - net.forget;
    (forget ? grad_weight_forget : grad_weight_attention)[unit] = weight_sum;
    (forget ? grad_bias_forget : grad_bias_attention)[unit] = bias_sum;
  }
}

// Per image, in the workspace: its part of the gradients that are sums over all positions. Every part has the layout
// of the parameter that it belongs to.
struct PartialGrads {
  enum Part {
    kKernel3,
    kKernel5 = kTaps,
    kWeight3 = kMixBranches * kTaps,
    kBias3,
    kWeight5,
    kBias5,
    kContextForget,
    kContext3,
    kContext5,
    kNum,
  };
  int channels;

  __host__ __device__ int64_t floats() const { return int64_t{kNum} * channels; }
  __host__ __device__ int64_t part(Part which) const { return int64_t{which} * channels; }
};

struct BranchSums {
  float kernel[kTaps] = {};
  float weight = 0.f;
  float bias = 0.f;
  float context = 0.f;
};

// One element of u in the backward of a depthwise branch. The gradient of a_k has rank two,
// da[p] = pi[p] dc + dl[p] w, so its transposed convolution needs just the two maps. Returns the gradient of u.
template <int kBranch>
__device__ __forceinline__ float branch_backward(float u, const BranchChannel& channel, float pooled_grad,
                                                 float context_weight, const float* probability,
                                                 const float* logit_grad, int pitch, BranchSums& sums) {
  const float normalized = channel.norm(u);
  const float r = relu(normalized);
  float grad = 0.f;
  float logit_sum = 0.f;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    const int at = -tap_offset<kBranch>(tap, pitch);
    const float map_grad = pooled_grad * probability[at] + context_weight * logit_grad[at];
    sums.kernel[tap] += r * map_grad;
    grad += channel.tap[tap] * map_grad;
    logit_sum += channel.tap[tap] * logit_grad[at];
  }
  sums.context += r * logit_sum;
  if (relu_is_flat(normalized)) return 0.f;
  sums.weight += grad * channel.norm.standardized(u);
  sums.bias += grad;
  return grad * channel.norm.scale();
}

template <int kBranch>
__device__ void write_branch(BranchSums& sums, int lane, int c, const PartialGrads& layout, float* partial) {
  constexpr PartialGrads::Part kKernel = kBranch == 0 ? PartialGrads::kKernel3 : PartialGrads::kKernel5;
  constexpr PartialGrads::Part kWeight = kBranch == 0 ? PartialGrads::kWeight3 : PartialGrads::kWeight5;
  constexpr PartialGrads::Part kBias = kBranch == 0 ? PartialGrads::kBias3 : PartialGrads::kBias5;
  constexpr PartialGrads::Part kContext = kBranch == 0 ? PartialGrads::kContext3 : PartialGrads::kContext5;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    const float sum = warp_sum(sums.kernel[tap]);
    if (lane == 0) partial[layout.part(kKernel) + int64_t{c} * kTaps + tap] = sum;
  }
  const float weight = warp_sum(sums.weight);
  const float bias = warp_sum(sums.bias);
  const float context = warp_sum(sums.context);
  if (lane == 0) {
    partial[layout.part(kWeight) + c] = weight;
    partial[layout.part(kBias) + c] = bias;
    partial[layout.part(kContext) + c] = context;
  }
}

template <typename T, typename P>
struct ExciteBackwardArguments {
  Geometry g;
  Network<P> net;
  Plan plan;
  View<const T> u;
  Traversal u_traversal;
  float* global_maps;
  const float* position;
  GateRecord record_layout;
  const float* records;
  PartialGrads partial_layout;
  float* partials;
  View<T> grad_u;  // receives all but the forget gate's f G and the batch correction
  Traversal grad_traversal;
};

struct ExciteBackwardVectors {
  float* pooled_grad;  // (3, C)
  float* context;      // (3, C)
  float* scratch;

  static constexpr int kPerChannel = 6;

  __device__ ExciteBackwardVectors(float* base, int channels) {
    pooled_grad = base;
    context = pooled_grad + 3 * channels;
    scratch = context + 3 * channels;
  }
};

// Gradient of the pooled vectors: through the first linear maps, and directly where they are mixed into the output.
template <typename P>
__device__ void pooled_gradients(const Network<P>& net, const GateRecord& layout, const float* record,
                                 float* pooled_grad) {
  const float* hidden_grad = record + layout.hidden_grad();
  const int64_t channels = net.channels;
  for (int c = threadIdx.x; c < net.channels; c += blockDim.x) {
    float forget = 0.f;
    for (int j = 0; j < net.forget; ++j) forget += net.at(kForget1Weight, j * channels + c) * hidden_grad[j];
    float mix3 = record[layout.vector(GateRecord::kPooled3) + c];
    float mix5 = record[layout.vector(GateRecord::kPooled5) + c];
    for (int j = 0; j < net.attention; ++j) {
      mix3 += net.at(kAllWeight, 2 * j * channels + c) * hidden_grad[net.forget + j];
      mix5 += net.at(kAllWeight, (2 * j + 1) * channels + c) * hidden_grad[net.forget + j];
    }
    pooled_grad[kForget * channels + c] = forget;
    pooled_grad[kMix3 * channels + c] = mix3;
    pooled_grad[kMix5 * channels + c] = mix5;
  }
}

// Backward of the position softmaxes. On entry `logit_grad` holds the gradient of the probabilities; on return that
// of the logits. Both sets of maps get zero borders. The mean that is subtracted is summed from the very map, not
// taken as pooled_grad . pooled: so the gradients of the logits cancel as they must, whatever the map's rounding.
__device__ void softmax_backward(const Geometry& g, const float* position, float* logit_grad, float* probability,
                                 float* scratch) {
  float mean[kNumBranches] = {};
  for (int cell = threadIdx.x; cell < g.padded; cell += blockDim.x) {
    const bool interior = g.interior(cell);
    const int y = cell / g.pitch - Geometry::kHalo;
    const int64_t p = int64_t{y} * g.width + cell % g.pitch - Geometry::kHalo;
#pragma unroll
    for (int b = 0; b < kNumBranches; ++b) {
      const int at = b * g.padded + cell;
      probability[at] = interior ? position[int64_t{b} * g.positions + p] : 0.f;
      if (!interior) logit_grad[at] = 0.f;
      mean[b] += probability[at] * logit_grad[at];
    }
  }
  block_sum(mean, scratch);
  for (int cell = threadIdx.x; cell < g.padded; cell += blockDim.x) {
#pragma unroll
    for (int b = 0; b < kNumBranches; ++b) {
      const int at = b * g.padded + cell;
      logit_grad[at] = probability[at] * (logit_grad[at] - mean[b]);
    }
  }
  __syncthreads();
}

// One warp per channel: gradient of u through the excitation, written over `target` element by element, and the
// channel's part of the parameters' gradients. `target` may be the image itself: no element is read twice.
template <typename T, typename P, typename Index>
__device__ void channel_backward(const ExciteBackwardArguments<T, P>& a, const Image<const T, Index>& image,
                                 const Image<T, Index>& target, const ExciteBackwardVectors& v,
                                 const float* probability, const float* logit_grad, float* partial) {
  const int lane = threadIdx.x % kWarp;
  const int channels = a.g.channels;
  const int padded = a.g.padded;
  for (int c = threadIdx.x / kWarp; c < channels; c += blockDim.x / kWarp) {
    const BranchChannel mix3 = load_branch_channel<0>(a.net, c);
    const BranchChannel mix5 = load_branch_channel<1>(a.net, c);
    BranchSums sums3, sums5;
    float forget_context = 0.f;
    const T* source = image.data + c * image.channel;
    T* grad_u = target.data + c * target.channel;
    Walk<Index> to(a.g, target, lane, kWarp);
    for (Walk<Index> walk(a.g, image, lane, kWarp); walk.inside(); walk.advance(), to.advance()) {
      const float u = to_float(source[walk.offset]);
      const float* pi = probability + walk.cell;
      const float* dl = logit_grad + walk.cell;
      float grad = v.pooled_grad[c] * pi[0] + v.context[c] * dl[0];
      forget_context += dl[0] * u;
      grad += branch_backward<0>(u, mix3, v.pooled_grad[kMix3 * channels + c], v.context[kMix3 * channels + c],
                                 pi + kMix3 * padded, dl + kMix3 * padded, a.g.pitch, sums3);
      grad += branch_backward<1>(u, mix5, v.pooled_grad[kMix5 * channels + c], v.context[kMix5 * channels + c],
                                 pi + kMix5 * padded, dl + kMix5 * padded, a.g.pitch, sums5);
      grad_u[to.offset] = from_float<T>(grad);
    }
    write_branch<0>(sums3, lane, c, a.partial_layout, partial);
    write_branch<1>(sums5, lane, c, a.partial_layout, partial);
    forget_context = warp_sum(forget_context);
    if (lane == 0) partial[a.partial_layout.part(PartialGrads::kContextForget) + c] = forget_context;
  }
  __syncthreads();
}

template <typename T, typename P, typename Index>
__device__ void excite_backward(const ExciteBackwardArguments<T, P>& a, const Image<const T, Index>& image,
                                const Image<T, Index>& target, TableRow* table, float* maps,
                                const ExciteBackwardVectors& v) {
  const int64_t n = blockIdx.x;
  float* probability = maps + channel_groups(blockDim.x, a.g) * kNumBranches * a.g.padded;
  position_dots(a.g, image, a.net, v.pooled_grad, table, a.plan.table_rows, maps);
  softmax_backward(a.g, a.position + n * kNumBranches * a.g.positions, maps, probability, v.scratch);
  channel_backward(a, image, target, v, probability, maps, a.partials + n * a.partial_layout.floats());
}

// One block per image.
template <typename T, typename P, bool kStaged>
__global__ void __launch_bounds__(kThreads, 2) excite_backward_kernel(const ExciteBackwardArguments<T, P> a) {
  unsigned char* shared = dynamic_shared();
  const int64_t n = blockIdx.x;
  TableRow* table = reinterpret_cast<TableRow*>(shared);
  float* maps =
      a.plan.maps >= 0 ? reinterpret_cast<float*>(shared + a.plan.maps) : a.global_maps + n * a.plan.map_floats;
  const ExciteBackwardVectors v(reinterpret_cast<float*>(shared + a.plan.vectors), a.net.channels);
  T* tile = reinterpret_cast<T*>(shared + a.plan.tile);
  const T* u = a.u.at(n);
  T* grad_u = a.grad_u.at(n);

  load_context_weights(a.net, v.context);
  pooled_gradients(a.net, a.record_layout, a.records + n * a.record_layout.floats(), v.pooled_grad);
  if constexpr (kStaged) {
    const int pitch = a.plan.tile_pitch;
    load_u(a.g, a.u, u, a.u_traversal, pitch, tile);
    excite_backward(a, Image<const T, int>{tile, pitch, a.g.width, 1}, Image<T, int>{tile, pitch, a.g.width, 1}, table,
                    maps, v);
    if (a.grad_traversal.vector) {
      store_tile<kVector<T>>(a.g, tile, pitch, a.grad_u, grad_u, a.grad_traversal.channels_fastest);
    } else {
      store_tile<1>(a.g, tile, pitch, a.grad_u, grad_u, a.grad_traversal.channels_fastest);
    }
  } else {
    excite_backward(a, Image<const T, int64_t>{u, a.u.channel, a.u.row, a.u.column},
                    Image<T, int64_t>{grad_u, a.grad_u.channel, a.grad_u.row, a.grad_u.column}, table, maps, v);
  }
}

// grad[i, j] = sign sum_n left[n, i] right[n, j]. Without `right`: sum_n left[n, i]. Without `left`: zero.
struct BatchSum {
  const float* left;
  const float* right;
  int64_t left_stride;
  int64_t right_stride;
  int64_t columns;
  int64_t elements;
  float* grad;
  float sign;
};

constexpr int kMaxBatchSums = kNumParameters;
struct BatchSums {
  BatchSum at[kMaxBatchSums];
};

// Block (x, y): stretch x of sum y. One thread per element and a fixed order: reproducible.
__global__ void __launch_bounds__(kThreads) batch_sums_kernel(const BatchSums sums, int64_t batch) {
  const BatchSum& sum = sums.at[blockIdx.y];
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; e < sum.elements; e += step) {
    const int64_t i = e / sum.columns;
    const int64_t j = e - i * sum.columns;
    float total = 0.f;
    for (int64_t n = 0; n < batch && sum.left != nullptr; ++n) {
      const float left = sum.left[n * sum.left_stride + i];
      total += sum.right == nullptr ? left : left * sum.right[n * sum.right_stride + j];
    }
    sum.grad[e] = sum.sign * total;
  }
}

template <typename T, typename P>
struct InputGradArguments {
  Geometry g;
  Network<P> net;
  int64_t batch;
  View<const T> u;
  View<const T> grad_out;
  View<T> grad_u;
  bool channels_fastest;
  const float* f;  // of image 0
  int64_t f_stride;
  const float* grad_weight[kMixBranches];  // of both BN2d
  const float* grad_bias[kMixBranches];
};

// grad_u += f G, and in training mode - rstd (S1 + xhat S2) / M, where S1 and S2 sum the branches' BN gradients.
// The second is constant[c] + slope[c] (u - mean[c]).
struct Correction {
  float* f;
  float* constant;
  float* slope;
  float* mean;

  __device__ Correction(float* base, int channels)
      : f(base), constant(base + channels), slope(base + 2 * channels), mean(base + 3 * channels) {}

  template <typename T, typename P>
  __device__ void fill(const InputGradArguments<T, P>& a) const {
    const float count = static_cast<float>(a.batch) * static_cast<float>(a.g.positions);
    for (int c = threadIdx.x; c < a.g.channels; c += blockDim.x) {
      const Normalization norm = map_normalization<0>(a.net, c);
      const float weight3 = norm.weight;
      const float weight5 = a.net.at(kNorm5Weight, c);
      const float bias_sum = weight3 * a.grad_bias[0][c] + weight5 * a.grad_bias[1][c];
      const float weight_sum = weight3 * a.grad_weight[0][c] + weight5 * a.grad_weight[1][c];
      f[c] = a.f[blockIdx.x * a.f_stride + c];
      constant[c] = norm.rstd * bias_sum / count;
      slope[c] = norm.rstd * norm.rstd * weight_sum / count;
      mean[c] = norm.mean;
    }
    __syncthreads();
  }
};

// Block (n, y) takes every gridDim.y-th stretch of image n.
template <typename T, typename P, int V>
__global__ void __launch_bounds__(kThreads) input_grad_kernel(const InputGradArguments<T, P> a) {
  const Correction correction(reinterpret_cast<float*>(dynamic_shared()), a.g.channels);
  correction.fill(a);
  const int64_t n = blockIdx.x;
  const T* u = a.u.at(n);
  const T* grad_out = a.grad_out.at(n);
  T* grad_u = a.grad_u.at(n);
  const unsigned units = static_cast<unsigned>(a.g.channels) * a.g.positions / V;
  for (unsigned i = blockIdx.y * blockDim.x + threadIdx.x; i < units; i += gridDim.y * blockDim.x) {
    const Unit unit = unit_at<V>(i, a.g, a.channels_fastest);
    T* target = grad_u + a.grad_u.offset(unit.channel, unit.y, unit.x);
    Pack<T, V> grad = load_pack<V>(target);
    const Pack<T, V> outer = load_pack<V>(grad_out + a.grad_out.offset(unit.channel, unit.y, unit.x));
    const Pack<T, V> input = load_pack<V>(u + a.u.offset(unit.channel, unit.y, unit.x));
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int c = a.channels_fastest ? unit.channel + v : unit.channel;
      float sum = to_float(grad.at[v]) + correction.f[c] * to_float(outer.at[v]);
      if (a.net.training) {
        sum -= correction.constant[c] + correction.slope[c] * (to_float(input.at[v]) - correction.mean[c]);
      }
      grad.at[v] = from_float<T>(sum);
    }
    store_pack<V>(target, grad);
  }
}

template <typename T>
Plan backward_plan(const Inputs& in, const Geometry& g) {
  const int64_t vectors = ExciteBackwardVectors::kPerChannel * in.sizes.channels + kScratchFloats;
  const int64_t maps = int64_t{channel_groups(kThreads, g) + 1} * kNumBranches * g.padded;
  return plan(g, vectors, maps, sizeof(T), channels_fastest(view<const T>(in.u, in.sizes), g));
}

struct BackwardWorkspace {
  GateRecord record_layout;
  PartialGrads partial_layout;
  float* maps;
  float* records;
  float* partials;
  size_t bytes;

  BackwardWorkspace(void* base, const Inputs& in, const Plan& plan)
      : record_layout{static_cast<int>(in.sizes.channels), static_cast<int>(in.sizes.hidden())},
        partial_layout{static_cast<int>(in.sizes.channels)} {
    Arena arena(base);
    maps = arena.take<float>(plan.maps >= 0 ? 0 : in.sizes.batch * plan.map_floats);
    records = arena.take<float>(in.sizes.batch * record_layout.floats());
    partials = arena.take<float>(in.sizes.batch * partial_layout.floats());
    bytes = arena.used();
  }
};

// Where each parameter's gradient starts in the flat gradient.
struct GradLayout {
  float* at[kNumParameters];

  GradLayout(float* base, const Sizes& s) {
    for (int i = 0; i < kNumParameters; ++i) {
      at[i] = base;
      base += parameter_numel(i, s);
    }
  }
};

// Builds the list of sums over the batch that give the parameters' gradients.
class BatchSumList {
 public:
  BatchSumList(const GradLayout& grads, const Sizes& s) : grads_(grads), s_(s) {}

  void zero(Parameter which) { add(which, nullptr, 0, nullptr, 0, 1, 1.f); }

  void sum(Parameter which, const float* left, int64_t stride, float sign = 1.f) {
    add(which, left, stride, nullptr, 0, 1, sign);
  }

  // A linear map's gradients: the weight's outer products, and the bias.
  void linear(Parameter weight, Parameter bias, const float* grad, int64_t grad_stride, const float* input,
              int64_t input_stride, int64_t columns, float sign = 1.f) {
    add(weight, grad, grad_stride, input, input_stride, columns, sign);
    sum(bias, grad, grad_stride, sign);
  }

  void launch_all(int64_t batch, cudaStream_t stream) const {
    const int64_t wide = std::min<int64_t>(blocks(largest_, kThreads), 1 << 20);
    launch("batch_sums", batch_sums_kernel, dim3(static_cast<unsigned>(wide), count_), kThreads, 0, stream, sums_,
           batch);
  }

 private:
  void add(Parameter which, const float* left, int64_t left_stride, const float* right, int64_t right_stride,
           int64_t columns, float sign) {
    const int64_t elements = parameter_numel(which, s_);
    largest_ = std::max(largest_, elements);
    sums_.at[count_++] = {left, right, left_stride, right_stride, columns, elements, grads_.at[which], sign};
  }

  const GradLayout& grads_;
  const Sizes& s_;
  BatchSums sums_{};
  int64_t largest_ = 0;
  unsigned count_ = 0;
};

void launch_batch_sums(const Sizes& s, const BackwardWorkspace& w, const float* pooled, const GradLayout& grads,
                       cudaStream_t stream) {
  const GateRecord& layout = w.record_layout;
  const int64_t record = layout.floats();
  const int64_t partial = w.partial_layout.floats();
  const int64_t pooled_stride = kNumBranches * s.channels;
  const float* activation = w.records + layout.activation();
  const float* hidden_grad = w.records + layout.hidden_grad();
  const float* forget_logit = w.records + layout.vector(GateRecord::kForgetLogit);
  const float* select_logit = w.records + layout.vector(GateRecord::kSelectLogit);
  const auto part = [&](PartialGrads::Part which) { return w.partials + w.partial_layout.part(which); };

  BatchSumList list(grads, s);
  list.sum(kNorm3Weight, part(PartialGrads::kWeight3), partial);
  list.sum(kNorm3Bias, part(PartialGrads::kBias3), partial);
  list.sum(kConv3Weight, part(PartialGrads::kKernel3), partial);
  list.sum(kNorm5Weight, part(PartialGrads::kWeight5), partial);
  list.sum(kNorm5Bias, part(PartialGrads::kBias5), partial);
  list.sum(kConv5Weight, part(PartialGrads::kKernel5), partial);
  list.sum(kContext3Weight, part(PartialGrads::kContext3), partial);
  list.sum(kContext5Weight, part(PartialGrads::kContext5), partial);
  list.sum(kForgetContextWeight, part(PartialGrads::kContextForget), partial);
  // A softmax does not feel what is added to all of its logits.
  for (const Parameter bias : {kContext3Bias, kContext5Bias, kForgetContextBias}) list.zero(bias);
  list.linear(kAllWeight, kAllBias, hidden_grad + s.forget, record, pooled + s.channels, pooled_stride, 2 * s.channels);
  list.linear(kSelect3Weight, kSelect3Bias, select_logit, record, activation + s.forget, record, s.attention);
  list.linear(kSelect5Weight, kSelect5Bias, select_logit, record, activation + s.forget, record, s.attention, -1.f);
  list.linear(kForget1Weight, kForget1Bias, hidden_grad, record, pooled, pooled_stride, s.channels);
  list.linear(kForget2Weight, kForget2Bias, forget_logit, record, activation, record, s.forget);
  list.launch_all(s.batch, stream);
}

template <typename T, typename P>
void launch_gate_backward(const Inputs& in, const Geometry& g, const View<const T>& u, const View<const T>& grad_out,
                          const Network<P>& net, const Saved& saved, const BackwardWorkspace& w,
                          const GradLayout& grads, cudaStream_t stream) {
  const Sizes& s = in.sizes;
  const GateBackwardArguments<T, P> a{
      g,        net, channel_lanes(g, channels_fastest(u, g)), u, grad_out, saved.pooled, saved.hidden, w.record_layout,
      w.records};
  const size_t shared = (kThreads + s.channels) * sizeof(GradSums) + s.hidden() * sizeof(float);
  launch("gate_backward", gate_backward_kernel<T, P>, dim3(static_cast<unsigned>(s.batch)), kThreads, shared, stream,
         a);
  launch("batch_coupling", batch_coupling_kernel<P>, dim3(blocks(s.hidden(), kThreads / kWarp)), kThreads, 0, stream,
         net, saved.hidden, s.batch, w.record_layout, w.records, grads.at[kForgetNormWeight], grads.at[kForgetNormBias],
         grads.at[kAttentionNormWeight], grads.at[kAttentionNormBias]);
}

template <typename T, typename P>
void launch_input_grad(const Sizes& s, const InputGradArguments<T, P>& a, cudaStream_t stream) {
  const bool order = a.channels_fastest;
  const bool vector =
      vectorisable(a.u, a.g, order) && vectorisable(a.grad_out, a.g, order) && vectorisable(a.grad_u, a.g, order);
  const dim3 grid(static_cast<unsigned>(s.batch), stretches(a.g, vector ? kVector<T> : 1));
  launch("input_grad", vector ? input_grad_kernel<T, P, kVector<T>> : input_grad_kernel<T, P, 1>, grid, kThreads,
         4 * s.channels * sizeof(float), stream, a);
}

template <typename T, typename P>
void backward_typed(const Inputs& in, const ImageTensor& grad_out_tensor, const Saved& saved,
                    const ImageTensor& grad_u_tensor, float* grad_parameters, void* base, cudaStream_t stream) {
  const Sizes& s = in.sizes;
  const Geometry g = geometry(s);
  const View<const T> u = view<const T>(in.u, s);
  const View<const T> grad_out = view<const T>(grad_out_tensor, s);
  const View<T> grad_u = view<T>(grad_u_tensor, s);
  const Network<P> net = network<P>(in, saved);
  const Plan p = backward_plan<T>(in, g);
  const BackwardWorkspace w(base, in, p);
  const GradLayout grads(grad_parameters, s);

  launch_gate_backward(in, g, u, grad_out, net, saved, w, grads, stream);
  const ExciteBackwardArguments<T, P> a{g,
                                        net,
                                        p,
                                        u,
                                        traversal(u, g),
                                        w.maps,
                                        saved.position,
                                        w.record_layout,
                                        w.records,
                                        w.partial_layout,
                                        w.partials,
                                        grad_u,
                                        traversal(grad_u, g)};
  launch("excite_backward", p.tile >= 0 ? excite_backward_kernel<T, P, true> : excite_backward_kernel<T, P, false>,
         dim3(static_cast<unsigned>(s.batch)), kThreads, p.bytes, stream, a);
  launch_batch_sums(s, w, saved.pooled, grads, stream);
  launch_input_grad(s,
                    InputGradArguments<T, P>{g,
                                             net,
                                             s.batch,
                                             u,
                                             grad_out,
                                             grad_u,
                                             channels_fastest(grad_u, g),
                                             w.records + w.record_layout.vector(GateRecord::kF),
                                             w.record_layout.floats(),
                                             {grads.at[kNorm3Weight], grads.at[kNorm5Weight]},
                                             {grads.at[kNorm3Bias], grads.at[kNorm5Bias]}},
                    stream);
}

}  // namespace

size_t backward_workspace_bytes(const Inputs& in) {
  size_t bytes = 0;
  dispatch(in, [&](auto element, auto) {
    using T = typename decltype(element)::type;
    bytes = BackwardWorkspace(nullptr, in, backward_plan<T>(in, geometry(in.sizes))).bytes;
  });
  return bytes;
}

void backward(const Inputs& in, const ImageTensor& grad_out, const Saved& saved, const ImageTensor& grad_u,
              float* grad_parameters, void* workspace, cudaStream_t stream) {
  dispatch(in, [&](auto element, auto parameter) {
    using T = typename decltype(element)::type;
    using P = typename decltype(parameter)::type;
    backward_typed<T, P>(in, grad_out, saved, grad_u, grad_parameters, workspace, stream);
  });
}

}  // namespace pyext::gated_excitation
