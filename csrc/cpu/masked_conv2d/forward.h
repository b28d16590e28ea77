// The forward pass: units of work are some images of one sub-network, whose planes are made once.
#pragma once

#include "cpu/masked_conv2d/frame.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// Vectors x Outputs results: to[o * to_pitch + v * kLanes], from the planes of `inputs` channels and their panel, by
// the taps [own.begin, own.end) of all; added to what is there unless they are the first. With Fetch, the weights that
// lie `ahead` elements behind these are fetched from memory meanwhile.
template <int Vectors, int Outputs, bool Fetch, typename T>
inline void masked_tile(const T* planes, int64_t channel, const int64_t* vector, const int64_t* tap, int64_t taps,
                        Range own, const T* panel, int64_t ahead, int64_t inputs, bool first, T* to, int64_t to_pitch) {
  Vec<T> sum[Outputs][Vectors];
#pragma GCC unroll 8
  for (int o = 0; o < Outputs; ++o) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[o][v] = first ? Vec<T>{} : load<T>(to + o * to_pitch + v * kLanes<T>);
  }
  for (int64_t i = 0; i < inputs; ++i, planes += channel, panel += taps * Outputs) {
    for (int64_t k = own.begin; k < own.end; ++k) {
      if constexpr (Fetch) __builtin_prefetch(panel + k * Outputs + ahead, 0, 2);
      Vec<T> positions[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) positions[v] = load_once<T>(planes + tap[k] + vector[v]);
#pragma GCC unroll 8
      for (int o = 0; o < Outputs; ++o) {
        const Vec<T> factor = in_register<T>(splat<T>(panel[k * Outputs + o]));
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[o][v] += factor * positions[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < Outputs; ++o) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store<T>(to + o * to_pitch + v * kLanes<T>, sum[o][v]);
  }
}

// Inputs whose planes in a strip and whose panel stay in the first-level cache together.
template <typename T>
inline int64_t inputs_at_once(const MaskedSizes& s, const Frame<T>& frame) {
  constexpr int64_t kBytes = 24 * 1024;
  const int64_t rows = std::min(frame.plane / frame.pitch, frame.strip_rows + s.rows.kernel * s.rows.dilation);
  const int64_t elements = rows * frame.pitch * (frame.channel / frame.plane) + s.taps() * kTileOutputs;
  return std::max<int64_t>(kBytes / static_cast<int64_t>(elements * sizeof(T)), 4);
}

// The block's results in a strip of `vectors` whose first row is `top`; `ahead`: from its panel to that of the block
// which is computed next, 0 if there is none.
template <typename T>
inline void masked_block(const MaskedSizes& s, const Frame<T>& frame, const Walk<T>& walk, const Block& block,
                         int64_t top, const T* planes, const T* panel, int64_t ahead, int64_t vectors, T* to,
                         int64_t to_pitch) {
  const int64_t most = inputs_at_once(s, frame), parts = std::max<int64_t>((block.inputs + most - 1) / most, 1);
  with_constant<kTileOutputs>(block.count, [&](auto outputs) {
    constexpr int kOutputs = decltype(outputs)::value, kVectors = tile_vectors(kOutputs);
    for (int64_t part = 0; part < parts; ++part) {
      const Range inputs = part_of(block.inputs, parts, part);
      const T* from = planes + inputs.begin * frame.channel;
      const T* weights = panel + inputs.begin * s.taps() * kOutputs;
      for (int64_t v = 0; v < vectors; v += kVectors) {
        const int64_t most_vectors = std::min<int64_t>(vectors - v, kVectors);
        const Range taps = walk.taps_inside(s, top + walk.row[v].begin, top + walk.row[v + most_vectors - 1].end);
        with_constant<kVectors>(most_vectors, [&](auto count) {
          const auto tile = [&](auto fetch) {
            masked_tile<decltype(count)::value, kOutputs, decltype(fetch)::value>(
                from, frame.channel, walk.vector + v, walk.tap, s.taps(), taps, weights, ahead,
                inputs.end - inputs.begin, part == 0, to + v * kLanes<T>, to_pitch);
          };
          v == 0 && ahead != 0 ? tile(std::true_type()) : tile(std::false_type());
        });
      }
    }
  });
}

// The larger of two numbers, NaN where one is, as torch's max-pool has it.
template <typename T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
  return (a > b) | (a != a) ? a : b;
}
template <typename T>
inline T larger(T a, T b) {
  return a > b || a != a ? a : b;
}

// Below so many operations a second thread takes longer to start than it saves.
constexpr int64_t kWorthThreads = 600000;

// The maps of some images: that of order[i] is number places[i] of `maps`.
struct Images {
  Map maps;
  const int64_t* places;

  template <typename S>
  S* image(int64_t i) const {
    return static_cast<S*>(maps.data) + places[i] * maps.stride[0];
  }
};
struct Ends {
  Images x, out;
};

// Images in the order of their sub-networks, in groups of one sub-network each.
struct Groups {
  struct Group {
    int64_t subnet, first, images;  // order[first] to order[first + images - 1]
  };
  int64_t* order;
  Group* all;
  int64_t count = 0;

  // Groups of nearly equal sizes, of at most `most` images and for all threads, where a sub-network has enough.
  Groups(const MaskedConv2d& args, int64_t most, int64_t threads, const Host& host) {
    const MaskedSizes& s = args.sizes;
    order = shared<int64_t>(host, s.batch);
    all = shared<Group>(host, s.batch);
    int64_t *start = shared_zeros<int64_t>(host, s.subnets + 1), *next = shared<int64_t>(host, s.subnets);
    const auto subnet = [&](int64_t n) { return args.image_subnets == nullptr ? 0 : args.image_subnets[n]; };
    for (int64_t n = 0; n < s.batch; ++n) ++start[subnet(n) + 1];
    for (int64_t i = 0; i < s.subnets; ++i) start[i + 1] += start[i];
    std::copy(start, start + s.subnets, next);
    for (int64_t n = 0; n < s.batch; ++n) order[next[subnet(n)]++] = n;
    for (int64_t i = 0; i < s.subnets; ++i) {
      const int64_t images = start[i + 1] - start[i];
      const int64_t parts = std::max((images + most - 1) / most, (threads * images + s.batch - 1) / s.batch);
      for (int64_t part = 0; part < parts; ++part) {
        const Range range = part_of(images, parts, part);
        if (range.begin < range.end) all[count++] = {i, start[i] + range.begin, range.end - range.begin};
      }
    }
  }
};

template <typename S>
class MaskedForward {
  using T = Accumulate<S>;
  using Activation = masked_conv2d::Activation;

  // Some images of a sub-network, at `order + first`.
  struct Unit {
    int64_t subnet, first, frame;
    T* planes;
  };

 public:
  MaskedForward(const MaskedConv2d& args, const Groups& groups, const Host& host)
      : args_(args),
        host_(host),
        s_(args.sizes),
        blocks_(args, host),
        order_(groups.order),
        whole_{{args.x, groups.order}, {args.out, groups.order}} {
    scale_ = vector(args.scale, s_.out_channels);
    shift_ = vector(args.shift, s_.out_channels);
    gate_ = vector(args.gate, s_.batch * s_.outputs);
    panels_ = static_cast<const T*>(args.packed);
    if (panels_ == nullptr) {
      T* panels = shared<T>(host, blocks_.panels);
      pack_panels(args, blocks_, panels, host);
      panels_ = panels;
    }
    divide(groups);
  }

  void run() const {
    const int64_t operations = 2 * blocks_.panels / s_.subnets * s_.batch * s_.conv_positions();
    const int64_t threads = operations < kWorthThreads ? 1 : host_.threads;
    if (threads > 1 && units_count_ < 2 * threads) return run_blocks();
    parallel(host_, threads, [&](int64_t task) {
      run_units(part_of(units_count_, threads, task), whole_, static_cast<T*>(host_.scratch(memory() * sizeof(T))));
    });
  }

  // By the calling thread, which has memory() elements for it.
  void run_group(int64_t group, const Ends& ends, T* memory) const {
    run_units({first_unit_[group], first_unit_[group + 1]}, ends, memory);
  }
  int64_t memory() const { return strip_size_ + planes_size_; }

 private:
  const T* vector(const void* data, int64_t numel) const {
    return data == nullptr ? nullptr : as_accumulate<T>(host_, data, args_.parameter_dtype, numel);
  }

  // Units of nearly equal sizes, and a frame with its walk for each size.
  void divide(const Groups& groups) {
    const int64_t together = std::min(images_together<T>(s_), s_.batch);
    units_ = shared<Unit>(host_, s_.batch);
    first_unit_ = shared<int64_t>(host_, groups.count + 1);
    frame_of_ = shared<int64_t>(host_, together + 1);
    std::fill_n(frame_of_, together + 1, int64_t(-1));
    frames_ = static_cast<Frame<T>*>(host_.shared(host_.self, together * sizeof(Frame<T>)));
    walks_ = static_cast<Walk<T>*>(host_.shared(host_.self, together * sizeof(Walk<T>)));
    for (int64_t g = 0; g < groups.count; ++g) {
      const Groups::Group& group = groups.all[g];
      const int64_t parts = (group.images + together - 1) / together;
      first_unit_[g] = units_count_;
      for (int64_t part = 0; part < parts; ++part) {
        const Range range = part_of(group.images, parts, part);
        const Unit unit{group.subnet, group.first + range.begin, frame(range.end - range.begin), nullptr};
        planes_size_ = std::max(planes_size_, frame_of(unit).elements(inputs_of(unit)));
        units_[units_count_++] = unit;
      }
    }
    first_unit_[groups.count] = units_count_;
    for (int64_t f = 0; f < frames_count_; ++f) {
      // Pooling reads two vectors of a row, whatever it has.
      strip_size_ = std::max(strip_size_, strip_pitch(frames_[f]) * kTileOutputs + 2 * kLanes<T>);
    }
  }

  int64_t frame(int64_t images) {
    if (frame_of_[images] < 0) {
      frames_[frames_count_] = Frame<T>(s_, images);
      walks_[frames_count_] = Walk<T>(s_, frames_[frames_count_], host_);
      frame_of_[images] = frames_count_++;
    }
    return frame_of_[images];
  }

  const Frame<T>& frame_of(const Unit& unit) const { return frames_[unit.frame]; }
  int64_t inputs_of(const Unit& unit) const { return list_length(args_.inputs + unit.subnet * s_.inputs, s_.inputs); }
  Range blocks_of(const Unit& unit) const { return {blocks_.first[unit.subnet], blocks_.first[unit.subnet + 1]}; }

  void write_planes_of(const Unit& unit, const Images& x, Range channels, T* planes) const {
    const Frame<T>& frame = frame_of(unit);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      write_channel<S>(s_, frame, walks_[unit.frame], x.maps, x.places + unit.first, c, planes + c * frame.channel);
    }
  }

  int64_t strip_pitch(const Frame<T>& frame) const { return frame.vectors(s_, frame.strip_rows) * kLanes<T>; }

  // Whole units, by the calling thread.
  void run_units(Range units, const Ends& ends, T* memory) const {
    T *strip = memory, *planes = strip + strip_size_;
    for (int64_t u = units.begin; u < units.end; ++u) {
      const Unit& unit = units_[u];
      const int64_t inputs = inputs_of(unit);
      write_planes_of(unit, ends.x, {0, inputs}, planes);
      clear_slack(frame_of(unit), inputs, planes);
      const Range blocks = blocks_of(unit);
      run_strips(unit, ends.out, planes, {0, (blocks.end - blocks.begin) * frame_of(unit).strips(s_)}, strip);
      clear_absent(unit, ends.out);
    }
  }

  // Vectors of the last row reach behind the planes.
  void clear_slack(const Frame<T>& frame, int64_t inputs, T* planes) const {
    std::fill_n(planes + inputs * frame.channel, frame.elements(inputs) - inputs * frame.channel, T(0));
  }

  // Few units: all threads make the planes of all, then share out blocks and strips.
  void run_blocks() const {
    int64_t* first = shared_zeros<int64_t>(host_, units_count_ + 1);
    int64_t* channels = shared_zeros<int64_t>(host_, units_count_ + 1);
    for (int64_t u = 0; u < units_count_; ++u) {
      Unit& unit = units_[u];
      const int64_t inputs = inputs_of(unit);
      unit.planes = shared<T>(host_, frame_of(unit).elements(inputs));
      clear_slack(frame_of(unit), inputs, unit.planes);
      const Range blocks = blocks_of(unit);
      first[u + 1] = first[u] + (blocks.end - blocks.begin) * frame_of(unit).strips(s_);
      channels[u + 1] = channels[u] + inputs;
    }
    share(channels, [&](const Unit& unit, Range range) { write_planes_of(unit, whole_.x, range, unit.planes); });
    share(first, [&](const Unit& unit, Range range) {
      T* strip = static_cast<T*>(host_.scratch(strip_size_ * sizeof(T)));
      run_strips(unit, whole_.out, unit.planes, range, strip);
    });
    for (int64_t u = 0; u < units_count_; ++u) clear_absent(units_[u], whole_.out);
  }

  // Splits the items of all units, of which unit u has [first[u], first[u + 1]), among the threads.
  template <typename Work>
  void share(const int64_t* first, Work work) const {
    const int64_t items = first[units_count_], tasks = task_count(host_, items);
    parallel(host_, tasks, [&](int64_t task) {
      const Range own = part_of(items, tasks, task);
      for (int64_t u = 0; u < units_count_; ++u) {
        const Range range{std::max(own.begin, first[u]) - first[u], std::min(own.end, first[u + 1]) - first[u]};
        if (range.begin < range.end) work(units_[u], range);
      }
    });
  }

  // Items are strips x blocks.
  void run_strips(const Unit& unit, const Images& out, const T* planes, Range items, T* strip) const {
    const Frame<T>& frame = frame_of(unit);
    const Range blocks = blocks_of(unit);
    const int64_t count = blocks.end - blocks.begin, pitch = strip_pitch(frame);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const Block& block = blocks_.all[blocks.begin + item % count];
      const int64_t top = item / count * frame.strip_rows;
      const int64_t rows = std::min(frame.strip_rows, s_.rows.output() - top);
      const Block& next = blocks_.all[blocks.begin + (item + 1) % count];
      const int64_t ahead = item + 1 < items.end ? next.panel - block.panel : 0;
      masked_block(s_, frame, walks_[unit.frame], block, top, planes + block.input * frame.channel + top * frame.pitch,
                   panels_ + block.panel, ahead, frame.vectors(s_, rows), strip, pitch);
      for (int64_t o = 0; o < block.count; ++o)
        finish(unit, out, block.output + o, {top, top + rows}, strip + o * pitch);
    }
  }

  // Scale, shift, gate and activation of one output's strip, and its way to the result.
  void finish(const Unit& unit, const Images& out, int64_t output, Range rows, T* strip) const {
    const Frame<T>& frame = frame_of(unit);
    const int64_t channel = args_.outputs[unit.subnet * s_.outputs + output], width = s_.out_width();
    const T scale = scale_ == nullptr ? 1 : scale_[channel], shift = shift_ == nullptr ? 0 : shift_[channel];
    const int64_t vectors = frame.vectors(s_, rows.end - rows.begin);
    const auto target = [&](int64_t n) {
      return out.image<S>(unit.first + n) + output * out.maps.stride[1] + rows.begin / s_.pool * width;
    };
    if constexpr (std::is_same_v<S, T>) {
      if (gate_ == nullptr && s_.pool == 1 && frame.in_order(s_)) {
        return finish_vectors(vectors, scale, shift, s_.activation, strip, target(0));
      }
    }
    finish_vectors(vectors, scale, shift, gate_ == nullptr ? s_.activation : Activation::kNone, strip, strip);
    if (gate_ != nullptr) apply_gates(unit, output, rows.end - rows.begin, vectors, strip);
    const int64_t height = (rows.end - rows.begin) / s_.pool;
    for (int64_t y = 0; s_.pool > 1 && y < height; ++y) {
      pool_rows(frame, strip + 2 * y * frame.row_slots, strip + y * frame.row_slots);
    }
    for (int64_t n = 0; n < frame.images; ++n) {
      S* to = target(n);
      const T* from = strip + n;
      for (int64_t y = 0; y < height; ++y, from += frame.row_slots, to += width) {
        if (frame.images == 1) {
          convert(from, to, width);
        } else {
          for (int64_t x = 0; x < width; ++x) from_accumulate(from[x * frame.images], to[x]);
        }
      }
    }
  }

  static void finish_vectors(int64_t vectors, T scale, T shift, Activation activation, const T* from, T* to) {
    const auto write = [=](auto activate) {
      for (int64_t v = 0; v < vectors * kLanes<T>; v += kLanes<T>) {
        store<T>(to + v, activate(load<T>(from + v) * scale + shift));
      }
    };
    if (activation == Activation::kNone) return write([](Vec<T> v) { return v; });
    if (activation == Activation::kRelu) return write([](Vec<T> v) { return relu<T>(v); });
    write([](Vec<T> v) { return relu6(v); });
  }

  // The largest elements of windows of two rows from `from` on and two columns; `to` may be the first of the rows.
  void pool_rows(const Frame<T>& frame, T* from, T* to) const {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>();
    const int64_t images = frame.images, columns = s_.columns.output() * images, width = s_.out_width();
    if (images > 1) {
      for (int64_t i = 0; i < columns; i += kLanes<T>) {
        store<T>(from + i, larger<T>(load<T>(from + i), load<T>(from + frame.row_slots + i)));
      }
      for (int64_t x = 0; x < width; ++x) {
        const T *left = from + 2 * x * images, *right = left + images;
        for (int64_t n = 0; n < images; ++n) to[x * images + n] = larger(left[n], right[n]);
      }
      return;
    }
    for (int64_t x = 0; x < width; x += kLanes<T>) {
      const T *first = from + 2 * x, *second = first + frame.row_slots;
      const Vec<T> a = larger<T>(load<T>(first), load<T>(second));
      const Vec<T> b = larger<T>(load<T>(first + kLanes<T>), load<T>(second + kLanes<T>));
      store<T>(to + x, larger<T>(even_lanes<T>(a, b, lanes), odd_lanes<T>(a, b, lanes)));
    }
  }

  void apply_gates(const Unit& unit, int64_t output, int64_t rows, int64_t vectors, T* strip) const {
    const Frame<T>& frame = frame_of(unit);
    for (int64_t n = 0; n < frame.images; ++n) {
      const T gate = gate_[order_[unit.first + n] * s_.outputs + output];
      for (int64_t y = 0; y < rows; ++y) {
        T* row = strip + y * frame.row_slots + n;
        for (int64_t x = 0; x < s_.columns.output(); ++x) row[x * frame.images] *= gate;
      }
    }
    finish_vectors(vectors, T(1), T(0), s_.activation, strip, strip);
  }

  static Vec<T> relu6(Vec<T> v) {
    const Vec<T> positive = relu<T>(v), six = splat<T>(6);
    return positive > six ? six : positive;
  }

  // Zeros behind the last output of a shorter list.
  void clear_absent(const Unit& unit, const Images& out) const {
    const int64_t kept = list_length(args_.outputs + unit.subnet * s_.outputs, s_.outputs);
    for (int64_t n = 0; n < frame_of(unit).images; ++n) {
      S* to = out.image<S>(unit.first + n);
      std::memset(static_cast<void*>(to + kept * out.maps.stride[1]), 0,
                  (s_.outputs - kept) * s_.out_height() * s_.out_width() * sizeof(S));
    }
  }

  const MaskedConv2d& args_;
  const Host& host_;
  MaskedSizes s_;
  Blocks blocks_;
  const T *scale_, *shift_, *gate_, *panels_;
  const int64_t* order_;
  Ends whole_;                       // of all images
  int64_t *first_unit_, *frame_of_;  // by group; by images
  Unit* units_;
  Frame<T>* frames_;
  Walk<T>* walks_;
  int64_t units_count_ = 0, frames_count_ = 0;
  int64_t planes_size_ = 0, strip_size_ = 0;  // elements of a thread's memory: a unit's planes, a block's strip
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
