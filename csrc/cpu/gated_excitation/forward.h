// Forward pass: one sweep over the images in evaluation; statistics, pooling and output in training.
#pragma once

#include "cpu/gated_excitation/gates.h"
#include "cpu/gated_excitation/position.h"
#include "cpu/gated_excitation/statistics.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

template <typename T>
struct ForwardScratch {
  T* image;
  T* result;
  T* forget;  // exponentials of the forget logits
  T* tops;    // of every strip, the highest logit when its exponentials were taken
  Strip<T> strip;
  GateVectors<T> gates;
  Vec<T>* sums;
  void carve(Arena& arena, const Call<T>& call) {
    const Sizes& s = call.sizes;
    image = arena.take<T>(s.channels * call.pitch);
    result = arena.take<T>(s.channels * call.pitch);
    forget = arena.take<T>(call.pitch);
    tops = arena.take<T>(s.height);
    strip.carve(arena, s);
    gates.carve(arena, call);
    sums = arena.take<Vec<T>>(s.channels);
  }
};

// to[i] = from[i] * factor.
template <typename T>
void scale(const T* from, int64_t count, T factor, T* to) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store<T>(to + i, load<T>(from + i) * factor);
  for (; i < count; ++i) to[i] = from[i] * factor;
}

// c_f of one image; its position probabilities go to `saved` unless that is null.
template <typename T>
void pool_forget(const Call<T>& call, const Image<const T>& u, const ForwardScratch<T>& scratch, T* saved) {
  const Sizes& s = call.sizes;
  Pooling<T> pooling{scratch.sums};
  pool_strip(u.data, u.pitch, s.channels, call.parameters[kForgetContextWeight], s.positions(), scratch.forget,
             pooling);
  const T inverse = finish_pooling(pooling, s.channels, scratch.gates.pooled + kForget * call.channel_pitch);
  if (saved) scale(scratch.forget, s.positions(), inverse, saved);
}

// c_3 (B = 0) or c_5 (B = 1) of one image, and its position probabilities as above.
template <typename T, int B>
void pool_branch(const Call<T>& call, const Image<const T>& u, const ForwardScratch<T>& scratch, T* saved) {
  const Sizes& s = call.sizes;
  const Strip<T>& strip = scratch.strip;
  const T* w = call.parameters[B ? kContext5Weight : kContext3Weight];
  Pooling<T> pooling{scratch.sums};
  T* tops = scratch.tops;
  for_each_strip<T, B>(call, u, strip, [&](int64_t first, int64_t count) {
    pool_strip(strip.maps, strip.pitch, s.channels, w, count, strip.weights, pooling);
    *tops++ = pooling.top;
    if (saved) std::memcpy(saved + first, strip.weights, count * sizeof(T));
  });
  const T inverse = finish_pooling(pooling, s.channels, scratch.gates.pooled + (kMix3 + B) * call.channel_pitch);
  const int64_t length = strip.rows * s.width;
  for (int64_t first = 0; saved && first < s.positions(); first += length) {
    const int64_t count = first + length < s.positions() ? length : s.positions() - first;
    const T factor = std::exp(scratch.tops[first / length] - pooling.top) * inverse;
    scale(saved + first, count, factor, saved + first);
  }
}

// Pooled vectors and hidden vectors of image n, and its position probabilities where they are saved.
template <typename T>
void pool_image(const Call<T>& call, const Gates<T>& gates, int64_t n, const Image<const T>& u,
                const ForwardScratch<T>& scratch) {
  const int64_t positions = call.sizes.positions();
  T* saved = static_cast<T*>(call.args.position);
  const auto map = [&](int branch) { return saved ? saved + (n * kNumBranches + branch) * positions : nullptr; };
  pool_forget(call, u, scratch, map(kForget));
  pool_branch<T, 0>(call, u, scratch, map(kMix3));
  pool_branch<T, 1>(call, u, scratch, map(kMix5));
  hidden_vectors(call, gates, scratch.gates);
}

// Copies between the padded vectors of one image and row n of the caller's dense tensors; direction by `copy`.
template <typename T, typename Copy>
void saved_vectors(const Call<T>& call, int64_t n, const GateVectors<T>& v, Copy copy) {
  const Sizes& s = call.sizes;
  T* pooled = static_cast<T*>(call.args.pooled) + n * kNumBranches * s.channels;
  T* hidden = static_cast<T*>(call.args.hidden) + n * s.hidden();
  for (int b = 0; b < kNumBranches; ++b) copy(pooled + b * s.channels, v.pooled + b * call.channel_pitch, s.channels);
  copy(hidden, v.hidden, s.forget);
  copy(hidden + s.forget, v.hidden + call.forget_pitch, s.attention);
}

template <typename T>
void save_vectors(const Call<T>& call, int64_t n, const GateVectors<T>& v) {
  if (!call.args.pooled) return;
  saved_vectors(call, n, v,
                [](T* saved, const T* local, int64_t count) { std::memcpy(saved, local, count * sizeof(T)); });
}

template <typename T>
void restore_vectors(const Call<T>& call, int64_t n, const GateVectors<T>& v) {
  std::memset(v.pooled, 0, kNumBranches * call.channel_pitch * sizeof(T));
  std::memset(v.hidden, 0, call.hidden_pitch * sizeof(T));
  saved_vectors(call, n, v,
                [](const T* saved, T* local, int64_t count) { std::memcpy(local, saved, count * sizeof(T)); });
}

// f * u + n of one image, straight into the tensor where its memory is an image, else by way of `scratch`.
template <typename S, typename T>
void write_output(const Call<T>& call, int64_t n, const Image<const T>& u, const GateVectors<T>& v, T* scratch) {
  const Map& out = call.args.out;
  Image<T> to{scratch, call.pitch};
  bool direct = false;
  if constexpr (std::is_same_v<S, T>) {
    direct = is_image<S>(out, call.extent);
    if (direct) to = {image_data<S>(out, n), out.stride[1]};
  }
  for (int64_t c = 0; c < call.sizes.channels; ++c) {
    const T* from = u.row(c);
    T* row = to.row(c);
    for (int64_t p = 0; p < call.pitch; p += kLanes<T>) store<T>(row + p, load<T>(from + p) * v.forget[c] + v.added[c]);
  }
  if (!direct) store_image<S>(Image<const T>{to.data, to.pitch}, out, n, call.extent);
}

template <typename S>
void forward(const GatedExcitation& args, const Host& host) {
  using T = Accumulate<S>;
  Call<T> call = begin_call<T>(args, host);
  const Sizes& s = call.sizes;
  if (args.training) map_statistics<S>(call);
  prepare_channels(call);
  Gates<T> gates = prepare_gates(call);
  if (!args.training) prepare_hidden_norm(call, gates);
  parallel_images(host, s.batch, [&](int64_t n) {
    const auto scratch = carve_scratch<ForwardScratch<T>>(host, call);
    const Image<const T> u = load_image<S>(args.u, n, s.batch, call.extent, scratch.image);
    pool_image(call, gates, n, u, scratch);
    save_vectors(call, n, scratch.gates);
    if (args.training) return;
    gate_vectors(call, gates, scratch.gates);
    write_output<S>(call, n, u, scratch.gates, scratch.result);
  });
  if (!args.training) return;
  hidden_statistics(call);
  prepare_hidden_norm(call, gates);
  parallel_images(host, s.batch, [&](int64_t n) {
    const auto scratch = carve_scratch<ForwardScratch<T>>(host, call);
    const Image<const T> u = load_image<S>(args.u, n, s.batch, call.extent, scratch.image);
    restore_vectors(call, n, scratch.gates);
    gate_vectors(call, gates, scratch.gates);
    write_output<S>(call, n, u, scratch.gates, scratch.result);
  });
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
