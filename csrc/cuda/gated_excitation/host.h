// What the launchers of forward and backward share: tensors and sizes as kernels want them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/gated_excitation.h"
#include "cuda/gated_excitation/lanes.h"
#include "cuda/gated_excitation/plan.h"
#include "cuda/gated_excitation/tile.h"

namespace pyext::gated_excitation {

using namespace pyext::cuda;

inline Geometry geometry(const Sizes& s) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  constexpr int64_t kBorder = 2 * Geometry::kHalo;
  require(s.batch < kLimit, "a batch must have fewer than 2^31 images");
  require(s.channels * s.positions() < kLimit, "one image must have fewer than 2^31 elements");
  // Maps of all groups and branches are indexed with int; groups exist only where maps are tiny.
  require(kNumBranches * (s.height + kBorder) * (s.width + kBorder) < kLimit / 2, "the map has too many positions");
  Geometry g;
  g.channels = static_cast<int>(s.channels);
  g.height = static_cast<int>(s.height);
  g.width = static_cast<int>(s.width);
  g.positions = g.height * g.width;
  g.pitch = g.width + static_cast<int>(kBorder);
  g.padded = (g.height + static_cast<int>(kBorder)) * g.pitch;
  return g;
}

// Strides of dimensions of extent one are arbitrary in torch; here they become what makes the rest look dense.
template <typename T>
View<T> view(const ImageTensor& tensor, const Sizes& s) {
  View<T> v{static_cast<T*>(tensor.data), tensor.strides[0], tensor.strides[1], tensor.strides[2], tensor.strides[3]};
  if (s.batch == 1) v.image = 0;
  if (s.channels == 1) v.channel = 0;
  if (s.width == 1) v.column = s.height == 1 ? 0 : v.row;
  if (s.height == 1) v.row = s.width * v.column;
  return v;
}

template <typename T>
bool channels_fastest(const View<T>& v, const Geometry& g) {
  return g.channels > 1 && (g.positions == 1 || v.channel < v.column);
}

// Whether 16-byte accesses along the fastest dimension are possible.
template <typename T>
bool vectorisable(const View<T>& v, const Geometry& g, bool channels_fastest) {
  constexpr int kElements = kVector<T>;
  if (reinterpret_cast<uintptr_t>(v.data) % 16 != 0 || v.image % kElements != 0) return false;
  if (channels_fastest) {
    return v.channel == 1 && g.channels % kElements == 0 && v.row % kElements == 0 && v.column % kElements == 0;
  }
  return v.column == 1 && v.row == g.width && g.positions % kElements == 0 && v.channel % kElements == 0;
}

template <typename T>
Traversal traversal(const View<T>& v, const Geometry& g) {
  const bool order = channels_fastest(v, g);
  return {order, vectorisable(v, g, order)};
}

template <typename P>
Network<P> network(const Inputs& in, const Saved& saved) {
  Network<P> net;
  for (int i = 0; i < kNumParameters; ++i) net.parameter[i] = static_cast<const P*>(in.parameters[i]);
  for (int i = 0; i < kNumRunning; ++i) net.running[i] = static_cast<const P*>(in.running[i]);
  net.map_statistics = saved.map_statistics;
  net.hidden_statistics = saved.hidden_statistics;
  net.channels = static_cast<int>(in.sizes.channels);
  net.forget = static_cast<int>(in.sizes.forget);
  net.attention = static_cast<int>(in.sizes.attention);
  net.eps = in.eps;
  net.training = in.training != 0;
  return net;
}

// Gives out stretches of the workspace, 16-byte aligned; from a null base it measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<unsigned char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    unsigned char* address = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 15) / 16 * 16;
    return reinterpret_cast<T*>(address);
  }

  size_t used() const { return used_; }

 private:
  unsigned char* base_;
  size_t used_ = 0;
};

// Blocks per image of an element-wise kernel.
inline unsigned stretches(const Geometry& g, int vector) {
  constexpr int64_t kUnitsPerThread = 4;
  constexpr int64_t kMaxGridY = 65535;
  const int64_t units = int64_t{g.channels} * g.positions / vector;
  const int64_t per_block = kUnitsPerThread * kThreads;
  return static_cast<unsigned>(std::min((units + per_block - 1) / per_block, kMaxGridY));
}

inline unsigned blocks(int64_t work, int64_t per_block) {
  return static_cast<unsigned>((work + per_block - 1) / per_block);
}

template <typename T>
struct Type {
  using type = T;
};

// Calls function(Type<T>, Type<P>) for the element type of u and that of the parameters.
template <typename Function>
inline void dispatch(const Inputs& in, Function function) {
  const bool wide = in.parameter_dtype == Dtype::kFloat;
  require(wide || in.parameter_dtype == in.dtype, "parameters must be float32 or of u's dtype");
  if (in.dtype == Dtype::kFloat) {
    function(Type<float>{}, Type<float>{});
  } else if (in.dtype == Dtype::kBFloat16) {
    wide ? function(Type<__nv_bfloat16>{}, Type<float>{}) : function(Type<__nv_bfloat16>{}, Type<__nv_bfloat16>{});
  } else {
    wide ? function(Type<__half>{}, Type<float>{}) : function(Type<__half>{}, Type<__half>{});
  }
}

}  // namespace pyext::gated_excitation
