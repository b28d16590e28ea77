// The positives' part of vcl and icl. Sums over pairs of a class are products of sums over its images, so they cost
// nothing of the size batch x batch:
//   sum_r sum_{p != r} v_i[r] . v_j[p] = A_i . C_j - sum_r v_i[r] . v_j[r]
// with C the sum over a class's images and A that over its active rows, which r runs through. In double: with few
// images in a class the differences are much smaller than their terms.
#pragma once

#include "cpu/peer_contrast/call.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

inline Vec<double> load_doubles(const double* p) { return load<double>(p); }
inline void add_doubles(double* p, Vec<double> v) { store<double>(p, load<double>(p) + v); }

typedef float Floats __attribute__((vector_size(kVectorBytes / 2)));

inline Vec<double> load_doubles(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, Vec<double>);
}
inline void add_doubles(float* p, Vec<double> v) {
  const Floats sum = __builtin_convertvector(load_doubles(p) + v, Floats);
  std::memcpy(p, &sum, sizeof(sum));
}

template <typename T>
class Positives {
 public:
  explicit Positives(const Call<T>& call) : call_(call), args_(call.args), s_(call.s) {}

  // The sum over active rows of their mean similarity with positives, within peers and between them.
  struct Means {
    double within, between;
  };

  Means means() const {
    Means* of_class = shared<Means>(call_.host, args_.classes);
    parallel(call_.host, args_.classes, [&](int64_t k) { of_class[k] = means(k); });
    Means sum{};
    for (int64_t k = 0; k < args_.classes; ++k) {
      sum.within += of_class[k].within;
      sum.between += of_class[k].between;
    }
    return sum;
  }

  // Adds the gradient of within * means().within + between * means().between to `gradient`, whose rows stand as in
  // call.blocks, and calls written(image) when an image's rows are complete.
  template <typename Written>
  void add_gradient(double within, double between, T* gradient, Written written) const {
    parallel(call_.host, args_.classes, [&](int64_t k) {
      const double factor = 1 / static_cast<double>(images(k) > 1 ? images(k) - 1 : 1);
      for (int64_t f = 0; f < call_.blocks.pitch() && images(k) > 1; f += kLanes<double>) {
        add_features(k, f, within * factor, between * factor, gradient);
      }
      for_images(k, written);
    });
  }

 private:
  struct Sums {
    Vec<double> images, active;  // C and A
  };

  int64_t images(int64_t k) const { return args_.begins[k + 1] - args_.begins[k]; }

  template <typename Work>
  void for_images(int64_t k, Work work) const {
    for (int64_t p = args_.begins[k]; p < args_.begins[k + 1]; ++p) work(args_.images[p]);
  }

  Vec<double> features(int64_t peer, int64_t image, int64_t f) const {
    return load_doubles(call_.blocks.row(peer, image) + f);
  }

  // Of some features of a class: by peer, then of all peers together.
  Sums* sums(int64_t k, int64_t f) const {
    Sums* of_peer = static_cast<Sums*>(call_.host.scratch((s_.peers + 1) * sizeof(Sums)));
    of_peer[s_.peers] = Sums{};
    for (int64_t peer = 0; peer < s_.peers; ++peer) {
      Sums sum{};
      for_images(k, [&](int64_t image) {
        const Vec<double> x = features(peer, image, f);
        sum.images += x;
        if (s_.active(image)) sum.active += x;
      });
      of_peer[peer] = sum;
      of_peer[s_.peers].images += sum.images;
      of_peer[s_.peers].active += sum.active;
    }
    return of_peer;
  }

  Means means(int64_t k) const {
    if (images(k) == 1) return {};
    Vec<double> within{}, all{};
    for (int64_t f = 0; f < call_.blocks.pitch(); f += kLanes<double>) {
      const Sums* sum = sums(k, f);
      for (int64_t peer = 0; peer < s_.peers; ++peer) within += sum[peer].active * sum[peer].images;
      all += sum[s_.peers].active * sum[s_.peers].images;
      for_images(k, [&](int64_t image) {
        if (!s_.active(image)) return;
        Vec<double> total{};
        for (int64_t peer = 0; peer < s_.peers; ++peer) {
          const Vec<double> x = features(peer, image, f);
          within -= x * x;
          total += x;
        }
        all -= total * total;
      });
    }
    const double others = static_cast<double>(images(k) - 1);
    // With one peer, `all` and `within` are one number that may be rounded in two ways.
    return {sum_lanes<double>(within) / others, s_.peers > 1 ? sum_lanes<double>(all - within) / others : 0};
  }

  // A row's own similarity is taken from those of row and column: C - v as a row, A - v as a column.
  void add_features(int64_t k, int64_t f, double within, double between, T* gradient) const {
    const Sums* sum = sums(k, f);
    for_images(k, [&](int64_t image) {
      const double active = s_.active(image) ? 1 : 0;
      const auto pull = [&](const Sums& of, Vec<double> x) { return active * (of.images - 2 * x) + of.active; };
      Vec<double> total{};
      for (int64_t peer = 0; peer < s_.peers; ++peer) total += features(peer, image, f);
      const Vec<double> all = pull(sum[s_.peers], total);
      for (int64_t peer = 0; peer < s_.peers; ++peer) {
        const Vec<double> own = pull(sum[peer], features(peer, image, f));
        add_doubles(gradient + call_.blocks.place(peer, image) + f, within * own + between * (all - own));
      }
    });
  }

  const Call<T>& call_;
  const PeerContrast& args_;
  const peer_contrast::Sizes& s_;
};

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
