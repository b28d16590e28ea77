// A whole block on one image after another: modules in order, all channels of the image in cache.
#pragma once

#include <algorithm>

#include "cpu/gated_excitation/forward.h"
#include "cpu/hybrid_block.h"
#include "cpu/hybrid_block/squeeze.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

namespace hb = hybrid_block;

template <typename T>
struct Module {
  Cell<T> cell;
  GatedExcitation gates_args;
  Call<T>* call;
  Gates<T>* gates;
};

// Memory of one image in work, and of the threads that work on it.
template <typename T>
struct BlockScratch {
  T* maps;      // channels of the input or, of a dense block, of the output
  T* squeezed;  // planes
  T* u;
  T* result;  // of a block that is not dense
  ForwardScratch<T> gates;
  T* strips;  // one of strip_size per thread
  int64_t strip_size;
  T* tiles;  // of the 3x3 convolution, one of tiles_size per thread
  int64_t tiles_size;

  void carve(Arena& arena, const BlockSizes& s, int64_t planes_size, int64_t strip_lanes, const Call<T>& call,
             int64_t threads, bool tiled, int64_t sums_elements) {
    maps = arena.take<T>((s.dense ? s.out_channels() : s.channels) * round_up<T>(s.positions()));
    squeezed = arena.take<T>(planes_size);
    u = arena.take<T>(s.growth * call.pitch);
    result = arena.take<T>(s.dense ? 0 : s.growth * call.pitch);
    gates.carve(arena, call);
    strip_size = strips_size<T>(strip_lanes);
    strips = arena.take<T>(threads * strip_size);
    tiles_size = tiled ? TileScratch<T>::elements(s.squeeze / s.groups, s.growth / s.groups) : sums_elements;
    tiles = arena.take<T>(threads * tiles_size);
  }
};

// S: the map's elements. L: what lanes of the convolutions' factors hold.
template <typename S, typename L>
class Block {
  using T = Accumulate<S>;

 public:
  Block(const HybridBlock& args, const Host& host)
      : args_(args),
        host_(host),
        s_(args.sizes),
        tiles_(s_.height, s_.width),
        tiled_(L::kDepth == 1 && prefers_tiles<T>(s_, tiles_)),
        planes_(tiled_ ? tiles_.planes : Planes(s_)),
        pitch_(round_up<T>(s_.positions())) {
    modules_ = static_cast<Module<T>*>(host.shared(host.self, s_.modules * sizeof(Module<T>)));
    for (int64_t m = 0; m < s_.modules; ++m) prepare(m);
    if (tiled_) prepare_tiles();
  }

  void forward() {
    // Fewer images than threads: all threads work on one image.
    if (s_.batch < host_.threads) {
      const BlockScratch<T> scratch = carve(host_.threads);
      for (int64_t n = 0; n < s_.batch; ++n) run_image(n, scratch, host_.threads);
      return;
    }
    parallel(host_, host_.threads, [&](int64_t thread) {
      const BlockScratch<T> scratch = carve(1);
      const Range images = part_of(s_.batch, host_.threads, thread);
      for (int64_t n = images.begin; n < images.end; ++n) run_image(n, scratch, 1);
    });
  }

 private:
  const T* tensor(int64_t module, int index) const {
    const int64_t at = module * hb::kNumTensors + index;
    return as_accumulate<T>(host_, args_.tensors[at], args_.tensor_dtypes[at], hb::tensor_numel(index, s_, module));
  }

  const T* weight(int64_t module, int index) const {
    if constexpr (L::kDepth == 1) return tensor(module, index);
    return static_cast<const T*>(args_.tensors[module * hb::kNumTensors + index]);
  }

  Norm<T> norm(int64_t module, int first, int64_t channels) const {
    const T *weight = tensor(module, first), *var = tensor(module, first + 3);
    T* scale = shared<T>(host_, channels);
    for (int64_t c = 0; c < channels; ++c) scale[c] = weight[c] / std::sqrt(var[c] + static_cast<T>(args_.eps));
    return {tensor(module, first + 2), tensor(module, first + 1), scale};
  }

  void prepare(int64_t m) {
    Module<T>& module = *new (modules_ + m) Module<T>{};
    module.cell = {norm(m, hb::kNorm1Weight, s_.inputs(m)),
                   norm(m, hb::kNorm2Weight, s_.squeeze),
                   weight(m, hb::kConv1Weight),
                   weight(m, hb::kConv2Weight),
                   nullptr,
                   s_.inputs(m)};
    GatedExcitation& gates = module.gates_args;
    gates.sizes = s_.gates();
    gates.dtype = gates.parameter_dtype = gates.running_dtype =
        std::is_same_v<T, double> ? DType::kDouble : DType::kFloat;
    gates.eps = args_.eps;
    for (int k = 0; k < kNumParameters; ++k) gates.parameters[k] = tensor(m, hb::kGateParameters + k);
    for (int k = 0; k < kNumRunning; ++k) gates.running[k] = tensor(m, hb::kGateRunning + k);
    module.call = new (host_.shared(host_.self, sizeof(Call<T>))) Call<T>(begin_call<T>(gates, host_));
    prepare_channels(*module.call);
    module.gates = new (host_.shared(host_.self, sizeof(Gates<T>))) Gates<T>(prepare_gates(*module.call));
    prepare_hidden_norm(*module.call, *module.gates);
  }

  void prepare_tiles() {
    const int64_t kernels = s_.growth / s_.groups * (s_.squeeze / s_.groups);
    for (int64_t m = 0; m < s_.modules; ++m) modules_[m].cell.tiled = shared<T>(host_, kPlaces * kernels * s_.groups);
    parallel(host_, s_.modules * s_.groups, [&](int64_t task) {
      const Cell<T>& cell = modules_[task / s_.groups].cell;
      const int64_t group = task % s_.groups;
      transform_kernels(cell.conv2 + group * kernels * kTaps, kernels, cell.tiled + group * kernels * kPlaces);
    });
  }

  BlockScratch<T> carve(int64_t threads) const {
    // Tiles read on behind the last plane.
    const int64_t planes_size = s_.groups * group_lanes<L>(s_) * planes_.channel + kMostVectors * kLanes<T>;
    const int64_t strip_lanes = L::lanes(s_.inputs(s_.modules - 1));
    // A thread that has some of the rows needs no more.
    const auto parts = ConvolutionParts::of<T>(s_, planes_, group_lanes<L>(s_), s_.out_height());
    const int64_t sums_elements = tiled_ ? 0 : sums_size<T>(planes_, parts, s_.growth / s_.groups);
    auto scratch = carve_scratch<BlockScratch<T>>(host_, s_, planes_size, strip_lanes, *modules_->call, threads, tiled_,
                                                  sums_elements);
    // The planes' margins, and what vectors read behind the last position.
    std::memset(scratch.squeezed, 0, planes_size * sizeof(T));
    std::memset(scratch.u, 0, s_.growth * modules_->call->pitch * sizeof(T));
    return scratch;
  }

  Extent extent(int64_t channels) const { return {channels, s_.height, s_.width}; }
  Extent out_extent() const { return {s_.out_channels(), s_.out_height(), s_.out_width()}; }

  void run_image(int64_t n, const BlockScratch<T>& scratch, int64_t threads) const {
    if (s_.dense) return run_dense(n, scratch, threads);
    const Image<const T> x = load_image<S>(args_.x, n, s_.batch, extent(s_.channels), scratch.maps);
    const int64_t pitch = modules_->call->pitch;
    run_module(*modules_, x, scratch, Image<T>{scratch.result, pitch}, threads);
    store_image<S>(Image<const T>{scratch.result, pitch}, args_.out, n, out_extent());
  }

  void run_dense(int64_t n, const BlockScratch<T>& scratch, int64_t threads) const {
    Image<T> maps{scratch.maps, pitch_};
    bool direct = false;
    if constexpr (std::is_same_v<S, T>) {
      direct = is_image<S>(args_.out, out_extent());
      if (direct) maps = {image_data<S>(args_.out, n), args_.out.stride[1]};
    }
    copy_input(n, maps);
    for (int64_t m = 0; m < s_.modules; ++m) {
      const Image<T> to{maps.row(s_.inputs(m)), maps.pitch};
      run_module(modules_[m], Image<const T>{maps.data, maps.pitch}, scratch, to, threads);
    }
    if (!direct) store_image<S>(Image<const T>{maps.data, maps.pitch}, args_.out, n, out_extent());
  }

  void copy_input(int64_t n, const Image<T>& maps) const {
    const Image<const T> x = load_image<S>(args_.x, n, s_.batch, extent(s_.channels), maps.data);
    for (int64_t c = 0; c < s_.channels && x.data != maps.data; ++c) {
      std::memcpy(maps.row(c), x.row(c), s_.positions() * sizeof(T));
    }
  }

  void run_module(const Module<T>& module, const Image<const T>& x, const BlockScratch<T>& scratch, const Image<T>& to,
                  int64_t threads) const {
    const Image<T> u{scratch.u, module.call->pitch};
    if (threads <= s_.groups) {
      squeeze_by_groups(module.cell, x, scratch, u, threads);
    } else {
      squeeze_by_positions(module.cell, x, scratch, u, threads);
    }
    const Image<const T> map{u.data, u.pitch};
    pool_image(*module.call, *module.gates, 0, map, scratch.gates);
    gate_vectors(*module.call, *module.gates, scratch.gates.gates);
    apply_gates(map, scratch.gates.gates, to);
  }

  // A thread has groups of its own: what lies between the convolutions stays in its cache, and nobody waits for it.
  void squeeze_by_groups(const Cell<T>& cell, const Image<const T>& x, const BlockScratch<T>& scratch,
                         const Image<T>& u, int64_t threads) const {
    parallel(host_, threads, [&](int64_t thread) {
      const Range groups = part_of(s_.groups, threads, thread);
      squeeze_strips<T, L>(s_, cell, planes_, x, {0, strip_count<T>(s_)}, groups,
                           scratch.strips + thread * scratch.strip_size, scratch.squeezed);
      convolve(cell, scratch, groups, 1, 0, thread, u);
    });
  }

  // A thread has rows of its own; the 3x3 convolution reads some of its neighbours'.
  void squeeze_by_positions(const Cell<T>& cell, const Image<const T>& x, const BlockScratch<T>& scratch,
                            const Image<T>& u, int64_t threads) const {
    parallel(host_, threads, [&](int64_t thread) {
      squeeze_strips<T, L>(s_, cell, planes_, x, part_of(strip_count<T>(s_), threads, thread), {0, s_.groups},
                           scratch.strips + thread * scratch.strip_size, scratch.squeezed);
    });
    parallel(host_, threads,
             [&](int64_t thread) { convolve(cell, scratch, {0, s_.groups}, threads, thread, thread, u); });
  }

  // Part `part` of `parts` of the rows of the 3x3 convolution's groups, by `thread`.
  void convolve(const Cell<T>& cell, const BlockScratch<T>& scratch, Range groups, int64_t parts, int64_t part,
                int64_t thread, const Image<T>& u) const {
    if constexpr (L::kDepth == 1) {
      if (tiled_) {
        const TileScratch<T> own(scratch.tiles + thread * scratch.tiles_size, s_.squeeze / s_.groups,
                                 s_.growth / s_.groups);
        return convolve_groups_by_tiles(s_, cell, tiles_, scratch.squeezed, groups, part_of(tiles_.rows, parts, part),
                                        own, u);
      }
    }
    convolve_groups<T, L>(s_, cell, planes_, scratch.squeezed, groups, part_of(s_.out_height(), parts, part), u,
                          scratch.tiles + thread * scratch.tiles_size);
  }

  void apply_gates(const Image<const T>& u, const GateVectors<T>& v, const Image<T>& to) const {
    for (int64_t c = 0; c < s_.growth; ++c) {
      for (int64_t p = 0; p < u.pitch; p += kLanes<T>) {
        store<T>(to.row(c) + p, load<T>(u.row(c) + p) * v.forget[c] + v.added[c]);
      }
    }
  }

  const HybridBlock& args_;
  const Host& host_;
  const BlockSizes& s_;
  const Tiles tiles_;
  const bool tiled_;  // whether the 3x3 convolution is done by tiles
  const Planes planes_;
  const int64_t pitch_;
  Module<T>* modules_;
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
