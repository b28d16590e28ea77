// The gradient by the embeddings: similarities again, in place of each the loss's gradient by it, and its products with
// the embeddings of the rows and of the columns.
#pragma once

#include "cpu/peer_contrast/positives.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

template <typename T>
class Backward {
 public:
  explicit Backward(const Call<T>& call) : call_(call), s_(call.s), blocks_(call.blocks) {}

  void operator()() {
    const int64_t block = blocks_.width() * blocks_.pitch();
    gradient_ = shared<T>(call_.host, blocks_.count() * block);
    parallel(call_.host, blocks_.count(), [&](int64_t k) { std::memset(gradient_ + k * block, 0, block * sizeof(T)); });
    if (!call_.finite && s_.start < s_.stop) return write_not_finite();
    prepare_weights();
    with_exponents(call_.exponents, [&](auto exponents) {
      blocks_.visit([&](int64_t a, int64_t b, T* x) {
        a == b ? to_gradients<exponents(), true>(a, b, x) : to_gradients<exponents(), false>(a, b, x);
        add_products(a, b, x);
      });
    });
    add_positives();
  }

 private:
  double grad(int term) const { return static_cast<double>(static_cast<const T*>(call_.args.grad_terms)[term]); }

  // Of a counted row's contrast.
  double hard_factor(int term) const {
    return grad(term) / (call_.args.temperature * static_cast<double>(call_.counted > 0 ? call_.counted : 1));
  }
  double soft_factor(int term) const {
    return grad(term) * call_.args.soft_temperature / (call_.args.temperature * static_cast<double>(s_.batch));
  }

  // Factors of the exponentials in the gradient by S; 0 in the padding.
  void prepare_weights() {
    for (int q = 0; q < 2; ++q) {
      weights_[q] = shared_zeros<T>(call_.host, call_.padded_pairs());
      shifts_[q] = shared_zeros<T>(call_.host, call_.padded_pairs());
    }
    for (int64_t i = 0; i < s_.peers; ++i) {
      for (int64_t j = 0; j < s_.peers; ++j) {
        const double factor[2] = {hard_factor(i == j ? peer_contrast::kVcl : peer_contrast::kIcl),
                                  soft_factor(i == j ? peer_contrast::kSoftVcl : peer_contrast::kSoftIcl)};
        for (int64_t r = 0; r < s_.batch; ++r) {
          const bool used[2] = {call_.counts(r), s_.active(r)};
          const int64_t at = call_.at(i, j, 0) + r;
          for (int q = 0; q < 2; ++q) {
            // exp(x - infinity) = 0 where the weight is 0, instead of an exponential that may be infinite
            shifts_[q][at] = used[q] ? call_.largest(q, i, j)[r] : static_cast<T>(INFINITY);
            weights_[q][at] = used[q] ? static_cast<T>(factor[q] / static_cast<double>(call_.total(q, i, j)[r])) : T(0);
          }
        }
      }
    }
  }

  // A place in the blocks' similarities: row r of (i, j) in block a, and columns c of block b.
  struct Place {
    int64_t row, column;  // of (i, j) and (j, i)
    IndexVec<T> other;    // columns that are not the row itself
  };

  template <bool Diagonal>
  Place place(int64_t a, int64_t b, int64_t i, int64_t j, int64_t r, int64_t c) const {
    const IndexVec<T> other = Diagonal ? call_.others(a, b, r, c) : IndexVec<T>{};
    return {call_.at(i, j, a) + r, call_.at(j, i, b) + c, other};
  }

  // Probabilities of columns in a row's softmax plus those of the row in the columns' softmaxes, each by its weight:
  // without the row itself, and softened.
  struct Probabilities {
    Vec<T> hard, soft;
  };

  template <Exponents kExponents, bool Diagonal>
  Probabilities probabilities(Vec<T> x, const Place& at) const {
    Vec<T> hard, soft;
    if constexpr (kExponents == Exponents::kShifted) {
      hard = shifted<0>(x, at, call_.scale);
      soft = shifted<1>(x, at, call_.soften);
    } else {
      const Exponentials<kExponents, T> e(call_, x);
      hard = e.hard * (load<T>(weights_[0] + at.column) + weights_[0][at.row]);
      soft = e.soft * (load<T>(weights_[1] + at.column) + weights_[1][at.row]);
    }
    return {Diagonal ? masked<T>(hard, at.other) : hard, soft};
  }

  template <int Q>
  Vec<T> shifted(Vec<T> x, const Place& at, T scale) const {
    const Vec<T> row = exp((x - shifts_[Q][at.row]) * scale),
                 column = exp((x - load<T>(shifts_[Q] + at.column)) * scale);
    return row * weights_[Q][at.row] + column * load<T>(weights_[Q] + at.column);
  }

  template <Exponents kExponents, bool Diagonal>
  void to_gradients(int64_t a, int64_t b, T* x) const {
    for (int64_t r = 0; r < blocks_.size(); ++r) {
      own_to_gradients<kExponents, Diagonal>(a, b, x, r);
      for (int64_t i = 0; i < s_.peers; ++i) {
        for (int64_t j = 0; j < i; ++j) pair_to_gradients<kExponents, Diagonal>(a, b, x, i, j, r);
      }
    }
  }

  // Of a student (i, i): by each other peer's target, its own softmax less the target's.
  template <Exponents kExponents, bool Diagonal>
  void own_to_gradients(int64_t a, int64_t b, T* x, int64_t r) const {
    T* soft = x + blocks_.width() * blocks_.width();
    for (int64_t i = 0; i < s_.peers; ++i) {
      T* own = call_.tile(x, i, i, r);
      for (int64_t c = 0; c < blocks_.size(); c += kLanes<T>) {
        const auto p = probabilities<kExponents, Diagonal>(load<T>(own + c), place<Diagonal>(a, b, i, i, r, c));
        store<T>(own + c, p.hard);
        store<T>(soft + i * blocks_.size() + c, p.soft);
      }
    }
    for (int64_t i = 0; i < s_.peers; ++i) {
      T* own = call_.tile(x, i, i, r);
      for (int64_t c = 0; c < blocks_.size(); c += kLanes<T>) {
        Vec<T> sum{};
        for (int64_t k = 0; k < s_.peers; ++k) {
          sum += load<T>(soft + i * blocks_.size() + c) - load<T>(soft + k * blocks_.size() + c);
        }
        store<T>(own + c, load<T>(own + c) + sum);
      }
    }
  }

  template <Exponents kExponents, bool Diagonal>
  void pair_to_gradients(int64_t a, int64_t b, T* x, int64_t i, int64_t j, int64_t r) const {
    T *one = call_.tile(x, i, j, r), *two = call_.tile(x, j, i, r);
    for (int64_t c = 0; c < blocks_.size(); c += kLanes<T>) {
      const auto p = probabilities<kExponents, Diagonal>(load<T>(one + c), place<Diagonal>(a, b, i, j, r, c));
      const auto q = probabilities<kExponents, Diagonal>(load<T>(two + c), place<Diagonal>(a, b, j, i, r, c));
      const Vec<T> soft = p.soft - q.soft;
      store<T>(one + c, p.hard + soft);
      store<T>(two + c, q.hard - soft);
    }
  }

  void add_products(int64_t a, int64_t b, const T* x) const {
    const int64_t width = blocks_.width(), pitch = blocks_.pitch();
    T *rows = gradient_ + a * width * pitch, *columns = gradient_ + b * width * pitch;
    product<T>({x, width, 1}, blocks_.rows(b), pitch, rows, pitch, width, pitch, width, Result::kAdded);
    if (a == b) return;
    product<T>({x, 1, width}, blocks_.rows(a), pitch, columns, pitch, width, pitch, width, Result::kAdded);
  }

  void add_positives() const {
    Positives<T>(call_).add_gradient(-hard_factor(peer_contrast::kVcl), -hard_factor(peer_contrast::kIcl), gradient_,
                                     [&](int64_t image) { write(image); });
  }

  void write_not_finite() const {
    const int64_t count = s_.peers * blocks_.padded_batch() * blocks_.pitch();
    for (int64_t k = 0; k < count; ++k) gradient_[k] = static_cast<T>(NAN);
    for (int64_t image = 0; image < s_.batch; ++image) write(image);
  }

  void write(int64_t image) const {
    for (int64_t peer = 0; peer < s_.peers; ++peer) {
      const int64_t first = (peer * s_.batch + image) * s_.features;
      write_row<T>(gradient_ + blocks_.place(peer, image), call_.args.grad_embeddings, call_.args.dtype, first,
                   s_.features);
    }
  }

  const Call<T>& call_;
  const peer_contrast::Sizes& s_;
  const Blocks<T>& blocks_;
  T *weights_[2], *shifts_[2];  // for every pair of peers and row of the padded batch
  T* gradient_ = nullptr;       // rows as in blocks_
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
