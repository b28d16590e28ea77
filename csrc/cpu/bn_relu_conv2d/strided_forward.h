// The forward pass of the 3x3 convolution of stride two by strided_winograd.h.
#pragma once

#include "cpu/bn_relu_conv2d/strided_winograd.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

template <typename T>
class StridedForward {
 public:
  StridedForward(const BNReLUConv2d& args, const Host& host)
      : call_(args, host), tiles_(call_.s), weight_(shared<T>(host, kAllTerms * pairs())) {}

  // Whether all results are finite.
  bool run() const {
    const Host& host = call_.host;
    parallel_parts(host, product_tiles(call_.s.out_channels), [&](Range tiles) {
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) pack_weight(tile);
    });
    bool* finite = shared<bool>(host, host.threads);
    std::fill_n(finite, host.threads, true);
    parallel_ranges(host, call_.s.batch, [&](Range images, int64_t task) {
      const auto memory = carve_scratch<Memory>(host, *this);
      Vec<T> all{};
      tiles_.visit_strips(images, [&](Range strip) { all += run_strip(strip, memory); });
      finite[task] = sum_lanes<T>(all) == 0;
    });
    return std::all_of(finite, finite + host.threads, [](bool own) { return own; });
  }

 private:
  struct Memory {
    T* planes;  // of one channel
    T* terms;   // panels of terms x input channels
    T* sums;    // sums x output channels x tiles
    int64_t sums_pitch;

    void carve(Arena& arena, const StridedForward& of) {
      const ConvolutionSizes& s = of.call_.s;
      sums_pitch = of.tiles_.most();
      planes = arena.take<T>(kAllTerms * of.tiles_.pitch);
      terms = arena.take<T>(kAllTerms * s.in_channels * of.tiles_.most());
      sums = arena.take<T>(kAllSums * s.out_channels * sums_pitch);
    }
  };

  int64_t pairs() const { return call_.s.in_channels * call_.s.out_channels; }
  // The weight of the output channels from `channel` on, which begin a tile: places of the sum x input channels x
  // channels of the tile.
  T* weight(int sum, int64_t channel) const {
    return weight_ + first_place(sum) * pairs() + places_of(sum) * call_.s.in_channels * channel;
  }

  void pack_weight(int64_t tile) const {
    const int64_t inputs = call_.s.in_channels, outputs = call_.s.out_channels;
    const Range own = product_rows(outputs, tile);
    const int64_t count = own.end - own.begin;
    T* to[kAllTerms];
    for (int sum = 0; sum < kAllSums; ++sum) {
      for (int k = 0; k < places_of(sum); ++k) to[first_place(sum) + k] = weight(sum, own.begin) + k * inputs * count;
    }
    for (int64_t o = own.begin; o < own.end; ++o) {
      for (int64_t i = 0; i < inputs; ++i) {
        T kernel[kTaps], kernels[kAllKernels];
        std::memcpy(kernel, call_.weight() + (o * inputs + i) * kTaps, sizeof(kernel));
        make_kernels(kernel, kernels);
#pragma GCC unroll 25
        for (int k = 0; k < kAllTerms; ++k) to[k][i * count + o - own.begin] = kernels[kPlaceKernels.kernel[k]];
      }
    }
  }

  // Returns zeros, or a NaN where a result is not finite.
  Vec<T> run_strip(Range strip, const Memory& memory) const {
    const int64_t inputs = call_.s.in_channels, count = round_up<T>(tiles_.tiles(strip)), pitch = tiles_.pitch;
    const StripPanels<T> terms{memory.terms, kAllTerms * inputs, count};
    for (int64_t c = 0; c < inputs; ++c) {
      gather_input(call_, tiles_, strip, c, memory.planes);
      for (int64_t t = 0; t < count; t += kLanes<T>) {
        T* to = terms.at(c, t);
        const int64_t place = inputs * terms.width(t);
        make_terms<T>([&](int i, int j) { return load<T>(memory.planes + (i * kTerms + j) * pitch + t); },
                      [&](int row, int column, Vec<T> v) { store<T>(to + term_place(row, column) * place, v); });
      }
    }
    for (int sum = 0; sum < kAllSums; ++sum) {
      visit_tiles(call_.s.out_channels, {0, product_tiles(call_.s.out_channels)}, [&](auto rows, int64_t channel) {
        multiply_packed<decltype(rows)::value>(
            weight(sum, channel), terms, first_place(sum) * inputs, places_of(sum) * inputs,
            memory.sums + (sum * call_.s.out_channels + channel) * memory.sums_pitch, memory.sums_pitch);
      });
    }
    return write_results(strip, memory);
  }

  Vec<T> write_results(Range strip, const Memory& memory) const {
    const Map& out = call_.args.out;
    const int64_t count = round_up<T>(tiles_.tiles(strip)), place = call_.s.out_channels * memory.sums_pitch;
    Vec<T> all{};
    for (int64_t o = 0; o < call_.s.out_channels; ++o) {
      const T* sums = memory.sums + o * memory.sums_pitch;
      for (int64_t t = 0; t < count; t += kLanes<T>) {
        make_results<T>([&](int i, int j) { return load<T>(sums + (kSums * i + j) * place + t); },
                        [&](int i, int j, Vec<T> v) {
                          store<T>(memory.planes + (kResultRows * i + j) * tiles_.pitch + t, v);
                          all += v * 0;
                        });
      }
      tiles_.visit_rows(strip, [&](int64_t n, int64_t tile_row, int64_t tile) {
        for (int i = 0; i < kResultRows; ++i) {
          const int64_t y = tile_row * kResultRows + i;
          if (y >= tiles_.out_height) continue;
          const T* from = memory.planes + kResultRows * i * tiles_.pitch + tile;
          join_row(from, from + tiles_.pitch, image_data<T>(out, n) + o * out.stride[1] + y * tiles_.out_width,
                   tiles_.out_width);
        }
      });
    }
    return all;
  }

  Convolution<T> call_;
  StridedTiles<T> tiles_;
  T* weight_;
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
