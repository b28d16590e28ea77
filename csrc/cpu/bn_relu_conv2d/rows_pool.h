// Pools of relu(BN(x)) where images lie innermost (rows.h), so that a window's elements are vectors, and their backward
// passes: the mean of 2x2, and the maximum of 3x3 at a stride of two, whose x are planes that are brought into this
// order channel by channel, in cache.
#pragma once

#include "cpu/bn_relu_conv2d/pool.h"
#include "cpu/bn_relu_conv2d/rows.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// Calls work(first image, images left) for every vector of a position's images.
template <typename T, typename Work>
inline void for_each_vector(int64_t images, Work work) {
  for (int64_t n = 0; n < images; n += kLanes<T>) work(n, images - n);
}

template <typename T>
class RowsPool {
 public:
  RowsPool(const BNReLUConv2d& args, const Host& host)
      : call_(args, host), extent_(pooled_extent(call_.s)), line_(call_.s.width * call_.s.batch) {}

  void forward() const {
    const Image<const T> x = rows_of<const T>(call_.args.x);
    const Image<T> out = rows_of<T>(call_.args.out);
    parallel_parts(call_.host, call_.s.in_channels, [&](Range channels) {
      for (int64_t c = channels.begin; c < channels.end; ++c) average(c, x.row(c), out.row(c));
    });
  }

  void backward() const {
    const Image<const T> x = rows_of<const T>(call_.args.x), dy = rows_of<const T>(call_.args.grad_out);
    const Image<T> grad_x = rows_of<T>(call_.args.grad_x);
    const int64_t elements = call_.s.height * line_;
    parallel_parts(call_.host, call_.s.in_channels, [&](Range channels) {
      T* dz = static_cast<T*>(call_.host.scratch(round_up<T>(elements) * sizeof(T)));
      std::memset(dz, 0, elements * sizeof(T));
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        spread(dy.row(c), dz);
        finish_row(call_, c, elements, x.row(c), dz, grad_x.row(c));
      }
    });
  }

 private:
  // work(first element of a window in a row of x, of the result) for every window.
  template <typename Work>
  void for_each_window(Work work) const {
    const int64_t batch = call_.s.batch;
    for (int64_t y = 0; y < extent_.height; ++y) {
      for (int64_t x = 0; x < extent_.width; ++x) {
        work(2 * y * line_ + 2 * x * batch, (y * extent_.width + x) * batch);
      }
    }
  }

  void average(int64_t c, const T* x, T* to) const {
    const int64_t batch = call_.s.batch;
    for_each_window([&](int64_t window, int64_t result) {
      for_each_vector<T>(batch, [&](int64_t n, int64_t left) {
        const auto z = [&](int64_t offset) {
          return call_.norm().relu_of(load_first<T>(x + window + offset + n, left), c);
        };
        store_first(to + result + n, T(0.25) * (z(0) + z(batch) + z(line_) + z(line_ + batch)), left);
      });
    });
  }

  void spread(const T* dy, T* dz) const {
    const int64_t batch = call_.s.batch;
    for_each_window([&](int64_t window, int64_t result) {
      for_each_vector<T>(batch, [&](int64_t n, int64_t left) {
        const Vec<T> part = T(0.25) * load_first<T>(dy + result + n, left);
        for (const int64_t offset : {int64_t{0}, batch, line_, line_ + batch}) {
          store_first(dz + window + offset + n, part, left);
        }
      });
    });
  }

  Convolution<T> call_;
  Extent extent_;
  int64_t line_;  // elements of one line of x
};

// Windows are centred on every second position; beyond the map there is nothing. Of equal values the first counts, and
// of values one of which is NaN the last that is, as in torch.
template <typename T>
class RowsMaxPool {
 public:
  RowsMaxPool(const BNReLUConv2d& args, const Host& host)
      : call_(args, host),
        s_(call_.s),
        out_height_((s_.height + 1) / 2),
        out_width_((s_.width + 1) / 2),
        pitch_(round_up<T>(s_.batch)),
        elements_(s_.positions() * pitch_) {}

  void forward() const {
    const Image<T> out = rows_of<T>(call_.args.out);
    parallel_parts(call_.host, s_.in_channels, [&](Range channels) {
      T* z = static_cast<T*>(call_.host.scratch(elements_ * sizeof(T)));
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        load_channel(c, z);
        activate(c, z, z);
        choose(z, out.row(c));
      }
    });
  }

  void backward() const {
    const Image<const T> dy = rows_of<const T>(call_.args.grad_out);
    parallel_parts(call_.host, s_.in_channels, [&](Range channels) {
      const auto memory = carve_scratch<Memory>(call_.host, *this);
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        load_channel(c, memory.x);
        activate(c, memory.x, memory.z);
        std::memset(memory.dz, 0, elements_ * sizeof(T));
        pass_back(memory.z, dy.row(c), memory.dz);
        finish_row(call_, c, elements_, memory.x, memory.dz, memory.dz);
        store_channel(c, memory.dz, memory.z);
      }
    });
  }

 private:
  // Of one channel, [position][pitch_].
  struct Memory {
    T *x, *z, *dz;

    void carve(Arena& arena, const RowsMaxPool& of) {
      x = arena.take<T>(of.elements_);
      z = arena.take<T>(round_up<T>(of.s_.positions()) * of.pitch_);
      dz = arena.take<T>(of.elements_);
    }
  };

  // Lanes beyond the images are zero.
  void load_channel(int64_t c, T* to) const {
    const Map& x = call_.args.x;
    const T* from = static_cast<const T*>(x.data) + c * x.stride[1];
    const T* end = from + (s_.batch - 1) * x.stride[0] + s_.positions();
    transpose_matrix(from, x.stride[0], end, s_.batch, s_.positions(), to, pitch_);
  }

  void store_channel(int64_t c, const T* from, T* planes) const {
    const Map& grad_x = call_.args.grad_x;
    const int64_t positions = s_.positions(), pitch = round_up<T>(positions);
    transpose_matrix(from, pitch_, from + elements_, positions, s_.batch, planes, pitch);
    T* to = static_cast<T*>(grad_x.data) + c * grad_x.stride[1];
    for (int64_t n = 0; n < s_.batch; ++n) {
      std::memcpy(to + n * grad_x.stride[0], planes + n * pitch, positions * sizeof(T));
    }
  }

  void activate(int64_t c, const T* x, T* z) const {
    for (int64_t i = 0; i < elements_; i += kLanes<T>) store<T>(z + i, call_.norm().relu_of(load<T>(x + i), c));
  }

  // work(window, first element of the result) for every window; window(visit) calls visit(first element) for every
  // position of it that lies inside the map.
  template <typename Work>
  void for_each_window(Work work) const {
    for (int64_t y = 0; y < out_height_; ++y) {
      const Range rows{std::max<int64_t>(2 * y - 1, 0), std::min(2 * y + 2, s_.height)};
      for (int64_t x = 0; x < out_width_; ++x) {
        const Range columns{std::max<int64_t>(2 * x - 1, 0), std::min(2 * x + 2, s_.width)};
        const auto window = [&](auto visit) {
          for (int64_t row = rows.begin; row < rows.end; ++row) {
            for (int64_t column = columns.begin; column < columns.end; ++column) {
              visit((row * s_.width + column) * pitch_);
            }
          }
        };
        work(window, (y * out_width_ + x) * s_.batch);
      }
    }
  }

  void choose(const T* z, T* to) const {
    for_each_window([&](auto window, int64_t result) {
      for_each_vector<T>(s_.batch, [&](int64_t n, int64_t left) {
        Vec<T> most = splat<T>(-std::numeric_limits<T>::infinity());
        window([&](int64_t at) {
          const Vec<T> value = load<T>(z + at + n);
          most = exceeds(value, most) ? value : most;
        });
        store_first(to + result + n, most, left);
      });
    });
  }

  void pass_back(const T* z, const T* dy, T* dz) const {
    for_each_window([&](auto window, int64_t result) {
      for_each_vector<T>(s_.batch, [&](int64_t n, int64_t left) {
        Vec<T> most = splat<T>(-std::numeric_limits<T>::infinity()), place{};
        T tap = 0;
        window([&](int64_t at) {
          const Vec<T> value = load<T>(z + at + n);
          const auto better = exceeds(value, most);
          most = better ? value : most;
          place = better ? splat<T>(tap) : place;
          tap += 1;
        });
        const Vec<T> gradient = load_first<T>(dy + result + n, left), zero{};
        tap = 0;
        window([&](int64_t at) {
          T* to = dz + at + n;
          store<T>(to, load<T>(to) + (place == splat<T>(tap) ? gradient : zero));
          tap += 1;
        });
      });
    });
  }

  static auto exceeds(Vec<T> value, Vec<T> most) { return (value > most) | (value != value); }

  Convolution<T> call_;
  ConvolutionSizes s_;
  int64_t out_height_, out_width_;
  int64_t pitch_;     // of the images of a position
  int64_t elements_;  // of a channel in that order
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
